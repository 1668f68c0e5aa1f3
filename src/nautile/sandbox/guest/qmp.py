"""QEMU's control channel: one JSON object a line, and descriptors beside it."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

from nautile.sandbox.errors import SandboxLost

__all__ = ["Monitor"]

_LONGEST = 4 * 2**20  # bytes of one answer
_PATIENCE = 30.0
_WITHOUT_MEMORY = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}  # it is in a file that is shared


class Monitor:
    """Speaks to one emulator. Every method raises SandboxLost when that is gone, refuses, or does not answer."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel, self._buffer, self._ready, self._serial = channel, b"", False, 0
        channel.settimeout(_PATIENCE)

    def ask(self, command: str, arguments: dict[str, Any] | None = None, descriptor: int | None = None) -> Any:
        """Execute a command and return its result. ``descriptor`` goes along, for ``getfd`` and ``add-fd``."""
        if not self._ready:
            self._read()  # the greeting
            self._ready = True
            self.ask("qmp_capabilities")
        self._serial += 1
        request: dict[str, Any] = {"execute": command, "id": self._serial}
        if arguments:
            request["arguments"] = arguments
        data = json.dumps(request).encode() + b"\n"
        try:
            if descriptor is None:
                self._channel.sendall(data)
            else:
                socket.send_fds(self._channel, [data], [descriptor])
        except OSError as error:
            raise SandboxLost(f"the emulator has gone ({error})") from None
        while True:
            answer = self._read()
            if answer.get("id") == self._serial:
                break
        if "error" in answer:
            raise SandboxLost(f"the emulator refused {command}: {answer['error'].get('desc', answer['error'])}")
        return answer["return"]

    def _read(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            try:
                data = self._channel.recv(65536)
            except OSError as error:
                raise SandboxLost(f"the emulator does not answer ({error})") from None
            if not data or len(self._buffer) > _LONGEST:
                raise SandboxLost("the emulator hung up")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise SandboxLost("the emulator sent something that is no answer")
        return answer

    def load(self, descriptor: int) -> None:
        """Let a machine that was started for it go on from a saved state."""
        self.ask("migrate-set-capabilities", _WITHOUT_MEMORY)
        self.ask("getfd", {"fdname": "state"}, descriptor)
        self.ask("migrate-incoming", {"uri": "fd:state"})
        self._finished("read its state")
        self.ask("cont")  # it was stopped when its state was saved

    def save(self, descriptor: int) -> None:
        """Write the state of a stopped machine, without its memory, into a file."""
        self.ask("migrate-set-capabilities", _WITHOUT_MEMORY)
        self.ask("getfd", {"fdname": "state"}, descriptor)
        self.ask("migrate", {"uri": "fd:state"})
        self._finished("write its state")

    def _finished(self, what: str) -> None:
        deadline = time.monotonic() + _PATIENCE
        while (status := self.ask("query-migrate").get("status")) not in ("completed", "failed"):
            if time.monotonic() > deadline:
                raise SandboxLost(f"the emulator did not {what} in time")
            time.sleep(0.002)
        if status == "failed":
            raise SandboxLost(f"the emulator could not {what}")

    def console(self) -> str:
        """The last of what the guest has written on its console."""
        return str(self.ask("ringbuf-read", {"device": "console", "size": 16384}))

    def close(self) -> None:
        """Hang up."""
        self._channel.close()
