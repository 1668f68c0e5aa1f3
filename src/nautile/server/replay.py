"""Calls as the model wrote them, for clients that send them back in a form of their own.

Claude Code adds default values to a call's arguments and reorders them. Rendered that way the call is another text than the
one that was sampled, and the cache misses from there on. Where the client's arguments say the same, the model's own are used.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nautile.protocol import ToolCall

__all__ = ["CallReplay"]

Message = Mapping[str, Any]


class CallReplay:
    """The arguments of the last calls, by the caller's partition and the call's id. Safe to use from several threads."""

    def __init__(self, limit: int = 16 * 2**20) -> None:
        """``limit`` is in characters, of all calls together; the oldest go first."""
        self._limit, self._size, self._lock = limit, 0, threading.Lock()
        self._written: OrderedDict[tuple[str, str], str] = OrderedDict()

    def remember(self, partition: str, calls: Iterable[ToolCall]) -> None:
        """Keep the arguments of calls that were made."""
        with self._lock:
            for call in calls:
                self._size -= len(self._written.pop((partition, call.id), ""))
                self._written[partition, call.id] = call.arguments
                self._size += len(call.arguments)
            while self._size > self._limit:
                _, arguments = self._written.popitem(last=False)
                self._size -= len(arguments)

    def replayed(self, partition: str, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The messages, with the model's own arguments in the calls that still say what it wrote."""
        return tuple(self._message(partition, message) if message.get("tool_calls") else message for message in messages)

    def _message(self, partition: str, message: Message) -> Message:
        calls = []
        for call in message["tool_calls"]:
            with self._lock:
                written = self._written.get((partition, call["id"]))
            function = call["function"]
            if written is not None and _says(function.get("arguments"), json.loads(written)):
                call = {**call, "function": {**function, "arguments": written}}  # noqa: PLW2901
            calls.append(call)
        return {**message, "tool_calls": calls}


def _says(sent: Any, written: Mapping[str, Any]) -> bool:
    """Whether arguments hold every value that the model wrote; more of them are the client's defaults."""
    if isinstance(sent, str):
        try:
            sent = json.loads(sent or "{}")
        except (ValueError, RecursionError):
            return False
    return isinstance(sent, Mapping) and all(name in sent and _same(sent[name], value) for name, value in written.items())


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON values: true is not 1, the order of keys does not count."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
