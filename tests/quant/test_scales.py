"""Power-of-two scales against exact rational arithmetic, at every place where a logarithm would round."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nautile.quant.scales import power_of_two_scale, straight_through


def exact(amax: float, largest: float) -> float:
    """The smallest power of two s within the format's range with amax / s <= largest."""
    exponent = -126
    while Fraction(amax) > Fraction(largest) * Fraction(2) ** exponent and exponent < 127:
        exponent += 1
    return 2.0**exponent


@pytest.mark.parametrize("largest", [448.0, 6.0, 1.0])
def test_the_neighbours_of_every_boundary(largest: float) -> None:
    """largest * 2^k and the float32 numbers just below and above it, for every exponent a weight can have."""
    boundary = largest * torch.exp2(torch.arange(-100, 100, dtype=torch.float64)).float()
    below = torch.nextafter(boundary, torch.zeros(()))
    above = torch.nextafter(boundary, torch.full((), torch.inf))
    wanted = torch.exp2(torch.arange(-100, 100, dtype=torch.float64)).float()
    assert torch.equal(power_of_two_scale(boundary, largest), wanted)
    assert torch.equal(power_of_two_scale(below, largest), wanted)
    assert torch.equal(power_of_two_scale(above, largest), 2 * wanted)


@given(st.floats(min_value=0, max_value=2.0**126, width=32), st.sampled_from([448.0, 6.0]))
def test_any_amax(amax: float, largest: float) -> None:
    assert power_of_two_scale(torch.tensor(amax), largest).item() == exact(amax, largest)


def test_the_range_ends_where_e8m0_and_float32_do() -> None:
    ends = torch.tensor([0.0, 1e-45, torch.finfo(torch.float32).max])
    found = power_of_two_scale(ends, 6.0)
    assert found.tolist() == [2.0**-126, 2.0**-126, 2.0**126]
    assert torch.equal(found.to(torch.float8_e8m0fnu).float(), found)


def test_every_scale_survives_e8m0() -> None:
    scales = torch.exp2(torch.arange(-126, 128, dtype=torch.float64)).float()
    stored = scales.to(torch.float8_e8m0fnu)
    assert stored.view(torch.uint8).tolist() == list(range(1, 255))
    assert torch.equal(stored.float(), scales)


def test_straight_through_keeps_the_value_and_passes_the_gradient() -> None:
    x = torch.tensor([0.3, -1.7, 5.0], requires_grad=True)
    rounded = torch.tensor([0.5, -1.5, 6.0])
    y = straight_through(x, rounded)
    assert torch.equal(y.detach(), rounded)
    (y * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 2.0, 3.0]
    with torch.no_grad():
        assert straight_through(x, rounded) is rounded
