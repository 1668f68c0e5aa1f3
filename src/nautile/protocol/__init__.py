"""The agent protocol: messages <-> ids."""

from nautile.protocol.encoder import Prompt, ProtocolError, encode
from nautile.protocol.tokenizer import Tokenizer, TokenizerError

__all__ = ["Prompt", "ProtocolError", "Tokenizer", "TokenizerError", "encode"]
