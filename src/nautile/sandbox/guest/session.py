"""An interactive program in a guest."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time

from nautile.sandbox.errors import SandboxError, SandboxLost
from nautile.sandbox.guest import link as wire
from nautile.sandbox.guest.link import Stream

__all__ = ["GuestSession", "bridge"]

_MOST = 16 * 2**20  # bytes that ``until`` reads at most
_GRACE = 10.0
_PATIENCE = 10.0**7  # seconds; what is typed waits for as long as the program does not read


class GuestSession:
    """``send``, ``read``, ``until``, ``close``: see ``driver.Terminal``."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._code = stream, -1
        self._ended = self._closed = False

    def send(self, data: str | bytes) -> None:
        """Type. Raises SandboxError when the program does not read for ten seconds."""
        if self._ended or self._closed:
            raise SandboxLost("the session has ended")
        view = memoryview(data.encode() if isinstance(data, str) else data)
        deadline = time.monotonic() + 10.0
        while view:
            if count := self._stream.feed(view):
                view = view[count:]
            elif time.monotonic() > deadline:
                raise SandboxError("the program in the session does not read its input")
            else:
                self._stream.link.pump(deadline)

    def read(self, timeout: float = 1.0) -> bytes:
        """What has been written, as soon as there is something; empty after ``timeout`` seconds or at the end."""
        deadline = time.monotonic() + timeout
        while not (self._ended or self._closed):
            event = self._stream.next(deadline)
            if event is None:
                if time.monotonic() >= deadline:
                    return b""
                continue
            kind, data = event
            if kind in (wire.OUT, wire.ERR):
                return data
            self._ended = True
            if kind == wire.FAILED:
                raise SandboxLost(f"the session did not start: {data.decode('utf-8', 'replace')[:200]}")
            if self._stream.ended is not None:
                self._code = self._stream.ended.code
        return b""

    def until(self, text: str, timeout: float = 10.0) -> str:
        """Read until ``text`` has come; all that was read. Raises SandboxError when it does not come."""
        deadline, seen = time.monotonic() + timeout, bytearray()
        while text.encode() not in seen:
            left = deadline - time.monotonic()
            data = self.read(left) if left > 0 else b""
            if not data or len(seen) > _MOST:
                tail = bytes(seen[-200:]).decode("utf-8", "replace")
                raise SandboxError(f"the session did not write {text!r} within {timeout:g} s; it ended with {tail!r}")
            seen += data
        return seen.decode("utf-8", "replace")

    def resize(self, rows: int, columns: int) -> None:
        """Tell the terminal its size."""
        self._stream.resize(rows, columns)

    def close(self) -> int:
        """Kill it with everything it started; its exit code, -1 if it had not ended by itself."""
        if self._closed:
            return self._code
        deadline = time.monotonic() + 0.2  # a program that is just ending is heard out
        try:
            while not self._ended and time.monotonic() < deadline:
                self.read(deadline - time.monotonic())
            self._closed = True
            if not self._ended:
                self._stream.kill()
                end = time.monotonic() + _GRACE
                while (event := self._stream.next(end)) is None or event[0] in (wire.OUT, wire.ERR):
                    if time.monotonic() > end:
                        raise SandboxLost("the session could not be killed")
        except SandboxLost:
            if self._stream.link.lost is None:
                raise
        self._closed = True
        return self._code


def bridge(session: GuestSession, channel: socket.socket, owner: socket.socket) -> int:
    """Connect a program's terminal with ``channel`` until it ends or ``owner`` hangs up; what ``close`` gives."""

    def typed() -> None:
        with contextlib.suppress(SandboxLost, OSError):
            while data := channel.recv(2**16):
                session._stream.feed_all(data, _PATIENCE)
            if session._stream.ended is None:
                session._stream.end_input()

    threading.Thread(target=typed, name="guest-terminal", daemon=True).start()
    hung_up = select.poll()
    hung_up.register(owner.fileno(), select.POLLIN)
    with contextlib.suppress(SandboxLost, OSError):
        while not session._ended and not hung_up.poll(0):
            if data := session.read(0.1):
                channel.sendall(data)
    with contextlib.suppress(OSError):
        channel.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(SandboxLost):
        return session.close()
    return -1
