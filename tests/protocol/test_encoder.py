"""The encoder's rules where the published cases leave off, and what it refuses."""

import json

import pytest

from nautile.protocol import ProtocolError, encode, parse, texts
from protocol.completions import byte_tokenizer, close, function, parameter, tag

B, E, U, A, O, C = texts.BOS, texts.EOS, texts.USER, texts.ASSISTANT, texts.THINK_OPEN, texts.THINK_CLOSE  # noqa: E741
TOOL = function("get", a={"type": "string"})


def user(content="u", **fields):
    return {"role": "user", "content": content, **fields}


def result(call_id, content):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def assistant(content="a", **fields):
    return {"role": "assistant", "content": content, **fields}


def calls(*ids):
    return [{"id": one, "type": "function", "function": {"name": "get", "arguments": "{}"}} for one in ids]


# Turns


def test_a_user_after_a_task_is_a_turn_of_its_own():
    text = encode([user("one", task="query"), user("two")]).text
    assert text == f"{B}{U}one{U}two{A}{O}"


def test_a_tool_result_after_a_task_joins_the_turn():
    text = encode([user("one", task="query"), result("x", "two")]).text
    assert text == f"{B}{U}one\n\n<tool_result>two</tool_result><｜query｜>"


def test_a_task_on_a_merged_user_is_lost():
    assert encode([user("one"), user("two", task="query")]).text == f"{B}{U}one\n\ntwo{A}{O}"


def test_no_thinking_after_a_task():
    messages = [user(task="action"), assistant("Search", reasoning_content="hidden")]
    assert encode(messages).text == f"{B}{U}u{A}{O}<｜action｜>Search{E}"
    assert encode(messages, thinking=False).text == f"{B}{U}u{A}{C}<｜action｜>Search{E}"
    assert encode([user(), assistant(task="title")]).text.endswith(f"a{E}<｜title｜>")


def test_results_are_put_in_the_order_of_their_calls():
    messages = [user(), assistant("", tool_calls=calls("c1", "c2", "c3")), result("c3", "3"), user("say"), result("c1", "1")]
    assert "<tool_result>1</tool_result>\n\nsay\n\n<tool_result>3</tool_result>" in encode(messages, thinking=False).text
    unknown = [*messages[:2], result("c2", "2"), result("nobody", "?"), result("c1", "1")]
    ordered = "\n\n".join(f"<tool_result>{content}</tool_result>" for content in "?12")
    assert ordered in encode(unknown, thinking=False).text


def test_reasoning_is_kept_with_tools_and_dropped_without():
    messages = [user("q"), assistant("x", reasoning_content="why"), user("r")]
    assert encode(messages).text == f"{B}{U}q{A}{C}x{E}{U}r{A}{O}"
    kept = f"{U}q{A}{O}why{C}x{E}{U}r{A}{O}"
    assert encode(messages, drop_thinking=False).text == B + kept
    assert encode(messages, tools=[TOOL]).text.endswith(kept)
    assert encode(messages, tools=[]).text == encode(messages).text
    assert encode([{"role": "system", "content": "s", "tools": []}, *messages]).text.endswith(f"{A}{C}x{E}{U}r{A}{O}")


def test_a_developer_message_before_the_last_user_is_dropped():
    messages = [{"role": "developer", "content": "d"}, assistant("x"), user("q")]
    assert encode(messages).text == f"{B}x{E}{U}q{A}{O}"
    assert encode(messages, thinking=False).text == f"{B}{U}d{A}{C}x{E}{U}q{A}{C}"


# Tools and response format


def test_tools_go_on_the_first_system_message():
    made = encode([user()], tools=[TOOL]).text
    assert made.startswith(f"{B}\n\n## Tools") and made.endswith(f"tool calls.\n{U}u{A}{O}")
    system = {"role": "system", "content": "s"}
    assert encode([user(), system], tools=[TOOL]).text.startswith(f"{B}{U}us\n\n## Tools")
    both = encode([system, user()], tools=[TOOL], response_format={"type": "object"}).text
    assert both == encode([{**system, "tools": [TOOL], "response_format": {"type": "object"}}, user()]).text
    assert both.index("## Tools") < both.index("## Response Format:") and f"\n{json.dumps({'type': 'object'})}{U}" in both


def test_the_whole_function_is_shown_in_the_given_order():
    odd = {"type": "function", "function": {"strict": True, "x": 1.0, "name": "n", "parameters": {"é": None}}}
    assert '\n{"strict": true, "x": 1.0, "name": "n", "parameters": {"é": null}}\n' in encode([user()], tools=[odd]).text


