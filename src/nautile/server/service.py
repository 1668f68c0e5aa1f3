"""What every endpoint shares: the engine, the model's name, the options, and who is being served now."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from nautile.protocol import Tokenizer
from nautile.server.errors import ApiError
from nautile.server.logs import make_logger
from nautile.server.memory import ReasoningMemory
from nautile.server.metrics import Metrics
from nautile.server.replay import CallReplay

if TYPE_CHECKING:
    from nautile.engine.request import AsyncEngine
    from nautile.engine.sessions import EngineSessions

__all__ = ["ServerOptions", "Service", "ServiceError"]


_SHORTEST_KEY = 8


class ServiceError(ValueError):
    """The server cannot start with this model or these options; the text says what to change."""


@dataclass(frozen=True)
class ServerOptions:
    """Options of a server. Without ``api_keys`` everybody who reaches it is one caller, so it must stay on loopback."""

    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()  # names beside localhost and IP addresses
    allowed_origins: tuple[str, ...] = ()  # web pages of other sites that may call
    body_limit: int = 32 * 2**20  # bytes of one request
    concurrency: int = 64  # requests of one key at a time; more get 429
    keep_alive: float = 10.0  # seconds of silence before a comment is sent on a stream
    drain: float = 30.0  # seconds that running requests get to finish after SIGTERM
    effort: str = "high"  # reasoning effort of requests that name none
    temperature: float = 1.0  # of requests that name none
    strict_reasoning: bool = False  # 400 instead of the server's own memory for reasoning that was not sent back
    log_prompts: bool = False
    log_format: str = "console"  # or "json"

    def __post_init__(self) -> None:
        """Raises ServiceError for keys and origins that no request could have."""
        if any(len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key for key in self.api_keys):
            raise ServiceError(f"an API key needs at least {_SHORTEST_KEY} letters, digits or signs of ASCII, and no spaces")
        for origin in self.allowed_origins:
            if not origin.lower().startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ServiceError(f"an origin is written https://NAME or http://NAME:PORT, not {origin!r}")


@dataclass
class Service:
    """One engine and its callers. ``running`` counts requests by partition; ``draining`` is set when the server is leaving."""

    engine: AsyncEngine
    name: str
    options: ServerOptions = field(default_factory=ServerOptions)
    dialect: str = ""
    memory: ReasoningMemory = field(default_factory=ReasoningMemory)
    calls: CallReplay = field(default_factory=CallReplay)
    metrics: Metrics = field(init=False)
    log: structlog.typing.FilteringBoundLogger = field(init=False)
    running: Counter[str] = field(default_factory=Counter)
    draining: bool = False
    sessions: EngineSessions | None = None  # where sessions are kept, if they are
    failure: str | None = None  # why the engine has ended; written by ``generation``

    def __post_init__(self) -> None:
        """Raises ServiceError for a model without a tokenizer or a prompt dialect."""
        if self.engine.tokenizer is None:
            raise ServiceError("the engine has no tokenizer: serve a model directory with a tokenizer.json")
        self.dialect = self.dialect or self.engine.config.dialect or ""
        if not self.dialect:
            raise ServiceError("the checkpoint does not say its prompt dialect: pass --dialect 0731 or --dialect preview")
        self.metrics = Metrics(self.engine.stats, self.memory.stats)
        self.log = make_logger(self.options.log_format, sys.stderr)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        assert self.engine.tokenizer is not None
        return self.engine.tokenizer

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.engine.config.max_position_embeddings

    @property
    def in_flight(self) -> int:
        """Requests that are being served."""
        return self.running.total()

    def unexpected(self, error: Exception, request_id: str, path: str) -> ApiError:
        """What a client is told of an error that nobody foresaw; the log has all of it, under the request's id."""
        self.log.error("failure", request=request_id, path=path, exc_info=error)
        return ApiError(500, f"an unexpected error in the server; its log has it under request {request_id}")

    @contextlib.contextmanager
    def admitted(self, partition: str) -> Iterator[None]:
        """A place for one request of a caller. Raises ApiError: 503 when the server is leaving, 429 when there is none."""
        if self.draining:
            raise ApiError(503, "the server is shutting down; send the request again in a moment", retry_after=5)
        if self.running[partition] >= self.options.concurrency:
            limit = self.options.concurrency
            raise ApiError(429, f"this key already has {limit} requests running; wait for one to finish", retry_after=1)
        self.running[partition] += 1
        try:
            yield
        finally:
            self.running[partition] -= 1
            if not self.running[partition]:
                del self.running[partition]
