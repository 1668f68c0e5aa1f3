"""The shape of a DeepSeek-V4 network: one frozen dataclass with the field names of the official ``config.json``.

What this file does not know: tensors, devices, checkpoints. It says what a configuration means and refuses the ones
Nautile would run wrongly (V4.1, keys it has never heard of, options that would change the mathematics).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ConfigError", "ModelConfig", "RopeScaling"]


class ConfigError(ValueError):
    """The configuration is missing something, contradicts itself, or describes another architecture."""


@dataclass(frozen=True)
class RopeScaling:
    """YaRN by parts, without the attention-magnitude factor (V4 uses none)."""

    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Every number the network needs. Sizes are in elements; ``d`` is ``hidden_size``, ``c`` is ``head_dim``.

    The two ``fake_quant_*`` switches are Nautile's own: with them on, KV entries pass through FP8 and indexer queries and
    keys through Hadamard + FP4 as the official inference code does; parity runs against fp32 references turn them off.
    """

    vocab_size: int = 129280
    hidden_size: int = 4096
    num_hidden_layers: int = 43
    num_attention_heads: int = 64
    num_key_value_heads: int = 1
    head_dim: int = 512
    qk_rope_head_dim: int = 64  # the LAST dims of every head
    q_lora_rank: int = 1024
    o_groups: int = 8
    o_lora_rank: int = 1024
    sliding_window: int = 128
    compress_ratios: tuple[int, ...] = ()  # one per layer: 0 window only, 4 CSA, 128 HCA; MTP entries may follow
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 2048  # routed and shared experts alike
    num_hash_layers: int = 3  # the first layers route by token id
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4  # residual streams
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0  # window-only layers and MTP
    compress_rope_theta: float = 160000.0  # layers with a compressor
    rope_scaling: RopeScaling | None = RopeScaling()  # applies to layers with a compressor only
    max_position_embeddings: int = 1048576
    num_nextn_predict_layers: int = 1
    tie_word_embeddings: bool = False
    bos_token_id: int = 0
    eos_token_id: int = 1
    initializer_range: float = 0.02
    expert_dtype: str | None = "fp4"  # how routed experts are stored: "fp4" (MXFP4 1x32) or "fp8" (128x128)
    fake_quant_kv: bool = True
    fake_quant_indexer: bool = True
    dialect: str | None = None  # prompt dialect of the checkpoint: "0731" or "preview"; None when the directory does not say

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def layer_ratios(self) -> tuple[int, ...]:
        """Compression ratio of each trunk layer (entries past ``num_hidden_layers`` belong to MTP and are cut)."""
        return self.compress_ratios[: self.num_hidden_layers]

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """The configuration called ``name``: "flash", "pro" (official values) or "nano" (the shipped model)."""
        if name not in _PRESETS:
            raise ConfigError(f"unknown preset {name!r}; choose one of {', '.join(sorted(_PRESETS))}")
        return cls(**_PRESETS[name])

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> ModelConfig:
        """Read an official ``config.json``: a mapping, the file, or the directory that holds it.

        Raises ConfigError when the file is not there, is not JSON, describes V4.1 or another model, or has a key whose
        meaning is unknown here.
        """
        data = dict(source) if isinstance(source, Mapping) else _read_json(Path(source))
        _refuse_other_models(data)
        fields = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(key for key in data if key not in fields and key not in _IGNORED and key not in _FIXED)
        if unknown:
            raise ConfigError(
                f"config has keys that Nautile does not know and that may change the network: {', '.join(unknown)}"
            )
        for key, allowed in _FIXED.items():
            if key in data and data[key] not in allowed:
                raise ConfigError(f"config says {key}={data[key]!r}; Nautile implements {allowed[0]!r}")
        missing = sorted(key for key in _REQUIRED if key not in data)
        if missing:
            raise ConfigError(f"config lacks {', '.join(missing)}")
        values = {key: value for key, value in data.items() if key in fields}
        values["compress_ratios"] = _ratios(data["compress_ratios"])
        values["rope_scaling"] = _rope_scaling(data.get("rope_scaling"))
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The official ``config.json`` of this configuration, as a dictionary that ``from_json`` reads back unchanged."""
        data = dataclasses.asdict(self)
        data["compress_ratios"] = list(self.compress_ratios)
        if self.rope_scaling is not None:
            data["rope_scaling"] = {"type": "yarn", **dataclasses.asdict(self.rope_scaling)}
        data = {key: value for key, value in data.items() if value is not None or key in ("rope_scaling", "expert_dtype")}
        return {**_WRITTEN, **data}

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)


def _validate(config: ModelConfig) -> None:
    def require(condition: bool, text: str) -> None:
        if not condition:
            raise ConfigError(text)

    _check_types(config, "")
    for name in (*_POSITIVE, "rope_theta", "compress_rope_theta", "rms_norm_eps", "hc_eps", "swiglu_limit"):
        require(getattr(config, name) > 0, f"{name} must be positive, got {getattr(config, name)}")
    require(
        len(config.compress_ratios) >= config.num_hidden_layers,
        f"compress_ratios has {len(config.compress_ratios)} entries for {config.num_hidden_layers} layers",
    )
    strange = sorted({ratio for ratio in config.compress_ratios if ratio not in (0, 4, 128)})
    require(not strange, f"compress_ratios may hold 0, 4 and 128 only, got {strange}")
    require(config.num_key_value_heads == 1, "V4 has one key-value head")
    require(config.num_attention_heads % config.o_groups == 0, "o_groups must divide num_attention_heads")
    require(config.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim must be even")
    require(config.qk_rope_head_dim <= config.head_dim, "qk_rope_head_dim exceeds head_dim")
    require(config.qk_rope_head_dim <= config.index_head_dim, "qk_rope_head_dim exceeds index_head_dim")
    require(config.num_experts_per_tok <= config.n_routed_experts, "more experts per token than experts")
    require(0 <= config.num_hash_layers <= config.num_hidden_layers, "num_hash_layers exceeds the number of layers")
    require(config.n_shared_experts == 1, "V4 has exactly one shared expert")
    require(config.expert_dtype in ("fp4", "fp8", None), f"unknown expert_dtype {config.expert_dtype!r}")
    require(config.dialect in ("0731", "preview", None), f"unknown dialect {config.dialect!r}")
    require(config.num_nextn_predict_layers in (0, 1), "the MTP depth of V4 is 0 or 1")
    require(config.routed_scaling_factor > 0, "routed_scaling_factor must be positive")
    if config.rope_scaling is not None:
        _validate_scaling(config.rope_scaling)
    if config.fake_quant_kv:
        plain = config.head_dim - config.qk_rope_head_dim
        require(plain % 64 == 0, f"fake_quant_kv needs head_dim - qk_rope_head_dim to be a multiple of 64, got {plain}")
    if config.fake_quant_indexer:
        dim = config.index_head_dim
        require(dim >= 32 and dim & (dim - 1) == 0, f"fake_quant_indexer needs index_head_dim a power of two >= 32, got {dim}")


def _validate_scaling(scaling: RopeScaling) -> None:
    _check_types(scaling, "rope_scaling ")
    for field in dataclasses.fields(scaling):
        value = getattr(scaling, field.name)
        if value <= 0:
            raise ConfigError(f"rope_scaling {field.name} must be positive, got {value}")


def _check_types(record: Any, prefix: str) -> None:
    """Every int, float, bool and text field of a dataclass holds what it says; numbers are finite."""
    for field in dataclasses.fields(record):
        value, wanted = getattr(record, field.name), str(field.type)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        right = {
            "int": number and isinstance(value, int),
            "float": number and math.isfinite(value),
            "bool": isinstance(value, bool),
            "str | None": value is None or isinstance(value, str),
        }.get(wanted, True)
        if not right:
            raise ConfigError(f"{prefix}{field.name} must be {_SPOKEN[wanted]}, got {value!r}")


_SPOKEN = {"int": "an integer", "float": "a finite number", "bool": "true or false", "str | None": "text"}


def _ratios(value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"compress_ratios must be a list of 0, 4 and 128, got {value!r}")
    if not all(isinstance(ratio, int) and not isinstance(ratio, bool) for ratio in value):
        raise ConfigError(f"compress_ratios must hold integers, got {list(value)!r}")
    return tuple(value)


def _read_json(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{file} holds no JSON object")
    return data


def _refuse_other_models(data: Mapping[str, Any]) -> None:
    kind = data.get("model_type", "deepseek_v4")
    if kind == "deepseek_v41":
        raise ConfigError("this is DeepSeek-V4.1 (model_type deepseek_v41), another architecture; Nautile runs V4")
    if kind != "deepseek_v4":
        raise ConfigError(f"model_type is {kind!r}; Nautile runs deepseek_v4")


def _rope_scaling(value: Any) -> RopeScaling | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ConfigError(f"rope_scaling must be an object or null, got {value!r}")
    kind = value.get("type", value.get("rope_type", "yarn"))
    if kind != "yarn":
        raise ConfigError(f"rope_scaling type {kind!r} is not implemented; V4 uses yarn")
    fields = {field.name for field in dataclasses.fields(RopeScaling)}
    unknown = sorted(set(value) - fields - {"type", "rope_type"})
    if unknown:
        raise ConfigError(f"rope_scaling has unknown keys: {', '.join(unknown)}")
    return RopeScaling(**{key: value[key] for key in value if key in fields})


_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "compress_ratios")
_POSITIVE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "q_lora_rank", "o_groups",
    "o_lora_rank", "sliding_window", "index_n_heads", "index_head_dim", "index_topk", "n_routed_experts",
    "num_experts_per_tok", "moe_intermediate_size", "hc_mult", "hc_sinkhorn_iters", "max_position_embeddings",
)  # fmt: skip

# Keys whose value is fixed in V4: any other value would silently compute something else.
_FIXED: dict[str, tuple[Any, ...]] = {
    "scoring_func": ("sqrtsoftplus",),
    "norm_topk_prob": (True,),
    "topk_method": ("noaux_tc",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
    "mlp_bias": (False, None),
    "n_group": (1, None),
    "topk_group": (1, None),
}

# Keys that describe the file or another program's options, never the mathematics.
_IGNORED = frozenset(
    (
        "architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache",
        "pad_token_id", "quantization_config", "_name_or_path", "pretraining_tp", "ep_size", "router_jitter_noise",
        "output_router_logits", "router_aux_loss_coef", "is_encoder_decoder", "return_dict", "attn_implementation",
        "_attn_implementation", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "id2label",
        "label2id", "problem_type", "name_or_path",
    )
)  # fmt: skip

_QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}

_WRITTEN: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "torch_dtype": "bfloat16",
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "quantization_config": _QUANTIZATION,
}

_PRESETS: dict[str, dict[str, Any]] = {
    "flash": {"compress_ratios": (0, 0, *((4, 128) * 20), 4, 0)},
    "pro": {
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "o_groups": 16,
        "compress_ratios": (128, 128, *((4, 128) * 29), 4, 0),
        "index_topk": 1024,
        "n_routed_experts": 384,
        "moe_intermediate_size": 3072,
        "routed_scaling_factor": 2.5,
    },
    "nano": {
        "vocab_size": 8192,
        "hidden_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "head_dim": 128,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 256,
        "compress_ratios": (0, 0, 4, 128, 4, 128, 4, 128, 0),
        "index_n_heads": 4,
        "index_head_dim": 64,
        "index_topk": 1024,  # every entry up to 4,096 tokens: this model's indexer has not been trained yet
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 128,
        "num_hash_layers": 2,
        "tie_word_embeddings": True,
        "fake_quant_kv": False,
        "fake_quant_indexer": False,
        "dialect": "0731",
    },
}
