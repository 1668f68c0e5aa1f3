"""The DeepSeek-V4 network, one mechanism a file."""

from nautile.model.transformer import Trace, Transformer

__all__ = ["Trace", "Transformer"]
