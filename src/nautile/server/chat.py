"""/v1/chat/completions: the turn's events in the form of the chat API, whole or streamed."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from nautile import __version__
from nautile.protocol import ContentDelta, ReasoningDelta, ToolCall, ToolCallArguments, ToolCallStart
from nautile.server.chat_request import ChatRequest, checked, to_turn
from nautile.server.errors import ApiError, openai_body
from nautile.server.intake import caller, read_json, service_of
from nautile.server.sse import event, stream_events, while_connected
from nautile.server.turn import Answer, TokenLogprobs, Turn, TurnEvent, TurnFinished, TurnUsage, collect, run

__all__ = ["FINGERPRINT", "broken_off", "logprobs_body", "router", "usage_body"]

FINGERPRINT = f"nautile-{__version__}"
router = APIRouter()
_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": ChatRequest.model_json_schema()}}}}


@router.post("/v1/chat/completions", openapi_extra=_BODY)
@router.post("/chat/completions", include_in_schema=False)
@router.post("/beta/chat/completions", include_in_schema=False)
@router.post("/beta/v1/chat/completions", include_in_schema=False)
async def chat_completions(request: Request) -> Response:
    """One answer to a conversation."""
    service = service_of(request)
    wanted = checked(ChatRequest, await read_json(request))
    turn = to_turn(wanted, service, *caller(request))
    events = run(turn, service)
    head = {"id": f"chatcmpl-{turn.id}", "created": int(time.time()), "model": service.name}
    if wanted.stream:
        separate = bool((wanted.stream_options or {}).get("include_usage"))
        return await stream_events(request, _chunks(events, turn, head, separate), broken_off)
    answer = await while_connected(request, collect(events))
    choice = {
        "index": 0,
        "message": _message(answer, turn),
        "logprobs": None if turn.logprobs is None else logprobs_body(answer.logprobs),
        "finish_reason": answer.finished.reason,
    }
    usage = usage_body(answer.finished.usage)
    return JSONResponse(
        {**head, "object": "chat.completion", "choices": [choice], "usage": usage, "system_fingerprint": FINGERPRINT}
    )


def _message(answer: Answer, turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if turn.thinking:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [_call(call) for call in answer.calls]
    return message


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


async def _chunks(
    events: AsyncGenerator[TurnEvent, None], turn: Turn, head: dict[str, Any], separate_usage: bool
) -> AsyncGenerator[bytes, None]:
    """Server-sent events. Usage comes once: with the last chunk, or, where asked for, in one of its own after it."""
    base = {**head, "object": "chat.completion.chunk", "system_fingerprint": FINGERPRINT}

    def chunk(delta: dict[str, Any], **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": more.get("logprobs"), "finish_reason": more.get("finish_reason")}
        return event({**base, "choices": [choice], "usage": more.get("usage")})

    first: dict[str, Any] | None = {"role": "assistant", "content": ""}
    async with aclosing(events) as source:
        async for item in source:
            if first is not None:
                yield chunk(first)
                first = None
            if isinstance(item, TurnFinished):
                usage = usage_body(item.usage)
                yield chunk({}, finish_reason=item.reason, usage=None if separate_usage else usage)
                if separate_usage:
                    yield event({**base, "choices": [], "usage": usage})
            elif isinstance(item, TokenLogprobs):
                yield chunk({}, logprobs=logprobs_body((item,)))
            elif (delta := _delta(item)) is not None:
                yield chunk(delta)
    yield event("[DONE]")


def broken_off(error: ApiError) -> bytes:
    """The last words of a stream that began and cannot go on, in chat and completions."""
    return event(openai_body(error)) + event("[DONE]")


def _delta(item: TurnEvent) -> dict[str, Any] | None:
    if isinstance(item, ReasoningDelta):
        return {"reasoning_content": item.text}
    if isinstance(item, ContentDelta):
        return {"content": item.text}
    if isinstance(item, ToolCallStart):
        function = {"name": item.name, "arguments": ""}
        return {"tool_calls": [{"index": item.index, "id": item.id, "type": "function", "function": function}]}
    if isinstance(item, ToolCallArguments):
        return {"tool_calls": [{"index": item.index, "function": {"arguments": item.text}}]}
    return None


def usage_body(usage: TurnUsage) -> dict[str, Any]:
    """Usage as DeepSeek and OpenAI write it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "prompt_cache_hit_tokens": usage.cached_tokens,
        "prompt_cache_miss_tokens": usage.prompt_tokens - usage.cached_tokens,
    }


def logprobs_body(items: tuple[TokenLogprobs, ...]) -> dict[str, Any]:
    """Log-probabilities of the content, and of the reasoning beside them."""
    sections: dict[str, list[dict[str, Any]]] = {"content": [], "reasoning": []}
    for item in items:
        top = [_token(data, logprob) for data, logprob in item.top]
        sections[item.section].append({**_token(item.data, item.logprob), "top_logprobs": top})
    return {"content": sections["content"], "reasoning_content": sections["reasoning"] or None, "refusal": None}


def _token(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}
