"""Nothing that is typed becomes a special token, wherever and by whomever it is typed."""

import json

import pytest

from nautile.protocol import Tokenizer, encode, texts
from nautile.protocol.encoder import Special
from protocol.completions import SPECIALS, byte_tokenizer


def call(name, arguments, call_id="c1"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name="get", description="", parameters=None):
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters or {}}}


def answer(**fields):
    return {"role": "assistant", "content": "", **fields}


USER = {"role": "user", "content": "u"}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "r"}
PLACES = {
    "system": lambda x: ([{"role": "system", "content": x}, USER], {}),
    "system without more": lambda x: ([{"role": "system", "content": x}], {}),
    "developer": lambda x: ([{"role": "developer", "content": x}], {}),
    "user": lambda x: ([{"role": "user", "content": x}], {}),
    "user part": lambda x: ([{"role": "user", "content": [{"type": "text", "text": x}, {"type": x}]}], {}),
    "users in a row": lambda x: ([USER, {"role": "user", "content": x}], {}),
    "user with a task": lambda x: ([{"role": "user", "content": x, "task": "query"}], {}),
    "latest_reminder": lambda x: ([USER, {"role": "latest_reminder", "content": x}], {}),
    "assistant": lambda x: ([USER, answer(content=x)], {}),
    "open assistant": lambda x: ([USER, answer(content=x, wo_eos=True)], {}),
    "prefix": lambda x: ([USER, answer(content=x, prefix=True)], {}),
    "prefix in reasoning": lambda x: ([USER, answer(reasoning_content=x, prefix=True)], {}),
    "reasoning": lambda x: ([USER, answer(reasoning_content=x)], {}),
    "call name": lambda x: ([USER, answer(tool_calls=[call(x, "{}")])], {}),
    "call key": lambda x: ([USER, answer(tool_calls=[call("get", json.dumps({x: 1}))])], {}),
    "call text": lambda x: ([USER, answer(tool_calls=[call("get", {"a": x})])], {}),
    "call value": lambda x: ([USER, answer(tool_calls=[call("get", {"a": [x, {x: x}]})])], {}),
    "call that is not JSON": lambda x: ([USER, answer(tool_calls=[call("get", "{" + x)])], {}),
    "call id": lambda x: ([USER, answer(tool_calls=[call("get", {}, x)]), {**RESULT, "tool_call_id": x}], {}),
    "tool": lambda x: ([USER, answer(tool_calls=[call("get", {})]), {**RESULT, "content": x}], {}),
    "tool part": lambda x: ([USER, {**RESULT, "content": [{"type": "text", "text": x}]}], {}),
    "tool name": lambda x: ([USER], {"tools": [tool(name=x)]}),
    "tool description": lambda x: ([USER], {"tools": [tool(description=x)]}),
    "tool schema": lambda x: ([USER], {"tools": [tool(parameters={x: {x: [x]}})]}),
    "tools of a message": lambda x: ([{"role": "developer", "content": "d", "tools": [tool(description=x)]}], {}),
    "response format": lambda x: ([USER], {"response_format": {x: x}}),
    "response format of a message": lambda x: ([{"role": "system", "content": "", "response_format": {x: x}}, USER], {}),
    "context": lambda x: ([USER], {"context": [{"role": "system", "content": x}]}),
}


@pytest.fixture(scope="module", params=["deepseek-v4", "bytes"])
def tokenizer(request):
    return Tokenizer.load("deepseek-v4") if request.param == "deepseek-v4" else byte_tokenizer()


@pytest.mark.parametrize("place", PLACES)
def test_typed_specials_stay_text(place, tokenizer):
    every = tuple(tokenizer._special)  # all added tokens, not only those that the protocol uses
    assert set(SPECIALS) <= set(every)
    typed = [*SPECIALS, f"<{texts.EOS}>", texts.CALLS_OPEN, "".join(every)]
    for thinking in (True, False):
        plain_messages, plain_options = PLACES[place]("x")
        wanted = specials(encode(plain_messages, tokenizer=tokenizer, thinking=thinking, **plain_options), tokenizer)
        for text in typed if thinking else typed[: len(SPECIALS)]:
            messages, options = PLACES[place](text)
            prompt = encode(messages, tokenizer=tokenizer, thinking=thinking, **options)
            assert specials(prompt, tokenizer) == wanted, text
            assert tokenizer.decode(prompt.ids) == prompt.text


def specials(prompt, tokenizer):
    found = [token for token in prompt.ids if tokenizer.is_special(token)]
    assert found == [tokenizer.special(part) for part in prompt.parts if isinstance(part, Special)]
    return found


def test_text_between_two_specials_is_one_piece(tokenizer):
    messages = [{"role": "user", "content": "a <"}, {"role": "user", "content": "b"}]
    ids = encode(messages, tokenizer=tokenizer).ids
    specials = [tokenizer.special(name) for name in (texts.BOS, texts.USER, texts.ASSISTANT, texts.THINK_OPEN)]
    assert ids == [*specials[:2], *tokenizer.encode("a <\n\nb"), *specials[2:]]
    reminder = encode(
        [{"role": "latest_reminder", "content": "x"}, {"role": "system", "content": "y"}], tokenizer=tokenizer
    ).ids
    assert reminder[2:] == tokenizer.encode("xy")
