"""What clients send: what it becomes in the prompt, and what they are told where it cannot be rendered."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nautile.protocol import ProtocolError, conversation, encode, texts

B, E, U, A, O, C = texts.BOS, texts.EOS, texts.USER, texts.ASSISTANT, texts.THINK_OPEN, texts.THINK_CLOSE  # noqa: E741
GET = {"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}}
PUT = {"type": "function", "function": {"name": "put", "description": "Put.", "cache_control": {"type": "ephemeral"}}}


def user(content="u", **fields):
    return {"role": "user", "content": content, **fields}


def system(content="s", role="system"):
    return {"role": role, "content": content}


def called(*ids, **fields):
    calls = [{"id": one, "type": "function", "function": {"name": "get", "arguments": "{}"}} for one in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls, **fields}


def result(call_id, content="r"):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def chat(*messages, **options):
    return conversation(list(messages), **options).prompt(thinking=False).text


# What it becomes


def test_system_messages_are_hoisted_and_joined():
    assert chat(user("a"), system("s"), {"role": "assistant", "content": "b"}, system("t"), user("c")) == (
        f"{B}s\n\nt{U}a{A}{C}b{E}{U}c{A}{C}"
    )
    assert chat(user()) == f"{B}{U}u{A}{C}"


def test_developer_is_system_or_a_user_turn():
    assert chat(system("s"), system("d", "developer"), user()) == f"{B}s\n\nd{U}u{A}{C}"
    assert chat(system("s"), system("d", "developer"), user(), developer="user") == f"{B}s{U}d\n\nu{A}{C}"


def test_parts_of_content():
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}, {"type": "file"}, "b"]
    assert chat(user(parts)) == f"{B}{U}a\n\n[Unsupported Image]\n\n[Unsupported file]\n\nb{A}{C}"
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    assert chat(user(), refusal, user("v")) == f"{B}{U}u{A}{C}no{E}{U}v{A}{C}"


def test_fields_of_the_encoding_itself_cannot_be_sent():
    injected = user("u", task="query", wo_eos=True, mask=1, tools=[GET], response_format={"a": 1})
    odd = {"role": "assistant", "content": "a", "wo_eos": True, "task": "title", "name": "x", "refusal": None, "audio": None}
    assert chat(injected, odd, user("v")) == f"{B}{U}u{A}{C}a{E}{U}v{A}{C}"


def test_reasoning_under_either_name():
    for name in ("reasoning_content", "reasoning"):
        messages = [user(), called("c", **{name: "why"}), result("c")]
        assert f"{O}why{C}" in conversation(messages, tools=[GET]).prompt().text


def test_the_prompt_shows_name_description_and_parameters():
    strict = {
        "strict": True,
        "name": "s",
        "parameters": {"required": ["a"], "additionalProperties": False, "$x": 1, "properties": {"a": {}}, "type": "object"},
    }
    text = chat(user(), tools=[GET, PUT, {"type": "function", "function": strict}])
    assert '\n{"name": "get", "description": "", "parameters": {"type": "object", "properties": {}}}\n' in text
    assert '\n{"name": "put", "description": "Put.", "parameters": {}}\n' in text
    shown = '{"type": "object", "properties": {"a": {}}, "additionalProperties": false, "required": ["a"], "$x": 1}'
    assert f'\n{{"name": "s", "description": "", "parameters": {shown}}}\n' in text


@pytest.mark.parametrize(
    ("choice", "names", "kind"),
    [
        (None, ["get", "put"], "auto"),
        ("auto", ["get", "put"], "auto"),
        ({"type": "auto"}, ["get", "put"], "auto"),
        ("none", [], "none"),
        ({"type": "none"}, [], "none"),
        ("required", ["get", "put"], "required"),
        ({"type": "any"}, ["get", "put"], "required"),
        ({"type": "function", "function": {"name": "put"}}, ["put"], "required"),
        ({"type": "function", "name": "put"}, ["put"], "required"),
        ({"type": "tool", "name": "put"}, ["put"], "required"),
    ],
)
def test_tool_choice(choice, names, kind):
    made = conversation([user()], tools=[GET, PUT], tool_choice=choice)
    assert ([tool["function"]["name"] for tool in made.tools], made.tool_choice) == (names, kind)
    prompt = made.prompt(thinking=False)
    assert [name for name in ("get", "put") if f'"name": "{name}"' in prompt.text] == names
    assert prompt.start == ("calls" if kind == "required" else "content")
    assert prompt.text.endswith(f"\n\n<{texts.DSML}tool_calls>\n") == (kind == "required")
    assert made.prompt(thinking=True).start == "reasoning"


def test_json_object():
    made = conversation([system("s"), user("as JSON")], response_format={"type": "json_object"})
    assert made.prompt(thinking=False).text == f"{B}s\n\n{texts.JSON_OBJECT}{U}as JSON{A}{C}"
    assert chat(user("json"), response_format={"type": "json_object"}).startswith(f"{B}\n\n{texts.JSON_OBJECT}{U}")
    assert chat(user(), response_format={"type": "text"}) == chat(user())


def test_json_schema():
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    text = chat(user(), response_format=shape)
    assert text == encode([user()], thinking=False, response_format={"type": "object"}).text
    assert "## Response Format:" in text and text == chat(
        user(), response_format={"type": "json_schema", "schema": {"type": "object"}}
    )


def test_prefix_goes_on():
    open_turn = {"role": "assistant", "content": "Once", "prefix": True}
    made = conversation([user(), open_turn])
    assert made.prompt(thinking=False).text == f"{B}{U}u{A}{C}Once" and made.prompt(thinking=False).continued


# What they are told


@pytest.mark.parametrize(
    ("messages", "options", "says"),
    [
        ([], {}, "Empty input messages"),
        ("hello", {}, "must be a list"),
        (["hello"], {}, r"messages\[0\] must be an object"),
        ([{"role": "robot", "content": "x"}], {}, "unknown role 'robot'; use system"),
        ([{"role": ["user"], "content": "x"}], {}, "unknown role"),
        ([user(None)], {}, "not null"),
        ([user(5)], {}, "text or a list"),
        ([user([5])], {}, "object with a type"),
        ([user([{"type": "text"}])], {}, "needs its text"),
        ([user(), {"role": "assistant", "content": None}], {}, "content or tool_calls must be set"),
        ([user(), {"role": "assistant", "content": "a", "reasoning_content": 5}], {}, "reasoning_content must be text"),
        ([user(), {"role": "assistant", "content": "a", "tool_calls": "x"}], {}, "tool_calls must be a list"),
        ([user(), {"role": "assistant", "tool_calls": [5]}], {}, "id and a function"),
        ([user(), {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}], {}, "needs an id"),
        ([user(), {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f g"}}]}], {}, "must match"),
        (
            [user(), {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": 5}}]}],
            {},
            "JSON text",
        ),
        ([user(), called("c", "c"), result("c")], {}, "two tool_calls have one id"),
        ([result("c")], {}, "must be a response to a preceding message with 'tool_calls'"),
        ([user(), {"role": "assistant", "content": "a"}, result("c")], {}, "preceding message with 'tool_calls'"),
        ([user(), called("c"), result("c"), user(), result("c")], {}, "preceding message with 'tool_calls'"),
        ([user(), called("c"), result("d")], {}, "unknown tool_call_id 'd'; the calls are c"),
        ([user(), called("c"), {"role": "tool", "content": "x"}], {}, "needs the tool_call_id"),
        ([user(), called("c", "d"), result("c"), result("c")], {}, "answered before"),
        ([user(), called("c", "d"), result("c")], {}, "insufficient tool messages: d before the end"),
        ([user(), called("c"), user()], {}, r"insufficient tool messages: c before messages\[2\]"),
        ([user(), {"role": "assistant", "content": "a", "prefix": True}, user()], {}, "prefix: true is for the last"),
        ([user(prefix=True)], {}, "prefix: true is for the last"),
        ([user()], {"tools": {}}, "tools must be a list"),
        ([user()], {"tools": [GET, GET]}, r"Tool names must be unique\."),
        ([user()], {"tools": [{"type": "web_search"}]}, "only tools of type function"),
        ([user()], {"tools": [5]}, "only tools of type function"),
        ([user()], {"tools": [{"type": "function", "function": {"name": "a.b"}}]}, r"\^\[a-zA-Z0-9_-\]\+\$"),
        ([user()], {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "JSON schema"),
        ([user()], {"tools": [{"type": "function", "function": {"name": "f", "description": 5}}]}, "description"),
        ([user()], {"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]}, "strict must be"),
        ([user()], {"tool_choice": "required"}, "needs tools"),
        ([user()], {"tools": [GET], "tool_choice": "maybe"}, "unknown tool_choice"),
        ([user()], {"tools": [GET], "tool_choice": "function"}, "unknown tool_choice"),
        ([user()], {"tools": [GET], "tool_choice": 5}, "unknown tool_choice"),
        ([user()], {"tools": [GET], "tool_choice": {"type": "tool", "name": "x"}}, "none of the tools; they are get"),
        ([user()], {"response_format": {"type": "json_object"}}, "must contain the word 'json'"),
        ([user()], {"response_format": {"type": "xml"}}, "text, json_object or json_schema"),
        ([user()], {"response_format": "json"}, "text, json_object or json_schema"),
        ([user()], {"response_format": {"type": "json_schema"}}, "needs json_schema.schema"),
    ],
)
def test_bad_input_says_what_to_change(messages, options, says):
    with pytest.raises(ProtocolError, match=says):
        conversation(messages, **options)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": False}, "Required properties must match"),
        ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, "additionalProperties: false"),
        (
            {
                "properties": {"a": {"type": "object", "properties": {"b": {}}}},
                "required": ["a"],
                "additionalProperties": False,
            },
            "Requir",
        ),
        ({"properties": {}, "additionalProperties": False, "$defs": {"x": {"properties": {"b": {}}}}}, "Required"),
    ],
)
def test_strict_tools(parameters, says):
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}
    with pytest.raises(ProtocolError, match=says):
        conversation([user()], tools=[tool])
    assert conversation([user()], tools=[{"type": "function", "function": {**tool["function"], "strict": False}}])


def test_half_a_surrogate_pair():
    for messages in ([user("\ud83d")], [user(), called("c"), result("c", "\udc00")]):
        with pytest.raises(ProtocolError, match="surrogate"):
            conversation(messages).prompt()
    call = {"id": "c", "function": {"name": "get", "arguments": json.dumps({"a": "\ud83d"})}}
    with pytest.raises(ProtocolError, match="surrogate"):
        conversation([user(), {"role": "assistant", "tool_calls": [call]}, result("c")]).prompt()


KEYS = st.sampled_from(
    ["role", "content", "tool_calls", "tool_call_id", "id", "function", "name", "arguments", "type", "text", "prefix",
     "parameters", "strict", "properties", "required", "json_schema", "schema", "reasoning_content"]
)  # fmt: skip
WORDS = st.sampled_from(
    ["user", "assistant", "tool", "system", "developer", "function", "json", "json_schema", "text", "c", "{", "\ud83d"]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": WORDS, "content": WORDS | ANYTHING}, optional={"tool_calls": ANYTHING, "tool_call_id": WORDS}
    ),
    max_size=4,
)


@given(TURNS | ANYTHING, ANYTHING, ANYTHING, ANYTHING, st.booleans())
@settings(max_examples=300)
def test_whatever_is_sent_it_is_rendered_or_refused(messages, tools, choice, shape, thinking):
    try:
        made = conversation(messages, tools=tools, tool_choice=choice, response_format=shape)
        assert made.prompt(thinking=thinking).text.startswith(B)
    except ProtocolError as error:
        assert len(str(error)) > 10
