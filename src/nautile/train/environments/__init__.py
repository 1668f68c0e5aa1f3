"""Every environment by its kind: the trained ones wrap the tool tasks, the held-out ones no training data touches."""

from __future__ import annotations

from nautile.train.environment import Environment
from nautile.train.environments.chain import FollowChain
from nautile.train.environments.mcp import StockQuestion
from nautile.train.environments.repository import FixBug
from nautile.train.environments.terminal import StatusReport
from nautile.train.environments.tool import TOOL_ENVIRONMENTS

__all__ = ["ENVIRONMENTS", "HELD_OUT", "TRAINED", "environment"]

_ALL: tuple[type[Environment], ...] = (*TOOL_ENVIRONMENTS, StatusReport, FixBug, StockQuestion, FollowChain)
ENVIRONMENTS: dict[str, type[Environment]] = {one.kind: one for one in _ALL}
TRAINED = tuple(kind for kind, one in ENVIRONMENTS.items() if not one.held_out)
HELD_OUT = tuple(kind for kind, one in ENVIRONMENTS.items() if one.held_out)


def environment(kind: str) -> type[Environment]:
    """The class of a kind. Raises ValueError for an unknown one."""
    if kind not in ENVIRONMENTS:
        raise ValueError(f"there is no environment {kind!r}; choose from {', '.join(ENVIRONMENTS)}")
    return ENVIRONMENTS[kind]
