"""An interactive program in a sandbox, behind a pseudo-terminal or a pair of pipes that its client holds."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time

from nautile.sandbox.errors import SandboxError, SandboxLost
from nautile.sandbox.inside import frames

__all__ = ["Session"]

_MOST = 16 * 2**20  # bytes that ``until`` reads at most
_ENDING = 10.0  # seconds in which the exit code of a program that has closed its side must come: what it left is killed first


class Session:
    """``send``, ``read``, ``until``, ``close``. It ends when it is closed, when its program ends, or when its client dies."""

    def __init__(self, channel: socket.socket, descriptor: int) -> None:
        self._channel, self._descriptor = channel, descriptor
        self._code: int | None = None
        os.set_blocking(descriptor, False)

    @classmethod
    def receive(cls, channel: socket.socket) -> Session:
        """Take the terminal that a keeper hands over. Raises SandboxLost, or what the keeper met."""
        mark, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
        if descriptors:
            return cls(channel, descriptors[0])
        from nautile.sandbox.container import answer  # noqa: PLC0415

        if mark:  # the first byte of a frame that holds an error: read its rest
            raise SandboxLost("the session did not start")
        answer(channel)
        raise SandboxLost("the session did not start")

    def send(self, data: str | bytes) -> None:
        """Type. Raises SandboxError when the program does not read for ten seconds."""
        view = memoryview(data.encode() if isinstance(data, str) else data)
        deadline = time.monotonic() + 10.0
        while view:
            try:
                view = view[os.write(self._descriptor, view) :]
            except BlockingIOError:
                if not select.select([], [self._descriptor], [], max(deadline - time.monotonic(), 0))[1]:
                    raise SandboxError("the program in the session does not read its input") from None
            except OSError as error:
                raise SandboxLost(f"the session has ended ({error.strerror})") from None

    def read(self, timeout: float = 1.0) -> bytes:
        """What has been written, as soon as there is something; empty after ``timeout`` seconds or at the end."""
        if not select.select([self._descriptor], [], [], timeout)[0]:
            return b""
        with contextlib.suppress(OSError):  # a terminal whose other side has closed gives EIO
            return os.read(self._descriptor, 2**16)
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

    def close(self) -> int:
        """Kill it with everything it started; its exit code, -1 if it had not ended by itself."""
        if self._code is None:
            self._code = -1
            self._channel.settimeout(_ENDING if self._hung_up() else 0.2)
            with contextlib.suppress(OSError, frames.BrokenFrameError):
                message = frames.receive(self._channel)
                self._code = int(message[0]["exit_code"]) if message is not None else -1
            self._channel.close()
            os.close(self._descriptor)
        return self._code

    def _hung_up(self) -> bool:
        """Whether nobody holds the other side any more: the program has ended, or is about to."""
        poll = select.poll()
        poll.register(self._descriptor, 0)
        return bool(poll.poll(0))
