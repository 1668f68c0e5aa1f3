"""FP8 against tables of every code and against loops over tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nautile.quant import fp8
from quant.formats import E4M3, ceil_power, e8m0_value, nearest_code

SHAPES = [(128, 128), (256, 128), (1, 1), (130, 127), (127, 300), (24, 384), (129, 257)]


def random_weight(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-12, 12, shape, generator=generator).float())
    return torch.randn(shape, generator=generator) * spread


def by_hand(weight: np.ndarray) -> np.ndarray:
    """Each 128 x 128 tile (or what is left of it) rounded by table look-up, float64."""
    out = np.empty_like(weight)
    for row in range(0, weight.shape[0], 128):
        for column in range(0, weight.shape[1], 128):
            tile = weight[row : row + 128, column : column + 128]
            scale = ceil_power(np.abs(tile).max(), 448.0, 0.0)
            positive = E4M3[:127]
            distance = np.abs(np.abs(tile / scale)[..., None] - positive)
            low = distance.argmin(-1)
            high = np.minimum(low + 1, 126)
            tie = np.take_along_axis(distance, high[..., None], -1)[..., 0] == distance.min(-1)
            code = np.where(tie & (low % 2 == 1), high, low)
            out[row : row + 128, column : column + 128] = np.copysign(positive[code], tile) * scale
    return out


def test_every_code_and_scale_decodes_exactly() -> None:
    """All 254 numbers of the payload under all scales that bf16 holds as well, against the tables."""
    codes = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)
    payload = torch.zeros(128, 128, dtype=torch.uint8)
    payload.view(-1)[: len(codes)] = codes
    for byte in range(10, 240):
        scale = torch.tensor([[byte]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
        real = fp8.decode_blocks(payload.view(torch.float8_e4m3fn), scale).view(-1)[: len(codes)]
        wanted = torch.tensor([E4M3[c] * e8m0_value(byte) for c in codes.tolist()], dtype=torch.float64)
        assert torch.equal(real.double(), wanted)
        assert torch.equal(real.bfloat16().float(), real)


@pytest.mark.parametrize("shape", SHAPES)
def test_encode_rounds_like_the_tables(shape: tuple[int, int]) -> None:
    weight = random_weight(shape)
    payload, scales = fp8.encode_blocks(weight)
    assert (payload.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float8_e8m0fnu)
    assert tuple(scales.shape) == (-(-shape[0] // 128), -(-shape[1] // 128))
    wanted = torch.from_numpy(by_hand(weight.double().numpy()))
    assert torch.equal(fp8.decode_blocks(payload, scales).double(), wanted)
    assert torch.equal(fp8.fake_quant_blocks(weight).double(), wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_encoding_twice_changes_nothing(shape: tuple[int, int]) -> None:
    once = fp8.fake_quant_blocks(random_weight(shape))
    assert torch.equal(fp8.fake_quant_blocks(once), once)
    assert torch.equal(fp8.decode_blocks(*fp8.encode_blocks(once)), once)


@settings(max_examples=40)
@given(st.lists(st.floats(min_value=-1e6, max_value=1e6, width=32), min_size=64, max_size=64))
def test_groups_follow_the_formula(values: list[float]) -> None:
    x = torch.tensor(values)
    scale = ceil_power(max(abs(v) for v in values), 448.0, float(np.float32(1e-4)))
    wanted = [np.copysign(E4M3[nearest_code(E4M3, v / scale)] * scale, v) for v in values]
    assert fp8.fake_quant_groups(x).tolist() == wanted


def test_groups_do_not_see_each_other() -> None:
    x = torch.cat((torch.full((64,), 1000.0), torch.full((64,), 0.001)))
    apart = torch.cat([fp8.fake_quant_groups(part) for part in x.split(64)])
    assert torch.equal(fp8.fake_quant_groups(x), apart)
    assert torch.equal(fp8.fake_quant_groups(torch.zeros(2, 64)), torch.zeros(2, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_straight_through(dtype: torch.dtype) -> None:
    for function, shape in ((fp8.fake_quant_blocks, (130, 70)), (fp8.fake_quant_groups, (3, 128))):
        x = random_weight(shape).to(dtype).requires_grad_()
        y = function(x)
        assert y.dtype == dtype
        assert torch.equal(y.detach(), function(x.detach()))
        y.backward(torch.full_like(y, 3.0))
        assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 3.0))


def test_the_compiler_sees_one_graph() -> None:
    for function, shape in ((fp8.fake_quant_blocks, (130, 70)), (fp8.fake_quant_groups, (3, 128))):
        x = random_weight(shape).requires_grad_()
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), function(x))


def test_shapes_that_do_not_fit_are_named() -> None:
    payload, scales = fp8.encode_blocks(torch.ones(130, 10))
    with pytest.raises(ValueError, match=r"130 x 10 needs \(2, 1\)"):
        fp8.decode_blocks(payload, scales[:1])
    with pytest.raises(ValueError, match="groups of 64"):
        fp8.fake_quant_groups(torch.ones(100))
