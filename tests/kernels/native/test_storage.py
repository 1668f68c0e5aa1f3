"""Weights kept in 8 and 4 bits stand for exactly the numbers they were made of: no bit of any logit changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nautile.engine.native import KINDS, NativeRunner
from nautile.engine.plan import Piece, Plan
from nautile.kernels.native import NativeModel
from nautile.state.pages import Pages, PoolOptions, Sequence
from oracles.random_models import random_ids, tiny_config, tiny_network

SIZES = {
    "hidden_size": 192, "q_lora_rank": 64, "o_lora_rank": 64, "moe_intermediate_size": 64, "index_head_dim": 32,
    "vocab_size": 200,
}  # fmt: skip
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
GRIDS = ("e2m1", "e4m3", "bfloat16", "none")


def on_grid(grid: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Random weights of a grid: codes of every kind (zeros of both signs and subnormal ones too), a power of two for each row
    and 32 or 64 inputs, some rows all zero."""
    if grid in ("bfloat16", "none"):
        x = 0.1 * torch.randn(shape, generator=generator)
        return x.bfloat16().float() if grid == "bfloat16" else x
    group = 32 if grid == "e2m1" else 64
    groups = (*shape[:-1], shape[-1] // group, group)
    if grid == "e2m1":
        x = E2M1[torch.randint(8, groups, generator=generator)]
    else:
        x = torch.randint(127, groups, generator=generator).to(torch.uint8).view(torch.float8_e4m3fn).float() / 64
    powers = torch.randint(-9, 1, (*groups[:-1], 1), generator=generator)
    kept = torch.rand((*groups[:-1], 1), generator=generator) > 0.1
    signs = torch.randint(2, groups, generator=generator) * 2 - 1
    return (0.25 * torch.ldexp(x * kept, powers) * signs).reshape(shape)


def network_on_grids(seed: int, spoilt: bool) -> dict[str, torch.Tensor]:
    """The tensors of a small network whose matrices lie on grids drawn at random; ``spoilt``: but for one weight in each."""
    model = tiny_network((4, 128, 0), seed=1, **SIZES)
    frequencies = {name: getattr(model, name) for name in ("window_frequencies", "compressed_frequencies")}
    tensors = {**model.state_dict(), **frequencies}
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if tensor.dim() < 2 or not tensor.is_floating_point() or tensor.shape[-1] % 64 or "hc_" in name or "embed" in name:
            continue
        grid = GRIDS[int(torch.randint(len(GRIDS), (), generator=generator))]
        tensors[name] = on_grid(grid, tensor.shape, generator)
        if spoilt:
            tensors[name].flatten()[int(torch.randint(tensor.numel(), (), generator=generator))] += 2**-7
    return tensors


def logits(packed: NativeModel, dtype: str, sizes: list[int], threads: int) -> torch.Tensor:
    """Of two sequences that take in chunks of these sizes side by side, over and over."""
    pages = Pages(packed.config, PoolOptions(blocks=4, slots=2, rows=dtype))
    runner = NativeRunner(packed, pages, threads=threads)
    states = [Sequence(blocks=pages.allocate(2), slot=pages.allocate_slot()) for _ in range(2)]
    ids, out = random_ids(packed.config, 512, 3).tolist(), []
    for size in sizes:
        pieces = tuple(Piece(s, tuple(ids[s.length : s.length + size]), "all") for s in states[: 1 + size % 2])
        out.append(runner.step(Plan(pieces)))
        for piece in pieces:
            piece.sequence.ids += piece.ids
    return torch.cat(out)


@settings(max_examples=12)
@given(
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 2**20),
    sizes=st.lists(st.sampled_from([1, 2, 3, 5, 7, 9, 10, 47, 101]), min_size=1, max_size=4),
    threads=st.integers(1, 2),
    spoilt=st.booleans(),
)
def test_no_bit_changes(dtype, seed, sizes, threads, spoilt):
    tensors, config = network_on_grids(seed, spoilt), tiny_config((4, 128, 0), **SIZES)
    narrow, wide = (NativeModel(config, tensors, dataclasses.replace(KINDS[dtype], narrow=flag)) for flag in (True, False))
    expected = logits(wide, dtype, sizes, 1)
    assert expected.isfinite().all()
    assert torch.equal(logits(narrow, dtype, sizes, threads), expected)


@pytest.mark.skipif("avx512_vbmi" not in Path("/proc/cpuinfo").read_text(), reason="codes are looked up with AVX-512 VBMI")
@pytest.mark.parametrize("grid", ["e2m1", "e4m3"])
def test_weights_on_a_grid_take_its_bits(grid):
    """4 bits and a byte for every 32 inputs, or 8 bits and a byte for every 64, in place of 16 or 32 bits: without this the
    test above would not look at codes at all."""
    model = tiny_network((0,), seed=1, **{**SIZES, "moe_intermediate_size": 512})
    frequencies = {name: getattr(model, name) for name in ("window_frequencies", "compressed_frequencies")}
    tensors = {**model.state_dict(), **frequencies}
    generator = torch.Generator().manual_seed(1)
    names = [name for name in tensors if name.startswith("layers.") and "experts." in name]
    for name in names:
        tensors[name] = on_grid(grid, tensors[name].shape, generator)
    count = sum(tensors[name].numel() for name in names)
    saved = {}
    for dtype, bits in (("bfloat16", 16), ("float32", 32)):
        kinds = (dataclasses.replace(KINDS[dtype], narrow=flag) for flag in (True, False))
        narrow, wide = (NativeModel(model.config, tensors, kind) for kind in kinds)
        saved[bits] = (wide.weight_bytes - narrow.weight_bytes) / count
    kept = (4 + 8 / 32) / 8 if grid == "e2m1" else (8 + 8 / 64) / 8
    for bits, fewer in saved.items():
        assert fewer == pytest.approx(bits / 8 - kept, rel=0.02)
