"""From a turn to what the engine needs: the conversation checked, its reasoning restored, the prompt, the room, the grammar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from nautile.engine.request import TokenConstraint
from nautile.protocol import ParsedMessage, Prompt, ProtocolError, texts
from nautile.protocol.conversation import Conversation, conversation
from nautile.protocol.encoder import Special
from nautile.protocol.grammar import constraint
from nautile.server.errors import invalid

if TYPE_CHECKING:
    from nautile.server.generation import Writer
    from nautile.server.service import Service
    from nautile.server.turn import Turn

__all__ = ["constrained", "fits", "normalised", "remember", "render", "room"]

_DEFAULT_TOKENS = {"chat": 8192, "thinking": 65_536, "max": 131_072}  # as the hosted API


def normalised(turn: Turn, service: Service) -> Conversation:
    """The turn's conversation, checked, with the reasoning that the client did not send back. Raises ApiError."""
    try:
        asked = conversation(
            turn.messages, tools=turn.tools, tool_choice=turn.tool_choice, response_format=turn.response_format
        )
        asked = replace(asked, messages=tuple(map(dict, service.calls.replayed(turn.partition, asked.messages))))
        if not turn.thinking:
            return asked
        strict, tools = service.options.strict_reasoning, bool(asked.tools)
        messages = service.memory.restored(turn.partition, asked.messages, tools=tools, strict=strict)
    except ProtocolError as error:
        raise invalid(str(error)) from None
    return replace(asked, messages=tuple(dict(message) for message in messages))


def render(turn: Turn, asked: Conversation, service: Service) -> Prompt:
    """The prompt of a turn. Raises ApiError for a conversation that cannot be rendered."""
    effort = turn.effort or service.options.effort
    if service.dialect == "preview" and effort == "low":
        effort = "high"  # the preview dialect's name for the prompt without an effort's text
    try:
        prompt = asked.prompt(tokenizer=service.tokenizer, thinking=turn.thinking, effort=effort, dialect=service.dialect)
    except ProtocolError as error:
        raise invalid(str(error), "messages") from None
    return prompt if prompt.continued else _answering(prompt, turn.thinking)


def _answering(prompt: Prompt, thinking: bool) -> Prompt:
    """Conversations that end with a system or assistant message have no header for an answer: one is added."""
    last = prompt.parts[-1]
    if prompt.start == "calls" or (isinstance(last, Special) and last in (texts.THINK_OPEN, texts.THINK_CLOSE)):
        return prompt
    header = (Special(texts.ASSISTANT), Special(texts.THINK_OPEN if thinking else texts.THINK_CLOSE))
    return replace(prompt, parts=(*prompt.parts, *header), start="reasoning" if thinking else "content")


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


def constrained(turn: Turn, asked: Conversation, prompt: Prompt, service: Service) -> Callable[[], TokenConstraint] | None:
    """What keeps the output to the tools or the format that was asked for; None when nothing was. Raises ApiError."""
    if prompt.continued and asked.response_format:
        raise invalid(
            "prefix: true and response_format exclude each other: the format holds for a whole answer", "response_format"
        )
    try:
        return constraint(
            service.tokenizer,
            start=prompt.start,
            tools=asked.tools,
            tool_choice=asked.tool_choice,
            response_format=asked.response_format,
            parallel=turn.parallel_calls,
        )
    except ProtocolError as error:
        raise invalid(str(error), "tools" if asked.tools else "response_format") from None


def remember(turn: Turn, asked: Conversation, writer: Writer, service: Service) -> None:
    """Keep the reasoning of an answer, and its calls as they were written, for the turns that follow it."""
    service.calls.remember(turn.partition, writer.calls)
    message = ParsedMessage("".join(writer.reasoning), "".join(writer.content), tuple(writer.calls)).message()
    service.memory.remember(turn.partition, asked.messages, message)
