"""Who may come in: request ids, Host and Origin, keys. One ASGI layer around the application.

A page of another site must not reach a server on this machine: its name may be made to point here (DNS rebinding), so the
Host must be one that cannot be rebound; and its forms may post here (CSRF), so an Origin must be this server's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import json
import time
import uuid
from collections.abc import Iterable
from urllib.parse import quote, urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nautile.server.errors import ApiError, body_for
from nautile.server.service import Service

__all__ = ["Guard", "KeyRing", "check_host", "check_origin"]

_OPEN = ("/", "/health", "/health/live", "/health/ready", "/favicon.ico")  # need no key
_OPEN_FOLDER = "/web/"
_LOGGED_PATH = 200  # characters
_ID_HEADERS = (b"x-request-id", b"request-id")  # the names that clients of OpenAI and of Anthropic look for


class KeyRing:
    """The keys that open the server. Comparing takes the same time whichever key is nearly right."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest() for key in keys]

    def partition(self, key: str | None) -> str | None:
        """The partition of a key, "" where no keys are needed, None for a wrong or missing one."""
        if not self._digests:
            return ""
        given = hashlib.sha256((key or "").encode("utf-8", "surrogatepass")).digest()
        known = [hmac.compare_digest(given, digest) for digest in self._digests]
        return given.hex()[:24] if any(known) else None


class Guard:
    """Lets in what may come in, and answers the rest; gives every request an id, a line in the log and a count."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        self._keys = KeyRing(service.options.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI side."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path, begun, status, request_id = scope["path"], time.monotonic(), 0, uuid.uuid4().hex

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                known = [(name, request_id.encode()) for name in _ID_HEADERS]
                message = {**message, "headers": [*message["headers"], *known]}
            await send(message)

        readable = _readable(headers.get("origin"), self.service.options.allowed_origins)
        try:
            partition = self._admit(scope["method"], path, headers)
            scope.setdefault("state", {}).update(partition=partition, request_id=request_id)
            await self.app(scope, receive, watched)
        except ApiError as error:
            await _answer(path, error, request_id, readable, watched)
        except ClientDisconnect:
            status = 499  # as web servers log it: the client closed the request
        except Exception as error:
            told = self.service.unexpected(error, request_id, _quoted(path))
            if status:
                raise  # the answer has begun: only breaking it off tells the client
            await _answer(path, told, request_id, readable, watched)
        finally:
            self._account(scope, request_id, status, time.monotonic() - begun)

    def _admit(self, method: str, path: str, headers: dict[str, str]) -> str:
        """The partition of the caller. Raises ApiError."""
        options = self.service.options
        check_host(headers.get("host", ""), options.allowed_hosts)
        check_origin(headers.get("origin"), headers.get("host", ""), options.allowed_origins)
        asks = method == "OPTIONS" and "access-control-request-method" in headers  # a browser, before it sends the key
        if asks or path in _OPEN or path.startswith(_OPEN_FOLDER):
            return ""
        partition = self._keys.partition(_key(headers))
        if partition is None:
            raise ApiError(401, "a valid API key is needed: send it as Authorization: Bearer KEY, or as x-api-key")
        return partition

    def _account(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")  # the pattern, so that paths cannot make up series
        self.service.metrics.requests.labels(route, str(status)).inc()
        self.service.log.info(
            "request",
            request=request_id,
            method=scope["method"],
            path=_quoted(scope["path"]),
            status=status,
            seconds=round(seconds, 3),
        )


def _key(headers: dict[str, str]) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key")


def check_host(host: str, allowed: Iterable[str]) -> None:
    """Raises ApiError 403 for a name that somebody else's DNS could point here. IP addresses and localhost are safe."""
    name = _name(host)
    if name == "localhost" or name in {_name(other) for other in allowed}:
        return
    try:
        ipaddress.ip_address(name)
    except ValueError:
        text = f"this server does not answer to the host name {host!r}: use its address, or start it with --allow-host {name}"
        raise ApiError(403, text) from None


def check_origin(origin: str | None, host: str, allowed: Iterable[str]) -> None:
    """Raises ApiError 403 for a request made by a page of another site."""
    if origin is None or _is_allowed(origin, allowed):
        return
    with contextlib.suppress(ValueError):  # what is no address is nobody's page
        if urlsplit(origin).netloc.lower() == host.lower() and host:
            return
    raise ApiError(403, f"pages of {origin!r} may not call this server: start it with --allow-origin {origin}")


def _is_allowed(origin: str, allowed: Iterable[str]) -> bool:
    """Whether an origin is one of those given. Scheme and host, which are all of it but the port, have no case."""
    return origin.lower() in {other.lower() for other in allowed}


def _readable(origin: str | None, allowed: Iterable[str]) -> dict[str, str]:
    """The headers without which a page of another site, an allowed one, is not shown what it was answered."""
    if origin is None or not _is_allowed(origin, allowed):
        return {}
    return {"access-control-allow-origin": origin, "vary": "Origin"}


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")


def _quoted(path: str) -> str:
    """A path as a line of a log can have it: no control characters, not too long."""
    return quote(path[:_LOGGED_PATH], safe="/-._~:@", errors="replace")


async def _answer(path: str, error: ApiError, request_id: str, more: dict[str, str], send: Send) -> None:
    body = json.dumps(body_for(path, error, request_id), ensure_ascii=False).encode("utf-8", "replace")
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers, **more}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body, "more_body": False})
