"""A ``Sandbox`` as the place where an agent's tools run: the toolbox is given to the interpreter inside, with its request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nautile.sandbox.base import ToolSandbox
from nautile.sandbox.errors import InvalidRequest, SandboxError
from nautile.sandbox.limits import MIB, Limits
from nautile.sandbox.sandbox import Sandbox

__all__ = ["SandboxTools", "open_tools"]


class SandboxTools:
    """One sandbox with the agent's directory at /workspace, for as long as the agent works."""

    def __init__(self, sandbox: Sandbox, root: Path) -> None:
        self.sandbox, self.root = sandbox, root
        self.confinement = f"{sandbox.info.kind} ({sandbox.info.runtime})"

    def call(self, program: Path, request: Mapping[str, Any], *, time_limit: float) -> dict[str, Any]:
        """See ``ToolSandbox.call``."""
        source = program.read_text(encoding="utf-8")
        result = self.sandbox.python(source, ["/workspace"], timeout=time_limit, stdin=json.dumps(request))
        if result.infrastructure_error is not None:
            raise SandboxError(result.infrastructure_error)
        if result.timed_out:
            raise SandboxError(f"the tool did not answer within {time_limit:g} s and was killed")
        if result.truncated:
            raise SandboxError("the tool wrote more than an answer can hold")
        try:
            answer = json.loads(result.stdout)
        except ValueError:
            said = result.stderr.strip().splitlines()
            reason = "it exceeded its memory limit" if result.memory_killed else said[-1] if said else "it was killed"
            raise SandboxError(f"the tool gave no answer: {reason}") from None
        if not isinstance(answer, dict):
            raise SandboxError("the tool gave an answer that is not an object")
        return answer

    def close(self) -> None:
        """End the sandbox; the directory stays."""
        self.sandbox.close()


def open_tools(directory: Path, kind: str, *, emulate: bool = False) -> ToolSandbox:
    """Tools of an agent on ``directory`` in a sandbox of ``kind``; ``emulate``: machines need no KVM.

    Raises what ``Sandbox.create`` raises.
    """
    if not directory.is_dir():
        raise InvalidRequest(f"{directory} is not a directory: give --dir the directory to work on")
    root = directory.resolve()
    # The most that a result holds: a cut answer is an error, since half of it cannot be parsed.
    limits = Limits(memory=1024 * MIB, output=31 * MIB, pids=512)
    return SandboxTools(Sandbox.create(kind, limits=limits, workspace=root, allow_emulation=emulate), root)
