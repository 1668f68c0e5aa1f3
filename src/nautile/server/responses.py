"""/v1/responses: OpenAI's Responses API, without storage. Every request carries its whole conversation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from nautile.server.chat_request import checked
from nautile.server.errors import ApiError
from nautile.server.intake import caller, read_json, service_of
from nautile.server.responses_events import ResponseWriter
from nautile.server.responses_request import ResponsesRequest, Wanted, to_wanted
from nautile.server.service import Service
from nautile.server.sse import event, stream_events, while_connected
from nautile.server.turn import prepare, run

__all__ = ["router"]

router = APIRouter()
_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": ResponsesRequest.model_json_schema()}}}}


@router.post("/v1/responses", openapi_extra=_BODY)
@router.post("/responses", openapi_extra=_BODY)
async def responses(request: Request) -> Response:
    """One response to a conversation."""
    service = service_of(request)
    body = checked(ResponsesRequest, await read_json(request))
    wanted = to_wanted(body, service, *caller(request))
    writer = ResponseWriter(body, wanted, service.name, service.options.effort)
    if body.stream:
        broken_off = partial(_broken_off, writer=writer)
        return await stream_events(request, _events(writer, wanted, service), broken_off)
    await while_connected(request, _all(writer, wanted, service))
    return JSONResponse(writer.response)


@router.post("/v1/responses/input_tokens", openapi_extra=_BODY)
async def input_tokens(request: Request) -> dict[str, Any]:
    """How many tokens the prompt of such a request has. Nothing is generated."""
    service = service_of(request)
    wanted = to_wanted(checked(ResponsesRequest, await read_json(request)), service, *caller(request))
    with service.admitted(wanted.turn.partition):
        job = await asyncio.to_thread(prepare, wanted.turn, service)
    return {"object": "response.input_tokens", "input_tokens": len(job.request.prompt_ids)}


@router.get("/v1/responses/{name:path}")
@router.delete("/v1/responses/{name:path}")
async def stored(name: str) -> Response:
    """Stored responses, of which there are none. Raises ApiError 404."""
    raise ApiError(404, f"this server stores no responses, so there is no {name!r}: keep the answer when it comes")


async def _events(writer: ResponseWriter, wanted: Wanted, service: Service) -> AsyncGenerator[bytes, None]:
    """Server-sent events."""
    async with aclosing(run(wanted.turn, service)) as turn:
        async for item in turn:
            for made in writer.events(item):
                yield event(made, made["type"])


def _broken_off(error: ApiError, writer: ResponseWriter) -> bytes:
    made = writer.failed(error.message)
    return event(made, made["type"])


async def _all(writer: ResponseWriter, wanted: Wanted, service: Service) -> None:
    async with aclosing(run(wanted.turn, service)) as turn:
        async for item in turn:
            for _ in writer.events(item):
                pass
