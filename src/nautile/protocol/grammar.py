"""Output that is true to a grammar: which token may come next, so that calls and JSON cannot be wrong.

The grammar is written for llguidance: text between special tokens as terminals, ``｜DSML｜`` by its id. Text terminals never
match a special token, so a value ends where ``</`` is followed by that id and nowhere else. Nothing written in reasoning is
constrained; only the two ways out of it that would go round the grammar, ending the answer and beginning a call there, are
closed until ``</think>``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from nautile.protocol import texts
from nautile.protocol.conversation import choose
from nautile.protocol.errors import ProtocolError
from nautile.protocol.schemas import ANY_TEXT, Halves, check_shape, circular, closed, document, halves, literal, refused_keyword
from nautile.protocol.tokenizer import Tokenizer
from nautile.protocol.values import allowed_types

__all__ = ["GrammarConstraint", "constraint"]

Schema = Mapping[str, Any]
# White space between JSON tokens: a space, or a new line and its indentation. Without an end a weak model writes it for ever.
_SPACE = r"( |\n {0,40}|\n\t{0,10})"
_ANY_JSON: Schema = {"type": ["object", "array", "number", "boolean", "null"]}
_MOST_BITS = 64  # of a parametric rule
_LONGEST_NAME = 256


class GrammarConstraint:
    """Follows one sequence. Made by the function that ``constraint`` returns; the engine's TokenConstraint in structure."""

    def __init__(self, matcher: LLMatcher, tokenizer: Tokenizer, reasoning: Tensor | None, first: Tensor | None) -> None:
        """``reasoning`` is the mask until ``</think>``, None when the answer does not begin in reasoning; ``first`` the one
        at the grammar's beginning, None once the matcher is past it. Neither is ever written to: copies share them."""
        self._matcher, self._tokenizer, self._reasoning, self._first = matcher, tokenizer, reasoning, first
        self._think_close, self._end = tokenizer.special(texts.THINK_CLOSE), tokenizer.special(texts.EOS)

    def mask(self) -> Tensor | None:
        """[V] bool, True where the next token is allowed. Raises ProtocolError when the grammar outgrows its limits."""
        if self._reasoning is not None:
            return self._reasoning
        return _mask(self._matcher, self._tokenizer) if self._first is None else self._first

    def accept(self, token: int) -> None:
        """The sequence goes on with ``token``. Raises ProtocolError for one that the mask does not allow."""
        if self._reasoning is not None:
            if not 0 <= token < len(self._reasoning) or not self._reasoning[token]:
                raise ProtocolError(f"token {token} is not allowed in reasoning; choose among those of mask()")
            if token == self._think_close:
                self._reasoning = None
            return
        if self._matcher.is_stopped() and not self._matcher.is_error() and token == self._end:
            return  # the grammar is complete
        known = 0 <= token < self._tokenizer.vocab_size
        if not known or self._matcher.validate_tokens([token]) != 1 or not self._matcher.consume_token(token):
            raise ProtocolError(f"token {token} is not allowed by the grammar here; choose among those of mask()")
        self._first = None

    def fork(self) -> GrammarConstraint:
        """An independent copy at this point."""
        return GrammarConstraint(self._matcher.deep_copy(), self._tokenizer, self._reasoning, self._first)


def constraint(
    tokenizer: Tokenizer,
    *,
    start: Literal["reasoning", "content", "calls"],
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: Any = None,
    response_format: Mapping[str, Any] | None = None,
    parallel: bool = True,
) -> Callable[[], GrammarConstraint] | None:
    """What makes the constraint of each choice of an answer; None when a request constrains nothing.

    ``start`` is ``Prompt.start``. Tools with ``strict: true`` are followed to the letter of their schema. Others, where there
    is something to enforce (a required choice, or a strict tool beside them), by their names, their required parameters and
    the JSON types of values. ``response_format`` constrains the content; with tools the answer is that content or calls.
    ``parallel=False`` allows one call an answer. Raises ProtocolError that names the keyword when a schema cannot be followed.
    """
    offered, choice = choose(tool_choice, tuple(tools or ()))
    functions = [_function(tool) for tool in offered]
    shape = response_format if response_format and response_format.get("type") != "text" else None
    strict = any(function.get("strict") for function in functions)
    if choice != "required" and start != "calls" and shape is None and not strict:
        return None
    if start == "calls" and not functions:
        raise ProtocolError("an answer that starts inside calls needs tools")
    writer = _Writer(tokenizer.special(texts.DSML))
    try:
        matcher = _compiled(tokenizer, writer.answer(start, functions, choice == "required", shape, parallel), writer)
    except RecursionError:
        raise ProtocolError("a schema nests too deep; write it with fewer levels") from None
    except UnicodeEncodeError as error:
        raise ProtocolError(f"half of a surrogate pair in a schema, {error.object!r}; send valid Unicode") from None
    first = _mask(matcher, tokenizer)  # what compiles may still fail here: better now than in the middle of the answer
    opening = _reasoning_mask(tokenizer) if start == "reasoning" else None
    return lambda: GrammarConstraint(matcher.deep_copy(), tokenizer, opening, first)


