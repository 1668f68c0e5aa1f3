"""Parameters of invented functions: a JSON schema, how a person says a value, and the value that belongs into the call.

What a model must learn of them is not their meaning but the way from a request to typed arguments: which words are the value,
and how it is written as JSON ("three", "1,200", "5 km", "a, b and c", "without tax"). Names are plain English or words that
mean nothing here; nothing is taken from a benchmark. What this file does not know: functions and conversations.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nautile.train.tasks import Pool
from nautile.train.tasks.wording import expand
from nautile.train.tasks.words import HELD_OUT_WORDS

__all__ = ["Parameter", "Said", "named", "random_parameter", "trained"]


@dataclass(frozen=True)
class Said:
    """A value: its words in a request and the JSON value they stand for. ``clause`` is the whole phrase where a value cannot
    stand behind a parameter's name ("without tax")."""

    words: str
    value: Any
    clause: str = ""


@dataclass(frozen=True)
class Parameter:
    """``name`` in the schema, ``words`` in a sentence; ``places`` are prepositions with which a value may stand alone."""

    name: str
    words: str
    schema: Mapping[str, Any]
    say: Callable[[Pool], Said] = field(compare=False)
    places: tuple[str, ...] = ()

    def with_default(self, pool: Pool) -> Parameter:
        """The same with a default in its schema, sometimes in its description too: what a request need not give."""
        value = self.say(pool).value
        schema = {**self.schema, "default": value}
        if pool.rng.random() < 0.4:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            stop = "" if schema["description"].endswith(".") else "."
            schema["description"] += f"{stop} {pool.rng.choice(('Default is', 'Defaults to', 'Default:'))} {shown}."
        return replace(self, schema=schema)


# ------------------------------------------------------------------------------------------------------------------ strings

_CITIES = (
    "Paris", "Rome", "Lima", "Oslo", "Cairo", "Tokyo", "Delhi", "Berlin", "Madrid", "Dublin", "Boston", "Nairobi", "Toronto",
    "Chicago", "New York", "Hong Kong", "São Paulo", "San Francisco", "Los Angeles", "Cape Town", "Buenos Aires", "Sydney, NSW",
    "Austin, TX", "Portland, OR", "Lyon, France", "Osaka, Japan", "Denver, Colorado", "London, UK",
)  # fmt: skip
_FIRST = (
    "Anna", "Ben", "Carla", "David", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kofi", "Lena", "Mateo", "Nadia",
    "Omar", "Priya", "Quinn", "Rosa", "Sven", "Tara", "Umar", "Vera", "Wei", "Yuki", "Zoe",
)  # fmt: skip
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_CURRENCIES = ("USD", "EUR", "GBP", "JPY", "CHF", "INR", "BRL", "CAD")
_COUNTRIES = (
    "France", "Japan", "Brazil", "Kenya", "Canada", "India", "Norway", "Chile", "Egypt", "Spain", "Germany", "the Netherlands",
)  # fmt: skip


def _title(pool: Pool, low: int, high: int) -> str:
    return " ".join(word[:1].upper() + word[1:] for word in pool.words(pool.rng.randint(low, high)))


def _same(text: str) -> Said:
    return Said(text, text)


def _quoted(pool: Pool, text: str) -> Said:
    """As it is, or in quotes that do not belong to it."""
    mark = pool.rng.choice(('"', '"', "'", "")) if text.isascii() else ""
    return Said(f"{mark}{text}{mark}" if mark not in text or not mark else text, text)


def _city(pool: Pool) -> Said:
    return _same(pool.rng.choice(_CITIES) if pool.rng.random() < 0.6 else _title(pool, 1, 2))


def _person(pool: Pool) -> Said:
    return _same(pool.rng.choice(_FIRST) + (f" {_title(pool, 1, 1)}" if pool.rng.random() < 0.5 else ""))


def _company(pool: Pool) -> Said:
    return _same(_title(pool, 1, 2) + pool.rng.choice(("", "", " Inc", " Ltd.", " Group", " Corporation")))


