"""How a token is chosen: the options of a request, and draws that depend on (seed, position, choice) alone.

A sampled continuation is therefore the same text however the request was batched, chunked, speculated or resumed. The order
of the rules is: constraint, (log-probabilities are taken here), logit bias, repetition, presence and frequency penalties,
temperature, top-k, top-p, min-p, draw.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Chosen", "SamplingParams", "choose", "sample", "uniform"]

Array = np.ndarray[Any, np.dtype[Any]]

_MASK = (1 << 64) - 1
_MOST_LOGPROBS = 128
_MOST_CHOICES = 128


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. ``temperature`` 0 is greedy; ``max_tokens`` counts new tokens, end of sentence included.

    ``seed`` None draws a fresh one for each request. ``presence_penalty`` and ``frequency_penalty`` look at the new tokens,
    ``repetition_penalty`` (1 is none) at the prompt too. ``logit_bias`` is added before the temperature. ``logprobs`` None
    gives none, n the log-probability of the token and of the n likeliest. ``n`` is the number of choices. ``ignore_eos`` goes
    on after the end of sentence (benchmarks).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = 0
    max_tokens: int = 512
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0  # of the likeliest token's probability
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    n: int = 1
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _bounds("temperature", self.temperature, 0, math.inf)
        _bounds("min_p", self.min_p, 0, 1)
        for name in ("presence_penalty", "frequency_penalty"):
            _bounds(name, getattr(self, name), -2, 2)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0 (1 is none), got {self.repetition_penalty}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (no limit) or more, got {self.top_k}")
        if self.logprobs is not None:
            _bounds("logprobs", self.logprobs, 0, _MOST_LOGPROBS)
        _bounds("n", self.n, 1, _MOST_CHOICES)
        if any(token < 0 or not math.isfinite(bias) for token, bias in self.logit_bias.items()):
            raise ValueError("logit_bias maps token ids (0 or more) to finite numbers")

    @property
    def plain(self) -> bool:
        """Whether the likeliest token of the bare logits is the answer."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return not (self.temperature or penalties or self.logit_bias or self.logprobs is not None)

    def seeded(self) -> SamplingParams:
        """The same with a seed: a fresh one where there was none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(63))


class Chosen(NamedTuple):
    """A token and, where asked for, its log-probability and the likeliest (id, log-probability) pairs, best first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def uniform(seed: int, position: int, choice: int = 0) -> float:
    """A number in [0, 1) that is a function of seed, position and choice (SplitMix64)."""
    key = seed * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9 + choice * 0xD6E8FEB86659FD93
    x = (key + 0x94D049BB133111EB) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return ((x ^ (x >> 31)) >> 11) / (1 << 53)


def sample(logits: Tensor, params: SamplingParams, position: int) -> int:
    """The token at ``position`` (its index in the sequence) from logits [V], as the first new token of a sequence."""
    return choose(logits, params, position).token


def choose(  # one parameter for each thing a draw depends on
    logits: Tensor,
    params: SamplingParams,
    position: int,
    *,
    choice: int = 0,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    mask: Tensor | None = None,
) -> Chosen:
    """Choose the token at ``position`` from logits [V]. Ties go to the lowest id.

    ``prompt`` and ``output`` are the ids before it (for penalties); ``mask`` [V] bool says which tokens are allowed.
    Raises ValueError when nothing is allowed, or when the logits are not numbers.
    """
    logits = logits.detach().to("cpu", torch.float32)
    if mask is not None:
        logits = _masked(logits, mask)
    top = float(logits.max())
    if not math.isfinite(top):
        raise ValueError("the logits have no finite maximum: the model gave NaN or infinity, or nothing is allowed")
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()
    adjusted = _adjusted(logits, params, prompt, output)
    token = _draw(adjusted, params, position, choice)
    if params.logprobs is not None:
        logprob, likeliest = _logprobs(logits, token, params.logprobs)
    return Chosen(token, logprob, likeliest)


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    if not bool(mask.any()):
        raise ValueError("the constraint allows no token here")
    return logits.masked_fill(~mask, -math.inf)


def _adjusted(logits: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """Bias and penalties, on a copy. Tokens that a constraint forbids stay forbidden."""
    changed = logits
    if params.logit_bias:
        changed = logits.clone()
        ids = torch.tensor([token for token in params.logit_bias if token < len(logits)], dtype=torch.int64)
        changed[ids] += torch.tensor([params.logit_bias[token] for token in ids.tolist()])
    if params.repetition_penalty != 1 and (prompt or output):
        changed = changed.clone() if changed is logits else changed
        ids = torch.tensor(sorted({*prompt, *output}), dtype=torch.int64)
        seen = changed[ids]
        changed[ids] = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
    if output and (params.presence_penalty or params.frequency_penalty):
        changed = changed.clone() if changed is logits else changed
        counts = Counter(output)
        ids, amounts = torch.tensor(list(counts)), torch.tensor(list(counts.values()), dtype=torch.float32)
        changed[ids] -= params.presence_penalty + params.frequency_penalty * amounts
    return changed


def _draw(logits: Tensor, params: SamplingParams, position: int, choice: int) -> int:
    """The token whose share of the kept probability, laid out in order of ids, holds the draw. Sorts only what it must."""
    values = logits.numpy()
    if params.temperature == 0:
        return int(values.argmax())  # NumPy promises the first of equals, PyTorch does not
    scaled = values.astype(np.float64)
    scaled -= scaled.max()
    scaled /= params.temperature
    weights = np.exp(scaled)
    kept = _kept(weights, params)
    total = np.cumsum(weights if kept is None else weights[kept])
    place = int(np.searchsorted(total, uniform(params.seed or 0, position, choice) * total[-1], side="right"))
    place = min(place, len(total) - 1)
    return place if kept is None else int(kept[place])


def _kept(weights: Array, params: SamplingParams) -> Array | None:
    """Ids that top-k, top-p and min-p leave, ascending; None for all. Each looks at what the one before it left; among equals
    the lower id goes first."""
    if not params.top_k and params.top_p == 1 and not params.min_p:
        return None
    ids = _best(weights, params.top_k) if params.top_k else np.arange(len(weights))
    if params.top_p < 1:
        ids = _nucleus(weights, ids, params.top_p)
    if params.min_p:
        ids = ids[weights[ids] >= params.min_p * weights.max()]
    return ids


def _best(weights: Array, count: int) -> Array:
    """Ids of the ``count`` largest weights, ascending."""
    if count >= len(weights):
        return np.arange(len(weights))
    least = np.partition(weights, -count)[-count]
    above = np.flatnonzero(weights > least)
    equal = np.flatnonzero(weights == least)[: count - len(above)]
    return np.sort(np.concatenate((above, equal)))


def _nucleus(weights: Array, ids: Array, share: float) -> Array:
    """The fewest of these ids that hold this share of their weight, ascending. Looks at ever more of the largest."""
    target, count = share * weights[ids].sum(), 64
    while True:
        found = ids[_best(weights[ids], count)]
        order = found[np.argsort(-weights[found], kind="stable")]
        total = np.cumsum(weights[order])
        if total[-1] >= target or count >= len(ids):
            return np.sort(order[: int(np.searchsorted(total, target)) + 1])
        count *= 8


def _logprobs(logits: Tensor, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    logs = logits.double().log_softmax(-1)
    order = np.argsort(-logs.numpy(), kind="stable")[: min(count, len(logs))]
    return float(logs[token]), tuple((int(index), float(logs[index])) for index in order)


def _bounds(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high or value == math.inf:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")
