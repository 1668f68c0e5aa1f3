"""Logits, drafts and decisions against the naive float64 network: what transformers cannot check, and transformers itself.

The network runs in float64 too (``model.double()``), so that a value near the border between two FP8 or FP4 codes falls on
the same side in both. What is left, about 1e-7, comes from rotation frequencies, which the network keeps in float32.
The naive network is causal by construction: its rows at length T are those of every shorter length.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from nautile import ModelConfig, Transformer
from nautile.model import Trace
from nautile.quant import fp8, mxfp4
from oracles import naive_v4
from oracles.hf_reference import reference
from oracles.random_models import network, random_ids, random_tensors, tiny_config

TOLERANCE = 1e-5
QUANTISED: dict[str, Any] = {
    "head_dim": 72, "qk_rope_head_dim": 8, "index_head_dim": 32, "fake_quant_kv": True, "fake_quant_indexer": True,
}  # fmt: skip

# name -> (schedule, length, gain of the experts, changes)
CASES: dict[str, tuple[tuple[int, ...], int, float, dict[str, Any]]] = {
    "everything": ((0, 4, 128, 4), 133, 3.0, {**QUANTISED, "index_topk": 6, "swiglu_limit": 2.0}),
    "fp8 kv only": ((128, 4), 130, 1.0, {**QUANTISED, "fake_quant_indexer": False, "head_dim": 136, "index_topk": 3}),
    "fp4 indexer only": ((4, 4), 70, 1.0, {**QUANTISED, "fake_quant_kv": False, "index_head_dim": 64, "index_topk": 4}),
    "clamped": ((0, 4), 40, 8.0, {**QUANTISED, "num_hash_layers": 0, "n_routed_experts": 4}),
    "ties": ((4, 4), 80, 1.0, {"index_n_heads": 2, "index_topk": 5}),
    "fp4 ties": ((4,), 80, 1.0, {**QUANTISED, "index_n_heads": 1, "index_topk": 5}),
    "window of one, tied head": ((128, 0), 131, 1.0, {"sliding_window": 1, "tie_word_embeddings": True, "rope_scaling": None}),
}
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 31, 32, 33, 70, 80, 127, 128, 129, 130, 131, 132, 133)


@dataclass
class Case:
    config: ModelConfig
    tensors: dict[str, torch.Tensor]
    ids: torch.Tensor  # [1, T]
    naive: naive_v4.NaiveOutput

    def wide(self) -> Transformer:
        return network(self.config, self.tensors).double()


@functools.cache
def make(name: str) -> Case:
    schedule, length, gain, changes = CASES[name]
    config = tiny_config(schedule, **changes)
    seed = list(CASES).index(name)
    tensors = random_tensors(config, seed, gain=gain)
    ids = random_ids(config, length, seed + 100)
    return Case(config, tensors, ids.unsqueeze(0), naive_v4.run(config, tensors, ids.tolist(), mtp=True))


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return make(request.param)


@pytest.fixture(scope="module")
def everything() -> Case:
    return make("everything")


def worst(ours: torch.Tensor, naive: np.ndarray) -> float:
    assert tuple(ours.shape) == naive.shape
    return float(np.abs(ours.double().numpy() - naive).max())


@torch.no_grad()
def test_logits_at_every_length(case: Case) -> None:
    model = case.wide()
    for length in (n for n in LENGTHS if n <= case.ids.shape[1]):
        logits = model(case.ids[:, :length])
        assert logits.dtype == torch.float64
        assert worst(logits[0], case.naive.logits[:length]) <= TOLERANCE, f"length {length}"


@torch.no_grad()
def test_drafts(case: Case) -> None:
    """MTP: streams before the collapse at t with the token of t + 1; and the streams it leaves for the next step."""
    model = case.wide()
    for length in (n for n in (2, 3, 17, 18, case.ids.shape[1]) if n <= case.ids.shape[1]):
        ids = case.ids[:, :length]
        streams = model.streams(ids, model.new_chunk(ids))
        assert worst(streams[0], case.naive.streams[:length]) <= TOLERANCE
        logits, left = model.forward_mtp(streams[:, :-1], ids[:, 1:])
        assert case.naive.mtp_logits is not None and case.naive.mtp_streams is not None
        assert worst(logits[0], case.naive.mtp_logits[: length - 1]) <= TOLERANCE
        assert worst(left[0], case.naive.mtp_streams[: length - 1]) <= TOLERANCE


@torch.no_grad()
def test_decisions(case: Case) -> None:
    """The same experts and the same compressed entries, not only the same sums."""
    trace = Trace()
    case.wide()(case.ids, trace=trace)
    for number, layer in enumerate(trace.layers):
        block = f"layers.{number}"
        assert layer.routing is not None
        assert [sorted(row) for row in layer.routing.experts.tolist()] == [
            sorted(row) for row in case.naive.trace.experts[block]
        ]
        if block in case.naive.trace.picks:
            assert layer.attention.selected is not None
            selected = [row.nonzero().flatten().tolist() for row in layer.attention.selected[0]]
            assert selected == case.naive.trace.picks[block]


def test_the_cases_reach_what_they_claim(everything: Case) -> None:
    assert max(len(row) for row in everything.naive.trace.picks["layers.1"]) == 6  # of 33 entries
    assert all(hits > 10 for hits in everything.naive.trace.clamped.values()), everything.naive.trace.clamped
    assert {"layers.0", "layers.3", "mtp.0"} <= set(everything.naive.trace.clamped)
    tied = make("fp4 ties").naive.trace.index_scores["layers.0"]
    at_border = [np.sort(row)[::-1][4:6] for row in tied if len(row) > 5]
    assert sum(border[0] == border[1] for border in at_border) > 5


@torch.no_grad()
def test_state_with_quantisation_on(everything: Case) -> None:
    """Chunks around 4 and 128, then single tokens, with quantised KV and indexer (float64 network, float32 state)."""
    model = everything.wide()
    state = model.new_state(1)
    parts = []
    for size in (3, 1, 1, 6, 100, 15, 1, 1, 1, 1, 1, 1, 1):
        start = int(state.lengths)
        parts.append(model(everything.ids[:, start : start + size], state=state)[0])
    assert int(state.lengths) == everything.ids.shape[1]
    assert worst(torch.cat(parts), everything.naive.logits) <= TOLERANCE


@torch.no_grad()
def test_every_expert_on_every_token_is_the_same_network() -> None:
    """``Experts.dense``, the other way to compute the routed experts."""
    clamped = make("clamped")
    model = clamped.wide()
    for block in [*model.layers, *model.mtp]:
        block.ffn.experts.dense = True
    assert worst(model(clamped.ids)[0], clamped.naive.logits) <= TOLERANCE


@torch.no_grad()
def test_naive_network_agrees_with_transformers() -> None:
    """The two references, written by different people, against each other."""
    config = tiny_config((0, 0, 4, 128, 4), index_topk=6, swiglu_limit=1.5, num_hash_layers=2)
    tensors = random_tensors(config, seed=7)
    ids = random_ids(config, 133, seed=8)
    theirs = reference(config, tensors)(ids.unsqueeze(0), use_cache=False).logits[0]
    naive = naive_v4.run(config, tensors, ids.tolist())
    assert worst(theirs, naive.logits) <= 2e-5


def test_rounding_tables() -> None:
    """The naive number formats against values known from the standards."""
    assert naive_v4.E4M3[-1] == 448.0 and naive_v4.E4M3[1] == 2.0**-9
    half = naive_v4.nearest(naive_v4.E2M1, np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, 7.0]))
    assert half.tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0, 6.0]
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    assert np.array_equal(grid, naive_v4.E4M3)
    x = np.linspace(-460, 460, 4001)
    assert (
        naive_v4.nearest(naive_v4.E4M3, x) == torch.tensor(x).clamp(-448, 448).to(torch.float8_e4m3fn).double().numpy()
    ).all()
    H = np.stack([naive_v4.hadamard(row) for row in np.eye(4)]) * 2
    assert H.tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]


def test_fake_quantisation_value_by_value() -> None:
    """Halfway points, signed zeros, scale borders (largest value at, just below and just above a power of two), tiny groups."""
    generator = torch.Generator().manual_seed(0)
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.0, -0.25, -1.25, -2.5, -5.0, 1e-30, 0.49, 5.99, 6.0])
    for largest in (6.0, 5.999999, 6.000001, 448.0, 447.99997, 448.00003, 96.0, 1.0, 1e-4, 9e-5, 1e-7):
        x = torch.randn(4, 64, generator=generator)
        x[1, :16] = halves * largest / 6  # the top of its scale
        x[2, :16] = halves
        x = x.clamp(-6, 6) / 6 * largest
        x[:, 0] = x[:, 32] = largest
        for row, four, eight in zip(x.double().numpy(), mxfp4.fake_quant(x), fp8.fake_quant_groups(x), strict=True):
            expected = np.concatenate([naive_v4.fake_e2m1(row[:32]), naive_v4.fake_e2m1(row[32:])])
            assert np.array_equal(four.double().numpy(), expected), f"FP4, largest {largest}"
            assert np.array_equal(eight.double().numpy(), naive_v4.fake_e4m3(row)), f"FP8, largest {largest}"
