"""What every sandbox offers: run a one-file Python program on one directory with one JSON request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Sandbox", "SandboxError"]


class SandboxError(RuntimeError):
    """The sandbox itself failed; the text says what to do. A failing tool is not this: it is an answer."""


class Sandbox(Protocol):
    """Runs programs that see one directory as their working directory."""

    @property
    def root(self) -> Path:
        """The directory, as the host names it."""

    @property
    def confinement(self) -> str:
        """What stands between the program and the host, for reports: ``bubblewrap``, ``none``, ``in-process``."""

    def call(self, program: Path, request: Mapping[str, Any], *, time_limit: float) -> dict[str, Any]:
        """Give ``request`` as JSON to ``program`` and return the JSON object that it answers with.

        ``program`` needs the standard library only. After ``time_limit`` seconds it is killed with its children. Raises
        SandboxError when there is no answer.
        """
