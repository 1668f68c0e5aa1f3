"""Texts whose answers are copies of something that stands above, with loss on the copies alone.

Everything that cannot be known (names, values, lines of code) is context without loss; what follows a cue is predictable to
the last token. So a token here trains nothing but copying, from distances of a few tokens to a whole row, between quotes,
after spaces, in JSON, in lists. Names are made of all pieces of the vocabulary. Nothing here touches tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from nautile.train.tasks import Pool
from nautile.train.tasks.documents import python_slice

__all__ = ["Passage", "document"]

_JOINERS = (
    "_", "-", ".", "/", " ", ":", "=", " = ", ": ", ", ", "::", "->", "(", ")", "[", "]", "{", "}", "<", ">", "@", "#", "$",
    "%", "&", "*", "+", "|", "\\", "^", "~", "!", "?", ";", '"', "'", "`", "  ", "\t",
)  # fmt: skip
_SEPARATORS = (" = ", "=", ": ", ":", " ", "\t", " -> ", ", ")


@dataclass(frozen=True)
class Passage:
    """A piece of a document. ``copied``: it repeats something above, so predicting it counts."""

    text: str
    copied: bool = False


def _jumble(pool: Pool) -> str:
    """Words with any signs between them: what a line of an unknown format looks like."""
    rng = pool.rng
    parts = [pool.word()]
    for _ in range(rng.randint(1, 5)):
        parts += [rng.choice(_JOINERS), pool.word() if rng.random() < 0.8 else pool.number()]
    return "".join(parts)


def _characters(pool: Pool) -> str:
    alphabet = pool.rng.choice(
        ("0123456789", "0123456789abcdef", "abcdefghijklmnopqrstuvwxyz0123456789", "ABCDEFGHJKLMNPQRSTUVWXYZ23456789")
    )
    return "".join(pool.rng.choices(alphabet, k=pool.rng.randint(3, 24)))


def _quoted(pool: Pool) -> str:
    return json.dumps(f'{pool.word()}"{pool.word()}\\{pool.word()}\n{pool.word()}'[: pool.rng.randint(6, 40)])


_NAMES: tuple[tuple[Callable[[Pool], str], float], ...] = (
    (Pool.word, 2.0),
    (Pool.snake, 2.0),
    (Pool.camel, 1.0),
    (lambda pool: pool.snake().upper(), 0.7),
    (lambda pool: "-".join(pool.words(pool.rng.randint(2, 3))), 0.7),
    (lambda pool: ".".join(pool.words(pool.rng.randint(2, 3))), 0.7),
    (lambda pool: "/".join(pool.words(pool.rng.randint(2, 4))) + pool.rng.choice((".py", ".conf", ".txt", "")), 1.0),
    (lambda pool: pool.invented() + pool.invented(), 1.0),
)
_VALUES: tuple[tuple[Callable[[Pool], str], float], ...] = (
    (Pool.value, 3.0),
    (Pool.phrase_value, 1.0),
    (Pool.version, 0.7),
    (Pool.path, 0.7),
    (_jumble, 2.0),
    (_characters, 1.0),
    (_quoted, 0.4),
    (Pool.sentence, 0.5),
)


def _one(pool: Pool, makers: tuple[tuple[Callable[[Pool], str], float], ...]) -> str:
    return pool.rng.choices([maker for maker, _ in makers], [weight for _, weight in makers])[0](pool)


def _different(pool: Pool, count: int) -> list[str]:
    return list(dict.fromkeys(_one(pool, _NAMES) for _ in range(count)))


def _settings(pool: Pool) -> list[Passage]:
    """Keys with values, asked again in the same form or as a sentence."""
    rng = pool.rng
    separator = rng.choice(_SEPARATORS)
    values = {key: _one(pool, _VALUES) for key in _different(pool, rng.randint(3, 30))}
    out = [Passage("".join(f"{key}{separator}{value}\n" for key, value in values.items()) + "\n")]
    forms = ("{key}" + separator, 'What is "{key}"? It says ', 'The value of {key} is "', "Look up `{key}`: ", "get {key}\n")
    for key in rng.choices(list(values), k=rng.randint(4, 14)):
        form = rng.choice(forms)
        end = '"\n' if form.endswith('"') else "\n"
        out += [Passage(form.replace("{key}", key)), Passage(values[key] + end, copied=True)]
    return out


def _lines(pool: Pool) -> list[Passage]:
    """Numbered lines, asked by their number."""
    rng = pool.rng
    if rng.random() < 0.4:
        lines = [line for line in python_slice(pool).lines if line.strip() and len(line) < 100][: rng.randint(8, 28)]
    else:
        lines = [_one(pool, rng.choice((_NAMES, _VALUES))) for _ in range(rng.randint(6, 40))]
    start = rng.choice((1, 1, rng.randint(2, 900)))
    numbered = dict(enumerate(lines or [pool.sentence()], start))
    out = [Passage("".join(f"{number}: {line}\n" for number, line in numbered.items()) + "\n")]
    for number in rng.choices(list(numbered), k=rng.randint(4, 12)):
        if rng.random() < 0.5:
            out += [Passage(f"{number}: "), Passage(numbered[number] + "\n", copied=True)]
        else:
            out += [Passage(f'Line {number} is "'), Passage(numbered[number].strip() + '".\n', copied=True)]
    return out


def _requests(pool: Pool) -> list[Passage]:
    """A request that names things, at once repeated as a thought and as arguments: what an agent does first."""
    rng = pool.rng
    out: list[Passage] = []
    for _ in range(rng.randint(3, 8)):
        text, path = _one(pool, rng.choice((_NAMES, _VALUES))), _one(pool, _NAMES)
        left, right = rng.choice((("", ""), ('"', '"'), ("`", "`"), ("'", "'")))
        shown, where = left + text + right, rng.choice((path, f'"{path}"', f"`{path}`"))
        asked = rng.choice(
            ("Find {t} in {p}.", "In {p}, look for {t}.", "Count {t} in {p}", "{p}: where is {t}?", "{t} in {p}")
        )
        out.append(Passage(asked.replace("{p}", where).replace("{t}", shown) + '\nI look for "'))
        out += [Passage(text + '"', copied=True), Passage(' in "'), Passage(path + '"', copied=True), Passage("\n")]
        arguments = json.dumps({"pattern": text, "path": path}, ensure_ascii=False)
        head = '{"pattern": "'
        out += [Passage(head), Passage(arguments[len(head) :] + "\n", copied=True)]
        if rng.random() < 0.5:
            out += [Passage(f"<pattern>{text}</pattern>\n<path>"), Passage(f"{path}</path>\n", copied=True)]
    return out


def _echo(pool: Pool) -> list[Passage]:
    """Long runs of words, then the same again."""
    rng = pool.rng
    out: list[Passage] = []
    for _ in range(rng.randint(1, 4)):
        glue = rng.choice((" ", " ", "\n", ", ", "_", ""))
        words = [pool.word() for _ in range(rng.randint(4, 40))]
        text = glue.join(words)
        title = rng.choice(("Again: ", "Copy:\n", "> ", '"', "= "))
        first = words[0] + glue
        out += [
            Passage(f"{text}\n{title}{first}"),
            Passage(text[len(first) :] + ('"' if title == '"' else "") + "\n", copied=True),
        ]
    return out


_COMMANDS = (
    ("mv {a} {b}", 'I rename "{a}" to "{b}".'),
    ("mv {a} {b}", "{a} is to be called {b}."),
    ("tail -n 1 {a}", 'I show the last line of "{a}".'),
    ("cp {a} {b}", 'I copy "{a}" to "{b}".'),
    ("wc -l {a} {b}", 'I count the lines of "{a}" and "{b}".'),
    ("awk -F, '{s += $3} END {print s}' {a}", 'I sum column 3 of "{a}".'),
    ("find {a} -type f -name '*.py' | wc -l", 'I count the files of "{a}" that end in ".py".'),
    ("head -n 3 {a} > {b}", 'The start of "{a}" goes to "{b}".'),
)


def _commands(pool: Pool) -> list[Passage]:
    """Names that stand in quotes in a thought and bare, after a space, in a shell command."""
    rng = pool.rng
    out: list[Passage] = []
    for _ in range(rng.randint(3, 8)):
        command, thought = rng.choice(_COMMANDS)
        names = {"{a}": _path_name(pool), "{b}": _path_name(pool)}
        for slot, name in names.items():
            thought = thought.replace(slot, name)
        out.append(Passage(thought + rng.choice(("\n$", '\n{"command": "', "\n<command>"))))
        for piece in re.split(r"( \{[ab]\})", " " + command if out[-1].text.endswith("$") else command):
            copied = piece[1:] in names
            out.append(Passage(" " + names[piece[1:]] if copied else piece, copied))
        out.append(Passage("\n"))
    return out


def _path_name(pool: Pool) -> str:
    rng = pool.rng
    stem = rng.choice((pool.word, pool.word, pool.snake, pool.invented, lambda: "-".join(pool.words(2))))()
    folder = f"{pool.word()}/" if rng.random() < 0.4 else ""
    return folder + stem + rng.choice((".py", ".txt", ".md", ".log", ".conf", ".1", ".old", ".csv", "", "rc"))


_FORMS: tuple[tuple[Callable[[Pool], list[Passage]], float], ...] = (
    (_settings, 1.0), (_lines, 1.0), (_requests, 1.5), (_echo, 0.7), (_commands, 1.0),
)  # fmt: skip


def document(pool: Pool, characters: int = 2500) -> list[Passage]:
    """Passages of random forms below each other, at least ``characters`` long together."""
    passages: list[Passage] = []
    while sum(len(passage.text) for passage in passages) < characters:
        form = pool.rng.choices([form for form, _ in _FORMS], [weight for _, weight in _FORMS])[0]
        passages += [*form(pool), Passage("\n")]
    return passages
