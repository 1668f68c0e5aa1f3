"""What a client sent -> a conversation that ``encode`` renders as the hosted API does, or a sentence on what to change.

``encode`` follows the published encoding and takes what that takes. Clients send more: system messages anywhere, the role
developer, tools with fields of their own, a tool choice, a response format. This file knows those; it does not know HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nautile.protocol import texts
from nautile.protocol.encoder import Prompt, encode
from nautile.protocol.errors import ProtocolError
from nautile.protocol.tokenizer import Tokenizer

__all__ = ["Conversation", "choose", "conversation"]

Message = dict[str, Any]

_NAME = re.compile(r"[a-zA-Z0-9_-]+")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXTS = ("text", "input_text", "output_text", None)
_IMAGES = ("image", "image_url", "input_image")
_STRICT_ORDER = ("type", "properties", "additionalProperties", "required")


@dataclass(frozen=True)
class Conversation:
    """A checked conversation. ``tools`` are those the model may call: none with tool choice "none", one with a named choice.

    ``tools`` keep what the client wrote (``strict`` and all); the prompt shows name, description and parameters.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    tool_choice: Literal["auto", "none", "required"]
    response_format: Mapping[str, Any] | None  # {"type": "json_object"} or {"type": "json_schema", "json_schema": {...}}

    def prompt(
        self,
        *,
        tokenizer: Tokenizer | None = None,
        thinking: bool = True,
        effort: str | None = None,
        dialect: str = "0731",
        drop_thinking: bool = True,
    ) -> Prompt:
        """The prompt. Where calls are required and nothing is to be reasoned about, the block of calls is open in it."""
        schema = None
        if self.response_format and self.response_format["type"] == "json_schema":
            schema = self.response_format["json_schema"]["schema"]
        prompt = encode(
            self.messages,
            tokenizer=tokenizer,
            tools=[_shown(tool["function"]) for tool in self.tools],
            thinking=thinking,
            effort=effort,
            dialect=dialect,
            drop_thinking=drop_thinking,
            response_format=schema,
        )
        return prompt.with_calls_open() if self.tool_choice == "required" and prompt.start == "content" else prompt


