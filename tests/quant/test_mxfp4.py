"""MXFP4 against tables of every code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nautile.quant import fp8, mxfp4
from quant.formats import E2M1, ceil_power, e8m0_value, nearest_code


def by_hand(row: list[float]) -> list[float]:
    """One group, element by element, float64."""
    scale = ceil_power(max(abs(v) for v in row), 6.0, 6 * 2.0**-126)
    return [float(np.copysign(E2M1[nearest_code(E2M1, v / scale)] * scale, v)) for v in row]


def test_every_byte_and_scale_decodes_exactly() -> None:
    """All 256 bytes under all scales whose products are normal numbers; the low nibble is the even index."""
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)
    for byte in range(2, 252):
        scales = torch.full((16, 1), byte, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        wanted = [[E2M1[b & 15], E2M1[b >> 4]] for b in range(256)]
        wide = torch.tensor(wanted, dtype=torch.float64).view(16, 32) * e8m0_value(byte)
        for payload in (packed, packed.view(torch.int8)):
            real = mxfp4.decode(payload, scales)
            assert torch.equal(real.double(), wide)
            assert torch.equal(real.bfloat16().float(), real)


def test_halfway_goes_to_the_even_code() -> None:
    halfway = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    row = torch.tensor([6.0, *halfway, *(-h for h in halfway), *([0.0] * 17)])
    wanted = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    found = mxfp4.fake_quant(row).tolist()
    assert found[1:8] == wanted and found[8:15] == [-w for w in wanted]


@settings(max_examples=60)
@given(st.lists(st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32), min_size=32, max_size=32))
def test_rounding_follows_the_tables(row: list[float]) -> None:
    x = torch.tensor(row)
    assert mxfp4.decode(*mxfp4.encode(x)).tolist() == by_hand(row)
    assert mxfp4.fake_quant(x).tolist() == by_hand(row)


def test_leading_dimensions_and_groups() -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    packed, scales = mxfp4.encode(x)
    assert (packed.dtype, scales.dtype) == (torch.int8, torch.float8_e8m0fnu)
    assert (tuple(packed.shape), tuple(scales.shape)) == ((3, 5, 32), (3, 5, 2))
    whole = mxfp4.decode(packed, scales)
    assert torch.equal(whole[1, 2, 32:], torch.tensor(by_hand(x[1, 2, 32:].tolist())))
    assert torch.equal(mxfp4.fake_quant(x), whole)
    assert torch.equal(mxfp4.fake_quant(whole), whole)
    assert torch.equal(mxfp4.fake_quant(torch.zeros(2, 32)), torch.zeros(2, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_straight_through(dtype: torch.dtype) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    y = mxfp4.fake_quant(x)
    assert y.dtype == dtype and torch.equal(y.detach(), mxfp4.fake_quant(x.detach()))
    y.backward(torch.full_like(y, 2.0))
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 2.0))


def test_the_compiler_sees_one_graph() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert torch.equal(torch.compile(mxfp4.fake_quant, backend="eager", fullgraph=True)(x), mxfp4.fake_quant(x))


def test_fp4_survives_in_fp8() -> None:
    """The published lossless re-encoding: e2m1 times a power of two is an e4m3 number while scales differ by at most 2^6."""
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(4))
    fp4 = mxfp4.fake_quant(x)
    assert torch.equal(fp8.fake_quant_blocks(fp4), fp4)


def test_shapes_that_do_not_fit_are_named() -> None:
    packed, scales = mxfp4.encode(torch.ones(2, 64))
    with pytest.raises(ValueError, match=r"needs \(2, 2\)"):
        mxfp4.decode(packed, scales[:, :1])
    with pytest.raises(ValueError, match="groups of 32"):
        mxfp4.encode(torch.ones(2, 40))
