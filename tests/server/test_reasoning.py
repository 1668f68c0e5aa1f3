"""Reasoning across turns: a client that drops it gets it restored, so that the prompt goes on from where it was."""

from __future__ import annotations

from typing import Any

import pytest

from nautile.server import ServerOptions
from server.local import TOOLS, Local, user
from server.scripted import calls

OUTPUT = "I must read it.\nThen list.</think>I look." + calls(("read", {"path": "a"}))


def dropped(message: dict[str, Any]) -> dict[str, Any]:
    """The message as most clients send it back."""
    return {key: value for key, value in message.items() if key != "reasoning_content"}


def results(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "tool", "tool_call_id": call["id"], "content": "RESULT"} for call in message["tool_calls"]]


@pytest.mark.parametrize("sends_it_back", [True, False])
def test_the_next_prompt_goes_on_from_the_sampled_tokens(sends_it_back: bool) -> None:
    local = Local()
    local.engine.say(OUTPUT, "Done thinking.</think>Done.", "</think>Bye.")
    history = user()
    for said in ("", "more"):
        message = local.chat(messages=history, tools=TOOLS)["choices"][0]["message"]
        history = [*history, message if sends_it_back else dropped(message)]
        history += results(message) if message.get("tool_calls") else user(said)
    local.chat(messages=history, tools=TOOLS)
    prompts = [local.engine.prompt(number) for number in range(3)]
    assert prompts[1].startswith(prompts[0] + OUTPUT + "<｜end▁of▁sentence｜>")  # every token of it can come from the cache
    assert prompts[2].startswith(prompts[1] + "Done thinking.</think>Done.<｜end▁of▁sentence｜>")


def test_without_tools_it_is_dropped_at_the_next_user() -> None:
    local = Local()
    local.engine.say("REASON</think>Hi.", "</think>Bye.")
    message = local.chat()["choices"][0]["message"]
    local.chat(messages=[*user(), dropped(message), *user("more")])
    assert "REASON" not in local.engine.prompt() and "</think>Hi." in local.engine.prompt()


def test_streams_are_remembered_too() -> None:
    local = Local()
    local.engine.say("REASON</think>Hi.", "</think>Bye.")
    local.chunks(tools=TOOLS)
    local.chat(messages=[*user(), {"role": "assistant", "content": "Hi."}, *user("more")], tools=TOOLS)
    assert "<think>REASON</think>Hi." in local.engine.prompt()


def test_nobody_gets_another_key_s_reasoning() -> None:
    local = Local(ServerOptions(api_keys=("key-of-anna", "key-of-bert")))
    local.engine.say("SECRET</think>Hi.", "</think>Bye.", "</think>Bye.")
    history = [*user(), {"role": "assistant", "content": "Hi."}, *user("more")]
    for key, messages in (("anna", user()), ("bert", history), ("anna", history)):
        body = {"messages": messages, "tools": TOOLS}
        assert local.http.post("/v1/chat/completions", json=body, headers={"x-api-key": f"key-of-{key}"}).status_code == 200
    assert "SECRET" not in local.engine.prompt(1) and "SECRET" in local.engine.prompt(2)


def test_strict_reasoning_answers_as_the_hosted_api() -> None:
    local = Local(ServerOptions(strict_reasoning=True))
    local.engine.say(OUTPUT, "</think>Done.")
    message = local.chat(tools=TOOLS)["choices"][0]["message"]
    code, error = local.refused(messages=[*user(), dropped(message), *results(message)], tools=TOOLS)
    assert code == 400
    assert error["message"] == "The `reasoning_content` in the thinking mode must be passed back to the API."
    assert (
        local.chat(messages=[*user(), message, *results(message)], tools=TOOLS)["choices"][0]["message"]["content"] == "Done."
    )


def test_an_answer_that_its_limit_cut_is_remembered_as_far_as_it_went() -> None:
    local = Local()
    local.engine.say("one two three</think>Hi.", "</think>Bye.")
    message = local.chat(max_tokens=2, tools=TOOLS)["choices"][0]["message"]
    assert message["content"] == "" and message["reasoning_content"] == "one two"
    local.chat(messages=[*user(), dropped(message), *user("go on")], tools=TOOLS)
    assert "<think>one two</think>" in local.engine.prompt()


def test_what_was_put_back_and_what_could_not_be_is_counted() -> None:
    local = Local()
    local.engine.say("REASON</think>Hi.", "</think>Bye.")
    local.chat(tools=TOOLS)
    unknown = [*user("another"), {"role": "assistant", "content": "Never said."}, *user("more")]
    for history in ([*user(), {"role": "assistant", "content": "Hi."}, *user("more")], unknown):
        local.chat(messages=history, tools=TOOLS)
    lines = local.http.get("/metrics").text.splitlines()
    for figure in ("restored_total 1.0", "missing_total 1.0", "evicted_total 0.0", "answers 1.0"):
        assert f"nautile_reasoning_{figure}" in lines
