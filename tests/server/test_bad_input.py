"""Bad input: a 4xx with a sentence that says what to change, and an engine that has seen nothing of it."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.requests import Request

from nautile.server.errors import ApiError
from nautile.server.intake import parse_json, read_json
from server.local import TOOLS, Local, user

CHAT = "/v1/chat/completions"
CALL = {"id": "call_1", "type": "function", "function": {"name": "read", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "x"}
ASKED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def strict(**fields: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False, **fields}
    function = {"name": "f", "strict": True, "parameters": parameters}
    return {"messages": user(), "tools": [{"type": "function", "function": function}]}


RAW: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no body"),
    "malformed JSON": (b'{"messages": [', "not JSON"),
    "two documents": (b"{} {}", "not JSON"),
    "a list": (b"[]", "must be a JSON object"),
    "a word": (b'"hello"', "must be a JSON object"),
    "invalid UTF-8": (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', "not UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "surrogate half": (b'{"messages": [{"role": "user", "content": "a\\ud800"}]}', "surrogate"),
    "surrogate half in a key": (b'{"messages": [{"role": "user", "content": "a"}], "\\uDC00": 1}', "surrogate"),
    "NaN": (b'{"temperature": NaN, "messages": [{"role": "user", "content": "a"}]}', "finite"),
    "infinity": (b'{"temperature": -Infinity, "messages": []}', "finite"),
    "too deep for Python": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "too deep": (b'{"a":' + b"[" * 500 + b"]" * 500 + b"}", "nested too deeply"),
    "a very long number": (b'{"seed": ' + b"9" * 5000 + b"}", "cannot be read"),
    "an infinite float in what is given back": (b'{"input": "a", "metadata": {"a": 1e999}, "messages": []}', "finite"),
    "a negative one in a schema": (b'{"messages": [], "tools": [{"parameters": {"default": -1e999}}]}', "finite"),
    "an infinite float": (b'{"temperature": 1e999, "messages": [{"role": "user", "content": "a"}]}', "finite"),
}

BODIES: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({}, "messages"),
    "messages that are no list": ({"messages": "hello"}, "list"),
    "a message that is no object": ({"messages": ["hello"]}, "dictionary"),
    "no message": ({"messages": []}, "Empty input messages"),
    "unknown role": ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role"),
    "no role": ({"messages": [{"content": "x"}]}, "role"),
    "no content": ({"messages": [{"role": "user"}]}, "content"),
    "content of a wrong kind": ({"messages": [{"role": "user", "content": 5}]}, "content"),
    "a part of a wrong kind": ({"messages": [{"role": "user", "content": [5]}]}, "part"),
    "a result without a call": ({"messages": [*user(), RESULT]}, "must be a response to a preceding message"),
    "a result of another call": (
        {"messages": [*user(), ASKED, {**RESULT, "tool_call_id": "call_2"}]},
        "unknown tool_call_id",
    ),
    "two results of one call": ({"messages": [*user(), ASKED, RESULT, RESULT]}, "answered before"),
    "a call without a result": ({"messages": [*user(), ASKED, *user()]}, "insufficient tool messages"),
    "two calls of one id": (
        {"messages": [*user(), {**ASKED, "tool_calls": [CALL, CALL]}, RESULT]},
        "one id",
    ),
    "a call without a function": ({"messages": [*user(), {**ASKED, "tool_calls": [{"id": "x"}]}]}, "function"),
    "two tools of one name": ({"messages": user(), "tools": [*TOOLS, TOOLS[0]]}, "Tool names must be unique."),
    "a tool without a name": ({"messages": user(), "tools": [{"type": "function", "function": {}}]}, "name"),
    "a tool with a strange name": (
        {"messages": user(), "tools": [{"type": "function", "function": {"name": "a b"}}]},
        "^[a-zA-Z0-9_-]+$",
    ),
    "a tool that is none": ({"messages": user(), "tools": [{"type": "retrieval"}]}, "function"),
    "tools that are no list": ({"messages": user(), "tools": {}}, "list"),
    "parameters that are no schema": (
        {"messages": user(), "tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]},
        "schema",
    ),
    "a strict tool with an optional property": (
        {
            "messages": user(),
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "f",
                        "strict": True,
                        "parameters": {
                            "type": "object",
                            "properties": {"a": {"type": "string"}},
                            "additionalProperties": False,
                        },
                    },
                }
            ],
        },
        "Required properties must match all properties in the object",
    ),
    "a strict tool that requires no names": (strict(required=5), "required must be a list of names"),
    "a strict tool that requires a list": (strict(required=[["a"]]), "required must be a list of names"),
    "a strict tool that requires an object": (strict(required=[{}]), "required must be a list of names"),
    "a choice without tools": ({"messages": user(), "tool_choice": "required"}, "tools"),
    "a choice of no tool": (
        {"messages": user(), "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "name one of the tools",
    ),
    "an unknown choice": ({"messages": user(), "tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
    "a prefix that is not last": (
        {"messages": [{"role": "assistant", "content": "x", "prefix": True}, *user()]},
        "last message",
    ),
    "temperature too high": ({"messages": user(), "temperature": 2.1}, "less than or equal to 2"),
    "temperature below zero": ({"messages": user(), "temperature": -0.1}, "greater than or equal to 0"),
    "temperature of a wrong kind": ({"messages": user(), "temperature": "warm"}, "number"),
    "top_p of nothing": ({"messages": user(), "top_p": 0}, "greater than 0"),
    "max_tokens of nothing": ({"messages": user(), "max_tokens": 0}, "greater than or equal to 1"),
    "too many tokens": ({"messages": user(), "max_tokens": 393_217}, "less than or equal to 393216"),
    "half a token": ({"messages": user(), "max_tokens": 1.5}, "integer"),
    "a penalty out of range": ({"messages": user(), "presence_penalty": 3}, "less than or equal to 2"),
    "a seed out of range": ({"messages": user(), "seed": 2**64}, "less than"),
    "a bias for a word": ({"messages": user(), "logit_bias": {"word": 1}}, "token ids"),
    "a bias for no token": ({"messages": user(), "logit_bias": {"129280": 1}}, "token ids"),
    "a bias out of range": ({"messages": user(), "logit_bias": {"1": 101}}, "-100 to 100"),
    "a thousand stop strings": ({"messages": user(), "stop": [str(number) for number in range(1000)]}, "at most 16"),
    "an empty stop string": ({"messages": user(), "stop": [""]}, "1 to 1000 characters"),
    "a stop string of a wrong kind": ({"messages": user(), "stop": [1]}, "string"),
    "a very long stop string": ({"messages": user(), "stop": "x" * 1001}, "1 to 1000 characters"),
    "two answers": ({"messages": user(), "n": 2}, "n must be 1"),
    "top_logprobs alone": ({"messages": user(), "top_logprobs": 3}, "logprobs = true"),
    "too many logprobs": ({"messages": user(), "logprobs": True, "top_logprobs": 21}, "less than or equal to 20"),
    "stream_options without a stream": (
        {"messages": user(), "stream_options": {"include_usage": True}},
        "stream_options should be set along with stream = true",
    ),
    "an unknown effort": ({"messages": user(), "reasoning_effort": "hard"}, "reasoning_effort must be one of"),
    "an unknown thinking": ({"messages": user(), "thinking": {"type": "perhaps"}}, "thinking must be"),
    "template options of a wrong kind": ({"messages": user(), "chat_template_kwargs": {"thinking": "yes"}}, "true or false"),
    "an unknown format": ({"messages": user(), "response_format": {"type": "xml"}}, "json_schema"),
    "a format without a schema": ({"messages": user(), "response_format": {"type": "json_schema"}}, "JSON schema"),
    "JSON that is not spoken of": ({"messages": user(), "response_format": {"type": "json_object"}}, "json"),
    "functions": ({"messages": user(), "functions": [{"name": "f"}]}, "send tools"),
    "sound": ({"messages": user(), "modalities": ["text", "audio"]}, "text only"),
    "a web search": ({"messages": user(), "web_search_options": {}}, "web search"),
}


def check(local: Local, answer: Any, sentence: str) -> None:
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert sentence in error["message"], error
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text and len(error["message"]) < 500
    assert local.engine.requests == [] and local.service.in_flight == 0


@pytest.mark.parametrize(("raw", "sentence"), RAW.values(), ids=RAW.keys())
def test_bodies_that_are_not_requests(raw: bytes, sentence: str) -> None:
    local = Local()
    for path in (CHAT, "/v1/completions"):
        check(local, local.http.post(path, content=raw, headers={"content-type": "application/json"}), sentence)


@pytest.mark.parametrize(("body", "sentence"), BODIES.values(), ids=BODIES.keys())
def test_requests_that_cannot_be_served(body: dict[str, Any], sentence: str) -> None:
    local = Local()
    check(local, local.http.post(CHAT, json=body), sentence)
    if "stream_options" not in body:
        check(local, local.http.post(CHAT, json={**body, "stream": True}), sentence)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "between 1 and 16"),
        ({"prompt": [[]]}, "empty"),
        ({"prompt": [129_280]}, "below 129280"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [1, 2], "suffix": "x"}, "text"),
        ({"prompt": "a", "n": 17}, "between 1 and 16"),
        ({"prompt": "a", "n": 0}, "at least 1"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "best_of": 4}, "best_of"),
        ({"prompt": "a", "logprobs": 21}, "20"),
        ({"prompt": ["a", "b"], "stream": True}, "one answer at a time"),
        ({"prompt": "a", "stop": [""]}, "1 to 1000 characters"),
    ],
)
def test_completions_that_cannot_be_served(body: dict[str, Any], sentence: str) -> None:
    local = Local()
    check(local, local.http.post("/v1/completions", json=body), sentence)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_prompt_longer_than_the_context(path: str) -> None:
    local = Local()
    local.engine.context = 100
    body = {"messages": user("word " * 200), "prompt": "word " * 200}
    answer = local.http.post(path, json=body)
    check(local, answer, "shorten")
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_ranges_are_422_and_forms_are_400() -> None:
    local = Local()
    assert local.refused(messages=user(), temperature=3)[0] == 422
    assert local.refused(messages=user(), temperature="warm")[0] == 400
    _, error = local.refused(messages=user(), temperature=3)
    assert error["param"] == "temperature" and error["code"] == "invalid_parameter"


def test_unknown_paths_and_methods_have_the_same_form() -> None:
    local = Local()
    for answer, status in ((local.http.get("/v1/nothing"), 404), (local.http.get(CHAT), 405)):
        assert answer.status_code == status and answer.json()["error"]["message"]


def pieces(size: int, each: int = 2**20) -> Iterator[bytes]:
    for _ in range(size // each):
        yield b" " * each


def test_a_body_of_100_megabytes_is_refused_and_never_held() -> None:
    local = Local()
    read, source = 0, pieces(100 * 2**20)

    async def receive() -> dict[str, Any]:
        nonlocal read
        piece = next(source, b"")
        read += len(piece)
        return {"type": "http.request", "body": piece, "more_body": bool(piece)}

    scope = {"type": "http", "headers": [], "app": local.http.app, "method": "POST", "path": CHAT}
    tracemalloc.start()
    with pytest.raises(ApiError) as refused:
        asyncio.run(read_json(Request(scope, receive)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused.value.status == 413 and "--body-limit" in refused.value.message
    assert read == 100 * 2**20  # the client could say all it had
    assert peak < local.options.body_limit + 4 * 2**20


def test_json_that_is_fine() -> None:
    body = {"text": "é🙂\u0000", "numbers": [1, -2.5, 10**30], "nested": {"a": [{}]}}
    assert parse_json(json.dumps(body).encode()) == body  # with escapes of whole surrogate pairs
    assert parse_json(json.dumps(body, ensure_ascii=False).encode()) == body
