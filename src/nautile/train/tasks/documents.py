"""Generators of realistic files: settings in fifteen formats, Python modules, logs, package lists, tables, prose.

A ``Document`` is the lines of a file plus what a task may ask about it: settings (key, value, line), definitions, numeric
columns. Real Python modules of the running interpreter are used too, when the caller asks for them (training does,
evaluation does not: its tasks must be the same on every machine).
"""

from __future__ import annotations

import functools
import re
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nautile.train.tasks.words import Pool

__all__ = ["FORMATS", "MAKERS", "Definition", "Document", "Setting", "SettingFormat", "python_slice"]


@dataclass(frozen=True)
class SettingFormat:
    """How one kind of settings file writes a setting; ``{key}`` and ``{value}`` are replaced."""

    pattern: str
    key_style: str  # "upper", "snake", "dotted", "dashed", "camel", "title"
    names: tuple[str, ...]  # file name patterns; {w} is a word
    comment: str = "# "
    spaces: bool = False  # a value may hold spaces
    head: tuple[str, ...] = ()
    foot: tuple[str, ...] = ()
    sections: bool = False

    def line(self, key: str, value: str) -> str:
        """The line that sets ``key`` to ``value``."""
        return self.pattern.replace("{key}", key).replace("{value}", value)


FORMATS = (
    SettingFormat("{key}={value}", "upper", (".env", "{w}.env", ".env.{w}", "{w}.sh")),
    SettingFormat('{key}="{value}"', "upper", ("os-release", "{w}-release", "{w}.env", "{w}.conf", "{w}"), spaces=True),
    SettingFormat("export {key}={value}", "upper", ("{w}.sh", ".profile", "{w}rc")),
    SettingFormat("{key} = {value}", "snake", ("{w}.ini", "{w}.cfg", "{w}.conf", "setup.cfg"), "; ", True, sections=True),
    SettingFormat("{key}={value}", "snake", ("{w}.ini", "{w}.conf", "{w}.service", "{w}.desktop"), sections=True),
    SettingFormat("{key}={value}", "dotted", ("{w}.properties", "gradle.properties", "{w}.conf")),
    SettingFormat("{key} = {value}", "dotted", ("{w}.conf", "sysctl.conf", "{w}.properties")),
    SettingFormat("{key}: {value}", "snake", ("{w}.yaml", "{w}.yml", "config.yaml"), spaces=True),
    SettingFormat("{key}: {value}", "dashed", ("{w}.yml", "{w}.yaml", "{w}"), spaces=True),
    SettingFormat('  "{key}": "{value}",', "camel", ("{w}.json", "config.json", "package.json"), "", True, ("{",), ("}",)),
    SettingFormat('    "{key}": "{value}",', "snake", ("{w}.json", "{w}.json5"), "", True, ("{",), ("}",)),
    SettingFormat('{key} = "{value}"', "snake", ("{w}.toml", "pyproject.toml", "{w}.tf"), spaces=True, sections=True),
    SettingFormat("{key}: {value}", "title", ("control", "METADATA", "PKG-INFO", "{w}.dsc", "{w}.txt"), "# ", True),
    SettingFormat("{key} {value}", "camel", ("sshd_config", "{w}_config", "{w}.conf", "{w}rc"), "# "),
    SettingFormat("{key} {value};", "snake", ("nginx.conf", "{w}.conf", "named.conf"), "# "),
    SettingFormat("{key}\t: {value}", "snake", ("{w}info", "{w}.info", "{w}.txt"), "", True),
    SettingFormat("{key} := {value}", "upper", ("Makefile", "{w}.mk"), "# "),
    SettingFormat("#define {key} {value}", "upper", ("{w}.h", "config.h"), "// "),
)


@dataclass(frozen=True)
class Setting:
    """One setting: its key, its bare value (no quotes or commas) and its line (from 0)."""

    key: str
    value: str
    line: int


@dataclass(frozen=True)
class Definition:
    """One function, method or class of a Python file; ``line`` from 0."""

    what: str  # "function", "method" or "class"
    name: str
    line: int


