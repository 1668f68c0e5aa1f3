"""How a token is chosen: the distribution, every rule against a plain second implementation, and draws that are keyed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nautile.engine import SamplingParams, sample
from nautile.engine.sampling import choose, uniform

LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=30).map(torch.tensor)


@given(st.integers(0, 2**63), st.integers(0, 2**20), st.integers(0, 64))
def test_draws_are_uniform_numbers_of_seed_position_and_choice(seed, position, choice):
    draw = uniform(seed, position, choice)
    assert 0 <= draw < 1 and draw == uniform(seed, position, choice)
    assert draw != uniform(seed, position + 1, choice) and draw != uniform(seed, position, choice + 1)
    assert uniform(seed, position) == uniform(seed, position, 0)


def test_sampling_follows_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draws = [sample(logits, SamplingParams(temperature=1.0, seed=1), position) for position in range(8000)]
    shares = torch.bincount(torch.tensor(draws), minlength=4) / len(draws)
    assert (shares - logits.exp()).abs().max() < 0.02
    across = [choose(logits, SamplingParams(temperature=1.0, seed=1), 5, choice=choice).token for choice in range(8000)]
    shares = torch.bincount(torch.tensor(across), minlength=4) / len(across)
    assert (shares - logits.exp()).abs().max() < 0.02
    nucleus = {sample(logits, SamplingParams(temperature=1.0, top_p=0.7, seed=2), position) for position in range(500)}
    assert nucleus == {0, 1}
    assert sample(torch.tensor([1.0, 3.0, 3.0]), SamplingParams(), 0) == 1  # greedy: the lowest of equals


def plain_choice(logits, params, position, prompt, output, allowed):
    """The rules once more, token by token in Python numbers."""
    values = [float(x) for x in logits]
    for token in range(len(values)):
        values[token] += params.logit_bias.get(token, 0.0)
        if params.repetition_penalty != 1 and token in (*prompt, *output):
            values[token] = (
                values[token] / params.repetition_penalty if values[token] > 0 else values[token] * params.repetition_penalty
            )
        if token in output:
            values[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
        if not allowed[token]:
            values[token] = -math.inf
    if params.temperature == 0:
        return values.index(max(values))
    best = max(values)
    weights = [math.exp((value - best) / params.temperature) for value in values]
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    order = [token for token in order if weights[token] > 0]
    if params.top_k:
        order = order[: params.top_k]
    total, kept = sum(weights[token] for token in order), []
    for token in order:
        kept.append(token)
        if sum(weights[t] for t in kept) >= params.top_p * total * (1 - 1e-12):
            break
    kept = sorted(token for token in kept if weights[token] >= params.min_p * weights[order[0]])
    point = uniform(params.seed, position) * sum(weights[token] for token in kept)
    for token in kept:
        point -= weights[token]
        if point < 0:
            return token
    return kept[-1]


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.4]),
    top_k=st.sampled_from([0, 1, 3]),
    min_p=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**60),
    presence_penalty=st.sampled_from([0.0, 1.0, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.dictionaries(st.integers(0, 40), st.floats(-5, 5, width=32), max_size=3),
)


@given(LOGITS, PARAMS, st.data())
def test_every_rule_does_what_it_says(logits, params, data):
    vocabulary = len(logits)
    tokens = st.lists(st.integers(0, vocabulary - 1), max_size=5)
    prompt, output = data.draw(tokens), data.draw(tokens)
    allowed = data.draw(st.lists(st.booleans(), min_size=vocabulary, max_size=vocabulary).filter(any))
    position = data.draw(st.integers(0, 5000))
    mask = torch.tensor(allowed)
    got = choose(logits.clone(), params, position, prompt=prompt, output=output, mask=mask)
    expected = plain_choice(logits, params, position, prompt, output, allowed)
    if got.token != expected:  # the two may part only where rounding decides: the logits of both are equal to 1e-4
        both = [plain_value(logits, params, prompt, output, token) for token in (got.token, expected)]
        assert allowed[got.token] and abs(both[0] - both[1]) < 1e-4


@given(
    st.integers(0, 2**30), st.sampled_from([0, 5, 100, 900]), st.sampled_from([1.0, 0.99, 0.3]), st.sampled_from([0.0, 0.01])
)
def test_large_vocabularies_are_cut_as_by_sorting_all(seed, top_k, top_p, min_p):
    """Every draw lies in the set that a full sort keeps, and a draw near 1 reaches its last id."""
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.integers(-40, 40, 3000) / 8, dtype=torch.float32)  # many ties
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    weights = np.exp(logits.double().numpy() - float(logits.max()))
    order = np.argsort(-weights, kind="stable")[: top_k or None]
    total = np.cumsum(weights[order])
    order = order[: int(np.searchsorted(total, top_p * total[-1])) + 1] if top_p < 1 else order
    kept = np.sort(order[weights[order] >= min_p])
    shares = np.cumsum(weights[kept])
    for position in range(20):
        expected = kept[min(int(np.searchsorted(shares, uniform(seed, position) * shares[-1], "right")), len(kept) - 1)]
        assert choose(logits, params, position).token == expected


def plain_value(logits, params, prompt, output, token):
    value = float(logits[token]) + params.logit_bias.get(token, 0.0)
    if params.repetition_penalty != 1 and token in (*prompt, *output):
        value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
    return value - (token in output) * params.presence_penalty - output.count(token) * params.frequency_penalty


@given(LOGITS, st.integers(0, 40))
def test_logprobs_are_those_of_the_logits_whatever_the_rules(logits, count):
    params = SamplingParams(temperature=1.5, top_k=2, seed=3, logprobs=min(count, 128), presence_penalty=1.0)
    got = choose(logits, params, 4, output=[0, 0])
    logs = logits.double() - logits.double().logsumexp(0)
    assert got.logprob == pytest.approx(float(logs[got.token]), abs=1e-9)
    order = np.argsort(-logits.double().numpy(), kind="stable")[:count]
    values = [logprob for _, logprob in got.top]
    assert len(got.top) == min(count, len(logits)) and values == sorted(values, reverse=True)
    assert values == pytest.approx([float(logs[token]) for token in order], abs=1e-9)
    masked = choose(logits, params, 4, mask=torch.arange(len(logits)) < 1)
    assert masked.token == 0 and masked.logprob == 0


def test_what_cannot_be_sampled_is_refused():
    with pytest.raises(ValueError, match="allows no token"):
        choose(torch.zeros(3), SamplingParams(), 0, mask=torch.zeros(3, dtype=torch.bool))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            choose(torch.tensor([0.0, bad]), SamplingParams(), 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_tokens": 0},
        {"top_k": -1},
        {"min_p": 1.5},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -3.0},
        {"repetition_penalty": 0.0},
        {"logprobs": -1},
        {"n": 0},
        {"logit_bias": {-1: 0.0}},
        {"logit_bias": {3: math.inf}},
    ],
)
def test_parameters_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_a_missing_seed_is_drawn_once():
    params = SamplingParams(seed=None)
    drawn = params.seeded()
    assert drawn.seed is not None and drawn.seeded() is drawn and params.seeded().seed != drawn.seed