def conversation(
    messages: Any,
    *,
    tools: Any = None,
    tool_choice: Any = None,
    response_format: Any = None,
    developer: Literal["system", "user"] = "system",
) -> Conversation:
    """Check and normalise what a client sent, as parsed JSON of any shape.

    ``developer`` says what that role is taken for. Tool choices are understood in the forms of the three APIs (a word, or an
    object that names a function). Raises ProtocolError whose text says what to change.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ProtocolError(f"messages must be a list, got {type(messages).__name__}")
    if not messages:
        raise ProtocolError("Empty input messages")
    offered, choice = choose(tool_choice, _checked_tools(tools))
    turns = [_message(message, number, developer) for number, message in enumerate(messages)]
    _check_prefix(turns)
    _check_results(turns)
    shape = _response_format(response_format)
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    turns = [turn for turn in turns if turn["role"] != "system"]
    if shape and shape["type"] == "json_object":
        if not any("json" in text.lower() for text in (*system, *(turn.get("content", "") for turn in turns))):
            raise ProtocolError("Prompt must contain the word 'json' in some form to use response_format of type json_object")
        system = ["\n\n".join(system) + "\n\n" + texts.JSON_OBJECT]
    if system:
        turns.insert(0, {"role": "system", "content": "\n\n".join(system)})
    return Conversation(tuple(turns), offered, choice, shape)


# Messages


def _message(message: Any, number: int, developer: str) -> Message:
    """One message with the fields that count and no others."""
    where = f"messages[{number}]"
    if not isinstance(message, Mapping):
        raise ProtocolError(f"{where} must be an object with role and content, got {type(message).__name__}")
    role = message.get("role")
    if role not in _ROLES:
        raise ProtocolError(f"{where} has the unknown role {role!r}; use {', '.join(_ROLES)}")
    if role == "assistant":
        return _assistant(message, where)
    if role == "tool":
        call_id = message.get("tool_call_id")
        if not isinstance(call_id, str) or not call_id:
            raise ProtocolError(f"{where}: a tool message needs the tool_call_id of the call that it answers")
        return {"role": "tool", "tool_call_id": call_id, "content": _content(message.get("content"), where)}
    if message.get("content") is None:
        raise ProtocolError(f"{where}: the content of a {role} message must be text or a list of parts, not null")
    kept: Message = {
        "role": developer if role == "developer" else role,
        "content": _content(message["content"], where),
    }
    return {**kept, "prefix": True} if message.get("prefix") else kept


def _assistant(message: Mapping[str, Any], where: str) -> Message:
    kept: Message = {"role": "assistant", "content": _content(message.get("content"), where)}
    reasoning = message.get("reasoning_content", message.get("reasoning"))
    if reasoning is not None and not isinstance(reasoning, str):
        raise ProtocolError(f"{where}: reasoning_content must be text, got {type(reasoning).__name__}")
    if reasoning is not None:
        kept["reasoning_content"] = reasoning  # empty is not the same as not sent
    calls = message.get("tool_calls")
    if calls is not None and (not isinstance(calls, list | tuple)):
        raise ProtocolError(f"{where}: tool_calls must be a list, got {type(calls).__name__}")
    if calls:
        kept["tool_calls"] = [_call(call, where) for call in calls]
        ids = [call["id"] for call in kept["tool_calls"]]
        if len(set(ids)) < len(ids):
            raise ProtocolError(f"{where}: two tool_calls have one id; give every call an id of its own")
    elif message.get("content") is None and not reasoning:
        raise ProtocolError(f"{where}: Invalid assistant message: content or tool_calls must be set")
    return {**kept, "prefix": True} if message.get("prefix") else kept


def _call(call: Any, where: str) -> Message:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise ProtocolError(f"{where}: a tool call is an object with an id and a function, got {call!r}")
    if not isinstance(call.get("id"), str) or not call["id"]:
        raise ProtocolError(f"{where}: every tool call needs an id, which its tool message repeats as tool_call_id")
    name, arguments = _name(function.get("name"), where), function.get("arguments")
    if arguments is not None and not isinstance(arguments, str | Mapping):
        raise ProtocolError(f"{where}: the arguments of {name} must be an object or its JSON text, got {arguments!r}")
    return {"id": call["id"], "type": "function", "function": {"name": name, "arguments": arguments}}


def _name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ProtocolError(f"{where}: a function's name must match ^[a-zA-Z0-9_-]+$, got {name!r}")
    return name


def _content(content: Any, where: str) -> str:
    """The text of a message's content; a part that is not text leaves a note in its place."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ProtocolError(f"{where}: content must be text or a list of parts, got {type(content).__name__}")
    return "\n\n".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ProtocolError(f"{where}: a part of content must be an object with a type, got {type(part).__name__}")
    kind = part.get("type")
    if kind in _IMAGES:
        return "[Unsupported Image]"
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return str(part["refusal"])
    if kind not in _TEXTS:
        return f"[Unsupported {kind}]"
    if not isinstance(part.get("text"), str):
        raise ProtocolError(f"{where}: a part of type text needs its text as a string, got {part.get('text')!r}")
    return str(part["text"])


def _check_prefix(turns: Sequence[Message]) -> None:
    for number, turn in enumerate(turns):
        if turn.get("prefix") and (number < len(turns) - 1 or turn["role"] != "assistant"):
            raise ProtocolError(f"messages[{number}]: prefix: true is for the last message, which must be an assistant's")


def _check_results(turns: Sequence[Message]) -> None:
    """Every call is answered once, right after the message that made it, and nothing else is answered."""
    waiting: dict[str, int] | None = None  # times each call was answered; None before any call
    for number, turn in enumerate(turns):
        where = f"messages[{number}]"
        if turn["role"] == "tool":
            call_id = turn["tool_call_id"]
            if waiting is None:
                text = "Messages with role 'tool' must be a response to a preceding message with 'tool_calls'"
                raise ProtocolError(f"{text} ({where}; send that assistant message too)")
            if call_id not in waiting:
                raise ProtocolError(f"{where}: unknown tool_call_id {call_id!r}; the calls are {', '.join(waiting)}")
            if waiting[call_id]:
                raise ProtocolError(f"{where}: the tool call {call_id!r} was answered before; send one result a call")
            waiting[call_id] += 1
        elif turn["role"] != "system":
            _check_answered(waiting, where)
            waiting = {call["id"]: 0 for call in turn["tool_calls"]} if turn.get("tool_calls") else None
    _check_answered(waiting, "the end")


def _check_answered(waiting: Mapping[str, int] | None, where: str) -> None:
    missing = [call_id for call_id, times in (waiting or {}).items() if not times]
    if missing:
        text = "An assistant message with 'tool_calls' must be followed by tool messages responding to each 'tool_call_id'"
        raise ProtocolError(f"{text} (insufficient tool messages: {', '.join(missing)} before {where})")


# Tools


