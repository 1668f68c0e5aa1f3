"""What a sequence gets does not depend on which others run beside it, bit for bit: random batch mates, every kernel.

On a GPU the shapes are Flash's and there are more rounds: pytest tests/gpu/test_deterministic.py is the check of the
deterministic mode there.
"""

import pytest
import torch

from nautile.kernels.fp4_experts import ExpertTiles, FewTiles, ManyTiles, fp4_experts
from nautile.kernels.index_select import index_select
from nautile.kernels.sparse_attention import sparse_attention

from .test_fp4_experts import new_experts, routed
from .test_index_select import new_case
from .test_sparse_attention import new_pool


def some_of(tokens):
    """A random subset in random order."""
    return torch.randperm(tokens)[: int(torch.randint(1, tokens + 1, ()))]


@pytest.fixture
def rounds(device):
    return 20 if device.type == "cuda" else 2


@pytest.mark.parametrize("tiles_per_split", [0, 2])
def test_attention(tiles_per_split, rounds, device, dtype):
    heads, c, tokens = (64, 512, 40) if device.type == "cuda" else (16, 128, 4)
    near, far = (new_pool(rows, c, 64, True, device, dtype) for rows in (500, 3000))
    q, sink = torch.randn(tokens, heads, c, device=device).to(dtype), torch.randn(heads, device=device)
    near_ids = torch.randint(-1, 500, (tokens, 128), dtype=torch.int32, device=device)
    far_ids = torch.randint(-1, 3000, (tokens, 512 if device.type == "cuda" else 70), dtype=torch.int32, device=device)
    together = sparse_attention(q, near, near_ids, far, far_ids, sink, tiles_per_split=tiles_per_split)
    for _ in range(rounds):
        some = some_of(tokens).to(device)
        few = sparse_attention(q[some], near, near_ids[some], far, far_ids[some], sink, tiles_per_split=tiles_per_split)
        assert torch.equal(few, together[some])


@pytest.mark.parametrize("tiles", [ExpertTiles(16, 32, 64, 64, 4, 4), FewTiles(), ManyTiles()], ids=str)
def test_experts(tiles, rounds, device, dtype, request):
    if not isinstance(tiles, ExpertTiles):
        request.getfixturevalue("hopper")
    tokens, experts, inner, hidden = (40, 32, 2048, 4096) if device.type == "cuda" else (6, 4, 128, 256)
    weights = new_experts(experts, inner, hidden, device)
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    chosen, shares = routed(tokens, experts, 3, device)
    together = fp4_experts(x, chosen, shares, weights, tiles=tiles)
    for _ in range(rounds):
        some = some_of(tokens).to(device)
        assert torch.equal(fp4_experts(x[some], chosen[some], shares[some], weights, tiles=tiles), together[some])


def test_indexer(rounds, device, dtype):
    tokens, count = (16, 30000) if device.type == "cuda" else (3, 900)
    q, weights, keys, visible = new_case(tokens, 64, 128, count, device, dtype)
    _, together = index_select(q, weights, keys, visible, 100)
    for _ in range(rounds):
        some = some_of(tokens).to(device)
        _, few = index_select(q[some], weights[some], keys, visible[some], 100)
        assert torch.equal(few, together[some])
