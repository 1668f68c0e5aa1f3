"""The body of a chat request: its fields, their ranges, and the ``Turn`` that it asks for.

docs/api.md has the same table for readers: every field is honoured, ignored because that cannot hurt, or refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.config import JsonDict

from nautile.engine.sampling import SamplingParams
from nautile.server.errors import ApiError, invalid, unprocessable
from nautile.server.modes import effort_of, template_options, thinking_of
from nautile.server.service import Service
from nautile.server.turn import Turn

__all__ = [
    "LONGEST_STOP",
    "MOST_STOPS",
    "ChatRequest",
    "checked",
    "logit_bias_of",
    "response_format_of",
    "sampling_of",
    "stops_of",
    "to_turn",
    "tool_choice_of",
]

MOST_STOPS = 16
LONGEST_STOP = 1000
_MOST_TOKENS = 393_216
_RANGES = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number", "too_long", "literal_error")
Model = TypeVar("Model", bound=BaseModel)
# For the OpenAPI document; what is checked is checked by nautile.protocol.conversation.
_TEXT: JsonDict = {"type": "string"}
_FUNCTION: JsonDict = {"type": "object", "required": ["name"], "properties": {"name": {**_TEXT, "pattern": "^[a-zA-Z0-9_-]+$"}}}
_CALL: JsonDict = {"type": "object", "required": ["id", "function"], "properties": {"id": _TEXT, "function": _FUNCTION}}
_PART: JsonDict = {"type": "object", "required": ["type", "text"], "properties": {"type": {"enum": ["text"]}, "text": _TEXT}}
_SAID: JsonDict = {"anyOf": [_TEXT, {"type": "array", "items": _PART}]}
_MESSAGE: JsonDict = {
    "anyOf": [
        {
            "type": "object",
            "required": ["role", "content"],
            "properties": {"role": {"enum": ["system", "developer", "user"]}, "content": _SAID},
        },
        {
            "type": "object",
            "required": ["role", "content"],
            "properties": {
                "role": {"enum": ["assistant"]},
                "content": _SAID,
                "reasoning_content": _TEXT,
                "tool_calls": {"type": "array", "items": _CALL},
            },
        },
        {
            "type": "object",
            "required": ["role", "content", "tool_call_id"],
            "properties": {"role": {"enum": ["tool"]}, "content": _SAID, "tool_call_id": _TEXT},
        },
    ],
}
_TOOL: JsonDict = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {"type": {"enum": ["function"]}, "function": _FUNCTION},
}


class Sampled(BaseModel):
    """The fields that chat and plain completions share."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = Field(None, description="Any name; the one model of this server answers.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = Field(None, description="-1 and 0: no limit")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[str, float] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[str] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    user: str | None = Field(None, description="Ignored.")


class ChatRequest(Sampled):
    """A request to /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(json_schema_extra={"items": _MESSAGE, "minItems": 1})
    tools: list[dict[str, Any]] | None = Field(None, json_schema_extra={"items": _TOOL})
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    thinking: dict[str, Any] | bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    modalities: list[str] | None = None
    audio: Any = Field(None, description="Refused.")
    functions: Any = Field(None, description="Refused: use tools.")
    function_call: Any = Field(None, description="Refused: use tool_choice.")
    web_search_options: Any = Field(None, description="Refused.")


def checked(kind: type[Model], body: Mapping[str, Any]) -> Model:
    """The body as a request of one kind. Raises ApiError: 422 for a value out of range, 400 for any other fault."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        param = ".".join(str(part) for part in fault["loc"] if isinstance(part, int) or part in _fields(kind, body))
        status = 422 if fault["type"] in _RANGES else 400
        got = repr(fault["input"])
        text = f"{param or 'the request'}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
        text += f", got {got if len(got) <= 60 else got[:57] + '...'}" if fault["type"] != "missing" else ""
        raise ApiError(status, text.encode("utf-8", "replace").decode(), param=param or None) from None


def _fields(kind: type[BaseModel], body: Mapping[str, Any]) -> set[str]:
    return {*kind.model_fields, *body}


