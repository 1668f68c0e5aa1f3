"""The engine's tokens on their way out: parsed by id, cut at stop strings, counted.

``Writer`` is the part without the engine: tokens in, events out. ``generate`` joins the two and measures time.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from nautile.engine.request import EngineStoppedError, Finished, Prefilled, Request, RequestError, TokenSampled
from nautile.protocol import (
    ContentDelta,
    Event,
    Finish,
    ReasoningDelta,
    Tokenizer,
    TokenizerError,
    ToolCall,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    texts,
)
from nautile.server.errors import ApiError, invalid
from nautile.server.scores import Scores, TokenLogprobs
from nautile.server.stop import StopFilter

if TYPE_CHECKING:
    from nautile.server.service import Service

__all__ = [
    "Answer",
    "Job",
    "TokenLogprobs",
    "TurnFinished",
    "TurnStarted",
    "TurnUsage",
    "Writer",
    "ended",
    "generate",
    "refused",
]

FinishReason = Literal["stop", "length", "tool_calls"]
Section = Literal["reasoning", "content", "calls"]


@dataclass(frozen=True)
class TurnStarted:
    """The prompt is being taken in; ``cached_tokens`` of it were known."""

    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class TurnUsage:
    """Tokens of a turn. ``completion_tokens`` include the reasoning."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int


@dataclass(frozen=True)
class TurnFinished:
    """The last event. ``stop_sequence`` is the stop string that ended the turn; ``flags`` are those of ``protocol.Finish``."""

    reason: FinishReason
    usage: TurnUsage
    stop_sequence: str | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A whole turn."""

    reasoning: str
    content: str
    calls: tuple[ToolCall, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finished: TurnFinished


Output = (
    TurnStarted | ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments | ToolCallEnd | TokenLogprobs | TurnFinished
)


class Reader(Protocol):
    """Tokens to events; ``nautile.protocol.StreamParser`` is one."""

    def feed(self, data: int) -> list[Event]:
        """One more token."""

    def finish(self, reason: Literal["stop", "length"]) -> list[Event]:
        """No more tokens; the last event is a ``Finish``."""


class Writer:
    """Turns sampled tokens into what a client sees. ``done`` is set when nothing more should be generated.

    Stop strings look at content only; reasoning and arguments of calls are not cut. ``markup`` are the special tokens that the
    reader takes for markup: any other is text, and scored as such.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        reader: Reader,
        *,
        start: Section,
        stop: Sequence[str] = (),
        parallel_calls: bool = True,
        markup: Collection[str] = (texts.THINK_CLOSE, texts.DSML),
    ) -> None:
        self._tokenizer, self._reader, self._section = tokenizer, reader, start
        self._stop, self._parallel = StopFilter(stop), parallel_calls
        self._eos = tokenizer.special(texts.EOS)
        self._close, self._dsml = (
            _special(tokenizer, name) if name in markup else -1 for name in (texts.THINK_CLOSE, texts.DSML)
        )
        self._scores = Scores()
        self._finish: tuple[FinishReason, tuple[str, ...]] | None = None
        self.completion_tokens = self.reasoning_tokens = 0
        self.reasoning: list[str] = []
        self.content: list[str] = []
        self.calls: list[ToolCall] = []

    @property
    def done(self) -> bool:
        """A stop string came, or the one call that was asked for."""
        return self._stop.matched is not None or (bool(self.calls) and not self._parallel)

    def token(self, sampled: TokenSampled) -> Iterator[Output]:
        """What one more token adds."""
        token = sampled.token
        self.completion_tokens += 1
        self.reasoning_tokens += self._section == "reasoning"
        if token == self._eos:
            return
        events, section = self._reader.feed(token), self._section
        if section == "calls" and any(isinstance(event, ContentDelta) for event in events):
            section = "content"  # the calls are over
        if token not in (self._dsml, self._close) and sampled.logprob is not None and section != "calls":
            self._scores.sampled(self._logprobs(sampled, section))
        yield from self._passed(events)
        if token == self._dsml:
            self._scores.markup()
            self._section = "calls"
        elif token == self._close:
            if self._section == "reasoning":
                self._scores = Scores()
            self._section = "content"

    def finish(self, reason: Literal["stop", "length"]) -> Iterator[Output]:
        """What was held back, once the engine has ended."""
        if not self.done:
            yield from self._passed(self._reader.finish(reason))
        if self._stop.matched is None:
            yield from self._content(self._stop.flush())
            yield from self._scores.released()

    def finished(self, prompt_tokens: int, cached_tokens: int) -> TurnFinished:
        """The last event."""
        reason, flags = self._finish or ("stop", ())
        usage = TurnUsage(prompt_tokens, cached_tokens, self.completion_tokens, self.reasoning_tokens)
        return TurnFinished("tool_calls" if self.calls else reason, usage, self._stop.matched, flags)

    def _passed(self, events: Sequence[Event]) -> Iterator[Output]:
        """Events of the reader, content through the stop filter; nothing after the end of the turn."""
        for event in events:
            if self.done:
                break
            if isinstance(event, ContentDelta):
                self._section = "content"
                self._scores.said(event.text)
                yield from self._content(self._stop.feed(event.text))
                continue
            if isinstance(event, Finish):
                self._finish = (event.reason, event.flags)
                continue
            if isinstance(event, ToolCallStart):  # text before a call cannot go on after it
                yield from self._content(self._stop.flush())
            elif isinstance(event, ReasoningDelta):
                self._section = "reasoning"
                self.reasoning.append(event.text)
                self._scores.said(event.text)
                self._scores.shown(event.text)
            elif isinstance(event, ToolCallEnd):
                self.calls.append(event.call)
            yield event
        yield from self._scores.released()

    def _content(self, text: str) -> Iterator[Output]:
        if text:
            self.content.append(text)
            self._scores.shown(text)
            yield ContentDelta(text)

    def _logprobs(self, sampled: TokenSampled, section: Literal["reasoning", "content"]) -> TokenLogprobs:
        assert sampled.logprob is not None
        data = self._tokenizer.decode_bytes
        top = tuple((data([token]), logprob) for token, logprob in sampled.top)
        return TokenLogprobs(section, data([sampled.token]), sampled.logprob, top)


