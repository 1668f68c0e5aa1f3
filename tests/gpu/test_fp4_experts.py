"""Experts on packed MXFP4 weights against float64."""

import pytest
import torch

from nautile.kernels.fp4_experts import ExpertBlocks, FP4Experts, fp4_experts, fp4_experts_reference
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
