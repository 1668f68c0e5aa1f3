"""Conversations about functions that were never seen before: offers of schemas, requests in words, calls with typed arguments.

What they teach is to read an offer: which of several functions is meant, what it must be given, which values of the request go
where and as what type; to call several times when several things are asked; to call nothing when nothing fits or a value is
missing; to go on with what a call returned. Names, schemas and words come from random numbers, nothing from a benchmark
(``bench/function_data.py`` counts what they share with one). What this file does not know: tokens and files.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nautile.train.parameters import Parameter, Said, named, random_parameter, trained
from nautile.train.renaming import system_prompt
from nautile.train.tasks import Pool
from nautile.train.tasks.wording import expand

__all__ = ["Function", "Talk", "random_function", "random_talk"]

_VERBS: tuple[tuple[str, str], ...] = (  # in names and descriptions; in requests
    ("get", "get|give me|fetch|find|show me|tell me|look up|i need|can i have"),
    ("fetch", "get|give me|fetch|retrieve|show me|pull up"),
    ("find", "find|look for|search for|locate|get me|help me find"),
    ("search", "search for|find|look for|look up|show me"),
    ("calculate", "calculate|compute|work out|find|determine|what is|figure out"),
    ("compute", "compute|calculate|work out|what is|determine"),
    ("estimate", "estimate|predict|give an estimate of|work out roughly|what would be"),
    ("predict", "predict|forecast|estimate|what will be"),
    ("convert", "convert|change|turn|translate"),
    ("create", "create|make|add|set up|start|open"),
    ("add", "add|put in|create|enter"),
    ("modify", "update|change|modify|set|correct"),
    ("show", "list|show me|give me a list of|what are|display"),
    ("buy", "order|buy|get me|i would like to order"),
    ("book", "book|reserve|get me|arrange|i want to book"),
    ("reserve", "reserve|book|hold|keep"),
    ("send", "send|write|post|deliver"),
    ("schedule", "schedule|plan|set|arrange|put in my calendar"),
    ("set", "set|change|adjust|put"),
    ("delete", "delete|remove|erase|get rid of"),
    ("cancel", "cancel|call off|drop|stop"),
    ("check", "check|verify|look at|tell me about|see"),
    ("compare", "compare|weigh|set side by side"),
    ("analyze", "analyze|examine|study|look into"),
    ("generate", "generate|make|produce|create|give me"),
    ("play", "play|start|put on"),
    ("track", "track|follow|trace|where is"),
    ("register", "register|sign up|enter|enrol"),
    ("assign", "assign|give|hand over"),
    ("solve", "solve|find the answer of|work out"),
    ("sort", "sort|order|arrange"),
    ("count", "count|how many are in|give me the number of"),
    ("recommend", "recommend|suggest|advise me on|propose"),
    ("measure", "measure|determine|find"),
    ("draw", "draw|plot|sketch"),
    ("export", "export|save|write out"),
    ("open", "open|start|launch|unlock"),
    ("close", "close|shut|end|lock"),
    ("rate", "rate|review|score"),
    ("simulate", "simulate|model|run a simulation of"),
)
_THINGS = (
    "weather|forecast|hotel|room|flight|train|ticket|table|restaurant|recipe|meal|meeting|appointment|event|reminder|alarm|"
    "message|invoice|payment|loan|mortgage|account|balance|budget|expense|salary|price|discount|order|shipment|parcel|route|"
    "distance|area|volume|perimeter|angle|slope|root|average|median|sum|product|probability|speed|force|energy|pressure|density|"
    "temperature|current|resistance|wave|reaction|cell|gene|protein|plant|animal|patient|dose|diet|workout|heart rate|match|"
    "score|player|team|league|song|playlist|album|movie|book|article|news|story|painting|sculpture|museum|concert|course|lesson|"
    "exam|grade|student|teacher|law|case|contract|license|property|house|rent|car|battery|engine|light|lamp|thermostat|camera|"
    "device|server|database|table row|report|chart|file|user|profile|customer|supplier|stock|share|portfolio|currency|rate|tax|"
    "insurance|claim|policy|ticket status|language|word|sentence|summary|translation|image|video|map|city|country|population|"
    "river|mountain|planet|star|orbit|calendar|holiday|time zone|unit|number|sequence|matrix|equation|graph|list|color|pattern"
)
_BEFORE = (
    "exchange|monthly|annual|daily|local|public|private|online|new|total|average|electric|historical|nearby|open|personal|final"
)
_RESULTS = ("id", "status", "total", "price", "result", "value", "code", "count", "name", "date")
_OPENINGS = (
    "", "", "", "", "[Please|please] ", "[Can|Could] you ", "[I want to|I need to|I would like to|Help me] ", "Hi, ", "Hello! ",
    "[My plan:|Next:|Now|First,] ",
)  # fmt: skip
_AND = ("and", "and also", "and then", "also", "then", "after that,")
_NONE = (
    "None of the functions can do that.", "There is no function for that.", "I have no function that does this.",
    "No function on offer fits this request.",
)  # fmt: skip


@dataclass(frozen=True)
class Function:
    """``verb`` and ``thing`` are what it does; the first ``required`` of its parameters must be given."""

    name: str
    verb: str
    thing: str
    description: str
    parameters: tuple[Parameter, ...]
    required: int

    def specification(self) -> dict[str, Any]:
        """As an OpenAI tool."""
        shown = {parameter.name: dict(parameter.schema) for parameter in self.parameters}
        schema = {"type": "object", "properties": shown, "required": [one.name for one in self.parameters[: self.required]]}
        return {"type": "function", "function": {"name": self.name, "description": self.description, "parameters": schema}}


@dataclass(frozen=True)
class Call:
    """One call: the function, and what each given parameter was called in the request."""

    function: Function
    said: Mapping[str, Said]

    @property
    def arguments(self) -> dict[str, Any]:
        """As JSON values, in the order of the schema."""
        return {name: one.value for name, one in self.said.items()}

    def thought(self) -> str:
        """The values before they are written as arguments; where words and value differ, both."""
        parts = []
        for name, one in self.said.items():
            value = json.dumps(one.value, ensure_ascii=False)
            same = one.words.strip("\"'") == (one.value if isinstance(one.value, str) else value)
            parts.append(f"{name} is {value}" if same else f'{name}: "{one.words}" is {value}')
        return f"{self.function.name}: {'; '.join(parts)}." if parts else f"{self.function.name} needs nothing."


@dataclass(frozen=True)
class Talk:
    """``messages`` from the system prompt on, the ``tools`` on offer, whether it thinks, and what kind it is."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    thinking: bool
    kind: str