def _special(tokenizer: Tokenizer, name: str) -> int:
    """The id of a special token, -1 (which no token has) where the vocabulary lacks it."""
    try:
        return tokenizer.special(name)
    except TokenizerError:
        return -1


@dataclass(frozen=True)
class Job:
    """A request that is ready for the engine. ``remember`` is told what came of it when it ended by itself."""

    request: Request
    writer: Writer
    remember: Callable[[Writer], None] = lambda writer: None


@dataclass
class _Clock:
    """When tokens came. Written by ``generate``."""

    begun: float = field(default_factory=time.monotonic)
    first: float = 0.0
    last: float = 0.0

    def tick(self) -> None:
        """A token came."""
        self.last = time.monotonic()
        self.first = self.first or self.last


async def generate(job: Job, service: Service) -> AsyncGenerator[Output, None]:
    """Run a job on the engine. Closing the iterator, or leaving it in any way, ends the sequence within one step."""
    request, writer, clock = job.request, job.writer, _Clock()
    prompt, cached, started = len(request.prompt_ids), 0, False
    reason: str = "cancelled"
    stream = service.engine.submit(request)
    try:
        async for event in stream:
            if not started:
                cached = event.cached if isinstance(event, Prefilled) else cached
                started = True
                yield TurnStarted(prompt, cached)
            if isinstance(event, TokenSampled):
                clock.tick()
                for output in writer.token(event):
                    yield output
                if writer.done:
                    break
            elif isinstance(event, Finished):
                cached = event.usage.cached_tokens
                for output in writer.finish(ended(event)):
                    yield output
                break
        else:
            raise ApiError(500, "the engine ended the request without a result; send it again")
        finished = writer.finished(prompt, cached)
        reason = finished.reason
        job.remember(writer)
        yield finished
    except RequestError as error:
        reason = "refused"
        raise refused(error, service) from None
    except Exception:
        reason = "error"
        raise
    finally:
        service.engine.cancel(request.id)  # does nothing to a request that has ended
        close = getattr(stream, "aclose", None)
        if close is not None:
            await close()
        _account(service, job, clock, reason, cached)


def refused(error: RequestError, service: Service) -> ApiError:
    """What the client is told when the engine takes no request, or not this one."""
    if isinstance(error, EngineStoppedError):
        service.failure = str(error)
        return ApiError(503, f"{error}; the server must be started again", retry_after=30)
    return invalid(str(error))


def ended(event: Finished) -> Literal["stop", "length"]:
    """How the engine ended a request. Raises ApiError when it failed or was told to stop."""
    if event.reason == "cancelled":
        raise ApiError(503, "the request was cancelled because the server is shutting down; send it again", retry_after=5)
    if event.reason == "error":
        raise ApiError(500, event.error or "the engine failed; the server's log says where")
    return event.reason


def _account(service: Service, job: Job, clock: _Clock, reason: str, cached: int) -> None:
    """Metrics and one line of log."""
    writer, metrics = job.writer, service.metrics
    prompt = len(job.request.prompt_ids)
    metrics.finished.labels(reason).inc()
    counts = {
        "prompt": prompt,
        "cached": cached,
        "completion": writer.completion_tokens,
        "reasoning": writer.reasoning_tokens,
    }
    for kind, count in counts.items():
        metrics.tokens.labels(kind).inc(count)
    if clock.first:
        metrics.first.observe(clock.first - clock.begun)
    if writer.completion_tokens > 1:
        metrics.each.observe((clock.last - clock.first) / (writer.completion_tokens - 1))
    seconds = round(time.monotonic() - clock.begun, 3)
    said: dict[str, str] = {}
    if service.options.log_prompts:
        prompt_text = service.tokenizer.decode(job.request.prompt_ids)
        said = {"prompt_text": prompt_text, "reasoning_text": "".join(writer.reasoning), "answer_text": "".join(writer.content)}
    service.log.info("turn", request=job.request.id, ended=reason, seconds=seconds, **counts, **said)
