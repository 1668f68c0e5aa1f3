"""Messages over a Unix socket: a JSON header and a body of bytes, whose lengths are checked before anything is read."""

from __future__ import annotations

import json
import socket
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["BODY_LIMIT", "HEADER_LIMIT", "BrokenFrameError", "receive", "send"]

HEADER_LIMIT = 16 * 2**20  # bytes; commands, file lists
BODY_LIMIT = 64 * 2**20  # bytes of one frame; longer transfers take several
_LENGTHS = struct.Struct("<II")


class BrokenFrameError(RuntimeError):
    """The other side sent something that is no frame, or hung up in the middle of one."""


def send(channel: socket.socket, header: dict[str, Any], *body: bytes | bytearray | memoryview) -> None:
    """Write one frame; its body may come in pieces. Raises OSError when nobody reads, BrokenFrameError when it is too long."""
    text = json.dumps(header, separators=(",", ":")).encode()
    length = sum(map(len, body))
    if len(text) > HEADER_LIMIT or length > BODY_LIMIT:
        raise BrokenFrameError(f"a frame of {len(text):,} + {length:,} bytes is too long")
    pieces = [memoryview(piece) for piece in (_LENGTHS.pack(len(text), length) + text, *body) if piece]
    while pieces:  # never joined: that would be a second copy
        sent = channel.sendmsg(pieces)
        while pieces and sent >= len(pieces[0]):
            sent -= len(pieces.pop(0))
        if sent:
            pieces[0] = pieces[0][sent:]


def receive(channel: socket.socket) -> tuple[dict[str, Any], bytes] | None:
    """Read one frame; None at the end of the stream. Raises BrokenFrameError, OSError."""
    lengths = _exactly(channel, _LENGTHS.size, may_end=True)
    if lengths is None:
        return None
    header_length, body_length = _LENGTHS.unpack(lengths)
    if header_length > HEADER_LIMIT or body_length > BODY_LIMIT:
        raise BrokenFrameError(f"a frame of {header_length:,} + {body_length:,} bytes was announced")
    text = _exactly(channel, header_length) or b""
    body = _exactly(channel, body_length) or b""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise BrokenFrameError("the header is not JSON") from None
    if not isinstance(header, dict):
        raise BrokenFrameError("the header is not an object")
    return header, bytes(body)


def _exactly(channel: socket.socket, length: int, may_end: bool = False) -> bytearray | None:
    pieces = bytearray()
    while len(pieces) < length:
        data = channel.recv(min(length - len(pieces), 2**20))
        if not data:
            if may_end and not pieces:
                return None
            raise BrokenFrameError("the stream ended inside a frame")
        pieces += data
    return pieces