def test_effort_stands_before_everything():
    for dialect, effort, words in (
        ("0731", "high", "Absolute maximum"), ("0731", "max", "Beyond maximum —"), ("preview", "max", "Absolute maximum"),
    ):  # fmt: skip
        text = encode([{"role": "system", "content": "s"}, user()], dialect=dialect, effort=effort).text
        assert text.startswith(f"{B}Reasoning Effort: {words}") and text.endswith(f"\n\ns{U}u{A}{O}")
    for dialect, effort in (("0731", "low"), ("0731", None), ("preview", "high"), ("preview", None)):
        assert encode([user()], dialect=dialect, effort=effort).text == f"{B}{U}u{A}{O}"
    assert encode([user()], effort="max", thinking=False).text == f"{B}{U}u{A}{C}"
    assert encode([user()], effort="max", context=[{"role": "system", "content": "s"}]).text == f"{U}u{A}{O}"


# Continuation


def test_with_tools_a_continuation_only_appends():
    first = [{"role": "system", "content": "s"}, user("q"), assistant("", reasoning_content="why", tool_calls=calls("c1"))]
    second = [result("c1", "r"), assistant("done", reasoning_content="so"), user("next")]
    tokenizer = byte_tokenizer()
    for system in (0, 1):
        head = encode(first[system:], tools=[TOOL], effort="max", tokenizer=tokenizer)
        tail = encode(second, tools=[TOOL], effort="max", context=first[system:], tokenizer=tokenizer)
        whole = encode([*first[system:], *second], tools=[TOOL], effort="max", tokenizer=tokenizer)
        assert head.ids + tail.ids == whole.ids and head.text + tail.text == whole.text


def test_start_says_where_the_answer_begins():
    assert encode([user()]).start == "reasoning"
    assert encode([user()], thinking=False).start == "content"
    assert encode([user(), assistant("a", wo_eos=True)]).start == "content"


def test_a_prefix_is_gone_on_with():
    chat = encode([user(), assistant("Once", prefix=True)], thinking=False)
    assert (chat.text, chat.start, chat.continued) == (f"{B}{U}u{A}{C}Once", "content", True)
    both = encode([user(), assistant("Once", reasoning_content="why", prefix=True)])
    assert (both.text, both.start, both.continued) == (f"{B}{U}u{A}{O}why{C}Once", "content", True)
    alone = encode([user(), assistant(None, reasoning_content="why", prefix=True)])
    assert (alone.text, alone.start, alone.continued) == (f"{B}{U}u{A}{O}why", "reasoning", True)
    empty = encode([user(), assistant("", prefix=True)])
    assert (empty.text, empty.start, empty.continued) == (f"{B}{U}u{A}{O}", "reasoning", False)
    typed = encode([user(), assistant(O, prefix=True)], thinking=False)
    assert (typed.start, typed.continued) == ("content", True)


@pytest.mark.parametrize("reasoning", [True, False])
def test_what_is_gone_on_with_keeps_its_newlines(reasoning):
    fields = {"reasoning_content": "so"} if reasoning else {"content": "so"}
    prompt = encode([user(), {"role": "assistant", **fields, "prefix": True}], thinking=reasoning)
    message = parse("\n\nthen", start=prompt.start, continued=prompt.continued)
    assert (message.reasoning, message.content) == (("\n\nthen", "") if reasoning else ("", "\n\nthen"))


def test_a_block_of_calls_can_be_opened_in_the_prompt():
    tokenizer = byte_tokenizer()
    prompt = encode([user()], thinking=False, tools=[TOOL], tokenizer=tokenizer)
    opened = prompt.with_calls_open()
    assert opened.text == prompt.text + f"\n\n<{texts.DSML}tool_calls>\n" and opened.start == "calls"
    mark = tokenizer.special(texts.DSML)
    assert opened.ids == [*prompt.ids, *tokenizer.encode("\n\n<"), mark, *tokenizer.encode("tool_calls>\n")]
    history = [user(), assistant("", tool_calls=calls("c1"))]
    whole = encode(history, thinking=False, tools=[TOOL], tokenizer=tokenizer)
    assert whole.text.startswith(opened.text)
    message = parse(whole.ids[len(opened.ids) :], start=opened.start, tokenizer=tokenizer, tools=[TOOL])
    assert [(call.name, call.arguments, call.flags) for call in message.tool_calls] == [("get", "{}", ())]
    with pytest.raises(ProtocolError, match="Thinking mode does not support this tool_choice"):
        encode([user()], tools=[TOOL]).with_calls_open()


