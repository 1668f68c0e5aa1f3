"""From the ``config.json`` of a checkpoint directory to a ModelConfig, whoever wrote it.

The official file is read by ``ModelConfig.from_json`` as it is. transformers writes the same facts under other names
(``layer_types`` for ``compress_ratios``, ``rope_parameters`` for thetas and YaRN), and DSpark releases carry keys of their
drafter; both are put into official terms here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nautile.config import ConfigError, ModelConfig

__all__ = ["CheckpointConfig", "official_config", "read_config", "transformers_config"]

_RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
_DRAFTER = "dspark_"


@dataclass(frozen=True)
class CheckpointConfig:
    """A configuration, and what the file says beside it."""

    model: ModelConfig
    drafter: bool  # the file has keys of a DSpark drafter, which this package does not run
    states_expert_dtype: bool  # False in the first Flash release and in -Base: the tensors tell


def read_config(directory: Path) -> CheckpointConfig:
    """Read ``directory/config.json``. Raises ConfigError for a missing or unreadable file, another model, or V4.1."""
    file = directory / "config.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist: {directory} is not a model directory") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is not readable JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{file} holds no JSON object")
    drafter = any(key.startswith(_DRAFTER) for key in data)
    if drafter:
        data = {key: value for key, value in data.items() if not key.startswith(_DRAFTER)}
        data["num_nextn_predict_layers"] = 0
    if "layer_types" in data or "rope_parameters" in data:
        data = _from_transformers(data)
    quantization = data.get("quantization_config")
    if isinstance(quantization, dict) and "expert_dtype" in quantization:
        data.setdefault("expert_dtype", quantization["expert_dtype"])
    return CheckpointConfig(ModelConfig.from_json(data), drafter, data.get("expert_dtype") is not None)


def official_config(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` of the official layout."""
    return config.to_json()


def transformers_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The ``config.json`` beside unquantised weights in transformers' names. transformers reads the official keys as well.

    The MTP block stays out: transformers has none.
    """
    data = config.replace(num_nextn_predict_layers=0).to_json()
    for key in ("quantization_config", "expert_dtype"):
        data.pop(key, None)
    return {**data, "torch_dtype": dtype}


def _from_transformers(data: dict[str, Any]) -> dict[str, Any]:
    data = dict(data)
    kinds, rates = data.pop("layer_types", None), data.pop("compress_rates", None)
    if kinds is not None and "compress_ratios" not in data:
        table = {**_RATIOS, **(rates or {})}
        unknown = sorted({str(kind) for kind in kinds} - set(table))
        if unknown:
            raise ConfigError(f"config has layer_types that V4 does not have: {', '.join(unknown)}")
        data["compress_ratios"] = [table[kind] for kind in kinds]
    feeds = data.pop("mlp_layer_types", None)
    if feeds is not None and "num_hash_layers" not in data:
        hashed = sum(kind == "hash_moe" for kind in feeds)
        if any(kind != "hash_moe" for kind in feeds[:hashed]):
            raise ConfigError("config has hash_moe layers after moe layers; V4 has them first")
        data["num_hash_layers"] = hashed
    factor = data.pop("partial_rotary_factor", None)
    if factor is not None and "head_dim" in data:
        data.setdefault("qk_rope_head_dim", round(data["head_dim"] * factor))
    rope = data.pop("rope_parameters", None)
    if isinstance(rope, dict):
        data.update(_rope(rope))
    return data


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    main, compress = rope.get("main"), rope.get("compress")
    if not isinstance(main, dict) or not isinstance(compress, dict):
        raise ConfigError("config has rope_parameters without the sections main and compress")
    found: dict[str, Any] = {"rope_theta": main["rope_theta"], "compress_rope_theta": compress["rope_theta"]}
    if main.get("rope_type", "default") != "default":
        raise ConfigError("config scales the rotation of window-only layers; V4 does not")
    kind = compress.get("rope_type", "default")
    if kind not in ("default", "yarn"):
        raise ConfigError(f"rope type {kind!r} is not implemented; V4 uses yarn")
    if compress.get("attention_factor", 1.0) != 1.0:
        raise ConfigError("config has a YaRN attention_factor; V4 uses none (1.0)")
    found["rope_scaling"] = None
    if kind == "yarn":
        found["rope_scaling"] = {"type": "yarn", **{key: compress[key] for key in _YARN if key in compress}}
    return found
