"""The body of a request to /v1/responses: items of many kinds, and the ``Turn`` that they ask for.

docs/api.md has the same table for readers: every field is honoured, ignored because that cannot hurt, or refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from nautile.engine.sampling import SamplingParams
from nautile.server.chat_request import response_format_of, tool_choice_of
from nautile.server.errors import invalid
from nautile.server.history import History
from nautile.server.modes import effort_of, thinking_of
from nautile.server.reading import Fields
from nautile.server.service import Service
from nautile.server.toolnames import ToolNames
from nautile.server.turn import Turn

__all__ = ["ResponsesRequest", "Wanted", "to_wanted"]

# Tools that the hosted API runs itself, or that agents offer to every model whether it knows them or not: left out, so that
# the model is not told of them.
_LEFT_OUT = ("web_search", "web_search_preview", "local_shell", "shell", "image_generation", "tool_search")
_LEFT_OUT_ITEMS = ("web_search_call", "local_shell_call", "local_shell_call_output", "image_generation_call")


class ResponsesRequest(BaseModel):
    """A request to /v1/responses."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = Field(None, description="Any name; the one model of this server answers.")
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    thinking: dict[str, Any] | bool | None = Field(None, description="As in the chat API; reasoning.effort none is the same.")
    text: dict[str, Any] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=393_216)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[str] | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = Field(None, description="Given back, not looked at.")
    store: bool | None = Field(None, description="Ignored: nothing is stored.")
    background: bool | None = Field(None, description="Refused when true.")
    previous_response_id: str | None = Field(None, description="Refused: nothing is stored; send the whole conversation.")
    conversation: Any = Field(None, description="Refused: nothing is stored; send the whole conversation.")
    prompt: Any = Field(None, description="Refused: there are no stored prompts.")


@dataclass(frozen=True)
class Wanted:
    """A request that has been understood: the turn, and what its answer's form depends on."""

    turn: Turn
    names: ToolNames
    custom: frozenset[str]  # the model's names of tools that take free text
    tools: tuple[Mapping[str, Any], ...]  # as the client wrote them, without those left out
    format: Mapping[str, Any] = field(default_factory=lambda: {"type": "text"})


def to_wanted(request: ResponsesRequest, service: Service, partition: str, request_id: str) -> Wanted:
    """What the request asks of the model. Raises ApiError."""
    _refuse_unsupported(request)
    tools = _Tools(request.tools or ())
    reasoning = Fields(request.reasoning or {}, "reasoning")
    off = reasoning.raw("effort") == "none"
    thinking = thinking_of(request.thinking)
    text_format = (Fields(request.text or {}, "text").object("format") or Fields({"type": "text"})).value
    logprobs = request.top_logprobs
    if logprobs is None and "message.output_text.logprobs" in (request.include or ()):
        logprobs = 0
    functions, choice = tools.chosen(request.tool_choice)
    turn = Turn(
        messages=_messages(request, tools.names),
        tools=functions,
        tool_choice=choice,
        parallel_calls=request.parallel_tool_calls is not False,
        thinking=not off if thinking is None else thinking,
        effort=None if off else effort_of(reasoning.raw("effort"), "reasoning.effort"),
        sampling=SamplingParams(
            temperature=service.options.temperature if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=None,
        ),
        max_tokens=request.max_output_tokens,
        response_format=_response_format(text_format),
        logprobs=logprobs,
        partition=partition,
        id=request_id,
    )
    return Wanted(turn, tools.names, frozenset(tools.custom), tuple(tools.kept), text_format)


def _refuse_unsupported(request: ResponsesRequest) -> None:
    """What cannot be done, and would change the meaning of the answer if it were left out."""
    for name in ("previous_response_id", "conversation"):
        if getattr(request, name):
            text = f"this server stores no conversations: leave {name} out and send all items of the conversation in input"
            raise invalid(text, name)
    if request.background:
        raise invalid(
            "background responses are not supported: leave background out and read the answer or the stream", "background"
        )
    if request.prompt:
        raise invalid("there are no stored prompts here: send the text in instructions and input", "prompt")