# ---------------------------------------------------------------------------------------------------------------- functions


def random_function(pool: Pool, verb: str | None = None, thing: str | None = None) -> Function:
    """A function of random words; ``verb`` or ``thing`` make it a neighbour of another one."""
    rng = pool.rng
    verb = verb or (rng.choice(_VERBS)[0] if rng.random() < 0.92 else pool.word().lower())
    thing = thing or _thing(pool)
    count = rng.choices((0, 1, 2, 3, 4, 5, 6), (1, 12, 24, 28, 20, 10, 5))[0]
    parameters: dict[str, Parameter] = {}
    words: set[str] = set()
    required = min(count, rng.choices((0, 1, 2, 3, 4), (4, 36, 30, 18, 12))[0])
    while len(parameters) < count:
        one = random_parameter(pool)
        if one.name not in parameters and one.words not in words:
            optional = len(parameters) >= required
            parameters[one.name] = one.with_default(pool) if optional and rng.random() < 0.75 else one
            words.add(one.words)
    return Function(
        _name(pool, verb, thing), verb, thing, _description(pool, verb, thing), tuple(parameters.values()), required
    )


def _thing(pool: Pool) -> str:
    rng = pool.rng
    if rng.random() < 0.35:
        return " ".join(word.lower() for word in pool.words(rng.choice((1, 1, 2))))
    thing = rng.choice(trained(_THINGS))
    return f"{rng.choice((*trained(_BEFORE), pool.word().lower()))} {thing}" if rng.random() < 0.35 else thing


