"""``nautile convert``: between layouts, manifests, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from checkpoint.models import written
from nautile.checkpoint import load_state
from nautile.cli.convert import convert


def run(*arguments: str | Path) -> Any:
    app = typer.Typer()
    app.command()(convert)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_there_and_back(tmp_path: Path) -> None:
    written(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    there = run(tmp_path / "a", tmp_path / "b", "--to", "transformers", "--max-shard", "400KB")
    assert there.exit_code == 0, there.output
    assert "bf16: exact" in there.output and "left out" in there.output and "mtp.0" in there.output
    assert len(list((tmp_path / "b").glob("model-*-of-*.safetensors"))) > 2 and (tmp_path / "b" / "tokenizer.json").exists()
    back = run(tmp_path / "b", tmp_path / "c", "--to", "official", "--expert-dtype", "fp4", "--json")
    assert back.exit_code == 0, back.output
    result = json.loads(back.stdout)
    assert set(result["rounding"].values()) == {0.0} and result["left_out"] == []
    before, after = load_state(tmp_path / "a"), load_state(tmp_path / "c")
    assert all(torch.equal(after[name], value) for name, value in before.items() if not name.startswith("mtp."))


def test_manifests() -> None:
    table = run("--manifest", "flash")
    assert "69,187 tensors" in table.output and "159,609,485,896 bytes" in table.output
    data = json.loads(run("--manifest", "nano", "--json").stdout)
    assert data["count"] == len(data["tensors"]) and data["bytes"] == sum(row["nbytes"] for row in data["tensors"])
    assert data["tensors"][0] == {"name": "embed.weight", "dtype": "BF16", "shape": [8192, 384], "nbytes": 8192 * 384 * 2}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "give SRC and DST"),
        (("SRC", "DST", "--to", "gguf"), "official or transformers"),
        (("SRC", "DST", "--expert-dtype", "int8"), "fp4 or fp8"),
        (("SRC", "DST", "--to", "transformers", "--expert-dtype", "fp8"), "belongs to the official layout"),
        (("SRC", "DST", "--max-shard", "large"), "no amount of memory"),
        (("SRC", "SRC"), "the same directory"),
    ],
)
def test_refusals(tmp_path: Path, arguments: tuple[str, ...], text: str) -> None:
    written(tmp_path / "SRC")
    found = run(*(tmp_path / word if word in ("SRC", "DST") else word for word in arguments))
    assert found.exit_code != 0
    assert text in " ".join(found.output.replace("│", " ").split())
    assert not (tmp_path / "DST").exists()
