"""/v1/messages: blocks in, blocks out, the order of events, counting, and what is refused."""

from __future__ import annotations

import json

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautile.protocol import ContentDelta, ReasoningDelta, ToolCall, ToolCallEnd, encode
from nautile.server import ServerOptions
from nautile.server.messages_events import MessageWriter
from nautile.server.messages_request import Wanted
from nautile.server.toolnames import ToolNames
from nautile.server.turn import Turn, TurnFinished, TurnStarted, TurnUsage
from server.live import Live, serving
from server.scripted import Script, calls

SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
READ = {"name": "read", "description": "Read.", "input_schema": SCHEMA}
CHAT_READ = {"type": "function", "function": {"name": "read", "description": "Read.", "parameters": SCHEMA}}
THINK = {"thinking": {"type": "adaptive"}}


@pytest.fixture(scope="module")
def server():
    with serving() as live:
        yield live


@pytest.fixture
def live(server: Live) -> Live:
    server.reset()
    return server


def ask(live: Live, **body):
    return live.post(
        "/v1/messages", **{"model": "m", "max_tokens": 900, "messages": [{"role": "user", "content": "hi"}], **body}
    )


def test_answer_has_thinking_text_and_usage_without_the_cached(live):
    live.engine.say(Script("because\nso</think>Hello", cached=8))
    answer = ask(live, **THINK, system="Be brief.")
    assert (answer["type"], answer["role"], answer["stop_reason"]) == ("message", "assistant", "end_turn")
    thinking, text = answer["content"]
    assert thinking["thinking"] == "because\nso" and thinking["signature"] and text == {"type": "text", "text": "Hello"}
    request, usage = live.engine.requests[0], answer["usage"]
    assert usage["cache_read_input_tokens"] == 8 and usage["input_tokens"] == len(request.prompt_ids) - 8
    assert 0 < usage["output_tokens_details"]["thinking_tokens"] < usage["output_tokens"]
    assert request.sampling.max_tokens == 900


def test_without_thinking_the_first_block_is_text(live):
    """What ``message.content[0].text`` of so much code stands on."""
    live.engine.say("Hello")
    assert ask(live)["content"] == [{"type": "text", "text": "Hello"}]
    assert live.engine.prompt().endswith("<｜Assistant｜></think>")


