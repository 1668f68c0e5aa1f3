"""The toolbox as the agent sees it: typed calls, carried out wherever the sandbox says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nautile.agent import toolbox
from nautile.agent.toolbox import ToolOutput
from nautile.sandbox import SandboxError, ToolSandbox

__all__ = ["Edit", "InProcess", "Workbench"]

_PROGRAM = Path(toolbox.__file__)
_MARGIN = 10.0  # seconds that a sandbox may need on top of its tool


@dataclass(frozen=True)
class Edit:
    """What an edit does to a file, known before it is done. ``before`` is the old content in base64."""

    path: str
    diff: str
    before: str
    after_sha256: str


class InProcess:
    """A sandbox that is none: the toolbox in this process. For measurements over generated directories only."""

    def __init__(self, root: Path) -> None:
        self.root, self.confinement = root, "in-process"

    def call(self, program: Path, request: Mapping[str, Any], *, time_limit: float) -> dict[str, Any]:
        """Answer with the toolbox that is already loaded; ``program`` must be it, and the time limit is the tool's own."""
        if program != _PROGRAM:
            raise SandboxError(f"only {_PROGRAM.name} runs in this process")
        return toolbox.answer(request, self.root)


class Workbench:
    """Tools on the sandbox's directory. ``time_limit`` in seconds is for one call."""

    def __init__(self, sandbox: ToolSandbox, time_limit: float = 30.0) -> None:
        self.sandbox, self.time_limit = sandbox, time_limit

    def execute(self, name: str, arguments: Mapping[str, Any]) -> ToolOutput:
        """Run a tool for the model. A sandbox that gives no answer is an error the model gets to see."""
        try:
            answer = self._call({"tool": name, "arguments": arguments, "time_limit": self.time_limit})
        except SandboxError as error:
            return ToolOutput(False, f"error: {error}")
        return _output(answer)

    def preview(self, arguments: Mapping[str, Any]) -> Edit | ToolOutput:
        """What ``edit`` would do, or the error that it would give."""
        try:
            answer = self._call({"operation": "preview_edit", "arguments": arguments})
        except SandboxError as error:
            return ToolOutput(False, f"error: {error}")
        if answer.get("ok") is not True:
            return ToolOutput(False, _output(answer).output)
        return Edit(answer["path"], answer["diff"], answer["before"], answer["after_sha256"])

    def digest(self, path: str) -> ToolOutput:
        """SHA-256 of a text file in hexadecimal, or the error. Raises SandboxError."""
        answer = self._call({"operation": "digest", "arguments": {"path": path}})
        return _output(answer)

    def restore(self, edit: Edit) -> ToolOutput:
        """Put the file back to what it was before ``edit``, if it is still what the edit left. Raises SandboxError."""
        arguments = {"path": edit.path, "before": edit.before, "after_sha256": edit.after_sha256}
        answer = self._call({"operation": "restore", "arguments": arguments})
        return _output(answer)

    def _call(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return self.sandbox.call(_PROGRAM, request, time_limit=self.time_limit + _MARGIN)


def _output(answer: Mapping[str, Any]) -> ToolOutput:
    """An answer as text that can be encoded, whatever a tool sent."""
    text = str(answer.get("output", "")).encode("utf-8", "replace").decode("utf-8")
    return ToolOutput(answer.get("ok") is True, text)
