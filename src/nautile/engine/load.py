"""A load for an engine or server, and what it measured: arrivals, lengths, shared prefixes -> throughput and waiting times.

Arrivals are a Poisson process of a given rate, or a number of clients that each send their next request when the last has
ended. Everything random comes from one seed, so two runs send the same prompts at the same times.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from nautile.engine.engine import Engine
from nautile.engine.request import Finished, Request, TokenSampled
from nautile.engine.sampling import SamplingParams

__all__ = ["EngineTarget", "Job", "Load", "Outcome", "Target", "jobs", "run_load", "summary"]


@dataclass(frozen=True)
class Load:
    """What is sent. ``shared`` is the part of each prompt that it has in common with the others of its group.

    ``rate`` requests arrive a second on average; with rate 0 there are ``clients`` that wait for their answers.
    """

    requests: int = 32
    rate: float = 0.0
    clients: int = 8
    input_tokens: int = 512
    output_tokens: int = 64
    shared: float = 0.6
    groups: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.requests, self.clients, self.input_tokens, self.output_tokens, self.groups) < 1:
            raise ValueError("requests, clients, input_tokens, output_tokens and groups must be at least 1")
        if self.rate < 0 or not 0 <= self.shared <= 1:
            raise ValueError("rate must not be negative and shared must lie in [0, 1]")


@dataclass(frozen=True)
class Job:
    """One request: when it is sent (seconds after the start; None: when a client is free), and its tokens as numbers."""

    at: float | None
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """One request's times in seconds from its start to each token, and its counts."""

    sent: float
    token_times: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int
    error: str | None = None


class Target(Protocol):
    """Whatever takes requests."""

    def ask(self, prompt: tuple[int, ...], output_tokens: int) -> AsyncIterator[tuple[int, int] | None]:
        """None for every token as it comes; at the end (prompt tokens, cached tokens). Raises when the request fails."""


@dataclass(frozen=True)
class EngineTarget:
    """An engine in this process."""

    engine: Engine

    async def ask(self, prompt: tuple[int, ...], output_tokens: int) -> AsyncIterator[tuple[int, int] | None]:
        """See ``Target.ask``."""
        ids = tuple(token % self.engine.config.vocab_size for token in prompt)
        params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
        async for event in self.engine.submit(Request(ids, params)):
            if isinstance(event, TokenSampled):
                yield None
            elif isinstance(event, Finished):
                if event.reason == "error":
                    raise RuntimeError(event.error or "the request failed")
                yield event.usage.prompt_tokens, event.usage.cached_tokens


def jobs(load: Load) -> list[Job]:
    """The requests of a load."""
    rng = random.Random(load.seed)
    common = round(load.shared * load.input_tokens)
    prefixes = [[rng.randrange(1 << 20) for _ in range(common)] for _ in range(load.groups)]
    at, made = 0.0, []
    for _ in range(load.requests):
        own = [rng.randrange(1 << 20) for _ in range(load.input_tokens - common)]
        at += rng.expovariate(load.rate) if load.rate else 0.0
        made.append(Job(at if load.rate else None, (*rng.choice(prefixes), *own)))
    return made


async def run_load(load: Load, target: Target, progress: Callable[[int], None]) -> tuple[list[Outcome], float]:
    """Send everything; gives the outcomes in order and the seconds it took. ``progress`` is told how many have ended."""
    began = time.perf_counter()
    gate = asyncio.Semaphore(load.requests if load.rate else load.clients)
    ended = 0

    async def one(job: Job) -> Outcome:
        nonlocal ended
        if job.at is not None:
            await asyncio.sleep(max(0.0, began + job.at - time.perf_counter()))
        async with gate:
            outcome = await _measure(target, job, load.output_tokens, began)
        ended += 1
        progress(ended)
        return outcome

    outcomes = await asyncio.gather(*(one(job) for job in jobs(load)))
    return list(outcomes), time.perf_counter() - began


async def _measure(target: Target, job: Job, output_tokens: int, began: float) -> Outcome:
    sent, times, usage = time.perf_counter(), list[float](), (0, 0)
    try:
        async for item in target.ask(job.prompt, output_tokens):
            if item is None:
                times.append(time.perf_counter() - sent)
            else:
                usage = item
    except Exception as error:  # counted and shown: a load goes on when one request fails
        return Outcome(sent - began, tuple(times), *usage, error=f"{type(error).__name__}: {error}")
    return Outcome(sent - began, tuple(times), *usage)


def summary(load: Load, outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Throughput, percentiles of the time to the first token and between tokens (milliseconds), hit rate, errors."""
    good = [outcome for outcome in outcomes if outcome.error is None and outcome.token_times]
    tokens = sum(len(outcome.token_times) for outcome in outcomes)
    prompt = sum(outcome.prompt_tokens for outcome in good)
    between = [
        (outcome.token_times[-1] - outcome.token_times[0]) / (len(outcome.token_times) - 1)
        for outcome in good
        if len(outcome.token_times) > 1
    ]
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    return {
        "load": asdict(load),
        "seconds": round(seconds, 3),
        "output_tokens_per_second": round(tokens / seconds, 2),
        "prompt_tokens_per_second": round(prompt / seconds, 2),
        "requests_per_second": round(len(good) / seconds, 3),
        "ttft_ms": _percentiles([outcome.token_times[0] for outcome in good]),
        "tpot_ms": _percentiles(between),
        "hit_rate": round(sum(outcome.cached_tokens for outcome in good) / max(1, prompt), 4),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)

    mean = round(1000 * statistics.fmean(ordered), 2)
    return {"mean": mean, "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": round(1000 * ordered[-1], 2)}
