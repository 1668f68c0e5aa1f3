"""/v1/completions: text goes on, without roles. With ``suffix`` the model fills the middle, where it has the tokens for it."""

from __future__ import annotations

import asyncio
import codecs
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from nautile.engine.request import Request as EngineRequest
from nautile.protocol import ContentDelta, Event, Finish, Tokenizer, TokenizerError, texts
from nautile.server.chat import FINGERPRINT, broken_off, usage_body
from nautile.server.chat_request import Sampled, checked, sampling_of, stops_of
from nautile.server.errors import ApiError, invalid, unprocessable
from nautile.server.generation import Answer, Job, TokenLogprobs, TurnFinished, TurnUsage, Writer, generate
from nautile.server.intake import caller, read_json, service_of
from nautile.server.prompt import fits
from nautile.server.service import Service
from nautile.server.sse import event, stream_events, while_connected
from nautile.server.turn import TurnEvent, collect

__all__ = ["CompletionRequest", "router"]

_DEFAULT_TOKENS = 4096
_MOST_CHOICES = 16
router = APIRouter()
_Ids = list[Annotated[int, Field(ge=0)]]


class CompletionRequest(Sampled):
    """A request to /v1/completions."""

    prompt: str | list[str] | _Ids | list[_Ids]
    suffix: str | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = Field(None, description="Refused.")
    best_of: int | None = Field(None, description="Must equal n.")


_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": CompletionRequest.model_json_schema()}}}}


class PlainReader:
    """Tokens to text, nothing else: no markup, no trimming. A character that is cut waits for its other bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: int) -> list[Event]:
        """One more token."""
        text = self._decoder.decode(self._tokenizer.decode_bytes([data]))
        return [ContentDelta(text)] if text else []

    def finish(self, reason: Literal["stop", "length"]) -> list[Event]:
        """No more tokens."""
        text = self._decoder.decode(b"", final=True)
        return [*([ContentDelta(text)] if text else []), Finish(reason)]


@router.post("/v1/completions", openapi_extra=_BODY)
@router.post("/completions", include_in_schema=False)
@router.post("/beta/completions", include_in_schema=False)
@router.post("/beta/v1/completions", include_in_schema=False)
async def completions(request: Request) -> Response:
    """Continue a text, or several."""
    service = service_of(request)
    wanted = checked(CompletionRequest, await read_json(request))
    _refuse_unsupported(wanted)
    partition, request_id = caller(request)
    order = _Order(wanted, service, partition, request_id)
    jobs = await asyncio.to_thread(order.jobs)
    head = {"id": f"cmpl-{request_id}", "created": int(time.time()), "model": service.name}
    if wanted.stream:
        if len(jobs) > 1:
            raise invalid("one answer at a time can be streamed: send one prompt with n = 1, or stream = false", "stream")
        separate = bool((wanted.stream_options or {}).get("include_usage"))
        chunks = _chunks(_events(jobs[0], service, partition), head, separate)
        return await stream_events(request, chunks, broken_off)
    answers = await while_connected(request, _all(jobs, service, partition))
    choices = [_choice(index, answer, wanted.logprobs is not None) for index, answer in enumerate(answers)]
    usage = usage_body(_total([answer.finished.usage for answer in answers], wanted.n or 1))
    return JSONResponse(
        {**head, "object": "text_completion", "choices": choices, "usage": usage, "system_fingerprint": FINGERPRINT}
    )


def _refuse_unsupported(wanted: CompletionRequest) -> None:
    if wanted.echo:
        raise invalid("echo is not supported: the prompt is not scored; leave it out", "echo")
    if wanted.best_of not in (None, wanted.n or 1):
        raise invalid("best_of is not supported; leave it out", "best_of")
    if wanted.n is not None and wanted.n < 1:
        raise unprocessable("n must be at least 1", "n")
    if wanted.stream_options is not None and not wanted.stream:
        raise invalid("stream_options should be set along with stream = true", "stream_options")


@dataclass(frozen=True)
class _Order:
    """A request, and for whom."""

    wanted: CompletionRequest
    service: Service
    partition: str
    request_id: str

    def jobs(self) -> list[Job]:
        """One job an answer. Raises ApiError."""
        wanted, count = self.wanted, self.wanted.n or 1
        prompts = _prompts(wanted.prompt)
        if not 0 < len(prompts) * count <= _MOST_CHOICES:
            raise unprocessable(f"between 1 and {_MOST_CHOICES} answers can be asked for, not {len(prompts) * count}", "n")
        most = self.service.options.concurrency
        if len(prompts) * count > most:
            text = f"{len(prompts) * count} answers at once, but a key may have {most} running on this server"
            raise invalid(f"{text}: lower n, or send fewer prompts in a request", "n")
        return [
            self._job(prompt, choice, number * count + choice)
            for number, prompt in enumerate(prompts)
            for choice in range(count)
        ]

    def _job(self, prompt: str | list[int], choice: int, index: int) -> Job:
        wanted, service, tokenizer = self.wanted, self.service, self.service.tokenizer
        ids = _ids(prompt, wanted.suffix, service)
        limit = min(wanted.max_tokens or _DEFAULT_TOKENS, fits(len(ids), service))
        sampling = sampling_of(wanted, service)
        seed = None if sampling.seed is None else (sampling.seed + choice) % 2**64  # a text of its own for every choice
        sampling = replace(sampling, max_tokens=limit, logprobs=wanted.logprobs, seed=seed)
        request = EngineRequest(tuple(ids), sampling, id=f"{self.request_id}-{index}", partition=self.partition)
        return Job(request, Writer(tokenizer, PlainReader(tokenizer), start="content", stop=stops_of(wanted.stop), markup=()))


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [[int(token) for token in prompt]]
    return list(prompt)  # type: ignore[arg-type]


def _ids(prompt: str | list[int], suffix: str | None, service: Service) -> list[int]:
    """The engine's prompt: what was given, after the beginning of sentence. Text is never a special token."""
    tokenizer = service.tokenizer
    if not isinstance(prompt, str):
        if not prompt:
            raise invalid("the prompt is empty: send at least one token", "prompt")
        if max(prompt) >= service.engine.config.vocab_size:
            raise invalid(f"token ids must be below {service.engine.config.vocab_size}", "prompt")
        if suffix is not None:
            raise invalid("suffix needs a prompt that is text", "suffix")
        return prompt
    begin = tokenizer.special(texts.BOS)
    if suffix is None:
        return [begin, *tokenizer.encode(prompt)]
    try:
        fim = [tokenizer.special(f"<｜fim▁{name}｜>") for name in ("begin", "hole", "end")]
    except TokenizerError:
        raise invalid("this model has no tokens for filling the middle; leave suffix out", "suffix") from None
    return [begin, fim[0], *tokenizer.encode(prompt), fim[1], *tokenizer.encode(suffix), fim[2]]


