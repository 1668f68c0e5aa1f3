"""A request's body: read in pieces, bounded, and JSON that every later step can handle."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from nautile.server.errors import ApiError, invalid
from nautile.server.service import Service

__all__ = ["caller", "read_body", "read_json", "service_of"]

_DISCARD_SECONDS = 5.0
_DISCARD_BYTES = 2**28
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_DEEPEST = 200
_LARGE = 2**18  # bytes that take long enough to hold up other requests


def service_of(request: Request) -> Service:
    """The service behind this application."""
    service: Service = request.app.state.service
    return service


def caller(request: Request) -> tuple[str, str]:
    """Who asks (the partition of its key) and the id of the request."""
    state = request.scope.get("state", {})
    return state.get("partition", ""), state.get("request_id", "")


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object of a request. Raises ApiError 413 for a body over the limit, 400 for anything but an object."""
    raw = await _read(request, service_of(request).options.body_limit)
    return parse_json(raw) if len(raw) < _LARGE else await asyncio.to_thread(parse_json, raw)


async def read_body(request: Request) -> bytes:
    """The bytes of a request that is no JSON. Raises ApiError 413 for a body over the limit."""
    return await _read(request, service_of(request).options.body_limit)


async def _read(request: Request, limit: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        await _discard(request)
        raise _too_large(limit)
    pieces: list[bytes] = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > limit:
            pieces.clear()
            await _discard(request)
            raise _too_large(limit)
        pieces.append(piece)
    return b"".join(pieces)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request is larger than {limit} bytes: shorten it, or start the server with --body-limit")


async def _discard(request: Request) -> None:
    """Let the client finish sending, without keeping anything: most do not read the answer before they have."""
    end, size = time.monotonic() + _DISCARD_SECONDS, 0
    while time.monotonic() < end and size < _DISCARD_BYTES:
        message = await request.receive()
        size += len(message.get("body", b""))
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        if not message.get("more_body", False):
            return


def parse_json(raw: bytes) -> dict[str, Any]:
    """A JSON object: UTF-8, finite numbers, whole characters, not nested too deeply. Raises ApiError 400."""
    if not raw.strip():
        raise invalid("the request has no body: send a JSON object")
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_not_a_number, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8 (byte {error.start}); send JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        text = f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise invalid(text) from None
    except RecursionError:
        raise invalid(f"the body is nested too deeply: at most {_DEEPEST} levels") from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise invalid(f"a number in the body cannot be read: {error}") from None
    if not isinstance(body, dict):
        raise invalid(f"the body must be a JSON object, not {type(body).__name__}")
    _check_depth(body)
    if _SURROGATE.search(raw):
        _check_characters(body)
    return body


def _not_a_number(name: str) -> NoReturn:
    raise invalid(f"{name} is no number that can be used; send a finite number")


def _finite(digits: str) -> float:
    """1e999 is JSON, but no answer could give the infinity back that Python makes of it."""
    number = float(digits)
    return number if math.isfinite(number) else _not_a_number(digits if len(digits) <= 40 else f"{digits[:40]}...")


def _check_depth(body: dict[str, Any]) -> None:
    """Later steps recurse: a depth that all of them can take."""
    level: list[Any] = [body]
    for _ in range(_DEEPEST):
        level = [
            child
            for value in level
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise invalid(f"the body is nested too deeply: at most {_DEEPEST} levels")


def _check_characters(body: dict[str, Any]) -> None:
    try:
        json.dumps(body, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        found = str(error.object)[max(error.start - 20, 0) : error.start]
        text = f"half of a surrogate pair after {found!r}; send whole characters (a pair of \\u escapes, or UTF-8)"
        raise invalid(text) from None
