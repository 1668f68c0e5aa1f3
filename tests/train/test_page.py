"""The page of a run: it holds everything, survives hostile text, and works in a browser."""

import json
import re
import shutil

import pytest
import torch

from nautile.train.page import gather, page
from nautile.train.probe import probe
from nautile.train.run_state import RunError
from oracles.random_models import random_ids, tiny_network

HOSTILE = "</script><script>document.title='broken'</script> \u2028 ünïcode 日本"


def run_directory(directory):
    """A run of three steps with a log, probes, trajectories and scores."""
    rows = [
        {"step": step, "loss": 3.0 / step, "mtp": 4.0 / step, "tokens_per_second": 900.0, "reward": step / 4,
         "length": 80 - step, "kl": 0.01 * step, "difference_max": 0.0, "grad_norm": 1.0, "divergence": {"files": 1.0 / step}}
        for step in (1, 2, 3)
    ]  # fmt: skip
    call = {"tool": "run", "arguments": '{"command": "ls"}', "output": HOSTILE, "ok": False}
    turns = [
        {"reasoning": "I look.", "content": "", "calls": [call], "ended": True},
        {"reasoning": "", "content": "17", "calls": [], "ended": True},
    ]
    trajectories = [
        {"step": step, "number": 0, "group": 0, "kind": kind, "seed": 5, "status": "answered", "answer": "17", "reward": reward,
         "reason": "done", "prompt": f"How many? {HOSTILE}", "sampled": 40, "turns": turns}
        for step, kind, reward in ((1, "count_lines", 0.0), (2, "edit_value", 1.0), (3, "count_lines", 1.0))
    ]  # fmt: skip
    probes = [{"step": step, "load": [[0.5, 0.3, 0.1, 0.1]], "recall": [0.2 * step, None], "k": 8} for step in (1, 2)]
    for name, lines in (("log", rows), ("trajectories", trajectories), ("probe", probes)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_the_page_holds_the_run_and_needs_nothing_else(tmp_path):
    text = page(run_directory(tmp_path))
    assert not re.search(r"""(src|href)\s*=\s*["']?https?:|@import|fetch\(""", text)
    assert "broken" not in text and "@DATA@" not in text  # texts of a run are data, in base64
    found = gather(tmp_path)
    assert found["kinds"]["count_lines"] == {"passed": 1, "total": 1, "low": None, "high": None}
    assert len(found["trajectories"]) == 3 and len(found["probes"]) == 2 and not found["evaluated"]


def test_measured_scores_come_before_those_of_rollouts(tmp_path):
    run_directory(tmp_path)
    scores = {"kinds": {"edit_value": {"passed": 48, "total": 50, "low": 0.86, "high": 0.99}}}
    (tmp_path / "evals.json").write_text(json.dumps(scores))
    found = gather(tmp_path)
    assert found["evaluated"] and found["kinds"] == scores["kinds"]


def test_a_half_written_line_is_left_out_and_a_damaged_one_is_said(tmp_path):
    run_directory(tmp_path)
    whole = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(whole + '{"step": 4, "lo')
    assert len(gather(tmp_path)["rows"]) == 3
    (tmp_path / "log.jsonl").write_text("nonsense\n" + whole)
    with pytest.raises(RunError, match="line 1, is not JSON"):
        gather(tmp_path)
    with pytest.raises(RunError, match=r"holds no log\.jsonl"):
        gather(tmp_path / "nothing")
    run_directory(tmp_path)
    (tmp_path / "evals.json").write_text("[]")
    with pytest.raises(RunError, match="nautile eval tools"):
        gather(tmp_path)


def test_the_page_in_a_browser(tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("apt-get install chromium")
    from playwright.sync_api import sync_playwright  # noqa: PLC0415

    target = tmp_path / "run.html"
    target.write_text(page(run_directory(tmp_path)))
    faults = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"], timeout=180_000)
        tab = browser.new_page(viewport={"width": 1100, "height": 900})
        tab.set_default_timeout(60_000)  # a busy machine
        tab.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.goto(target.as_uri())
        titles = tab.locator("section h2").all_inner_texts()
        for wanted in ("Loss", "Tokens per second", "Reward", "Length", "Expert load", "Indexer recall", "KL to the teachers"):
            assert any(wanted in title for title in titles), (wanted, titles)
        assert tab.locator("#list button").count() == 3
        tab.select_option("#reward", "0")
        assert tab.locator("#list button").count() == 1
        assert "reward 0" in tab.locator("#one").inner_text() and "</script>" in tab.locator("#one").inner_text()
        tab.select_option("#reward", "")
        tab.fill("#search", "nowhere to be found")
        assert "Nothing matches" in tab.locator("#one").inner_text()
        width = tab.evaluate("document.documentElement.scrollWidth")
        tab.set_viewport_size({"width": 390, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth") <= 400 and width <= 1100
        browser.close()
    assert faults == []


# What is measured on the way


def test_recall_is_one_when_the_indexer_scores_as_attention_weighs():
    """The probe, with scores replaced by the attention's own weights or by their opposite."""
    model = tiny_network((0, 4, 128, 4), seed=1)
    ids = random_ids(model.config, 200, 0).view(1, -1)
    found = probe(model, ids, 8)
    assert len(found.recall) == 2 and all(0 < share < 1 for share in found.recall)
    for layer in (model.layers[1], model.layers[3]):
        _score_like_attention(layer.attn)
    assert probe(model, ids, 8).recall == [1.0, 1.0]
    assert probe(model, ids[:, :30], 8).recall == [None, None]  # nobody sees more than eight entries


def _score_like_attention(layer):
    """Let the indexer of a layer score by the attention weights of that layer."""
    from nautile.kernels.attention import attend  # noqa: PLC0415
    from nautile.model.layers import unit_rms  # noqa: PLC0415
    from nautile.model.rope import Rotation, rotate  # noqa: PLC0415

    def scores(x, low, keys, chunk):
        turn = chunk.rotations[1]
        q = layer.wq_b(low).unflatten(-1, (layer.config.num_attention_heads, layer.config.head_dim))
        q = rotate(unit_rms(q, layer.config.rms_norm_eps), Rotation(turn.cos.unsqueeze(2), turn.sin.unsqueeze(2)))
        raw = layer._append_window(rotate(layer.kv_norm(layer.wkv(x)), turn), chunk, None)
        entries = layer._append_entries(x, chunk, None)
        visible = layer._complete(entries.shape[1], chunk)
        return attend(q, raw, entries, visible, layer.attn_sink, layer._first_row(chunk))[1].sum(2)

    layer.indexer.scores = scores


def test_loads_are_shares_of_choices():
    model = tiny_network((0, 4, 128), seed=2)
    found = probe(model, random_ids(model.config, 64, 1).view(2, -1), 8)
    assert len(found.load) == 2  # the first layer routes by token
    assert all(abs(sum(layer) - 1) < 1e-3 for layer in found.load)
    with torch.no_grad():
        model.layers[1].ffn.gate.bias.copy_(torch.tensor([9.0, 9.0, *[-9.0] * 6]))
    assert probe(model, random_ids(model.config, 64, 1).view(2, -1), 8).load[0] == [0.5, 0.5, 0, 0, 0, 0, 0, 0]
