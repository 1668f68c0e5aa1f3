"""The body of a request to /v1/messages: Anthropic's blocks, and the ``Turn`` that they ask for.

docs/api.md has the same table for readers: every field is honoured, ignored because that cannot hurt, or refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue
from pydantic.config import JsonDict

from nautile.engine.sampling import SamplingParams
from nautile.server.chat_request import LONGEST_STOP, MOST_STOPS, response_format_of, stops_of, tool_choice_of
from nautile.server.errors import invalid
from nautile.server.history import History
from nautile.server.modes import EFFORTS, effort_of, thinking_of
from nautile.server.reading import Fields
from nautile.server.service import Service
from nautile.server.toolnames import ToolNames
from nautile.server.turn import Turn

__all__ = ["CountRequest", "MessagesRequest", "Wanted", "to_wanted"]

_BILLING = "x-anthropic-billing-header:"  # Claude Code's note to the hosted API; it changes, and would spoil the cache
_LEFT_OUT = ("web_search", "web_fetch", "tool_search")  # tools that the hosted API runs itself

# For the OpenAPI document; what is checked is checked by the readers below and by nautile.protocol.conversation.
_TEXT: JsonDict = {"type": "string"}
_NAME: JsonDict = {"type": "string", "minLength": 1}


def _object(required: dict[str, JsonValue], **others: JsonValue) -> JsonDict:
    return {"type": "object", "required": list(required), "properties": {**required, **others}}


def _block(kind: str, required: dict[str, JsonValue], **others: JsonValue) -> JsonDict:
    return _object({"type": {"enum": [kind]}, **required}, **others)


def _list(*kinds: JsonValue) -> JsonDict:
    return {"type": "array", "items": {"anyOf": list(kinds)} if len(kinds) > 1 else kinds[0]}


_TEXT_BLOCK = _block("text", {"text": _TEXT})
_THOUGHT = _block("thinking", {"thinking": _TEXT}, signature=_TEXT)
_CALL = _block("tool_use", {"id": _NAME, "name": _NAME, "input": {"type": "object"}})
_RESULT = _block(
    "tool_result",
    {"tool_use_id": _NAME},
    content={"anyOf": [_TEXT, _list(_TEXT_BLOCK)]},
    is_error={"type": "boolean"},
)
_MESSAGE: JsonDict = {
    "anyOf": [
        _object({"role": {"enum": ["user"]}, "content": {"anyOf": [_TEXT, _list(_TEXT_BLOCK, _RESULT)]}}),
        _object({"role": {"enum": ["assistant"]}, "content": {"anyOf": [_TEXT, _list(_TEXT_BLOCK, _THOUGHT, _CALL)]}}),
    ]
}
_TOOL = _object({"name": _NAME, "input_schema": {"type": "object"}}, description=_TEXT, strict={"type": "boolean"})
_CHOICE = _object(
    {"type": {"enum": ["auto", "any", "tool", "none"]}}, name=_NAME, disable_parallel_tool_use={"type": "boolean"}
)
_THINKING = _object({"type": {"enum": ["enabled", "disabled", "adaptive"]}}, budget_tokens={"type": "integer"})
_FORMAT = _object({"type": {"enum": ["json_schema"]}, "schema": {"type": "object"}})
_CONFIG = _object({}, effort={"enum": list(EFFORTS)}, format=_FORMAT)


def _told(shape: JsonDict) -> JsonDict:
    """The fields of an object, beside the type that pydantic writes."""
    return {key: value for key, value in shape.items() if key != "type"}


class CountRequest(BaseModel):
    """A request to /v1/messages/count_tokens: what makes up the prompt."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = Field(None, description="Any name; the one model of this server answers.")
    messages: list[dict[str, Any]] = Field(min_length=1, json_schema_extra={"items": _MESSAGE})
    system: str | list[dict[str, Any]] | None = Field(None, json_schema_extra={"items": _TEXT_BLOCK})
    tools: list[dict[str, Any]] | None = Field(None, json_schema_extra={"items": _TOOL})
    tool_choice: dict[str, Any] | None = Field(None, json_schema_extra=_told(_CHOICE))
    thinking: dict[str, Any] | None = Field(
        None, description="Without it the model does not think. A budget is ignored.", json_schema_extra=_told(_THINKING)
    )
    output_config: dict[str, Any] | None = Field(None, json_schema_extra=_told(_CONFIG))
    mcp_servers: list[Any] | None = Field(
        None, description="Refused: run them in the client.", json_schema_extra={"maxItems": 0}
    )
    context_management: dict[str, Any] | None = Field(None, description="Accepted; the conversation is used as it is sent.")


class MessagesRequest(CountRequest):
    """A request to /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop_sequences: list[str] | None = Field(
        None, json_schema_extra={"maxItems": MOST_STOPS, "items": {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}}
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = Field(None, description="Ignored.")


@dataclass(frozen=True)
class Wanted:
    """A request that has been understood: the turn, and the client's names for its tools."""

    turn: Turn
    names: ToolNames


def to_wanted(request: CountRequest, service: Service, partition: str, request_id: str) -> Wanted:
    """What the request asks of the model. Raises ApiError."""
    if request.mcp_servers:
        raise invalid("this server runs no MCP servers: connect to them in the client and send their tools", "mcp_servers")
    names = ToolNames()
    tools = _tools(request.tools or (), names)
    config = Fields(request.output_config or {}, "output_config")
    choice = Fields(request.tool_choice or {"type": "auto"}, "tool_choice")
    history = _history(request, names)
    messages = history.finished()
    if _continues(messages):
        messages = (*messages[:-1], {**messages[-1], "prefix": True})
    whole = request if isinstance(request, MessagesRequest) else None
    form = config.object("format")
    turn = Turn(
        messages=messages,
        tools=tools,
        tool_choice=_choice(choice, tools, names),
        parallel_calls=not choice.flag("disable_parallel_tool_use", False),
        thinking=thinking_of(request.thinking) or False,
        effort=effort_of(config.raw("effort"), "output_config.effort"),
        sampling=_sampling(whole, service),
        max_tokens=whole.max_tokens if whole else None,
        response_format=_response_format(form.value) if form else None,
        stop=stops_of(whole.stop_sequences if whole else None),
        partition=partition,
        id=request_id,
    )
    return Wanted(turn, names)


