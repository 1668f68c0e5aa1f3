"""The map of names and shapes against the network itself, against transformers, and against published totals."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from checkpoint.models import legal_config
from nautile import ModelConfig, Transformer
from nautile.checkpoint import CheckpointError, manifest
from nautile.checkpoint.configuration import transformers_config
from nautile.checkpoint.layout import detect_layout, entries, locate, scale_location, target_shapes
from oracles.random_models import tiny_config

PUBLISHED = {"flash": (69_187, 159_609_485_896), "pro": (145_116, 864_704_792_696)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name: str) -> None:
    tensors = manifest(ModelConfig.preset(name))
    assert (len(tensors), sum(tensor.nbytes for tensor in tensors)) == PUBLISHED[name]
    assert len({tensor.name for tensor in tensors}) == len(tensors)


def test_published_examples() -> None:
    found = {tensor.name: (tensor.dtype, tensor.shape) for tensor in manifest(ModelConfig.preset("flash"))}
    assert found["layers.0.attn.wo_a.weight"] == ("F8_E4M3", (8192, 4096))
    assert found["layers.0.attn.wo_a.scale"] == ("F8_E8M0", (64, 32))
    assert found["layers.3.ffn.experts.255.w2.weight"] == ("I8", (4096, 1024))
    assert found["layers.3.ffn.experts.255.w2.scale"] == ("F8_E8M0", (4096, 64))
    assert found["layers.2.ffn.gate.tid2eid"] == ("I64", (129280, 6))
    assert "layers.2.ffn.gate.bias" not in found and "layers.3.ffn.gate.tid2eid" not in found
    assert found["layers.2.attn.compressor.ape"] == ("F32", (4, 1024))
    assert found["layers.3.attn.compressor.ape"] == ("F32", (128, 512))
    assert found["mtp.0.e_proj.scale"] == ("F8_E8M0", (32, 32))
    assert found["hc_head_scale"] == ("F32", (1,))


def test_fp8_experts_have_tile_scales() -> None:
    found = {tensor.name: tensor for tensor in manifest(ModelConfig.preset("flash"), "fp8")}
    assert found["layers.3.ffn.experts.0.w1.weight"].dtype == "F8_E4M3"
    assert found["layers.3.ffn.experts.0.w1.scale"].shape == (16, 32)


@pytest.mark.parametrize(
    "config",
    [
        legal_config(),
        tiny_config((4, 128, 0), num_hash_layers=0),
        tiny_config((0, 0), tie_word_embeddings=True, num_nextn_predict_layers=0, num_hash_layers=2),
        ModelConfig.preset("nano"),
        ModelConfig.preset("flash"),
    ],
)
def test_targets_are_the_state_dict(config: ModelConfig) -> None:
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    assert target_shapes(config) == {name: tuple(value.shape) for name, value in state.items()}


def test_transformers_names_are_its_parameters() -> None:
    config = legal_config((0, 4, 128))
    theirs = DeepseekV4Config(**transformers_config(config, "bfloat16"))
    with torch.device("meta"):
        names = set(DeepseekV4ForCausalLM(theirs).state_dict())
    trunk = [entry for entry in entries(config) if not entry.name.startswith("mtp.")]
    assert {locate(entry, "transformers").name for entry in trunk} == names


def test_layouts_are_told_apart_by_names() -> None:
    by_leaf = {entry.name: entry for entry in entries(legal_config())}
    entry = by_leaf["layers.1.attn.wkv.weight"]
    for layout in ("official", "transformers", "hybrid"):
        assert detect_layout([locate(entry, layout).name]) == layout  # type: ignore[arg-type]
    assert scale_location(entry, "transformers") is None
    assert scale_location(by_leaf["norm.weight"], "official") is None
    with pytest.raises(CheckpointError, match="no DeepSeek-V4 layout"):
        detect_layout(["transformer.h.0.attn.weight"])


def test_a_shape_that_fp4_cannot_hold_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"layers\.0\.ffn\.experts\.0\.w1\.weight has 48 inputs"):
        manifest(tiny_config((0,), hidden_size=48, expert_dtype="fp4"))
