"""The indexer's scores against float64 and its selection against a stable sort, ties and all."""

import pytest
import torch

from nautile.kernels.index_select import Paging, index_scores_reference, index_select, index_select_reference
from nautile.quant import mxfp4


def new_case(tokens, heads, ci, count, device, dtype):
    codes, scales = mxfp4.encode(torch.randn(count, ci))
    keys = torch.cat((codes.view(torch.uint8), scales.view(torch.uint8)), dim=-1).to(device)
    q = mxfp4.decode(*mxfp4.encode(torch.randn(tokens, heads, ci))).to(device, dtype)
    visible = torch.randint(0, count + 1, (tokens,), device=device)
    visible[0] = count
    return q, torch.randn(tokens, heads, device=device), keys, visible


def error(scores, case):
    """Of the scores that a query may see, relative to the sum of their terms' sizes: terms of both signs may cancel."""
    q, weights, keys, visible = case
    right, size = index_scores_reference(q, weights, keys), index_scores_reference(q, weights.abs(), keys)
    off = (seen(scores, visible).double() - seen(right, visible)).norm() / seen(size, visible).norm()
    return float("inf") if off.isnan() else off.item()


def seen(scores, visible):
    """Scores with what the kernel may leave unwritten set to zero."""
    return torch.where(torch.arange(scores.shape[1], device=scores.device) < visible[:, None], scores, 0)


@pytest.mark.parametrize(
    ("tokens", "heads", "ci", "count", "k"),
    [(1, 16, 128, 1, 4), (2, 16, 128, 300, 16), (2, 64, 128, 4300, 512), (1, 16, 128, 700, 700)],
)
def test_scores_and_selection(tokens, heads, ci, count, k, device, dtype):
    q, weights, keys, visible = new_case(tokens, heads, ci, count, device, dtype)
    scores, selected = index_select(q, weights, keys, visible, k)
    assert error(scores, (q, weights, keys, visible)) < 1e-6  # products are exact
    assert torch.equal(selected, index_select_reference(seen(scores, visible), visible, k))


@pytest.mark.parametrize(("tokens", "count"), [(9, 129)])
def test_many_queries_of_the_same_keys(tokens, count, device, dtype, monkeypatch):
    monkeypatch.setattr("nautile.kernels.index_select._QUERIES", 4)
    q, weights, keys, visible = new_case(tokens, 16, 128, count, device, dtype)
    scores, selected = index_select(q, weights, keys, visible, 16, kernel="many")
    assert error(scores, (q, weights, keys, visible)) < 1e-6
    assert torch.equal(selected, index_select_reference(seen(scores, visible), visible, 16))
    with pytest.raises(ValueError, match="of their own"):
        index_select(q, weights, keys.expand(tokens, -1, -1), visible, 16, kernel="many")


@pytest.mark.parametrize("kernel", ["portable", *(["auto"] if torch.cuda.is_available() else [])])
def test_every_query_with_keys_of_its_own(kernel, device, dtype):
    """Queries of several sequences at once are each what they are alone."""
    q, weights, _, visible = new_case(3, 16, 128, 300, device, dtype)
    keys = torch.stack([new_case(1, 16, 128, 300, device, dtype)[2] for _ in range(3)])
    scores, selected = index_select(q, weights, keys, visible, 16, kernel=kernel)
    assert error(scores, (q, weights, keys, visible)) < 1e-6
    for row in range(3):
        one = slice(row, row + 1)
        _, alone = index_select(q[one], weights[one], keys[row], visible[one], 16, kernel=kernel)
        assert torch.equal(selected[one], alone)
    paging = Paging(torch.stack([torch.randperm(40)[:10] for _ in range(3)]).to(device), 32, 96)
    visible[1] = 5
    entries = index_select(q, weights, keys, visible, 16, kernel=kernel)[1].tolist()
    expected = [
        [-1 if entry < 0 else int(table[entry // 32]) * 96 + entry % 32 for entry in row]
        for row, table in zip(entries, paging.table, strict=True)
    ]
    assert index_select(q, weights, keys, visible, 16, kernel=kernel, paging=paging)[1].tolist() == expected


@pytest.mark.parametrize("kind", ["zero", "minus zero", "two values"])
def test_ties_go_to_the_lowest_index(kind, device, dtype):
    q, weights, keys, visible = new_case(2, 16, 128, 1100, device, dtype)
    if kind == "zero":
        weights.zero_()
    elif kind == "minus zero":  # w relu(.) is -0 for negative w: it equals 0 and must tie with it
        q.zero_()
        weights[0] = -weights[0].abs()
    else:
        weights.zero_()
        weights[:, 0] = 1
        keys[:] = keys[0].clone()
        keys[::3] = keys[1].clone()
    scores, selected = index_select(q, weights, keys, visible, 150)
    assert torch.equal(selected, index_select_reference(seen(scores, visible), visible, 150))


def test_shapes_it_does_not_take_are_refused(device, dtype):
    q, weights, keys, visible = new_case(1, 16, 128, 10, device, dtype)
    with pytest.raises(ValueError, match="power of two"):
        index_select(q[:, :4], weights[:, :4], keys, visible, 4)
    with pytest.raises(ValueError, match="at most"):
        index_select(q, weights, keys, visible, 5000)


@pytest.mark.parametrize("kernel", ["auto", "warpgroup", "many"])
@pytest.mark.parametrize(
    ("tokens", "count", "k"), [(1, 1, 4), (2, 300, 512), (2, 4300, 512), (1, 262144, 512), (3, 20000, 1024)]
)
def test_hoppers_own_scores(kernel, tokens, count, k, hopper):
    q, weights, keys, visible = new_case(tokens, 64, 128, count, hopper, torch.bfloat16)
    scores, selected = index_select(q, weights, keys, visible, k, kernel=kernel)
    assert error(scores, (q, weights, keys, visible)) < 1e-6
    assert torch.equal(selected, index_select_reference(seen(scores, visible), visible, k))


def test_more_candidates_than_the_bound_hopes_for(device, dtype):
    """All good scores lie in one group of neighbours: the bound is far below them and every key is a candidate."""
    q, weights, keys, visible = new_case(1, 16, 128, 5000, device, dtype)
    weights.abs_()
    keys[:4700] = 0
    visible[0] = 5000
    scores, selected = index_select(q, weights, keys, visible, 250)
    assert torch.equal(selected, index_select_reference(seen(scores, visible), visible, 250))
