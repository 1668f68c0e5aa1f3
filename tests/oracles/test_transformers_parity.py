"""Logits against transformers 5.23 (float32, eager) on random tiny networks: one shot, in chunks, token by token.

Each case is one random configuration with random weights everywhere (sinks, biases, tables, stream mappings included)
and three lengths. The order in which float32 sums are taken differs between the two programs, so a router or indexer
decision closer than about 1e-6 may fall differently; a case where that happens gets another seed, never a wider tolerance.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from nautile import ModelConfig, Transformer
from nautile.config import RopeScaling
from oracles.hf_reference import reference
from oracles.random_models import network, random_ids, random_tensors, tiny_config

TOLERANCE = 5e-5

SCHEDULES = (
    (0, 0), (4, 4), (128, 128), (0, 0, 4, 128, 4), (4,), (128,), (0,), (4, 128), (128, 4), (128, 128, 4), (0, 4, 4),
    (4, 0, 128),
)  # fmt: skip
SHORT = (1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 15, 16, 17, 19, 31, 32)
MIDDLE = (33, 63, 64, 65, 100, 127, 128, 129, 131, 132, 133, 140, 160, 191)
LONG = (255, 256, 257, 259, 260, 300, 383, 384, 385, 511, 512, 513, 516, 600)

# What a drawn configuration could miss, by case number.
FORCED: dict[int, dict[str, Any]] = {
    0: {"swiglu_limit": 0.5},
    1: {"index_topk": 2},
    2: {"rope_scaling": None},
    3: {"index_topk": 8, "sliding_window": 16, "num_hash_layers": 2},
    4: {"index_topk": 1, "index_n_heads": 64},
    5: {"rope_scaling": None, "num_hash_layers": 0},
    6: {"tie_word_embeddings": True, "sliding_window": 1},
    7: {"index_topk": 512, "sliding_window": 128},
    8: {"sliding_window": 4, "num_hash_layers": 2},
    9: {"hc_mult": 2, "hc_sinkhorn_iters": 1, "num_hash_layers": 0},
    10: {"swiglu_limit": 0.3, "index_topk": 3},
    15: {"index_topk": 5, "head_dim": 16, "qk_rope_head_dim": 16, "index_head_dim": 32},
}


@dataclass
class Case:
    config: ModelConfig
    model: Transformer
    ids: list[torch.Tensor]  # [1, T] each
    expected: list[torch.Tensor]  # [T, V] each
    number: int


def draw_config(number: int, dice: random.Random) -> ModelConfig:
    schedule = SCHEDULES[number % len(SCHEDULES)]
    groups = dice.choice((1, 2, 4))
    rope = dice.choice((4, 8, 16))
    experts = dice.choice((4, 8, 12))
    changes: dict[str, Any] = {
        "hidden_size": dice.choice((32, 48, 64, 96)),
        "num_attention_heads": groups * dice.choice((1, 2, 3)),
        "o_groups": groups,
        "o_lora_rank": dice.choice((8, 16)),
        "head_dim": dice.choice((16, 32, 64)),
        "qk_rope_head_dim": rope,
        "q_lora_rank": dice.choice((16, 24)),
        "index_n_heads": dice.choice((16, 24, 32)),
        "index_head_dim": dice.choice((16, 32)),
        "index_topk": dice.choice((2, 4, 8, 16, 64, 512)),
        "sliding_window": dice.choice((4, 8, 16, 32, 128)),
        "n_routed_experts": experts,
        "num_experts_per_tok": dice.choice((1, 2, 3, 4)),
        "moe_intermediate_size": dice.choice((16, 32)),
        "num_hash_layers": dice.randint(0, min(2, len(schedule))),
        "routed_scaling_factor": dice.choice((1.5, 2.5)),
        "hc_mult": dice.choice((2, 3, 4)),
        "hc_sinkhorn_iters": dice.choice((3, 20)),
        "rms_norm_eps": dice.choice((1e-6, 1e-5)),
        "rope_scaling": dice.choice((RopeScaling(), RopeScaling(8.0, 512, 16.0, 2.0), RopeScaling(16.0, 256, 32.0, 1.0), None)),
    }  # fmt: skip
    return tiny_config(schedule, **{**changes, **FORCED.get(number, {})})


@pytest.fixture(scope="module", params=range(26))
def case(request: pytest.FixtureRequest) -> Case:
    number: int = request.param
    dice = random.Random(number)
    config = draw_config(number, dice)
    tensors = random_tensors(config, seed=number)
    long = LONG[number % len(LONG)] if number % 2 or 128 in config.layer_ratios else MIDDLE[number % len(MIDDLE)]
    long = 600 if number in (2, 15) else long  # every layer is HCA; every kind of layer
    lengths = (SHORT[number % len(SHORT)], MIDDLE[(3 * number) % len(MIDDLE)], long)
    ids = [random_ids(config, length, seed=1000 * number + length).unsqueeze(0) for length in lengths]
    theirs = reference(config, tensors)
    with torch.no_grad():
        expected = [theirs(row, use_cache=False).logits[0] for row in ids]
    return Case(config, network(config, tensors), ids, expected, number)


def worst(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    return (ours - theirs).abs().max().item()


@torch.no_grad()
def test_full_forward(case: Case) -> None:
    for row, expected in zip(case.ids, case.expected, strict=True):
        assert worst(case.model(row)[0], expected) <= TOLERANCE


@torch.no_grad()
def test_chunked_prefill(case: Case) -> None:
    dice = random.Random(case.number)
    for row, expected in zip(case.ids, case.expected, strict=True):
        state = case.model.new_state(1)
        parts = []
        while (done := int(state.lengths)) < row.shape[1]:
            size = dice.choice((1, 2, 3, 4, 5, 7, 64, 100, 127, 128, 129, 257))
            parts.append(case.model(row[:, done : done + size], state=state)[0])
        assert worst(torch.cat(parts), expected) <= TOLERANCE


@torch.no_grad()
def test_one_token_decode(case: Case) -> None:
    """From nothing on the short length; on the longer ones after a prefill, over the last multiple of 128 or the end."""
    for row, expected in zip(case.ids, case.expected, strict=True):
        length = row.shape[1]
        start = 0 if length <= 32 else max(length // 128 * 128 - 2, length - 9, 1)
        state = case.model.new_state(1)
        if start:
            assert case.model(row[:, :start], state=state, logits="none") is None
        end = min(length, start + 10) if start else length
        parts = [case.model(row[:, t : t + 1], state=state, logits="last") for t in range(start, end)]
        assert worst(torch.cat(parts), expected[start:end]) <= TOLERANCE


def test_the_cases_cover_what_they_claim() -> None:
    configs = [draw_config(number, random.Random(number)) for number in range(26)]
    assert {c.layer_ratios for c in configs} >= {(0, 0), (4, 4), (128, 128), (0, 0, 4, 128, 4)}
    assert {c.num_hash_layers for c in configs} == {0, 1, 2}
    assert {c.rope_scaling is None for c in configs} == {True, False}
    assert all(c.index_n_heads >= 16 for c in configs)
    csa = [c for c in configs if 4 in c.layer_ratios]
    assert min(c.index_topk for c in csa) <= 2 and max(c.index_topk for c in csa) == 512
    assert {c.sliding_window for c in configs} >= {1, 4, 16, 128}
    assert {c.hc_mult for c in configs} == {2, 3, 4}