@dataclass
class Document:
    """A file in the making."""

    name: str  # suggested file name, without directory
    lines: list[str]
    kind: str  # "settings", "python", "table" or "text"
    format: SettingFormat | None = None
    settings: list[Setting] = field(default_factory=list)
    definitions: list[Definition] = field(default_factory=list)
    columns: tuple[tuple[int, str], ...] = ()  # numeric columns of a table: (number from 1, name)


def _file_name(pool: Pool, patterns: tuple[str, ...]) -> str:
    pattern = pool.rng.choice(patterns)
    if "{w}" not in pattern:
        return pattern
    rng = pool.rng
    style = rng.random()
    if style < 0.55:
        word = pool.word()
    elif style < 0.7:
        word = pool.snake(2, 2)
    elif style < 0.85:
        word = "-".join(pool.words(2))
    elif style < 0.93:
        word = f"{pool.word()}{rng.randint(1, 99)}"
    else:
        word = rng.choice((pool.word().upper(), pool.camel(1, 2)))
    return pattern.replace("{w}", word)


# ---------------------------------------------------------------------------------------------------------------- settings


def _key(pool: Pool, style: str) -> str:
    rng = pool.rng
    if style == "upper":
        return pool.snake(1, 3).upper()
    if style == "camel":
        words = [pool.word() for _ in range(rng.choice((1, 2, 2, 3)))]
        return ("" if rng.random() < 0.5 else words.pop(0)) + "".join(word.capitalize() for word in words) or "Mode"
    if style == "title":
        return "-".join(word.capitalize() for word in pool.words(rng.choice((1, 1, 2))))
    joiner = {"snake": "_", "dotted": ".", "dashed": "-"}[style]
    return pool.snake(1, 3) if style == "snake" else joiner.join(pool.words(rng.choice((1, 2, 2, 3))))


def _relative_key(pool: Pool, key: str, style: str) -> str:
    """A key that begins or ends as ``key`` does: the trap of a search by substring."""
    joiner = {"upper": "_", "camel": "", "title": "-", "snake": "_", "dotted": ".", "dashed": "-"}[style]
    word = pool.word()
    word = word.upper() if style == "upper" else word.capitalize() if style in ("camel", "title") else word
    return key + joiner + word if pool.rng.random() < 0.6 or style == "camel" else word + joiner + key


def settings(pool: Pool) -> Document:
    """A settings file of 4 to 40 settings in one of ``FORMATS``, with comments, sections and keys that resemble each other."""
    rng = pool.rng
    format_ = rng.choice(FORMATS)
    lines: list[str] = list(format_.head)
    found: list[Setting] = []
    keys: list[str] = []
    if format_.comment and rng.random() < 0.4:
        lines.append(format_.comment + pool.sentence())
    for _ in range(rng.choice((4, 6, 8, 10, 14, 20, 40))):
        related = keys and rng.random() < 0.2
        key = _relative_key(pool, rng.choice(keys), format_.key_style) if related else _key(pool, format_.key_style)
        if key in keys:
            continue
        if rng.random() < 0.08:
            lines.extend(_break(pool, format_, key))
        value = pool.phrase_value() if format_.spaces and rng.random() < 0.2 else pool.value()
        keys.append(key)
        found.append(Setting(key, value, len(lines)))
        lines.append(format_.line(key, value))
    lines.extend(format_.foot)
    return Document(_file_name(pool, format_.names), lines, "settings", format_, found)


def _break(pool: Pool, format_: SettingFormat, key: str) -> list[str]:
    if format_.sections and pool.rng.random() < 0.7:
        return ["", f"[{pool.word()}]"]
    if not format_.comment:
        return []
    text = f"{key} is the {pool.word()} of the {pool.word()}" if pool.rng.random() < 0.4 else pool.sentence()
    return [format_.comment + text]


# ------------------------------------------------------------------------------------------------------------------ Python

_DEFINITION = re.compile(r"^(\s*)(?:async )?(def|class) (\w+)")
_TYPES = ("int", "str", "float", "bool", "bytes", "None", "list[int]", "dict[str, int]", "Path")