def _function(tool: Mapping[str, Any]) -> Schema:
    """The function of a tool, its parameters checked as far as the grammar reads them."""
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ProtocolError(f"a tool is an object with a function that has a name, got {tool!r}")
    name, root = function["name"], function.get("parameters")
    if not isinstance(root, Mapping | None):
        raise ProtocolError(f"tool {name}: parameters must be a JSON schema, an object, got {root!r}")
    if not isinstance((root or {}).get("properties"), Mapping | None):
        raise ProtocolError(f"tool {name}: properties must be an object of schemas")
    required = (root or {}).get("required") or ()
    if not isinstance(required, list | tuple) or not all(isinstance(key, str) for key in required):
        raise ProtocolError(f"tool {name}: required must be a list of names")
    return function


def _reasoning_mask(tokenizer: Tokenizer) -> Tensor:
    """Everything but the end of the answer and the beginning of a call."""
    allowed = torch.ones(tokenizer.vocab_size, dtype=torch.bool)
    allowed[[tokenizer.special(texts.EOS), tokenizer.special(texts.DSML)]] = False
    return allowed


class _Writer:
    """Writes the Lark text; keeps the JSON schemas in it, with a name for each, to say which one does not compile."""

    def __init__(self, mark: int) -> None:
        self.mark = f"<[{mark}]>"
        self.schemas: dict[str, tuple[str, Schema]] = {}  # rule -> (where it comes from, schema)
        self.bodies: dict[str, str] = {}  # Lark text of a schema -> rule
        self.rules: list[str] = ["%llguidance {}"]
        self.terminals: dict[str, str] = {}  # definition -> name

    def answer(
        self, start: str, functions: Sequence[Schema], required: bool, shape: Mapping[str, Any] | None, parallel: bool
    ) -> str:
        """The whole grammar of an answer after its reasoning."""
        if functions:
            self._calls(functions, parallel)
        if start == "calls":
            ways = ["calls"]
        elif required:
            ways = ['"\\n\\n<" block']
        elif shape is not None:
            ways = [self._json("content", "response_format", _content_schema(shape))]
            ways += ['"\\n\\n<" block'] if functions else []
        else:
            ways = [self._terminal(ANY_TEXT), self._terminal(ANY_TEXT + ' "<"') + " block"]
        return "\n".join([self.rules[0], f"start: {' | '.join(ways)}", *self.rules[1:], *self._terminal_lines()]) + "\n"

    def _calls(self, functions: Sequence[Schema], parallel: bool) -> None:
        more = '("\\n<" ' + self.mark + " invoke)*" if parallel else ""
        names = " | ".join(f"invoke_{number}" for number in range(len(functions)))
        self.rules += [
            f'block: {self.mark} "tool_calls>\\n" calls',
            f'calls: "<" {self.mark} invoke {more} "\\n</" {self.mark} "tool_calls>"',
            f"invoke: {names}",
            f'close: "</" {self.mark} "invoke>"',
        ]
        for number, function in enumerate(functions):
            self._invoke(number, function)

    def _invoke(self, number: int, function: Schema) -> None:
        """One tool: its parameters once each, in any order, the required ones all."""
        name, root = function["name"], function.get("parameters") or {}
        try:
            check_shape(root)
        except ProtocolError as error:
            raise ProtocolError(f"tool {name}: {error}") from None
        strict = bool(function.get("strict"))
        properties = root.get("properties") or {}
        if strict:
            _check_root(name, root)
        required = [key for key in root.get("required") or () if key in properties]
        opening = literal('invoke name="' + name + '">\n')
        self.rules.append(f"invoke_{number}: {opening} body_{number}")
        if not properties and not strict:
            free = self._free_parameter(number)
            self.rules.append(f'body_{number}: "\\n" close | {free}+ close')
            return
        order = [*required, *(key for key in properties if key not in required)]
        rules = {key: self._parameter(number, place, name, key, root, strict) for place, key in enumerate(order)}
        missing = [key for key in required if rules[key] is None]
        if missing:
            raise ProtocolError(f"tool {name}: the required parameter {missing[0]} allows no value at all")
        allowed = [rule for rule in rules.values() if rule is not None]
        self._body(number, allowed, len(required))

    def _body(self, number: int, rules: Sequence[str], required: int) -> None:
        """The parameters in any order while they fit the bits of a rule, else in the order of the schema."""
        empty = '"\\n" close'
        if len(rules) > _MOST_BITS:
            optional = " ".join(f"{rule}?" for rule in rules[required:])
            sequence = f"{' '.join(rules[:required])} {optional} close"
            alternatives = [sequence] if required else [empty, *self._nonempty(number, rules)]
            self.rules.append(f"body_{number}: {' | '.join(alternatives)}")
            return
        first = [f"{rule} rest_{number}::{hex(1 << bit)}" for bit, rule in enumerate(rules)]
        self.rules.append(f"body_{number}: {' | '.join([*first, *([] if required else [empty])])}")
        if rules:
            done = f"close %if is_ones([0:{required}])" if required else "close"
            more = [f"{rule} rest_{number}::set_bit({bit}) %if bit_clear({bit})" for bit, rule in enumerate(rules)]
            self.rules.append(f"rest_{number}::_ : {' | '.join([done, *more])}")

    def _nonempty(self, number: int, rules: Sequence[str]) -> list[str]:
        """Optional parameters in order, at least one: one alternative for each that may come first."""
        tails = [f"tail_{number}_{place}" for place in range(len(rules))]
        for place, tail in enumerate(tails):
            following = f"| {tails[place + 1]}" if place + 1 < len(rules) else ""
            self.rules.append(f"{tail}: {rules[place]} ({tails[place + 1] + ' |' if following else ''} close) {following}")
        return tails[:1]

    def _parameter(self, number: int, place: int, tool: str, key: str, root: Schema, strict: bool) -> str | None:
        if '"' in key or len(key) > _LONGEST_NAME or "\n" in key:
            raise ProtocolError(f"tool {tool}: calls cannot carry the parameter name {key!r}; rename it")
        where = f"tool {tool}, parameter {key}"
        schema = root["properties"][key]
        try:
            divided = halves(schema, root) if strict else _types_only(schema, root)
        except ProtocolError as error:
            raise ProtocolError(f"{where}: {error}") from None
        rule = f"parameter_{number}_{place}"
        opening = f'"<" {self.mark} ' + literal('parameter name="' + key + '" string="')
        ways = self._value(rule, where, divided, root)
        if not ways:
            return None
        self.rules.append(f'{rule}: {opening} ({" | ".join(ways)}) {self.mark} "parameter>\\n"')
        return rule

    def _value(self, rule: str, where: str, divided: Halves, root: Schema) -> list[str]:
        """The two ways to write a value, each with the ``</`` that ends it."""
        ways = []
        if divided.text is not None:
            ways.append('"true\\">" ' + self._terminal(f'({divided.text}) "</"'))
        if divided.json is not None:
            ways.append(f'"false\\">" {self._json(f"{rule}_json", where, document(divided.json, root))} "</"')
        return ways

    def _free_parameter(self, number: int) -> str:
        rule = f"parameter_{number}"
        name = self._terminal(rf'/[^"<>\n]{{1,{_LONGEST_NAME}}}/')
        ways = self._value(rule, "any value", Halves(ANY_TEXT, _ANY_JSON), {})
        head = f'"<" {self.mark} "parameter name=\\"" {name} "\\" string=\\""'
        self.rules.append(f'{rule}: {head} ({" | ".join(ways)}) {self.mark} "parameter>\\n"')
        return rule

    def _json(self, rule: str, where: str, schema: Schema) -> str:
        keyword = refused_keyword(schema)
        if keyword:
            raise ProtocolError(
                f"{where}: {keyword}: this keyword cannot be enforced while decoding; take it out of the schema"
            )
        circle = circular(schema)
        if circle:
            raise ProtocolError(f"{where}: $ref: {circle!r} refers to itself without anything between; end the circle")
        body = _json_rule(schema)
        if body not in self.bodies:  # many parameters have one schema, and each costs time to compile
            self.bodies[body] = rule
            self.schemas[rule] = (where, schema)
            self.rules.append(f"{rule}: {body}")
        return self.bodies[body]

    def _terminal(self, definition: str) -> str:
        return self.terminals.setdefault(definition, f"TEXT_{len(self.terminals)}")

    def _terminal_lines(self) -> list[str]:
        return [f"{name}: {definition}" for definition, name in self.terminals.items()]


