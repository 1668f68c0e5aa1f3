"""Writing packed weights where they stay: random values of the exact layout, or the bytes of an official checkpoint.

Random weights exist so that speed and memory can be measured without 160 GB of files. Codes are drawn bit by bit in place,
scales and the rest so that activations keep a sensible size; routing comes out close to uniform, the worst case for a cache
of experts. Only the text is not real.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nautile.checkpoint.errors import CheckpointError
from nautile.checkpoint.reader import Checkpoint
from nautile.engine.packed_weights import PackedWeights

__all__ = ["fill_from_checkpoint", "fill_random"]

Progress = Callable[[int, int], None]  # (done, total) in tensors

_E2M1_RMS = 2.926  # of a uniformly drawn code
_E4M3_RMS = 0.66  # of a code drawn with exponents 0 .. 7 of 15


def fill_random(weights: PackedWeights, seed: int = 0) -> None:
    """Write every tensor in place, without a copy of any."""
    device = weights.embed.device
    draw = _Draw(torch.Generator(device).manual_seed(seed))
    config, store = weights.config, weights.store
    sources = {"w1": config.hidden_size, "w3": config.hidden_size, "w2": config.moe_intermediate_size}
    for name, arena in zip(("w1", "s1", "w3", "s3", "w2", "s2"), store.arenas, strict=True):
        if name.startswith("w"):
            draw.bits(arena)
        else:
            draw.exponents(arena, 1 / (_E2M1_RMS * math.sqrt(sources["w" + name[1]])))
    _fill_host(weights)
    experts = ".ffn.experts."
    for name, tensor in weights.destinations():
        if name.endswith("tid2eid"):
            draw.table(tensor, config.n_routed_experts)
        elif experts not in name:
            draw.tensor(name, tensor)


def _fill_host(weights: PackedWeights) -> None:
    """Experts in host memory are copies of experts on the card, a different rotation of which each gets: random enough for
    speed (every byte is read from its own place), and as fast as the link."""
    store = weights.store
    count = len(store.arenas[0])
    number = 0
    for layer in range(weights.config.num_hidden_layers):
        for expert in (store.row[layer] >= 0).nonzero().flatten().tolist():
            for part, arena in zip(store.parts(layer, expert), store.arenas, strict=True):
                part.copy_(arena[number % count], non_blocking=True)
            number += 1
    if weights.embed.is_cuda:
        torch.cuda.synchronize()


class _Draw:
    """Fills tensors by name; every kind of weight gets the size that keeps activations near one."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def bits(self, x: Tensor) -> None:
        """Every bit random."""
        x.view(torch.int32).random_(-(1 << 31), 1 << 31, generator=self.generator)

    def exponents(self, x: Tensor, size: float) -> None:
        """e8m0 scales: ``size`` rounded to powers of two, now the lower, now the upper neighbour."""
        low = 127 + math.floor(math.log2(size))
        x.view(torch.uint8).random_(low, low + 2, generator=self.generator)

    def tensor(self, name: str, x: Tensor) -> None:
        """One tensor of a checkpoint."""
        if x.dtype == torch.float8_e4m3fn:
            codes = x.view(torch.uint8).random_(0, 256, generator=self.generator)
            codes.bitwise_and_(0xBF)  # no exponent above 7: at most 1.875, and never a NaN
        elif x.dtype == torch.float8_e8m0fnu:
            self.exponents(x, 1 / (_E4M3_RMS * math.sqrt(x.shape[1] * 128)))
        elif name.endswith(("norm.weight", "_scale")):
            x.uniform_(0.8, 1.2, generator=self.generator)
        elif name.endswith(".bias"):
            x.zero_()
        elif name.endswith(("_base", "attn_sink", ".ape")):
            x.normal_(0, 0.5, generator=self.generator)
        elif name == "embed.weight":
            x.normal_(0, 1, generator=self.generator)
        else:
            x.normal_(0, x.shape[-1] ** -0.5, generator=self.generator)

    def table(self, x: Tensor, experts: int) -> None:
        """Different experts for each token id, all equally likely."""
        for part in x.split(1 << 14):
            keys = torch.rand(len(part), experts, generator=self.generator, device=x.device)
            part.copy_(keys.topk(x.shape[1], dim=-1).indices)


def fill_from_checkpoint(weights: PackedWeights, path: str | Path, progress: Progress | None = None) -> None:
    """Read an official checkpoint tensor by tensor into place; at most one tensor is in memory twice.

    Raises CheckpointError for what ``Checkpoint`` refuses, and for tensors that are not stored as FP8 and FP4.
    """
    with Checkpoint(path) as checkpoint:
        _same_network(weights, checkpoint)
        names = list(weights.destinations())
        for done, (name, target) in enumerate(names, start=1):
            source = checkpoint.stored(name)
            packed = target.dtype.itemsize == 1
            if source.shape != target.shape or (packed and source.dtype != target.dtype):
                raise CheckpointError(
                    f"tensor {name!r} is {source.dtype} {tuple(source.shape)}; packed weights need {target.dtype} "
                    f"{tuple(target.shape)}: convert the checkpoint to the official FP8 and FP4 layout first"
                )
            if target.dtype == torch.float8_e8m0fnu and bool((source.view(torch.uint8) == 255).any()):
                raise CheckpointError(f"tensor {name!r} has scales that are not numbers; download or copy it again")
            target.copy_(source)
            if progress is not None:
                progress(done, len(names))


def _same_network(weights: PackedWeights, checkpoint: Checkpoint) -> None:
    without_drafts = checkpoint.config.replace(num_nextn_predict_layers=0, dialect=None)
    if checkpoint.layout != "official" or without_drafts != weights.config.replace(num_nextn_predict_layers=0, dialect=None):
        raise CheckpointError(
            f"{checkpoint.path}: packed weights take the official layout and the configuration they were allocated for; "
            "convert it first (nautile convert --to official)"
        )
