"""A fact somewhere in a long text, asked for at its end: what trains and measures reading over thousands of tokens.

A ``Haystack`` is a conversation: the user gives a text that holds one fact or several and asks for one; the model repeats the
sentence and answers with the value. Training and ``nautile eval needle`` use this file, with other seeds and other words.
What this file does not know: the model and how conversations are packed.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from nautile.protocol import Tokenizer
from nautile.train.tasks import Pool
from nautile.train.tasks.documents import MAKERS, python_slice
from nautile.train.tasks.wording import expand

__all__ = ["FILLERS", "Fact", "Filler", "Haystack", "haystack", "natural_sentences", "random_pool", "training_haystack"]

Filler = Literal["words", "files", "code", "facts", "natural"]
FILLERS: tuple[Filler, ...] = get_args(Filler)
_FAR = 4096  # rows of more tokens are for reading far
_LINE = 220  # characters of a line of filler at most

_SENTENCES = (
    'The {thing} of "{name}" is "{value}".',
    'The {thing} of "{name}" is "{value}".',
    "The {thing} for {name} is {value}.",
    "{name}: the {thing} is {value}",
    "Remember that the {thing} of {name} is {value}.",
    "Note: {name} has the {thing} {value}",
    "{thing} of {name} = {value}",
    'For "{name}" the {thing} was set to "{value}".',
    "One more fact: the {thing} of {name} is {value}.",
)
_QUESTIONS = (
    "[what is|what's|what was|tell me|give me|find|look up|i need|please give me|report|do you see|say what is|which is] the "
    "{thing} [of|for|belonging to] {shown}",
    "[which|what] {thing} [does|did] {shown} have",
    "[which|what] {thing} [has|belongs to|is given for|is noted for] {shown}",
    "[in the text above, |above, |in this text, |according to the text, |]what is the {thing} [of|for] {shown}",
    "the {thing} [of|for] {shown}",
    "{shown}: what is its {thing}",
    "what does the text say about the {thing} of {shown}",
    "[look for|search the text for|find|locate] {shown} and [give me|tell me|report] its {thing}",
)


@dataclass(frozen=True)
class Fact:
    """``sentence`` says that the ``thing`` of ``name`` is ``value``."""

    thing: str
    name: str
    value: str
    sentence: str

    @classmethod
    def random(cls, pool: Pool, thing: str | None = None, name: str | None = None) -> Fact:
        """A fact of invented or drawn words, with a value as settings have."""
        rng = pool.rng
        thing = thing or pool.word()
        name = name or rng.choice((pool.word, pool.snake, pool.camel, pool.invented))()
        value = rng.choice((pool.value, pool.value, pool.number, lambda: str(rng.randrange(10**6, 10**7)), pool.snake))()
        sentence = rng.choice(_SENTENCES)
        for slot, text in (("thing", thing), ("name", name), ("value", value)):
            sentence = sentence.replace(f"{{{slot}}}", text)
        return cls(thing, name, value, sentence)


@dataclass(frozen=True)
class Haystack:
    """``text`` with ``facts`` in it and the questions for ``asked`` of them."""

    text: str
    facts: tuple[Fact, ...]
    asked: tuple[Fact, ...]
    questions: tuple[str, ...]

    def messages(self) -> list[dict[str, Any]]:
        """The conversation with its answers: the text and a question, then the other questions."""
        out: list[dict[str, Any]] = []
        for number, (fact, question) in enumerate(zip(self.asked, self.questions, strict=True)):
            content = f"{self.text}\n\n{question}" if number == 0 else question
            out.append({"role": "user", "content": content})
            out.append({"role": "assistant", "reasoning_content": f"It says {fact.sentence}", "content": fact.value})
        return out


def haystack(
    pool: Pool,
    tokenizer: Tokenizer,
    tokens: int,
    *,
    facts: int = 1,
    asked: int = 1,
    depth: float | None = None,
    filler: Filler = "words",
) -> Haystack:
    """A text of about ``tokens`` tokens (never more) with ``facts`` of one thing, the first asked for at ``depth`` in [0, 1].

    With ``depth`` None every place is equally likely. The facts that are not asked for stand anywhere.
    """
    thing = pool.word()
    known: dict[str, Fact] = {}
    while len(known) < facts:
        fact = Fact.random(pool, thing if facts > 1 and pool.rng.random() < 0.8 else None)
        known.setdefault(fact.name, fact)
    chosen = list(known.values())
    questions = [_question(pool, fact) for fact in chosen[:asked]]
    room = tokens - len(tokenizer.encode("\n".join([*(fact.sentence for fact in chosen), *questions]))) - 8 * (facts + asked)
    lines = _lines(pool, tokenizer, filler, room, chosen)
    for number, fact in reversed(list(enumerate(chosen))):
        share = depth if depth is not None and number == 0 else pool.rng.random()
        lines.insert(round(share * len(lines)), fact.sentence)
    return Haystack("\n".join(lines), tuple(chosen), tuple(chosen[:asked]), tuple(questions))


def _question(pool: Pool, fact: Fact) -> str:
    rng = pool.rng
    shown = rng.choice((fact.name, f'"{fact.name}"', f'"{fact.name}"', f"`{fact.name}`", f"'{fact.name}'"))
    text = expand(rng, rng.choice(_QUESTIONS), {})
    text = text[0].upper() + text[1:] if text[0] != "{" and rng.random() < 0.8 else text
    text += rng.choice(("?", "?", "?", ".", ""))
    return text.replace("{thing}", fact.thing).replace("{shown}", shown)


def _lines(pool: Pool, tokenizer: Tokenizer, filler: Filler, room: int, facts: list[Fact]) -> list[str]:
    """Lines of filler of at most ``room`` tokens together; none that holds a name of ``facts``."""
    names = [fact.name for fact in facts]
    lines: list[str] = []
    used = 0
    for line in _SOURCES[filler](pool):
        if any(name in line for name in names):
            continue
        used += len(tokenizer.encode(line)) + 1
        if used > room:
            return lines
        lines.append(line)
    raise RuntimeError(f"the filler {filler} ended")


def _words(pool: Pool) -> Iterator[str]:
    """Sentences of random words, one to four on a line."""
    while True:
        yield " ".join(pool.sentence(4, 12) for _ in range(pool.rng.randint(1, 4)))


def _files(pool: Pool) -> Iterator[str]:
    """Logs, settings, tables, prose: what ``documents`` makes."""
    while True:
        document = MAKERS[pool.rng.choice(("settings", "table", "text", "text"))](pool)
        yield from (line[:_LINE] for line in document.lines[:120] if line.strip())


def _code(pool: Pool) -> Iterator[str]:
    """Real modules of the standard library."""
    while True:
        yield from (line[:_LINE] for line in python_slice(pool).lines[:200] if line.strip())


def _facts(pool: Pool) -> Iterator[str]:
    """Other facts, all of the same form: nothing but the name tells the one that is asked for."""
    while True:
        yield Fact.random(pool).sentence


@functools.cache
def natural_sentences() -> tuple[str, ...]:
    """Sentences of the Python reference that comes with the interpreter (PSF licence); training never reads this file."""
    from pydoc_data import topics  # noqa: PLC0415  # 700 kB, needed here only

    paragraphs = [part for text in topics.topics.values() for part in re.split(r"\n\s*\n", text)]
    plain = (" ".join(paragraph.split()) for paragraph in paragraphs if not paragraph.startswith("      "))
    return tuple(dict.fromkeys(text for text in plain if 60 <= len(text) <= 600))


def _natural(pool: Pool) -> Iterator[str]:
    """The Python reference from a random place on, over and over."""
    sentences = natural_sentences()
    start = pool.rng.randrange(len(sentences))
    while True:
        yield from (sentences[(start + step) % len(sentences)] for step in range(len(sentences)))


_SOURCES: dict[Filler, Callable[[Pool], Iterator[str]]] = {
    "words": _words, "files": _files, "code": _code, "facts": _facts, "natural": _natural,
}  # fmt: skip


def training_haystack(pool: Pool, tokenizer: Tokenizer, longest: int) -> Haystack:
    """A haystack for training: any length up to ``longest`` tokens (short ones as likely as long ones, by octave), one to eight
    facts, some of them asked one after the other. Never the natural text, which is kept for evaluation.

    In rows of more than 4,096 tokens half of the haystacks hold a fact and are asked for one about every 600 tokens, so that
    reading as far costs as little as it can: the answers to one question are a thousandth of such a row.
    """
    rng = pool.rng
    far = longest > _FAR
    shortest = 1024 if far else 256
    tokens = int(shortest * (longest / shortest) ** rng.random())
    facts = rng.choice((1, 1, 2, 3, 4, 8, 8))
    if far and rng.random() < 0.5:
        facts = max(8, tokens // rng.choice((300, 600, 1200)))
    asked = min(facts, rng.choice((1, 2, 4, 6)), max(1, tokens // 160))
    if facts > 8:
        asked = min(facts, tokens // 600)
    fillers: tuple[Filler, ...] = ("words", "files", "code", "facts")
    filler = rng.choices(fillers, (3, 2, 1.5, 1.5))[0]
    return haystack(pool, tokenizer, tokens - 60 * asked, facts=facts, asked=asked, filler=filler)


def random_pool(seed: int | str, held_out: bool) -> Pool:
    """Words for the haystack of a seed."""
    return Pool(random.Random(f"needle:{seed}"), held_out)