def _json_rule(schema: Schema) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": _SPACE}})


def _types_only(schema: Any, root: Schema) -> Halves:
    """What a tool without ``strict`` promises of a value: its JSON types."""
    types = allowed_types(schema, root)
    if types is None:
        return Halves(ANY_TEXT, _ANY_JSON)
    others = sorted(types & {"object", "array", "number", "integer", "boolean", "null"})
    return Halves(ANY_TEXT if "string" in types or not others else None, {"type": others} if others else None)


def _check_root(name: str, root: Schema) -> None:
    """The schema of a strict tool is an object with named properties; anything else at its top cannot be written as a call."""
    allowed = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "title", "description"}
    others = sorted(root.keys() - allowed - {"$schema", "$id", "$comment", "default", "examples"})
    if others:
        raise ProtocolError(f"tool {name}: {others[0]}: a strict tool's schema cannot have this at its top")
    if root.get("type", "object") != "object":
        raise ProtocolError(f"tool {name}: type: the parameters must be an object")
    if root and root.get("additionalProperties") is not False:
        raise ProtocolError(f"tool {name}: additionalProperties: a strict tool needs additionalProperties: false")
    unknown = [key for key in root.get("required") or () if key not in (root.get("properties") or {})]
    if unknown:
        raise ProtocolError(f"tool {name}: required: {unknown[0]!r} is not among the properties")


