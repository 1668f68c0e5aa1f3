"""The OpenAPI document, and a fuzzer that goes by it: whatever is sent, there is no 500 and every error has its form."""

from __future__ import annotations

import json

import schemathesis
from hypothesis import HealthCheck, Phase, settings

from nautile.server import ServerOptions
from server.local import Local

LOCAL = Local(ServerOptions(log_format="json"))
CONFIG = schemathesis.Config.from_dict({"headers": {"host": "localhost"}, "generation": {"mode": "all"}})
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", LOCAL.http.app, config=CONFIG, headers={"host": "localhost"})


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
