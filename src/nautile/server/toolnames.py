"""Names of tools: what a client calls them, and what the model sees.

The prompt's names are made of letters, digits, ``_`` and ``-``. Clients have others (``mcp.files/read``) and namespaces. Each
gets a name that the model can write, and calls go back under the client's own.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from nautile.server.errors import invalid

__all__ = ["ToolName", "ToolNames"]

_REFUSED = re.compile(r"[^a-zA-Z0-9_-]")


class ToolName(NamedTuple):
    """A client's name for a tool."""

    name: str
    namespace: str | None = None


class ToolNames:
    """The names of one request's tools, both ways."""

    def __init__(self) -> None:
        self._seen: dict[ToolName, str] = {}
        self._clients: dict[str, ToolName] = {}

    def add(self, name: str, namespace: str | None = None) -> str:
        """Declare a tool; gives the model's name for it. Raises ApiError 400 for a tool that was declared before."""
        own = ToolName(name, namespace)
        if own in self._seen:
            raise invalid("Tool names must be unique.", "tools")
        plain = seen = _written(own)
        count = 1
        while seen in self._clients:
            count += 1
            seen = f"{plain}_{count}"
        self._seen[own], self._clients[seen] = seen, own
        return seen

    def seen(self, name: str, namespace: str | None = None) -> str:
        """The model's name for a tool of the history or of tool_choice, declared or not."""
        own = ToolName(name, namespace)
        return self._seen.get(own) or _written(own)

    def client(self, seen: str) -> ToolName:
        """The client's name for what the model called."""
        return self._clients.get(seen, ToolName(seen))

    def declared(self, seen: str) -> bool:
        """Whether the model was offered a tool of this name."""
        return seen in self._clients


def _written(own: ToolName) -> str:
    if own.namespace is None:
        return _REFUSED.sub("_", own.name)
    return _REFUSED.sub("_", f"{own.namespace.removesuffix('__')}__{own.name}")
