"""A conversation put together from the pieces that other APIs have for it, as the messages that the protocol takes."""

from __future__ import annotations

from typing import Any

from nautile.server.errors import invalid

__all__ = ["History"]


class History:
    """Collects messages in order. Pieces of one assistant turn (reasoning, text, calls) become one message.

    Instructions that come before everything else make the system message. Later ones stay where they are, as text of the
    user's turn: V4 has no system message inside a conversation, and moving them to the front would change the beginning of
    every prompt that follows, which is what the cache goes by.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None

    def system(self, text: str) -> None:
        """Instructions."""
        if any(message["role"] != "system" for message in self.messages):
            self.user(text)
        elif self.messages:
            self.messages[0]["content"] += f"\n\n{text}"
        else:
            self.messages.append({"role": "system", "content": text})

    def user(self, text: str) -> None:
        """What a user says."""
        self._open = None
        self.messages.append({"role": "user", "content": text})

    def result(self, call_id: str, text: str) -> None:
        """What a tool gave."""
        self._open = None
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def reasoning(self, text: str) -> None:
        """Reasoning of the assistant, before what it led to."""
        message = self._assistant()
        message["reasoning_content"] = _joined(message.get("reasoning_content"), text)

    def answer(self, text: str) -> None:
        """Text of the assistant."""
        message = self._assistant()
        message["content"] = _joined(message["content"], text)

    def call(self, call_id: str, name: str, arguments: str | dict[str, Any]) -> None:
        """A call of the assistant."""
        function = {"name": name, "arguments": arguments}
        calls: list[dict[str, Any]] = self._assistant().setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": function})

    def finished(self) -> tuple[dict[str, Any], ...]:
        """All messages. Raises ApiError 400 when there is nothing to answer."""
        if all(message["role"] == "system" for message in self.messages):
            raise invalid("Empty input messages")
        return tuple(self.messages)

    def _assistant(self) -> dict[str, Any]:
        if self._open is None:
            self._open = {"role": "assistant", "content": ""}
            self.messages.append(self._open)
        return self._open


def _joined(before: str | None, text: str) -> str:
    return f"{before}\n\n{text}" if before and text else before or text
