"""The agent: the loop, its tools, its log. Names are resolved on first use, so that the toolbox can be had alone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nautile.agent.client import Chat, ChatClient, EngineClient, Reply
    from nautile.agent.loop import Agent, AgentError, Budget, Front, OutcomeUnknownError, Unattended
    from nautile.agent.tools import SYSTEM_PROMPT, TOOLS
    from nautile.agent.trajectory import Journal, JournalError, Trajectory
    from nautile.agent.undo import UndoError

__all__ = [
    "SYSTEM_PROMPT", "TOOLS", "Agent", "AgentError", "Budget", "Chat", "ChatClient", "EngineClient", "Front", "Journal",
    "JournalError", "OutcomeUnknownError", "Reply", "Trajectory", "Unattended", "UndoError",
]  # fmt: skip

_HOMES = {
    "client": ("Chat", "ChatClient", "EngineClient", "Reply"),
    "loop": ("Agent", "AgentError", "Budget", "Front", "OutcomeUnknownError", "Unattended"),
    "tools": ("SYSTEM_PROMPT", "TOOLS"),
    "trajectory": ("Journal", "JournalError", "Trajectory"),
    "undo": ("UndoError",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"nautile.agent.{home}"), name)
    raise AttributeError(f"module 'nautile.agent' has no attribute {name!r}")