def _content_schema(shape: Mapping[str, Any]) -> Schema:
    if shape.get("type") == "json_object":
        return {"type": "object"}
    wanted = shape.get("json_schema", shape) if shape.get("type") == "json_schema" else None
    schema = wanted.get("schema") if isinstance(wanted, Mapping) else None
    if not isinstance(schema, Mapping):
        raise ProtocolError(f"unknown response_format {shape!r}; its type is text, json_object or json_schema with a schema")
    check_shape(schema)
    made: Schema = closed(schema)
    return made


# llguidance


def _mask(matcher: LLMatcher, tokenizer: Tokenizer) -> Tensor:
    """[V] bool, True where the next token is allowed. Raises ProtocolError when the grammar outgrows its limits."""
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    if matcher.is_error():
        raise ProtocolError(f"the schema is too complex to follow further: {_first_line(matcher.get_error())}")
    allowed = np.unpackbits(bits, bitorder="little", count=tokenizer.vocab_size)
    return torch.from_numpy(allowed.view(np.bool_))


def _compiled(tokenizer: Tokenizer, lark: str, writer: _Writer) -> LLMatcher:
    matcher = LLMatcher(tokenizer.trie, lark, log_level=0)
    if not matcher.is_error():
        return matcher
    for where, schema in writer.schemas.values():
        error = _error_of(schema)
        if error:
            raise ProtocolError(f"{where}: {_culprit(schema)}{error}")
    raise ProtocolError(f"this request's schemas cannot be followed while decoding: {_first_line(matcher.get_error())}")


def _error_of(schema: Schema) -> str:
    failed, messages = LLMatcher.validate_grammar_with_warnings(f"%llguidance {{}}\nstart: {_json_rule(schema)}")
    return _first_line(messages[0]) if failed else ""


def _first_line(message: str) -> str:
    """What llguidance says, without the grammar that it quotes."""
    text = message.partition("failed to compile JSON schema: ")[2] or message
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("^")]
    return next((line for line in lines if line.startswith("error:")), lines[0] if lines else text)


def _culprit(schema: Schema) -> str:
    """The keyword without which the schema compiles, "" when it is not one alone."""
    paths = sorted(_keywords(schema), key=lambda path: (-len(path), path[-1] == "type"))
    for path in paths[:200]:
        without = json.loads(json.dumps(schema))
        place = without
        for step in path[:-1]:
            place = place[step]
        del place[path[-1]]
        if not _error_of(without):
            return f"{path[-1]}: "
    return ""


def _keywords(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a schema."""
    steps = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    found = [inner for step, one in steps for inner in _keywords(one, (*path, step))]
    return [*found, path] if path and isinstance(path[-1], str) else found
