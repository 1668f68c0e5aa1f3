"""The configuration: published values, what is refused, and that nothing is lost between a file and the dataclass."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautile import ConfigError, ModelConfig
from nautile.config import RopeScaling

COMMON: dict[str, Any] = {
    "vocab_size": 129280, "num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64, "o_lora_rank": 1024,
    "sliding_window": 128, "index_n_heads": 64, "index_head_dim": 128, "n_shared_experts": 1, "num_experts_per_tok": 6,
    "num_hash_layers": 3, "swiglu_limit": 10.0, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "compress_rope_theta": 160000.0, "max_position_embeddings": 1048576,
    "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    "initializer_range": 0.02, "expert_dtype": "fp4",
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "flash": {
        "num_hidden_layers": 43, "hidden_size": 4096, "num_attention_heads": 64, "q_lora_rank": 1024, "o_groups": 8,
        "index_topk": 512, "n_routed_experts": 256, "moe_intermediate_size": 2048, "routed_scaling_factor": 1.5,
    },
    "pro": {
        "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128, "q_lora_rank": 1536, "o_groups": 16,
        "index_topk": 1024, "n_routed_experts": 384, "moe_intermediate_size": 3072, "routed_scaling_factor": 2.5,
    },
}  # fmt: skip
RATIOS = {
    "flash": [0, 0, *[4, 128] * 20, 4, 0],
    "pro": [128, 128, *[4, 128] * 29, 4, 0],
}
COUNTS = {"flash": {0: 2, 4: 21, 128: 20}, "pro": {0: 0, 4: 30, 128: 31}}


def official(name: str) -> dict[str, Any]:
    """What the published config.json of a release looks like."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "attention_bias": False,
        "attention_dropout": 0.0, "hidden_act": "silu", "norm_topk_prob": True, "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.57.1", "use_cache": True,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic",
                                "weight_block_size": [128, 128]},
        "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32,
                         "beta_slow": 1},
        **COMMON, **PUBLISHED[name], "rope_theta": 10000, "compress_rope_theta": 160000, "compress_ratios": RATIOS[name],
    }  # fmt: skip


SMALL: dict[str, Any] = {"vocab_size": 8, "hidden_size": 64, "num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0]}

# presets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_presets_are_the_published_models(name: str) -> None:
    config = ModelConfig.preset(name)
    for field, value in {**COMMON, **PUBLISHED[name]}.items():
        assert getattr(config, field) == value, field
    assert list(config.compress_ratios) == RATIOS[name]
    assert {m: config.layer_ratios.count(m) for m in (0, 4, 128)} == COUNTS[name]
    assert len(config.layer_ratios) == config.num_hidden_layers
    assert config.rope_scaling == RopeScaling(16, 65536, 32, 1)
    assert config.fake_quant_kv and config.fake_quant_indexer


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_an_official_file_is_the_preset(name: str, tmp_path: Path) -> None:
    data = official(name)
    (tmp_path / "config.json").write_text(json.dumps(data))
    for source in (data, tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert ModelConfig.from_json(source) == ModelConfig.preset(name)


def test_nano_fits_the_official_formats() -> None:
    """Every mechanism is there, and FP8 tiles, FP4 groups and Hadamard sizes come out even."""
    config = ModelConfig.preset("nano").replace(fake_quant_kv=True, fake_quant_indexer=True)
    assert set(config.layer_ratios) == {0, 4, 128} and config.num_hash_layers > 0 and config.num_nextn_predict_layers == 1
    assert config.fake_quant_kv and config.fake_quant_indexer
    assert (config.head_dim - config.qk_rope_head_dim) % 64 == 0
    assert config.index_head_dim >= 32 and config.index_head_dim & (config.index_head_dim - 1) == 0
    assert config.hidden_size % 32 == 0 and config.moe_intermediate_size % 32 == 0
    assert config.vocab_size == 8192 and config.max_position_embeddings == 1048576


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="flash, nano, pro"):
        ModelConfig.preset("huge")


# round trips --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        *(ModelConfig.preset(name) for name in ("flash", "pro", "nano")),
        ModelConfig.preset("nano").replace(rope_scaling=None, fake_quant_kv=False, dialect=None),
        ModelConfig.preset("flash").replace(rope_scaling=RopeScaling(8.0, 4096, 16.0, 2.0), expert_dtype="fp8"),
        ModelConfig.preset("flash").replace(expert_dtype=None, dialect="preview"),
    ],
    ids=["flash", "pro", "nano", "without yarn", "other yarn", "no expert dtype"],
)
def test_round_trip(config: ModelConfig) -> None:
    data = json.loads(json.dumps(config.to_json()))
    assert ModelConfig.from_json(data) == config
    assert data["model_type"] == "deepseek_v4" and data["architectures"] == ["DeepseekV4ForCausalLM"]


def test_a_written_file_has_every_official_key() -> None:
    ours, theirs = ModelConfig.preset("pro").to_json(), official("pro")
    missing = set(theirs) - set(ours) - {"transformers_version", "use_cache"}
    assert not missing
    assert all(ours[key] == theirs[key] for key in set(theirs) & set(ours))


