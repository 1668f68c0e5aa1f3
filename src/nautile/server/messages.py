"""/v1/messages and /v1/messages/count_tokens: Anthropic's Messages API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from nautile.server.chat_request import checked
from nautile.server.errors import ApiError, anthropic_body
from nautile.server.intake import caller, read_json, service_of
from nautile.server.messages_events import MessageWriter
from nautile.server.messages_request import CountRequest, MessagesRequest, Wanted, to_wanted
from nautile.server.service import Service
from nautile.server.sse import event, stream_events, while_connected
from nautile.server.turn import prepare, run

__all__ = ["router"]

router = APIRouter()
_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": MessagesRequest.model_json_schema()}}}}
_COUNT = {"requestBody": {"required": True, "content": {"application/json": {"schema": CountRequest.model_json_schema()}}}}


@router.post("/v1/messages", openapi_extra=_BODY)
@router.post("/anthropic/v1/messages", openapi_extra=_BODY)
async def messages(request: Request) -> Response:
    """One message in answer to a conversation."""
    service = service_of(request)
    body = checked(MessagesRequest, await read_json(request))
    wanted = to_wanted(body, service, *caller(request))
    # The name that was asked for, since Claude Code sends no thinking back to a model of another name.
    writer = MessageWriter(wanted, body.model or service.name)
    if body.stream:
        broken_off = partial(_broken_off, request_id=wanted.turn.id)
        return await stream_events(request, _events(writer, wanted, service), broken_off)
    await while_connected(request, _all(writer, wanted, service))
    return JSONResponse(writer.message)


@router.post("/v1/messages/count_tokens", openapi_extra=_COUNT)
@router.post("/anthropic/v1/messages/count_tokens", openapi_extra=_COUNT)
async def count_tokens(request: Request) -> dict[str, int]:
    """How many tokens the prompt of such a request has. Nothing is generated."""
    service = service_of(request)
    wanted = to_wanted(checked(CountRequest, await read_json(request)), service, *caller(request))
    with service.admitted(wanted.turn.partition):
        job = await asyncio.to_thread(prepare, wanted.turn, service)
    return {"input_tokens": len(job.request.prompt_ids)}


async def _events(writer: MessageWriter, wanted: Wanted, service: Service) -> AsyncGenerator[bytes, None]:
    """Server-sent events."""
    async with aclosing(run(wanted.turn, service)) as turn:
        async for item in turn:
            for made in writer.events(item):
                yield event(made, made["type"])


def _broken_off(error: ApiError, request_id: str) -> bytes:
    return event(anthropic_body(error, request_id), "error")


async def _all(writer: MessageWriter, wanted: Wanted, service: Service) -> None:
    async with aclosing(run(wanted.turn, service)) as turn:
        async for item in turn:
            for _ in writer.events(item):
                pass
