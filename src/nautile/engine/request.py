"""The nouns between the engine and whoever uses it: a request goes in, events come out. Plain data.

What this file does not know: text, HTTP, scheduling. Prompts are ids, and so is what comes back.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from nautile.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from nautile.config import ModelConfig
    from nautile.protocol import Tokenizer

__all__ = [
    "AsyncEngine",
    "EngineEvent",
    "EngineStats",
    "EngineStoppedError",
    "Finished",
    "Prefilled",
    "Request",
    "RequestError",
    "TokenConstraint",
    "TokenSampled",
    "Usage",
]


class RequestError(ValueError):
    """The engine cannot run this request as it is; the text says what to change. Nothing was started."""


class EngineStoppedError(RequestError):
    """The engine has ended, through a fault of its own or because it was closed: no request can be run."""


class TokenConstraint(Protocol):
    """What the next token may be. One object follows one sequence; the engine tells it every token it keeps."""

    def mask(self) -> Tensor | None:
        """[V] bool on the CPU, True where the next token is allowed; None when every token is."""

    def accept(self, token: int) -> None:
        """The sequence goes on with ``token``."""

    def fork(self) -> TokenConstraint:
        """An independent copy at this point (several choices of one request, or drafts that may be rejected)."""


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it. Written by the caller, never changed.

    ``partition`` separates callers: cached prefixes are shared inside a partition only. A larger ``priority`` goes first.
    ``constraint`` makes the constraint of each choice (it must start at the first new token).
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    partition: str = ""
    priority: int = 0
    constraint: Callable[[], TokenConstraint] | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of one choice. ``cached_tokens`` of the prompt were not computed again; drafts are those of speculation."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Prefilled:
    """How far the prompt has been taken in; sent after every chunk of it, the last time with all of it."""

    done: int
    total: int
    cached: int


@dataclass(frozen=True)
class TokenSampled:
    """One token of one choice, the end of sentence included. Log-probabilities only where asked for, before any sampling
    rule but after a constraint; ``top`` holds (id, log-probability) of the most likely tokens, best first."""

    token: int
    choice: int = 0
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Finished:
    """The last event of a choice. ``error`` says what happened when the reason is "error"."""

    reason: Literal["stop", "length", "cancelled", "error"]
    usage: Usage
    choice: int = 0
    error: str | None = None


EngineEvent = Prefilled | TokenSampled | Finished


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and what is so now; a copy, taken at once. Bytes are those of the state by kind."""

    running: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    bytes_by_kind: dict[str, int] = field(default_factory=dict)
    bytes_total: int = 0
    bytes_limit: int = 0
    bytes_per_token: float = 0.0  # of history, by the planner's formula
    block_tokens: int = 0


class AsyncEngine(Protocol):
    """What a server needs of an engine. ``nautile.Engine`` is one; tests use a scripted one."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def config(self) -> ModelConfig: ...

    def submit(self, request: Request) -> AsyncIterator[EngineEvent]:
        """Start a request; its events arrive in order, one ``Finished`` a choice ends it. Closing the iterator cancels.

        Raises RequestError (at the first ``anext`` at the latest) for an empty prompt, ids outside the vocabulary, or one
        that does not fit the model or the memory.
        """

    def cancel(self, request_id: str) -> None:
        """End a request within one step; unknown or finished ids are ignored."""

    def stats(self) -> EngineStats:
        """Counters and gauges."""

    def close(self) -> None:
        """End what runs, release memory. Idempotent."""
