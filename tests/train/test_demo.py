"""The demo on a network of a few thousand parameters: files, page, sample; and what its command refuses."""

import json
from pathlib import Path

import pytest

from nautile.cli import main
from nautile.train import demo
from nautile.train.page import gather

NANO = Path(__file__).parents[2] / "src" / "nautile" / "weights" / "nano"


def test_the_demo_learns_and_leaves_a_run(tmp_path, monkeypatch):
    small = demo.SMALL.replace(
        hidden_size=64, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), num_attention_heads=2, head_dim=32,
        q_lora_rank=32, o_groups=1, o_lora_rank=32, moe_intermediate_size=32, num_hash_layers=1,
    )  # fmt: skip
    for name, value in (("SMALL", small), ("_LENGTH", 128), ("_ROWS", 2), ("_SHARD", 8), ("_PROBE_EVERY", 10)):
        monkeypatch.setattr(demo, name, value)
    rows = []
    progress, text = demo.run_demo(tmp_path, NANO, 300.0, rows.append, steps=15)
    assert progress.step == 15 and rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert text.startswith("<｜begin▁of▁sentence｜><｜User｜>") and "<｜Assistant｜>" in text
    found = gather(tmp_path)
    assert found["sample"] == text and len(found["rows"]) == len(rows)
    assert [probe["step"] for probe in found["probes"]] == [1, 10, 15]
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 64


def test_the_network_has_ten_million_parameters():
    assert demo.SMALL.hidden_size == 256 and demo.SMALL.layer_ratios == (0, 4, 128, 4, 128, 4)


@pytest.mark.parametrize(
    "command", [["demo", "--out", "{run}"], ["page", "{nothing}"], ["grpo", "--init", "{nothing}", "--out", "{run}"]]
)
def test_commands_say_what_is_wrong_in_one_line(tmp_path, capsys, command):
    (tmp_path / "log.jsonl").touch()
    places = {"{run}": str(tmp_path), "{nothing}": str(tmp_path / "nothing")}
    assert main(["train", *(places.get(word, word) for word in command)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("nautile: ") and len(said.splitlines()) == 1 and "Traceback" not in said


def test_environments_are_listed_and_checked(capsys):
    assert main(["train", "env", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert sum(not row["held_out"] for row in rows) >= 10 and sum(row["held_out"] for row in rows) == 4
    assert main(["train", "env", "check", "nothing"]) == 1
    assert "choose from" in capsys.readouterr().err
