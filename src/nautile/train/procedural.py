"""Procedural text that teaches copying and looking up: recall, needles, numbered lines, renderings, shell transcripts, edits.

Every document answers questions about text that stands above, so the answer is always a copy plus one decision. Documents
are about 400 to 1,500 tokens of the nano tokenizer long. Nothing here touches files or tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from nautile.train.tasks import KINDS, Pool

__all__ = ["GENERATORS", "document"]

_SEPARATORS = (": ", " = ", "=", " -> ", "\t", ", ", " ", ":", " is ")


def _pairs(pool: Pool, count: int) -> dict[str, str]:
    maker = pool.rng.choice((pool.snake, pool.word, pool.camel, pool.invented, lambda: pool.snake(1, 2).upper()))
    return {maker(): pool.phrase_value() if pool.rng.random() < 0.15 else pool.value() for _ in range(count)}


def _recall(pool: Pool) -> str:
    """Key-value pairs, then some of them asked again in the same form."""
    rng = pool.rng
    pairs = _pairs(pool, rng.randint(4, 24))
    separator, asking = rng.choice(_SEPARATORS), rng.choice(_SEPARATORS)
    question = rng.choice(
        ("{key}{sep}", "What is {key}? ", "{key}? ", "Q: {key}\nA: ", 'The value of "{key}" is ', "get {key}\n")
    )
    lines = [f"{key}{separator}{value}" for key, value in pairs.items()]
    asked = rng.choices(list(pairs), k=rng.randint(4, 16))
    answers = [question.replace("{key}", key).replace("{sep}", asking) + pairs[key] for key in asked]
    return "\n".join([*lines, "", *answers])


def _needles(pool: Pool) -> str:
    """Facts hidden in running text, asked at the end."""
    rng = pool.rng
    facts = [(pool.word(), pool.snake(1, 2), pool.value()) for _ in range(rng.randint(2, 6))]
    sentences = [pool.sentence(4, 12) for _ in range(rng.randint(10, 60))]
    for thing, name, value in facts:
        sentences.insert(rng.randrange(len(sentences)), f'The {thing} of "{name}" is "{value}".')
    lines, step = [], rng.randint(1, 5)
    for start in range(0, len(sentences), step):
        lines.append(" ".join(sentences[start : start + step]))
    rng.shuffle(facts)
    return "\n".join([*lines, "", *(f'What is the {thing} of "{name}"? It is "{value}".' for thing, name, value in facts)])


def _text_lines(pool: Pool, low: int, high: int) -> list[str]:
    rng = pool.rng
    makers: tuple[Callable[[], str], ...] = (
        lambda: pool.sentence(2, 8),
        lambda: f"{pool.snake()} = {pool.value()}",
        lambda: " ".join(pool.words(rng.randint(1, 5))),
        lambda: f"{pool.date()} {pool.clock()} {rng.choice(('INFO', 'WARN', 'ERROR'))} {' '.join(pool.words(3))}",
        lambda: f"def {pool.snake()}({', '.join(pool.words(rng.randint(0, 2)))}):",
    )
    maker = rng.choice(makers)
    return [(maker if rng.random() < 0.8 else rng.choice(makers))() for _ in range(rng.randint(low, high))]


def _numbered(pool: Pool) -> str:
    """Numbered lines, then lines asked by number and numbers asked by line."""
    rng = pool.rng
    start = rng.choice((1, 1, 1, rng.randint(2, 400)))
    lines = _text_lines(pool, 6, 30)
    numbered = [f"{number}: {line}" for number, line in enumerate(lines, start)]
    answers = []
    for _ in range(rng.randint(4, 10)):
        index = rng.randrange(len(lines))
        if rng.random() < 0.6:
            answers.append(f"Line {start + index} is {json.dumps(lines[index], ensure_ascii=False)}.")
        else:
            answers.append(f'"{lines[index]}" is on line {start + lines.index(lines[index])}.')
    return "\n".join([*numbered, "", *answers])


def _repeat(pool: Pool) -> str:
    """A text, and the same text again: whole, in part, quoted, indented, reversed by lines."""
    rng = pool.rng
    blocks = []
    for _ in range(rng.randint(2, 5)):
        lines = _text_lines(pool, 2, 8)
        style = rng.randrange(5)
        again = {
            0: lines,
            1: [f"> {line}" for line in lines],
            2: [f"    {line}" for line in lines],
            3: lines[::-1],
            4: [f"{number}. {line}" for number, line in enumerate(lines, 1)],
        }[style]
        title = ("Again", "Quoted", "Indented", "Backwards", "Numbered")[style]
        blocks.append("\n".join([*lines, f"{title}:", *again]))
    return "\n\n".join(blocks)


def _rendered(pool: Pool) -> str:
    """The same records as JSON, INI, CSV, YAML, shell, in a random order."""
    rng = pool.rng
    pairs = {pool.snake(1, 2): pool.value() for _ in range(rng.randint(3, 8))}
    name = pool.word()
    forms = {
        "json": json.dumps(pairs, indent=rng.choice((None, 2))),
        "ini": "\n".join([f"[{name}]", *(f"{key} = {value}" for key, value in pairs.items())]),
        "csv": ",".join(pairs) + "\n" + ",".join(pairs.values()),
        "yaml": "\n".join([f"{name}:", *(f"  {key}: {value}" for key, value in pairs.items())]),
        "env": "\n".join(f"{key.upper()}={value}" for key, value in pairs.items()),
        "os-release": "\n".join(f'{key.upper()}="{value}"' for key, value in pairs.items()),
        "python": "\n".join(f"{key} = {value!r}" for key, value in pairs.items()),
        "toml": "\n".join([f"[{name}]", *(f'{key} = "{value}"' for key, value in pairs.items())]),
    }
    chosen = rng.sample(list(forms), rng.randint(3, 5))
    return "\n\n".join(f"{name}.{form}:\n{forms[form]}" for form in chosen)


def _shell(pool: Pool) -> str:
    """A transcript over one file: cat, then grep, grep -c, head, tail, sed -n, wc."""
    rng = pool.rng
    name = f"{pool.word()}.{rng.choice(('txt', 'log', 'conf', 'py', 'md'))}"
    lines = _text_lines(pool, 5, 20)
    out = [f"$ cat {name}", *lines]
    for _ in range(rng.randint(4, 10)):
        pick = rng.randrange(6)
        words = rng.choice(lines).split()
        text = rng.choice(words)
        matches = [f"{number}:{line}" for number, line in enumerate(lines, 1) if text in line]
        number = rng.randint(1, len(lines))
        if pick == 0:
            out += [f"$ grep -n '{text}' {name}", *matches]
        elif pick == 1:
            out += [f"$ grep -c '{text}' {name}", str(len(matches))]
        elif pick == 2:
            out += [f"$ sed -n {number}p {name}", lines[number - 1]]
        elif pick == 3:
            out += [f"$ tail -n 1 {name}", lines[-1]]
        elif pick == 4:
            out += [f"$ wc -l {name}", f"{len(lines)} {name}"]
        else:
            out += [f"$ head -n 1 {name}", lines[0]]
    return "\n".join(out)


def _paths(pool: Pool) -> str:
    """A list of paths, then the path of a name, the names with an extension, how many there are."""
    rng = pool.rng
    extensions = [".py", ".txt", ".md", ".log", ".conf", ".csv"][: rng.randint(2, 6)]
    folders = ["", *(f"{pool.word()}/" for _ in range(rng.randint(1, 3)))]
    paths = sorted({rng.choice(folders) + pool.word() + rng.choice(extensions) for _ in range(rng.randint(5, 25))})
    out = [*paths, ""]
    for _ in range(rng.randint(3, 6)):
        path = rng.choice(paths)
        name, extension = path.rpartition("/")[2], "." + path.rpartition(".")[2]
        found = [other for other in paths if other.endswith(extension)]
        pick = rng.randrange(3)
        if pick == 0:
            out.append(f'"{name}" is at "{next(other for other in paths if other.rpartition("/")[2] == name)}".')
        elif pick == 1:
            out.append(f'{len(found)} end in "{extension}": {", ".join(found)}')
        else:
            out.append(f'"{name.rpartition(".")[0]}" has the extension "{extension}".')
    return "\n".join(out)


def _arithmetic(pool: Pool) -> str:
    """Small sums, comparisons and counts."""
    rng = pool.rng
    out = []
    for _ in range(rng.randint(12, 40)):
        a, b = rng.randrange(100), rng.randrange(100)
        words = rng.choices(pool.words(3), k=rng.randint(2, 7))
        out.append(
            rng.choice(
                (
                    f"{a} + {b} = {a + b}",
                    f"{max(a, b)} - {min(a, b)} = {max(a, b) - min(a, b)}",
                    f"larger of {a} and {b}: {max(a, b)}",
                    f"after {a} comes {a + 1}",
                    f"{' '.join(words)}: {len(words)} words",
                    f"{' '.join(words)}: {words[0]} occurs {words.count(words[0])} times",
                )
            )
        )
    return "\n".join(out)


def _edits(pool: Pool) -> str:
    """Lines before and after a change that is named: replace, set, rename, quote, upper case."""
    rng = pool.rng
    out = []
    for _ in range(rng.randint(5, 14)):
        words = pool.words(rng.randint(2, 7))
        line, old, new = " ".join(words), rng.choice(words), pool.word()
        key, value, other = pool.snake(1, 2), pool.value(), pool.value()
        left, right = rng.choice((("", ""), ('"', '"')))
        equals = rng.choice((" = ", "=", ": "))
        pick = rng.randrange(5)
        if pick < 2:
            out.append(f'"{line}" with "{old}" replaced by "{new}" is "{line.replace(old, new)}".')
        elif pick < 4:
            setting = f"{key}{equals}{left}{value}{right}"
            out.append(f'Set "{key}" to "{other}": {setting} becomes {key}{equals}{left}{other}{right}')
        else:
            out.append(f'"{old}" in capitals is "{old.upper()}"; in quotes and brackets: ("{old}"), [{old}], <{old}>, {old}.')
    return "\n".join(out)


def _plans(pool: Pool) -> str:
    """Requests of the task kinds and how an expert begins: what it needs, the tool and its arguments."""
    rng = pool.rng
    out = []
    arrow = rng.choice(("-> ", "=> ", "call ", "$ ", ""))
    for _ in range(rng.randint(4, 10)):
        task = rng.choice(list(KINDS.values())).generate(rng)
        step = task.steps[0]
        arguments = ", ".join(
            f"{key}={value if isinstance(value, int) else json.dumps(value)}" for key, value in step.arguments.items()
        )
        out.append(f"{task.prompt}\n{step.reasoning}\n{arrow}{step.tool}({arguments})")
    return "\n\n".join(out)


def _listing(pool: Pool) -> str:
    """What grep shows, and which line answers."""
    rng = pool.rng
    out = []
    for _ in range(rng.randint(3, 6)):
        key = pool.snake(1, 2)
        keys = [key, *(f"{key}_{pool.word()}" for _ in range(rng.randint(0, 3))), f"{pool.word()}_{key}"]
        rng.shuffle(keys)
        equals = rng.choice((" = ", "=", ": ", " "))
        values = {name: pool.value() for name in keys}
        number, numbers = rng.randint(1, 30), {}
        out.append(f'Lines with "{key}":')
        for name in keys:
            number += rng.randint(1, 40)
            numbers[name] = number
            out.append(f"{number}: {name}{equals}{values[name]}")
        for name in rng.sample(keys, min(2, len(keys))):
            line = f"{name}{equals}{values[name]}"
            out.append(
                f'Line {numbers[name]} sets "{name}" to "{values[name]}".'
                if rng.random() < 0.4
                else f'What is "{name}"? It says {line}\n{values[name]}'
            )
        out.append("")
    return "\n".join(out)


GENERATORS: dict[str, tuple[Callable[[Pool], str], float]] = {
    "recall": (_recall, 1.5),
    "needles": (_needles, 1.0),
    "numbered": (_numbered, 1.2),
    "repeat": (_repeat, 1.2),
    "rendered": (_rendered, 1.0),
    "shell": (_shell, 1.2),
    "paths": (_paths, 0.6),
    "arithmetic": (_arithmetic, 0.5),
    "edits": (_edits, 1.0),
    "plans": (_plans, 1.5),
    "listing": (_listing, 1.2),
}


def document(rng: random.Random) -> str:
    """One to four texts of random kinds below each other, about 1,500 characters or more."""
    makers = list(GENERATORS.values())
    texts: list[str] = []
    while sum(map(len, texts)) < 1500:
        maker = rng.choices([maker for maker, _ in makers], [weight for _, weight in makers])[0]
        texts.append(maker(Pool(rng)))
    return "\n\n".join(texts)
