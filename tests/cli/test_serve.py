"""``nautile serve``, and ``chat`` and ``agent`` with --url: options, errors, and the shipped model behind a real port."""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from nautile.cli import main
from nautile.cli.serve import read_keys
from nautile.server.service import ServiceError
from server.live import Live, serving
from server.scripted import calls


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving() as server:
        yield server


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--host", "::"], "--api-key"),
        (["--host", "nowhere.invalid", "--api-key", "12345678"], "cannot listen"),
        (["--api-key", "short"], "at least 8"),
        (["--api-key-file", "/nowhere"], "/nowhere"),
        (["--allow-origin", "app.example"], "https://NAME"),
        (["--port", "99999"], "--port"),
        (["--effort", "hard"], "--effort"),
        (["--model", "/nowhere", "--port", "0"], "/nowhere"),
    ],
)
def test_what_cannot_be_served(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Traceback" not in error


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 1
    assert "choose another with --host or --port" in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    assert "Example: nautile serve" in capsys.readouterr().out


def test_key_files(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# Anna\nkey-of-anna\n\n  key-of-bert  \n")
    assert read_keys(file) == ("key-of-anna", "key-of-bert")
    file.write_text("# nobody\n")
    with pytest.raises(ServiceError, match="one a line"):
        read_keys(file)


def test_chat_with_a_server(live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    live.reset()
    live.engine.say("I think</think>Hello Anna.", "</think>Bye Anna.")
    monkeypatch.setattr(sys, "stdin", io.StringIO("I am Anna\nbye\n"))
    assert main(["chat", "--url", live.url, "--system", "Be kind."]) == 0
    out = capsys.readouterr().out
    assert "I think" in out and "Hello Anna." in out and "Bye Anna." in out
    assert "Be kind." in live.engine.prompt() and "Hello Anna." in live.engine.prompt()


def test_chat_goes_on_after_an_error(live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    live.reset()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert main(["chat", "--url", live.url, "--temperature", "9"]) == 0
    assert "422" in capsys.readouterr().out


def test_agent_with_a_server(live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live.reset()
    place = tmp_path / "place"
    place.mkdir()
    (place / "notes").write_text("one\ntwo\n")
    live.engine.say("</think>" + calls(("count", {"pattern": "o", "path": "notes"})), "seen</think>2")
    options = ["--dir", str(place), "--state", str(tmp_path / "state"), "--url", live.url, "--json"]
    assert main(["agent", 'How many lines of notes contain "o"?', *options]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["status"], result["answer"]) == ("answered", "2") and result["tokens"] > 0


def test_nobody_at_the_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["chat"], ["agent", "Count.", "--dir", str(tmp_path)]):
        assert main([*verb, "--url", "http://127.0.0.1:9"]) == 1
        error = capsys.readouterr().err
        assert "nautile serve" in error and error.count("\n") == 1


def test_the_shipped_model_behind_a_port(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("key-of-anna\n")
    command = [sys.executable, "-m", "nautile.cli", "serve", "--port", "0", "--api-key-file", str(keys), "--log-format", "json"]
    server = subprocess.Popen([*command, "--threads", "1"], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        line = next(line for line in server.stderr if line.startswith("nano at http"))
        url = line.split()[2].rstrip("/")
        logs: list[str] = []
        reader = threading.Thread(target=lambda: logs.extend(server.stderr or ()))
        reader.start()
        body = {"messages": [{"role": "user", "content": "How many lines has notes.txt?"}], "max_tokens": 12}
        with httpx.Client(base_url=url, headers={"x-api-key": "key-of-anna"}, timeout=60) as http:
            assert http.get("/v1/models").json()["data"][0]["id"] == "nano"
            answers = [http.post("/v1/chat/completions", json=body).json() for _ in range(2)]
            assert http.post("/v1/chat/completions", json=body, headers={"x-api-key": "no"}).status_code == 401
            metrics = http.get("/metrics").text
        first, second = (answer["choices"][0]["message"] for answer in answers)
        assert first == second  # nano's default is greedy
        assert answers[0]["usage"]["completion_tokens"] == 12 and answers[0]["choices"][0]["finish_reason"] == "length"
        assert "nautile_engine_completion_tokens_total 24.0" in metrics
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
        reader.join(60)
        events = [json.loads(line) for line in logs]
        assert [event["event"] for event in events if event["event"] != "request"] == ["turn", "turn", "leaving"]
    finally:
        server.kill()
        server.wait(60)
