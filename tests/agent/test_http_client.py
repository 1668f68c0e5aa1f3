"""The client over HTTP: against Nautile's own server, and against servers that behave otherwise."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nautile.agent.http_client import HttpClient, ServerError, connect
from nautile.agent.loop import Agent, Budget, Unattended
from nautile.agent.tools import TOOLS
from nautile.protocol import ContentDelta, Event, ReasoningDelta, ToolCallEnd
from nautile.sandbox import open_sandbox
from nautile.server import ServerOptions
from server.live import Live, serving
from server.scripted import Script, calls


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(ServerOptions(api_keys=("key-of-anna",))) as server:
        yield server


@pytest.fixture(autouse=True)
def forgotten(live: Live) -> None:
    live.reset()


def client(live: Live, **options: Any) -> HttpClient:
    return connect(live.url, key="key-of-anna", **options)


def test_a_turn_with_reasoning_and_calls(live: Live) -> None:
    chat = client(live).open([{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}], TOOLS)
    live.engine.say("I think</think>I look." + calls(("read", {"path": "a"}), ("list", {"path": "."})), "Now</think>Done.")
    events: list[Event] = []
    reply = chat.reply(200, events.append)
    assert (reply.reasoning, reply.content, reply.ended) == ("I think", "I look.", True)
    assert [(call.name, json.loads(call.arguments)) for call in reply.calls] == [
        ("read", {"path": "a"}),
        ("list", {"path": "."}),
    ]
    assert "".join(event.text for event in events if isinstance(event, ReasoningDelta)) == "I think"
    assert "".join(event.text for event in events if isinstance(event, ContentDelta)) == "I look."
    assert [event.call for event in events if isinstance(event, ToolCallEnd)] == list(reply.calls)
    chat.say([{"role": "tool", "tool_call_id": call.id, "content": "R"} for call in reply.calls])
    assert chat.reply(200, events.append).content == "Done."
    first, second = (live.engine.prompt(number) for number in range(2))
    assert second.startswith(first + "I think</think>I look.")  # the reasoning went back
    assert chat.tokens == len(live.engine.requests[1].prompt_ids) + live.engine.given[live.engine.requests[1].id]


def test_line_separators_of_unicode_end_no_event(live: Live) -> None:
    said = "a\u2028b\u2029c\x85d\x0be\x1cf"
    live.engine.say("</think>" + said)
    assert client(live).open([{"role": "user", "content": "hi"}], ()).reply(99, print).content == said


def test_a_key_that_no_header_can_carry() -> None:
    for key in ("\u043a\u043b\u044e\u0447", "a\nb"):
        with pytest.raises(ServerError, match="key"):
            connect("http://127.0.0.1:9", key=key)


def test_options_reach_the_engine(live: Live) -> None:
    live.engine.say("ok")
    client(live, thinking=False, temperature=0.25, seed=3).open([{"role": "user", "content": "hi"}], ()).reply(9, print)
    request = live.engine.requests[0]
    assert (request.sampling.temperature, request.sampling.seed, request.sampling.max_tokens) == (0.25, 3, 9)
    assert live.engine.prompt().endswith("</think>")


def test_a_turn_that_its_limit_cuts_is_not_ended(live: Live) -> None:
    live.engine.say("</think>" + calls(("read", {"path": "a"})))
    reply = client(live).open([{"role": "user", "content": "hi"}], TOOLS).reply(20, lambda event: None)
    assert not reply.ended and reply.calls == ()


def test_the_agent_works_through_it(live: Live, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("one\ntwo TODO\n")
    live.engine.say("</think>" + calls(("grep", {"pattern": "TODO", "path": "notes.txt"})), "seen</think>Line 2")
    sandbox = open_sandbox(tmp_path, unconfined=True)
    worker = Agent(client(live), TOOLS, sandbox, budget=Budget(), front=Unattended(), state=tmp_path / "state")
    outcome = worker.run("Where is TODO?")
    assert outcome.status == "answered" and outcome.answer == "Line 2"
    assert "2: two TODO" in outcome.results[0].output and "<tool_result>" in live.engine.prompt()
    assert outcome.tokens > 0


def test_an_error_leaves_the_conversation_as_it_was(live: Live) -> None:
    chat = client(live).open([{"role": "user", "content": "hi"}], ())
    live.engine.say(Script("</think>a", fail="the device is gone"), "</think>Now it works.")
    with pytest.raises(ServerError, match="the device is gone"):
        chat.reply(100, lambda event: None)
    assert chat.reply(100, lambda event: None).content == "Now it works."
    assert live.engine.requests[0].prompt_ids == live.engine.requests[1].prompt_ids


def test_the_server_s_own_words_are_passed_on(live: Live) -> None:
    with pytest.raises(ServerError, match=r"401.*--api-key"):
        connect(live.url)
    with pytest.raises(ServerError, match=r"422.*temperature"):
        client(live, temperature=9).open([{"role": "user", "content": "hi"}], ()).reply(9, print)


def test_addresses() -> None:
    for given in ("localhost:1", "http://localhost:1", "http://localhost:1/v1", "http://localhost:1/v1/"):
        assert connect(given, "m").url == "http://localhost:1/v1"
    assert connect("https://host.example/api/v3", "m").url == "https://host.example/api/v3"
    for wrong in ("", "ftp://x", "http://", "http://[::1", "http://127.0.0.1:abc", "http://127.0.0.1:1/\x00", "http://h:99999"):
        with pytest.raises(ServerError, match="not an address"):
            connect(wrong, "m")
    with pytest.raises(ServerError, match="nautile serve"):
        connect("http://127.0.0.1:9", "m").open([], ()).reply(1, print)


# Servers that behave otherwise


@contextmanager
def stub(*answers: tuple[int, bytes]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that gives these answers in order, and what it was sent."""
    waiting, seen = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            status, body = waiting.pop(0)
            self.send_response(status)
            self.send_header("retry-after", "0")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def stream(*chunks: dict[str, Any], done: bool = True) -> tuple[int, bytes]:
    lines = [": keep-alive", *(f"data: {json.dumps(chunk)}" for chunk in chunks), *(["data: [DONE]"] if done else [])]
    return 200, "\n\n".join([*lines, ""]).encode()


