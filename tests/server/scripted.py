"""A scripted engine: it says what a test tells it to, token by token, and notes what it was asked.

It is an ``AsyncEngine``, so everything of a server but the model is real. Texts are spelled out with special tokens where they
stand: ``"why</think>ans"`` gives the ids of "why", the token ``</think>``, the ids of "ans", and the end of sentence.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from nautile.config import ModelConfig
from nautile.engine.request import (
    EngineEvent,
    EngineStats,
    EngineStoppedError,
    Finished,
    Prefilled,
    Request,
    RequestError,
    TokenSampled,
    Usage,
)
from nautile.protocol import Tokenizer, texts

__all__ = ["Gate", "Script", "ScriptedEngine", "calls", "ids_of", "pass_time", "v4_tokenizer"]

PIECE = 0.02  # seconds: longer sleeps are made of these
SPECIALS = (texts.EOS, texts.THINK_OPEN, texts.THINK_CLOSE, texts.DSML, texts.USER, texts.ASSISTANT)


async def pass_time(seconds: float) -> None:
    """Sleep in pieces. A machine that stands still for all of it makes one piece late, not the others: whoever else waits in
    this loop has its turns in between."""
    pieces = max(1, round(seconds / PIECE))
    for _ in range(pieces):
        await asyncio.sleep(seconds / pieces)


@functools.cache
def v4_tokenizer() -> Tokenizer:
    """The real V4 tokenizer."""
    return Tokenizer.load("deepseek-v4")


def ids_of(text: str, tokenizer: Tokenizer | None = None) -> list[int]:
    """The ids of a text in which special tokens are written out."""
    tokenizer = tokenizer or v4_tokenizer()
    parts = re.split("(" + "|".join(map(re.escape, SPECIALS)) + ")", text)
    return [
        token for part in parts if part for token in ([tokenizer.special(part)] if part in SPECIALS else tokenizer.encode(part))
    ]


def calls(*invocations: tuple[str, dict[str, str]]) -> str:
    """A block of calls; values are strings."""
    dsml = texts.DSML
    lines = []
    for name, arguments in invocations:
        parameters = [
            f'<{dsml}parameter name="{key}" string="true">{value}</{dsml}parameter>' for key, value in arguments.items()
        ]
        lines += [f'<{dsml}invoke name="{name}">', *parameters, f"</{dsml}invoke>"]
    return "\n\n" + "\n".join([f"<{dsml}tool_calls>", *lines, f"</{dsml}tool_calls>"])


@dataclass
class Gate:
    """Lets as many tokens through as any thread says: what a test sees before the next one does not depend on time."""

    allowed: int


@dataclass(frozen=True)
class Script:
    """One answer. ``cached`` tokens of the prompt count as known; ``delay`` seconds pass before each token, ``wait`` before the
    first, and no token passes a ``gate`` that is closed; ``refuse`` is the text of a RequestError, ``fail`` that of an error in
    the middle; without ``ends`` the answer has no end of sentence, and runs into the limit."""

    output: str | Sequence[int] = "</think>ok"
    cached: int = 0
    delay: float = 0.0
    wait: float = 0.0
    gate: Gate | None = None
    refuse: str | None = None
    fail: str | None = None
    ends: bool = True


@dataclass
class ScriptedEngine:
    """Gives one script a request, in order, ``default`` when there are none left; or else what ``answer`` makes of the request.

    ``requests`` are those that were begun, ``cancelled`` the ids of those that were ended before they had finished, ``given``
    the tokens that each request got. A script that its request's grammar forbids is an error, or with ``obedient`` the lowest
    token that the grammar allows, and then the end of the length.
    """

    scripts: deque[Script] = field(default_factory=deque)
    default: Script = Script()
    answer: Callable[[Request], Script] | None = None
    tokenizer: Tokenizer | None = field(default_factory=v4_tokenizer)
    context: int = 65_536
    requests: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    given: dict[str, int] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)
    closed: bool = False
    obedient: bool = False

    @property
    def config(self) -> ModelConfig:
        """A configuration with the sizes that a server looks at."""
        assert self.tokenizer is not None
        return _config(self.tokenizer.vocab_size, self.context)

    def say(self, *outputs: str | Script) -> None:
        """Add answers."""
        self.scripts.extend(output if isinstance(output, Script) else Script(output) for output in outputs)

    def prompt(self, number: int = -1) -> str:
        """The text of a prompt that was begun."""
        assert self.tokenizer is not None
        return self.tokenizer.decode(self.requests[number].prompt_ids)

    def cancel(self, request_id: str) -> None:
        """End a request; ids that do not run are ignored."""
        if request_id in self.running:
            self.running.discard(request_id)
            self.cancelled.append(request_id)

    def stats(self) -> EngineStats:
        """Counters of what was given."""
        prompts = sum(len(request.prompt_ids) for request in self.requests)
        given = sum(self.given.values())
        return EngineStats(
            running=len(self.running), prompt_tokens=prompts, completion_tokens=given, bytes_by_kind={"window": 0}
        )

    def close(self) -> None:
        """Nothing to release."""
        self.closed = True

    async def submit(self, request: Request) -> AsyncIterator[EngineEvent]:
        """See ``AsyncEngine.submit``."""
        self.requests.append(request)
        scripted = self.scripts.popleft() if self.scripts else self.default
        script = self.answer(request) if self.answer else scripted
        if self.closed:
            raise EngineStoppedError("the engine is closed")
        if script.refuse is not None:
            raise RequestError(script.refuse)
        self.running.add(request.id)
        try:
            async for event in self._events(request, script):
                yield event
        finally:
            self.cancel(request.id)

    async def _events(self, request: Request, script: Script) -> AsyncIterator[EngineEvent]:
        assert self.tokenizer is not None
        output = ids_of(script.output, self.tokenizer) if isinstance(script.output, str) else list(script.output)
        if script.ends:
            output.append(self.tokenizer.special(texts.EOS))
        constraint = request.constraint() if request.constraint else None
        await pass_time(script.wait)
        total = len(request.prompt_ids)
        yield Prefilled(total, total, script.cached)
        self.given[request.id] = 0
        bent = False
        for number, written in enumerate(output[: request.sampling.max_tokens]):
            await pass_time(script.delay)
            while script.gate is not None and number >= script.gate.allowed and request.id in self.running:
                await asyncio.sleep(0.005)
            if request.id not in self.running:
                yield Finished("cancelled", self._usage(request, script))
                return
            token = written
            if constraint is not None:
                mask = constraint.mask()
                if mask is not None and not mask[token] and self.obedient:
                    token, bent = int(mask.nonzero()[0, 0]), True
                if mask is not None and not mask[token]:
                    yield Finished("error", self._usage(request, script), error=f"the script breaks the constraint at {token}")
                    self.running.discard(request.id)
                    return
                constraint.accept(token)
            self.given[request.id] += 1
            yield TokenSampled(token, logprob=_logprob(request, token), top=_top(request, token))
        self.running.discard(request.id)
        if script.fail is not None:
            yield Finished("error", self._usage(request, script), error=script.fail)
            return
        ended = not bent and script.ends and len(output) <= request.sampling.max_tokens
        yield Finished("stop" if ended else "length", self._usage(request, script))

    def _usage(self, request: Request, script: Script) -> Usage:
        return Usage(len(request.prompt_ids), script.cached, self.given.get(request.id, 0))


def _logprob(request: Request, token: int) -> float | None:
    return None if request.sampling.logprobs is None else -(token % 7) / 8


def _top(request: Request, token: int) -> tuple[tuple[int, float], ...]:
    return tuple((token + rank, -(token % 7) / 8 - rank) for rank in range(request.sampling.logprobs or 0))


@functools.cache
def _config(vocabulary: int, context: int) -> ModelConfig:
    import dataclasses  # noqa: PLC0415

    return dataclasses.replace(
        ModelConfig.preset("nano"), vocab_size=vocabulary, max_position_embeddings=context, dialect="0731"
    )
