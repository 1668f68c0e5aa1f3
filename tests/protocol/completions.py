"""Helpers of the protocol tests: a byte-level tokenizer made on the spot, completions as ids, events in a canonical form."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from nautile.protocol import ContentDelta, ReasoningDelta, StreamParser, Tokenizer, texts

SPECIALS = (
    texts.BOS, texts.EOS, texts.USER, texts.ASSISTANT, texts.THINK_OPEN, texts.THINK_CLOSE, texts.DSML, texts.REMINDER,
    *texts.TASKS.values(),
)  # fmt: skip
MERGES = ("< /", "> <", "Ġ <", "i n", "t o", "to o", "too l", "Ã ©", '" >', "Ċ Ċ")
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTES = bytes([*PRINTABLE, *(byte for byte in range(256) if byte not in PRINTABLE)])
_SPLIT = re.compile("(" + "|".join(re.escape(text) for text in SPECIALS) + ")")


def byte_tokenizer() -> Tokenizer:
    """256 bytes, a few merges across the borders of tags, and the special tokens of the protocol; ids unlike V4's."""
    alphabet = [chr(byte) for byte in PRINTABLE] + [chr(256 + index) for index in range(256 - len(PRINTABLE))]
    pieces = [*alphabet, *(merge.replace(" ", "") for merge in MERGES)]
    flags = {"special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    data: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [{"id": len(pieces) + index, "content": text, **flags} for index, text in enumerate(SPECIALS)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": [merge.split(" ") for merge in MERGES],
        },
    }
    return Tokenizer(data)


def ids_of(text: str, tokenizer: Tokenizer) -> list[int]:
    """A completion as a model writes it: special tokens where their strings stand."""
    ids: list[int] = []
    for piece in _SPLIT.split(text):
        ids += [tokenizer.special(piece)] if piece in SPECIALS else tokenizer.encode(piece)
    return ids


def byte_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The same, one id for every byte."""
    pieces = (
        ([tokenizer.special(piece)] if piece in SPECIALS else ids_of_bytes(piece.encode())) for piece in _SPLIT.split(text)
    )
    return [number for piece in pieces for number in piece]


def ids_of_bytes(data: bytes) -> list[int]:
    """Ids of single bytes: the first 256 of ``byte_tokenizer``."""
    return [BYTES.index(byte) for byte in data]


def joined(events):
    """Events with neighbouring deltas of one kind joined: what must not depend on the cuts."""
    out = []
    for event in events:
        if out and isinstance(event, ReasoningDelta | ContentDelta) and type(out[-1]) is type(event):
            out[-1] = type(event)(out[-1].text + event.text)
        else:
            out.append(event)
    return out


def streamed(pieces, reason=None, **options):
    """The joined events of a completion fed in these pieces."""
    parser = StreamParser(**options)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return joined(events + parser.finish(reason))


def cut(whole, places):
    """``whole`` (text, bytes or a list) cut at these places."""
    places = sorted({0, len(whole), *(place % (len(whole) + 1) for place in places)})
    return [whole[start:end] for start, end in pairwise(places)]


def tag(kind: str, /, **attributes: str) -> str:
    """An opening tag."""
    return f"<{texts.DSML}{kind}" + "".join(f' {key}="{value}"' for key, value in attributes.items()) + ">"


def close(name: str) -> str:
    """A closing tag."""
    return f"</{texts.DSML}{name}>"


def parameter(name: str, value: str, string: str = "true") -> str:
    """One parameter of a call."""
    return tag("parameter", name=name, string=string) + value + close("parameter")


def invoke(name: str, *parameters: str) -> str:
    """One call."""
    return "\n".join([tag("invoke", name=name), *parameters, close("invoke")])


def block(*invokes: str) -> str:
    """A block of calls."""
    return "\n".join([tag("tool_calls"), *invokes, close("tool_calls")])


def function(name: str, **properties: Any) -> dict[str, Any]:
    """A tool."""
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": schema}}
