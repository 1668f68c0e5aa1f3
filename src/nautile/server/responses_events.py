"""The model's turn as the Responses API tells it: items that are added, filled and done, and the response they belong to."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from nautile.protocol import ContentDelta, ReasoningDelta, ToolCall, ToolCallEnd
from nautile.server.responses_request import ResponsesRequest, Wanted
from nautile.server.turn import TokenLogprobs, TurnEvent, TurnFinished, TurnStarted, TurnUsage

__all__ = ["ResponseWriter"]

Event = dict[str, Any]


class ResponseWriter:
    """Turns a turn's events into the API's, numbered, and keeps the response up to date. Written by the endpoint only."""

    def __init__(self, request: ResponsesRequest, wanted: Wanted, model: str, effort: str = "high") -> None:
        """``effort`` is what the server takes where the request names none."""
        self._wanted = wanted
        self._number = 0
        self._item: dict[str, Any] | None = None  # the reasoning or message that is being written
        self.response = _blank(request, wanted, model, effort)

    def events(self, event: TurnEvent) -> Iterator[Event]:
        """What one event of the turn becomes."""
        if isinstance(event, TurnStarted):
            yield self._whole("created")
            yield self._whole("in_progress")
        elif isinstance(event, ReasoningDelta):
            yield from self._text("reasoning", event.text)
        elif isinstance(event, ContentDelta):
            yield from self._text("message", event.text)
        elif isinstance(event, TokenLogprobs) and event.section == "content":
            self._logprobs(event)
        elif isinstance(event, ToolCallEnd):
            yield from self._closed("completed")
            yield from self._call(event.call)
        elif isinstance(event, TurnFinished):
            yield from self._finished(event)

    def failed(self, message: str) -> Event:
        """The turn broke off after it had begun."""
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": message}}
        return self._whole("failed")

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": f"response.{kind}", "sequence_number": self._number - 1, **fields}

    def _whole(self, kind: str) -> Event:
        return self._event(kind, response={**self.response, "output": list(self.response["output"])})

    # Text: one item of reasoning or message with one part

    def _text(self, kind: str, text: str) -> Iterator[Event]:
        if self._item is None or self._item["type"] != kind:
            yield from self._closed("completed")
            yield from self._opened(kind)
        assert self._item is not None
        part = self._item["content"][0]
        part["text"] += text
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        yield self._event(f"{part['type']}.delta", **self._place(), content_index=0, delta=text, **more)

    def _opened(self, kind: str) -> Iterator[Event]:
        if kind == "message":
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item: dict[str, Any] = {"id": self._id("msg"), "type": "message", "role": "assistant"}
        else:
            part = {"type": "reasoning_text", "text": ""}
            item = {"id": self._id("rs"), "type": "reasoning", "summary": [], "encrypted_content": None}
        self._item = {**item, "status": "in_progress", "content": []}
        self.response["output"].append(self._item)
        yield self._event("output_item.added", output_index=self._last, item=dict(self._item))
        self._item["content"] = [part]
        yield self._event("content_part.added", **self._place(), content_index=0, part=dict(part))

    def _closed(self, status: str) -> Iterator[Event]:
        """The item that was being written is complete, or as complete as it gets."""
        if self._item is None:
            return
        item, part, place = self._item, self._item["content"][0], self._place()
        item["status"] = status
        more: dict[str, Any] = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
        yield self._event(f"{part['type']}.done", **place, content_index=0, text=part["text"], **more)
        yield self._event("content_part.done", **place, content_index=0, part=part)
        yield self._event("output_item.done", output_index=self._last, item=item)
        self._item = None

    def _logprobs(self, event: TokenLogprobs) -> None:
        if self._item is not None and self._item["type"] == "message":
            top = [_token(data, logprob) for data, logprob in event.top]
            self._item["content"][0]["logprobs"].append({**_token(event.data, event.logprob), "top_logprobs": top})

    # Calls

    def _call(self, call: ToolCall) -> Iterator[Event]:
        """A call, which is known as a whole: its arguments come in one delta."""
        name, namespace = self._wanted.names.client(call.name)
        free = call.name in self._wanted.custom
        kind, field, value = "custom_tool_call", "input", ""
        if free:
            value = _free_text(call.arguments)
        else:
            kind, field, value = "function_call", "arguments", call.arguments
        item: dict[str, Any] = {"id": self._id("ctc" if free else "fc"), "type": kind, "call_id": call.id, "name": name}
        if namespace is not None:
            item["namespace"] = namespace
        self.response["output"].append({**item, "status": "completed", field: value})
        yield self._event("output_item.added", output_index=self._last, item={**item, "status": "in_progress", field: ""})
        steps = f"{kind}_input" if free else f"{kind}_arguments"
        named = {} if free else {"name": name}
        yield self._event(f"{steps}.delta", **self._place(), delta=value)
        yield self._event(f"{steps}.done", **self._place(), **named, **{field: value})
        yield self._event("output_item.done", output_index=self._last, item=self.response["output"][-1])

    # The end

    def _finished(self, event: TurnFinished) -> Iterator[Event]:
        cut = event.reason == "length"
        yield from self._closed("incomplete" if cut else "completed")
        self.response["usage"] = _usage(event.usage)
        self.response["status"] = "incomplete" if cut else "completed"
        if cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["completed_at"] = int(time.time())
        yield self._whole(self.response["status"])

    @property
    def _last(self) -> int:
        return len(self.response["output"]) - 1

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.response["output"][-1]["id"], "output_index": self._last}

    def _id(self, prefix: str) -> str:
        return f"{prefix}_{self._wanted.turn.id}_{len(self.response['output'])}"


def _blank(request: ResponsesRequest, wanted: Wanted, model: str, effort: str) -> dict[str, Any]:
    """A response before anything was generated: what was asked, and that nothing is stored."""
    turn = wanted.turn
    return {
        "id": f"resp_{turn.id}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": turn.parallel_calls,
        "previous_response_id": None,
        "reasoning": {"effort": (turn.effort or effort) if turn.thinking else "none", "summary": None},
        "store": False,
        "temperature": turn.sampling.temperature,
        "text": {"format": dict(wanted.format)},
        "tool_choice": request.tool_choice or "auto",
        "tools": list(wanted.tools),
        "top_logprobs": turn.logprobs or 0,
        "top_p": turn.sampling.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _free_text(arguments: str) -> str:
    """What a custom tool gets. The one parameter is text; whatever else the model wrote is given as it wrote it."""
    values = json.loads(arguments)
    return values["input"] if set(values) == {"input"} and isinstance(values["input"], str) else arguments


def _usage(usage: TurnUsage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _token(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}
