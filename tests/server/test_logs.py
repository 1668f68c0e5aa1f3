"""Logs: one line an event, with ids, and no prompt text unless it was asked for."""

from __future__ import annotations

import json
from typing import NoReturn

import pytest

from nautile.server import ServerOptions
from server.local import Local, user


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_request_and_its_turn_share_an_id(capsys: pytest.CaptureFixture[str]) -> None:
    local = Local(ServerOptions(log_format="json"))
    answer = local.http.post("/v1/chat/completions", json={"messages": user("a secret")})
    turn, request = lines(capsys.readouterr().err)
    assert turn["event"] == "turn" and request["event"] == "request"
    assert turn["request"] == request["request"] == answer.headers["x-request-id"]
    assert (turn["ended"], request["status"], request["path"]) == ("stop", 200, "/v1/chat/completions")
    assert turn["completion"] == 3 and turn["timestamp"]


@pytest.mark.parametrize("style", ["json", "console"])
def test_no_text_of_prompts_or_answers(style: str, capsys: pytest.CaptureFixture[str]) -> None:
    local = Local(ServerOptions(log_format=style, api_keys=("key-of-anna",)))
    headers = {"x-api-key": "key-of-anna"}
    local.engine.say("privately</think>SECRET answer")
    for body in ({"messages": user("SECRET")}, {"messages": user("SECRET"), "temperature": "SECRET"}, {"messages": "SECRET"}):
        local.http.post("/v1/chat/completions", json=body, headers=headers)
    local.http.post("/v1/chat/completions", content=b"SECRET", headers=headers)
    logged = capsys.readouterr().err
    assert "SECRET" not in logged and "privately" not in logged and "key-of-anna" not in logged and "turn" in logged


def test_with_log_prompts_they_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    local = Local(ServerOptions(log_format="json", log_prompts=True))
    local.engine.say("why</think>The ANSWER.")
    local.http.post("/v1/chat/completions", json={"messages": user("The QUESTION")})
    turn = lines(capsys.readouterr().err)[0]
    assert "The QUESTION" in str(turn["prompt_text"]) and turn["answer_text"] == "The ANSWER."


def test_an_unexpected_error_is_in_the_log_and_not_in_the_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    local = Local(ServerOptions(log_format="json"))
    monkeypatch.setattr(local.engine, "submit", None)
    answer = local.http.post("/v1/chat/completions", json={"messages": user()})
    assert answer.status_code == 500 and answer.headers["x-request-id"] in answer.json()["error"]["message"]
    assert "TypeError" not in answer.text
    failure = next(line for line in lines(capsys.readouterr().err) if line["event"] == "failure")
    assert "TypeError" in str(failure["exception"]) and failure["request"] == answer.headers["x-request-id"]
    assert local.service.in_flight == 0


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_path_cannot_write_lines_of_its_own(style: str, capsys: pytest.CaptureFixture[str]) -> None:
    local = Local(ServerOptions(log_format=style))
    assert local.http.get("/v1/%0A%1b[31mfake" + "x" * 3000).status_code == 404
    logged = capsys.readouterr().err
    assert logged.count("\n") == 1 and "\x1b[31mfake" not in logged and len(logged) < 600


@pytest.mark.parametrize("text", ["\x1b[31mred", "a\x1b]0;title\x07 b", "\x9b31m", "tab\rover", "\x7f\u202eback", "line\u2028"])
def test_text_of_the_model_cannot_drive_the_terminal(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    local = Local(ServerOptions(log_prompts=True))
    local.engine.say(f"{text}</think>{text}")
    local.http.post("/v1/chat/completions", json={"messages": user(text)})
    logged = capsys.readouterr().err
    assert logged.count("\n") == 2 and all(letter.isprintable() for letter in logged.replace("\n", ""))
    for letter in text:
        assert letter in logged or repr(letter)[1:-1] in logged


def test_errors_that_quote_the_model_cannot_either(capsys: pytest.CaptureFixture[str]) -> None:
    local = Local()

    def fails(request: object) -> NoReturn:
        raise RuntimeError("it said \x1b[31mred\x9b")

    local.engine.answer = fails
    assert local.http.post("/v1/chat/completions", json={"messages": user()}).status_code == 500
    logged = capsys.readouterr().err
    assert "RuntimeError" in logged and "\\x1b[31mred\\x9b" in logged and "\x1b" not in logged and "\x9b" not in logged
