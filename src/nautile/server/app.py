"""The application: routes, the guard around them, and what errors look like."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from nautile import __version__
from nautile.server import chat, completions, sessions
from nautile.server.errors import ApiError, body_for
from nautile.server.guard import Guard
from nautile.server.intake import service_of
from nautile.server.service import Service

__all__ = ["create_app"]


def create_app(service: Service) -> FastAPI:
    """The server's application. The engine is closed when it shuts down."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.engine.close()

    app = FastAPI(title="Nautile", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(chat.router)
    app.include_router(completions.router)
    for name in ("responses", "messages", "web"):
        if importlib.util.find_spec(f"nautile.server.{name}"):
            app.include_router(importlib.import_module(f"nautile.server.{name}").router)
    if service.sessions is not None:
        app.include_router(sessions.router)
    _add_basics(app)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    if service.options.allowed_origins:
        origins = "(?i)" + "|".join(map(re.escape, service.options.allowed_origins))  # in any case, as the guard has it
        app.add_middleware(CORSMiddleware, allow_origin_regex=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    app.add_middleware(Guard, service=service)  # the outermost: what it refuses reaches nothing
    return app


def _add_basics(app: FastAPI) -> None:
    @app.get("/health")
    @app.get("/health/ready")
    async def ready(request: Request) -> JSONResponse:
        """Whether new requests are taken."""
        service = service_of(request)
        stats = service.engine.stats()
        status = "failed" if service.failure else "draining" if service.draining else "ready"
        body = {"status": status, "running": stats.running, "waiting": stats.waiting}
        return JSONResponse(body, 200 if status == "ready" else 503)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "live"}

    @app.get("/metrics")
    async def metrics(request: Request) -> PlainTextResponse:
        """Figures for Prometheus."""
        return PlainTextResponse(service_of(request).metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    @app.get("/models", include_in_schema=False)
    async def models(request: Request) -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [_model(service_of(request))]}

    @app.get("/v1/models/{name:path}")
    @app.get("/models/{name:path}", include_in_schema=False)
    async def model(name: str, request: Request) -> dict[str, Any]:
        """The model, by its name."""
        service = service_of(request)
        if name != service.name:
            raise ApiError(404, f"there is no model {name!r} here; this server runs {service.name!r}", param="model")
        return _model(service)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": 0,
        "owned_by": "nautile",
        "max_model_len": service.context,
        "context_length": service.context,
    }


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    request_id = request.scope.get("state", {}).get("request_id")
    return JSONResponse(body_for(request.url.path, error, request_id), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """Unknown paths and methods, in the same form."""
    assert isinstance(error, HTTPException)
    texts = {404: f"there is nothing at {request.url.path}", 405: f"{request.url.path} does not take {request.method}"}
    return await _api_error(request, ApiError(error.status_code, texts.get(error.status_code, str(error.detail))))
