"""Required calls and formats: the engine is given a grammar, or the request is refused; never neither."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.local import TOOLS, Local, tool, user
from server.scripted import calls

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}},
    "required": ["answer"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
CALL = calls(("read", {"path": "a.py"}))


def status(local: Local, **body: Any) -> int:
    """200 when the scripted output is one that the grammar allows, 500 when it is not."""
    code: int = local.http.post("/v1/chat/completions", json={"messages": user(), **body}).status_code
    return code


@pytest.mark.parametrize(
    ("fields", "right", "wrong"),
    [
        ({"tools": TOOLS, "tool_choice": "required"}, "why" + "</think>" + CALL, "why</think>No call."),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "read"}}},
            "</think>" + CALL,
            "</think>" + calls(("list", {"path": "."})),
        ),
        ({"response_format": FORMAT}, 'free {"reasoning"</think>{"answer": 5}', 'why</think>{"answer": "5"}'),
        ({"response_format": FORMAT, "thinking": False}, '{"answer": 5}', "The answer is 5."),
        (
            {"response_format": {"type": "json_object"}, "messages": user("Say it in JSON.")},
            'why</think>{"a": [1, {"b": null}]}',
            "why</think>[1]",
        ),
        (
            {"tools": [tool("read", strict=True, path="string")]},
            "why</think>I look." + CALL,
            "why</think>" + calls(("read", {"file": "a.py"})),
        ),
    ],
    ids=["required", "named", "schema", "schema without thinking", "object", "strict"],
)
def test_output_that_breaks_the_request_cannot_be_sampled(fields: dict[str, Any], right: str, wrong: str) -> None:
    local = Local()
    local.engine.say(right, wrong)
    assert status(local, **fields) == 200
    assert local.engine.requests[0].constraint is not None
    assert status(local, **fields) == 500  # the scripted engine says so when a mask forbids its next token


def test_a_required_call_is_begun_in_the_prompt_where_nothing_is_to_be_thought() -> None:
    local = Local()
    local.engine.say(CALL.split("tool_calls>\n", 1)[1], "no call at all")
    assert status(local, tools=TOOLS, tool_choice="required", thinking=False) == 200
    assert local.engine.prompt().endswith("tool_calls>\n")
    assert status(local, tools=TOOLS, tool_choice="required", thinking=False) == 500


def test_json_comes_out_as_content() -> None:
    local = Local()
    local.engine.say('why</think>{"answer": 5}')
    message = local.chat(response_format=FORMAT)["choices"][0]["message"]
    assert json.loads(message["content"]) == {"answer": 5} and message["reasoning_content"] == "why"
    assert json.dumps(SCHEMA) in local.engine.prompt()


def test_nothing_asked_nothing_constrained() -> None:
    local = Local()
    local.chat(tools=TOOLS)
    local.chat(tools=TOOLS, tool_choice="none")
    assert [request.constraint for request in local.engine.requests] == [None, None]


def test_a_schema_that_cannot_be_followed_is_refused() -> None:
    local = Local()
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)y"}}}
    code, error = local.refused(
        messages=user(), response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    )
    assert code == 400 and "pattern" in error["message"] and local.engine.requests == []


def test_a_format_and_an_open_answer_exclude_each_other() -> None:
    local = Local()
    last = {"role": "assistant", "content": "{", "prefix": True}
    code, error = local.refused(messages=[*user(), last], response_format=FORMAT)
    assert code == 400 and "prefix" in error["message"] and local.engine.requests == []


CLOSED = {"type": "object", "required": ["a"], "additionalProperties": False}
CIRCLES: dict[str, dict[str, Any]] = {
    "itself": {"$ref": "#"},
    "a definition": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "two definitions": {
        **CLOSED,
        "properties": {"a": {"$ref": "#/$defs/a"}},
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    },
    "in a choice": {
        **CLOSED,
        "properties": {"a": {"$ref": "#/$defs/a"}},
        "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"allOf": [{"$ref": "#/$defs/a"}]}]}},
    },
    "in a list": {**CLOSED, "properties": {"a": {"type": "array", "items": {"$ref": "#/properties/a/items"}}}},
}


@pytest.mark.parametrize("schema", CIRCLES.values(), ids=CIRCLES.keys())
def test_a_schema_that_only_refers_to_itself_is_refused_before_anything_is_generated(schema: dict[str, Any]) -> None:
    local = Local()
    code, error = local.refused(
        messages=user(), response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    )
    assert code == 400 and "$ref" in error["message"] and "circle" in error["message"]
    parameters = {"type": "object", "properties": {"value": schema}, "required": ["value"], "additionalProperties": False}
    strict = {"type": "function", "function": {"name": "f", "strict": True, "parameters": _moved(parameters)}}
    code, error = local.refused(messages=user(), tools=[strict])
    assert code == 400 and "$ref" in error["message"] and local.engine.requests == []


def _moved(parameters: dict[str, Any]) -> dict[str, Any]:
    """References of the one parameter's schema, from its new place."""
    moved: dict[str, Any] = json.loads(json.dumps(parameters).replace('"#', '"#/properties/value'))
    return moved


def test_a_schema_that_refers_to_itself_with_something_between_is_served() -> None:
    local = Local()
    tree = {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    local.engine.say('</think>{"value": 1, "next": {"value": 2, "next": null}}')
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": tree}}
    content = local.chat(response_format=shape)["choices"][0]["message"]["content"]
    assert json.loads(content)["next"] == {"value": 2, "next": None}
