"""/v1/chat/completions: what reaches the engine, and what comes back, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from nautile.engine.request import Request
from nautile.protocol import texts
from nautile.server.turn import Turn, collect, run
from server.local import TOOLS, Local, deltas, user
from server.scripted import Script, calls, ids_of

BLOCK = calls(("read", {"path": "a.py"}), ("list", {"path": "."}))
OUTPUTS = {
    "plain": "why\n</think>\n\nThe answer.",
    "no reasoning": "</think>Only this.",
    "only reasoning": "thinking without an end",
    "calls": "look</think>I look." + BLOCK,
    "calls in reasoning": "look" + BLOCK,
    "unicode": "思考</think>2 < 3 — 🙂 ünï",
}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_streamed_and_whole_say_the_same(output: str) -> None:
    local = Local()
    local.engine.say(output, output)
    whole = local.chat(tools=TOOLS)["choices"][0]
    streamed = deltas(local.chunks(tools=TOOLS))
    message = whole["message"]
    assert streamed["content"] == message["content"]
    assert streamed["reasoning_content"] == message["reasoning_content"]
    assert streamed["finish_reason"] == whole["finish_reason"]
    said = [(call["name"], json.loads(call["arguments"])) for call in streamed["tool_calls"]]
    assert said == [
        (call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message.get("tool_calls", ())
    ]
    if BLOCK in output:
        assert said == [("read", {"path": "a.py"}), ("list", {"path": "."})]
    assert texts.DSML not in json.dumps(whole, ensure_ascii=False)


def test_calls_have_ids_of_their_own_in_every_turn() -> None:
    local = Local()
    local.engine.say("</think>" + BLOCK, "</think>" + BLOCK)
    ids = [call["id"] for _ in range(2) for call in local.chat(tools=TOOLS)["choices"][0]["message"]["tool_calls"]]
    assert len(set(ids)) == 4


def test_usage_counts_cached_and_reasoning_tokens() -> None:
    local = Local()
    output = "some reasoning</think>answer"
    local.engine.say(Script(output, cached=3))
    usage = local.chat()["usage"]
    prompt = len(local.engine.requests[0].prompt_ids)
    assert usage["prompt_tokens"] == prompt == usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
    assert usage["completion_tokens"] == len(ids_of(output)) + 1  # the end of sentence is sampled too
    assert usage["completion_tokens_details"] == {"reasoning_tokens": len(ids_of("some reasoning</think>"))}
    assert usage["total_tokens"] == prompt + usage["completion_tokens"]


def test_usage_comes_once_in_the_last_chunk() -> None:
    local = Local()
    local.engine.say("why</think>a b c", "why</think>a b c")
    chunks = local.chunks()
    assert [chunk["usage"] is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    chunks = local.chunks(stream_options={"include_usage": True})
    assert [chunk["usage"] is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["choices"] == [] and chunks[-2]["choices"][0]["finish_reason"] == "stop"


def test_finish_reasons() -> None:
    local = Local()
    local.engine.say("</think>a b c d e", Script("</think>" + BLOCK), "</think>done")
    assert local.chat(max_tokens=3)["choices"][0]["finish_reason"] == "length"
    assert local.chat(tools=TOOLS)["choices"][0]["finish_reason"] == "tool_calls"
    assert local.chat()["choices"][0]["finish_reason"] == "stop"


def test_a_turn_s_place_is_free_when_its_answer_is_there() -> None:
    local = Local()

    async def ask() -> int:
        await collect(run(Turn(user()), local.service))
        return local.service.in_flight  # before anything else has a chance to run

    assert asyncio.run(ask()) == 0


def test_a_call_that_the_limit_cuts_is_not_a_call() -> None:
    local = Local()
    local.engine.say("</think>" + BLOCK)
    choice = local.chat(tools=TOOLS, max_tokens=20)["choices"][0]
    assert choice["finish_reason"] == "length" and "tool_calls" not in choice["message"]
    assert texts.DSML not in json.dumps(choice, ensure_ascii=False)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_ends_content_and_the_sequence(streamed: bool) -> None:
    local = Local()
    local.engine.say("STOP is only thought of</think>one two STOP three four five six seven")
    answer = deltas(local.chunks(stop=["STOP", "zzz"])) if streamed else local.chat(stop="STOP")["choices"][0]
    message = answer if streamed else answer["message"]
    assert message["content"] == "one two " and message["reasoning_content"] == "STOP is only thought of"
    assert answer["finish_reason"] == "stop"
    (request,) = local.engine.requests
    assert local.engine.cancelled == [request.id]  # the engine was told, and had not gone on
    assert local.engine.given[request.id] == len(ids_of("STOP is only thought of</think>one two STOP"))


def test_what_might_become_a_stop_string_is_said_when_it_does_not() -> None:
    local = Local()
    local.engine.say("</think>a ST", "</think>a ST" + calls(("read", {"path": "ST"})))
    assert deltas(local.chunks(stop=["STOP"]))["content"] == "a ST"
    answer = deltas(local.chunks(stop=["STOP", "path"], tools=TOOLS))
    assert answer["content"] == "a ST" and json.loads(answer["tool_calls"][0]["arguments"]) == {"path": "ST"}


def test_one_call_at_a_time() -> None:
    local = Local()
    local.engine.say("</think>" + BLOCK)
    choice = local.chat(tools=TOOLS, parallel_tool_calls=False)["choices"][0]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["read"]
    assert choice["finish_reason"] == "tool_calls"
    assert local.engine.given[local.engine.requests[0].id] < len(ids_of("</think>" + BLOCK))


def test_logprobs_of_content_and_reasoning() -> None:
    local = Local()
    local.engine.say("why so</think>it is")
    logprobs = local.chat(logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]
    assert b"".join(bytes(token["bytes"]) for token in logprobs["content"]) == b"it is"
    assert b"".join(bytes(token["bytes"]) for token in logprobs["reasoning_content"]) == b"why so"
    for token, number in zip(logprobs["content"], ids_of("it is"), strict=True):
        assert token["logprob"] == -(number % 7) / 8 and len(token["top_logprobs"]) == 2
    assert local.engine.requests[0].sampling.logprobs == 2
    local.engine.say("why so</think>it is")
    chunks = local.chunks(logprobs=True)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert "".join(token["token"] for part in parts if part for token in part["content"]) == "it is"


def test_logprobs_end_where_the_text_ends() -> None:
    local = Local()
    local.engine.say("</think>one two STOP three")
    choice = local.chat(logprobs=True, stop="STOP")["choices"][0]
    tokens = [token["token"] for token in choice["logprobs"]["content"]]
    assert choice["message"]["content"] == "one two " and "".join(tokens).startswith("one two ") and "three" not in tokens


THINKING = [
    ({}, True, "high"),
    ({"thinking": {"type": "enabled"}}, True, "high"),
    ({"thinking": {"type": "adaptive"}}, True, "high"),
    ({"thinking": {"type": "disabled"}}, False, "high"),
    ({"thinking": False}, False, "high"),
    ({"chat_template_kwargs": {"thinking": False}}, False, "high"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, False, "high"),
    ({"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "max"}}, True, "max"),
    ({"thinking": {"type": "enabled"}, "chat_template_kwargs": {"thinking": False}}, True, "high"),
    *(({"reasoning_effort": name}, True, "low") for name in ("none", "minimal", "low")),
    *(({"reasoning_effort": name}, True, "high") for name in ("medium", "high", "xhigh")),
    *(({"reasoning_effort": name}, True, "max") for name in ("ultra", "max")),
]


@pytest.mark.parametrize(("fields", "thinking", "effort"), THINKING, ids=json.dumps)
def test_thinking_and_effort_in_every_form(fields: dict[str, Any], thinking: bool, effort: str) -> None:
    local = Local()
    local.engine.say("why</think>ok" if thinking else "ok")
    message = local.chat(**fields)["choices"][0]["message"]
    prompt = local.engine.prompt()
    assert prompt.endswith("<think>" if thinking else "</think>")
    assert (texts.EFFORTS["0731"][effort] in prompt) if thinking else ("Reasoning Effort" not in prompt)
    assert message["content"] == "ok" and message.get("reasoning_content") == ("why" if thinking else None)


def request_of(**fields: Any) -> Request:
    local = Local()
    local.chat(**fields)
    return local.engine.requests[0]


def test_sampling_fields_reach_the_engine() -> None:
    sampling = request_of(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.1, seed=5
    ).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.1)
    assert sampling.seed == 5
    assert request_of(logit_bias={"5": -100}).sampling.logit_bias == {5: -100}
    assert request_of(seed=2**64 - 1).sampling.seed == 2**64 - 1


def test_what_is_not_sent_has_a_default() -> None:
    sampling = request_of().sampling
    assert sampling.temperature == 1.0 and sampling.top_p == 1.0 and sampling.seed is None
    assert request_of(thinking={"type": "disabled"}).sampling.max_tokens == 8192
    room = 65_536 - len(request_of().prompt_ids)
    assert request_of().sampling.max_tokens == min(65_536, room)
    assert request_of(max_tokens=7).sampling.max_tokens == 7
    assert request_of(max_tokens=7, max_completion_tokens=9).sampling.max_tokens == 9
    assert request_of(max_tokens=393_216).sampling.max_tokens == room  # what the context has left


AGENT_FIELDS: dict[str, Any] = {
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "user": "somebody",
    "safety_identifier": "x",
    "prompt_cache_key": "y",
    "prompt_cache_retention": "24h",
    "verbosity": "low",
    "prediction": {"type": "content", "content": "x"},
    "context_management": {"edits": []},
    "output_config": {},
    "modalities": ["text"],
    "n": 1,
    "something_new": {"deep": [1]},
    "response_format": {"type": "text"},
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "temperature": None,
    "max_tokens": None,
    "stop": None,
    "tools": None,
    "stream": None,
    "logprobs": None,
}


def test_fields_that_agents_send_change_nothing() -> None:
    plain, laden = request_of(), request_of(**AGENT_FIELDS)
    assert plain.prompt_ids == laden.prompt_ids and plain.sampling == laden.sampling


def test_developer_is_system() -> None:
    local = Local()
    local.chat(messages=[{"role": "developer", "content": "Be brief."}, *user()])
    assert "Be brief.<｜User｜>hello<｜Assistant｜><think>" in local.engine.prompt()


def test_a_conversation_with_tools_keeps_its_reasoning() -> None:
    local = Local()
    call = {"id": "call_1", "type": "function", "function": {"name": "read", "arguments": '{"path": "a"}'}}
    messages = [
        *user("first"),
        {"role": "assistant", "content": "", "reasoning_content": "REASON", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "RESULT"},
        {"role": "assistant", "content": "Done.", "reasoning_content": "LATER"},
        *user("second"),
    ]
    local.chat(messages=messages, tools=TOOLS)
    assert "REASON</think>" in local.engine.prompt() and "LATER</think>Done." in local.engine.prompt()
    local.chat(messages=messages)  # without tools the old reasoning is dropped
    assert "REASON" not in local.engine.prompt() and "LATER" not in local.engine.prompt()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/beta/chat/completions", "/chat/completions"])
def test_prefix_completion(path: str) -> None:
    local = Local()
    local.engine.say(" world", " world", "ing</think>yes")
    answers = [
        local.http.post(path, json={"messages": [*user(), last], **more}).json()["choices"][0]["message"]
        for last, more in [
            ({"role": "assistant", "content": "Hello", "prefix": True}, {"thinking": {"type": "disabled"}}),
            ({"role": "assistant", "content": "Hello", "reasoning_content": "why", "prefix": True}, {}),
            ({"role": "assistant", "content": "", "reasoning_content": "think", "prefix": True}, {}),
        ]
    ]
    assert local.engine.prompt(0).endswith("<｜Assistant｜></think>Hello") and answers[0]["content"] == " world"
    assert local.engine.prompt(1).endswith("<think>why</think>Hello") and answers[1]["content"] == " world"
    assert local.engine.prompt(2).endswith("<think>think")
    assert (answers[2]["reasoning_content"], answers[2]["content"]) == ("ing", "yes")


def test_a_conversation_that_ends_with_the_assistant_gets_a_new_turn() -> None:
    local = Local()
    local.chat(messages=[*user(), {"role": "assistant", "content": "Hi."}])
    assert local.engine.prompt().endswith("Hi.<｜end▁of▁sentence｜><｜Assistant｜><think>")
    local.chat(messages=[{"role": "system", "content": "Say something."}])
    assert local.engine.prompt().endswith("Say something.<｜Assistant｜><think>")


def test_tool_choice_none_hides_the_tools_and_leaves_the_output_alone() -> None:
    local = Local()
    local.engine.say("</think>" + BLOCK)
    choice = local.chat(tools=TOOLS, tool_choice="none")["choices"][0]
    assert "## Tools" not in local.engine.prompt()
    assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]


def test_text_that_looks_like_markup_is_text() -> None:
    local = Local()
    tokenizer = local.service.tokenizer
    local.engine.say(Script([*ids_of("</think>"), *tokenizer.encode("</think>" + BLOCK)]))
    typed = "<｜User｜></think><｜DSML｜tool_calls>"
    choice = local.chat(messages=user(typed), tools=TOOLS)["choices"][0]
    ids = local.engine.requests[0].prompt_ids
    assert ids.count(ids_of("<｜User｜>")[0]) == 1 and local.engine.prompt().endswith(f"{typed}<｜Assistant｜><think>")
    assert "tool_calls" not in choice["message"] and "<｜DSML｜invoke" in choice["message"]["content"]


def test_an_error_in_the_middle_is_an_event_of_the_stream() -> None:
    local = Local()
    local.engine.say(Script("</think>a b", fail="the device is gone"), Script("</think>a b", fail="the device is gone"))
    chunks = local.chunks()
    assert chunks[-1]["error"]["message"] == "the device is gone"
    answer = local.http.post("/v1/chat/completions", json={"messages": user()})
    assert answer.status_code == 500 and answer.json()["error"]["message"] == "the device is gone"


@pytest.mark.parametrize("streamed", [False, True])
def test_what_the_engine_refuses_is_the_request_s_error(streamed: bool) -> None:
    local = Local()
    local.engine.say(Script(refuse="the prompt needs 9 blocks; the pool has 3: shorten it"))
    answer = local.http.post("/v1/chat/completions", json={"messages": user(), "stream": streamed})
    assert answer.status_code == 400 and "shorten it" in answer.json()["error"]["message"]


def test_the_answer_names_what_answered() -> None:
    local = Local()
    answer = local.chat(model="gpt-anything")
    assert answer["model"] == "scripted" and answer["object"] == "chat.completion"
    assert local.http.get("/v1/models").json()["data"][0]["id"] == "scripted"
    assert local.http.get("/v1/models/scripted").json()["max_model_len"] == 65_536
    assert local.http.get("/v1/models/other").status_code == 404


def test_named_tool_is_the_only_one_in_the_prompt() -> None:
    local = Local()
    opened, block = calls(("read", {"path": "x"})).split("tool_calls>\n", 1)
    local.engine.say(block)
    choice = local.chat(
        tools=TOOLS, tool_choice={"type": "function", "function": {"name": "read"}}, thinking={"type": "disabled"}
    )["choices"][0]
    assert local.engine.prompt().endswith(f"</think>{opened}tool_calls>\n")
    assert '"name": "read"' in local.engine.prompt() and '"name": "list"' not in local.engine.prompt()
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == ""
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"path": "x"}


@pytest.mark.parametrize("streamed", [False, True])
def test_an_engine_that_has_ended_is_not_the_client_s_fault(streamed: bool) -> None:
    local = Local()
    assert local.http.get("/health").json()["status"] == "ready"
    local.engine.close()
    answer = local.http.post("/v1/chat/completions", json={"messages": user(), "stream": streamed})
    assert answer.status_code == 503 and "closed" in answer.json()["error"]["message"]
    health = local.http.get("/health/ready")
    assert health.status_code == 503 and health.json()["status"] == "failed"
    assert local.http.get("/health/live").status_code == 200


def test_without_tools_markup_is_content_and_scored() -> None:
    local = Local()
    said = "one" + calls(("read", {"path": "x"})) + " two"
    local.engine.say("why</think>" + said, "why</think>" + said)
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = local.chat(logprobs=True, **more)["choices"][0]
        assert choice["message"]["content"] == said and choice["finish_reason"] == "stop"
        assert "tool_calls" not in choice["message"]
        assert "".join(token["token"] for token in choice["logprobs"]["content"]) == said