def _sampling(request: MessagesRequest | None, service: Service) -> SamplingParams:
    temperature = request.temperature if request else None
    return SamplingParams(
        temperature=service.options.temperature if temperature is None else temperature,
        top_p=(request.top_p if request else None) or 1.0,
        top_k=(request.top_k if request else None) or 0,
        seed=None,
    )


def _response_format(form: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if form.get("type") != "json_schema":
        raise invalid('output_config.format.type must be "json_schema"', "output_config.format")
    return response_format_of({"type": "json_schema", "json_schema": {"name": "output", "schema": form.get("schema")}})


def _continues(messages: tuple[dict[str, Any], ...]) -> bool:
    """Whether the answer goes on from a last assistant message. Raises ApiError when that made calls."""
    if messages[-1]["role"] != "assistant":
        return False
    if messages[-1].get("tool_calls"):
        raise invalid("messages end with tool_use blocks: add a user message with a tool_result for each", "messages")
    return True


# Tools


def _tools(tools: Any, names: ToolNames) -> tuple[dict[str, Any], ...]:
    functions = []
    for index, value in enumerate(tools):
        tool = Fields(value, f"tools[{index}]")
        kind = tool.text("type") or "custom"
        if kind.startswith(_LEFT_OUT):
            continue
        schema = tool.object("input_schema")
        if kind != "custom" or schema is None:
            text = f"{tool.path}: this server knows no tool of type {kind!r}; give it a name, a description and an input_schema"
            raise invalid(text, tool.path)
        name = names.add(tool.required("name"))
        function = {"name": name, "description": tool.text("description") or "", "parameters": dict(schema.value)}
        strict = {"strict": True} if tool.flag("strict", False) else {}
        functions.append({"type": "function", "function": {**function, **strict}})
    return tuple(functions)


def _choice(choice: Fields, tools: tuple[dict[str, Any], ...], names: ToolNames) -> Any:
    kind = choice.one_of("type", ("auto", "any", "tool", "none"))
    if kind == "tool":
        function = {"name": names.seen(choice.required("name"))}
        return tool_choice_of({"type": "function", "function": function}, tools)
    return tool_choice_of("required" if kind == "any" else kind, tools)


# Messages


def _history(request: CountRequest, names: ToolNames) -> History:
    history = History()
    system = _system(request.system)
    if system:
        history.system(system)
    for index, value in enumerate(request.messages):
        message = Fields(value, f"messages[{index}]")
        role = message.one_of("role", ("user", "assistant", "system"))
        if role is None:
            raise invalid(f"{message.at('role')} is missing: user or assistant", message.at("role"))
        blocks = _blocks(message)
        if role == "system":
            history.system("\n\n".join(block.text("text") or "" for block in blocks))
            continue
        for block in blocks:
            (_user_block if role == "user" else _assistant_block)(history, block, names)
    return history


def _system(value: str | list[dict[str, Any]] | None) -> str:
    if not isinstance(value, list):
        return value or ""
    blocks = [Fields(item, f"system[{index}]") for index, item in enumerate(value)]
    texts = [block.text("text") or "" for block in blocks]
    return "\n\n".join(text for text in texts if not text.startswith(_BILLING))


def _blocks(message: Fields) -> list[Fields]:
    """The blocks of a message; plain text is one."""
    content = message.raw("content")
    if isinstance(content, str):
        return [Fields({"type": "text", "text": content}, message.at("content"))]
    if content is None:
        raise invalid(f"{message.at('content')} is missing: text or a list of blocks", message.at("content"))
    return list(message.objects("content"))


def _user_block(history: History, block: Fields, names: ToolNames) -> None:
    if block.required("type") == "tool_result":
        text = _plain(block)
        failed = block.flag("is_error", False)
        history.result(block.required("tool_use_id"), f"Error: {text}" if failed else text)
    else:
        history.user(_shown(block))


def _assistant_block(history: History, block: Fields, names: ToolNames) -> None:
    kind = block.required("type")
    if kind == "text":
        history.answer(block.text("text") or "")
    elif kind == "thinking":
        history.reasoning(block.text("thinking") or "")
    elif kind == "tool_use":
        given = block.object("input") or Fields({})
        history.call(block.required("id"), names.seen(block.required("name")), dict(given.value))
    elif kind != "redacted_thinking":  # which only its maker can read
        text = f"{block.path}: an assistant's block of type {kind!r} cannot be read here; send text, thinking and tool_use"
        raise invalid(text, block.at("type"))


def _plain(block: Fields) -> str:
    """A tool result's content: text, or blocks with blank lines between them."""
    content = block.raw("content")
    if content is None or isinstance(content, str):
        return content or ""
    return "\n\n".join(_shown(inner) for inner in block.objects("content"))


def _shown(block: Fields) -> str:
    """What the model can see of a block: its text, or a mark of what it was."""
    kind = block.required("type")
    if kind == "text":
        return block.text("text") or ""
    source = block.object("source") if kind == "document" else None
    if source is not None and source.raw("type") == "text":
        return source.text("data") or ""
    return f"[Unsupported {kind.capitalize()}]"