def _name(pool: Pool, verb: str, thing: str) -> str:
    rng, style = pool.rng, pool.rng.random()
    if style < 0.12:
        return named(rng, f"{thing} {verb}")
    if style < 0.2:
        return named(rng, thing)
    if style < 0.36:  # of a module: dots are underscores in an offer
        return f"{named(rng, rng.choice(trained(_THINGS)))}_{named(rng, f'{verb} {thing}')}"
    return named(rng, f"{verb} {thing}")


def _description(pool: Pool, verb: str, thing: str) -> str:
    third = (
        f"{verb[:-1]}ies" if verb.endswith("y") and verb != "play" else f"{verb}{'es' if verb[-2:] in ('ch', 'sh') else 's'}"
    )
    forms = f"[{verb}|{third}] [the |a |]{thing}[| with the given values| for the given values| of a user| by name||]"
    text = expand(pool.rng, forms, {})
    text += expand(pool.rng, "[|||. Returns [an object|a number|a list|the result]|. All values are checked first]", {})
    return f"{text[0].upper()}{text[1:]}{pool.rng.choice(('.', '.', ''))}"


# ----------------------------------------------------------------------------------------------------------------- requests


def _values(pool: Pool, function: Function, without: str = "") -> dict[str, Said]:
    """What a request gives: all that is required (but ``without``), some of the rest."""
    chosen = function.parameters[: function.required] + tuple(
        one for one in function.parameters[function.required :] if pool.rng.random() < 0.45
    )
    return {one.name: one.say(pool) for one in chosen if one.name != without}


def _mention(pool: Pool, parameter: Parameter, said: Said, alone: bool) -> str:
    """A phrase that gives a parameter its value; ``alone``: no other parameter could be meant by a bare preposition."""
    rng = pool.rng
    if said.clause and rng.random() < 0.8:
        return said.clause
    if parameter.places and alone and rng.random() < 0.6:
        return f"{rng.choice(parameter.places)} {said.words}"
    if parameter.schema["type"] == "boolean":
        return said.clause
    words = f"{parameter.name}" if rng.random() < 0.06 else parameter.words
    forms = (
        "[with|using|for|at|of] [a |the |an |]{w} [of|=|being|] {v}", "with {w} {v}", "{w}: {v}", "{w} = {v}", "the {w} is {v}",
        "{w} {v}", "with {v} as [the |]{w}", "where the {w} is {v}", "[taking|and] {v} [as|for] the {w}", "and {w} {v}",
    )  # fmt: skip
    return expand(rng, rng.choice(forms), {}).replace("{w}", words).replace("{v}", said.words)


def _clause(pool: Pool, call: Call, shown: Mapping[str, Said] | None = None) -> str:
    """``verb thing mentions`` without an opening or an end; ``shown`` replaces what is said of the values."""
    rng, function = pool.rng, call.function
    said = call.said if shown is None else shown
    known = dict(_VERBS)
    verb = rng.choice(known[function.verb].split("|")) if function.verb in known and rng.random() < 0.75 else function.verb
    article = rng.choice(("the ", "the ", "an " if function.thing[0] in "aeio" else "a ", "", "my "))
    places = [place for one in function.parameters for place in one.places]
    parts = [
        _mention(pool, one, said[one.name], all(places.count(place) == 1 for place in one.places))
        for one in function.parameters
        if one.name in said
    ]
    if rng.random() < 0.3:
        rng.shuffle(parts)
    glue = rng.choice((" ", " ", ", ", ", "))
    return f"{verb} {article}{function.thing} {glue.join(parts)}".strip()


def _finished(pool: Pool, clause: str) -> str:
    rng = pool.rng
    opening = expand(rng, rng.choice(_OPENINGS), {})
    question = clause.split(" ", maxsplit=1)[0] in ("what", "where", "how", "can") and not opening.endswith("you ")
    text = clause if question else opening + clause
    text = text[0].upper() + text[1:] if rng.random() < 0.9 else text
    text += "?" if question or "you " in opening else rng.choice((".", ".", ".", "", "!"))
    if rng.random() < 0.15:
        text = f"{pool.sentence(4, 9)} {text}"
    return f"{text}{rng.choice((' Thanks.', ' Thank you!', ' Be quick.'))}" if rng.random() < 0.05 else text