def test_configs_are_frozen_hashable_values() -> None:
    config = ModelConfig.from_json(SMALL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 3  # type: ignore[misc]
    assert hash(config) == hash(ModelConfig.from_json(SMALL))
    assert config.replace(vocab_size=9).vocab_size == 9 and config.vocab_size == 8


# refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "deepseek_v41"}, r"V4\.1"),
        ({"model_type": "deepseek_v3"}, "deepseek_v3"),
        ({"kv_source_layer_ids": [1]}, "kv_source_layer_ids"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"compress_ratios": [0, 4]}, "compress_ratios"),
        ({"compress_ratios": [0, 4, 8]}, "compress_ratios"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ({"rope_scaling": {"type": "yarn", "mscale": 1.0}}, "mscale"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_key_value_heads": 2}, "key-value"),
        ({"o_groups": 7}, "o_groups"),
        ({"qk_rope_head_dim": 63}, "even"),
        ({"qk_rope_head_dim": 1024}, "qk_rope_head_dim"),
        ({"qk_rope_head_dim": 256}, "index_head_dim"),
        ({"num_experts_per_tok": 300}, "experts"),
        ({"num_hash_layers": 4}, "num_hash_layers"),
        ({"num_hash_layers": -1}, "num_hash_layers"),
        ({"n_shared_experts": 2}, "shared"),
        ({"num_nextn_predict_layers": 2}, "MTP"),
        ({"expert_dtype": "int4"}, "expert_dtype"),
        ({"dialect": "klingon"}, "dialect"),
        ({"head_dim": 100, "fake_quant_kv": True}, "fake_quant_kv"),
        ({"index_head_dim": 96, "fake_quant_indexer": True}, "fake_quant_indexer"),
    ],
    ids=lambda value: ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_would_compute_something_else_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ModelConfig.from_json({**SMALL, **changes})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("compress_ratios", None), ("compress_ratios", 4), ("compress_ratios", "0440"), ("compress_ratios", [0, 4.5, 128]),
        ("compress_ratios", [0, True, 4]), ("compress_ratios", [0, None, 4]), ("rms_norm_eps", None), ("hc_eps", "small"),
        ("rms_norm_eps", -1.0), ("rope_theta", -1.0), ("compress_rope_theta", "160k"), ("routed_scaling_factor", True),
        ("swiglu_limit", None), ("swiglu_limit", -1.0), ("swiglu_limit", math.nan), ("tie_word_embeddings", "no"),
        ("fake_quant_kv", 2), ("rope_scaling", {"type": "yarn", "factor": 0}), ("expert_dtype", 4), ("dialect", ["0731"]),
        ("rope_scaling", {"type": "yarn", "factor": "16"}), ("rope_scaling", {"type": "yarn", "factor": None}),
        ("rope_scaling", {"type": "yarn", "original_max_position_embeddings": -1}),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_names_its_key(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        ModelConfig.from_json({**SMALL, name: value})


@pytest.mark.parametrize("key", sorted(SMALL))
def test_what_is_needed_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_json({k: v for k, v in SMALL.items() if k != key})


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        ModelConfig.from_json(tmp_path)
    for text in ("{", "[1, 2]", "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json"):
            ModelConfig.from_json(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_json(tmp_path)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=4), st.lists(st.integers(0, 4), max_size=3),
    st.lists(st.sampled_from([4.5, "4", None, True, 0]), max_size=4), st.dictionaries(st.text(max_size=6), st.none()),
    st.fixed_dictionaries({"type": st.just("yarn"), "factor": st.sampled_from(["x", None, 0, -1, [1]])}),
)  # fmt: skip


@given(st.sampled_from([field.name for field in dataclasses.fields(ModelConfig)]), JUNK)
def test_junk_is_a_config_error_or_a_sound_config(name: str, value: Any) -> None:
    """Whatever stands behind a known key: either ConfigError, or a config whose field has the declared kind of value."""
    try:
        config = ModelConfig.from_json({**SMALL, name: value})
    except ConfigError:
        return
    got, declared = getattr(config, name), str({f.name: f.type for f in dataclasses.fields(ModelConfig)}[name])
    kinds: dict[str, tuple[type, ...]] = {
        "int": (int,), "float": (int, float), "bool": (bool,), "str | None": (str, type(None)),
        "tuple[int, ...]": (tuple,), "RopeScaling | None": (RopeScaling, type(None)),
    }  # fmt: skip
    assert isinstance(got, kinds[declared]), f"{name}={value!r} was accepted as {got!r}"
    if declared == "float":
        assert not math.isnan(got) and not isinstance(got, bool), f"{name}={value!r} was accepted"
    if isinstance(got, RopeScaling):
        numbers = dataclasses.astuple(got)
        assert all(isinstance(n, (int, float)) and not isinstance(n, bool) and n > 0 for n in numbers), f"accepted {got}"
    if isinstance(got, tuple):
        assert list(got) == list(value) and not any(isinstance(r, (bool, float, str)) for r in value), f"accepted {value!r}"