def _country(pool: Pool) -> Said:
    text = pool.rng.choice(_COUNTRIES)
    return Said(text, text.removeprefix("the "))


def _code(pool: Pool) -> Said:
    rng = pool.rng
    letters = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=rng.randint(1, 4)))
    return _same(letters + rng.choice(("", "-", "_")) + "".join(rng.choices("0123456789", k=rng.randint(2, 6))))


def _address(pool: Pool) -> Said:
    return _same(f"{pool.word().lower()}.{pool.word().lower()}@{pool.word().lower()}.{pool.rng.choice(('com', 'org', 'net'))}")


def _word(pool: Pool) -> Said:
    return _quoted(pool, pool.word())


def _phrase(pool: Pool) -> Said:
    return _quoted(pool, " ".join(pool.words(pool.rng.randint(2, 4))))


def _work(pool: Pool) -> Said:
    return _quoted(pool, _title(pool, 2, 4))


def _message(pool: Pool) -> Said:
    text = pool.sentence(3, 9)
    mark = pool.rng.choice(('"', "'"))
    return Said(f"{mark}{text}{mark}", text)


def _time(pool: Pool) -> Said:
    text = f"{pool.rng.randrange(24):02}:{pool.rng.choice((0, 15, 30, 45)):02}"
    return Said(text, text)


def _iso_date(pool: Pool) -> Said:
    """A date as a person writes it, for a parameter whose description wants YYYY-MM-DD."""
    year, month, day = pool.rng.randint(1990, 2035), pool.rng.randint(1, 12), pool.rng.randint(1, 28)
    iso, name = f"{year}-{month:02}-{day:02}", _MONTHS[month - 1]
    ending = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd"}.get(day, "th")
    forms = (iso, iso, f"{name} {day}, {year}", f"{name} {day}{ending}, {year}", f"{day} {name} {year}")
    return Said(pool.rng.choice(forms), iso)


def _formula(pool: Pool) -> Said:
    rng = pool.rng
    letter = rng.choice("xyt")
    return _quoted(pool, f"{rng.randint(2, 9)}{letter}**2 {rng.choice('+-')} {rng.randint(1, 9)}{letter}")


