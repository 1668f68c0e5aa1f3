"""The agent protocol: messages -> prompt ids (``encode``), completion ids -> events (``parse``, ``StreamParser``)."""

from nautile.protocol.conversation import Conversation, conversation
from nautile.protocol.encoder import Prompt, encode
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
from nautile.protocol.grammar import constraint
from nautile.protocol.parser import StreamParser, parse
from nautile.protocol.tokenizer import Tokenizer, TokenizerError

__all__ = [
    "ContentDelta",
    "Conversation",
    "Event",
    "Finish",
    "ParsedMessage",
    "Prompt",
    "ProtocolError",
    "ReasoningDelta",
    "StreamParser",
    "Tokenizer",
    "TokenizerError",
    "ToolCall",
    "ToolCallArguments",
    "ToolCallEnd",
    "ToolCallStart",
    "constraint",
    "conversation",
    "encode",
    "parse",
]
