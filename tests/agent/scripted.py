"""An engine that says what a test tells it to, with a byte-level tokenizer made on the spot."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nautile.agent.client import EngineClient
from nautile.engine import SamplingParams
from nautile.protocol import Tokenizer, texts

SPECIALS = (texts.BOS, texts.EOS, texts.USER, texts.ASSISTANT, texts.THINK_OPEN, texts.THINK_CLOSE, texts.DSML)
MERGES = ("t h", "th e", "a b", "i n", "l i", "li n", "lin e")


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE: the 256 bytes, a few merges, the specials of the protocol."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    pieces = [*alphabet, *(merge.replace(" ", "") for merge in MERGES)]
    added = [
        {
            "id": len(pieces) + index,
            "content": name,
            "special": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for index, name in enumerate(SPECIALS)
    ]
    return Tokenizer(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {piece: index for index, piece in enumerate(pieces)},
                "merges": [merge.split(" ") for merge in MERGES],
            },
        }
    )


def call(name: str, **arguments: object) -> str:
    """One call block, with what a model writes around it."""
    dsml = texts.DSML
    parameters = [
        f'<{dsml}parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else json.dumps(value)}</{dsml}parameter>"
        for key, value in arguments.items()
    ]
    body = "\n".join(parameters)
    invoke = f'<{dsml}invoke name="{name}">\n{body}\n</{dsml}invoke>'
    return f"I call {name}.</think>\n\n<{dsml}tool_calls>\n{invoke}\n</{dsml}tool_calls>{texts.EOS}"


def answer(text: str) -> str:
    """A final turn."""
    return f"I know.</think>{text}{texts.EOS}"


@dataclass(frozen=True)
class Config:
    dialect: str | None = "0731"


class ScriptedEngine:
    """Each prompt gets the next turn: a text, ids, or a function that yields ids. ``prompts`` keeps what was asked."""

    config = Config()

    def __init__(self, turns: Sequence[str | list[int] | Callable[[], Iterator[int]]]) -> None:
        self.tokenizer = make_tokenizer()
        self.turns, self.prompts = list(turns), []

    def ids(self, text: str) -> list[int]:
        pattern = "(" + "|".join(map(re.escape, SPECIALS)) + ")"
        ids: list[int] = []
        for piece in re.split(pattern, text):
            ids += [self.tokenizer.special(piece)] if piece in SPECIALS else self.tokenizer.encode(piece) if piece else []
        return ids

    def stream(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Iterator[int]:
        self.prompts.append(list(prompt_ids))
        turn = self.turns.pop(0)
        ids = self.ids(turn) if isinstance(turn, str) else iter(turn) if isinstance(turn, list) else turn()
        for count, token in enumerate(ids):
            if count == sampling.max_tokens:
                return
            yield token


def client(*turns: str | list[int] | Callable[[], Iterator[int]]) -> EngineClient:
    """A client of a scripted engine."""
    return EngineClient(ScriptedEngine(turns), SamplingParams(), "scripted")
