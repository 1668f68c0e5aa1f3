"""The model's turn as Anthropic's Messages API tells it: blocks that start, grow and stop, and the message they belong to."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from nautile.protocol import ContentDelta, ReasoningDelta, ToolCall, ToolCallEnd
from nautile.server.messages_request import Wanted
from nautile.server.turn import TurnEvent, TurnFinished, TurnStarted, TurnUsage

__all__ = ["MessageWriter"]

Event = dict[str, Any]
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageWriter:
    """Turns a turn's events into the API's and keeps the message up to date. Written by the endpoint only."""

    def __init__(self, wanted: Wanted, model: str) -> None:
        self._wanted = wanted
        self._block: dict[str, Any] | None = None  # the text or thinking that is being written
        self.message: dict[str, Any] = {
            "id": f"msg_{wanted.turn.id}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(TurnUsage(0, 0, 0, 0)),
        }

    def events(self, event: TurnEvent) -> Iterator[Event]:
        """What one event of the turn becomes."""
        if isinstance(event, TurnStarted):
            self.message["usage"] = _usage(TurnUsage(event.prompt_tokens, event.cached_tokens, 0, 0))
            yield {"type": "message_start", "message": {**self.message, "content": []}}
            yield {"type": "ping"}
        elif isinstance(event, ReasoningDelta):
            yield from self._text("thinking", event.text)
        elif isinstance(event, ContentDelta):
            yield from self._text("text", event.text)
        elif isinstance(event, ToolCallEnd):
            yield from self._closed()
            yield from self._call(event.call)
        elif isinstance(event, TurnFinished):
            yield from self._finished(event)

    def _text(self, kind: str, text: str) -> Iterator[Event]:
        if self._block is None or self._block["type"] != kind:
            yield from self._closed()
            self._block = {"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})}
            self.message["content"].append(self._block)
            yield self._event("start", content_block=dict(self._block))
        self._block[kind] += text
        yield self._event("delta", delta={"type": f"{kind}_delta", kind: text})

    def _closed(self) -> Iterator[Event]:
        """The block that was being written is complete; thinking gets its signature."""
        if self._block is None:
            return
        if self._block["type"] == "thinking":
            self._block["signature"] = _signature(self._block["thinking"])
            yield self._event("delta", delta={"type": "signature_delta", "signature": self._block["signature"]})
        yield self._event("stop")
        self._block = None

    def _call(self, call: ToolCall) -> Iterator[Event]:
        """A call, which is known as a whole: its input comes in one delta."""
        block = {"type": "tool_use", "id": call.id, "name": self._wanted.names.client(call.name).name}
        self.message["content"].append({**block, "input": json.loads(call.arguments)})
        yield self._event("start", content_block={**block, "input": {}})
        yield self._event("delta", delta={"type": "input_json_delta", "partial_json": call.arguments})
        yield self._event("stop")

    def _finished(self, event: TurnFinished) -> Iterator[Event]:
        yield from self._closed()
        stopped = event.stop_sequence is not None and event.reason != "tool_calls"
        ending = {
            "stop_reason": "stop_sequence" if stopped else _REASONS[event.reason],
            "stop_sequence": event.stop_sequence if stopped else None,
        }
        self.message |= {**ending, "usage": _usage(event.usage)}
        yield {"type": "message_delta", "delta": ending, "usage": self.message["usage"]}
        yield {"type": "message_stop"}

    def _event(self, step: str, **fields: Any) -> Event:
        return {"type": f"content_block_{step}", "index": len(self.message["content"]) - 1, **fields}


def _signature(thinking: str) -> str:
    """Something to hand back with the thinking, as clients expect. Nothing depends on it: the text itself is read."""
    return base64.b64encode(hashlib.sha256(thinking.encode("utf-8", "replace")).digest()).decode()


def _usage(usage: TurnUsage) -> dict[str, Any]:
    """Anthropic counts what came from the cache apart from the rest of the input."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }
