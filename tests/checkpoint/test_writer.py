"""Writing: what rounds and what does not, and that a failed write changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from checkpoint.models import legal_config, written
from nautile.checkpoint import Checkpoint, CheckpointError, SaveOptions, load_model, load_state, save_model, write_checkpoint
from nautile.checkpoint.shards import ShardWriter
from oracles.random_models import network, random_tensors, tiny_config


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_saved_model_saves_exactly(tmp_path: Path) -> None:
    """The values stay; the bytes settle with the first save of loaded values (3 * 2^k may as well be stored as 6 * 2^(k-1))."""
    written(tmp_path / "first")
    model = load_model(tmp_path / "first")
    report = save_model(model, tmp_path / "second")
    assert report.rounding == {"bf16": 0.0, "f32": 0.0, "fp8": 0.0, "fp4": 0.0}
    again = load_model(tmp_path / "second")
    assert again.config == model.config
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    save_model(again, tmp_path / "third")
    assert contents(tmp_path / "second") == contents(tmp_path / "third")


def test_rounding_is_reported(tmp_path: Path) -> None:
    config = legal_config()
    report = save_model(network(config, random_tensors(config, 0)), tmp_path)
    assert report.rounding["f32"] == 0.0
    assert 0 < report.rounding["bf16"] <= 2**-8
    assert 0 < report.rounding["fp8"] <= 2**-4
    assert 0 < report.rounding["fp4"] <= 0.25


def test_edge_tiles_round_trip(tmp_path: Path) -> None:
    """Dimensions that are no multiple of 128: scales by ceil division."""
    config = legal_config(hidden_size=160, q_lora_rank=96, o_lora_rank=40, moe_intermediate_size=96)
    written(tmp_path / "first", config)
    assert save_model(load_model(tmp_path / "first"), tmp_path / "second").rounding["fp8"] == 0.0
    with Checkpoint(tmp_path / "first") as checkpoint:
        wide = next(entry for entry in checkpoint.entries if entry.name == "layers.0.attn.wq_b.weight")
        assert checkpoint.read(wide).shape == (256, 96)


def test_fp4_becomes_fp8_without_loss(tmp_path: Path) -> None:
    written(tmp_path / "fp4")
    with Checkpoint(tmp_path / "fp4") as source:
        report = write_checkpoint(source.read, source.config, tmp_path / "fp8", SaveOptions(expert_dtype="fp8"))
    assert report.rounding["fp8"] == 0.0
    four, eight = load_state(tmp_path / "fp4"), load_state(tmp_path / "fp8")
    assert all(torch.equal(four[name], eight[name]) for name in four)
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["expert_dtype"] == "fp8"


def test_tied_head_is_not_written(tmp_path: Path) -> None:
    written(tmp_path, legal_config(tie_word_embeddings=True, num_nextn_predict_layers=0))
    with Checkpoint(tmp_path) as checkpoint:
        assert "head.weight" not in {entry.name for entry in checkpoint.entries}
    assert load_model(tmp_path).head is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_no_format_holds_change_nothing(tmp_path: Path, value: float) -> None:
    written(tmp_path)
    before = contents(tmp_path)
    model = load_model(tmp_path)
    with torch.no_grad():
        model.layers[1].ffn.experts.w2[3, 0, 0] = value
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.experts\.3\.w2\.weight holds NaN or infinity"):
        save_model(model, tmp_path)
    assert contents(tmp_path) == before
    with pytest.raises(CheckpointError):
        save_model(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)
    model, before = load_model(tmp_path), contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
        with pytest.raises(CheckpointError, match=r"GB are needed and 0\.0 GB free"):
            save_model(model, tmp_path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_model(model, tmp_path)
    assert contents(tmp_path) == before


def test_earlier_weights_go_and_other_files_stay(tmp_path: Path) -> None:
    written(tmp_path, max_shard_bytes=600_000)
    (tmp_path / "README.md").write_text("mine")
    save_model(load_model(tmp_path), tmp_path)
    assert sorted(contents(tmp_path)) == ["README.md", "config.json", "model.safetensors"]
    load_model(tmp_path)


def test_tokenizer_files_come_along(tmp_path: Path) -> None:
    config = legal_config((0,))
    model = network(config, random_tensors(config, 0))
    (tmp_path / "tokens").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        save_model(model, tmp_path / "model", tokenizer_dir=tmp_path / "tokens")
    for name in ("tokenizer.json", "tokenizer_config.json", "notes.txt"):
        (tmp_path / "tokens" / name).write_text(name)
    report = save_model(model, tmp_path / "model", tokenizer_dir=tmp_path / "tokens")
    assert sorted(contents(tmp_path / "model")) == sorted(report.files)
    assert set(report.files) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_state_dicts_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    config = tiny_config((0,))
    with pytest.raises(CheckpointError, match=r"has 32 inputs|calls for|lacks"):
        model = network(config, random_tensors(config, 0))
        model.config = config.replace(vocab_size=97)
        save_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
