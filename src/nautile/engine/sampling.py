"""From logits to a token: greedy, temperature and top-p, with draws that depend on (seed, position) alone.

A sampled continuation is therefore the same text however the request was batched, chunked or resumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["SamplingParams", "sample", "uniform"]

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. ``temperature`` 0 is greedy; ``max_tokens`` counts new tokens, end of sentence included."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a function of seed and position (SplitMix64)."""
    x = (seed * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return ((x ^ (x >> 31)) >> 11) / (1 << 53)


def sample(logits: Tensor, params: SamplingParams, position: int) -> int:
    """Draw the token at ``position`` (its index in the sequence) from logits [V]. Ties go to the lowest id."""
    if params.temperature == 0:
        return int((logits == logits.max()).nonzero()[0, 0])
    probabilities = (logits.double() / params.temperature).softmax(-1)
    ordered, ids = probabilities.sort(descending=True, stable=True)
    total = ordered.cumsum(-1)
    kept = int((total < params.top_p).sum()) + 1 if params.top_p < 1 else len(ordered)
    kept = min(kept, len(ordered))
    draw = uniform(params.seed, position) * float(total[kept - 1])
    return int(ids[min(int((total[:kept] <= draw).sum()), kept - 1)])
