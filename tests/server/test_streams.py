"""Streams that break off: whatever goes wrong after the first byte is told in the API's own words, and the stream ends."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from nautile.engine.request import EngineEvent, Request, RequestError, TokenSampled
from nautile.server import ServerOptions
from server.local import Local, user
from server.scripted import Script, ScriptedEngine, pass_time

CHAT, PLAIN, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": user()},
    PLAIN: {"prompt": "Once"},
    MESSAGES: {"messages": user(), "max_tokens": 50},
    RESPONSES: {"input": "hello"},
}


class Breaking(ScriptedEngine):
    """Raises ``error`` instead of the second token, or, when ``early``, instead of anything, after a silence."""

    error: Exception = RuntimeError("a SECRET of the engine")
    early: bool = False

    async def _events(self, request: Request, script: Script) -> AsyncIterator[EngineEvent]:
        if self.early:
            await pass_time(0.3)
            raise self.error
        tokens = 0
        async for event in super()._events(request, script):
            tokens += isinstance(event, TokenSampled)
            if tokens == 3:
                raise self.error
            yield event


def stream(local: Local, path: str) -> tuple[str, str, dict[str, Any]]:
    """The id of a request, all that its stream said, and the last event that has data of its own."""
    answer = local.http.post(path, json={**BODIES[path], "stream": True})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream"), answer.text
    assert answer.text.endswith("\n\n")
    if path in (CHAT, PLAIN):
        assert answer.text.endswith("data: [DONE]\n\n")
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    return answer.headers["x-request-id"], answer.text, json.loads(lines[-1])


def told(path: str, last: dict[str, Any]) -> str:
    """The sentence of an error event, which must have the form of its API."""
    if path == RESPONSES:
        assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
        return last["response"]["error"]["message"]
    if path == MESSAGES:
        assert last["type"] == "error" and last["error"]["type"] in ("api_error", "invalid_request_error")
    return last["error"]["message"]


@pytest.mark.parametrize("early", [False, True], ids=["after tokens", "after comments"])
@pytest.mark.parametrize("path", BODIES)
def test_an_unexpected_error_is_an_event_with_the_id_that_the_log_has(
    path: str, early: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Breaking(default=Script("</think>" + "word " * 9))
    engine.early = early
    local = Local(ServerOptions(log_format="json", keep_alive=0.02), engine)
    request_id, text, last = stream(local, path)
    assert request_id in told(path, last) and "SECRET" not in text
    logged = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    (failure,) = [line for line in logged if line["event"] == "failure"]
    assert failure["request"] == request_id and failure["path"] == path and "SECRET" in failure["exception"]
    assert [line["ended"] for line in logged if line["event"] == "turn"] == ["error"]
    assert local.service.in_flight == 0 and engine.running == set()


@pytest.mark.parametrize("path", BODIES)
def test_a_refusal_that_comes_after_comments_is_an_event(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Breaking()
    engine.early, engine.error = True, RequestError("shorten it")
    local = Local(ServerOptions(keep_alive=0.02), engine)
    _, text, last = stream(local, path)
    assert text.startswith(": keep-alive\n\n") and told(path, last) == "shorten it"
    assert "failure" not in capsys.readouterr().err and local.service.in_flight == 0


@pytest.mark.parametrize("path", BODIES)
def test_a_writer_that_fails_is_no_other_case(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    local = Local(ServerOptions(log_format="json"), ScriptedEngine(default=Script("</think>" + "word " * 9)))

    def fails(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("nautile.server.generation.Writer.finished", fails)
    request_id, _, last = stream(local, path)
    assert request_id in told(path, last) and local.service.in_flight == 0 and local.engine.running == set()
