"""What the model is told about the tools: every prompt carries these texts, so they are short."""

from __future__ import annotations

from typing import Any

__all__ = ["SYSTEM_PROMPT", "TOOLS", "TOOL_NAMES"]

SYSTEM_PROMPT = "You are Nautile, an agent that works on the files of one directory with tools."

_TEXT = {"type": "string"}
_NUMBER = {"type": "integer"}


def _tool(name: str, description: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS: tuple[dict[str, Any], ...] = (
    _tool("list", "List a directory.", {"path": _TEXT}, []),
    _tool("read", "Show lines of a file.", {"path": _TEXT, "offset": _NUMBER, "limit": _NUMBER}, ["path"]),
    _tool("grep", "Find lines that contain a text.", {"pattern": _TEXT, "path": _TEXT}, ["pattern"]),
    _tool("count", "Count lines that contain a text.", {"pattern": _TEXT, "path": _TEXT}, ["pattern"]),
    _tool("edit", "Replace a text in a file once.", {"path": _TEXT, "old": _TEXT, "new": _TEXT}, ["path", "old", "new"]),
    _tool("run", "Run a shell command.", {"command": _TEXT}, ["command"]),
)
TOOL_NAMES: tuple[str, ...] = tuple(tool["function"]["name"] for tool in TOOLS)
