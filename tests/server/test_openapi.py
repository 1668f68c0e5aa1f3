"""The OpenAPI document, and a fuzzer that goes by it: whatever is sent, there is no 500 and every error has its form."""

from __future__ import annotations

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from nautile.server import ServerOptions
from server.local import Local
from server.scripted import ScriptedEngine

LOCAL = Local(ServerOptions(log_format="json"), ScriptedEngine(obedient=True))  # any schema may come
CONFIG = schemathesis.Config.from_dict({"headers": {"host": "localhost"}, "generation": {"mode": "all"}})
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", LOCAL.http.app, config=CONFIG, headers={"host": "localhost"})


def test_a_schema_that_the_script_does_not_follow_is_followed() -> None:
    """What the fuzzer found once in some hundred runs: its requests may hold schemas."""
    LOCAL.engine.closed = False
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object", "additionalProperties": False}}}
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "response_format": shape, "reasoning_effort": "none"}
    answer = LOCAL.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"].startswith("{")


@SCHEMA.include(path_regex="^/(v1|health|metrics)").parametrize()
@settings(max_examples=40, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
def test_nothing_makes_a_500(case: schemathesis.Case) -> None:
    LOCAL.engine.closed = False  # every call here starts the application and shuts it down
    answer = case.call(headers={"host": "localhost"})
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        error = json.loads(answer.content)["error"]
        assert error["message"] and error["type"] and "Traceback" not in error["message"]
    assert LOCAL.engine.running == set() and LOCAL.service.in_flight == 0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
def test_what_the_document_describes_is_served(path: str) -> None:
    """A document that is too loose makes a fuzzer that never gets past the first check. Some of what a schema cannot say
    (a result needs its call, a choice needs tools) is still refused."""
    config = schemathesis.Config.from_dict({"headers": {"host": "localhost"}, "generation": {"mode": "positive"}})
    schema = schemathesis.openapi.from_asgi("/openapi.json", LOCAL.http.app, config=config, headers={"host": "localhost"})
    statuses = []

    @given(case=schema[path]["POST"].as_strategy())
    @settings(
        max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    def ask(case: schemathesis.Case) -> None:
        LOCAL.engine.closed = False
        statuses.append(case.call(headers={"host": "localhost"}).status_code)

    ask()
    assert statuses.count(200) >= 4, statuses


def test_the_document_is_whole() -> None:
    document = LOCAL.http.get("/openapi.json").json()
    text = json.dumps(document)
    references = {part.split('"')[0] for part in text.split('"$ref": "')[1:]}
    for reference in references:
        place = document
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]
    for path in ("chat/completions", "completions", "responses", "messages", "models"):
        assert f"/v1/{path}" in document["paths"]
