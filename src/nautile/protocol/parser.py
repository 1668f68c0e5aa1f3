"""Completion -> reasoning, content and tool calls, as it arrives.

The output is reasoning up to ``</think>``, then content, then perhaps a block of calls, then perhaps more content. What the
grammar has no place for stays text when it came as text, and is removed and flagged when it came as the ``｜DSML｜`` token.
A call is announced when it is complete, never before: until then a parameter may be repeated, retyped or cut off.
Every decision depends on the output alone, so that it makes no difference how the output is cut into pieces.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nautile.protocol import texts
from nautile.protocol.errors import ProtocolError
from nautile.protocol.events import (
    ContentDelta,
    Event,
    Finish,
    ParsedMessage,
    ReasoningDelta,
    ToolCall,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from nautile.protocol.markup import CLOSE, MARK, Reader, Tag, held, next_mark, read_tag, spelled
from nautile.protocol.tokenizer import Tokenizer
from nautile.protocol.values import allowed_types, typed_value

__all__ = ["Start", "StreamParser", "parse"]

Start = Literal["reasoning", "content", "calls"]
Tools = Sequence[Mapping[str, Any]]
_VALUE_END = re.compile(f"</｜?{MARK}")
_WRAPPERS = ("arguments", "input")
_PIECE = 4096  # atoms decided on at a time, so that a long output costs no more than its length


def parse(
    output: str | bytes | Iterable[int],
    *,
    start: Start = "reasoning",
    tokenizer: Tokenizer | None = None,
    tools: Tools | None = None,
    finish_reason: Literal["stop", "length"] | None = None,
    continued: bool = False,
) -> ParsedMessage:
    """Parse a whole completion, ids or text; the options are those of ``StreamParser`` and of its ``finish``."""
    parser = StreamParser(start=start, tokenizer=tokenizer, tools=tools, continued=continued)
    events = parser.feed(output) + parser.finish(finish_reason)
    last = events[-1]
    assert isinstance(last, Finish)
    return ParsedMessage(
        reasoning="".join(event.text for event in events if isinstance(event, ReasoningDelta)),
        content="".join(event.text for event in events if isinstance(event, ContentDelta)),
        tool_calls=tuple(event.call for event in events if isinstance(event, ToolCallEnd)),
        finish_reason=last.reason,
        flags=last.flags,
    )


@dataclass
class _OpenCall:
    """A call whose tags are being read. Written by the parser."""

    name: str
    flags: list[str]
    values: dict[str, str] = field(default_factory=dict)  # JSON texts
    parameter: Tag | None = None  # whose value is being read, or whose closing tag is awaited
    pieces: list[str] = field(default_factory=list)  # of the value

    def flag(self, flag: str) -> None:
        """Note a fault once."""
        if flag not in self.flags:
            self.flags.append(flag)


class StreamParser:
    """Turns a completion into events while it arrives; ``parse`` does the same for a whole one.

    ``start`` and ``continued`` are those of the ``Prompt``. With ids, ``</think>``, ``｜DSML｜`` and the end of sentence are
    recognised by id only and ``tokenizer`` is needed; with text (str, or bytes of UTF-8) the first two are recognised by
    their spelling. ``tools=None`` parses calls without schemas, ``tools=[]`` leaves markup alone. Ids of calls are made from
    ``call_seed`` and the output up to the call: give each turn of a conversation its own seed.
    """

    def __init__(
        self,
        *,
        start: Start = "reasoning",
        tokenizer: Tokenizer | None = None,
        tools: Tools | None = None,
        call_seed: str = "",
        continued: bool = False,
    ) -> None:
        if start not in ("reasoning", "content", "calls"):
            raise ProtocolError(f"unknown start {start!r}; an answer starts in its reasoning, its content or its calls")
        if start == "calls" and tools is not None and not tools:
            raise ProtocolError("an answer that starts inside calls needs tools")
        self._schemas = None if tools is None else _schemas(tools)
        self._reader = Reader(tokenizer, marks=self._schemas is None or bool(self._schemas))
        self._buffer = ""  # atoms not yet decided on
        self._state: Literal["text", "block", "call", "value"] = "block" if start == "calls" else "text"
        self._final = self._finished = False
        self._hash = hashlib.sha256(call_seed.encode("utf-8", "replace"))
        self._events: list[Event] = []
        self._flags: list[str] = []
        # reasoning and content
        self._reasoning = start == "reasoning"
        self._newlines = 0  # seen, and dropped unless text follows
        self._skip_newlines = not continued  # at the start of reasoning and of content
        self._said_content = continued and start == "content"
        self._after_calls = False  # nothing but newlines since the last block
        # calls
        self._count = 0
        self._call: _OpenCall | None = None
        self._wrapped = start == "calls"  # inside a block with an opening tag
        self._block_count = 0  # calls in this block
        self._noise: list[str] = []  # text in the block since its last tag
        self._raw: list[str] = []  # the block as it was written, until its first call

    def feed(self, data: str | bytes | int | Iterable[int]) -> list[Event]:
        """Take more of the output (ids, one id, text or bytes); the events that are certain now.

        Raises ProtocolError after ``finish``, for ids without a tokenizer, and for ids after text or text after ids.
        """
        if self._finished:
            raise ProtocolError("this parser has finished; make a new one for another completion")
        atoms = self._reader.feed(data)
        for place in range(0, len(atoms), _PIECE):
            self._buffer += atoms[place : place + _PIECE]
            self._advance()
        return self._taken()

    def finish(self, reason: Literal["stop", "length"] | None = None) -> list[Event]:
        """The output is over: what was held back, and ``Finish``.

        ``reason`` is why the model stopped. None: "length" if the output broke off inside a call, else "stop". The reason
        reported is "tool_calls" when there is at least one complete call. A call that is not complete is dropped.
        """
        if self._finished:
            raise ProtocolError("this parser has finished; make a new one for another completion")
        if reason not in (None, "stop", "length"):
            raise ProtocolError(f"unknown reason {reason!r}; a model stops by itself (stop) or at the limit (length)")
        rest = self._reader.finish()
        if len(rest) > 1 and texts.DSML.startswith(rest) and held(self._buffer):
            rest = MARK  # "<｜DS": a tag cut off inside its mark
        self._buffer += rest
        self._final = self._finished = True
        self._advance()
        broken = self._call is not None
        if broken:
            self._flag("truncated_call")
        elif self._state == "block":
            self._give_up_block()
        if self._newlines and not self._after_calls:
            self._emit("\n" * self._newlines)
        if reason is None:
            reason = "length" if broken and not self._reader.ended else "stop"
        self._events.append(Finish("tool_calls" if self._count else reason, tuple(self._flags)))
        return self._taken()

    def _advance(self) -> None:
        steps = {"text": self._read_text, "block": self._read_block, "call": self._read_call, "value": self._read_value}
        while self._buffer and steps[self._state]():
            pass

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _flag(self, flag: str) -> None:
        if flag not in self._flags:
            self._flags.append(flag)

    # Reasoning and content

    def _read_text(self) -> bool:
        """Say what is certainly text; True when a mark was dealt with and more may follow."""
        mark = next_mark(self._buffer)
        if mark < 0:
            keep = 0 if self._final else held(self._buffer)
            self._say(self._take(len(self._buffer) - keep))
            return False
        if self._buffer[mark] == CLOSE:
            self._say(self._take(mark))
            self._take(1)
            self._reasoning = False
            self._newlines, self._skip_newlines = 0, True
            return True
        tag = read_tag(self._buffer, mark, self._final)
        if tag is None:
            self._say(self._take(mark - held(self._buffer[:mark])))
            return False
        self._say(self._take(tag.start))
        self._text_tag(tag, self._take(tag.end - tag.start))
        return True

    def _text_tag(self, tag: Tag, raw: str) -> None:
        """Markup outside calls: the start of calls, or nothing that the grammar knows."""
        if tag.kind == "calls" and not tag.closing:
            self._state, self._wrapped, self._block_count = "block", True, 0
            self._noise, self._raw = [], [raw]
        elif tag.kind == "invoke" and not tag.closing and self._recoverable(tag):
            self._state, self._wrapped, self._block_count = "block", False, 0
            self._open_call(tag)
        elif tag.closing and self._after_calls:
            self._newlines = 0  # closes once more what is closed, or a block that was never opened
        elif tag.kind == "cut":
            self._newlines = 0
            self._flag("truncated_markup")
        elif self._reader.kind == "ids":
            self._flag("markup_dropped")
        else:
            self._say(spelled(raw))

    def _recoverable(self, tag: Tag) -> bool:
        """A call outside a block is taken for one when it names a tool that was offered."""
        return bool(tag.name) and (self._schemas is None or tag.name in self._schemas)

    def _take(self, size: int) -> str:
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def _say(self, text: str) -> None:
        """Emit text, newlines at its end only when more follows."""
        if self._skip_newlines:
            text = text.lstrip("\n")
        body = text.rstrip("\n")
        if body:
            self._emit("\n" * self._newlines + body)
            self._newlines = 0
        self._newlines += len(text) - len(body)

    def _emit(self, text: str) -> None:
        self._skip_newlines = self._after_calls = False
        self._said_content = self._said_content or not self._reasoning
        self._hash.update(text.encode("utf-8"))
        self._events.append(ReasoningDelta(text) if self._reasoning else ContentDelta(text))

    # A block of calls

    def _read_block(self) -> bool:
        mark = next_mark(self._buffer)
        if mark < 0:
            self._note(self._take(len(self._buffer) - (0 if self._final else held(self._buffer))))
            return False
        if self._buffer[mark] == CLOSE:
            self._note(self._take(mark))
            if self._block_count:
                self._take(1)
            else:
                self._give_up_block()  # the block was only talked about: reasoning goes on to here
            return True
        tag = read_tag(self._buffer, mark, self._final)
        if tag is None:
            self._note(self._take(mark - held(self._buffer[:mark])))
            return False
        self._note(self._take(tag.start))
        raw = self._take(tag.end - tag.start)
        if tag.kind == "calls" and tag.closing:
            self._close_block()
        elif tag.kind == "invoke" and not tag.closing:
            self._open_call(tag)
        elif tag.kind == "cut":
            self._flag("truncated_markup")
        else:
            self._raw.append(raw)
            self._flag("markup_dropped")
        return True

    def _note(self, text: str) -> None:
        """Text where only calls may stand."""
        if text:
            self._noise.append(text)
            self._raw.append(text)

    def _give_up_block(self) -> None:
        """The output goes on, or ends, without a closing tag; if there was no call, what looked like a block is text."""
        self._state = "text"
        noise, raw = "".join(self._noise), "".join(self._raw)
        self._drop_noise(flagged=self._block_count > 0)
        if self._block_count:
            return
        if noise.strip() not in ("", "<", "</", "<｜", "</｜"):  # more than the beginning of a tag
            as_text = self._reader.kind == "text"
            self._say(spelled(raw if as_text else noise))
            if not as_text:
                self._flag("markup_dropped")
        else:
            self._newlines = 0
            self._flag("truncated_markup")

    def _close_block(self) -> None:
        """Content follows. Text in a block without a single call is content too."""
        self._end_reasoning()
        noise = "".join(self._noise)
        if self._drop_noise(flagged=self._block_count > 0) and not self._block_count:
            self._flag("markup_dropped")
            self._say(spelled(noise))
        self._leave_block()

    def _drop_noise(self, flagged: bool) -> bool:
        noise, self._noise, self._raw = "".join(self._noise), [], []
        if flagged and noise.strip():
            self._flag("text_dropped")
        return bool(noise.strip())

    def _end_reasoning(self) -> None:
        """Newlines before calls are not text, and calls end the reasoning."""
        self._newlines, self._reasoning = 0, False

    def _leave_block(self) -> None:
        self._state, self._newlines = "text", 0
        self._after_calls, self._skip_newlines = True, not self._said_content

    # One call

    def _open_call(self, tag: Tag) -> None:
        self._end_reasoning()
        flags = ["text_dropped"] if self._drop_noise(flagged=True) else []
        flags += [] if self._wrapped else ["unwrapped"]
        flags += ["undeclared"] if self._schemas is not None and tag.name not in self._schemas else []
        flags += ["nameless"] if tag.name is None else []
        self._state, self._call = "call", _OpenCall(tag.name or "", flags)
        if tag.empty:
            self._complete_call(self._call)

    def _read_call(self) -> bool:
        """Between the parameters of a call, where nothing but tags may stand."""
        assert self._call is not None
        mark = next_mark(self._buffer)
        tag, closed = None, mark >= 0 and self._buffer[mark] == CLOSE
        if mark < 0:
            text = self._take(len(self._buffer) - (0 if self._final else held(self._buffer)))
        elif closed:
            text = self._take(mark + 1)[:-1]
        else:
            tag = read_tag(self._buffer, mark, self._final)
            text = self._take(tag.start if tag else mark - held(self._buffer[:mark]))
        if text.strip():
            self._call.flag("text_dropped")
        if tag is not None:
            self._call_tag(self._call, tag)
        return tag is not None or closed

    def _call_tag(self, call: _OpenCall, tag: Tag) -> None:
        """A tag inside a call; those that belong to what is around it are left in the buffer."""
        size = tag.end - tag.start
        closes_parameter = tag.kind == "parameter" and tag.closing
        if call.parameter is not None and not closes_parameter and tag.kind != "cut":
            call.flag(f"unclosed:{call.parameter.name or ''}")
        call.parameter = None
        if closes_parameter:
            self._take(size)
        elif tag.kind == "parameter":
            self._take(size)
            call.parameter, self._state = tag, "value"
            if tag.empty:
                self._settle(call, tag)
        elif tag.kind == "invoke" and tag.closing:
            self._take(size)
            self._complete_call(call)
        elif tag.kind == "invoke" or (tag.kind == "calls" and tag.closing):
            call.flag("unclosed")
            self._complete_call(call)
        else:
            self._take(size)
            self._flag("markup_dropped")

    def _read_value(self) -> bool:
        """A value goes on to the next closing tag, whatever else is in it."""
        call = self._call
        assert call is not None and call.parameter is not None
        found = _VALUE_END.search(self._buffer)
        end = found.start() if found else -1
        call.pieces.append(self._take(len(self._buffer) - held(self._buffer) if end < 0 else end))
        if end >= 0:
            self._settle(call, call.parameter)
        return end >= 0

    def _settle(self, call: _OpenCall, tag: Tag) -> None:
        """The value of a parameter is complete; a later one of the same name takes its place."""
        raw, call.pieces, self._state = spelled("".join(call.pieces)), [], "call"
        if tag.empty:
            call.parameter = None
        if tag.name is None:
            call.flag("nameless")
            return
        parameters = (self._schemas or {}).get(call.name)
        properties = parameters.get("properties") if parameters else None
        schema = properties.get(tag.name) if isinstance(properties, Mapping) else None
        value, fault = typed_value(raw, tag.string, allowed_types(schema, parameters))
        if fault:
            call.flag(f"{fault}:{tag.name}")
        if tag.name in call.values:
            call.flag(f"duplicate:{tag.name}")
        call.values[tag.name] = value

    def _unwrapped(self, call: _OpenCall) -> dict[str, str]:
        """The parameters of a call, also of one that wrapped them all in a parameter that the tool does not have."""
        properties = ((self._schemas or {}).get(call.name) or {}).get("properties")
        if len(call.values) != 1 or not isinstance(properties, Mapping):
            return call.values
        ((name, text),) = call.values.items()
        if name not in _WRAPPERS or name in properties:
            return call.values
        try:
            value = json.loads(text)
            value = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            return call.values
        if not isinstance(value, dict) or not value or not value.keys() <= properties.keys():
            return call.values
        call.flag(f"repaired:{name}")
        return {key: json.dumps(inner, ensure_ascii=False) for key, inner in value.items()}

    def _complete_call(self, call: _OpenCall) -> None:
        values = self._unwrapped(call)
        arguments = "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {text}" for key, text in values.items()) + "}"
        index, self._call = self._count, None
        digest = self._hash.copy()
        digest.update(f"\0{index}\0{call.name}\0{arguments}".encode())
        complete = ToolCall(f"call_{index:02d}_{digest.hexdigest()[:24]}", call.name, arguments, tuple(call.flags))
        self._events.append(ToolCallStart(index, complete.id, complete.name))
        self._events.append(ToolCallArguments(index, arguments))
        self._events.append(ToolCallEnd(index, complete))
        self._count += 1
        self._block_count += 1
        if self._wrapped:
            self._state = "block"
        else:
            self._leave_block()


def _schemas(tools: Tools) -> dict[str, Mapping[str, Any]]:
    """Parameter schema by tool name."""
    schemas: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str):
            raise ProtocolError(f"a tool is an object with a function that has a name, got {tool!r}")
        parameters = function.get("parameters", function.get("input_schema"))
        schemas[name] = parameters if isinstance(parameters, Mapping) else {}
    return schemas
