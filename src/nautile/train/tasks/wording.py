"""Requests put together from parts, so that training meets each sentence about once: who asks, how, in which order, with what
around it.

A kind's ``Grammar`` (in ``grammars``) gives its clauses in a notation of four signs: ``[a|b]`` is one of them, ``<name>`` a
phrase shared by many, ``{slot}`` a value, and ``{@}`` the place ("in F"), which may also stand before the sentence. ``~word``
may be any word at all: a request must be understood from the rest. Evaluation never comes here; ``Wording`` refuses whatever
shares four words in a row with the wordings kept for it. What this file does not know: files, tools and tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nautile.train.tasks.words import Pool

__all__ = ["GRAM", "Grammar", "Wording", "expand", "grams"]

GRAM = 4  # words in a row that no training request may share with a wording kept for evaluation
_TOKENS = re.compile(r"\{[\w@]+\}|[A-Za-z]+(?:'[a-z]+)?")
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Grammar:
    """How one kind may be asked. Each clause is a pattern without a full stop, in lower case.

    direct: questions ("how many lines {@} contain {text}"); indirect: what follows "tell me" ("how many ..."); nominal: what
    follows "give me" ("the number of ..."); imperative: a command; statement: a sentence of its own. ``answer`` names what is
    to be answered, for remarks such as "only the number".
    """

    direct: tuple[str, ...] = ()
    indirect: tuple[str, ...] = ()
    nominal: tuple[str, ...] = ()
    imperative: tuple[str, ...] = ()
    statement: tuple[str, ...] = ()
    answer: str = ""
    topic: str = ""  # a slot that may be named first, and be "it" in the clause
    phrases: Mapping[str, str] = field(default_factory=dict)


def grams(text: str, length: int = GRAM) -> set[tuple[str, ...]]:
    """Runs of ``length`` words in ``text``, in lower case; a ``{slot}`` is a word, signs are not."""
    words = [word.lower() for word in _TOKENS.findall(text)]
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


# ------------------------------------------------------------------------------------------------------------- the notation


def expand(rng: random.Random, pattern: str, phrases: Mapping[str, str]) -> str:
    """One reading of a pattern: choices made and phrases written out; slots and ``~`` stay."""
    out: list[str] = []
    place = 0
    while place < len(pattern):
        letter = pattern[place]
        if letter == "[":
            end = _closing(pattern, place)
            out.append(expand(rng, rng.choice(_branches(pattern[place + 1 : end])), phrases))
            place = end + 1
        elif letter == "<":
            end = pattern.index(">", place)
            out.append(expand(rng, phrases[pattern[place + 1 : end]], phrases))
            place = end + 1
        else:
            out.append(letter)
            place += 1
    return "".join(out)


def _closing(pattern: str, start: int) -> int:
    depth = 0
    for place in range(start, len(pattern)):
        depth += (pattern[place] == "[") - (pattern[place] == "]")
        if depth == 0:
            return place
    raise ValueError(f"a bracket is not closed in {pattern!r}")


def _branches(inside: str) -> list[str]:
    depth, out = 0, [""]
    for letter in inside:
        depth += (letter == "[") - (letter == "]")
        if letter == "|" and depth == 0:
            out.append("")
        else:
            out[-1] += letter
    return out


# -------------------------------------------------------------------------------------------------------- around the clause

_AROUND: dict[str, str] = {
    "tell": "[tell me|let me know|report|explain|say|state|inform me|show me|write down|point out|give a hint]",
    "ask": "[could|can|would|will] you [please |kindly |quickly |possibly |]",
    "want": "[i want to know|i need to know|i'd like to know|i would like to know|i wonder|i have to find out|"
    "we need to know|i'm trying to find out|i must know|i'm curious|it matters to me|please check|check|find out|figure out|"
    "determine|establish|see|verify|do you know|any idea|have a look|can you see|it is unclear|nobody could tell me|"
    "i forgot|remind me|i was asked|my colleague wants to know|the question is|your task is to find out]",
    "give": "[give me|i need|i want|i'd like|tell me|show me|let me have|get|get me|fetch|find|report|return|provide|output|"
    "print|determine|look for|look up|i am looking for|i'm after|hand me|send me|bring me|write down|could i have|can i have|"
    "may i have|please provide|please return|please give me|we need|help me find|search for|deliver|extract|obtain|retrieve|"
    "what i need is|what i want is|all i want is|supply|name|list|reply with|answer with|respond with]",
    "do": "[please |kindly |i want you to |i need you to |i'd like you to |your task is to |your job is to |you should |you "
    "must |you need to |try to |next, |now |then |go ahead and |let's |we have to |could you |can you |would you |would you "
    "please |could you please |be so kind as to |it would be nice if you could |it is time to |help me |help me to |make sure "
    "to |do me a favour and |i was told to |i ask you to |remember to |as a first step, |quickly ||||||]",
    "place": "[in|in|in|in|of|from|inside|within] {file}",
    "before": "[in {file}, |in {file}, |inside {file}, |within {file}, |{file}: |{file}: |file {file}: |for {file}: |for "
    "{file}, |regarding {file}: |concerning {file}, |about {file}: |as for {file}, |look at {file}. |look at {file}: |look at "
    "{file}; |open {file}. |open {file}; |take {file}. |take {file}: |take {file} and answer: |consider {file}. |given "
    "{file}, |here is {file}. |i have {file} here. |there is {file}. |we have {file}. |the file is {file}. |this is about "
    "{file}. |file: {file}\n|path: {file}\n|file = {file}; |from {file}: |using {file}, |with {file}: |check {file}: |check "
    "{file}. |go to {file}: |in the case of {file}, |have a look at {file}. |i am looking at {file}. |read {file}. |read "
    "{file}: |inspect {file}: |inspect {file}. |examine {file}. |see {file}: ]",
    "after": "[ (file {file})| (in {file})|, in {file}| - {file}|; the file is {file}|. the file is {file}|\nfile: {file}|"
    ", file {file}|. look in {file}|. use {file}|. it is about {file}| (see {file})|. i mean {file}]",
}

_TOPIC = (
    "[it is about {t}. |this is about {t}. |i mean {t}. |take {t}. |take {t}: |consider {t}: |regarding {t}: |regarding {t}, |"
    "about {t}: |as for {t}, |as to {t}: |{t}: |{t} - |concerning {t}, |we have {t}. |see {t}. |{k}: {t}\n|{k}: {t}; |{k} = "
    "{t}, |the {k} is {t}. |here is the {k}: {t}. |i have a {k}, {t}. |the {k} in question is {t}. |look at {t}: |now {t}: |"
    "first {t}. ]"
)
_NAMED = (
    r"(?:the (?:text|string|phrase|characters|pattern|expression|sequence|words|term|part|key|setting|option|parameter|entry"
)
_NAMED += r"|variable|field|property|attribute|config key|file|piece of text)(?: named| called)? )?"

_NOUNS = {
    "text": "[text|string|phrase]",
    "key": "[key|setting|option]",
    "name": "[name|identifier]",
    "old": "[text|old text]",
    "file": "[file|document]",
}

_OPENINGS = (
    "[hi|hello|hey|good morning|dear agent|hi there|hello again|good evening|ok|okay|so|well|right|alright|listen|sorry to "
    "bother you|excuse me|one moment|one more thing|another thing|next|first|now|task|question|quick question|request|todo|"
    "job|issue|step {n}|{n}.|{n})|-|*|ticket {n}|urgent|note|fyi|@agent|nautile][,|:|.|,|:] ",
)
_CONTEXTS = (
    "i am [working on|busy with|cleaning up|reviewing|preparing|testing|debugging] the {w} [project|module|release|ticket|"
    "part]",
    "this is [urgent|not urgent|for the {w} team|for a report|about the {w} {w2}|my last question|important|a test]",
    "{W} [asked me|needs this|wants it today|is waiting|told me to ask you|left the team]",
    "the {w} [build|server|job|test|service|script|{w2}] [failed|broke|stopped|was slow|is down|works again] "
    "[yesterday|today|last night|this morning|again|since monday|on friday]",
    "[do not|don't|please do not] change anything [else|other than that|besides]",
    "[be careful|take your time|be quick|think first|no need to explain|don't explain|keep it short|i trust you|don't guess]",
    "we had {n} [problems|tickets|questions|failures] [with it|this week|about the {w}|because of {w}]",
    "i [looked|searched|tried] [myself|twice|{n} times], but [could not find it|got confused|had no luck|gave up]",
    "[the directory|this folder|the project] is [a bit messy|new to me|small|old|from {W}|about {w}]",
    "[use your tools|use the tools|you have tools for this|use whatever tool fits|work on the files here]",
    "i [don't have|have no] [access|time|editor] [right now|at the moment|here|on this machine]",
    "[later|afterwards|then] i will [ask|need] [more|something else|about the {w}]",
    "[i think|maybe|perhaps|i guess] it [has to do with|belongs to|came from|is about] {w} {w2}",
    "[the|our|my] {w} [depends on it|is based on it|needs that|has no {w2}|comes later]",
    "{w} {w2} {w3}",
    "{other} is [fine|not important|done|another matter|something else]",
    "i already [looked at|checked|finished] {other}",
)
_THANKS = (
    "thanks",
    "thank you",
    "thanks a lot",
    "thanks in advance",
    "cheers",
    "many thanks",
    "please",
    "bye",
    "ok?",
    "right?",
)
_ONLY = (
    "[answer|reply|respond] with [just|only|nothing but|no more than] {a}",
    "[answer|reply|respond] with {a} [only|alone|and nothing else]",
    "[just|only] {a}[, please|]",
    "{a} [only|alone|is enough|will do|is all i need|suffices]",
    "[give|return|print|write|tell me] [only|just|nothing but] {a}",
    "i [only need|just want|only want|just need] {a}",
    "no [explanation|words|text|comment], [just|only] {a}",
)
_MOODS = ("direct", "indirect", "nominal", "imperative", "statement")
_WEIGHTS = {"direct": 1.0, "indirect": 0.8, "nominal": 0.9, "imperative": 1.1, "statement": 0.6}


@dataclass(frozen=True)
class Wording:
    """``share``: of requests that are composed, the rest follows the fixed templates; ``noise``: of composed requests in which
    words that may be anything are anything; ``kept``: runs of words that may not occur."""

    grammars: Mapping[str, Grammar]
    kept: frozenset[tuple[str, ...]] = frozenset()
    share: float = 0.75
    noise: float = 0.25

    @classmethod
    def of(cls, grammars: Mapping[str, Grammar], kept: Iterable[str], known: Iterable[str]) -> Wording:
        """``kept``: wordings for evaluation, whose runs of words are refused unless ``known`` wordings hold them already."""
        runs = {run for text in kept for run in grams(text)}
        return cls(grammars, frozenset(runs - {run for text in known for run in grams(text)}))

    def request(self, pool: Pool, kind: str, values: Mapping[str, str], needed: Iterable[str] = ()) -> str:
        """A request of ``kind`` with its ``values``; only with a place for every slot in ``needed``."""
        text = re.sub(r"\{(\w+)\}", lambda match: values[match[1]], self.compose(pool, kind, needed))
        return text

    def compose(self, pool: Pool, kind: str, needed: Iterable[str] = ()) -> str:
        """The same with slots in place of values."""
        rng, grammar = pool.rng, self.grammars[kind]
        while True:
            core = self._sentence(rng, grammar)
            if all(f"{{{name}}}" in core for name in needed):
                text = self._surrounded(pool, _disturbed(pool, core, self.noise), grammar)
                if not grams(text) & self.kept:
                    return text

    def _sentence(self, rng: random.Random, grammar: Grammar) -> str:
        moods = [mood for mood in _MOODS if getattr(grammar, mood)]
        mood = rng.choices(moods, [_WEIGHTS[mood] for mood in moods])[0]
        phrases = {**_AROUND, **grammar.phrases}
        clause = expand(rng, rng.choice(getattr(grammar, mood)), phrases)
        before = after = ""
        topic = ""
        if f"{{{grammar.topic}}}" in clause and rng.random() < 0.14:
            topic, clause = _topic(rng, grammar.topic, clause)
        if "{@}" in clause:
            pick = rng.random()
            place = expand(rng, "<place>", phrases) if pick < 0.55 else ""
            if pick >= 0.55:
                before = expand(rng, "<before>", phrases) if pick < 0.9 else ""
                after = expand(rng, "<after>", phrases) if pick >= 0.9 else ""
            clause = clause.replace("{@}", place)
        clause = topic + before + _framed(rng, mood, clause, phrases) + after
        return re.sub(r" +([,.;:?)])", r"\1", re.sub(r" {2,}", " ", clause)).strip()

    def _surrounded(self, pool: Pool, core: str, grammar: Grammar) -> str:
        """The sentence between an opening, remarks that do not matter, what to answer with, thanks."""
        rng = pool.rng
        style = rng.random()  # one person writes one way
        parts = [_finished(rng, core, style)]
        if grammar.answer and rng.random() < 0.22:
            only = expand(rng, rng.choice(_ONLY), {}).replace("{a}", expand(rng, grammar.answer, {}))
            parts.append(_finished(rng, only, style))
        if rng.random() < 0.14:
            parts.insert(0, _finished(rng, _context(pool), style))
        if rng.random() < 0.10:
            parts.append(_finished(rng, _context(pool), style))
        if rng.random() < 0.06:
            parts.append(_finished(rng, rng.choice(_THANKS), style))
        if rng.random() < 0.12:
            opening = _filled(pool, expand(rng, rng.choice(_OPENINGS), {}))
            parts[0] = _cased(opening, style) + (_lowered(parts[0]) if rng.random() < 0.5 else parts[0])
        return rng.choice((" ",) * 9 + ("\n",)).join(parts)


def _framed(rng: random.Random, mood: str, clause: str, phrases: Mapping[str, str]) -> str:
    """The clause with who asks: "tell me how many ...", "could you count ..."."""
    if mood == "direct":
        return clause + "?"
    if mood == "indirect":
        frame = "[<tell> |<ask><tell> |<want> |<want> ||]"
    elif mood == "nominal":
        frame = "[<give> |<give> |<give> |what is |what's |what would be |||]"
    else:
        frame = "<do>" if mood == "imperative" else ""
    lead = expand(rng, frame, phrases)
    asks = mood != "statement" and (
        not lead or lead.startswith(("could", "can", "would", "will", "may", "what", "do you", "any"))
    )
    asks = (asks and mood != "imperative") or lead.startswith(("could you", "can you", "would you"))
    return lead + clause + ("?" if asks and rng.random() < 0.85 else "")


def _topic(rng: random.Random, slot: str, clause: str) -> tuple[str, str]:
    """What is asked about, named first, and the clause with a word for it: ("the text is {text}. ", "... contain it")."""
    noun = _NOUNS[slot]
    word = rng.choice(("it", "it", "it", "that", "this", "this one", f"that {expand(rng, noun, {})}"))
    front = expand(rng, _TOPIC, {}).replace("{t}", f"{{{slot}}}").replace("{k}", expand(rng, noun, {}))
    return front, re.sub(_NAMED + rf"\{{{slot}\}}(?: \(a setting\))?", word, clause)


def _disturbed(pool: Pool, core: str, noise: float) -> str:
    """Remove the ``~``; in a share of sentences put other words in the place of what they mark."""
    rng = pool.rng
    if rng.random() >= noise:
        return core.replace("~", "")
    return re.sub(r"~(\w+)", lambda match: pool.word() if rng.random() < 0.6 else match[1], core)


def _filled(pool: Pool, text: str) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] == "n":
            return str(pool.rng.randint(1, 99))
        if match[1] == "other":
            return f"{pool.word()}{pool.rng.choice(('.py', '.txt', '.conf', '.log', '.md', '.csv'))}"
        word = pool.word()
        return word.capitalize() if match[1] == "W" else word

    return _SLOT.sub(value, text)


def _context(pool: Pool) -> str:
    return _filled(pool, expand(pool.rng, pool.rng.choice(_CONTEXTS), {}))


def _finished(rng: random.Random, text: str, style: float) -> str:
    """With a capital and a full stop, as most people write; without either, as some do."""
    if not text.endswith(("?", ".", ":")) and style > 0.12:
        text += rng.choice((".", ".", ".", ".", ".", "!")) if style < 0.9 else "."
    if style < 0.12:
        text = text.removesuffix("?")
    return _cased(text, style)


def _cased(text: str, style: float) -> str:
    if style < 0.25 or not text:
        return text
    text = text[0].upper() + text[1:]
    return text if style >= 0.9 else re.sub(r"(?<=[.?] )[a-z]", lambda match: match[0].upper(), text)


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]
