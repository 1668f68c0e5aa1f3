"""Reasoning that clients do not send back: found again, kept apart, bounded, or demanded."""

import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nautile.protocol import ProtocolError, conversation, encode, parse
from nautile.server.memory import NOT_PASSED_BACK, ReasoningMemory
from protocol.completions import byte_tokenizer, function


def user(content="u"):
    return {"role": "user", "content": content}


def said(content, reasoning=None):
    message = {"role": "assistant", "content": content}
    return message if reasoning is None else {**message, "reasoning_content": reasoning}


def called(call_id, reasoning=None, arguments="{}"):
    call = {"id": call_id, "type": "function", "function": {"name": "get", "arguments": arguments}}
    return {**said("", reasoning), "tool_calls": [call]}


def result(call_id, content="r"):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def bare(messages):
    """What a client sends that drops reasoning."""
    return [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]


def reasoning(messages):
    return [message.get("reasoning_content") for message in messages if message["role"] == "assistant"]


def remembering(messages, partition="key", **options):
    """A memory that has answered this conversation."""
    memory = ReasoningMemory(**options)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            memory.remember(partition, messages[:number], message)
    return memory


LOOP = [user(), called("c1", "first"), result("c1"), called("c2", "second"), result("c2"), said("Done.", "third"), user("more")]


def test_reasoning_is_put_back():
    memory = remembering(LOOP)
    assert list(memory.restored("key", bare(LOOP), tools=True)) == LOOP
    assert (memory.stats().restored, memory.stats().missing, memory.stats().answers) == (3, 0, 3)


def test_what_the_client_sends_is_left_alone():
    memory = remembering(LOOP)
    sent = [LOOP[0], {**LOOP[1], "reasoning_content": "mine"}, *bare(LOOP[2:])]
    assert reasoning(memory.restored("key", sent, tools=True)) == ["mine", "second", "third"]
    empty = [LOOP[0], {**LOOP[1], "reasoning_content": ""}, *LOOP[2:]]
    assert reasoning(memory.restored("key", empty, tools=True)) == ["first", "second", "third"]


def test_without_tools_it_is_dropped_at_the_new_user_turn():
    chat = [user(), said("a", "why"), user("again")]
    memory = remembering(chat)
    assert reasoning(memory.restored("key", bare(chat), tools=False)) == [None]
    assert reasoning(memory.restored("key", bare(chat), tools=True)) == ["why"]
    assert reasoning(memory.restored("key", bare(chat[:2]), tools=False)) == ["why"]


def test_partitions_are_apart():
    memory = remembering(LOOP, partition="one")
    assert reasoning(memory.restored("two", bare(LOOP), tools=True)) == [None] * 3
    assert memory.stats().missing == 3
    assert reasoning(memory.restored("", bare(LOOP), tools=True)) == [None] * 3


def test_ids_are_enough_and_so_is_what_was_said():
    memory = remembering(LOOP)
    cut = bare(LOOP[2:])  # the client compacted its history: the conversation before the calls is another
    cut[0] = user("summary")
    assert reasoning(memory.restored("key", cut, tools=True)) == ["second", None]
    renamed = json.loads(json.dumps(bare(LOOP)).replace('"c1"', '"x1"').replace('"c2"', '"x2"'))
    assert reasoning(memory.restored("key", renamed, tools=True)) == ["first", "second", "third"]


def test_the_same_words_elsewhere_are_another_turn():
    memory = remembering([user("a"), said("Yes.", "because of a")])
    assert reasoning(memory.restored("key", [user("b"), said("Yes.")], tools=True)) == [None]
    memory.remember("key", [user("b")], said("Yes.", "because of b"))
    assert reasoning(memory.restored("key", [user("a"), said("Yes.")], tools=True)) == ["because of a"]
    assert reasoning(memory.restored("key", [user("b"), said("Yes.")], tools=True)) == ["because of b"]
    split = [user("a"), said("x"), user("b")]
    memory.remember("key", split, said("z", "one"))
    assert reasoning(memory.restored("key", [user("ax"), user("b"), said("z")], tools=True)) == [None]


def test_what_clients_change_does_not_matter():
    first = [user("q"), called("", "why", '{"a": 1, "b": "é"}')]
    first[1]["tool_calls"][0]["id"] = "c"
    memory = remembering(first)
    sent = [{"role": "system", "content": "today is Tuesday"}, user("q "), called("other", None, '{"b":"\\u00e9","a":1}')]
    assert reasoning(memory.restored("key", sent, tools=True)) == ["why"]
    sent[2]["content"] = None
    assert reasoning(memory.restored("key", sent, tools=True)) == ["why"]
    sent[2]["tool_calls"][0]["function"]["arguments"] = {"a": 1, "b": "é"}
    assert reasoning(memory.restored("key", sent, tools=True)) == ["why"]
    sent[2]["tool_calls"][0]["function"]["arguments"] = {"a": 2, "b": "é"}
    assert reasoning(memory.restored("key", sent, tools=True)) == [None]


def test_an_answer_that_went_on_from_a_prefix():
    memory = ReasoningMemory()
    open_turn = {**said("Once ", "so"), "prefix": True}
    memory.remember("key", [user(), open_turn], said("upon.", ", then"))
    assert reasoning(memory.restored("key", [user(), said("Once upon.")], tools=True)) == ["so, then"]
    assert reasoning(memory.restored("key", [user(), {**said("Once upon."), "prefix": True}], tools=True)) == [None]


