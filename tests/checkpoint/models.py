"""Small networks whose dimensions the official formats can hold, and directories written from them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nautile import ModelConfig
from nautile.checkpoint import save_model
from oracles.random_models import network, random_tensors, tiny_config

LEGAL: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_lora_rank": 64,
    "index_head_dim": 64,
    "moe_intermediate_size": 128,
    "n_routed_experts": 4,
    "expert_dtype": "fp4",
}


def legal_config(schedule: tuple[int, ...] = (0, 4, 128), **changes: Any) -> ModelConfig:
    """FP8 dimensions multiples of 128, FP4 inputs multiples of 32; a hash-routed and two score-routed layers, one MTP block."""
    return tiny_config(schedule, **{**LEGAL, **changes})


def written(path: Path, config: ModelConfig | None = None, seed: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    """Write a random network in the official layout; the tensors it was made of, before rounding."""
    config = config or legal_config()
    tensors = random_tensors(config, seed)
    save_model(network(config, tensors), path, **options)
    return tensors


def change_config(path: Path, **changes: Any) -> None:
    """Edit ``config.json``; None removes a key."""
    file = path / "config.json"
    data = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def change_tensors(path: Path, change: Any) -> None:
    """Let ``change`` edit the tensors of the only weights file, through the safetensors library."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def header_of(file: Path) -> dict[str, Any]:
    """The safetensors header, without the metadata."""
    data = file.read_bytes()
    header: dict[str, Any] = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    header.pop("__metadata__", None)
    return header
