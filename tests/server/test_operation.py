"""A server on a socket: clients that go, streams that are slow, too many requests, signals."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from nautile.server import ServerOptions, Service
from nautile.server.serving import DrainingServer, draining_server, listen
from server.live import Live, serving
from server.local import user
from server.scripted import Gate, Script, ScriptedEngine
from waiting import soon

CHAT = "/v1/chat/completions"
WORDS = "</think>" + "word " * 400


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(ServerOptions(keep_alive=0.15, concurrency=3, api_keys=("key-of-anna", "key-of-bert"))) as server:
        yield server


@pytest.fixture(autouse=True)
def forgotten(live: Live) -> None:
    live.reset()


def client(live: Live, key: str = "key-of-anna") -> httpx.Client:
    return httpx.Client(base_url=live.url, headers={"x-api-key": key}, timeout=60)


def send(live: Live, path: str = CHAT, **body: Any) -> socket.socket:
    """A request on a plain socket, which can be dropped at any moment."""
    content = json.dumps({"messages": user(), **body}).encode()
    host, port = live.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(head(path, len(content)) + content)
    return connection


def head(path: str, size: int) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "x-api-key: key-of-anna", f"Content-Length: {size}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


BODIES = {
    "streamed chat": (CHAT, {"stream": True}),
    "whole chat": (CHAT, {}),
    "streamed completion": ("/v1/completions", {"prompt": "a", "stream": True}),
    "whole completion": ("/v1/completions", {"prompt": "a"}),
    "responses": ("/v1/responses", {"input": "a", "stream": True}),
    "messages": ("/v1/messages", {"max_tokens": 500, "stream": True}),
}


@pytest.mark.parametrize(("path", "body"), BODIES.values(), ids=BODIES.keys())
def test_a_client_that_goes_frees_its_sequence_within_one_step(live: Live, path: str, body: dict[str, Any]) -> None:
    """The step is one that has not ended: nothing comes any more that could be written to the client and fail."""
    live.engine.say(Script(WORDS, gate=Gate(4)))
    connection = send(live, path, **body)
    soon(lambda: len(live.engine.requests) == 1 and live.engine.given.get(live.engine.requests[0].id, 0) == 4)
    (request,) = live.engine.requests
    connection.close()
    soon(lambda: request.id in live.engine.cancelled)
    assert live.engine.given[request.id] == 4
    assert live.engine.running == set()


def test_a_client_that_goes_while_it_waits_is_forgotten(live: Live) -> None:
    live.engine.say(Script(wait=600), Script(wait=600))
    for body in ({}, {"stream": True}):
        connection = send(live, **body)
        soon(lambda: len(live.engine.running) == 1)
        connection.close()
        soon(lambda: not live.engine.running)
    assert all(request.id not in live.engine.given for request in live.engine.requests)


def test_a_client_that_goes_in_the_middle_of_its_body_starts_nothing(live: Live) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(head(CHAT, 900) + b"{")
    connection.close()
    time.sleep(0.1)
    assert live.engine.requests == []
    assert client(live).get("/health").status_code == 200


def test_tokens_come_one_by_one(live: Live) -> None:
    """The model says the next word when the client has read the last one: whoever collects them waits for ever."""
    gate, read = Gate(2), 0
    live.engine.say(Script("</think>" + "word " * 8, gate=gate))
    with client(live).stream("POST", CHAT, json={"messages": user(), "stream": True}) as answer:
        for line in answer.iter_lines():
            if '"content":"' in line and '"content":""' not in line:
                read += 1
                gate.allowed += 1
    assert read >= 8


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_long_waits_have_comments(live: Live, path: str) -> None:
    live.engine.say(Script("</think>ok", wait=0.7, delay=0.2))
    body = {"messages": user(), "prompt": "a", "stream": True}
    text = client(live).post(path, json=body).text
    assert text.startswith(": keep-alive\n\n") and text.count(": keep-alive\n\n") >= 3
    assert text.endswith("data: [DONE]\n\n")


def test_more_requests_than_a_key_may_have(live: Live) -> None:
    live.engine.say(*[Script(wait=600)] * 3)
    waiting = [send(live) for _ in range(3)]
    soon(lambda: len(live.engine.running) == 3)
    answer = client(live).post(CHAT, json={"messages": user()})
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert client(live, "key-of-bert").post(CHAT, json={"messages": user()}).status_code == 200  # others are not held up
    for connection in waiting:
        connection.close()
    soon(lambda: not live.engine.running)
    assert client(live).post(CHAT, json={"messages": user()}).status_code == 200


def test_many_at_once_each_get_their_own_answer(live: Live) -> None:
    live.engine.answer = lambda request: Script(f"</think>{request.sampling.seed}", delay=0.002)
    said: dict[int, str] = {}

    def ask(seed: int) -> None:
        key = ("key-of-anna", "key-of-bert")[seed % 2]
        answer = client(live, key).post(CHAT, json={"messages": user(), "seed": seed})
        said[seed] = answer.json()["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert said == {seed: str(seed) for seed in range(6)}


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_100_megabytes_get_an_answer_not_a_broken_pipe(live: Live, declared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nautile.server.intake._DISCARD_SECONDS", 60.0)  # for a machine that takes longer than five to send it
    size = 100 * 2**20

    def pieces() -> Iterator[bytes]:
        for _ in range(size // 2**20):
            yield b" " * 2**20

    headers = {"content-length": str(size)} if declared else {}
    answer = client(live).post(CHAT, content=pieces(), headers=headers)
    assert answer.status_code == 413 and "--body-limit" in answer.json()["error"]["message"]
    assert live.engine.requests == []


def test_metrics_tell_what_happened(live: Live) -> None:
    http = client(live)
    live.engine.say(Script("why</think>ok", cached=2))
    before = figures(http.get("/metrics").text)
    http.post(CHAT, json={"messages": user()})
    http.post(CHAT, json={})
    after = figures(http.get("/metrics").text)

    def grown(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    assert grown('nautile_tokens_total{kind="completion"}') == 4 and grown('nautile_tokens_total{kind="reasoning"}') == 2
    assert grown('nautile_tokens_total{kind="cached"}') == 2
    assert grown(f'nautile_requests_total{{path="{CHAT}",status="200"}}') == 1
    assert grown(f'nautile_requests_total{{path="{CHAT}",status="400"}}') == 1
    assert grown("nautile_time_to_first_token_seconds_count") == 1
    assert grown("nautile_time_per_output_token_seconds_count") == 1
    for name in ("nautile_waiting", "nautile_cache_hit_rate", "nautile_engine_drafted_tokens_total"):
        assert name in after
    assert 'nautile_state_bytes{kind="window"}' in after


def figures(text: str) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in lines}


# Shutting down. What a signal calls is called here; tests/cli/test_serve.py sends a real one to a real process.


@contextmanager
def leaving(script: Script, drain: float) -> Iterator[tuple[DrainingServer, ScriptedEngine, str]]:
    """A server in a thread that has begun nothing yet, with what its signal handler is."""
    engine = ScriptedEngine(default=script)
    listener = listen("127.0.0.1", 0)
    server = draining_server(Service(engine, "scripted", ServerOptions(drain=drain)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    soon(lambda: server.started)
    yield server, engine, f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive() and engine.closed


def test_sigterm_lets_a_stream_finish_and_refuses_new_requests() -> None:
    gate = Gate(4)
    with leaving(Script("</think>" + "word " * 20, gate=gate), drain=600) as (server, engine, url):
        with httpx.stream("POST", url + CHAT, json={"messages": user(), "stream": True}, timeout=60) as answer:
            lines = answer.iter_lines()
            next(line for line in lines if '"content":"word' in line)
            server.handle_exit(signal.SIGTERM, None)
            assert httpx.get(f"{url}/health", timeout=60).status_code == 503
            refused = httpx.post(url + CHAT, json={"messages": user()}, timeout=60)
            assert refused.status_code == 503 and "retry-after" in refused.headers
            assert httpx.get(f"{url}/health/live", timeout=60).status_code == 200
            gate.allowed = 1000
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        soon(lambda: server.should_exit)  # by itself, now that nothing runs
    assert engine.cancelled == [] and len(engine.requests) == 1


@pytest.mark.parametrize("again", [False, True], ids=["drain over", "second signal"])
def test_sigterm_does_not_wait_for_ever(again: bool) -> None:
    with leaving(Script(delay=0.1, wait=600), drain=1000 if again else 0.3) as (server, engine, url):
        said: list[str] = []

        def ask() -> None:
            try:
                said.append(httpx.post(url + CHAT, json={"messages": user(), "stream": True}, timeout=60).text)
            except httpx.HTTPError as error:
                said.append(type(error).__name__)

        asking = threading.Thread(target=ask)
        asking.start()
        soon(lambda: len(engine.running) == 1)
        server.handle_exit(signal.SIGTERM, None)
        if again:
            server.handle_exit(signal.SIGTERM, None)
        asking.join(60)
        assert said and "[DONE]" not in said[0]  # cut off, so that nobody takes it for a whole answer
        soon(lambda: engine.running == set())
