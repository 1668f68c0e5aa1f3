"""The fourteen kinds of tool tasks as environments: the task, its expert and its grader are those of ``train.tasks``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from nautile.train.environment import Action, Environment, Grade, Outcome, Script
from nautile.train.tasks import KINDS, Kind

__all__ = ["TOOL_ENVIRONMENTS", "ToolEnvironment", "tool_environment"]


class ToolEnvironment(Environment):
    """One task of ``source``."""

    source: ClassVar[type[Kind]]

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.task = self.source.from_seed(seed)

    @property
    def prompt(self) -> str:
        """See ``Environment.prompt``."""
        return self.task.prompt

    def files(self) -> Mapping[str, bytes]:
        """See ``Environment.files``."""
        return self.task.files

    def grade(self, outcome: Outcome) -> Grade:
        """The task's own grader: the answer, and exactly the files that should be there."""
        return Grade.of(self.task.grade(outcome.root, outcome.answer), "a wrong answer, or a wrong directory")

    def expert(self) -> Script:
        """The scripted steps."""
        steps = tuple(Action(step.tool, dict(step.arguments)) for step in self.task.expert())
        return Script("expert", steps, self.task.final)

    def adversaries(self) -> tuple[Script, ...]:
        """Doing nothing, claiming it is done, answering with everything at once, and doing it with damage on the side."""
        expert, task = self.expert(), self.task
        everything = " ".join(sorted({text for content in task.files.values() for text in content.decode().split()})[:4000])
        numbers = " ".join(map(str, range(400)))
        stray = Action("run", {"command": "echo 1 > left_behind.txt"})
        wipe = Action("run", {"command": "rm -rf ./* .[a-z]*"})
        tricks = [
            Script("silent", (), ""),
            Script("a wrong answer", (), f"{task.answer or 'done'}1") if task.answer else Script("only claims", (), task.final),
            Script("every word of the files", (), everything),
            Script("every number", (), numbers),
            Script("leaves a file behind", (*expert.actions, stray), expert.answer),
            Script("removes the files", (*expert.actions, wipe), expert.answer),
        ]
        return tuple(tricks)


def tool_environment(kind: type[Kind]) -> type[ToolEnvironment]:
    """The environment of a kind of task, under the kind's name."""
    name = "".join(part.capitalize() for part in kind.name.split("_")) + "Environment"
    return type(name, (ToolEnvironment,), {"kind": kind.name, "source": kind, "__doc__": kind.__doc__})


TOOL_ENVIRONMENTS: tuple[type[ToolEnvironment], ...] = tuple(tool_environment(kind) for kind in KINDS.values())