def python(pool: Pool) -> Document:
    """A Python module of imports, constants, functions and classes that call each other."""
    rng = pool.rng
    lines = [f'"""{pool.sentence()}"""', ""]
    lines += [
        f"import {module}" for module in rng.sample(("os", "re", "sys", "json", "time", "math", "random"), rng.randint(1, 3))
    ]
    lines += ["", *(f"{pool.snake().upper()} = {pool.number()}" for _ in range(rng.randint(0, 3)))]
    names: list[str] = []
    for _ in range(rng.choice((2, 3, 4, 6, 9, 20))):
        lines += ["", ""]
        if rng.random() < 0.4:
            _class(pool, lines, names)
        else:
            _function(pool, lines, names, "")
    text = Document(_file_name(pool, ("{w}.py", "{w}.py", "test_{w}.py", "_{w}.py", "__init__.py")), lines, "python")
    text.definitions = definitions(lines)
    return text


def _name(pool: Pool, names: list[str]) -> str:
    rng = pool.rng
    if names and rng.random() < 0.2:
        name = f"{rng.choice(names)}_{pool.word()}"
    else:
        name = rng.choice(("", "", "", "_", "get_", "set_", "is_", "load_", "test_")) + pool.snake(1, 2)
    names.append(name)
    return name


def _function(pool: Pool, lines: list[str], names: list[str], indent: str) -> None:
    rng = pool.rng
    called = rng.choice(names) if names and rng.random() < 0.6 else pool.snake()
    name = _name(pool, names)
    arguments = pool.words(rng.randint(0, 3))
    if rng.random() < 0.4:
        arguments = [f"{argument}: {rng.choice(_TYPES)}" for argument in arguments]
    arrow = f" -> {rng.choice(_TYPES)}" if rng.random() < 0.5 else ""
    if rng.random() < 0.1:
        lines.append(f"{indent}@{rng.choice(('property', 'staticmethod', 'cached', 'functools.cache'))}")
    inside = ["self", *arguments] if indent else arguments
    lines.append(f"{indent}{'async ' if rng.random() < 0.06 else ''}def {name}({', '.join(inside)}){arrow}:")
    if rng.random() < 0.4:
        lines.append(f'{indent}    """{pool.sentence()}"""')
    for word in pool.words(rng.randint(0, 3)):
        lines.append(f"{indent}    {word} = {rng.choice((pool.number(), repr(pool.word()), f'{called}({word})', '[]'))}")
    lines.append(
        f"{indent}    return {called}({pool.word()})" if rng.random() < 0.7 else f"{indent}    raise ValueError({called!r})"
    )


def _class(pool: Pool, lines: list[str], names: list[str]) -> None:
    rng = pool.rng
    previous = [name for name in names if name[:1].isupper()]
    name = rng.choice(previous) + pool.word().capitalize() if previous and rng.random() < 0.3 else pool.camel(1, 3)
    base = rng.choice(("", "", "(Exception)", f"({rng.choice(previous)})" if previous else "(object)"))
    names.append(name)
    lines += [f"class {name}{base}:", f'    """{pool.sentence()}"""']
    for _ in range(rng.randint(1, 3)):
        lines.append("")
        _function(pool, lines, names, "    ")


def definitions(lines: list[str]) -> list[Definition]:
    """Every definition in ``lines``: functions, methods (indented functions) and classes."""
    found = []
    for number, line in enumerate(lines):
        match = _DEFINITION.match(line)
        if match:
            what = "class" if match[2] == "class" else "method" if match[1] else "function"
            found.append(Definition(what, match[3], number))
    return found


@functools.cache
def _standard_modules() -> tuple[Path, ...]:
    """Files of the running interpreter's standard library (PSF licence), tests and vendored packages left out."""
    root = Path(sysconfig.get_path("stdlib"))
    # pydoc_data is the natural text of nautile.train.needles, which evaluation keeps.
    skip = (
        "pydoc_data",
        "test",
        "idlelib",
        "lib2to3",
        "site-packages",
        "dist-packages",
        "ensurepip",
        "turtledemo",
        "__pycache__",
    )
    found = (path for path in root.rglob("*.py") if not any(part in skip or part == "tests" for part in path.parts))
    return tuple(sorted(path for path in found if path.stat().st_size > 2000))


@functools.lru_cache(maxsize=256)
def _module_lines(path: Path) -> tuple[str, ...]:
    try:
        return tuple(path.read_text(encoding="utf-8").expandtabs(4).split("\n"))
    except UnicodeDecodeError:
        return ()


