"""/v1/completions: plain text goes on, byte for byte; nothing in it is markup."""

from __future__ import annotations

from typing import Any

import pytest

from nautile.server import ServerOptions
from server.local import Local
from server.scripted import Script, calls, ids_of

PATH = "/v1/completions"


def complete(local: Local, **body: Any) -> dict[str, Any]:
    answer = local.http.post(PATH, json={"prompt": "Once", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_text_is_given_as_it_is() -> None:
    local = Local()
    text = "\n\n  upon\na time 🙂 </think> \n"
    local.engine.say(Script(ids_of("\n\n  upon\na time 🙂 ") + local.service.tokenizer.encode("</think> \n")))
    answer = complete(local)
    assert answer["choices"][0]["text"] == text and answer["choices"][0]["finish_reason"] == "stop"
    assert answer["object"] == "text_completion" and answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
    assert list(local.engine.requests[0].prompt_ids) == [0, *ids_of("Once")]


def test_streamed_and_whole_say_the_same() -> None:
    local = Local()
    local.engine.say(" upon a 🙂 time", " upon a 🙂 time")
    whole = complete(local)["choices"][0]["text"]
    chunks = local.chunks(PATH, prompt="Once")
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole == " upon a 🙂 time"
    assert [chunk["usage"] is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_fill_in_the_middle() -> None:
    local = Local()
    complete(local, prompt="def f():\n", suffix="\n    return x")
    assert local.engine.prompt() == "<｜begin▁of▁sentence｜><｜fim▁begin｜>def f():\n<｜fim▁hole｜>\n    return x<｜fim▁end｜>"


def test_a_vocabulary_without_the_middle() -> None:
    from agent.scripted import make_tokenizer  # noqa: PLC0415  # a test helper of another room
    from server.scripted import ScriptedEngine  # noqa: PLC0415

    local = Local(engine=ScriptedEngine(tokenizer=make_tokenizer()))
    code, error = local.refused(PATH, prompt="a", suffix="b")
    assert code == 400 and "suffix" in error["message"] and local.engine.requests == []


def test_prompts_as_ids_and_several_at_once() -> None:
    local = Local()
    local.engine.answer = lambda request: Script(f" of {request.prompt_ids[-1]}")
    answer = complete(local, prompt=[[1, 2], [1, 3]], n=2)
    assert [choice["text"] for choice in answer["choices"]] == [" of 2", " of 2", " of 3", " of 3"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 4 and answer["usage"]["completion_tokens"] == 16  # a prompt counts once
    assert complete(local, prompt=[5, 6])["choices"][0]["text"] == " of 6"
    assert complete(local, prompt=["a", "b"])["choices"][1]["index"] == 1
    assert len({request.id for request in local.engine.requests}) == len(local.engine.requests)


def test_choices_of_one_seed_differ_and_repeat() -> None:
    local = Local()
    for _ in range(2):
        complete(local, n=3, seed=2**64 - 1)
    seeds = [request.sampling.seed for request in local.engine.requests]
    assert seeds[:3] == seeds[3:] and len(set(seeds)) == 3
    complete(local)
    assert local.engine.requests[-1].sampling.seed is None


def test_what_was_cached_of_a_prompt_counts_once_too() -> None:
    local = Local()
    local.engine.say(*[Script(" x", cached=cached) for cached in (2, 3, 1, 0)])
    usage = complete(local, prompt=[[1, 2, 3, 4], [5, 6, 7]], n=2)["usage"]
    assert (usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]) == (7, 3)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("body", [{"n": 3}, {"prompt": ["a", "b", "c"]}, {"prompt": [[1], [2]], "n": 2}])
def test_more_answers_than_a_key_may_run_are_no_matter_of_waiting(body: dict[str, Any]) -> None:
    local = Local(ServerOptions(concurrency=2))
    code, error = local.refused(PATH, **{"prompt": "Once", **body})
    assert code == 400 and error["param"] == "n" and " 2 " in error["message"] and local.engine.requests == []
    assert len(complete(local, n=2)["choices"]) == 2
    local.service.running[""] = 1
    assert local.refused(PATH, prompt="Once", n=2)[0] == 429  # this can be waited for


def test_one_failure_ends_all() -> None:
    local = Local()
    local.engine.say(Script(" a", fail="the device is gone"), Script(" b" * 50, delay=0.02))
    answer = local.http.post(PATH, json={"prompt": ["a", "b"]})
    assert answer.status_code == 500 and local.engine.running == set() and len(local.engine.cancelled) == 1
    assert local.service.in_flight == 0


def test_stop_strings_and_limits() -> None:
    local = Local()
    local.engine.say(" one two STOP three", " one two three")
    choice = complete(local, stop="STOP")["choices"][0]
    assert choice["text"] == " one two " and choice["finish_reason"] == "stop"
    assert complete(local, max_tokens=2)["choices"][0]["finish_reason"] == "length"


def test_logprobs_in_the_older_form() -> None:
    local = Local()
    local.engine.say(" upon a", " upon a")
    logprobs = complete(local, logprobs=2)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [" upon", " a"] and logprobs["text_offset"] == [0, 5]
    assert len(logprobs["token_logprobs"]) == 2 and all(len(top) == 2 for top in logprobs["top_logprobs"])
    parts = [chunk["choices"][0]["logprobs"] for chunk in local.chunks(PATH, prompt="Once", logprobs=0)]
    offsets = [offset for part in parts if part for offset in part["text_offset"]]
    assert offsets == [0, 5]


def test_markup_is_text_here_and_is_scored() -> None:
    local = Local()
    local.engine.say(" a" + calls(("read", {"path": "x"})) + "</think> b")
    choice = complete(local, logprobs=0)["choices"][0]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"] and "</think> b" in choice["text"]


@pytest.mark.parametrize("path", ["/completions", "/beta/completions", "/beta/v1/completions"])
def test_other_addresses(path: str) -> None:
    assert Local().http.post(path, json={"prompt": "a"}).status_code == 200
