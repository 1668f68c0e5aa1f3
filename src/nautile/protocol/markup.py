"""Completions -> one stream of atoms, and the tags in it.

An atom is a character or a mark. Marks are ``｜DSML｜`` and ``</think>``; in a stream of ids they are these two tokens and
nothing else, in a stream of text their spelling. Inside this package a mark is one lone surrogate, a code point that no
decoded text contains, so that one Python string holds both and nothing spelled out can be taken for a token.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from nautile.protocol import texts
from nautile.protocol.errors import ProtocolError
from nautile.protocol.tokenizer import Tokenizer

__all__ = ["CLOSE", "MARK", "Reader", "Tag", "held", "next_mark", "read_tag", "spelled"]

MARK = "\ud800"  # ｜DSML｜
CLOSE = "\ud801"  # </think>

_SPELLING = {MARK: texts.DSML, CLOSE: texts.THINK_CLOSE}
_ANY = re.compile(f"[{MARK}{CLOSE}]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def spelled(atoms: str) -> str:
    """Atoms as text, marks by their spelling."""
    return atoms.replace(MARK, texts.DSML).replace(CLOSE, texts.THINK_CLOSE)


def next_mark(atoms: str, start: int = 0) -> int:
    """Position of the first mark from ``start`` on, -1 when there is none."""
    found = _ANY.search(atoms, start)
    return found.start() if found else -1


def held(atoms: str) -> int:
    """How many atoms at the end may be the beginning of a tag."""
    return next((len(opening) for opening in ("</｜", "</", "<｜", "<") if atoms.endswith(opening)), 0)


class Reader:
    """Ids, or text, or bytes -> atoms, however they are cut. One kind of input in one life.

    With ``marks=False`` ``｜DSML｜`` is text like any other. ``ended`` is True once the end-of-sentence id has come; what
    follows it is ignored.
    """

    def __init__(self, tokenizer: Tokenizer | None, marks: bool) -> None:
        self.tokenizer, self.ended = tokenizer, False
        self.kind: Literal["ids", "text"] | None = None
        self._atoms = [CLOSE, MARK] if marks else [CLOSE]
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._tail = ""  # text that may be the beginning of a mark's spelling
        self._special: dict[int, str] = {}
        self._end = -1

    def feed(self, data: str | bytes | int | Iterable[int]) -> str:
        """The atoms that are certain now. Raises ProtocolError for ids without a tokenizer and for mixed input."""
        if isinstance(data, bytes | bytearray):
            self._start("text")
            return self._text(self._bytes.decode(bytes(data)))
        if isinstance(data, str):
            self._start("text")
            return self._text(self._bytes.decode(b"", final=True) + _SURROGATE.sub("\ufffd", data))
        self._start("ids")
        return self._ids([data] if isinstance(data, int) else data)

    def finish(self) -> str:
        """The rest: half a character becomes U+FFFD, half a mark becomes text."""
        rest = self._bytes.decode(b"", final=True)
        return rest if self.kind == "ids" else self._text(rest) + self._tail

    def _start(self, kind: Literal["ids", "text"]) -> None:
        if self.kind == kind:
            return
        if self.kind is not None:
            raise ProtocolError("feed one parser with ids, or with text, not with both")
        if kind == "ids":
            if self.tokenizer is None:
                raise ProtocolError("ids need a tokenizer: pass tokenizer=... to the parser")
            self._special = {self.tokenizer.special(_SPELLING[atom]): atom for atom in self._atoms}
            self._end = self.tokenizer.special(texts.EOS)
        self.kind = kind

    def _ids(self, ids: Iterable[int]) -> str:
        assert self.tokenizer is not None
        atoms = []
        for token in ids:
            if self.ended or token == self._end:
                self.ended = True
                break
            mark = self._special.get(token)
            if mark is None:
                atoms.append(self._bytes.decode(self.tokenizer.decode_bytes([token])))
            else:
                atoms += [self._bytes.decode(b"", final=True), mark]
        return "".join(atoms)

    def _text(self, text: str) -> str:
        text = self._tail + text
        for atom in self._atoms:
            text = text.replace(_SPELLING[atom], atom)
        longest = max((len(_SPELLING[atom]) for atom in self._atoms), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(_SPELLING[atom].startswith(text[-size:]) for atom in self._atoms):
                self._tail = text[-size:]
                return text[:-size]
        self._tail = ""
        return text


@dataclass(frozen=True)
class Tag:
    """Markup found at a ``｜DSML｜``: atoms ``start`` to ``end`` of the buffer.

    ``stray`` is markup that is no tag of the grammar; ``cut`` is a tag that the end of the output cut off.
    """

    kind: Literal["calls", "invoke", "parameter", "stray", "cut"]
    start: int
    end: int
    closing: bool = False
    empty: bool = False  # closes itself: <.../>
    name: str | None = None
    string: str | None = None  # the attribute as written


_KINDS: dict[str, Literal["calls", "invoke", "parameter"]] = {
    "tool_calls": "calls",
    "function_calls": "calls",
    "invoke": "invoke",
    "parameter": "parameter",
}
_LONGEST_TAG = 1024
_LONGEST_WORD = 32
_WORD = re.compile(r"[A-Za-z_]*")
_ATTRIBUTE = r'([\w-]+)\s*=\s*("[^"]*"|[^\s">]+)'
_ATTRIBUTES = re.compile(rf"(?:\s+{_ATTRIBUTE})*\s*")
_BEGUN = re.compile(r'\s*/?|\s+[\w-]+\s*/?|\s+[\w-]+\s*=\s*(?:[^\s"]\S*(?:\s.*)?|".*)?', re.DOTALL)  # any prefix of attributes
_OPEN_QUOTE = re.compile(r'=\s*"\Z')
_NAME_THEN_STRING = re.compile(r'\s+name\s*=\s*"(.*)"\s+string\s*=\s*"([^"]*)"', re.DOTALL)
_STRING_THEN_NAME = re.compile(r'\s+string\s*=\s*"([^"]*)"\s+name\s*=\s*"(.*)"', re.DOTALL)
_NAME_ALONE = re.compile(r'\s+name\s*=\s*"(.*)"', re.DOTALL)


def read_tag(atoms: str, mark: int, final: bool) -> Tag | None:
    """The tag around the ``｜DSML｜`` at ``mark``; None when more atoms are needed to tell, which is never so when ``final``.

    The answer depends on the atoms alone, not on how many have arrived: a shorter buffer says None or the same.
    """
    size = held(atoms[max(mark - 3, 0) : mark])
    if not size:
        return Tag("stray", mark, mark + 1)
    begin = mark + 1 + (atoms[mark + 1 : mark + 2] == "｜")  # a bar may be doubled on either side
    stray = Tag("stray", mark - size, begin, closing=atoms[mark - size : mark].startswith("</"))
    matched = _WORD.match(atoms, begin, begin + 1 + _LONGEST_WORD)
    word = matched[0] if matched else ""
    after = begin + len(word)
    if after < len(atoms) or len(word) > _LONGEST_WORD:
        kind = _kind(word, stray.closing)
        if kind is not None:
            return _known_tag(atoms, replace(stray, kind=kind, end=after), begin, final)
        return replace(stray, end=after + 1) if word and atoms[after : after + 1] == ">" else stray
    if not final:
        return None
    begun = stray.closing or any(known.startswith(word) for known in _KINDS)
    return replace(stray, kind="cut", end=after) if begun else stray


def _known_tag(atoms: str, tag: Tag, word_start: int, final: bool) -> Tag | None:
    """The rest of a tag whose word ends at ``tag.end``: its attributes up to ``>``, or up to where it breaks off."""
    boundary = next_mark(atoms, tag.end)
    limit = min(len(atoms) if boundary < 0 else boundary, tag.end + _LONGEST_TAG)
    end = _terminator(atoms, tag.end, limit)
    region = atoms[tag.end : limit if end < 0 else end]
    if not _BEGUN.fullmatch(region):
        return tag if tag.closing else replace(tag, kind="stray", end=word_start)  # a closing tag can do without its ">"
    if end >= 0:
        return _with_attributes(replace(tag, end=end + 1), region)
    if limit == len(atoms) and boundary < 0 and limit < tag.end + _LONGEST_TAG:
        return replace(tag, kind="cut", end=limit) if final else None
    first = atoms.find(">", tag.end, limit)  # another mark, or too much text, before the end
    if first >= 0:
        return _with_attributes(replace(tag, end=first + 1), atoms[tag.end : first])
    return tag if tag.closing else replace(tag, kind="stray", end=word_start)


def _kind(word: str, closing: bool) -> Literal["calls", "invoke", "parameter"] | None:
    """Opening tags are known by their exact names; a closing tag may be misspelt (``tool_ccalls``, ``inv``)."""
    if word in _KINDS or not closing:
        return _KINDS.get(word)
    if word.startswith("inv"):
        return "invoke"
    if word.startswith("param"):
        return "parameter"
    return "calls" if word.startswith(("tool", "func")) or word.endswith("calls") else None


def _terminator(atoms: str, start: int, limit: int) -> int:
    """Position of the ``>`` that ends the tag, -1 when there is none; a ``>`` inside quotes ends nothing."""
    end = atoms.find(">", start, limit)
    while end >= 0:
        body = atoms[start:end].rstrip().removesuffix("/").rstrip()
        quoted = '"' in body
        if not quoted or (body.endswith('"') and not _OPEN_QUOTE.search(body)) or _ATTRIBUTES.fullmatch(body):
            return end
        end = atoms.find(">", end + 1, limit)
    return -1


def _with_attributes(tag: Tag, region: str) -> Tag:
    body = region.rstrip()
    empty = body.endswith("/")
    body = body.removesuffix("/").rstrip()
    name, string = _attributes(body)
    name = None if name is None else spelled(name)
    return replace(tag, empty=empty, name=name, string=string)


def _attributes(body: str) -> tuple[str | None, str | None]:
    """``name`` and ``string`` of a tag, in any order; a name may hold quotes when what follows it is clear."""
    if _ATTRIBUTES.fullmatch(body):
        found = {key: value[1:-1] if value[0] == '"' else value.strip("'“”") for key, value in re.findall(_ATTRIBUTE, body)}
        return found.get("name"), found.get("string")
    if match := _NAME_THEN_STRING.fullmatch(body):
        return match[1], match[2]
    if match := _STRING_THEN_NAME.fullmatch(body):
        return match[2], match[1]
    match = _NAME_ALONE.fullmatch(body)
    return (match[1] if match else None), None
