"""Does an environment reward its expert and nobody else? Each script runs in a sandbox of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nautile.sandbox import SandboxError
from nautile.sandbox.tools import open_tools
from nautile.train.environment import Call, Environment, Grade, Outcome, Script, clear

__all__ = ["Checked", "check", "play"]

_SECONDS = 20.0  # of one call


@dataclass(frozen=True)
class Checked:
    """One script of one task: what it was rewarded with, and whether that is right."""

    kind: str
    seed: int
    script: str
    grade: Grade
    right: bool


def play(task: Environment, script: Script, root: Path, substrate: str = "function") -> Grade:
    """Run a script on the empty directory ``root`` and grade what came of it."""
    task.set_up(root)
    sandbox = open_tools(root, substrate)
    calls: list[Call] = []
    try:
        for action in script.actions:
            try:
                done = task.execute(sandbox, action.tool, action.arguments, _SECONDS)
            except SandboxError as error:
                calls.append(Call(action.tool, action.arguments, f"error: {error}", False))
            else:
                calls.append(Call(action.tool, action.arguments, done.output, done.ok))
    finally:
        close = getattr(sandbox, "close", None)
        if close is not None:
            close()
    return task.grade(Outcome(root, script.answer, tuple(calls)))


def check(kinds: Sequence[type[Environment]], seeds: Sequence[int], substrate: str = "function") -> Iterator[Checked]:
    """Every kind's expert (must get 1) and adversaries (must get 0) for each seed. Raises SandboxError without a sandbox."""
    for kind in kinds:
        for seed in seeds:
            task = kind(seed)
            for index, script in enumerate((task.expert(), *task.adversaries())):
                with tempfile.TemporaryDirectory(prefix="nautile-check-") as scratch:
                    root = Path(scratch, "work")
                    root.mkdir()
                    grade = play(task, script, root, substrate)
                    clear(root)
                yield Checked(kind.kind, seed, script.name, grade, grade.reward == float(index == 0))
