"""Requests to the other dialects with one part replaced: an answer, or an error that says why; never a fault of the server."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nautile.server import ApiError, Service
from nautile.server.chat_request import checked
from nautile.server.messages_request import MessagesRequest
from nautile.server.messages_request import to_wanted as to_message
from nautile.server.responses_request import ResponsesRequest
from nautile.server.responses_request import to_wanted as to_response
from nautile.server.turn import prepare
from server.scripted import ScriptedEngine

SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
RESPONSES = {
    "model": "m",
    "instructions": "Be brief.",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}, {"type": "input_image", "image_url": "x"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "1", "name": "read", "arguments": '{"path": "a"}', "namespace": None},
        {"type": "custom_tool_call", "call_id": "2", "name": "patch", "input": "x"},
        {"type": "function_call_output", "call_id": "1", "output": "seven"},
        {"type": "custom_tool_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "done"}]},
    ],
    "tools": [
        {"type": "function", "name": "read", "description": "", "parameters": SCHEMA, "strict": False},
        {"type": "custom", "name": "patch", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
        {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "close", "parameters": SCHEMA}]},
    ],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "read"}]},
    "reasoning": {"effort": "high"},
    "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
    "temperature": 0.5,
    "metadata": {},
    "include": ["message.output_text.logprobs"],
}
MESSAGES = {
    "model": "m",
    "max_tokens": 100,
    "system": [{"type": "text", "text": "Be brief."}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image", "source": {"type": "url"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "tool_use", "id": "1", "name": "read", "input": {"path": "a"}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "x", "is_error": True}]},
    ],
    "tools": [{"name": "read", "description": "", "input_schema": SCHEMA}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": False},
    "thinking": {"type": "enabled", "budget_tokens": 5},
    "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": SCHEMA}},
    "stop_sequences": ["END"],
    "temperature": 0.5,
    "top_k": 3,
}
CASES = {"responses": (RESPONSES, ResponsesRequest, to_response), "messages": (MESSAGES, MessagesRequest, to_message)}


def paths(value, at=()):
    """The places of everything in a request."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*at, key))


def damaged(body, path, value):
    """The request with one place replaced; None takes the place out where that can be."""
    body = copy.deepcopy(body)
    holder = body
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return body


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.sampled_from(
        ["user", "system", "function", "custom", "text", "read", "none", [], {}, [{}], [[]], [None], ["x"], {"type": "x"}]
    ),
)


@pytest.fixture(scope="module")
def service():
    return Service(ScriptedEngine(), "m")


@pytest.mark.parametrize("name", CASES)
def test_whole_requests_are_taken(service, name):
    body, kind, to_wanted = CASES[name]
    assert prepare(to_wanted(checked(kind, body), service, "", "id").turn, service).request.prompt_ids


@pytest.mark.parametrize("change", [{"required": True}, {"type": 5}, {"properties": [1]}, {"required": [None]}])
def test_a_schema_that_is_none_is_refused_where_it_must_be_followed(service, change):
    schema = {**SCHEMA, **change}
    bodies = {
        "responses": {**RESPONSES, "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}},
        "messages": {**MESSAGES, "tools": [{"name": "read", "input_schema": schema}], "tool_choice": {"type": "any"}},
    }
    for name, body in bodies.items():
        _, kind, to_wanted = CASES[name]
        with pytest.raises(ApiError, match=next(iter(change))) as raised:
            prepare(to_wanted(checked(kind, body), service, "", "id").turn, service)
        assert raised.value.status == 400


@pytest.mark.parametrize("name", CASES)
def test_damage_gives_an_error_that_says_why(service, name):
    body, kind, to_wanted = CASES[name]
    places = [path for path in paths(body) if path]
    outcomes: set[int] = set()

    @settings(max_examples=150)
    @given(st.sampled_from(places), anything)
    def check(path, value):
        try:
            turn = to_wanted(checked(kind, damaged(body, path, value)), service, "", "id").turn
            prepare(turn, service)
            outcomes.add(200)
        except ApiError as error:
            outcomes.add(error.status)
            assert 400 <= error.status < 500 and len(error.message) > 10
            error.message.encode()

    check()
    assert outcomes == {200, 400, 422}
