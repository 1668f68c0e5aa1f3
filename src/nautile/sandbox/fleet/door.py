"""What the HTTP doors of edges and gateways have in common: who comes in is asked first, and every error becomes an answer."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from nautile.sandbox.errors import SandboxError, SandboxLost
from nautile.sandbox.fleet import wire
from nautile.sandbox.records import error_record

__all__ = ["Handler", "guard"]

_log = logging.getLogger(__name__)
_Admitted = TypeVar("_Admitted")
Handler = Callable[[Request], Awaitable[Response]]


def guard(admit: Callable[[Request], _Admitted], handler: Callable[[Request, _Admitted], Awaitable[Response]]) -> Handler:
    """``handler`` with what ``admit`` found out about the request; what either raises is answered with its record."""

    async def guarded(request: Request) -> Response:
        try:
            return await handler(request, admit(request))
        except SandboxError as error:
            record = error_record(error)
        except ClientDisconnect:
            record = error_record(SandboxLost("the client hung up"))
        except Exception as error:
            _log.exception("%s %s", request.method, request.url.path)
            record = error_record(error)
        return JSONResponse(record, wire.status_of(record))

    return guarded
