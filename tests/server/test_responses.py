"""/v1/responses: items in, items out, the order of events, and what is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautile.protocol import ContentDelta, ReasoningDelta, ToolCall, ToolCallEnd, encode
from nautile.server.responses_events import ResponseWriter
from nautile.server.responses_request import ResponsesRequest, Wanted
from nautile.server.toolnames import ToolNames
from nautile.server.turn import Turn, TurnFinished, TurnStarted, TurnUsage
from server.live import Live, serving
from server.scripted import Script, calls

READ = {
    "type": "function",
    "name": "read",
    "description": "Read.",
    "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
}
CHAT_READ = {"type": "function", "function": {key: READ[key] for key in ("name", "description", "parameters")}}


@pytest.fixture(scope="module")
def server():
    with serving() as live:
        yield live


@pytest.fixture
def live(server: Live) -> Live:
    server.reset()
    return server


def ask(live: Live, **body):
    return live.post("/v1/responses", **{"model": "m", "input": "hi", **body})


def test_answer_has_reasoning_message_and_usage(live):
    live.engine.say(Script("because\nso</think>Hello", cached=8))
    answer = ask(live, instructions="Be brief.", metadata={"a": "b"}, max_output_tokens=500)
    assert answer["object"] == "response" and answer["status"] == "completed" and answer["error"] is None
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message"]
    assert answer["output"][0]["content"] == [{"type": "reasoning_text", "text": "because\nso"}]
    assert answer["output"][1]["content"][0]["text"] == "Hello"
    assert answer["instructions"] == "Be brief." and answer["metadata"] == {"a": "b"} and answer["store"] is False
    usage, request = answer["usage"], live.engine.requests[0]
    assert usage["input_tokens"] == len(request.prompt_ids) and usage["input_tokens_details"]["cached_tokens"] == 8
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]
    assert request.sampling.max_tokens == 500


def conversation(live: Live) -> list[dict]:
    """A conversation with every kind of item, the reasoning and call of which came from the server."""
    live.engine.say("look first</think>I look." + calls(("read", {"path": "a.txt"})))
    first = [
        {"role": "developer", "content": "You read."},
        {"role": "user", "content": [{"type": "input_text", "text": "What is in a.txt?"}]},
    ]
    made = ask(live, input=first, tools=[READ])["output"]
    assert [item["type"] for item in made] == ["reasoning", "message", "function_call"]
    return [
        *first,
        *made,
        {"type": "function_call_output", "call_id": made[2]["call_id"], "output": [{"type": "input_text", "text": "seven"}]},
    ]


def test_items_sent_back_give_the_prompt_of_the_encoder(live):
    items = conversation(live)
    live.engine.say("I know</think>seven")
    answer = ask(live, input=[*items, {"role": "user", "content": "And?"}], tools=[READ])
    assert answer["output"][1]["content"][0]["text"] == "seven"
    call = {"id": "1", "type": "function", "function": {"name": "read", "arguments": '{"path": "a.txt"}'}}
    messages = [
        {"role": "system", "content": "You read."},
        {"role": "user", "content": "What is in a.txt?"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "look first", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "seven"},
        {"role": "user", "content": "And?"},
    ]
    expected = encode(messages, tokenizer=live.engine.tokenizer, tools=[CHAT_READ], effort="high").ids
    assert list(live.engine.requests[-1].prompt_ids) == expected


def test_each_request_extends_the_prompt_before_it(live):
    """What the cache needs: prompt and answer are the beginning of the next prompt."""
    items = conversation(live)
    before = live.engine.requests[0]
    ask(live, input=items, tools=[READ])
    produced = live.engine.prompt(0)
    assert live.engine.prompt(1).startswith(produced + "look first</think>I look.\n\n<")
    assert live.engine.requests[1].prompt_ids[: len(before.prompt_ids)] == before.prompt_ids


def test_a_conversation_from_elsewhere_is_read_whole(live):
    """Reasoning and pieces of an answer that this server never wrote, so that its memory cannot help."""
    items = [
        {"role": "user", "content": "one"},
        {
            "type": "reasoning",
            "id": "r1",
            "summary": [{"type": "summary_text", "text": "short"}],
            "content": [{"type": "reasoning_text", "text": "ELSEWHERE"}],
        },
        {"role": "assistant", "content": [{"type": "output_text", "text": "first"}]},
        {"role": "assistant", "content": "second"},
        {"type": "function_call", "call_id": "c", "name": "read", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "x"},
    ]
    ask(live, input=items, tools=[READ])
    assert "<think>ELSEWHERE</think>first\n\nsecond\n\n<｜DSML｜tool_calls>" in live.engine.prompt()


def test_instructions_inside_a_conversation_stay_where_they_are(live):
    items = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "system", "content": "now French"},
    ]
    ask(live, input=[*items, {"role": "user", "content": "three"}])
    assert "<｜User｜>now French\n\nthree<｜Assistant｜>" in live.engine.prompt()


def test_stream_tells_every_item_in_order(live):
    live.engine.say("hm</think>ok" + calls(("read", {"path": "a"}), ("read", {"path": "b"})))
    events = live.events("/v1/responses", model="m", input="hi", tools=[READ])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    squeezed = [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before]
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    part = ["output_item.added", "content_part.added"]
    done = ["content_part.done", "output_item.done"]
    assert squeezed == [
        *("created", "in_progress"),
        *(*part, "reasoning_text.delta", "reasoning_text.done", *done),
        *(*part, "output_text.delta", "output_text.done", *done),
        *call,
        *call,
        "completed",
    ]
    final = events[-1]["response"]
    assert [item["status"] for item in final["output"]] == ["completed"] * 4
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == final["output"]
    assert all(event["response"]["output"] == [] and event["response"]["usage"] is None for event in events[:2])


def test_cut_answer_is_incomplete(live):
    live.engine.say("one two three four five six seven")
    answer = ask(live, max_output_tokens=3)
    assert answer["status"] == "incomplete" and answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][-1]["status"] == "incomplete" and answer["usage"]["output_tokens"] == 3
    live.engine.say("one two three four five six seven")
    assert live.events("/v1/responses", model="m", input="hi", max_output_tokens=3)[-1]["type"] == "response.incomplete"


def test_failure_in_the_middle_is_the_last_event(live):
    live.engine.say(Script("hm</think>half", fail="the card fell off"))
    last = live.events("/v1/responses", model="m", input="hi")[-1]
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert "the card fell off" in last["response"]["error"]["message"]


def test_custom_tool_is_a_function_of_one_text(live):
    patch = "*** Begin Patch\n*** End Patch"
    tool = {
        "type": "custom",
        "name": "apply_patch",
        "description": "Patch.",
        "format": {"type": "grammar", "syntax": "lark", "definition": "start: /x/"},
    }
    live.engine.say("p</think>" + calls(("apply_patch", {"input": patch})), "</think>done")
    made = ask(live, tools=[tool])["output"]
    assert made[1]["type"] == "custom_tool_call" and made[1]["input"] == patch and made[1]["name"] == "apply_patch"
    prompt = live.engine.prompt()
    assert '"properties": {"input": {"type": "string"' in prompt and "start: /x/" in prompt
    result = {"type": "custom_tool_call_output", "call_id": made[1]["call_id"], "output": "applied"}
    ask(live, input=[{"role": "user", "content": "hi"}, *made, result], tools=[tool])
    assert (
        live.engine.prompt().startswith(prompt + "p</think>\n\n<")
        and "<tool_result>applied</tool_result>" in live.engine.prompt()
    )


def test_custom_tool_streams_its_input(live):
    live.engine.say("p</think>" + calls(("sql", {"input": "select 1"})))
    events = live.events("/v1/responses", model="m", input="hi", tools=[{"type": "custom", "name": "sql"}])
    texts = {event["type"]: event.get("delta", event.get("input")) for event in events if "custom_tool_call" in event["type"]}
    assert texts == {"response.custom_tool_call_input.delta": "select 1", "response.custom_tool_call_input.done": "select 1"}


def test_namespaces_and_odd_names_come_back_as_they_were(live):
    inner = {**READ, "name": "close"}
    tools = [
        {"type": "namespace", "name": "agents", "description": "", "tools": [inner]},
        {**READ, "name": "mcp.files/read"},
        {**READ, "name": "mcp_files_read"},
    ]
    seen = ("agents__close", "mcp_files_read", "mcp_files_read_2")
    live.engine.say("x</think>" + calls(*((name, {"path": "a"}) for name in seen)), "</think>ok")
    made = [item for item in ask(live, tools=tools)["output"] if item["type"] == "function_call"]
    assert [(item["name"], item.get("namespace")) for item in made] == [
        ("close", "agents"),
        ("mcp.files/read", None),
        ("mcp_files_read", None),
    ]
    results = [{"type": "function_call_output", "call_id": item["call_id"], "output": "1"} for item in made]
    ask(live, input=[{"role": "user", "content": "hi"}, *made, *results], tools=tools)
    assert all(f'invoke name="{name}"' in live.engine.prompt() for name in seen)


def test_tools_that_the_hosted_api_runs_are_left_out(live):
    answer = ask(live, tools=[{"type": "web_search"}, {"type": "local_shell"}, READ])
    assert answer["tools"] == [READ]
    assert "web_search" not in live.engine.prompt() and '"name": "read"' in live.engine.prompt()


def test_thinking_off_and_efforts(live):
    live.engine.say("plain")
    answer = ask(live, reasoning={"effort": "none"})
    assert [item["type"] for item in answer["output"]] == ["message"] and answer["reasoning"]["effort"] == "none"
    assert live.engine.prompt().endswith("<｜Assistant｜></think>")
    for effort, start in (
        ("minimal", "<｜User｜>"),
        ("xhigh", "Reasoning Effort: Absolute maximum"),
        ("max", "Reasoning Effort: Beyond maximum"),
    ):
        ask(live, reasoning={"effort": effort, "summary": "auto"})
        assert live.engine.prompt().removeprefix("<｜begin▁of▁sentence｜>").startswith(start), effort


def test_json_schema_is_in_the_prompt(live):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    live.engine.say('hm</think>{"n": 7}')
    answer = ask(live, text={"format": {"type": "json_schema", "name": "number", "schema": schema, "strict": True}})
    assert json.loads(answer["output"][1]["content"][0]["text"]) == {"n": 7}
    assert json.dumps(schema) in live.engine.prompt() and answer["text"]["format"]["name"] == "number"


def test_logprobs_where_asked_for(live):
    live.engine.say("hm</think>one two")
    part = ask(live, include=["message.output_text.logprobs"], top_logprobs=2)["output"][1]["content"][0]
    assert "".join(token["token"] for token in part["logprobs"]) == "one two"
    assert all(len(token["top_logprobs"]) == 2 for token in part["logprobs"])


def test_what_agents_send_beside_is_ignored(live):
    more = {
        "store": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "service_tier": "auto",
        "user": "u",
    }
    more |= {"client_metadata": {}, "truncation": "auto", "stream_options": {"include_obfuscation": False}, "unknown": 1}
    live.engine.say("hm</think>fine")
    assert ask(live, **more, reasoning={"summary": "auto"}, text={"verbosity": "low"})["status"] == "completed"


def test_images_leave_a_mark(live):
    ask(
        live,
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "see"}, {"type": "input_image", "image_url": "data:,"}]}
        ],
    )
    assert "<｜User｜>see\n\n[Unsupported Image]<｜Assistant｜>" in live.engine.prompt()


FAULTS = [
    ({"input": []}, "Empty input messages"),
    ({"input": ""}, "Empty input messages"),
    ({"input": 7}, "input"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role must be one of"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id is missing"),
    ({"input": [{"type": "computer_call", "id": "1"}]}, "computer_call"),
    ({"input": [{"type": "item_reference", "id": "rs_1"}]}, "send the item itself"),
    ({"previous_response_id": "resp_1"}, "stores no conversations"),
    ({"conversation": {"id": "1"}}, "stores no conversations"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "p"}}, "stored prompts"),
    ({"tools": [READ, READ]}, "Tool names must be unique."),
    ({"tools": [{"type": "mcp", "server_url": "x"}]}, "cannot run a tool of type 'mcp'"),
    ({"tools": [{"type": "function"}]}, "tools[0].name is missing"),
    ({"tool_choice": {"type": "function", "name": "nope"}, "tools": [READ]}, "tool_choice"),
    ({"tool_choice": "required"}, "send tools"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "schema"),
    ({"reasoning": {"effort": "enormous"}}, "reasoning.effort"),
    ({"temperature": 3}, "temperature"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
]


@pytest.mark.parametrize(("body", "text"), FAULTS, ids=[text for _, text in FAULTS])
def test_fault_is_named_and_the_engine_untouched(live, body, text):
    error = ask(live, **body)["error"]
    assert text in error["message"] and error["type"] == "invalid_request_error"
    assert not live.engine.requests


# The writer alone: whatever the turn says, the stream adds up to the response

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5)
turns = st.lists(
    st.one_of(
        texts.map(ReasoningDelta),
        texts.map(ContentDelta),
        texts.map(lambda name: ToolCallEnd(0, ToolCall("id", name, '{"input": "x"}'))),
    ),
    max_size=12,
)


@given(turns, st.sampled_from(["stop", "length"]))
def test_stream_adds_up_to_the_response(turn, reason):
    wanted = Wanted(Turn(({"role": "user", "content": "x"},), id="t"), ToolNames(), frozenset(), ())
    writer = ResponseWriter(ResponsesRequest(input="x"), wanted, "m")
    whole = [TurnStarted(1, 0), *turn, TurnFinished(reason, TurnUsage(1, 0, 1, 0))]
    events = [json.loads(json.dumps(event)) for item in whole for event in writer.events(item)]
    built: dict[int, dict] = {}
    for number, event in enumerate(events):
        assert event["sequence_number"] == number
        kind, index = event["type"], event.get("output_index")
        if kind == "response.output_item.added":
            assert index == len(built)
            built[index] = event["item"]
        elif kind.endswith("_text.delta"):
            assert event["item_id"] == built[index]["id"]
            built[index]["text"] = built[index].get("text", "") + event["delta"]
        elif kind.endswith("arguments.delta"):
            built[index]["arguments"] += event["delta"]
    output = writer.response["output"]
    assert [item["id"] for item in built.values()] == [item["id"] for item in output]
    assert len({item["id"] for item in output}) == len(output)
    assert [item.get("text") for item in built.values()] == [
        item["content"][0]["text"] if "content" in item else None for item in output
    ]
    said = [(item.text if isinstance(item, ReasoningDelta | ContentDelta) else item.call.name) for item in turn]
    shown = [item["content"][0]["text"] if "content" in item else item["name"] for item in output]
    assert "".join(said) == "".join(shown)
    assert events[-1]["response"] == json.loads(json.dumps(writer.response))
