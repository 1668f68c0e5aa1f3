"""What a completion turns into: events while it arrives, a message when it is complete. Plain data, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "ContentDelta",
    "Event",
    "Finish",
    "FinishReason",
    "ParsedMessage",
    "ReasoningDelta",
    "ToolCall",
    "ToolCallArguments",
    "ToolCallEnd",
    "ToolCallStart",
]

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class ToolCall:
    """A complete call. ``arguments`` is always the text of a JSON object.

    ``flags`` name what the model got wrong and the parser put right, or could not, as ``fault`` or ``fault:parameter``:

    - ``duplicate:p``  p was written more than once; the last one counts
    - ``repaired:p``   p's value or type marker was wrong; its JSON type now follows the schema, or it became a string
    - ``mismatch:p``   p's value has a type that the schema does not allow, and no repair was possible
    - ``unclosed:p``   p had no closing tag of its own
    - ``unclosed``     the call had no closing tag of its own
    - ``unwrapped``    the call stood outside a block of calls
    - ``undeclared``   no tool of that name was offered
    - ``text_dropped`` text stood where only parameters or calls may stand
    - ``nameless``     a parameter without a name was dropped, or the call has none
    """

    id: str
    name: str
    arguments: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReasoningDelta:
    """More reasoning."""

    text: str


@dataclass(frozen=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call follows; emitted only when the call is known to be complete."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """More of a call's arguments; the texts of one index together are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True)
class ToolCallEnd:
    """The call as a whole."""

    index: int
    call: ToolCall


@dataclass(frozen=True)
class Finish:
    """The last event. ``flags`` name what was left out of the message:

    - ``truncated_call``    the output ended inside a call, which was dropped
    - ``truncated_markup``  the output ended inside a tag, or just after a block of calls was opened; that was dropped
    - ``markup_dropped``    a tag stood where it means nothing and was removed
    - ``text_dropped``      text stood between calls and was removed
    """

    reason: FinishReason
    flags: tuple[str, ...] = ()


Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments | ToolCallEnd | Finish


@dataclass(frozen=True)
class ParsedMessage:
    """A whole completion. ``flags`` are those of ``Finish``."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: FinishReason = "stop"
    flags: tuple[str, ...] = field(default=())

    def message(self) -> dict[str, Any]:
        """The assistant message that ``encode`` takes, with the reasoning kept."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message
