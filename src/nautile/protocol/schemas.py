"""A JSON schema of one parameter -> what its text may be (``string="true"``) and what its JSON may be (``string="false"``).

A call writes text as it stands and everything else as JSON, so a schema falls into two halves: a terminal for the grammar
and a schema without strings, which llguidance compiles. A keyword that neither half can hold is an error, never ignored.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import llguidance

from nautile.protocol.errors import ProtocolError

__all__ = ["ANY_TEXT", "Halves", "check_shape", "circular", "closed", "document", "halves", "literal", "refused_keyword"]

Schema = Mapping[str, Any]

ANY_TEXT = "/(?s:.*)/"
_NOT_STRINGS = ("object", "array", "number", "boolean", "null")
_TYPES = ("string", "integer", *_NOT_STRINGS)
_LONGEST_TEXT = 2**18  # characters of an expression; references may unfold to any size
_LONGEST = 10**6  # characters that a length can be counted to
_STRING_KEYWORDS = ("minLength", "maxLength", "pattern", "format")
_APPLICATORS = ("anyOf", "oneOf", "allOf", "$ref")
# Keywords that say nothing about which values are valid.
_NOTES = frozenset(
    [
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "nullable",
        "contentEncoding",
        "contentMediaType",
        "contentSchema",
        "$comment",
        "$schema",
        "$id",
        "$anchor",
        "$defs",
        "definitions",
        "discriminator",
        "xml",
        "externalDocs",
        "example",
    ]
)
# Keywords that do, and that cannot be made true token by token.
_REFUSED = frozenset(
    [
        "not",
        "if",
        "then",
        "else",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "unevaluatedProperties",
        "unevaluatedItems",
        "propertyNames",
        "contains",
        "minContains",
        "maxContains",
        "uniqueItems",
        "additionalItems",
        "$dynamicRef",
        "$recursiveRef",
    ]
)
_DATE = r"[0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL}){{0,7}}"
# Each describes a part of the format's values, wide enough for what people write.
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"({_DATE})T{_TIME}",
    "duration": r"P([0-9]{1,9}W|[0-9]{1,9}D(T[0-9]{1,9}H([0-9]{1,9}M([0-9]{1,9}S)?)?)?|T[0-9]{1,9}[HMS]|[0-9]{1,9}[YM])",
    "email": rf"[a-zA-Z0-9_+-]+(\.[a-zA-Z0-9_+-]+)*@{_HOST}",
    "hostname": _HOST,
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "ipv6": r"[0-9a-fA-F]{1,4}(:[0-9a-fA-F]{1,4}){7}",
    "uuid": r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}",
    "uri": rf"[a-z][a-z0-9+-]*://{_HOST}(:[0-9]{{1,5}})?(/[a-zA-Z0-9._~-]*)*(\?[a-zA-Z0-9._~=&-]*)?(#[a-zA-Z0-9._~-]*)?",
}


@dataclass(frozen=True)
class Halves:
    """``text`` is a Lark expression of terminals for values that are strings, ``json`` a schema for those that are not.
    None where there are no such values."""

    text: str | None
    json: Schema | None


def halves(schema: Any, root: Schema) -> Halves:
    """Divide a parameter's schema; ``root`` resolves references. Raises ProtocolError that names the keyword in the way."""
    return _halves(schema, root, 0, {})


def _halves(schema: Any, root: Schema, depth: int, known: dict[tuple[int, int], Halves]) -> Halves:
    """``known`` has what was found before, by the schema's identity and depth: references may lead to one place many times."""
    place = (id(schema), depth)
    if place not in known:
        known[place] = _divided(schema, root, depth, known)
    return known[place]


def _divided(schema: Any, root: Schema, depth: int, known: dict[tuple[int, int], Halves]) -> Halves:
    if schema is True:
        schema = {}
    if schema is False:
        return Halves(None, None)
    if not isinstance(schema, Mapping):
        raise ProtocolError(f"a schema must be an object, got {schema!r}")
    if depth > 32:
        raise ProtocolError("$ref: the schema refers to itself without anything between; end the circle")
    applied = [key for key in _APPLICATORS if key in schema]
    rest = {key: value for key, value in schema.items() if key not in _APPLICATORS}
    if not applied:
        return _plain(rest)
    parts = [_applied(key, schema[key], root, depth, known) for key in applied]
    if rest.keys() - _NOTES:
        parts.append(_plain(rest))
    return parts[0] if len(parts) == 1 else _both(parts)