_Maker = Callable[[Pool], Said]
_STRINGS: tuple[tuple[str, str, _Maker, tuple[str, ...]], ...] = (  # nouns, description, value, prepositions
    ("city|location|place|town|destination|area|region", "[The|Name of the] {} [to use||, as a name]", _city,
     ("in", "for", "near", "at")),
    ("origin|departure city|start location|source city", "[The|Where to begin:] {}", _city, ("from",)),
    ("target city|arrival city|end location|drop off point", "[The|Where to end:] {}", _city, ("to",)),
    ("country|home country|nation", "The {}", _country, ("in", "for")),
    ("name|full name|customer|user name|author|artist|player|employee|patient|guest|contact|owner|recipient",
     "[The|Name of the] {}", _person, ("for", "by", "of")),
    ("company|organization|brand|supplier|company name|team|school|bank", "[The|Name of the] {}", _company,
     ("of", "at", "for")),
    ("product|item|material|dish|topic|subject|genre|category|species|ingredient|keyword|field|device|sport",
     "[The|Name of the] {}", _word, ("for", "of", "about")),
    ("title|book title|event name|movie|song|project|course", "[The|Name of the] {}", _work, ("called", "named", "for")),
    ("order id|booking id|ticket id|account number|reference|serial number|user id|tracking code", "[The|Unique] {}", _code,
     ("for", "with")),
    ("email|email address|contact email|reply address", "[The|A] {}", _address, ("to",)),
    ("query|search term|description|reason|label|tag|goal|theme", "[The|Text of the] {}", _phrase, ("for", "about")),
    ("message|text|note|comment|body|content", "[The|Text of the] {}", _message, ("saying",)),
    ("date|start date|due date|end date|travel date|birth date|day", "[The|A] {} in the [format|form] YYYY-MM-DD", _iso_date,
     ("on", "for")),
    ("time|start time|alarm time|opening time", "The {}[, HH:MM| in the form HH:MM|, 24 hours]", _time, ("at",)),
    ("currency|base currency|target currency", "The {}[ code|, three letters]",
     lambda pool: _same(pool.rng.choice(_CURRENCIES)), ("in",)),
    ("function|expression|formula|equation", "The {} [in Python syntax|as text|in x]", _formula, ("of", "for")),
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------------ numbers

_SMALL = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_COUNTED = (
    "rooms|guests|people|seats|days|nights|hours|items|copies|players|pages|questions|steps|results|tickets|workers|rounds|"
    "passengers|bedrooms|servings|years|weeks|samples|trials|tables|pieces"
)
_WHOLE = (
    "age|year|quantity|limit|size|level|floor|priority|population|distance|height|speed|duration|budget|capacity|index|seed|"
    "temperature|score|rating|month|page number|item number|first number|second number|lower bound|upper bound"
)
_REAL = (
    "weight|mass|length|width|height|radius|depth|price|rate|amount|interest rate|voltage|pressure|volume|latitude|longitude|"
    "density|angle|tax rate|growth rate|charge|energy|force|velocity|threshold|principal|discount|humidity|tip"
)
_UNITS = (
    ("km", "kilometers"), ("m", "meters"), ("cm", "centimeters"), ("kg", "kilograms"), ("meters", "meters"), ("miles", "miles"),
    ("seconds", "seconds"), ("hours", "hours"), ("m/s", "meters per second"), ("degrees", "degrees"), ("kg", "kg"),
    ("liters", "liters"), ("volts", "volts"), ("watts", "watts"), ("pounds", "pounds"), ("minutes", "minutes"),
)  # fmt: skip


def _whole(rng: random.Random) -> int:
    return rng.choice((rng.randint(1, 12), *(rng.randint(1, 100) for _ in "ab"), rng.randint(100, 2100), rng.randrange(10**6)))


def _real(rng: random.Random) -> float | int:
    pick = rng.random()
    if pick < 0.35:
        return rng.choice((rng.randint(1, 20), rng.randint(1, 500), 10 * rng.randint(1, 900)))
    value = round(rng.choice((1, 10, 100, 1000)) * rng.random(), rng.randint(1, 3))
    return value if pick < 0.9 else -value


def _digits(rng: random.Random, value: float) -> str:
    return f"{value:,}" if abs(value) >= 1000 and rng.random() < 0.35 else str(value)


def _integer(pool: Pool) -> Said:
    value = _whole(pool.rng)
    small = value < len(_SMALL) and pool.rng.random() < 0.3
    return Said(_SMALL[value] if small else _digits(pool.rng, value), value)


def _count(words: str) -> _Maker:
    def say(pool: Pool) -> Said:
        value = pool.rng.choice((pool.rng.randint(1, 12), pool.rng.randint(2, 50)))
        text = _SMALL[value] if value < len(_SMALL) and pool.rng.random() < 0.4 else str(value)
        noun = words if value != 1 else words.removesuffix("s") if words != "people" else "person"
        return Said(text, value, f"{pool.rng.choice(('for', 'with'))} {text} {noun}")

    return say


def _measured(unit: str) -> _Maker:
    def say(pool: Pool) -> Said:
        value = _real(pool.rng)
        return Said(f"{_digits(pool.rng, value)}{'' if unit == '%' else ' '}{unit}", value)

    return say


def _money(pool: Pool) -> Said:
    value = pool.rng.choice((pool.rng.randint(1, 99), 50 * pool.rng.randint(1, 9000), round(500 * pool.rng.random(), 2)))
    return Said(f"{pool.rng.choice('$$$€£')}{_digits(pool.rng, value)}", value)


def _share(pool: Pool) -> Said:
    """Per cent in the request, a fraction in the call: the description says so."""
    value = pool.rng.choice((pool.rng.randint(1, 99), pool.rng.randint(1, 9) + 0.5))
    return Said(f"{value}%", round(value / 100, 4))


def _plain_real(pool: Pool) -> Said:
    value = _real(pool.rng)
    return Said(_digits(pool.rng, value), value)


# ---------------------------------------------------------------------------------------------------------- making parameters

_STYLES: tuple[tuple[Callable[[str], str], float], ...] = (
    (lambda words: words.replace(" ", "_"), 8.0),
    (lambda words: re.sub(r" (\w)", lambda match: match[1].upper(), words), 1.2),
    (lambda words: words.replace(" ", ""), 0.5),
    (lambda words: words.split(" ")[-1], 0.5),
)
_MODIFIERS = ("new", "main", "first", "second", "max", "min", "total", "current", "default", "initial", "final", "target")


@functools.cache
def trained(nouns: str) -> tuple[str, ...]:
    """Those of ``a|b c|d`` without a word that tool tasks keep for evaluation."""
    return tuple(noun for noun in nouns.split("|") if not set(noun.split(" ")) & set(HELD_OUT_WORDS))


def named(rng: random.Random, words: str) -> str:
    """An identifier for words: snake_case, camelCase, or shorter."""
    style = rng.choices([style for style, _ in _STYLES], [weight for _, weight in _STYLES])[0]
    name = re.sub(r"\W+", "_", style(words))
    return name if name.isidentifier() else f"p_{name}"


def _noun(pool: Pool, nouns: str) -> str:
    """One of ``nouns``, sometimes with a word before it; in three of ten cases words that mean nothing here."""
    rng = pool.rng
    if rng.random() < 0.3:
        return " ".join(word.lower() for word in pool.words(rng.choice((1, 1, 2))))
    noun = rng.choice(trained(nouns))
    return f"{rng.choice((*_MODIFIERS, pool.word().lower()))} {noun}" if rng.random() < 0.15 else noun


def random_parameter(pool: Pool) -> Parameter:
    """Types about as often as function collections have them: two of three are strings, a sixth whole numbers."""
    kinds = (_string, _choice, _whole_number, _real_number, _switch, _list, _record)
    return pool.rng.choices(kinds, (50, 19, 16, 5, 10, 4, 2))[0](pool)


def _made(  # the fields of a parameter
    pool: Pool, words: str, kind: str, description: str, say: _Maker, places: tuple[str, ...] = (), **more: Any
) -> Parameter:
    text = expand(pool.rng, description, {}).replace("{}", words).strip()
    text += pool.rng.choice(("", ".", "."))
    return Parameter(named(pool.rng, words), words, {"type": kind, "description": text, **more}, say, places)


def _string(pool: Pool) -> Parameter:
    nouns, description, say, places = pool.rng.choice(_STRINGS)
    words = _noun(pool, nouns)
    if words.split(" ")[-1] not in re.split(r"[ |]", nouns):
        places = ()  # a bare "in Lima" says nothing about a word without a meaning
    return _made(pool, words, "string", description, say, places)


def _choice(pool: Pool) -> Parameter:
    """One of a few words; a person may say them with a space for an underscore, or in another case."""
    rng = pool.rng
    made = {pool.snake(1, 2) if rng.random() < 0.5 else pool.word() for _ in range(rng.randint(2, 6))}
    style = rng.choice((str, str, str.lower, str.upper, str.capitalize))
    options = list(dict.fromkeys(style(word) for word in sorted(made)))
    rng.shuffle(options)

    def say(pool: Pool) -> Said:
        value = pool.rng.choice(options)
        heard = value.replace("_", " ") if pool.rng.random() < 0.6 else value
        return Said(heard.lower() if pool.rng.random() < 0.4 else heard, value)

    words = _noun(pool, "unit|type|mode|format|status|class|color|method|order|style|level|kind|plan|category|language")
    listed = ", ".join(options) if rng.random() < 0.3 else ""
    description = f"The {{}}[ to use||]{': ' + listed if listed else ''}"
    return _made(pool, words, "string", description, say, enum=options)


def _whole_number(pool: Pool) -> Parameter:
    rng = pool.rng
    if rng.random() < 0.35:
        words = _noun(pool, _COUNTED)
        prefix = rng.choice(("number of ", "", "num "))
        made = _made(pool, f"{prefix}{words}", "integer", "[The|How many:] {}", _count(words))
        return Parameter(made.name, made.words, made.schema, made.say)
    words = _noun(pool, _WHOLE)
    if rng.random() < 0.25:
        unit, name = rng.choice(_UNITS)
        return _made(pool, words, "integer", f"[The|A] {{}} in {name}", _whole_measured(unit))
    return _made(pool, words, "integer", "[The|A|Value of the] {}[|, a whole number]", _integer)


def _whole_measured(unit: str) -> _Maker:
    def say(pool: Pool) -> Said:
        value = _whole(pool.rng)
        return Said(f"{_digits(pool.rng, value)} {unit}", value)

    return say


def _real_number(pool: Pool) -> Parameter:
    rng, words = pool.rng, _noun(pool, _REAL)
    pick = rng.random()
    if pick < 0.3:
        unit, name = rng.choice(_UNITS)
        return _made(pool, words, "number", f"[The|A] {{}} in {name}", _measured(unit))
    if pick < 0.42:
        return _made(pool, words, "number", "[The|A] {} in [dollars|the local currency]", _money)
    if pick < 0.54:
        return _made(pool, words, "number", "[The|A] {} [as a fraction|as a decimal, 0.1 for 10%|from 0 to 1]", _share)
    if pick < 0.62:
        return _made(pool, words, "number", "[The|A] {} in [percent|per cent]", _measured("%"))
    return _made(pool, words, "number", "[The|A|Value of the] {}", _plain_real)


def _switch(pool: Pool) -> Parameter:
    thing = _noun(pool, "tax|details|images|breakfast|shipping|insurance|history|notifications|comments|duplicates|fees")
    verb = pool.rng.choice(("include", "include", "use", "show", "allow", "add", "send", "keep"))

    def say(pool: Pool) -> Said:
        value = pool.rng.random() < 0.6
        yes = (f"with {thing}", f"and {verb} {thing}", f"including {thing}", f"{verb} {thing}: yes")
        no = (f"without {thing}", f"and do not {verb} {thing}", f"but don't {verb} {thing}", f"{verb} {thing}: no")
        clause = pool.rng.choice(yes if value else no)
        return Said(clause, value, clause)

    return _made(pool, f"{verb} {thing}", "boolean", "[Whether to|If true,|True to] {}", say)


def _list(pool: Pool) -> Parameter:
    makers = (("string", _city), ("string", _word), ("string", _person), ("integer", _integer), ("number", _plain_real))
    kind, one = pool.rng.choice(makers)
    nouns = "names|items|tags|cities|topics|members" if kind == "string" else "numbers|values|data points|scores|prices"

    def say(pool: Pool) -> Said:
        parts = [one(pool) for _ in range(pool.rng.randint(2, 5))]
        values = [part.value for part in parts]
        if kind == "string" and pool.rng.random() < 0.75:
            words = [part.words.replace(",", "") for part in parts]
            values = [value.replace(",", "") for value in values]
        else:
            words = [f"'{value}'" if kind == "string" else str(value) for value in values]
            return Said(f"[{', '.join(words)}]", values)
        return Said(f"{', '.join(words[:-1])} and {words[-1]}", values)

    return _made(pool, _noun(pool, nouns), "array", "[The|List of|A list of] {}", say, items={"type": kind})


def _record(pool: Pool) -> Parameter:
    """An object with a few parameters of its own, all of them given."""
    inner: dict[str, Parameter] = {}
    while len(inner) < pool.rng.randint(2, 3):
        part = pool.rng.choice((_string, _whole_number, _real_number))(pool)
        inner.setdefault(part.name, part)

    def say(pool: Pool) -> Said:
        said = {name: part.say(pool) for name, part in inner.items()}
        text = _joined([f"{inner[name].words} {one.words}" for name, one in said.items()])
        return Said(text, {name: one.value for name, one in said.items()})

    properties = {name: dict(part.schema) for name, part in inner.items()}
    words = _noun(pool, "details|options|filters|settings|address|preferences|conditions")
    return _made(pool, words, "object", "[The|All] {}", say, properties=properties)


def _joined(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)
