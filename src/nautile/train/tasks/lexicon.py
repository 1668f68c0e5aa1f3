"""Words made of a tokenizer's own pieces, so that every entry of the vocabulary gets copied somewhere in training.

A small model copies a token reliably only after it has had to produce that token: an entry that no task ever asks for sinks
below the others, and a name that holds it comes out wrong. The dictionary of ``words`` reaches a part of the vocabulary only;
joining random pieces reaches all of it. Words that evaluation keeps for itself are never made; a piece of one may occur
inside a longer word. What this file does not know: tokenizers and files.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Lexicon"]

_LETTERS = re.compile(r"[^\w]?_?([A-Za-z]+)")
_COUNTS = (1, 1, 2, 2, 2, 3)  # pieces in a word


@dataclass(frozen=True)
class Lexicon:
    """``pieces``: strings of letters; ``kept``: words (lower case) that are never made; ``share``: of words drawn from here."""

    pieces: tuple[str, ...]
    kept: frozenset[str]
    share: float = 0.5

    @classmethod
    def of(cls, entries: Iterable[str], kept: Iterable[str], share: float = 0.5) -> Lexicon:
        """From the texts of a vocabulary's entries: their letters, without a space, dot or other lead. Sorted, each once."""
        found = {match[1] for entry in entries if (match := _LETTERS.fullmatch(entry))}
        if not found:
            raise ValueError("no entry of the vocabulary is made of letters")
        return cls(tuple(sorted(found)), frozenset(kept), share)

    def word(self, rng: random.Random) -> str:
        """One to three pieces in a row, in lower case or as they stand."""
        while True:
            text = "".join(rng.choices(self.pieces, k=rng.choice(_COUNTS)))
            if text.lower() not in self.kept and len(text) > 1:
                return text.lower() if rng.random() < 0.6 else text