def _applied(key: str, value: Any, root: Schema, depth: int, known: dict[tuple[int, int], Halves]) -> Halves:
    if key == "$ref":
        found = _halves(_resolved(value, root), root, depth + 1, known)
        return found if found.text is not None else Halves(None, {"$ref": value})
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ProtocolError(f"{key} needs a list of schemas")
    members = [_halves(member, root, depth + 1, known) for member in value]
    if sum(len(member.text or "") for member in members) > _LONGEST_TEXT:
        raise ProtocolError(f"{key}: what its members allow unfolds to too much to follow; repeat references less often")
    if key == "allOf":
        return _both(members)
    texts = [member.text for member in members if member.text is not None]
    others = [member.json for member in members if member.json is not None]
    if key == "oneOf" and len(texts) > 1 and not _disjoint(value):
        raise ProtocolError("oneOf: more than one of its members allows strings; say anyOf instead")
    text = " | ".join(f"({text})" for text in texts) if texts else None
    return Halves(text, others[0] if len(others) == 1 else {key: others} if others else None)


def _disjoint(members: Sequence[Any]) -> bool:
    """True for members that list their values, none of which is in two of them."""
    if not all(isinstance(member, Mapping) for member in members):
        return False
    values = [member.get("enum", [member["const"]] if "const" in member else None) for member in members]
    if not all(isinstance(value, list) for value in values):
        return False
    written = [json.dumps(one, sort_keys=True) for value in values for one in value]
    return len(set(written)) == len(written)


def _both(parts: Sequence[Halves]) -> Halves:
    texts = [part.text for part in parts]
    others = [part.json for part in parts]
    text = None if None in texts else " & ".join(f"({text})" for text in texts)
    return Halves(text, None if None in others else {"allOf": others})


def _plain(schema: Schema) -> Halves:
    """A schema without applicators."""
    _check(schema)
    kinds = schema.get("type")
    if not isinstance(kinds, str | list | None):
        raise ProtocolError(f"type: needs the name of a JSON type or a list of them, got {kinds!r}")
    types = [kinds] if isinstance(kinds, str) else list(_TYPES) if kinds is None else kinds
    for kind in types:
        if kind not in _TYPES:
            raise ProtocolError(f"type: {kind!r} is not a JSON type; use {', '.join(_TYPES)}")
    listed = schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else None
    text = _text_of(schema, listed) if "string" in types else None
    others = [kind for kind in types if kind != "string"]
    rest: dict[str, Any] = {key: value for key, value in schema.items() if key not in (*_STRING_KEYWORDS, "const")}
    if listed is not None:
        rest["enum"] = [value for value in listed if not isinstance(value, str)]
    if not others or rest.get("enum") == []:
        return Halves(text, None)
    rest["type"] = [kind for kind in others if kind != "integer" or "number" not in others]
    return Halves(text, rest)


def _check(schema: Schema) -> None:
    refused = sorted(_REFUSED & schema.keys())
    if refused:
        raise ProtocolError(f"{refused[0]}: this keyword cannot be enforced while decoding; take it out of the schema")
    if "enum" in schema and (not isinstance(schema["enum"], list | tuple) or not schema["enum"]):
        raise ProtocolError("enum: needs a list of at least one value")
    if "enum" in schema and "const" in schema:
        raise ProtocolError("const: a schema has enum or const, not both")