def to_turn(request: ChatRequest, service: Service, partition: str, request_id: str) -> Turn:
    """What the request asks of the model. Raises ApiError."""
    _refuse_unsupported(request)
    kwargs_thinking, kwargs_effort = template_options(request.chat_template_kwargs)
    thinking = thinking_of(request.thinking)
    if thinking is None:
        thinking = True if kwargs_thinking is None else kwargs_thinking
    return Turn(
        messages=request.messages,
        tools=request.tools,
        tool_choice=tool_choice_of(request.tool_choice, request.tools),
        parallel_calls=request.parallel_tool_calls is not False,
        thinking=thinking,
        effort=effort_of(request.reasoning_effort) or kwargs_effort,
        sampling=sampling_of(request, service),
        max_tokens=request.max_completion_tokens or request.max_tokens,
        response_format=response_format_of(request.response_format),
        stop=stops_of(request.stop),
        logprobs=_logprobs(request),
        partition=partition,
        id=request_id,
    )


def _refuse_unsupported(request: ChatRequest) -> None:
    """What cannot be done, and would change the meaning of the answer if it were left out."""
    if request.n not in (None, 1):
        raise unprocessable("n must be 1: send the request again for another answer", "n")
    if request.functions or request.function_call:
        raise invalid("functions and function_call are not supported; send tools and tool_choice", "functions")
    if request.audio or set(request.modalities or ()) - {"text"}:
        raise invalid("this model writes text only; leave audio out of modalities", "modalities")
    if request.web_search_options is not None:
        raise invalid("this server has no web search; offer a tool that searches", "web_search_options")
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options should be set along with stream = true", "stream_options")


def _logprobs(request: ChatRequest) -> int | None:
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs needs logprobs = true", "top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None


def sampling_of(request: Sampled, service: Service) -> SamplingParams:
    """How to sample. A request without a seed gets a fresh one."""
    temperature = service.options.temperature if request.temperature is None else request.temperature
    return SamplingParams(
        temperature=temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=None if request.seed is None else request.seed % 2**64,
        top_k=max(request.top_k or 0, 0),
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        logit_bias=logit_bias_of(request.logit_bias, service),
    )


def logit_bias_of(bias: Mapping[str, float] | None, service: Service) -> dict[int, float]:
    """Token ids and what is added to their logits. Raises ApiError."""
    result = {}
    size = service.engine.config.vocab_size
    for key, value in (bias or {}).items():
        if not key.isascii() or not key.isdigit() or len(key) > 9 or int(key) >= size or not -100 <= value <= 100:
            text = f"logit_bias maps token ids (0 to {size - 1}) to numbers from -100 to 100, got {key!r}: {value}"
            raise unprocessable(text, "logit_bias")
        result[int(key)] = value
    return result


def stops_of(stop: str | list[str] | None) -> tuple[str, ...]:
    """Stop strings. Raises ApiError for too many, for empty ones and for very long ones."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MOST_STOPS:
        raise unprocessable(f"stop has {len(stops)} strings; at most {MOST_STOPS} are allowed", "stop")
    if any(not 0 < len(text) <= LONGEST_STOP for text in stops):
        raise unprocessable(f"a stop string must have 1 to {LONGEST_STOP} characters", "stop")
    return stops


def tool_choice_of(
    choice: str | Mapping[str, Any] | None, tools: Sequence[Mapping[str, Any]] | None
) -> str | Mapping[str, Any] | None:
    """The choice in protocol form. Raises ApiError for a choice without tools, or of a tool that is not offered."""
    if choice is None or choice in ("auto", "none"):
        return choice
    if not tools:
        raise invalid("tool_choice asks for a call, but there are no tools; send tools", "tool_choice")
    if choice == "required":
        return choice
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    names = [tool["function"].get("name") for tool in tools if isinstance(tool.get("function"), Mapping)]
    if not isinstance(name, str) or name not in names:
        text = f'tool_choice must be "auto", "none", "required" or name one of the tools ({", ".join(map(str, names))})'
        raise invalid(text, "tool_choice")
    return {"type": "function", "function": {"name": name}}


def response_format_of(value: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The format in protocol form, None for plain text. Raises ApiError."""
    if value is None or value.get("type") == "text":
        return None
    if value.get("type") == "json_object":
        return {"type": "json_object"}
    if value.get("type") != "json_schema":
        raise invalid('response_format.type must be "text", "json_object" or "json_schema"', "response_format")
    inner = value.get("json_schema")
    if not isinstance(inner, Mapping) or not isinstance(inner.get("schema"), Mapping):
        raise invalid("response_format.json_schema.schema must be a JSON schema", "response_format")
    return {"type": "json_schema", "json_schema": {key: inner.get(key) for key in ("name", "schema", "strict")}}