def test_blocks_sent_back_give_the_prompt_of_the_encoder(live):
    live.engine.say("look first</think>I look." + calls(("read", {"path": "a"}), ("read", {"path": "b"})))
    first = {"role": "user", "content": [{"type": "text", "text": "What is in them?", "cache_control": {"type": "ephemeral"}}]}
    made = ask(live, **THINK, messages=[first], tools=[READ])
    assert made["stop_reason"] == "tool_use"
    assert [block["type"] for block in made["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    assert made["content"][2]["input"] == {"path": "a"}
    ids = [block["id"] for block in made["content"][2:]]
    results = [
        {"type": "tool_result", "tool_use_id": ids[1], "content": [{"type": "text", "text": "no such file"}], "is_error": True},
        {"type": "tool_result", "tool_use_id": ids[0], "content": "seven"},
        {"type": "text", "text": "Go on."},
    ]
    history = [first, {"role": "assistant", "content": made["content"]}, {"role": "user", "content": results}]
    ask(live, **THINK, messages=history, tools=[READ])
    arguments = [{"path": "a"}, {"path": "b"}]
    functions = [
        {"id": id, "function": {"name": "read", "arguments": given}} for id, given in zip("ab", arguments, strict=True)
    ]
    messages = [
        {"role": "user", "content": "What is in them?"},
        {"role": "assistant", "reasoning_content": "look first", "content": "I look.", "tool_calls": functions},
        {"role": "tool", "tool_call_id": "a", "content": "seven"},
        {"role": "tool", "tool_call_id": "b", "content": "Error: no such file"},
        {"role": "user", "content": "Go on."},
    ]
    expected = encode(messages, tokenizer=live.engine.tokenizer, tools=[CHAT_READ], effort="high").ids
    assert list(live.engine.requests[-1].prompt_ids) == expected
    assert live.engine.prompt(1).startswith(live.engine.prompt(0) + "look first</think>I look.\n\n<")


def test_a_conversation_from_elsewhere_is_read_whole(live):
    """Thinking and pieces of an answer that this server never wrote, so that its memory cannot help."""
    blocks = [
        {"type": "thinking", "thinking": "ELSEWHERE", "signature": "x"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": "first"},
        {"type": "text", "text": "second"},
        {"type": "tool_use", "id": "c", "name": "read", "input": {}},
    ]
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c"}]}
    ask(live, **THINK, messages=[USER, {"role": "assistant", "content": blocks}, result], tools=[READ])
    assert "<think>ELSEWHERE</think>first\n\nsecond\n\n<｜DSML｜tool_calls>" in live.engine.prompt()


def test_system_blocks_are_joined_and_the_billing_note_left_out(live):
    blocks = ["x-anthropic-billing-header: cc_version=1;", "You code.", "Be careful."]
    ask(live, system=[{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}} for text in blocks])
    assert live.engine.prompt() == "<｜begin▁of▁sentence｜>You code.\n\nBe careful.<｜User｜>hi<｜Assistant｜></think>"


def test_system_inside_a_conversation_stays_where_it_is(live):
    ask(live, messages=[{"role": "user", "content": "hi"}, {"role": "system", "content": "Agents: none."}])
    assert "<｜User｜>hi\n\nAgents: none.<｜Assistant｜>" in live.engine.prompt()


def test_last_assistant_message_is_gone_on_with(live):
    live.engine.say("lue")
    answer = ask(live, messages=[{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "It is b"}])
    assert answer["content"][0]["text"] == "lue"
    assert live.engine.prompt().endswith("Sky?<｜Assistant｜></think>It is b")


def test_stream_tells_every_block_in_order(live):
    live.engine.say(Script("hm</think>ok" + calls(("read", {"path": "a"}), ("read", {"path": "b"})), cached=3))
    events = live.events("/v1/messages", max_tokens=900, messages=[{"role": "user", "content": "x"}], tools=[READ], **THINK)
    kinds = [(event["type"], event.get("delta", {}).get("type")) for event in events]
    squeezed = [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before]

    def block(*deltas):
        return [
            ("content_block_start", None),
            *(("content_block_delta", name) for name in deltas),
            ("content_block_stop", None),
        ]

    assert squeezed == [
        *(("message_start", None), ("ping", None)),
        *block("thinking_delta", "signature_delta"),
        *block("text_delta"),
        *block("input_json_delta"),
        *block("input_json_delta"),
        *(("message_delta", None), ("message_stop", None)),
    ]
    start, end = events[0]["message"], events[-2]
    assert start["content"] == [] and start["stop_reason"] is None and start["usage"]["cache_read_input_tokens"] == 3
    assert end["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert end["usage"]["input_tokens"] == start["usage"]["input_tokens"] > 0 < end["usage"]["output_tokens"]
    assert all(
        event["content_block"]["input"] == {} for event in events if event.get("content_block", {}).get("type") == "tool_use"
    )


def test_stop_reasons(live):
    live.engine.say("one two three four five", "one STOP two")
    assert ask(live, max_tokens=2)["stop_reason"] == "max_tokens"
    stopped = ask(live, stop_sequences=["STOP"])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "STOP")
    assert stopped["content"][0]["text"] == "one "


def test_failure_in_the_middle_is_the_last_event(live):
    live.engine.say(Script("half", fail="the card fell off"))
    last = live.events("/v1/messages", messages=[{"role": "user", "content": "hi"}])[-1]
    assert last["type"] == "error" and last["error"] == {"type": "api_error", "message": "the card fell off"}


def test_count_is_that_of_the_prompt(live):
    body = {"system": "Be brief.", "messages": [{"role": "user", "content": "hi"}], "tools": [READ], **THINK}
    counted = live.post("/v1/messages/count_tokens", model="m", **body)
    assert not live.engine.requests
    ask(live, **body)
    assert counted == {"input_tokens": len(live.engine.requests[0].prompt_ids)}


@pytest.mark.parametrize(
    ("effort", "start"), [("low", "<｜User｜>"), ("high", "Reasoning Effort: Absolute"), ("max", "Reasoning Effort: Beyond")]
)
def test_efforts(live, effort, start):
    ask(live, **THINK, output_config={"effort": effort})
    assert live.engine.prompt().removeprefix("<｜begin▁of▁sentence｜>").startswith(start)


def test_tool_choice(live):
    live.engine.say(calls(("read", {"path": "a"})).split("tool_calls>\n", 1)[1])
    answer = ask(live, tools=[READ, {**READ, "name": "write"}], tool_choice={"type": "tool", "name": "read"})
    assert answer["content"] == [{**answer["content"][0], "type": "tool_use", "name": "read", "input": {"path": "a"}}]
    assert live.engine.prompt().endswith("tool_calls>\n") and '"name": "write"' not in live.engine.prompt()
    live.engine.say("fine")
    ask(live, tools=[READ], tool_choice={"type": "none"})
    assert '"name": "read"' not in live.engine.prompt()
    live.engine.say("x</think>" + calls(("read", {"path": "a"}), ("read", {"path": "b"})))
    one = ask(live, **THINK, tools=[READ], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block["type"] for block in one["content"]] == ["thinking", "tool_use"]


def test_odd_names_come_back_as_they_were(live):
    live.engine.say("x</think>" + calls(("mcp__files_read_it", {"path": "a"})))
    assert ask(live, **THINK, tools=[{**READ, "name": "mcp__files.read:it"}])["content"][1]["name"] == "mcp__files.read:it"


def test_what_agents_send_beside_is_ignored(live):
    more = {"metadata": {"user_id": "u"}, "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}}
    more |= {"service_tier": "auto", "top_k": 5, "top_p": 0.9, "temperature": 0.5, "unknown": 1}
    tools = [
        {**READ, "cache_control": {"type": "ephemeral"}, "eager_input_streaming": True},
        {"type": "web_search_20250305", "name": "web_search"},
    ]
    live.engine.say("fine")
    answer = httpx.post(
        live.url + "/v1/messages?beta=true",
        json={
            "model": "claude-opus-4-8",
            "max_tokens": 64000,
            "messages": [{"role": "user", "content": "hi"}],
            "tools": tools,
            **more,
        },
        headers={"anthropic-version": "2023-06-01", "anthropic-beta": "context-management-2025-06-27,effort-2025-11-24"},
        timeout=60,
    )
    assert answer.status_code == 200 and answer.json()["content"][0]["text"] == "fine"
    sampling = live.engine.requests[0].sampling
    assert (sampling.top_k, sampling.top_p, sampling.temperature) == (5, 0.9, 0.5)
    assert '"name": "read"' in live.engine.prompt() and "web_search" not in live.engine.prompt()


def test_what_is_not_text_leaves_a_mark(live):
    source = {"type": "base64", "media_type": "image/png", "data": ""}
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "the text"}}
    ask(live, messages=[{"role": "user", "content": [{"type": "image", "source": source}, document]}])
    assert "<｜User｜>[Unsupported Image]\n\nthe text<" in live.engine.prompt()


USER = {"role": "user", "content": "hi"}
USE = {"type": "tool_use", "id": "1", "name": "read", "input": {}}
FAULTS = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role must be one of"),
    ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type is missing"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]}, "tool_use_id is missing"),
    ({"messages": [USER, {"role": "assistant", "content": [{"type": "server_tool_use"}]}]}, "server_tool_use"),
    ({"messages": [USER, {"role": "assistant", "content": [{**USE, "input": "x"}]}]}, "input must be an object"),
    ({"messages": [USER, {"role": "assistant", "content": [USE]}]}, "tool_result for each"),
    ({"tools": [READ, READ]}, "Tool names must be unique."),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "input_schema"),
    ({"tool_choice": {"type": "tool", "name": "nope"}, "tools": [READ]}, "tool_choice"),
    ({"tool_choice": {"type": "any"}}, "send tools"),
    ({"mcp_servers": [{"url": "x"}]}, "MCP"),
    ({"thinking": {"type": "sometimes"}}, "thinking"),
    ({"output_config": {"effort": "enormous"}}, "output_config.effort"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"stop_sequences": [""]}, "stop"),
    ({"temperature": 3}, "temperature"),
]


