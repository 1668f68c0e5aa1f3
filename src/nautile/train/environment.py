"""What an environment is: one Python class a task, with its files, its prompt, its hidden grader, its expert, its adversaries.

An instance is one task, made from a seed. The agent sees ``files`` in a sandbox, ``prompt`` and ``tools``; ``grade`` looks at
what is in the sandbox afterwards and at what was answered. Expected values never enter the sandbox: a hidden check runs the
agent's program there on inputs it has not seen, and compares what comes out here.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from nautile.agent.toolbox import ToolOutput
from nautile.agent.tools import SYSTEM_PROMPT, TOOLS
from nautile.agent.workbench import Workbench
from nautile.sandbox import MIB, Limits, RunResult, Sandbox, ToolSandbox

__all__ = ["Action", "Call", "Environment", "Grade", "Outcome", "Script", "Shape", "write_files"]

Shape = Literal["tool", "terminal", "repository", "mcp"]
_HIDDEN_SECONDS = 20.0  # of one hidden check
_MOST_BYTES = 16 * MIB  # of a workspace that is graded


@dataclass(frozen=True)
class Action:
    """One tool call of a script."""

    tool: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Script:
    """Calls in order and an answer: an expert's, or an adversary's with the name of its trick."""

    name: str
    actions: tuple[Action, ...]
    answer: str


@dataclass(frozen=True)
class Call:
    """A call that was made, and what the tool said."""

    tool: str
    arguments: Mapping[str, Any]
    output: str
    ok: bool


@dataclass(frozen=True)
class Grade:
    """1 for a task that is done, 0 for one that is not, and why."""

    reward: float
    reason: str

    @classmethod
    def of(cls, done: bool, otherwise: str) -> Grade:
        """1 when ``done``, else 0 and ``otherwise``."""
        return cls(1.0, "done") if done else cls(0.0, otherwise)


@dataclass(frozen=True)
class Outcome:
    """What a grader looks at. ``root`` is the sandbox's workspace, as the host names it."""

    root: Path
    answer: str
    calls: tuple[Call, ...] = ()

    def files(self) -> dict[str, bytes]:
        """Plain files of the workspace by relative path; links and special files count as absent."""
        found: dict[str, bytes] = {}
        total = 0
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                status = path.lstat()
                total += status.st_size
                if stat.S_ISREG(status.st_mode) and total <= _MOST_BYTES:
                    found[path.relative_to(self.root).as_posix()] = path.read_bytes()
        return found

    def hidden_run(self, command: Sequence[str], hidden: Mapping[str, bytes] | None = None, stdin: str = "") -> RunResult:
        """Run a command on a copy of the workspace, with ``hidden`` files written over it, in a fresh function sandbox.

        ``python3`` should be given ``-I``, so that no module of the workspace takes the place of the standard library's.
        Compiled Python is left out: it may be stale, or not be what the source says.
        """
        with tempfile.TemporaryDirectory(prefix="nautile-hidden-") as scratch:
            copy = Path(scratch, "work")
            copy.mkdir()
            kept = {name: content for name, content in self.files().items() if not name.endswith(".pyc")}
            write_files(copy, {**kept, **(hidden or {})})
            limits = Limits(memory=512 * MIB, pids=64, seconds=_HIDDEN_SECONDS)
            with Sandbox.create("function", limits=limits, workspace=copy) as sandbox:
                return sandbox.run(list(command), stdin=stdin)

    def hidden_json(self, driver: str, request: Any) -> Any:
        """The JSON that a Python ``driver`` prints last when it runs on a copy of the workspace with ``request`` on stdin;
        None when it prints none. The driver never holds what is expected."""
        ran = self.hidden_run(["python3", "-I", "-S", "-c", driver], stdin=json.dumps(request))
        lines = ran.stdout.strip().splitlines()
        try:
            return json.loads(lines[-1]) if ran.ok and lines else None
        except ValueError:
            return None


class Environment(ABC):
    """One task. A subclass is one kind of task; ``held_out`` ones are never trained on, nor is any data made of them."""

    kind: ClassVar[str]
    shape: ClassVar[Shape] = "tool"
    held_out: ClassVar[bool] = False

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @property
    def system(self) -> str:
        """The system prompt."""
        return SYSTEM_PROMPT

    @property
    def tools(self) -> tuple[dict[str, Any], ...]:
        """What the model is offered."""
        return TOOLS

    @property
    @abstractmethod
    def prompt(self) -> str:
        """What the user asks."""

    @abstractmethod
    def files(self) -> Mapping[str, bytes]:
        """The workspace before the task, by relative path."""

    @abstractmethod
    def grade(self, outcome: Outcome) -> Grade:
        """Whether the task was done. Trusts nothing that the agent could have written."""

    @abstractmethod
    def expert(self) -> Script:
        """A way to do it that must be rewarded."""

    @abstractmethod
    def adversaries(self) -> tuple[Script, ...]:
        """Tricks that must not be rewarded."""

    def execute(self, sandbox: ToolSandbox, tool: str, arguments: Mapping[str, Any], seconds: float) -> ToolOutput:
        """Carry out a call of the model in the sandbox: a failure is an output. Raises SandboxError when there is no answer."""
        return Workbench(sandbox, seconds).execute(tool, arguments)

    def set_up(self, root: Path) -> None:
        """Write the files into the empty directory ``root``."""
        write_files(root, self.files())


def write_files(root: Path, files: Mapping[str, bytes]) -> None:
    """Write files by relative path below ``root``, directories included. Raises ValueError for a path that leaves it."""
    for name, content in files.items():
        path = Path(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{name} is not a path inside the workspace")
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def clear(root: Path) -> None:
    """Remove everything below a workspace, not the directory itself."""
    for entry in root.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