def python_slice(pool: Pool) -> Document:
    """20 to 1,500 consecutive lines of a real standard-library module; a generated module where there is no library source."""
    rng = pool.rng
    modules = _standard_modules()
    lines = _module_lines(rng.choice(modules)) if modules else ()
    if not lines:
        return python(pool)
    count = rng.choice((20, 40, 80, 80, 150, 300, 300, 1500, 1500))
    start = rng.randrange(max(1, len(lines) - count))
    part = list(lines[start : start + count])
    return Document(_file_name(pool, ("{w}.py", "{w}.py", "_{w}.py")), part, "python", definitions=definitions(part))


# -------------------------------------------------------------------------------------------------------------------- text


def _log(pool: Pool) -> Document:
    rng = pool.rng
    style = rng.randrange(5)
    lines = []
    services = pool.words(rng.randint(1, 4))
    messages = [" ".join(pool.words(rng.randint(2, 5))) for _ in range(rng.randint(2, 6))]
    count = rng.choice((6, 12, 20, 40, 80, 200)) if rng.random() < 0.95 else 500
    day, hour = pool.date(), rng.randrange(24)
    for number in range(count):
        time = f"{hour:02}:{number * 7 // 60 % 60:02}:{number * 7 % 60:02}"
        service, message = rng.choice(services), rng.choice(messages)
        level = rng.choice(("INFO", "INFO", "DEBUG", "WARNING", "ERROR"))
        if style == 0:
            lines.append(f"{day} {time} {level} {service}: {message}")
        elif style == 1:
            lines.append(f"[{time}] [{level.lower()}] {message} (code={rng.randrange(600)})")
        elif style == 2:
            lines.append(f"Mar {rng.randint(1, 28)} {time} {services[0]} {service}[{rng.randrange(9999)}]: {message}")
        elif style == 3:
            address = f"10.0.{rng.randrange(9)}.{rng.randrange(99)}"
            method = rng.choice(("GET", "GET", "POST", "PUT", "DELETE"))
            lines.append(
                f'{address} - - "{method} /{service}/{rng.randrange(99)}" {rng.choice((200, 200, 301, 404, 500))} {number}'
            )
        else:
            action = rng.choice(("install", "upgrade", "configure", "status installed", "status unpacked", "remove"))
            lines.append(f"{day} {time} {action} {service}:amd64 {pool.version()} <none>")
    return Document(
        _file_name(pool, ("{w}.log", "{w}.log", "{w}.log.1", "{w}", "messages", "dpkg.log", "{w}.txt")), lines, "text"
    )


def _packages(pool: Pool) -> Document:
    rng = pool.rng
    lines: list[str] = []
    for _ in range(rng.choice((2, 4, 8, 16, 30))):
        name = rng.choice(("lib", "python3-", "", "", "perl-")) + "-".join(pool.words(rng.randint(1, 2)))
        status = rng.choice(("install ok installed",) * 4 + ("deinstall ok config-files", "hold ok installed"))
        lines += [f"Package: {name}", f"Status: {status}", f"Priority: {rng.choice(('optional', 'required', 'important'))}"]
        lines += [f"Section: {rng.choice(('libs', 'admin', 'utils', 'net'))}", f"Installed-Size: {rng.randint(10, 9999)}"]
        lines += [f"Architecture: {rng.choice(('amd64', 'amd64', 'all'))}", f"Version: {pool.version()}"]
        if rng.random() < 0.5:
            lines.append(
                f"Depends: {', '.join(f'{word} (>= {rng.randint(1, 9)}.{rng.randint(0, 9)})' for word in pool.words(2))}"
            )
        lines += [f"Description: {' '.join(pool.words(rng.randint(3, 6)))}", ""]
    return Document(_file_name(pool, ("status", "Packages", "{w}-packages.txt", "available", "{w}.list")), lines[:-1], "text")


