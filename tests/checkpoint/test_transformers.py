"""transformers reads what is written here, and what transformers writes is read here: weights equal bit for bit.

bf16, then .float(), is transformers' own way of decoding FP8 and FP4 on a CPU.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoint.models import change_config, legal_config, written
from nautile import ModelConfig, Transformer
from nautile.checkpoint import Checkpoint, SaveOptions, load_model, write_checkpoint
from nautile.checkpoint.configuration import read_config
from oracles.hf_reference import reference, renamed
from oracles.random_models import random_ids, random_tensors, tiny_config


def theirs(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="eager").float().eval()


def assert_same(ours: Transformer, model: torch.nn.Module) -> None:
    """Every parameter bit for bit, then the logits."""
    state = model.state_dict()
    for name, value in renamed(ours.config, dict(ours.state_dict())).items():
        assert torch.equal(value, state[name]), name
    ids = random_ids(ours.config, 140, seed=1).unsqueeze(0)
    with torch.no_grad():
        assert (ours(ids) - model(ids, use_cache=False).logits).abs().max() <= 5e-5


@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8"])
@pytest.mark.parametrize("tied", [False, True])
def test_official(tmp_path: Path, expert_dtype: str, tied: bool) -> None:
    written(tmp_path, legal_config(expert_dtype=expert_dtype, tie_word_embeddings=tied), max_shard_bytes=600_000)
    assert_same(load_model(tmp_path), theirs(tmp_path))


def test_base_release(tmp_path: Path) -> None:
    """-Base has FP8 experts and no expert_dtype in its config: the tensors tell."""
    written(tmp_path, legal_config(expert_dtype="fp8"))
    change_config(tmp_path, expert_dtype=None)
    model = load_model(tmp_path)
    assert model.config.expert_dtype == "fp8"
    assert_same(model, theirs(tmp_path))


def test_written_transformers_layout(tmp_path: Path) -> None:
    written(tmp_path / "official")
    with Checkpoint(tmp_path / "official") as source:
        report = write_checkpoint(source.read, source.config, tmp_path / "hf", SaveOptions(layout="transformers"))
    assert report.rounding == {"bf16": 0.0, "f32": 0.0} and report.left_out == ("mtp.0",)
    ours = load_model(tmp_path / "hf")
    assert ours.config.num_nextn_predict_layers == 0
    assert_same(ours, theirs(tmp_path / "hf"))
    assert torch.equal(ours.embed.weight, load_model(tmp_path / "official").embed.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained_hybrid(tmp_path: Path, tied: bool) -> None:
    """The layout of ``save_pretrained``: half official names, its own config keys, no MTP."""
    config = tiny_config((0, 4, 128), num_hash_layers=2, tie_word_embeddings=tied, initializer_range=0.02)
    tensors = random_tensors(config, 3)
    reference(config, tensors).save_pretrained(tmp_path)
    change_config(tmp_path, fake_quant_kv=False, fake_quant_indexer=False)
    with pytest.warns(UserWarning, match="announces an MTP block and the files hold none"):
        ours = load_model(tmp_path)
    assert ours.config == config.replace(num_nextn_predict_layers=0, expert_dtype=None, compress_ratios=(0, 4, 128))
    state = ours.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tensors.items() if not name.startswith("mtp."))


def test_saved_under_its_own_parameter_names(tmp_path: Path) -> None:
    """The parameter names of transformers as they are, in float32 and without the head's copy."""
    config = tiny_config((4, 128))
    tensors = random_tensors(config, 4)
    model = reference(config, tensors)
    model.config.save_pretrained(tmp_path)
    change_config(tmp_path, fake_quant_kv=False, fake_quant_indexer=False, num_nextn_predict_layers=0)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = load_model(tmp_path).state_dict()
    assert all(torch.equal(state[name], value) for name, value in tensors.items() if not name.startswith("mtp."))


def test_config_round_trip_through_transformers(tmp_path: Path) -> None:
    """What transformers makes of an official config, saved and read back, means the same network."""
    written(tmp_path / "a")
    AutoConfig.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    change_config(tmp_path / "b", num_nextn_predict_layers=1)
    before, after = read_config(tmp_path / "a").model, read_config(tmp_path / "b").model
    assert after == before.replace(compress_ratios=before.layer_ratios)
    assert isinstance(after, ModelConfig)
