"""What clients, gateways and edges send each other over HTTP: frames of a JSON header and bytes."""

from __future__ import annotations

import json
import re
import socket
import struct
from collections.abc import AsyncIterable, Iterator
from typing import Any

from nautile.sandbox.errors import InvalidRequest
from nautile.sandbox.inside.frames import BODY_LIMIT, HEADER_LIMIT
from nautile.sandbox.limits import Limits

__all__ = [
    "BODY_LIMIT",
    "CREATE_MOST",
    "PROJECT",
    "SECRET",
    "SOCKET_OPTIONS",
    "TIMEOUT",
    "TRANSFER_MOST",
    "Frames",
    "body_of",
    "edge_of",
    "is_edge_name",
    "limits_of",
    "one_frame",
    "pack",
    "status_of",
]

PROJECT, SECRET = "x-nautile-project", "x-nautile-secret"  # what a gateway tells an edge
# A peer whose cable is cut is noticed within about ten seconds, whether something is being sent or an answer is waited for.
SOCKET_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 4),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000),
)
TIMEOUT = "x-nautile-timeout"  # seconds that the client waits for this answer
CREATE_MOST = 2**20  # bytes of a request for a sandbox
TRANSFER_MOST = 60 * 2**20  # bytes of one transfer of files
_LENGTHS = struct.Struct("<II")
_EDGE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}\Z")
_STATUS = {
    "AccessDenied": 403,
    "EdgeGone": 502,
    "FleetFull": 503,
    "LogFenced": 409,
    "OutcomeUnknown": 409,
    "QuotaExceeded": 429,
    "SandboxClosed": 404,
    "SandboxLost": 410,
    "TrajectoryDiverged": 409,
}


def is_edge_name(name: str) -> bool:
    """Lower-case letters, digits and hyphens, at most 40."""
    return _EDGE_NAME.match(name) is not None


def edge_of(identity: str) -> str:
    """The edge that a sandbox's or an image's id names. Raises InvalidRequest."""
    edge, dot, rest = identity.partition(".")
    if not dot or not rest or not is_edge_name(edge):
        raise InvalidRequest(f"{identity[:80]!r} is no id of a fleet's sandbox: it has the form EDGE.NAME")
    return edge


def pack(header: dict[str, Any], *body: bytes) -> bytes:
    """One frame. Raises InvalidRequest when it is too long."""
    text = json.dumps(header, separators=(",", ":")).encode()
    length = sum(map(len, body))
    if len(text) > HEADER_LIMIT or length > BODY_LIMIT:
        raise InvalidRequest(f"{len(text) + length:,} bytes are too many for one request: send at most {BODY_LIMIT:,}")
    return b"".join((_LENGTHS.pack(len(text), length), text, *body))


class Frames:
    """Frames out of a stream that comes in pieces of any size. Raises InvalidRequest for what is no frame."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The frames that are whole now."""
        self._pending += data
        while len(self._pending) >= _LENGTHS.size:
            header_length, body_length = _LENGTHS.unpack_from(self._pending)
            if header_length > HEADER_LIMIT or body_length > BODY_LIMIT:
                raise InvalidRequest(f"a frame of {header_length:,} + {body_length:,} bytes was announced")
            end = _LENGTHS.size + header_length + body_length
            if len(self._pending) < end:
                return
            frame = bytes(self._pending[_LENGTHS.size : end])
            del self._pending[:end]
            yield _header(frame[:header_length]), frame[header_length:]

    @property
    def whole(self) -> bool:
        """Whether nothing of another frame has come."""
        return not self._pending


def _header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest("the header of a frame is not JSON") from None
    if not isinstance(header, dict):
        raise InvalidRequest("the header of a frame is not an object")
    return header


def one_frame(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The one frame that a request's body is. Raises InvalidRequest."""
    parser = Frames()
    found = list(parser.feed(data))
    if len(found) != 1 or not parser.whole:
        raise InvalidRequest(f"a request is one frame; this one is {len(found)} and {'an end' if parser.whole else 'a part'}")
    return found[0]


async def body_of(stream: AsyncIterable[bytes], most: int = BODY_LIMIT + HEADER_LIMIT + _LENGTHS.size) -> bytes:
    """A request's body, of at most as much as one frame may have. Raises InvalidRequest."""
    pieces, total = [], 0
    async for piece in stream:
        total += len(piece)
        if total > most:
            raise InvalidRequest(f"the request has more than {most:,} bytes")
        pieces.append(piece)
    return b"".join(pieces)


def limits_of(request: dict[str, Any]) -> Limits:
    """The limits that a request for a sandbox names; whether there is as much is for an edge to say. Raises InvalidRequest."""
    try:
        return Limits(**request.get("limits", {}))
    except TypeError as error:
        raise InvalidRequest(f"limits: {error}") from None


def status_of(record: dict[str, Any]) -> int:
    """The HTTP status of an error's record."""
    return _STATUS.get(record["error"], 400 if record["error"] != "SandboxError" else 500)
