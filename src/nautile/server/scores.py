"""Log-probabilities beside the text: each is given when the text of its token has been shown, or never.

Tokens and shown text do not go in step: the reader trims newlines and keeps markup to itself, and the stop filter holds text
back. Both are counted here in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Scores", "TokenLogprobs"]


@dataclass(frozen=True)
class TokenLogprobs:
    """One token of the reasoning or the content: its bytes, its log-probability, and the likeliest (bytes, log-probability)."""

    section: Literal["reasoning", "content"]
    data: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass
class Scores:
    """Those of one section that wait. Written by the writer, in the order of its methods here."""

    _waiting: list[tuple[TokenLogprobs, int]] = field(default_factory=list)  # with the byte where each begins
    _sampled = _said = _shown = 0  # bytes: of the tokens, of what the reader made of them, of what the client got

    def sampled(self, logprobs: TokenLogprobs) -> None:
        """A token came."""
        self._waiting.append((logprobs, self._sampled))
        self._sampled += len(logprobs.data)

    def said(self, text: str) -> None:
        """The reader says this text; if it is the first, newlines before it may have been trimmed."""
        if not self._said and not text.startswith("\n"):
            data = b"".join(logprobs.data for logprobs, _ in self._waiting)
            trimmed = len(data) - len(data.lstrip(b"\n"))
            self._waiting = [
                (logprobs, max(begins - trimmed, 0))
                for logprobs, begins in self._waiting
                if begins + len(logprobs.data) > trimmed
            ]
            self._sampled -= trimmed
        self._said += len(text.encode("utf-8", "replace"))

    def shown(self, text: str) -> None:
        """The client gets this text."""
        self._shown += len(text.encode("utf-8", "replace"))

    def markup(self) -> None:
        """A tag begins: tokens whose text was not said are part of it, or were trimmed before it."""
        self._waiting = [(logprobs, begins) for logprobs, begins in self._waiting if begins < self._said]
        self._sampled = self._said

    def released(self) -> Iterator[TokenLogprobs]:
        """Those whose text has been shown since the last time."""
        waiting = []
        for logprobs, begins in self._waiting:
            if begins < self._shown:
                yield logprobs
            else:
                waiting.append((logprobs, begins))
        self._waiting = waiting
