"""The engine: what it reuses is exact, what it samples depends on seed and position alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nautile.engine import Engine, EngineConfig, SamplingParams, sample
from nautile.engine.sampling import uniform
from oracles.random_models import random_ids, tiny_network

HOT = SamplingParams(temperature=1.0, top_p=0.95, seed=7, max_tokens=24)


@pytest.fixture(scope="module")
def model():
    return tiny_network((0, 4, 128, 4), seed=3)


def prompt(model, length, seed):
    return random_ids(model.config, length, seed=seed).tolist()


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_reuse_changes_nothing(model, chunk):
    """Prompts that share a prefix, continue one another, or have nothing in common give what a fresh engine gives."""
    engine = Engine(model, EngineConfig(prefill_chunk=chunk))
    shared, tail = prompt(model, 150, 1), prompt(model, 30, 2)
    first = engine.generate([shared], HOT)[0]
    continued = shared + first.ids + tail
    prompts = [shared + tail, shared + tail[:10], continued, prompt(model, 40, 9), shared + tail]
    for ids in prompts:
        fresh = Engine(model).generate([ids], HOT)[0]
        assert engine.generate([ids], HOT)[0].ids == fresh.ids
    assert engine.statistics.reused_tokens > 0


def test_a_continued_conversation_computes_only_what_is_new(model):
    engine = Engine(model)
    ids = prompt(model, 100, 4)
    out = engine.generate([ids], HOT)[0]
    again = engine.generate([ids + out.ids + [5, 6]], HOT)[0]
    assert again.reused_tokens >= len(ids) + len(out.ids) - 1


def test_closing_a_stream_early_is_safe(model):
    engine, ids = Engine(model), prompt(model, 60, 5)
    stream = engine.stream(ids, HOT)
    begun = [next(stream) for _ in range(3)]
    stream.close()
    assert engine.generate([ids], HOT)[0].ids[:3] == begun


def test_limits_and_bad_input(model):
    engine = Engine(model)
    with pytest.raises(ValueError, match="empty"):
        engine.generate([[]])
    with pytest.raises(ValueError, match="token ids"):
        engine.generate([[model.config.vocab_size]])
    out = engine.generate([prompt(model, 10, 6)], SamplingParams(max_tokens=3))[0]
    assert len(out.ids) <= 3 and (out.finish_reason == "length") == (out.ids[-1] != model.config.eos_token_id)
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"max_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SamplingParams(**wrong)


@given(st.integers(0, 2**63), st.integers(0, 2**20))
def test_draws_are_uniform_numbers_of_seed_and_position(seed, position):
    assert 0 <= uniform(seed, position) < 1
    assert uniform(seed, position) == uniform(seed, position) != uniform(seed, position + 1)


def test_sampling_follows_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draws = [sample(logits, SamplingParams(temperature=1.0, seed=1), position) for position in range(8000)]
    shares = torch.bincount(torch.tensor(draws), minlength=4) / len(draws)
    assert (shares - logits.exp()).abs().max() < 0.02
    nucleus = {sample(logits, SamplingParams(temperature=1.0, top_p=0.7, seed=2), position) for position in range(500)}
    assert nucleus == {0, 1}
    assert sample(torch.tensor([1.0, 3.0, 3.0]), SamplingParams(), 0) == 1  # greedy: the lowest of equals
