"""A packed model from a source: an official checkpoint or random weights of its layout, placed by a memory budget."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nautile.checkpoint.reader import Checkpoint
from nautile.config import ModelConfig
from nautile.engine.expert_store import ExpertStore
from nautile.engine.fill import Progress, fill_from_checkpoint, fill_random
from nautile.engine.packed_weights import PackedWeights
from nautile.engine.placement import Budget, PlacementError, place_experts

__all__ = ["card_memory", "check_card", "load_packed", "random_packed"]

_LEAST = (8, 9)  # e4m3 conversions in hardware


def check_card(device: torch.device) -> None:
    """Raises PlacementError for a card that cannot run packed weights."""
    if device.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise PlacementError("no CUDA device is visible: run with --device cpu, or install a CUDA build of PyTorch")
    found = torch.cuda.get_device_capability(device)
    if found < _LEAST:
        raise PlacementError(
            f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}; FP8 weights need 8.9 or later "
            "(Ada, Hopper, Blackwell): use the modules with decoded weights there (runner torch)"
        )


def card_memory(device: torch.device) -> int:
    """Bytes that can be allocated on the card now."""
    return int(torch.cuda.mem_get_info(device)[0])


def random_packed(
    config: ModelConfig, budget: Budget, device: str | torch.device, seed: int = 0, *, counts: Tensor | None = None
) -> PackedWeights:
    """The exact layout of ``config`` with random values written in place; the experts with the largest ``counts`` lie on the
    card. Raises PlacementError before allocating."""
    weights = _allocate(config, budget, torch.device(device), counts)
    fill_random(weights, seed)
    return weights


def load_packed(
    path: str | Path,
    budget: Budget,
    device: str | torch.device,
    *,
    counts: Tensor | None = None,
    progress: Progress | None = None,
) -> PackedWeights:
    """An official FP8 and FP4 checkpoint, streamed into place; ``counts`` of earlier runs decide which experts lie on the card.

    Raises PlacementError before anything is allocated, ConfigError and CheckpointError for the files.
    """
    with Checkpoint(path) as checkpoint:
        config = checkpoint.config.replace(num_nextn_predict_layers=0)
    weights = _allocate(config, budget, torch.device(device), counts)
    fill_from_checkpoint(weights, path, progress)
    return weights


def _allocate(config: ModelConfig, budget: Budget, device: torch.device, counts: Tensor | None) -> PackedWeights:
    check_card(device)
    if config.expert_dtype != "fp4":
        raise PlacementError(f"packed weights hold experts in FP4, this model has {config.expert_dtype!r}: convert it first")
    placement = place_experts(config, budget, counts)
    return PackedWeights.allocate(ExpertStore(placement, device), device)
