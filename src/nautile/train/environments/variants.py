"""Harder forms of the tool tasks: the same ones in other words.

What supervised training has mastered gives a group of rollouts no variance; these do (docs/rl.md has the rates). Each is an
environment like any other, with the expert and the grader of its task. None of them uses what evaluation keeps for itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from nautile.train.environments.rewordings import FRESH, PRACTISED, UNDECIDED
from nautile.train.environments.tool import ToolEnvironment, tool_environment
from nautile.train.tasks import KINDS, Kind

__all__ = ["FRESH_REWORDED", "REWORDED", "UNDECIDED_REWORDED"]


def _reworded(kind: type[Kind], prefix: str, sentences: Sequence[str]) -> type[ToolEnvironment]:
    words = {"name": f"{prefix}_{kind.name}", "templates": tuple(sentences), "__doc__": kind.__doc__}
    return tool_environment(type(f"{prefix.title()}{kind.__name__}", (kind,), words))


REWORDED: tuple[type[ToolEnvironment], ...] = tuple(
    _reworded(KINDS[name], "reworded", sentences) for name, sentences in PRACTISED.items()
)
# The part of them that reinforcement can learn from.
UNDECIDED_REWORDED: tuple[type[ToolEnvironment], ...] = tuple(
    _reworded(KINDS[name], "undecided", [PRACTISED[name][place] for place in places]) for name, places in UNDECIDED.items()
)
# For measuring only: sentences that reinforcement has not practised either.
FRESH_REWORDED: tuple[type[ToolEnvironment], ...] = tuple(
    _reworded(KINDS[name], "fresh", sentences) for name, sentences in FRESH.items()
)