def _response_format(value: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """text.format has the fields of a schema beside its type; the chat API has them one level deeper."""
    if value.get("type") == "json_schema":
        inner = {key: value[key] for key in ("name", "schema", "strict") if key in value}
        return response_format_of({"type": "json_schema", "json_schema": inner})
    return response_format_of(value)


# Tools


class _Tools:
    """The tools of a request: those the model is told of, by the names it sees."""

    def __init__(self, tools: Any) -> None:
        self.names, self.custom, self.kept = ToolNames(), set[str](), list[Mapping[str, Any]]()
        self.functions: list[dict[str, Any]] = []
        for index, tool in enumerate(tools):
            self._add(Fields(tool, f"tools[{index}]"))

    def _add(self, tool: Fields) -> None:
        kind = tool.required("type")
        if kind in _LEFT_OUT or kind.startswith("web_search_preview"):
            return
        if kind == "namespace":
            namespace = tool.required("name")
            for inner in tool.objects("tools"):
                self._declare(inner, namespace)
        else:
            self._declare(tool, None)
        self.kept.append(tool.value)

    def _declare(self, tool: Fields, namespace: str | None) -> None:
        kind = tool.required("type")
        if kind not in ("function", "custom"):
            text = f"{tool.path}: this server cannot run a tool of type {kind!r}; offer a function that does the same"
            raise invalid(text, tool.at("type"))
        name = self.names.add(tool.required("name"), namespace)
        function: dict[str, Any] = {"name": name, "description": tool.text("description") or ""}
        if kind == "custom":
            self.custom.add(name)
            function["description"] += _grammar_text(tool.object("format"))
            function["parameters"] = _FREE_TEXT
        else:
            parameters = tool.object("parameters")
            function["parameters"] = dict(parameters.value) if parameters else {"type": "object", "properties": {}}
            if tool.flag("strict", False):
                function["strict"] = True
        self.functions.append({"type": "function", "function": function})

    def chosen(self, choice: Any) -> tuple[tuple[Mapping[str, Any], ...], Any]:
        """The tools that may be called and the choice among them, in the turn's form."""
        functions = tuple(self.functions)
        if not isinstance(choice, Mapping):
            return functions, tool_choice_of(choice, functions)
        asked = Fields(choice, "tool_choice")
        if asked.raw("type") == "allowed_tools":
            allowed = {self._named(tool) for tool in asked.objects("tools")}
            functions = tuple(tool for tool in functions if tool["function"]["name"] in allowed)
            return functions, tool_choice_of(asked.one_of("mode", ("auto", "required")), functions)
        return functions, tool_choice_of({"type": "function", "function": {"name": self._named(asked)}}, functions)

    def _named(self, tool: Fields) -> str | None:
        """The model's name of a function or custom tool that is referred to; None for tools of other kinds."""
        if tool.raw("type") not in ("function", "custom"):
            return None
        return self.names.seen(tool.required("name"), tool.text("namespace"))


_FREE_TEXT = {
    "type": "object",
    "properties": {"input": {"type": "string", "description": "The text that the tool takes, as it is."}},
    "required": ["input"],
}


def _grammar_text(form: Fields | None) -> str:
    """A custom tool's grammar, for the model to read."""
    if form is None or form.raw("type") != "grammar":
        return ""
    return f"\n\nThe input follows this {form.text('syntax') or ''} grammar:\n{form.text('definition') or ''}"


# Input


def _messages(request: ResponsesRequest, names: ToolNames) -> tuple[dict[str, Any], ...]:
    history = History()
    if request.instructions:
        history.system(request.instructions)
    if isinstance(request.input, str):
        if request.input:
            history.user(request.input)
        return history.finished()
    for index, value in enumerate(request.input):
        item = Fields(value, f"input[{index}]")
        kind = item.text("type") or "message"
        if kind in _LEFT_OUT_ITEMS:
            continue
        reader = _READERS.get(kind)
        if reader is None:
            text = f"{item.path}: an item of type {kind!r} cannot be read here; this server knows {', '.join(_READERS)}"
            raise invalid(text, item.at("type"))
        reader(history, item, names)
    return history.finished()


def _message(history: History, item: Fields, names: ToolNames) -> None:
    role = item.one_of("role", ("user", "assistant", "system", "developer"))
    text = _text(item, "content")
    if role is None:
        raise invalid(f"{item.at('role')} is missing: user, assistant, system or developer", item.at("role"))
    {"user": history.user, "assistant": history.answer}.get(role, history.system)(text)


def _reasoning(history: History, item: Fields, names: ToolNames) -> None:
    """Only the text itself: a summary is not what the model wrote. Without it the server's memory may still know it."""
    text = "".join(part.text("text") or "" for part in item.objects("content"))
    if text:
        history.reasoning(text)


def _function_call(history: History, item: Fields, names: ToolNames) -> None:
    name = names.seen(item.required("name"), item.text("namespace"))
    history.call(item.required("call_id"), name, item.text("arguments") or "")


def _custom_call(history: History, item: Fields, names: ToolNames) -> None:
    name = names.seen(item.required("name"), item.text("namespace"))
    arguments = json.dumps({"input": item.text("input") or ""}, ensure_ascii=False)
    history.call(item.required("call_id"), name, arguments)


def _output(history: History, item: Fields, names: ToolNames) -> None:
    history.result(item.required("call_id"), _text(item, "output"))


def _reference(history: History, item: Fields, names: ToolNames) -> None:
    raise invalid(f"{item.path}: this server stores no items; send the item itself instead of a reference", item.path)


_READERS: dict[str, Callable[[History, Fields, ToolNames], None]] = {
    "message": _message,
    "reasoning": _reasoning,
    "function_call": _function_call,
    "function_call_output": _output,
    "custom_tool_call": _custom_call,
    "custom_tool_call_output": _output,
    "item_reference": _reference,
}
_PART_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def _text(item: Fields, name: str) -> str:
    """Text, or a list of parts: their texts with blank lines between, and a mark where something is not text."""
    if item.raw(name) is None or isinstance(item.raw(name), str):
        return item.text(name) or ""
    texts = []
    for part in item.objects(name):
        kind = part.required("type")
        if kind in _PART_TEXTS:
            texts.append(part.text("text") or "")
        elif kind == "refusal":
            texts.append(part.text("refusal") or "")
        else:
            texts.append(f"[Unsupported {kind.removeprefix('input_').capitalize()}]")
    return "\n\n".join(texts)
