"""Where each routed expert lies: on the card, or in host memory.

What every token reads stays on the card (the other weights, the state, room to work); experts fill what is left, the same
number in every layer while nothing is known about their use, the most used ones once there are counts. Said before anything
is allocated: what fits, or what is missing.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nautile.config import ModelConfig
from nautile.engine.costs import weight_bytes

__all__ = [
    "Budget",
    "ExpertPlacement",
    "PlacementError",
    "dense_bytes",
    "expert_bytes",
    "load_counts",
    "place_experts",
    "save_counts",
]


class PlacementError(ValueError):
    """The model does not fit; the text says by how much and what would help."""


@dataclass(frozen=True)
class Budget:
    """Memory in bytes. ``state`` is the pool of sequences, ``workspace`` what a step holds at once; both lie on the card.

    ``staging`` experts' room on the card receives the ones that are streamed in.
    """

    card: int
    host: int
    state: int = 0
    workspace: int = 1 << 30
    staging: int = 32


@dataclass(frozen=True)
class ExpertPlacement:
    """``resident[layer]`` are the numbers of the experts on the card, sorted; the others are in host memory."""

    config: ModelConfig
    resident: tuple[tuple[int, ...], ...]
    staging: int

    @property
    def on_card(self) -> int:
        """Experts on the card, all layers together."""
        return sum(map(len, self.resident))

    @property
    def in_host(self) -> int:
        """Experts in host memory."""
        return self.config.n_routed_experts * len(self.resident) - self.on_card

    @property
    def fraction(self) -> float:
        """Share of the experts that is on the card: the hit rate that uniform routing gives."""
        return self.on_card / (self.on_card + self.in_host)


def expert_bytes(config: ModelConfig) -> int:
    """Bytes of one expert in MXFP4: three matrices of half a byte and 1/32 of a scale byte an element."""
    elements = 3 * config.hidden_size * config.moe_intermediate_size
    return elements // 2 + elements // 32


def dense_bytes(config: ModelConfig) -> int:
    """Bytes of everything but routed experts and the draft block, as they are kept on the card (the router in float32)."""
    stored = weight_bytes(config, "stored")
    routers = 2 * config.num_hidden_layers * config.n_routed_experts * config.hidden_size
    return int(stored.total - stored.experts - stored.mtp) + routers


def place_experts(config: ModelConfig, budget: Budget, counts: Tensor | None = None) -> ExpertPlacement:
    """As many experts on the card as fit, the rest in host memory. ``counts`` [layers, E]: how often each was chosen so far.

    Raises PlacementError when the dense weights, the state and the staging room do not fit the card, or the rest the host.
    """
    one, layers, experts = expert_bytes(config), config.num_hidden_layers, config.n_routed_experts
    dense = dense_bytes(config)
    everything = layers * experts
    room = budget.card - dense - budget.state - budget.workspace
    fit = room // one
    staging = 0 if fit >= everything else budget.staging
    if room < staging * one:
        raise PlacementError(
            f"the card has {_gb(budget.card)}; needed before any expert: dense weights {_gb(dense)}, "
            f"state {_gb(budget.state)}, workspace {_gb(budget.workspace)}, "
            f"room for {staging} streamed experts {_gb(staging * one)}, together "
            f"{_gb(dense + budget.state + budget.workspace + staging * one)}: shorten the context or take a larger card"
        )
    on_card = min(fit - staging, everything)
    missing = (everything - on_card) * one - budget.host
    if missing > 0:
        raise PlacementError(
            f"{everything - on_card:,} of {everything:,} experts ({_gb((everything - on_card) * one)}) have no room on the "
            f"card, and host memory of {_gb(budget.host)} is {_gb(missing)} too small: give more host "
            "memory or a shorter context"
        )
    return ExpertPlacement(config, _chosen(on_card, layers, experts, counts), staging)


def _chosen(on_card: int, layers: int, experts: int, counts: Tensor | None) -> tuple[tuple[int, ...], ...]:
    if counts is None:
        each, more = divmod(on_card, layers)
        return tuple(tuple(range(each + (layer < more))) for layer in range(layers))
    if tuple(counts.shape) != (layers, experts):
        raise PlacementError(f"counts of {tuple(counts.shape)} experts do not belong to a model of {layers} x {experts}")
    best = counts.flatten().sort(descending=True, stable=True).indices[:on_card].tolist()
    rows: list[list[int]] = [[] for _ in range(layers)]
    for number in sorted(best):
        rows[number // experts].append(number % experts)
    return tuple(map(tuple, rows))


def save_counts(path: Path, counts: Tensor) -> None:
    """Write routing counts [layers, E]; a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"format": "nautile routing counts", "counts": counts.tolist()}, file)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_counts(path: Path) -> Tensor:
    """Counts as ``save_counts`` wrote them, int64 [layers, E]. Raises PlacementError for another file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != "nautile routing counts":
            raise KeyError("format")
        return torch.tensor(data["counts"], dtype=torch.int64).reshape(len(data["counts"]), -1)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise PlacementError(f"{path} holds no routing counts ({error}): delete it, and they are counted again") from None


def _gb(amount: int) -> str:
    return f"{amount / 1e9:,.2f} GB"