def test_nothing_to_render():
    assert encode([], effort="max").text == B
    assert encode([], effort="max", add_bos=False).text == ""


# Arguments


def test_arguments_as_text_or_object():
    expected = f"\n\n{tag('tool_calls')}\n{tag('invoke', name='get')}\n"
    expected += f"{parameter('a', '<x>')}\n{parameter('n', '1e+22', 'false')}"
    expected += f"\n{close('invoke')}\n{close('tool_calls')}"
    for arguments in ({"a": "<x>", "n": 1e22}, '{"a": "<x>", "n": 1e22}'):
        call = {"id": "c", "type": "function", "function": {"name": "get", "arguments": arguments}}
        assert expected in encode([user(), assistant("", tool_calls=[call])]).text
        bare = {"name": "get", "arguments": arguments}
        assert expected in encode([user(), assistant("", tool_calls=[bare])]).text
    for arguments in (None, "", "null", "{}", {}):
        call = {"function": {"name": "get", "arguments": arguments}}
        assert f'name="get">\n\n</{texts.DSML}invoke>' in encode([user(), assistant("", tool_calls=[call])]).text
    broken = {"function": {"name": "get", "arguments": '{"a": '}}
    assert parameter("arguments", '{"a": ') in encode([user(), assistant("", tool_calls=[broken])]).text


# What is refused


@pytest.mark.parametrize(
    ("messages", "options", "says"),
    [
        ([{"role": "robot", "content": "x"}], {}, "role"),
        ([{"content": "x"}], {}, "role"),
        (["x"], {}, "message"),
        ([user()], {"context": [{"role": ["user"]}]}, "role"),
        ([user()], {"dialect": "v4.1"}, "dialect"),
        ([user()], {"dialect": "v4.1", "thinking": False}, "dialect"),
        ([user()], {"effort": "medium"}, "effort"),
        ([user()], {"effort": "low", "dialect": "preview"}, "effort"),
        ([user(task="dance")], {}, "task"),
        ([user(task=["query"])], {}, "task"),
        ([user(task="")], {}, "task"),
        ([{"role": "developer", "content": ""}], {}, "developer"),
        ([user(5)], {}, "content"),
        ([user(b"x")], {}, "content"),
        ([user([5])], {}, "content"),
        ([user([{"type": "text", "text": None}])], {}, "text"),
        ([user("half \ud83d pair")], {}, "surrogate"),
        ([user(), assistant(reasoning_content=5)], {}, "content"),
        ([user(), assistant(tool_calls="get")], {}, "tool_calls"),
        ([user(), assistant(tool_calls=[{"id": "c"}])], {}, "name"),
        ([user(), assistant(tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}])], {}, "object"),
        ([user(), assistant(tool_calls=[{"function": {"name": "f", "arguments": [1]}}])], {}, "object"),
        ([user(), assistant(tool_calls=[{"function": {"name": "f", "arguments": {1: 2}}}])], {}, "object"),
        ([user(), assistant(tool_calls=[{"function": {"name": "f", "arguments": '{"a": ' + "9" * 5000 + "}"}}])], {}, "read"),
        ([user(), assistant(tool_calls=[{"function": {"name": "f", "arguments": "[" * 200000}}])], {}, "read"),
        ([user(), assistant(tool_calls=[{"function": {"name": "f", "arguments": {"a": {1, 2}}}}])], {}, "JSON"),
        ([user()], {"tools": [{"type": "function"}]}, "name"),
        ([user()], {"tools": ["get"]}, "tools"),
        ([user()], {"tools": {"name": "get"}}, "tools"),
        ([user()], {"response_format": {"a": object()}}, "JSON"),
        ([assistant("a", prefix=True), user()], {}, "prefix"),
        ([user(prefix=True)], {}, "prefix"),
        ([user()], {"context": [assistant("a", prefix=True)]}, "prefix"),
        ([user(), assistant("a", prefix=True, tool_calls=calls("c"))], {}, "tool_calls"),
    ],
)
def test_bad_input_says_what_to_change(messages, options, says):
    with pytest.raises(ProtocolError, match=says):
        encode(messages, **options)


def test_ids_need_a_tokenizer():
    with pytest.raises(ProtocolError, match="tokenizer"):
        encode([user()]).ids  # noqa: B018