def test_an_answer_given_twice_is_remembered_as_it_was_last():
    memory = remembering([user(), called("c", "first")])
    memory.remember("key", [user()], called("d", "second"))
    assert memory.stats().answers == 1
    assert reasoning(memory.restored("key", [user(), called("d")], tools=True)) == ["second"]


def test_it_is_bounded_and_the_largest_partition_gives_way():
    memory = ReasoningMemory(limit=10_000)
    memory.remember("small", [user("mine")], said("a", "kept"))
    for number in range(100):
        memory.remember("large", [user(str(number))], said("a", "x" * 500))
        assert memory.stats().nbytes <= 10_000
    assert reasoning(memory.restored("small", [user("mine"), said("a")], tools=True)) == ["kept"]
    assert reasoning(memory.restored("large", [user("0"), said("a")], tools=True)) == [None]
    assert reasoning(memory.restored("large", [user("99"), said("a")], tools=True)) == ["x" * 500]
    memory.remember("large", [user("too much")], said("a", "x" * 20_000))
    assert reasoning(memory.restored("large", [user("too much"), said("a")], tools=True)) == [None]
    assert reasoning(memory.restored("large", [user("99"), said("a")], tools=True)) == ["x" * 500]
    with pytest.raises(ValueError, match="bytes"):
        ReasoningMemory(limit=-1)


def test_what_is_used_stays():
    memory = ReasoningMemory(limit=5_000)
    memory.remember("key", [user("old")], said("a", "kept"))
    for number in range(50):
        memory.remember("key", [user(str(number))], said("a", "x" * 500))
        assert reasoning(memory.restored("key", [user("old"), said("a")], tools=True)) == ["kept"]


@given(st.lists(st.tuples(st.sampled_from("pqr"), st.integers(0, 6), st.booleans(), st.integers(0, 900)), max_size=40))
@settings(max_examples=60)
def test_its_size_is_what_it_holds(steps):
    """Whatever is remembered, replaced and evicted: the books balance, and nothing wrong is ever given back."""
    memory, truth = ReasoningMemory(limit=6_000), {}
    for partition, number, with_call, length in steps:
        text = f"{partition}{number}" + "y" * length
        answer = called(f"c{number}", text) if with_call else said("a", text)
        memory.remember(partition, [user(str(number))], answer)
        truth[partition, number, with_call] = text
        held = sum(known.nbytes for known in memory._partitions.values())
        assert memory.stats().nbytes == held <= 6_000
        places = sum(len(keys) for known in memory._partitions.values() for _, keys in known.answers.values())
        assert places == sum(len(known.places) for known in memory._partitions.values())
        for (one, about, calls), reason in truth.items():
            sent = [user(str(about)), called(f"c{about}") if calls else said("a")]
            assert reasoning(memory.restored(one, sent, tools=True)) in ([None], [reason])


def test_from_several_threads():
    memory, errors = ReasoningMemory(limit=20_000), []

    def work(partition):
        try:
            for number in range(200):
                memory.remember(partition, [user(str(number))], said("a", f"{partition}{number}" + "x" * 200))
                found = reasoning(memory.restored(partition, [user(str(number)), said("a")], tools=True))[0]
                assert found is None or found.startswith(f"{partition}{number}x")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"p{number}-",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and memory.stats().nbytes <= 20_000


# --strict-reasoning


@pytest.mark.parametrize(
    ("messages", "tools", "refused"),
    [
        (bare(LOOP), True, True),
        (LOOP, True, False),
        ([*LOOP[:3], *bare(LOOP[3:])], True, True),
        ([*LOOP[:5], *bare(LOOP[5:])], True, True),  # the last answer of a turn with calls
        ([user(), said("a"), user()], True, False),  # no calls between the users
        (bare(LOOP), False, False),
        ([user(), called("c", ""), result("c")], True, False),  # sent, and empty
    ],
)
def test_strict(messages, tools, refused):
    memory = remembering(LOOP)
    if refused:
        with pytest.raises(ProtocolError) as error:
            memory.restored("key", messages, tools=tools, strict=True)
        assert str(error.value) == NOT_PASSED_BACK
    else:
        assert list(memory.restored("key", messages, tools=tools, strict=True)) == list(messages)


# With the protocol


def test_a_restored_prompt_begins_with_the_tokens_of_the_turn_before():
    """What it is for: the next prompt goes on where the last answer ended, so that its state is used again."""
    tokenizer, tools, memory = byte_tokenizer(), [function("get", a={"type": "string"})], ReasoningMemory()
    sent = [{"role": "system", "content": "s"}, user()]
    first = conversation(sent, tools=tools)
    ids = first.prompt(tokenizer=tokenizer).ids
    wanted = {**called("c", "I look.", '{"a": "x"}'), "content": "Let me see."}
    answered = encode([*first.messages, wanted], tools=tools, tokenizer=tokenizer).ids
    output = answered[len(ids) :]
    message = parse(output, tokenizer=tokenizer, tools=tools).message()
    memory.remember("key", first.messages, message)
    back = {**message, "content": message["content"] or None}
    del back["reasoning_content"]
    second = conversation([*sent, back, result(message["tool_calls"][0]["id"])], tools=tools)
    messages = memory.restored("key", second.messages, tools=True)
    following = encode(messages, tools=tools, tokenizer=tokenizer).ids
    assert following[: len(answered)] == answered
    forgotten = encode(second.messages, tools=tools, tokenizer=tokenizer).ids
    assert forgotten[: len(answered)] != answered