def _text_of(schema: Schema, listed: Sequence[Any] | None) -> str | None:
    """Terminal of the strings that a schema allows."""
    parts: list[str] = []
    if listed is not None:
        words = [value for value in listed if isinstance(value, str)]
        if not words:
            return None
        parts.append(" | ".join(literal(word) for word in words))
    low, high = schema.get("minLength", 0), schema.get("maxLength", "")
    for key in ("minLength", "maxLength"):
        if key in schema and (type(schema[key]) is not int or not 0 <= schema[key] <= _LONGEST):
            raise ProtocolError(f"{key}: needs a whole number up to {_LONGEST}, got {schema[key]!r}")
    if low or high != "":
        if high != "" and low > high:
            raise ProtocolError(f"maxLength: {high} is less than minLength, {low}")
        parts.append(f"/(?s:.{{{low},{high}}})/")
    if "pattern" in schema:
        parts.append(_pattern(schema["pattern"]))
    if "format" in schema:
        if not isinstance(schema["format"], str) or schema["format"] not in _FORMATS:
            raise ProtocolError(f"format: {schema['format']!r} cannot be enforced; known are {', '.join(_FORMATS)}")
        parts.append(_regex(_FORMATS[schema["format"]]))
    return " & ".join(f"({part})" for part in parts) if parts else ANY_TEXT


def _pattern(pattern: Any) -> str:
    """A pattern as a terminal: it may match anywhere in the text unless anchors say where."""
    if not isinstance(pattern, str):
        raise ProtocolError(f"pattern: needs a regular expression, got {pattern!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ProtocolError(f"pattern: {pattern!r} is not a regular expression: {error}") from None
    start = pattern.startswith("^")
    end = pattern.endswith("$") and (len(pattern) - len(pattern[:-1].rstrip("\\")) - 1) % 2 == 0
    body = pattern[start : len(pattern) - end]
    if (start or end) and _alternates(body):
        raise ProtocolError(f"pattern: {pattern!r} has ^ or $ beside |; put the alternatives in parentheses")
    bare = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "", body, flags=re.DOTALL)
    if "^" in bare or "$" in bare or re.search(r"\(\?(?![:P])", bare) or "(?P=" in bare or re.search(r"\\[1-9bBAZ]", body):
        raise ProtocolError(
            f"pattern: {pattern!r} uses anchors inside, look-around, flags or references; write it without them"
        )
    return " ".join(["" if start else ANY_TEXT, _regex(f"({body})"), "" if end else ANY_TEXT]).strip()


def _alternates(body: str) -> bool:
    """True when the pattern has a | outside parentheses."""
    depth = 0
    for character in re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "", body, flags=re.DOTALL):
        depth += (character == "(") - (character == ")")
        if character == "|" and not depth:
            return True
    return False


def _regex(pattern: str) -> str:
    return f"/{llguidance.regex_to_lark(pattern, use_ascii='dw')}/"


def literal(text: str) -> str:
    """A Lark string."""
    if not text:
        return '""'
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ProtocolError(f"half of a surrogate pair in {text!r}; send text that is valid Unicode") from None
    return json.dumps(text, ensure_ascii=False)


# References


def _resolved(reference: Any, root: Schema) -> Any:
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise ProtocolError(f"$ref: {reference!r} is not in this schema; only references that begin with # are followed")
    place: Any = root
    for step in reference[1:].strip("/").split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        if not name:
            continue
        if isinstance(place, list) and name.isdigit() and int(name) < len(place):
            place = place[int(name)]
        elif isinstance(place, Mapping) and name in place:
            place = place[name]
        else:
            raise ProtocolError(f"$ref: {reference!r} leads nowhere in this schema")
    return place


def document(schema: Schema, root: Schema) -> dict[str, Any]:
    """A schema of its own for a part of ``root``: what it refers to comes with it."""
    moved = _moved(schema)
    if moved == schema:
        return dict(schema)
    whole = {key: value for key, value in root.items() if key not in ("$id", "$schema")}
    return {**{key: value for key, value in moved.items() if key != "$defs"}, "$defs": {"root": _moved(whole)}}


def _moved(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _target(one) if key == "$ref" else _moved(one) for key, one in value.items()}
    return [_moved(one) for one in value] if isinstance(value, list | tuple) else value


def _target(reference: Any) -> Any:
    if not isinstance(reference, str) or not reference.startswith("#"):
        return _moved(reference)  # a property of that name
    return "#/$defs/root" + reference[1:].rstrip("/")


# Whole schemas


