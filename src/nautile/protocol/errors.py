"""The one error of the protocol."""

from __future__ import annotations

__all__ = ["ProtocolError"]


class ProtocolError(ValueError):
    """A conversation cannot be rendered, or a parser is used wrongly; the text says what to change."""