def _request(pool: Pool, calls: Sequence[Call]) -> str:
    """All calls of one request, clause by clause."""
    text = _clause(pool, calls[0])
    for call in calls[1:]:
        joint = pool.rng.choice((f", {pool.rng.choice(_AND)} ", f" {pool.rng.choice(_AND)} ", ". Also, ", "; "))
        text += joint + _clause(pool, call)
    return _finished(pool, text)


def _repeated(pool: Pool, function: Function) -> tuple[str, list[Call]]:
    """One function several times: one value of a request is a list of values, the others hold for all calls."""
    rng, count = pool.rng, pool.rng.choices((2, 3, 4), (5, 3, 2))[0]
    base = _values(pool, function)
    able = [one for one in function.parameters if one.name in base and one.schema["type"] in ("string", "integer", "number")]
    if not able or rng.random() < 0.25:
        calls = [Call(function, _values(pool, function)) for _ in range(count)]
        return _request(pool, calls), calls
    varied = rng.choice(able)
    said = list({str(one.value): one for one in (varied.say(pool) for _ in range(count))}.values())
    calls = [Call(function, {**base, varied.name: one}) for one in said]
    words = [one.words for one in said]
    together = f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
    return _finished(pool, _clause(pool, calls[0], {**base, varied.name: Said(together, None)})), calls


# ------------------------------------------------------------------------------------------------------------ conversations

_KINDS = {"one": 38, "choice": 22, "repeated": 10, "several": 8, "none": 10, "missing": 4, "turns": 8}


def random_talk(pool: Pool, most: int = 8) -> Talk:
    """A conversation with at most ``most`` functions on offer, thinking in seven of eight."""
    rng = pool.rng
    kind = rng.choices(list(_KINDS), list(_KINDS.values()))[0]
    thinking = rng.random() < 0.875
    wanted = [random_function(pool) for _ in range(rng.choice((2, 2, 3)) if kind in ("several", "turns") else 1)]
    size = min(most, rng.choice((2, 2, 3, 3, 4, 4, 5, 6, 8)))
    extra = 0 if kind == "one" else max(int(len(wanted) < most), size - len(wanted))
    offer = _distinct([*([] if kind == "none" else wanted), *(_neighbour(pool, wanted[0]) for _ in range(extra))])
    turns = _Turns(pool, thinking)
    if kind in ("one", "choice"):
        call = Call(wanted[0], _values(pool, wanted[0]))
        turns.ask(_request(pool, [call]), [call], rng.random() < 0.25)
    elif kind == "repeated":
        turns.ask(*_repeated(pool, wanted[0]), rng.random() < 0.2)
    elif kind == "several":
        calls = [Call(function, _values(pool, function)) for function in wanted if function in offer]
        turns.ask(_request(pool, calls), calls, rng.random() < 0.2)
    elif kind == "none":
        call = Call(wanted[0], _values(pool, wanted[0]))
        turns.decline(_request(pool, [call]), wanted[0])
    elif kind == "missing":
        turns.missing(wanted[0])
    else:
        for function in [one for one in wanted if one in offer]:
            turns.go_on(function)
    rng.shuffle(offer)
    system = "" if rng.random() < 0.7 else system_prompt(rng)
    messages = [{"role": "system", "content": system}, *turns.messages]
    return Talk(messages, [function.specification() for function in offer], thinking, kind)


def _neighbour(pool: Pool, function: Function) -> Function:
    """Another function of the offer: of the same verb or the same thing in half of all cases."""
    pick = pool.rng.random()
    return random_function(pool, function.verb if pick < 0.25 else None, function.thing if 0.25 <= pick < 0.5 else None)


