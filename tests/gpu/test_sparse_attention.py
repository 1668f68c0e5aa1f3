"""Sparse attention over paged rows against float64: random rows and lists, every edge of shape."""

import pytest
import torch

from nautile.kernels.sparse_attention import (
    HopperTiles,
    RowPool,
    SplitPlan,
    fast_split,
    sparse_attention,
    sparse_attention_reference,
)

from .conftest import relative


def new_pool(rows, c, rotated, packed, device, dtype):
    if not packed:
        return RowPool(torch.randn(rows, c, device=device).to(dtype), c, c, rotated)
    plain = c - rotated
    width = plain + 2 * rotated + -(-(plain // 64) // 8) * 8
    data = torch.randint(0, 256, (rows, width), dtype=torch.uint8)  # padding bytes are poison
    data[:, :plain] = (torch.randn(rows, plain) * 20).to(torch.float8_e4m3fn).view(torch.uint8)
    data[:, plain : plain + 2 * rotated] = torch.randn(rows, rotated).bfloat16().view(torch.uint8).view(rows, -1)
    data[:, plain + 2 * rotated : plain + 2 * rotated + plain // 64] = torch.randint(119, 126, (rows, plain // 64))
    return RowPool(data.to(device), width, c, rotated)


SHAPES = [  # tokens, heads, c, near, far, tiles per split
    (1, 16, 128, 1, 0, 0),
    (1, 16, 128, 0, 1, 0),
    (2, 32, 128, 128, 37, 1),
    (3, 16, 128, 65, 193, 2),
    (1, 64, 512, 128, 70, 1),
    (2, 128, 128, 5, 64, 0),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_formula(shape, packed, device, dtype, bound):
    tokens, heads, c, near_count, far_count, tiles = shape
    near, far = (new_pool(rows, c, 64, packed, device, dtype) for rows in (150, 260))
    q = torch.randn(tokens, heads, c, device=device).to(dtype)
    sink = torch.randn(heads, device=device)
    near_ids = torch.randint(-1, 150, (tokens, near_count), dtype=torch.int32, device=device)
    far_ids = torch.randint(-1, 260, (tokens, far_count), dtype=torch.int32, device=device)
    if near_count + far_count == 1:
        near_ids, far_ids = near_ids.abs(), far_ids.abs()
    out = sparse_attention(q, near, near_ids, far, far_ids, sink, tiles_per_split=tiles)
    assert relative(out, sparse_attention_reference(q.double(), near, near_ids, far, far_ids, sink)) < bound


@pytest.mark.parametrize("tiles", [0, 1])
def test_a_query_that_sees_nothing_gives_zero(tiles, device, dtype):
    pool = new_pool(10, 128, 64, True, device, dtype)
    q = torch.randn(1, 16, 128, device=device).to(dtype)
    nothing = torch.full((1, 70), -1, dtype=torch.int32, device=device)
    out = sparse_attention(q, pool, nothing, pool, nothing, torch.zeros(16, device=device), tiles_per_split=tiles)
    assert torch.equal(out, torch.zeros_like(out))


def test_a_query_alone_is_the_same_bit_for_bit(device, dtype):
    near, far = (new_pool(200, 128, 64, True, device, dtype) for _ in range(2))
    q = torch.randn(4, 16, 128, device=device).to(dtype)
    near_ids, far_ids = (torch.randint(-1, 200, (4, n), dtype=torch.int32, device=device) for n in (128, 90))
    sink = torch.randn(16, device=device)
    together = sparse_attention(q, near, near_ids, far, far_ids, sink, tiles_per_split=1)
    for row in range(4):
        one = slice(row, row + 1)
        alone = sparse_attention(q[one], near, near_ids[one], far, far_ids[one], sink, tiles_per_split=1)
        assert torch.equal(alone[0], together[row])


def test_shapes_it_does_not_take_are_refused(device, dtype):
    pool = new_pool(4, 128, 64, False, device, dtype)
    ids = torch.zeros(1, 1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="multiple of 16"):
        sparse_attention(torch.zeros(1, 6, 128, device=device), pool, ids, pool, ids, torch.zeros(6, device=device))


HOPPERS = [
    HopperTiles(),
    HopperTiles(registers=80, serial=True),
    HopperTiles(registers=80, serial=True, half=True),
    HopperTiles(rows=32, stages=4),
    HopperTiles(rows=32, stages=4, warps=4, registers=104),
]


@pytest.mark.parametrize("tiles", HOPPERS, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 64, 1, 0, 0), (1, 64, 0, 1, 0), (3, 128, 128, 512, 1), (2, 64, 65, 193, 2), (5, 64, 3, 700, 0)]
)
def test_hoppers_own_kernel_is_the_formula(shape, tiles, hopper, bound):
    tokens, heads, near_count, far_count, per_split = shape
    near, far = (new_pool(rows, 512, 64, True, hopper, torch.bfloat16) for rows in (150, 900))
    q = torch.randn(tokens, heads, 512, device=hopper).bfloat16()
    sink = torch.randn(heads, device=hopper)
    near_ids = torch.randint(-1, 150, (tokens, near_count), dtype=torch.int32, device=hopper)
    far_ids = torch.randint(-1, 900, (tokens, far_count), dtype=torch.int32, device=hopper)
    if near_count + far_count == 1:
        near_ids, far_ids = near_ids.abs(), far_ids.abs()
    out = sparse_attention(q, near, near_ids, far, far_ids, sink, tiles_per_split=per_split, tiles=tiles)
    assert relative(out, sparse_attention_reference(q.double(), near, near_ids, far, far_ids, sink)) < bound


def test_hoppers_own_kernel_is_refused_elsewhere(device, dtype):
    pool = new_pool(4, 128, 64, False, device, dtype)
    ids = torch.zeros(1, 1, dtype=torch.int32, device=device)
    q = torch.zeros(1, 16, 128, device=device, dtype=dtype)
    with pytest.raises(ValueError, match="HopperTiles need"):
        sparse_attention(q, pool, ids, pool, ids, torch.zeros(16, device=device), tiles=HopperTiles())


@pytest.mark.parametrize(
    ("tokens", "far", "expected"),  # the fastest of those that were timed
    [(1, 512, 1), (8, 512, 1), (32, 512, 5), (128, 512, 10), (4096, 512, 10), (1, 8192, 2), (32, 8192, 33)],
)
def test_splits_are_the_fastest_measured(tokens, far, expected):
    assert fast_split(tokens, 64, 128, far) == expected


def test_a_list_of_any_length_has_few_splits():
    for far in (0, 1, 8192, 1 << 20):
        tiles = fast_split(1, 64, 128, far)
        assert SplitPlan.of(128, far, 64, tiles).splits <= 66
