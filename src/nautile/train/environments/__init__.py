"""Every environment by its kind: the trained ones wrap the tool tasks or are harder forms of them, the held-out ones no
training data touches; ``FRESH_KINDS`` are forms of trained kinds in words that are measured only."""

from __future__ import annotations

from nautile.train.environment import Environment
from nautile.train.environments.chain import FollowChain
from nautile.train.environments.mcp import StockQuestion
from nautile.train.environments.repository import FixBug
from nautile.train.environments.terminal import StatusReport
from nautile.train.environments.tool import TOOL_ENVIRONMENTS
from nautile.train.environments.variants import FRESH_REWORDED, REWORDED, UNDECIDED_REWORDED

__all__ = ["ENVIRONMENTS", "FRESH_KINDS", "HELD_OUT", "TRAINED", "UNDECIDED_KINDS", "environment"]

_ALL: tuple[type[Environment], ...] = (
    *TOOL_ENVIRONMENTS, *REWORDED, *UNDECIDED_REWORDED, *FRESH_REWORDED, StatusReport, FixBug, StockQuestion, FollowChain,
)  # fmt: skip
ENVIRONMENTS: dict[str, type[Environment]] = {one.kind: one for one in _ALL}
UNDECIDED_KINDS = tuple(one.kind for one in UNDECIDED_REWORDED)
FRESH_KINDS = tuple(one.kind for one in FRESH_REWORDED)
TRAINED = tuple(kind for kind, one in ENVIRONMENTS.items() if not one.held_out and kind not in FRESH_KINDS)
HELD_OUT = tuple(kind for kind, one in ENVIRONMENTS.items() if one.held_out)


def environment(kind: str) -> type[Environment]:
    """The class of a kind. Raises ValueError for an unknown one."""
    if kind not in ENVIRONMENTS:
        raise ValueError(f"there is no environment {kind!r}; choose from {', '.join(ENVIRONMENTS)}")
    return ENVIRONMENTS[kind]