def _distinct(functions: Sequence[Function]) -> list[Function]:
    """Each name and each task once, the first of them."""
    names: dict[str, Function] = {}
    tasks: set[tuple[str, str]] = set()
    for function in functions:
        if function.name not in names and (function.verb, function.thing) not in tasks:
            names[function.name] = function
            tasks.add((function.verb, function.thing))
    return list(names.values())


class _Turns:
    """Appends turns of both sides to ``messages``; knows the last result, which a later request may point to."""

    def __init__(self, pool: Pool, thinking: bool) -> None:
        self.pool, self.thinking, self.messages = pool, thinking, list[dict[str, Any]]()
        self.last: tuple[str, Any] | None = None

    def ask(self, request: str, calls: Sequence[Call], answered: bool) -> None:
        """A request and its calls; ``answered`` adds results and what is said of them."""
        self.messages.append({"role": "user", "content": request})
        count = f"{len(calls)} calls. " if len(calls) > 1 else ""
        made = [
            {"id": f"call_{number:02}", "type": "function", "function": {
                "name": call.function.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}}
            for number, call in enumerate(calls)
        ]  # fmt: skip
        self._say(count + " ".join(call.thought() for call in calls), "", made)
        if answered:
            self._answer(made)

    def decline(self, request: str, function: Function) -> None:
        """A request for which nothing is on offer."""
        self.messages.append({"role": "user", "content": request})
        self._say(f'Asked is "{function.verb} {function.thing}". No function does that.', self.pool.rng.choice(_NONE))

    def missing(self, function: Function) -> None:
        """A value that must be given is not; it is asked for, and given."""
        required = function.parameters[: function.required]
        if not required:
            call = Call(function, _values(self.pool, function))
            return self.ask(_request(self.pool, [call]), [call], False)
        absent = self.pool.rng.choice(required)
        call = Call(function, _values(self.pool, function, absent.name))
        self.messages.append({"role": "user", "content": _request(self.pool, [call])})
        self._say(f"{call.thought()} {absent.name} is not given.", f"What is the {absent.words}?")
        said = absent.say(self.pool)
        reply = said.clause or self.pool.rng.choice((said.words, f"{said.words}.", f"The {absent.words} is {said.words}."))
        given = {**call.said, absent.name: said}
        ordered = {one.name: given[one.name] for one in function.parameters if one.name in given}
        return self.ask(reply, [Call(function, ordered)], self.pool.rng.random() < 0.3)

    def go_on(self, function: Function) -> None:
        """One more request, answered; it may ask to use what the last call returned."""
        values, rng = _values(self.pool, function), self.pool.rng
        able = [one.name for one in function.parameters if one.name in values and one.schema["type"] == "string"
                and "enum" not in one.schema]  # fmt: skip
        if self.last is not None and able and rng.random() < 0.5:
            key, value = self.last
            values[rng.choice(able)] = Said(rng.choice((f"the {key} you got", f"that {key}", f"the {key} from before")), value)
        call = Call(function, values)
        self.ask(_request(self.pool, [call]), [call], True)

    def _answer(self, calls: Sequence[Mapping[str, Any]]) -> None:
        rng, said = self.pool.rng, []
        for call in calls:
            key = rng.choice(_RESULTS)
            value: Any = rng.choice((self.pool.value(), self.pool.snake(), rng.randrange(10**5)))
            result = {key: value} if rng.random() < 0.7 else {key: value, self.pool.word().lower(): self.pool.value()}
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": json.dumps(result)})
            self.last = (key, value if isinstance(value, str) else str(value))
            said.append(f"{key}: {value}")
        self._say("It is done.", "; ".join(said))

    def _say(self, thought: str, content: str, calls: Sequence[Mapping[str, Any]] = ()) -> None:
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if self.thinking:
            message["reasoning_content"] = thought
        self.messages.append({**message, "tool_calls": list(calls)} if calls else message)


def talk_of(seed: int | str, most: int = 8) -> Talk:
    """The conversation of a seed, of words for training, without a vocabulary's pieces."""
    return random_talk(Pool(random.Random(f"functions:{seed}")), most)
