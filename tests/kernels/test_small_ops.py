"""Sinkhorn in all its implementations, and top-k with ties to the lowest index."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nautile.kernels.sinkhorn import sinkhorn, sinkhorn_floats, sinkhorn_reference
from nautile.kernels.topk import topk_indices, topk_mask


def naive_sinkhorn(logits, iterations, eps):
    m = logits.double().exp()
    m = m / m.sum(-1, keepdim=True) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m


@pytest.mark.parametrize("shape", [(4, 4), (1, 1, 4, 4), (3, 5, 4, 4), (2, 2, 2)])
def test_every_path_is_the_formula(shape):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3
    expected = naive_sinkhorn(logits, 20, 1e-6)
    assert (sinkhorn(logits, 20, 1e-6) - expected).abs().max() < 2e-6
    assert (sinkhorn_reference(logits, 20, 1e-6) - expected).abs().max() < 2e-6
    assert (sinkhorn(logits.clone().requires_grad_(), 20, 1e-6) - expected).abs().max() < 2e-6


def test_plain_floats():
    logits = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rows = sinkhorn_floats((logits.softmax(-1) + 1e-6).tolist(), 20, 1e-6)
    assert (torch.tensor(rows, dtype=torch.float64) - naive_sinkhorn(logits, 20, 1e-6)).abs().max() < 1e-12


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(1, 45))
def test_topk_takes_the_lowest_of_equals(values, k):
    scores = torch.tensor([float(value) for value in values])
    best = sorted(range(len(values)), key=lambda index: (-values[index], index))[:k]
    assert topk_indices(scores, k).tolist() == best
    assert topk_mask(scores, k).nonzero().flatten().tolist() == sorted(best)


def test_topk_never_takes_what_is_hidden():
    scores = torch.tensor([[1.0, -torch.inf, -torch.inf, 0.5]])
    assert topk_mask(scores, 3).tolist() == [[True, False, False, True]]
