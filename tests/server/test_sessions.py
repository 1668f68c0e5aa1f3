"""/v1/sessions in front of a scripted engine: its requests are counted, refused and ended like all others."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.testclient import TestClient

from nautile.engine.request import EngineEvent, EngineStoppedError, Request, TokenSampled
from nautile.server import ServerOptions, Service, create_app
from nautile.state import SessionInfo
from server.local import Local
from server.scripted import Script, ScriptedEngine

RESUME, SAVE = ("POST", "/v1/sessions/a/resume"), ("PUT", "/v1/sessions/a")


@dataclass
class Kept:
    """What the endpoints need of ``EngineSessions``: one session in memory, and how many requests ran when it was touched."""

    service: Service
    saved: list[tuple[int, ...]] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    failure: Exception | None = None

    def store(self, partition: str) -> None:
        """Not used by what is tested here."""

    def save(
        self, name: str, ids: Sequence[int], partition: str = "", note: str | None = None, revision: int | None = None
    ) -> SessionInfo:
        """Keep the ids."""
        self._touched()
        self.saved.append(tuple(ids))
        return SessionInfo(name, len(ids))

    def load(self, name: str, partition: str = "") -> tuple[SessionInfo, tuple[int, ...]]:
        """Always the same."""
        self._touched()
        return SessionInfo(name, 3), (0, 5, 6)

    def _touched(self) -> None:
        self.running.append(self.service.in_flight)
        if self.failure is not None:
            raise self.failure


class Cancelling(ScriptedEngine):
    """Ends every request after its first token, as an engine does that is closed."""

    async def _events(self, request: Request, script: Script) -> AsyncIterator[EngineEvent]:
        async for event in super()._events(request, script):
            yield event
            if isinstance(event, TokenSampled):
                self.cancel(request.id)


def serve(engine: ScriptedEngine | None = None) -> tuple[Local, Kept]:
    local = Local(ServerOptions(concurrency=2), engine or ScriptedEngine(default=Script(" b = 1")))
    kept = Kept(local.service)
    local.service.sessions = kept  # type: ignore[assignment]
    local.http = TestClient(create_app(local.service), base_url="http://localhost:8000")  # now with the routes of sessions
    return local, kept


def ask(local: Local, where: tuple[str, str], **body: Any) -> Any:
    return local.http.request(*where, json={"prompt": "a = 1", **body})


@pytest.mark.parametrize("where", [RESUME, SAVE])
def test_they_take_a_place_of_their_key_until_the_session_is_saved(where: tuple[str, str]) -> None:
    local, kept = serve()
    assert ask(local, where).status_code == 200
    assert set(kept.running) == {1} and local.service.in_flight == 0  # which is what a server that is leaving waits for
    local.service.running[""] = 2
    answer = ask(local, where)
    assert answer.status_code == 429 and "retry-after" in answer.headers and len(kept.saved) == 1
    local.service.running.clear()
    local.service.draining = True
    assert ask(local, where).status_code == 503 and len(kept.saved) == 1


@pytest.mark.parametrize("where", [RESUME, SAVE])
def test_an_engine_that_has_ended_is_no_fault_of_the_request(where: tuple[str, str]) -> None:
    local, kept = serve()
    kept.failure = EngineStoppedError("the engine is closed")
    answer = ask(local, where)
    assert answer.status_code == 503 and "started again" in answer.json()["error"]["message"]
    assert local.http.get("/health").json()["status"] == "failed" and local.service.in_flight == 0


def test_an_engine_that_ends_between_loading_and_going_on() -> None:
    local, kept = serve()
    local.engine.closed = True
    assert ask(local, RESUME).status_code == 503 and kept.saved == []


def test_a_turn_that_was_cancelled_is_no_answer() -> None:
    local, kept = serve(Cancelling(default=Script(" b = 1")))
    answer = ask(local, RESUME)
    assert answer.status_code == 503 and "retry-after" in answer.headers and kept.saved == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", "\n"),
        ("stop", ["\n"]),
        ("n", 2),
        ("stream", True),
        ("stream_options", {"include_usage": True}),
        ("response_format", {"type": "json_object"}),
        ("logprobs", 3),
        ("tools", []),
        ("max_completion_tokens", 5),
    ],
)
def test_options_that_are_not_honoured_are_refused_by_name(name: str, value: Any) -> None:
    local, kept = serve()
    answer = ask(local, RESUME, **{name: value})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == name and name in answer.json()["error"]["message"]
    assert local.engine.requests == [] and kept.running == []


@pytest.mark.parametrize("name", ["max_tokens", "temperature", "nonsense"])
def test_saving_takes_no_options_of_sampling(name: str) -> None:
    local, kept = serve()
    answer = ask(local, SAVE, **{name: 1})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == name and kept.saved == []


def test_options_that_are_honoured_reach_the_engine() -> None:
    local, _ = serve()
    same = {"n": 1, "stream": False, "stop": None, "stream_options": None, "model": "any", "user": "anna"}
    fields = {"top_k": 3, "presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.5, "seed": 7}
    assert ask(local, RESUME, **same, **fields, logit_bias={"5": 2}, max_tokens=9).status_code == 200
    sampling = local.engine.requests[0].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert sampling.logit_bias == {5: 2} and sampling.max_tokens == 9
