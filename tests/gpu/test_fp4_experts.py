"""Experts on packed MXFP4 weights against float64."""

import pytest
import torch

from nautile.kernels.fp4_experts import (
    ExpertBlocks,
    FewTiles,
    FP4Experts,
    ManyTiles,
    _prepared,
    fp4_experts,
    fp4_experts_reference,
)
from nautile.quant import mxfp4

from .conftest import relative


def new_experts(count, inner, hidden, device):
    def packed(rows, columns):
        codes, scales = mxfp4.encode(torch.randn(count, rows, columns))
        return codes.view(torch.uint8).to(device), scales.view(torch.uint8).to(device)

    return FP4Experts(*packed(inner, hidden), *packed(inner, hidden), *packed(hidden, inner), 10.0)


def routed(tokens, experts, top, device):
    chosen = torch.stack([torch.randperm(experts)[:top] for _ in range(tokens)]).to(device)
    return chosen, torch.rand(tokens, top, device=device)


@pytest.mark.parametrize(
    ("tokens", "experts", "top", "inner", "hidden"),
    [(1, 1, 1, 128, 128), (1, 8, 6, 128, 256), (3, 8, 2, 256, 128), (40, 4, 2, 128, 256), (70, 3, 2, 128, 128)],
)
def test_it_is_the_formula(tokens, experts, top, inner, hidden, device, dtype, bound):
    weights = new_experts(experts, inner, hidden, device)
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    chosen, shares = routed(tokens, experts, top, device)
    out = fp4_experts(x, chosen, shares, weights)
    assert relative(out, fp4_experts_reference(x, chosen, shares, weights)) < bound


def test_every_pair_is_in_one_block():
    chosen = torch.stack([torch.randperm(9)[:3] for _ in range(50)])
    blocks = ExpertBlocks.of(chosen, 9, 8)
    covered = []
    for expert, first, count in zip(blocks.expert.tolist(), blocks.first.tolist(), blocks.count.tolist(), strict=True):
        pairs = blocks.pair[first : first + count].tolist()
        assert all(chosen.flatten()[pair] == expert for pair in pairs)
        covered += pairs
    assert sorted(covered) == list(range(150))


def test_widths_it_does_not_take_are_refused(device):
    weights = new_experts(1, 128, 64, device)
    with pytest.raises(ValueError, match="multiples of 128"):
        fp4_experts(torch.zeros(1, 64, device=device), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), weights)


@pytest.mark.parametrize(("tokens", "experts", "top", "size"), [(1, 8, 6, 8), (50, 9, 3, 8), (32, 256, 6, 8), (7, 3, 3, 16)])
def test_one_kernel_makes_the_same_blocks(tokens, experts, top, size, device, dtype):
    chosen = torch.stack([torch.randperm(experts)[:top] for _ in range(tokens)]).to(device)
    blocks = _prepared(torch.zeros(tokens, 128, device=device, dtype=dtype), chosen, experts, size, 0, False)[0]
    expected = ExpertBlocks.of(chosen, experts, size)
    used = expected.count > 0
    assert torch.equal(blocks.count, expected.count)
    for ours, theirs in ((blocks.expert, expected.expert), (blocks.first, expected.first)):
        assert torch.equal(ours[used], theirs[used])
    assert torch.equal(blocks.pair, expected.pair)


def test_the_copy_is_reordered(device, dtype):
    x = torch.randn(3, 256, device=device).to(dtype)
    chosen = torch.zeros(3, 1, dtype=torch.int64, device=device)
    halves = _prepared(x, chosen, 1, 16, 2, False)[1]
    assert torch.equal(halves, torch.stack((x[:, ::2], x[:, 1::2]), dim=1))


def test_steps_that_do_not_divide_the_inputs_are_refused(device, dtype):
    x, chosen = torch.zeros(1, 256, device=device, dtype=dtype), torch.zeros(1, 1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="do not divide into 2 parts"):
        tiles = FewTiles(4, 32, 32, direct=True, split=2)
        fp4_experts(x, chosen, torch.ones(1, 1, device=device), new_experts(1, 256, 256, device), tiles=tiles)


HOPPERS = [
    FewTiles(),
    FewTiles(direct=True),
    FewTiles(4, 16, 16, True, 2),
    FewTiles(4, 8, 8, True, 4),
    ManyTiles(),
    ManyTiles(registers=88, spread=True),
]


@pytest.mark.parametrize("tiles", HOPPERS, ids=str)
@pytest.mark.parametrize(("tokens", "experts", "top"), [(1, 8, 6), (5, 8, 2), (40, 8, 2), (170, 3, 2)])
def test_hoppers_own_kernels_are_the_formula(tokens, experts, top, tiles, hopper, bound):
    weights = new_experts(experts, 256, 512, hopper)
    x = torch.randn(tokens, 512, device=hopper).bfloat16()
    chosen, shares = routed(tokens, experts, top, hopper)
    shares[0, 0] = 0  # an expert that lies elsewhere
    out = fp4_experts(x, chosen, shares, weights, tiles=tiles)
    assert relative(out, fp4_experts_reference(x, chosen, shares, weights)) < bound