def delta(reason: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": reason}]}


def test_other_names_for_reasoning_and_calls_in_pieces() -> None:
    pieces = [
        delta(role="assistant", content=None),
        delta(reasoning="why"),
        delta(tool_calls=[{"index": 0, "id": "a", "function": {"name": "read"}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": '{"path":'}}]),
        delta(tool_calls=[{"index": 1, "id": "b", "function": {"name": "list", "arguments": ""}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": ' "x"}'}}]),
        delta("tool_calls"),
    ]
    with stub(stream(*pieces)) as (url, seen):
        chat = connect(url, "m").open([{"role": "user", "content": "hi"}], TOOLS)
        reply = chat.reply(50, lambda event: None)
    assert reply.reasoning == "why"
    assert [(call.id, call.name, call.arguments) for call in reply.calls] == [
        ("a", "read", '{"path": "x"}'),
        ("b", "list", "{}"),
    ]
    assert chat.tokens > 0  # guessed, since this server counts nothing
    assert set(seen[0]) == {"model", "messages", "max_tokens", "stream", "stream_options", "tools"}  # nothing it may not know


def test_line_separators_of_unicode_in_another_server_s_stream() -> None:
    chunks = [delta(content="a\u2028b\x85c"), delta("stop")]
    raw = ": hello\r\n" + "".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\r\n\r\n" for chunk in chunks)
    with stub((200, raw.encode())) as (url, _):
        reply = connect(url, "m").open([{"role": "user", "content": "hi"}], ()).reply(9, lambda event: None)
    assert reply.content == "a\u2028b\x85c"


def test_a_busy_server_is_asked_again() -> None:
    busy = (503, b'{"error": {"message": "busy"}}')
    with stub(busy, (429, b""), stream(delta("stop", content="ok"))) as (url, seen):
        assert connect(url, "m").open([{"role": "user", "content": "hi"}], ()).reply(5, lambda event: None).content == "ok"
    assert len(seen) == 3
    with stub(busy, busy, busy, busy) as (url, seen), pytest.raises(ServerError, match="503: busy"):
        connect(url, "m").open([{"role": "user", "content": "hi"}], ()).reply(5, lambda event: None)


@pytest.mark.parametrize(
    "answer",
    [
        stream(delta(content="half an ans"), done=False),
        stream(delta(content="half an ans")),
        (200, b"data: {broken\n\n"),
        (200, b""),
        (500, b"<html>oops</html>"),
    ],
)
def test_half_an_answer_is_none(answer: tuple[int, bytes]) -> None:
    with stub(answer) as (url, _):
        chat = connect(url, "m").open([{"role": "user", "content": "hi"}], ())
        with pytest.raises(ServerError):
            chat.reply(5, lambda event: None)
        assert len(chat.messages) == 1
