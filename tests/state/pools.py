"""Tiny networks, and running them on a pool the way an engine does.

In these networks every expert and every entry takes part, so that nothing is chosen: with a choice, a last bit that differs
between two chunkings flips it once in some thousand tokens, and logits jump. What a choice would read is compared directly.
"""

from __future__ import annotations

import functools

import torch

from nautile import Transformer
from nautile.state import PoolOptions, Sequence, StatePool
from nautile.state.pages import HISTORY, TAIL
from oracles.random_models import random_ids, tiny_network

SCHEDULE = (0, 4, 128)
LONGEST = 700
TOLERANCE = 1e-5


@functools.cache
def model() -> Transformer:
    return tiny_network(SCHEDULE, seed=11, num_experts_per_tok=8, index_topk=1024)


@functools.cache
def quantised() -> Transformer:
    sizes = {"head_dim": 72, "index_head_dim": 32, "fake_quant_kv": True, "fake_quant_indexer": True}
    return tiny_network((0, 4, 128), seed=3, num_experts_per_tok=8, index_topk=1024, **sizes)


@functools.cache
def row(seed: int) -> tuple[int, ...]:
    return tuple(random_ids(model().config, LONGEST, seed).tolist())


@functools.cache
def logits_of(ids: tuple[int, ...]) -> torch.Tensor:
    """[len(ids), V]: one pass without a state, the reference of every test here."""
    with torch.no_grad():
        return model()(torch.tensor([ids]))[0]


def poison(pool: StatePool) -> None:
    """Fill what is free with NaN: whoever reads what it has not been given computes nonsense."""
    pages = pool.pages
    for name in TAIL:
        getattr(pages, name)[pages.free_slots] = float("nan")
    for name in HISTORY:
        getattr(pages, name)[pages.free_blocks] = float("nan")


@torch.no_grad()
def check_index_keys(pool: StatePool, sequence: Sequence) -> None:
    """The indexer's keys of a sequence are those that a dense state has after the same tokens."""
    dense = model().new_state(1)
    model()(torch.tensor([sequence.ids]), state=dense, logits="none")
    count = sequence.length // 4
    for ordinal, layer in enumerate(layer for layer in dense.layers if layer.index_keys is not None):
        ours = pool.pages.index[sequence.blocks, ordinal].flatten(0, 1)[:count]
        close(ours, layer.index_keys[0, :count])  # type: ignore[index]


def new_pool(net: Transformer | None = None, **options: object) -> StatePool:
    settings = {"blocks": 24, "slots": 4, "block_tokens": 128, "snapshot_every": 128, **options}
    return StatePool((net or model()).config, PoolOptions(**settings), fingerprint="tiny")  # type: ignore[arg-type]


def cut(length: int, count: int, interval: int) -> list[int]:
    """Chunks of ``count`` tokens from ``length`` on, ending at multiples of the interval."""
    sizes = []
    while count:
        size = min(count, interval - length % interval)
        sizes.append(size)
        length, count = length + size, count - size
    return sizes


@torch.no_grad()
def feed(pool: StatePool, sequence: Sequence, ids: tuple[int, ...], net: Transformer | None = None) -> torch.Tensor:
    """Append tokens the way an engine does: logits of all of them, [len(ids), V]."""
    parts = [torch.empty(0, (net or model()).config.vocab_size)]
    for size in cut(sequence.length, len(ids), pool.options.snapshot_every):
        step, ids = ids[:size], ids[size:]
        pool.ensure(sequence, size)
        parts.append((net or model())(torch.tensor([step]), state=pool.batch([sequence]))[0])
        pool.append(sequence, step)
    return torch.cat(parts)


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == expected.shape
    worst = (ours - expected).abs().max().item() if ours.numel() else 0.0
    assert worst <= tolerance, f"max difference {worst}"
