"""The value of one parameter of a call -> JSON text, typed by the tag's ``string`` attribute and repaired by the schema.

``string="true"`` means the text itself, ``string="false"`` means JSON. Models confuse the two, write Python literals, or
forget the attribute. The order of attempts is fixed and the first whose type the schema allows is taken; whatever happens,
the result is valid JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NoReturn

__all__ = ["Fault", "allowed_types", "typed_value"]

Fault = Literal["repaired", "mismatch"]
Types = frozenset[str] | None  # JSON types a schema allows; None: any

_SPACE = " \t\r\n"
_MAX_DEPTH = 200  # deeper JSON is kept as text: readers with a recursion limit must be able to take it
_MAX_REFERENCES = 8  # steps of a schema that are followed to find its types
_LITERALS = {"true": "true", "false": "false", "none": "null", "null": "null"}
_QUOTED_OR_LITERAL = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\Z)|\b(?:True|False|None)\b', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89abABcdefCDEF]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def typed_value(raw: str, marked: str | None, allowed: Types) -> tuple[str, Fault | None]:
    """JSON text of ``raw``, and what was wrong with it.

    ``marked`` is the ``string`` attribute as written, None when absent; ``allowed`` comes from ``allowed_types``.
    """
    as_text, strict = (_text(raw), "string"), _strict(raw)
    as_json = [strict] if strict else []
    if marked == "true":
        attempts, right = [as_text, *as_json, *_loose(raw)], 1
    else:
        attempts, right = [*as_json, *_loose(raw), as_text], len(as_json) if marked == "false" else 0
    for number, (text, kind) in enumerate(attempts):
        if _fits(kind, allowed):
            return text, None if number < right else "repaired"
    return attempts[0][0], "mismatch"


def allowed_types(schema: Any, root: Any = None) -> Types:
    """JSON types that a parameter's schema allows, None for any. ``root`` resolves local references."""
    return _allowed(schema, root, 0, {})


def _allowed(schema: Any, root: Any, depth: int, known: dict[tuple[int, int], Types]) -> Types:
    """``known`` has what was found before, by the schema's identity and depth: references may lead to one place many times."""
    if not isinstance(schema, Mapping) or depth > _MAX_REFERENCES:
        return None
    place = (id(schema), depth)
    if place not in known:
        found = [types for types in _constraints(schema, root, depth + 1, known) if types is not None]
        types = frozenset.intersection(*found) if found else None
        known[place] = types | {"null"} if types is not None and schema.get("nullable") is True else types
    return known[place]


def _constraints(schema: Mapping[str, Any], root: Any, depth: int, known: dict[tuple[int, int], Types]) -> Iterator[Types]:
    kind = schema.get("type")
    if isinstance(kind, str):
        yield frozenset([kind])
    elif isinstance(kind, list):
        yield frozenset(name for name in kind if isinstance(name, str))
    if isinstance(schema.get("enum"), list):
        yield frozenset(_type_of(value) for value in schema["enum"])
    if "const" in schema:
        yield frozenset([_type_of(schema["const"])])
    if isinstance(schema.get("$ref"), str):
        yield _allowed(_resolved(schema["$ref"], root), root, depth, known)
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            members = [_allowed(member, root, depth, known) for member in schema[key]]
            yield None if any(member is None for member in members) else frozenset[str]().union(*(m for m in members if m))
    for member in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
        yield _allowed(member, root, depth, known)


def _resolved(reference: str, root: Any) -> Any:
    place = root
    for step in reference.removeprefix("#").strip("/").split("/"):
        if not isinstance(place, Mapping):
            return None
        place = place.get(step.replace("~1", "/").replace("~0", "~")) if step else place
    return place


def _type_of(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null", list: "array"}
    return names.get(type(value), "object")


def _fits(kind: str, allowed: Types) -> bool:
    return allowed is None or kind in allowed or (kind == "integer" and "number" in allowed)


def _text(raw: str) -> str:
    return json.dumps(raw, ensure_ascii=False)


def _strict(raw: str) -> tuple[str, str] | None:
    """The text and its type if it is JSON as it stands, apart from white space around it; digits are kept as written."""
    text = raw.strip(_SPACE)
    if not text or _depth(text) > _MAX_DEPTH or (_SURROGATE_ESCAPE.search(text) and _surrogates_in(text)):
        return None
    try:
        json.loads(text, parse_int=str, parse_float=str, parse_constant=_refused)
    except (ValueError, RecursionError):
        return None
    return text, _type_of_text(text)


def _loose(raw: str) -> list[tuple[str, str]]:
    """What the text may have been meant as: Python's literals, JSON inside a JSON string, a whole number written 5.0."""
    text = raw.strip(_SPACE)
    candidates = []
    if text.lower() in _LITERALS:
        candidates.append(_LITERALS[text.lower()])
    candidates.append(_QUOTED_OR_LITERAL.sub(lambda match: _LITERALS.get(match[0].lower(), match[0]), text))
    if re.fullmatch(r"-?\d+\.0+", text):
        candidates.append(text.partition(".")[0])
    try:
        value = json.loads(text, strict=False, parse_constant=_refused) if _depth(text) <= _MAX_DEPTH else None
        candidates.append(_SURROGATE.sub("\ufffd", json.dumps(value, ensure_ascii=False)) if value is not None else "")
        if isinstance(value, str):
            candidates.append(value)
    except (ValueError, RecursionError):
        pass
    return [found for candidate in candidates if (found := _strict(candidate)) is not None]


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _surrogates_in(text: str) -> bool:
    """True when a JSON text holds half of a surrogate pair, which no UTF-8 text can carry."""
    try:
        return _SURROGATE.search(json.dumps(json.loads(text, parse_int=str), ensure_ascii=False)) is not None
    except (ValueError, RecursionError):
        return False


def _type_of_text(text: str) -> str:
    names = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}
    return names.get(text[0]) or ("integer" if re.fullmatch(r"-?[0-9]+", text) else "number")


def _depth(text: str) -> int:
    """How deep brackets nest, not looking at quotes; exact is not needed."""
    if text.count("[") + text.count("{") <= _MAX_DEPTH:
        return 0
    depth = deepest = 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        deepest = max(deepest, depth)
    return deepest
