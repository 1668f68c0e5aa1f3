"""A turn of the model, whichever API asked for it: a frozen ``Turn`` goes in, events come out.

Every endpoint translates its request into a ``Turn`` and the events back into its own form. What this file does not know:
HTTP, JSON bodies, server-sent events.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nautile.engine.request import Request
from nautile.engine.sampling import SamplingParams
from nautile.protocol import (
    ContentDelta,
    ReasoningDelta,
    StreamParser,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    texts,
)
from nautile.server.errors import ApiError, invalid
from nautile.server.generation import Answer, Job, TokenLogprobs, TurnFinished, TurnStarted, TurnUsage, Writer, generate
from nautile.server.prompt import constrained, normalised, remember, render, room
from nautile.server.service import Service

__all__ = [
    "Answer",
    "TokenLogprobs",
    "Turn",
    "TurnEvent",
    "TurnFinished",
    "TurnStarted",
    "TurnUsage",
    "collect",
    "prepare",
    "run",
]

Message = Mapping[str, Any]
TurnEvent = (
    TurnStarted | ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments | ToolCallEnd | TokenLogprobs | TurnFinished
)


@dataclass(frozen=True)
class Turn:
    """One answer to a conversation. Written by an endpoint, never changed.

    ``messages``, ``tools``, ``tool_choice`` and ``response_format`` are as a client of the chat API sends them;
    ``nautile.protocol.conversation`` checks them, so they may be anything. A last assistant message with ``prefix: true`` is
    left open for the answer. ``effort`` is low, high or max, None means the server's default. ``max_tokens`` None means as much
    as the mode's default allows. ``logprobs`` None means none, else how many likely tokens are wanted beside each. Without
    ``parallel_calls`` the turn ends after its first call.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_calls: bool = True
    thinking: bool = True
    effort: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    response_format: Mapping[str, Any] | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    partition: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


async def run(turn: Turn, service: Service) -> AsyncGenerator[TurnEvent, None]:
    """Let the model take its turn. The first event is ``TurnStarted``, the last ``TurnFinished``.

    Closing the iterator frees the sequence within one step. Raises ApiError: nearly always at the first ``anext``, before
    anything was generated; later only when the engine fails.
    """
    with service.admitted(turn.partition):
        job = await asyncio.to_thread(prepare, turn, service)
        async with contextlib.aclosing(generate(job, service)) as events:
            async for event in events:
                yield event


async def collect(events: AsyncGenerator[TurnEvent, None]) -> Answer:
    """All of a turn at once. The iterator is closed, so that the turn's place is free when this returns."""
    reasoning, content, calls, logprobs = [], [], [], []
    finished: TurnFinished | None = None
    async with contextlib.aclosing(events):
        async for event in events:
            if isinstance(event, ReasoningDelta):
                reasoning.append(event.text)
            elif isinstance(event, ContentDelta):
                content.append(event.text)
            elif isinstance(event, ToolCallEnd):
                calls.append(event.call)
            elif isinstance(event, TokenLogprobs):
                logprobs.append(event)
            elif isinstance(event, TurnFinished):
                finished = event
    if finished is None:
        raise ApiError(500, "the engine ended the request without a result; send it again")
    return Answer("".join(reasoning), "".join(content), tuple(calls), tuple(logprobs), finished)


def prepare(turn: Turn, service: Service) -> Job:
    """Everything up to the engine: the prompt's ids, the constraint, the reader of the output. Raises ApiError."""
    tokenizer = service.tokenizer
    asked = normalised(turn, service)
    prompt = render(turn, asked, service)
    ids = prompt.ids
    limit = room(turn, len(ids), service)
    try:
        sampling = replace(turn.sampling, max_tokens=limit, logprobs=turn.logprobs)
    except ValueError as error:
        raise invalid(str(error)) from None
    constraint = constrained(turn, asked, prompt, service)
    request = Request(tuple(ids), sampling, id=turn.id, partition=turn.partition, constraint=constraint)
    parser = StreamParser(
        start=prompt.start, tokenizer=tokenizer, tools=asked.tools, call_seed=turn.id, continued=prompt.continued
    )
    markup = (texts.THINK_CLOSE, texts.DSML) if asked.tools else (texts.THINK_CLOSE,)
    writer = Writer(tokenizer, parser, start=prompt.start, stop=turn.stop, parallel_calls=turn.parallel_calls, markup=markup)
    return Job(request, writer, lambda answer: remember(turn, asked, answer, service))