async def _events(job: Job, service: Service, partition: str) -> AsyncGenerator[TurnEvent, None]:
    with service.admitted(partition):
        async with aclosing(generate(job, service)) as events:
            async for item in events:
                yield item


async def _all(jobs: list[Job], service: Service, partition: str) -> list[Answer]:
    """All answers; the first failure ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(collect(_events(job, service, partition))) for job in jobs]
    except* ApiError as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _total(usages: list[TurnUsage], count: int) -> TurnUsage:
    """Of all answers. A prompt counts once, as its first of ``count`` answers found it."""
    prompts = usages[::count]
    known = sum(usage.prompt_tokens for usage in prompts), sum(usage.cached_tokens for usage in prompts)
    return TurnUsage(*known, sum(usage.completion_tokens for usage in usages), 0)


def _choice(index: int, answer: Answer, scored: bool) -> dict[str, Any]:
    logprobs = _logprobs(list(answer.logprobs), 0) if scored else None
    return {"index": index, "text": answer.content, "logprobs": logprobs, "finish_reason": answer.finished.reason}


def _logprobs(items: list[TokenLogprobs], offset: int) -> dict[str, Any]:
    """The older form: parallel lists."""
    tokens = [item.data.decode("utf-8", "replace") for item in items]
    offsets = [offset + sum(len(text) for text in tokens[:place]) for place in range(len(tokens))]
    return {
        "tokens": tokens,
        "token_logprobs": [item.logprob for item in items],
        "top_logprobs": [{data.decode("utf-8", "replace"): value for data, value in item.top} for item in items],
        "text_offset": offsets,
    }


async def _chunks(
    events: AsyncGenerator[TurnEvent, None], head: dict[str, Any], separate_usage: bool
) -> AsyncGenerator[bytes, None]:
    base = {**head, "object": "text_completion", "system_fingerprint": FINGERPRINT}

    def chunk(text: str, **more: Any) -> bytes:
        choice = {"index": 0, "text": text, "logprobs": more.get("logprobs"), "finish_reason": more.get("finish_reason")}
        return event({**base, "choices": [choice], "usage": more.get("usage")})

    offset = 0
    async with aclosing(events) as source:
        async for item in source:
            if isinstance(item, ContentDelta):
                yield chunk(item.text)
            elif isinstance(item, TokenLogprobs):
                yield chunk("", logprobs=_logprobs([item], offset))
                offset += len(item.data.decode("utf-8", "replace"))
            elif isinstance(item, TurnFinished):
                usage = usage_body(item.usage)
                yield chunk("", finish_reason=item.reason, usage=None if separate_usage else usage)
                if separate_usage:
                    yield event({**base, "choices": [], "usage": usage})
    yield event("[DONE]")
