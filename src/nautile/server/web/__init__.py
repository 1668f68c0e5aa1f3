"""The page at ``/``: plain files beside this one, and the live figures that it shows. No build step, nothing from elsewhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from nautile import __version__
from nautile.server.errors import ApiError
from nautile.server.intake import service_of

__all__ = ["router"]

router = APIRouter()
_HERE = Path(__file__).parent
_FILES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def index() -> Response:
    """The page."""
    return _file("index.html")


@router.api_route("/web/{name}", methods=["GET", "HEAD"], include_in_schema=False)
async def file(name: str) -> Response:
    """What the page is made of."""
    return _file(name)


def _file(name: str) -> Response:
    if name not in _FILES:
        raise ApiError(404, f"the page has no file {name!r}")
    return Response((_HERE / name).read_bytes(), media_type=_FILES[name], headers=_HEADERS)


@router.get("/stats")
async def stats(request: Request) -> dict[str, Any]:
    """What the engine is doing now, and its counters since the start; rates come from two answers and their ``seconds``."""
    service = service_of(request)
    now = service.engine.stats()
    return {
        "model": service.name,
        "version": __version__,
        "context": service.context,
        "seconds": time.monotonic(),
        "running": now.running,
        "waiting": now.waiting,
        "prompt_tokens": now.prompt_tokens,
        "cached_tokens": now.cached_tokens,
        "completion_tokens": now.completion_tokens,
        "drafted_tokens": now.drafted_tokens,
        "accepted_tokens": now.accepted_tokens,
        "steps": now.steps,
        "preemptions": now.preemptions,
        "bytes_by_kind": now.bytes_by_kind,
        "bytes_total": now.bytes_total,
        "bytes_limit": now.bytes_limit,
    }
