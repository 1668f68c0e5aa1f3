"""Row formats: the bytes are those of the official caches, the values those of the model's own rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nautile import ModelConfig
from nautile.engine.costs import gqa8_kv_bytes, kv_bytes
from nautile.quant import fp8, mxfp4
from nautile.state import Pages, PoolOptions
from nautile.state.formats import IndexFormat, RowFormat, index_format, row_format
from state.pools import model, quantised

FLASH = ModelConfig.preset("flash")


def rows(seed: int, shape: tuple[int, ...], spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(spread * torch.randn((*shape[:-1], 1), generator=generator))


def test_the_official_sizes() -> None:
    assert row_format(FLASH, "packed").width == 584 and index_format(FLASH, "packed").width == 68
    assert row_format(FLASH, "bfloat16").width == 512 and index_format(FLASH, "float32").width == 128


@given(st.integers(0, 1000), st.floats(0, 8))
def test_a_packed_row_is_what_fake_quantisation_leaves(seed: int, spread: float) -> None:
    layout = row_format(FLASH, "packed")
    x = rows(seed, (3, 5, 512), spread)
    stored = layout.encode(x)
    assert stored.dtype == torch.uint8 and stored.shape == (3, 5, 584)
    expected = torch.cat((fp8.fake_quant_groups(x[..., :448]), x[..., 448:].bfloat16().float()), dim=-1)
    assert torch.equal(layout.decode(stored), expected)
    assert torch.equal(layout.decode(layout.encode(expected)), expected)  # storing what is stored changes nothing
    assert not stored[..., 583].any()  # the pad byte: 448 payload + 128 rotated + 7 scales


@given(st.integers(0, 1000), st.floats(0, 8))
def test_a_packed_key_is_what_fake_quantisation_leaves(seed: int, spread: float) -> None:
    layout = index_format(FLASH, "packed")
    x = rows(seed, (4, 128), spread)
    expected = mxfp4.fake_quant(x)
    assert torch.equal(layout.decode(layout.encode(x)), expected)
    assert torch.equal(layout.decode(layout.encode(expected)), expected)


def test_the_bytes_of_a_packed_row_by_hand() -> None:
    """One in the first payload place (448 = the largest e4m3, scale 2^0), one in the first rotated place."""
    x = torch.zeros(512)
    x[0], x[448] = 448.0, 1.0
    stored = RowFormat(512, 64, 584).encode(x).tolist()
    assert stored[0] == 0x7E and stored[448:450] == [0x80, 0x3F] and stored[576] == 127
    key = torch.zeros(128)
    key[0], key[1], key[127] = 6.0, -0.5, 3.0
    stored = IndexFormat(128, 68).encode(key).tolist()
    assert stored[0] == 0x97 and stored[63] == 0x70 and stored[64] == 127 and stored[67] == 126  # 3 = 6 x 2^-1


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_bytes_at_a_million_tokens_equal_the_plan(name: str) -> None:
    """Counted on tensors of that shape (on the meta device): whole blocks cost what the formula of ``nautile plan`` says, a
    million tokens take those and less than one block more, and that is at most 2.05 % of bf16 GQA-8."""
    config = ModelConfig.preset(name)
    blocks = -(-1_000_000 // 256)
    pages = Pages(config, PoolOptions(blocks=blocks, slots=1, rows="packed"), "meta")
    measured, plan = pages.bytes_by_kind, kv_bytes(config, blocks * 256)
    mtp = pages.window[:, -1].nbytes  # the plan counts the trunk's windows
    assert measured["csa"] + measured["hca"] == plan.entries
    assert measured["index"] == plan.index_keys
    assert measured["window"] - mtp == plan.window
    assert sum(measured[kind] for kind in ("csa_kv", "csa_gate", "hca_kv", "hca_gate")) == plan.tails
    assert measured["index_kv"] + measured["index_gate"] == plan.index_tails
    exact = kv_bytes(config, 1_000_000)
    assert 0 <= sum(measured.values()) - mtp - exact.total < pages.block_bytes
    assert sum(measured.values()) / gqa8_kv_bytes(1_000_000, config.num_hidden_layers) <= 0.0205


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "packed"])
def test_bytes_of_a_real_pool(kind: str) -> None:
    config = quantised().config
    pages = Pages(config, PoolOptions(blocks=5, slots=2, rows=kind))  # type: ignore[arg-type]
    plan = kv_bytes(config, 5 * 256, 1, {"float32": "fp32", "bfloat16": "bf16", "packed": "packed"}[kind])  # type: ignore[arg-type]
    assert pages.block_bytes * 5 == plan.history
    assert pages.slot_bytes - pages.window[0, -1].nbytes == plan.tail - plan.spare
    assert pages.read_blocks([3, 1]).shape == (2, pages.block_bytes)
    assert pages.read_tail(1, 100).nbytes == pages.tail_bytes(100) <= pages.slot_bytes


def test_packed_rows_need_a_model_that_rounds_itself() -> None:
    for layout in (row_format, index_format):
        with pytest.raises(ValueError, match="bfloat16"):
            layout(model().config, "packed")


def test_what_comes_out_of_a_tail_goes_in_again() -> None:
    pages = Pages(model().config, PoolOptions(blocks=2, slots=2))
    for name in ("window", "csa_kv", "csa_gate", "index_kv", "index_gate", "hca_kv", "hca_gate"):
        getattr(pages, name).copy_(torch.randn(getattr(pages, name).shape))
    for length in (0, 1, 15, 16, 127, 128, 129, 300):
        data = pages.read_tail(0, length)
        pages.write_tail(1, length, data)
        assert torch.equal(pages.read_tail(1, length), data)
    with pytest.raises(ValueError, match="bytes"):
        pages.write_tail(1, 5, data)
