"""Calls that a client rewrites: the model sees its own where they say the same, the client's where they do not."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from nautile.protocol import ToolCall
from nautile.server.replay import CallReplay
from server.live import serving
from server.scripted import calls

EDIT = {
    "name": "edit",
    "input_schema": {"type": "object", "properties": {"old": {"type": "string"}, "new": {"type": "string"}}},
}


def sent(arguments, id="c1"):
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": id, "type": "function", "function": {"name": "f", "arguments": text}}],
    }


def arguments_of(messages):
    return messages[0]["tool_calls"][0]["function"]["arguments"]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)
objects = st.dictionaries(st.text(max_size=4), values, max_size=4)


@given(objects, objects, st.randoms())
def test_additions_and_order_do_not_count_but_values_do(written, added, random):
    memory = CallReplay()
    text = json.dumps(written)
    memory.remember("p", [ToolCall("c1", "f", text)])
    keys = [*written, *(key for key in added if key not in written)]
    random.shuffle(keys)
    same = {key: written.get(key, added.get(key)) for key in keys}
    assert arguments_of(memory.replayed("p", [sent(same)])) == text
    for key in written:
        changed = {**same, key: [same[key], "changed"]}
        assert json.loads(arguments_of(memory.replayed("p", [sent(changed)]))) == changed
        dropped = {name: value for name, value in same.items() if name != key}
        assert json.loads(arguments_of(memory.replayed("p", [sent(dropped)]))) == dropped


def test_true_is_not_one_and_broken_json_stays():
    memory = CallReplay()
    memory.remember("p", [ToolCall("c1", "f", '{"a": true}')])
    assert arguments_of(memory.replayed("p", [sent({"a": 1})])) == '{"a": 1}'
    assert arguments_of(memory.replayed("p", [sent("{a")])) == "{a"


def test_one_key_does_not_see_another_s_calls_and_the_oldest_go_first():
    memory = CallReplay(limit=20)
    memory.remember("p", [ToolCall("c1", "f", '{"a":  1}')])
    assert arguments_of(memory.replayed("q", [sent({"a": 1})])) == '{"a": 1}'
    assert arguments_of(memory.replayed("p", [sent({"a": 1})])) == '{"a":  1}'
    memory.remember("p", [ToolCall("c2", "f", '{"b":  1}'), ToolCall("c3", "f", '{"c":  1}')])
    assert arguments_of(memory.replayed("p", [sent({"a": 1})])) == '{"a": 1}'
    assert arguments_of(memory.replayed("p", [sent({"c": 1}, "c3")])) == '{"c":  1}'


def test_a_client_that_adds_defaults_keeps_the_prefix():
    with serving() as live:
        live.engine.say("x</think>" + calls(("edit", {"old": "a", "new": "b"})))
        question = {"role": "user", "content": "hi"}
        body = {"model": "m", "max_tokens": 99, "tools": [EDIT], "thinking": {"type": "enabled"}}
        made = live.post("/v1/messages", messages=[question], **body)["content"]
        made[1]["input"] = {"all": False, "new": "b", "old": "a"}
        result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": made[1]["id"], "content": "done"}]}
        live.post("/v1/messages", messages=[question, {"role": "assistant", "content": made}, result], **body)
        assert live.engine.prompt(1).startswith(live.engine.prompt(0) + "x</think>" + calls(("edit", {"old": "a", "new": "b"})))