@pytest.mark.parametrize(("body", "text"), FAULTS, ids=[text for _, text in FAULTS])
def test_fault_is_named_and_the_engine_untouched(live, body, text):
    answer = ask(live, **body)
    assert answer["type"] == "error" and answer["error"]["type"] == "invalid_request_error"
    assert text in answer["error"]["message"]
    assert not live.engine.requests


def test_both_kinds_of_key():
    with serving(ServerOptions(api_keys=("key-of-eight",))) as live:
        body = {"model": "m", "max_tokens": 5, "messages": [USER]}
        for headers, status in (
            ({"x-api-key": "key-of-eight"}, 200),
            ({"Authorization": "Bearer key-of-eight"}, 200),
            ({"x-api-key": "no"}, 401),
        ):
            answer = httpx.post(live.url + "/v1/messages", json=body, headers=headers, timeout=60)
            assert answer.status_code == status
        assert answer.json()["error"]["type"] == "authentication_error"


# The writer alone: whatever the turn says, the stream adds up to the message

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5)
turns = st.lists(
    st.one_of(
        texts.map(ReasoningDelta),
        texts.map(ContentDelta),
        texts.map(lambda text: ToolCallEnd(0, ToolCall("id", "read", json.dumps({"path": text})))),
    ),
    max_size=12,
)


@given(turns, st.sampled_from(["stop", "length", "tool_calls"]))
def test_stream_adds_up_to_the_message(turn, reason):
    writer = MessageWriter(Wanted(Turn(({"role": "user", "content": "x"},), id="t"), ToolNames()), "m")
    whole = [TurnStarted(1, 0), *turn, TurnFinished(reason, TurnUsage(1, 0, 1, 0))]
    events = [json.loads(json.dumps(event)) for item in whole for event in writer.events(item)]
    message, partial, open_index = events[0]["message"], "", None
    for event in events[1:]:
        kind = event["type"]
        if kind == "content_block_start":
            assert open_index is None and event["index"] == len(message["content"])
            open_index, partial = event["index"], ""
            message["content"].append(event["content_block"])
        elif kind == "content_block_delta":
            assert event["index"] == open_index
            block, delta = message["content"][-1], event["delta"]
            if delta["type"] == "input_json_delta":
                partial += delta["partial_json"]
            else:
                field = delta["type"].removesuffix("_delta")
                block[field] = block[field] + delta[field]
        elif kind == "content_block_stop":
            assert event["index"] == open_index
            open_index = None
            if partial:
                message["content"][-1]["input"] = json.loads(partial)
        elif kind == "message_delta":
            message |= {**event["delta"], "usage": event["usage"]}
    assert open_index is None and events[-1] == {"type": "message_stop"}
    assert message == writer.message
