"""What the agent needs of a model: a conversation that takes messages and gives replies.

``EngineClient`` keeps the conversation as token ids. What the model sampled goes back into the next prompt as it was sampled;
only what is new (tool results, a user's text) is encoded. A client over HTTP keeps messages instead; the agent cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nautile.protocol import (
    ContentDelta,
    Event,
    ReasoningDelta,
    StreamParser,
    Tokenizer,
    ToolCall,
    ToolCallEnd,
    encode,
    texts,
)

if TYPE_CHECKING:
    from nautile.engine import SamplingParams

__all__ = ["Chat", "ChatClient", "ClientError", "EngineClient", "Message", "Reply", "TokenEngine"]

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """One turn of the model. ``ended`` is False when a limit cut it; ``ids`` are what it sampled, where tokens are known."""

    reasoning: str
    content: str
    calls: tuple[ToolCall, ...]
    ended: bool
    ids: tuple[int, ...] = ()

    def message(self) -> dict[str, Any]:
        """The assistant message of this turn."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "reasoning_content": self.reasoning}
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return message


class Chat(Protocol):
    """A conversation in progress: messages go in with ``say``, turns of the model come out of ``reply``."""

    @property
    def tokens(self) -> int:
        """Length of the conversation so far in tokens."""

    def say(self, messages: Sequence[Message]) -> None:
        """Append user or tool messages."""

    def reply(self, max_tokens: int, watch: Callable[[Event], None]) -> Reply:
        """Let the model take its turn and append it; ``watch`` sees it as it comes. An exception appends nothing."""

    def replay(self, reply: Reply) -> None:
        """Append a turn that the model took earlier."""


class ChatClient(Protocol):
    """Opens conversations with one model."""

    @property
    def name(self) -> str:
        """The model, as a trajectory should name it."""

    def open(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Chat:
        """A conversation that begins with ``messages`` and offers ``tools``."""


class ClientError(ValueError):
    """The engine cannot hold a conversation as it is; the text says what it lacks."""


class _Config(Protocol):
    @property
    def dialect(self) -> str | None: ...


class TokenEngine(Protocol):
    """The part of ``nautile.Engine`` that is used here."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def config(self) -> _Config: ...

    def stream(self, prompt_ids: Sequence[int], sampling: SamplingParams | None = None) -> Iterator[int]: ...


@dataclass(frozen=True)
class EngineClient:
    """Conversations with an engine in this process. ``sampling.max_tokens`` is replaced by what each turn may use."""

    engine: TokenEngine
    sampling: SamplingParams
    name: str = "model"
    thinking: bool = True
    dialect: str | None = None  # None: the one the checkpoint names

    def open(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Chat:
        """See ``ChatClient.open``. Raises ClientError when there is no tokenizer, or no dialect to write prompts in."""
        dialect = self.dialect or self.engine.config.dialect
        if self.engine.tokenizer is None:
            raise ClientError("the engine has no tokenizer: pass Engine(model, tokenizer=...)")
        if dialect is None:
            raise ClientError("the checkpoint does not say its prompt dialect: pass --dialect 0731 or --dialect preview")
        return _EngineChat(replace(self, dialect=dialect), self.engine.tokenizer, messages, tools)


class _EngineChat:
    """``ids`` is the prompt of the next turn; ``messages`` says the same for the encoder's rules."""

    def __init__(self, client: EngineClient, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        self.client, self.tokenizer, self.tools = client, tokenizer, list(tools)
        self.eos = tokenizer.special(texts.EOS)
        self.messages: list[Message] = []
        self.ids: list[int] = []
        self.say(_offering(messages, self.tools))

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def say(self, messages: Sequence[Message]) -> None:
        # Without tools V4 drops the reasoning of older turns, so nothing but the whole can be encoded.
        before = self.messages if self.tools else []
        after = messages if self.tools else [*self.messages, *messages]
        prompt = encode(
            after,
            tokenizer=self.tokenizer,
            thinking=self.client.thinking,
            dialect=self.client.dialect or "",
            context=before,
        )
        cut_short = bool(before) and before[-1]["role"] == "assistant" and self.ids[-1] != self.eos
        self.ids = [*self.ids, *([self.eos] if cut_short else []), *prompt.ids] if before else prompt.ids
        self.messages += messages

    def reply(self, max_tokens: int, watch: Callable[[Event], None]) -> Reply:
        start: Literal["reasoning", "content"] = "reasoning" if self.client.thinking else "content"
        parser = StreamParser(start=start, tokenizer=self.tokenizer, tools=self.tools, call_seed=str(len(self.ids)))
        sampling = replace(self.client.sampling, max_tokens=max_tokens)
        ids: list[int] = []
        events: list[Event] = []

        def note(new: Sequence[Event]) -> None:
            for event in new:
                events.append(event)
                watch(event)

        for token in self.client.engine.stream(self.ids, sampling):
            ids.append(token)
            if token == self.eos:
                break
            note(parser.feed([token]))
        ended = bool(ids) and ids[-1] == self.eos
        note(parser.finish("stop" if ended else "length"))
        reply = Reply(
            "".join(event.text for event in events if isinstance(event, ReasoningDelta)),
            "".join(event.text for event in events if isinstance(event, ContentDelta)),
            tuple(event.call for event in events if isinstance(event, ToolCallEnd)),
            ended,
            tuple(ids),
        )
        self.replay(reply)
        return reply

    def replay(self, reply: Reply) -> None:
        self.ids = [*self.ids, *reply.ids]
        self.messages.append(reply.message())


def _offering(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Messages with the tools on the first system message, where the encoder's rules look for them."""
    if not tools:
        return list(messages)
    if not messages or messages[0].get("role") != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    return [{**messages[0], "tools": list(tools)}, *messages[1:]]
