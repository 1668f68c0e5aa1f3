"""/v1/sessions on the shipped model: the same timelines as in Python and on the command line, each key with its own."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from nautile.cli.agent import shipped_model
from nautile.engine import Engine, EngineConfig
from nautile.engine.sessions import EngineSessions
from nautile.server import ServerOptions, Service, create_app
from nautile.state import SessionStore
from nautile.state import session as session_module
from nautile.state import store as store_module

pytestmark = pytest.mark.skipif(not list(shipped_model().glob("*.safetensors")), reason="the shipped model has no weights here")
TEXT = "def add(a, b):\n    return a + b\n\n\n" * 24
KEYS = ("first-secret", "second-secret")


@functools.cache
def loaded() -> Engine:
    return Engine(shipped_model(), EngineConfig(runner="torch", pool_bytes=16 << 20, max_running=1))


def serve(directory: Path, keys: tuple[str, ...] = (), key: str = "") -> TestClient:
    """A server that has just been started on the directory."""
    options = EngineConfig(runner="torch", pool_bytes=64 << 20, max_running=4)
    engine = Engine(loaded().model, options, loaded().tokenizer)
    service = Service(engine, "nano", ServerOptions(temperature=0.0, api_keys=keys))
    service.sessions = EngineSessions(engine, directory)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return TestClient(create_app(service), base_url="http://localhost:8000", headers=headers)


def test_a_timeline_survives_the_server(tmp_path: Path) -> None:
    with serve(tmp_path) as http:
        begun = http.put("/v1/sessions/a", json={"prompt": TEXT, "note": "code"}).json()
        assert begun["length"] > 256 and begun["note"] == "code" and begun["has_logits"]
        assert http.post("/v1/sessions/a/fork", json={"name": "b"}).json()["forked_from"] == "a"
        whole = http.post("/v1/sessions/a/resume", json={"max_tokens": 6}).json()
        assert len(whole["ids"]) == 6 and whole["session"]["length"] == begun["length"] + 6
    with serve(tmp_path) as http:
        parts = [http.post("/v1/sessions/b/resume", json={"max_tokens": 3}).json() for _ in range(2)]
        assert [token for part in parts for token in part["ids"]] == whole["ids"]
        assert all(part["usage"]["prompt_tokens"] - part["usage"]["cached_tokens"] < 257 for part in parts)
        back = http.post("/v1/sessions/b/rewind", json={"length": begun["length"], "name": "c"}).json()
        assert back["length"] == begun["length"]
        again = http.post("/v1/sessions/c/resume", json={"max_tokens": 6, "save": False}).json()
        assert again["ids"] == whole["ids"] and again["session"]["length"] == begun["length"]
        data = http.get("/v1/sessions/a/export").content
        assert http.post("/v1/sessions/import", params={"name": "d"}, content=data).json()["length"] == begun["length"] + 6
        assert [one["name"] for one in http.get("/v1/sessions").json()["data"]] == ["a", "b", "c", "d"]
        assert http.delete("/v1/sessions/d").json() == {"name": "d", "deleted": True}
    assert [info.name for info in SessionStore(tmp_path).list()] == ["a", "b", "c"]  # the command line sees them too


def test_a_turn_on_a_session_that_somebody_else_went_on_with_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that resume at once: the first answer stays what the session is, the second is told."""
    with serve(tmp_path) as http:
        http.put("/v1/sessions/a", json={"prompt": [0, 5, 6]})
        sessions = http.app.state.service.sessions  # type: ignore[attr-defined]
        load = sessions.load

        def overtaken(name: str, partition: str) -> object:
            found = load(name, partition)
            sessions.save(name, (*found[1], 7), partition)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(sessions, "load", overtaken)
            answer = http.post("/v1/sessions/a/resume", json={"max_tokens": 2})
        assert answer.status_code == 503 and "revision 2, not 1" in answer.json()["error"]["message"]
        assert http.get("/v1/sessions/a").json()["length"] == 4


def test_the_engine_goes_on_while_a_session_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written in the engine's thread: syncing a disk would hold every decode up."""
    write, threads = session_module.write_file, list[str]()

    def noting(*arguments: Any) -> int:
        threads.append(threading.current_thread().name)
        return write(*arguments)

    monkeypatch.setattr(session_module, "write_file", noting)
    monkeypatch.setattr(store_module, "write_file", noting)
    with serve(tmp_path) as http:
        assert http.put("/v1/sessions/a", json={"prompt": TEXT}).json()["snapshots"] == [256]
    assert len(threads) == 2 and "nautile-engine" not in threads


def test_keys_have_sessions_of_their_own(tmp_path: Path) -> None:
    with serve(tmp_path, KEYS, KEYS[0]) as http:
        assert http.put("/v1/sessions/a", json={"prompt": [0, 5, 6]}).json()["length"] == 3
        other = {"Authorization": f"Bearer {KEYS[1]}"}
        assert http.get("/v1/sessions/a", headers=other).status_code == 404
        assert http.get("/v1/sessions", headers=other).json()["data"] == []
        assert http.get("/v1/sessions/a", headers={"Authorization": "Bearer nobody"}).status_code == 401


def test_mistakes(tmp_path: Path) -> None:
    with serve(tmp_path) as http:
        for answer, status, text in (
            (http.get("/v1/sessions/x"), 404, "no session 'x'"),
            (http.put("/v1/sessions/a b", json={"prompt": "x"}), 400, "no name for a session"),
            (http.put("/v1/sessions/a", json={}), 400, "prompt"),
            (http.put("/v1/sessions/a", json={"prompt": []}), 400, "empty"),
            (http.put("/v1/sessions/a", json={"prompt": [99999]}), 400, "token ids"),
            (http.post("/v1/sessions/x/resume", json={}), 404, "no session"),
            (http.post("/v1/sessions/import", content=b"nonsense"), 400, "cut short"),
            (http.post("/v1/sessions/x/rewind", json={"length": "y"}), 400, "length"),
        ):
            assert answer.status_code == status and text in answer.json()["error"]["message"], answer.text
        assert http.get("/v1/sessions").json()["data"] == []


def test_an_engine_that_is_closed_is_no_fault_of_the_request(tmp_path: Path) -> None:
    with serve(tmp_path) as http:
        http.put("/v1/sessions/a", json={"prompt": [0, 5, 6]})
        http.app.state.service.engine.close()  # type: ignore[attr-defined]
        for method, path in (("PUT", "/v1/sessions/b"), ("POST", "/v1/sessions/a/resume")):
            answer = http.request(method, path, json={"prompt": [5]})
            assert answer.status_code == 503 and "started again" in answer.json()["error"]["message"], answer.text
        assert [one["name"] for one in http.get("/v1/sessions").json()["data"]] == ["a"]  # they are on the disk


def test_a_fault_of_the_engine_is_not_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(tmp_path) as http:
        engine = http.app.state.service.engine
        assert isinstance(engine, Engine)

        def broken(plan: object) -> None:
            raise RuntimeError("a kernel broke")

        with monkeypatch.context() as patch:
            patch.setattr(engine.runner, "step", broken)
            answer = http.put("/v1/sessions/a", json={"prompt": TEXT})
            assert answer.status_code == 500 and "a kernel broke" in answer.json()["error"]["message"]
        assert http.put("/v1/sessions/a", json={"prompt": TEXT}).status_code == 200  # the service goes on