def check_shape(schema: Any) -> None:
    """Raises ProtocolError where a keyword that everything here reads has a value of the wrong kind."""
    for part in _parts(schema):
        required, types = part.get("required"), part.get("type")
        if required is not None and not _all_text(required):
            raise ProtocolError(f"required: needs a list of names, got {required!r}")
        if types is not None and not isinstance(types, str) and not (types and _all_text(types)):
            raise ProtocolError(f"type: needs the name of a type or a list of them, got {types!r}")
        for key in ("properties", "patternProperties", "$defs", "definitions"):
            if part.get(key) is not None and not isinstance(part[key], Mapping):
                raise ProtocolError(f"{key}: needs an object of schemas, got {part[key]!r}")


def _all_text(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)


def refused_keyword(schema: Any) -> str | None:
    """The first keyword anywhere in a schema that cannot be enforced, None when all can."""
    for part in _parts(schema):
        refused = sorted(_REFUSED & part.keys())
        if refused:
            return refused[0]
        low = part.get("minProperties", 0)
        if isinstance(low, int) and low > 1 and part.get("additionalProperties") is not False:
            return "minProperties"  # a name written twice would count twice
    return None


def circular(schema: Schema) -> str | None:
    """A reference that leads back to itself with nothing between, so that no value can ever be written for it; None without.

    A part of the schema is settled when each of its needs has a member that is: the target of its ``$ref``, one member of its
    ``anyOf`` or ``oneOf``, every member of its ``allOf``. Parts that never are stand in a circle, or wait for one. The time is
    linear in the schema.
    """
    waiting: dict[int, int] = {}
    users: dict[int, list[tuple[int, int]]] = {}
    stack = list(_parts(schema))
    while stack:
        part = stack.pop()
        if id(part) not in waiting:
            needs = _needs(part, schema)
            waiting[id(part)] = len(needs)
            for number, members in enumerate(needs):
                for member in members:
                    users.setdefault(id(member), []).append((id(part), number))
                    stack.append(member)
    settled = [place for place, count in waiting.items() if not count]
    met = set[tuple[int, int]]()
    while settled:
        for use in users.get(settled.pop(), ()):
            if use not in met:
                met.add(use)
                waiting[use[0]] -= 1
                if not waiting[use[0]]:
                    settled.append(use[0])
    return next((str(part["$ref"]) for part in _parts(schema) if waiting[id(part)] and "$ref" in part), None)


def _needs(part: Schema, root: Schema) -> list[list[Schema]]:
    """For each need of a part the schemas of which one will do. What is no schema, or not here, is somebody else's error."""
    needs = [part[key] for key in ("anyOf", "oneOf") if isinstance(part.get(key), list)]
    needs += [[member] for member in part["allOf"]] if isinstance(part.get("allOf"), list) else []
    with contextlib.suppress(ProtocolError):
        needs += [[_resolved(part["$ref"], root)]] if "$ref" in part else []
    return [members for members in needs if members and all(isinstance(member, Mapping) for member in members)]


def _parts(schema: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """All schemas in a schema; values that only look like schemas (enum, default, names of properties) are passed by."""
    if not isinstance(schema, Mapping) or depth > 64:
        return
    yield schema
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, Mapping):
            for one in value.values():
                yield from _parts(one, depth + 1)
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list | tuple):
            for one in value:
                yield from _parts(one, depth + 1)
        elif key in ("items", "additionalProperties"):
            yield from _parts(value, depth + 1)


def closed(schema: Any, root: Any = None, within: tuple[str, ...] = ()) -> Any:
    """A schema whose objects have all their properties and no others, as the hosted API makes it of a response format.

    Objects that are combined with other schemas stay as they are, and so do the ``required`` of a schema with references,
    where a property may lead back to its own object for ever.
    """
    root = schema if root is None else root
    if isinstance(schema, list | tuple):
        return [closed(member, root, within) for member in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = dict(schema)
    for key in ("properties", "$defs", "definitions"):
        if isinstance(made.get(key), Mapping):
            made[key] = {name: closed(member, root) for name, member in made[key].items()}
    for key in ("items", "anyOf", "oneOf", "prefixItems"):
        if key in made:
            made[key] = closed(made[key], root)
    combined = any(key in made for key in (*_APPLICATORS, "patternProperties", "minProperties", "maxProperties"))
    if isinstance(made.get("properties"), Mapping) and not combined:
        made.setdefault("additionalProperties", False)
        if not any("$ref" in part for part in _parts(root)):
            made["required"] = list(made["properties"])
    return made
