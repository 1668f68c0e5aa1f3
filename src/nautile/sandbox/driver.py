"""What a substrate must do. The SDK checks requests, keeps the log and says no; a driver does one thing at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nautile.sandbox.image import Image
from nautile.sandbox.policy import NetworkPolicy
from nautile.sandbox.result import Capabilities, Entry, Info, RunResult

__all__ = ["Driver", "Environment", "Order", "Terminal", "Watch"]

Watch = Callable[[str, bytes], None]


@dataclass(frozen=True)
class Order:
    """One command, checked: either ``argv`` or ``python`` (a program for the interpreter inside; ``argv``: its arguments)."""

    argv: tuple[str, ...]
    stdin: bytes
    timeout: float
    cwd: str | None
    environment: Mapping[str, str]
    python: str | None = None
    idempotent: bool = False  # may run twice, if nobody can say whether it ran
    operation: str | None = None  # the log's name for it: a keeper runs an operation of one name only once


class Terminal(Protocol):
    """An interactive program: what ``Sandbox.session`` returns."""

    def send(self, data: str | bytes) -> None:
        """Type."""

    def read(self, timeout: float = 1.0) -> bytes:
        """What has been written, as soon as there is something; empty after ``timeout`` seconds or at the end."""

    def until(self, text: str, timeout: float = 10.0) -> str:
        """Read until ``text`` has come. Raises SandboxError when it does not."""

    def close(self) -> int:
        """Kill it with everything it started; its exit code."""


class Driver(Protocol):
    """A sandbox of one substrate: what every one can do."""

    info: Info
    capabilities: Capabilities

    def reason(self, feature: str) -> tuple[str, str]:
        """(why, remedy) for a capability that is False."""

    def run(self, order: Order, watch: Watch | None) -> RunResult:
        """Run one command to its end. A sandbox that fails under it is in the result."""

    def close(self) -> None:
        """End it; nothing of it stays."""


class Environment(Driver, Protocol):
    """A sandbox that keeps files and processes between commands."""

    def read(self, path: str, limit: int) -> bytes: ...

    def write(self, path: str, data: bytes, mode: int) -> None: ...

    def list(self, path: str) -> list[Entry]: ...

    def upload(self, source: Path, path: str) -> None: ...

    def download(self, path: str, target: Path, limit: int) -> None: ...

    def session(self, argv: Sequence[str], pty: bool) -> Terminal: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def snapshot(self) -> Image: ...

    def fork(self) -> Environment: ...

    def pack_diff(self, target: Path) -> str: ...

    def set_policy(self, policy: NetworkPolicy) -> None: ...