def _checked_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list | tuple):
        raise ProtocolError(f"tools must be a list, got {type(tools).__name__}")
    checked = tuple(_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools))
    if len({tool["function"]["name"] for tool in checked}) < len(checked):
        raise ProtocolError("Tool names must be unique.")
    return checked


def _tool(tool: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        kind = tool.get("type") if isinstance(tool, Mapping) else type(tool).__name__
        raise ProtocolError(f"{where}: only tools of type function are supported, got {kind!r}")
    function = tool.get("function", tool)
    if not isinstance(function, Mapping):
        raise ProtocolError(f"{where}: a tool needs a function with a name, got {function!r}")
    name = _name(function.get("name"), where)
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ProtocolError(f"{where}: the parameters of {name} must be a JSON schema, got {type(parameters).__name__}")
    if not isinstance(function.get("description"), str | None):
        raise ProtocolError(f"{where}: the description of {name} must be text")
    if not isinstance(function.get("strict"), bool | None):
        raise ProtocolError(f"{where}: strict must be true or false")
    if function.get("strict") and parameters:
        _check_strict(parameters, f"{where} ({name})")
    return {"type": "function", "function": function}


def _check_strict(schema: Any, where: str, depth: int = 0) -> None:
    """Objects of strict schemas name all their properties and allow no others."""
    if depth > 64:
        raise ProtocolError(f"{where}: the schema nests too deep; 64 levels are supported")
    if isinstance(schema, list | tuple):
        for member in schema:
            _check_strict(member, where, depth + 1)
    if not isinstance(schema, Mapping):
        return
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and schema.get("type") in ("object", None):
        required = schema.get("required") or ()
        if not isinstance(required, list | tuple) or not all(isinstance(name, str) for name in required):
            raise ProtocolError(f"{where}: required must be a list of names, got {required!r}")
        if set(properties) != set(required):
            raise ProtocolError(f"Required properties must match all properties in the object: {where}, {list(properties)}")
        if schema.get("additionalProperties") is not False:
            raise ProtocolError(f"{where}: an object of a strict schema needs additionalProperties: false")
    for key, member in schema.items():
        if key in ("properties", "$defs", "definitions") and isinstance(member, Mapping):
            _check_strict(list(member.values()), where, depth + 1)
        elif key in ("items", "anyOf", "allOf", "oneOf", "prefixItems"):
            _check_strict(member, where, depth + 1)


def _shown(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the prompt shows of a function, in the hosted API's form: a client's own fields would only break the cache."""
    parameters = function.get("parameters") or {}
    if function.get("strict"):
        first = {key: parameters[key] for key in _STRICT_ORDER if key in parameters}
        parameters = {**first, **parameters}
    return {"name": function["name"], "description": function.get("description") or "", "parameters": parameters}


def choose(
    choice: Any, tools: tuple[Mapping[str, Any], ...]
) -> tuple[tuple[Mapping[str, Any], ...], Literal["auto", "none", "required"]]:
    """The tools that may be called, and whether one must be. Raises ProtocolError for a choice that cannot be met."""
    kind = choice.get("type") if isinstance(choice, Mapping) else choice
    if kind is None:
        return tools, "auto"
    if kind == "none":
        return (), "none"
    if kind == "auto":
        return tools, "auto"
    if kind not in ("required", "any", "function", "tool") or (kind in ("function", "tool") and choice is kind):
        raise ProtocolError(f"unknown tool_choice {choice!r}; use none, auto, required, or an object that names a function")
    if not tools:
        raise ProtocolError(f"tool_choice {kind} needs tools; send some, or leave tool_choice out")
    if kind in ("required", "any"):
        return tools, "required"
    function = choice.get("function", choice)
    name = function.get("name") if isinstance(function, Mapping) else None
    chosen = tuple(tool for tool in tools if tool.get("function", tool).get("name") == name)
    if not chosen:
        raise ProtocolError(f"tool_choice names {name!r}, which is none of the tools; they are {_names(tools)}")
    return chosen, "required"


def _names(tools: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(str(tool.get("function", tool).get("name")) for tool in tools)


def _response_format(shape: Any) -> Mapping[str, Any] | None:
    if shape is None:
        return None
    kind = shape.get("type") if isinstance(shape, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "json_object"}
    if kind != "json_schema":
        raise ProtocolError(f"unknown response_format {shape!r}; its type is text, json_object or json_schema")
    wanted = shape.get("json_schema", shape)
    schema = wanted.get("schema") if isinstance(wanted, Mapping) else None
    if not isinstance(schema, Mapping):
        raise ProtocolError("response_format json_schema needs json_schema.schema, an object")
    return {"type": "json_schema", "json_schema": {**wanted, "schema": schema}}