def _prose(pool: Pool) -> Document:
    rng = pool.rng
    style = rng.randrange(4)
    lines: list[str] = [f"# {pool.phrase_value()}", ""] if style < 2 else []
    if style == 2:
        lines = [f"{pool.word().upper()}(1)", "", "NAME", f"       {pool.word()} - {' '.join(pool.words(5))}", "", "OPTIONS"]
    for _ in range(rng.choice((3, 6, 12, 25, 60))):
        pick = rng.random()
        if style < 2 and pick < 0.12:
            lines += ["", f"## {pool.sentence(1, 3)[:-1]}", ""]
        elif style < 2 and pick < 0.35:
            lines.append(
                f"- {' '.join(pool.words(rng.randint(2, 6)))}" if pick < 0.3 else f"Use `{pool.snake()}` or *{pool.word()}*."
            )
        elif style == 2:
            lines.append(f"       --{pool.word()}={pool.word().upper()}" if pick < 0.3 else f"              {pool.sentence()}")
        else:
            lines.append(pool.sentence(4, 12))
    return Document(_file_name(pool, ("{w}.md", "README.md", "{w}.txt", "NOTES", "{w}.1", "{w}.rst", "CHANGES")), lines, "text")


def _list(pool: Pool) -> Document:
    rng = pool.rng
    style = rng.randrange(6)
    count = rng.choice((5, 10, 20, 40, 80))
    few = [pool.word() for _ in range(rng.randint(3, 12))]
    makers: tuple[Callable[[], str], ...] = (
        lambda: rng.choice(few),
        lambda: " ".join(rng.choices(few, k=rng.randint(2, 6))),
        lambda: (
            f"{pool.word()}:x:{rng.randint(100, 2000)}:100::/home/{rng.choice(few)}:/bin/{rng.choice(('bash', 'sh', 'false'))}"
        ),
        lambda: f"{rng.choice(few)}=={pool.version()}",
        lambda: f"10.{rng.randrange(9)}.{rng.randrange(99)}.{rng.randrange(255)}\t{rng.choice(few)}.{pool.word()}",
        lambda: f"[{rng.choice('x  ')}] {' '.join(pool.words(rng.randint(1, 4)))}",
    )
    names = ("{w}.txt", "{w}.txt", "passwd", "requirements.txt", "hosts", "TODO")
    return Document(
        _file_name(pool, (names[style], "{w}.txt", "{w}", "{w}.lst")), [makers[style]() for _ in range(count)], "text"
    )


def table(pool: Pool) -> Document:
    """A comma-separated table with a header, one text column or more and at least one column of integers."""
    rng = pool.rng
    numeric = [rng.random() < 0.5 for _ in range(rng.randint(2, 6))]
    numeric[rng.randrange(len(numeric))] = True
    header = list(dict.fromkeys(pool.words(len(numeric) + 3)))[: len(numeric)]
    numeric = numeric[: len(header)]
    top = rng.choice((10, 100, 1000))
    few = pool.words(rng.randint(3, 8))
    lines = [",".join(header)]
    for _ in range(rng.choice((3, 6, 12, 25, 60))):
        lines.append(",".join(str(rng.randrange(top)) if is_number else rng.choice(few) for is_number in numeric))
    columns = tuple(
        (number, name) for number, (name, is_number) in enumerate(zip(header, numeric, strict=True), 1) if is_number
    )
    return Document(_file_name(pool, ("{w}.csv", "{w}.csv", "{w}.data")), lines, "table", columns=columns)


def _long(pool: Pool) -> Document:
    """A text of 300 to 5,000 lines that repeat in blocks: line numbers and counts of three and four digits."""
    rng = pool.rng
    document = rng.choice((_log, _packages, _prose, _list))(pool)
    wanted = int(300 * 2 ** (4 * rng.random()))
    lines = document.lines
    while len(document.lines) < wanted:
        part = rng.randint(1, len(lines))
        document.lines = [*document.lines, pool.sentence(), *lines[:part], *lines[part:][: wanted // 8]]
        lines = document.lines[: max(40, wanted // 4)]
    return document


def text(pool: Pool) -> Document:
    """A log, a package list, prose or a plain list; sometimes a long one."""
    if pool.rng.random() < 0.05:
        return _long(pool)
    return pool.rng.choice((_log, _log, _packages, _prose, _prose, _list))(pool)


MAKERS: dict[str, Callable[[Pool], Document]] = {"settings": settings, "python": python, "table": table, "text": text}
