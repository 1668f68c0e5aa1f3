"""The narrow seam that an agent's tools need: run a one-file Python program on one directory with one JSON request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from nautile.sandbox.errors import SandboxError

__all__ = ["SandboxError", "ToolSandbox"]


class ToolSandbox(Protocol):
    """Runs programs that see one directory as their working directory."""

    @property
    def root(self) -> Path:
        """The directory, as the host names it."""

    @property
    def confinement(self) -> str:
        """What stands between the program and the host, for reports: ``bubblewrap``, ``crun``, ``none``, ``in-process``."""

    def call(self, program: Path, request: Mapping[str, Any], *, time_limit: float) -> dict[str, Any]:
        """Give ``request`` as JSON to ``program`` and return the JSON object that it answers with.

        ``program`` needs the standard library only. After ``time_limit`` seconds it is killed with its children. Raises
        SandboxError when there is no answer.
        """
