"""Conversations about invented functions: what is called is on offer, is valid, and can be read from what was said before."""

import itertools
import json
import random
import re

import jsonschema
import pytest

from nautile.protocol import Tokenizer, encode, parse
from nautile.train.functions import _NONE, random_talk, talk_of
from nautile.train.packing import NANO, function_documents
from nautile.train.parameters import random_parameter
from nautile.train.tasks import Pool
from nautile.train.traces import lexicon_of

TALKS = [talk_of(f"test:{number}") for number in range(250)]


def calls_of(talk):
    """(what stood before the call, name, arguments) of every call."""
    heard = ""
    for message in talk.messages:
        for call in message.get("tool_calls", ()):
            yield heard, call["function"]["name"], json.loads(call["function"]["arguments"])
        heard += f"\n{message['content']}"


def test_every_call_is_on_offer_and_true_to_its_schema():
    """Judged by jsonschema, with everything that is required and nothing that is not in the schema."""
    for talk in TALKS:
        offer = {tool["function"]["name"]: tool["function"]["parameters"] for tool in talk.tools}
        assert len(offer) == len(talk.tools)
        for _, name, arguments in calls_of(talk):
            jsonschema.validate(arguments, {**offer[name], "additionalProperties": False})


def test_every_text_of_a_call_was_said():
    """Strings and numbers stand in the request or in a result; dates and choices may be said in another form."""
    for talk in TALKS:
        offer = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in talk.tools}
        for heard, name, arguments in calls_of(talk):
            for key, value in arguments.items():
                schema = offer[name][key]
                if schema["type"] == "string" and "enum" not in schema and not re.fullmatch(r"\d{4}-\d\d-\d\d", value):
                    assert value in heard
                elif schema["type"] == "string" and "enum" in schema:
                    assert value.replace("_", " ").lower() in heard.replace("_", " ").lower()
                elif schema["type"] == "integer" and value > 12:
                    assert str(value) in heard.replace(",", "")


def test_kinds_do_what_they_are_for():
    """Nothing is called where nothing fits; a missing value is asked for first; several calls come in one turn."""
    by_kind = {kind: [talk for talk in TALKS if talk.kind == kind] for kind in {talk.kind for talk in TALKS}}
    for talk in by_kind["none"]:
        assert not list(calls_of(talk)) and talk.messages[-1]["content"] in _NONE and talk.tools
    for talk in by_kind["missing"]:
        asked = talk.messages[2]
        assert len(list(calls_of(talk))) == 1
        assert ("tool_calls" in asked) != asked["content"].startswith("What is the ")
    for kind in ("several", "repeated"):
        assert sum(len(talk.messages[2]["tool_calls"]) > 1 for talk in by_kind[kind]) > 0.8 * len(by_kind[kind])
    assert all(len(talk.messages) > 5 for talk in by_kind["turns"] if len(talk.tools) > 2)
    assert all(len(talk.tools) == 1 for talk in by_kind["one"])


def test_types_survive_the_markup():
    """What is encoded for training parses back to the same calls."""
    tokenizer = Tokenizer.load(NANO)
    for talk in TALKS[:60]:
        spoken = next((message for message in talk.messages if message.get("tool_calls")), None)
        if spoken is None:
            continue
        context = [{"role": "user", "content": "?"}]
        ids = encode([spoken], tokenizer=tokenizer, context=context, thinking=talk.thinking).ids
        start = "reasoning" if talk.thinking else "content"
        found = parse(ids, start=start, tokenizer=tokenizer, tools=talk.tools).tool_calls
        wanted = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in spoken["tool_calls"]]
        assert [(call.name, json.loads(call.arguments)) for call in found] == wanted


def test_documents_fit_and_the_same_seed_says_the_same():
    tokenizer = Tokenizer.load(NANO)
    lexicon = lexicon_of(tokenizer)
    first, again = (list(itertools.islice(function_documents(tokenizer, lexicon, "3", 1024), 12)) for _ in range(2))
    assert first == again
    assert all(len(one.ids) == len(one.loss) <= 1024 and any(one.loss) for one in first)
    assert max(len(random_talk(Pool(random.Random(seed)), 3).tools) for seed in range(40)) == 3


@pytest.mark.parametrize("seed", range(3))
def test_a_parameter_says_values_of_its_type(seed):
    pool = Pool(random.Random(f"parameter:{seed}"))
    for _ in range(150):
        parameter = random_parameter(pool)
        assert parameter.name.isidentifier()
        jsonschema.validate(parameter.say(pool).value, dict(parameter.with_default(pool).schema))
