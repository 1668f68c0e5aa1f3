"""From a turn to the engine's prompt: the rules a server adds to the encoder's.

The text rules themselves (roles, order, markup) are the protocol's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from nautile.engine.request import TokenConstraint
from nautile.protocol import Prompt, ProtocolError, encode, texts
from nautile.protocol.encoder import Special
from nautile.server.errors import invalid

if TYPE_CHECKING:
    from nautile.server.generation import Writer
    from nautile.server.service import Service
    from nautile.server.turn import Turn

__all__ = ["constrained", "fits", "remember", "render", "restored", "room"]

_DEFAULT_TOKENS = {"chat": 8192, "thinking": 65_536, "max": 131_072}  # as the hosted API


def render(turn: Turn, service: Service) -> Prompt:
    """The prompt of a turn. Raises ApiError for a conversation that cannot be rendered."""
    messages = list(turn.messages)
    last = messages.pop() if turn.continues else None
    effort = _effort(turn.effort or service.options.effort, service.dialect)
    try:
        prompt = encode(
            messages,
            tokenizer=service.tokenizer,
            tools=_listed(turn) or None,
            thinking=turn.thinking,
            effort=effort,
            dialect=service.dialect,
            response_format=_schema(turn.response_format),
        )
    except ProtocolError as error:
        raise invalid(str(error), "messages") from None
    if last is not None:
        return _continued(prompt, last)
    if _must_call(turn) and not turn.thinking:
        opened = texts.CALLS_OPEN.split(texts.DSML)
        return Prompt((*prompt.parts, "\n\n" + opened[0], Special(texts.DSML), opened[1]), "calls", prompt.tokenizer)
    return prompt


def _must_call(turn: Turn) -> bool:
    return turn.tool_choice == "required" or isinstance(turn.tool_choice, Mapping)


def _listed(turn: Turn) -> list[Mapping[str, Any]]:
    """The tools in the prompt: all, none, or the one that was named."""
    if isinstance(turn.tool_choice, Mapping):
        name = turn.tool_choice["function"]["name"]
        return [tool for tool in turn.tools if tool["function"]["name"] == name]
    return list(turn.offered)


def _effort(effort: str, dialect: str) -> str:
    """The preview dialect knows no low; what it has for it is no prefix, which it calls high."""
    return "high" if dialect == "preview" and effort == "low" else effort


def _schema(response_format: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if response_format is None or response_format.get("type") != "json_schema":
        return None
    schema: Mapping[str, Any] = response_format["json_schema"]["schema"]
    return schema


def _continued(prompt: Prompt, last: Mapping[str, Any]) -> Prompt:
    """The answer goes on from what the last message says."""
    reasoning, content = last.get("reasoning_content") or "", last.get("content") or ""
    if prompt.start == "content":
        return Prompt((*prompt.parts, content), "content", prompt.tokenizer)
    if content:
        return Prompt((*prompt.parts, reasoning, Special(texts.THINK_CLOSE), content), "content", prompt.tokenizer)
    return Prompt((*prompt.parts, reasoning), "reasoning", prompt.tokenizer)


def room(turn: Turn, prompt_tokens: int, service: Service) -> int:
    """Most new tokens of a turn. Raises ApiError when the prompt does not fit."""
    effort = turn.effort or service.options.effort
    mode = ("max" if effort == "max" else "thinking") if turn.thinking else "chat"
    return min(turn.max_tokens or _DEFAULT_TOKENS[mode], fits(prompt_tokens, service))


def fits(prompt_tokens: int, service: Service) -> int:
    """Tokens that the context has left after a prompt. Raises ApiError when there are none."""
    if prompt_tokens < service.context:
        return service.context - prompt_tokens
    text = f"the prompt has {prompt_tokens} tokens; {service.name} takes {service.context - 1}"
    raise invalid(f"{text}: shorten the conversation, its tool results or its tools", "messages", "context_length_exceeded")


def constrained(
    turn: Turn, start: Literal["reasoning", "content", "calls"], service: Service
) -> Callable[[], TokenConstraint] | None:
    """What keeps the output to the tools or the format that was asked for; None when nothing was."""
    return None


def restored(turn: Turn, service: Service) -> Turn:
    """The turn with the reasoning that the client did not send back."""
    return turn


def remember(turn: Turn, writer: Writer, service: Service) -> None:
    """Keep the reasoning of an answer for the turns that follow it."""
