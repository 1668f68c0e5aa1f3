"""Grammar-true output: what is drawn from the masks parses without a repair and fits its schema; what fits is allowed."""

import contextlib
import json
import random
import time

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nautile.protocol import ProtocolError, Tokenizer, constraint, conversation, encode, parse, texts
from nautile.protocol.schemas import halves
from protocol.completions import byte_tokenizer, ids_of

BYTES = byte_tokenizer()
D = texts.DSML


@pytest.fixture(scope="module")
def nano():
    return Tokenizer.load("src/nautile/weights/nano")


@pytest.fixture(scope="module")
def v4():
    return Tokenizer.load("deepseek-v4")


def tool(name, properties=None, required=None, strict=True, **fields):
    properties = properties or {}
    required = list(properties) if required is None else required
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False, **fields}
    return {"type": "function", "function": {"name": name, "strict": strict, "parameters": schema}}


def walk(follower, tokenizer, rng, free):
    """Tokens drawn uniformly from the masks; after ``free`` of them those that bring things to an end are preferred."""
    mark, end = tokenizer.special(D), tokenizer.special(texts.EOS)
    others = torch.tensor([token for token in range(tokenizer.vocab_size) if tokenizer.is_special(token)])
    others = others[(others != mark) & (others != end)]
    closers = [tokenizer.encode(text)[0] for text in ("</", '"', "}", "]", "<", "/", "0", "a", "$", ".", "Z", ":")]
    out = []
    while not out or out[-1] != end:
        mask = follower.mask()
        assert mask.shape == (tokenizer.vocab_size,) and mask.dtype == torch.bool
        assert not mask[others].any(), "no special token but these two is ever allowed"
        allowed = mask.nonzero().flatten()
        assert len(allowed), f"stuck after {tokenizer.decode(out)!r}"
        token = int(allowed[rng.randrange(len(allowed))])
        if len(out) >= free and rng.random() < 0.9:
            last = [one for one in (end, mark) if mask[one]]
            token = last[0] if last else rng.choice([one for one in closers if mask[one]] or [token])
        follower.accept(token)
        out.append(token)
        assert len(out) < 20_000
    assert follower.mask().nonzero().flatten().tolist() == [end]
    return out


def follow(follower, ids, tokenizer):
    """Tell it these tokens; every one must be allowed."""
    for place, token in enumerate(ids):
        assert follower.mask()[token], f"{tokenizer.decode([token])!r} after {tokenizer.decode(ids[:place])!r}"
        follower.accept(token)


# Random schemas

WORDS = st.text('ab<>/"\\ é\n0', max_size=4)
NAMES = st.sampled_from(["a", "b", "path", "x y", "名", "</", "arguments", "a>b"])
DIGIT = st.integers(0, 4)
TEXT_SCHEMAS = st.one_of(
    st.just({"type": "string"}),
    st.builds(lambda low, more: {"minLength": low, "maxLength": low + more, "type": "string"}, DIGIT, DIGIT),
    st.sampled_from(["^a/b+$", "[0-9]{2}", "^(x|yz)$", "^[^\n\"<]{1,3}$", "\\d\\.", "^$", "[/\\]$]", "a\\$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.sampled_from(["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]).map(
        lambda name: {"type": "string", "format": name}
    ),
    st.lists(WORDS, min_size=1, max_size=3).map(lambda words: {"enum": words}),
    WORDS.map(lambda word: {"const": word}),
)  # fmt: skip
LEAVES = st.one_of(
    TEXT_SCHEMAS,
    st.sampled_from(["integer", "number", "boolean", "null"]).map(lambda kind: {"type": kind}),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more}, st.integers(-9, 9), st.integers(0, 20)
    ),
    st.just({"type": ["string", "null", "integer"], "maxLength": 2, "description": "either"}),
    st.just({"enum": ["a", 1, None, {"k": "v"}, "</"]}),
    st.just({"const": {"a": [1, "x"]}}),
    st.just({}),
    st.just({"$ref": "#/$defs/tree"}),
    st.just({"$ref": "#/$defs/word"}),
)
DEFINITIONS = {
    "word": {"type": ["string", "boolean"], "pattern": "^w+$"},
    "trees": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
    "tree": {"type": "object", "properties": {"v": {"$ref": "#/$defs/word"}, "kids": {"$ref": "#/$defs/trees"}},
             "required": ["v"], "additionalProperties": False},
}  # fmt: skip
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda one, most: {"type": "array", "items": one, "maxItems": most}, inner, st.integers(0, 3)),
        st.dictionaries(NAMES, inner, max_size=3).map(
            lambda members: {
                "type": "object",
                "properties": members,
                "required": list(members)[:2],
                "additionalProperties": False,
            }
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda members: {"anyOf": members, "title": "one of them"}),
        st.tuples(inner).map(lambda members: {"allOf": list(members)}),
    ),
    max_leaves=5,
)
PARAMETERS = st.dictionaries(NAMES, SCHEMAS, max_size=4)


@given(st.lists(PARAMETERS, min_size=1, max_size=3), st.data())
@settings(max_examples=60)
def test_what_is_drawn_parses_and_fits(parameters, data):
    """True by construction, for random schemas, from every start."""
    tools = [
        tool(f"f{number}", members, data.draw(st.lists(st.sampled_from(list(members)), unique=True)) if members else [])
        for number, members in enumerate(parameters)
    ]
    for one in tools:
        one["function"]["parameters"]["$defs"] = DEFINITIONS
    start = data.draw(st.sampled_from(["content", "calls", "reasoning"]))
    choice = data.draw(st.sampled_from(["auto", "required"]))
    make = constraint(BYTES, start=start, tools=tools, tool_choice=choice)
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    for free in (0, 60, 250):
        follower = make()
        opening = ids_of("why?\n</think>", BYTES) if start == "reasoning" else []
        follow(follower, opening, BYTES)
        fits(opening + walk(follower, BYTES, rng, free), start, tools, BYTES, choice == "required" or start == "calls")


def fits(out, start, tools, tokenizer, must_call):
    message = parse(out, start=start, tokenizer=tokenizer, tools=tools)
    assert not message.flags and not any(call.flags for call in message.tool_calls), (message, tokenizer.decode(out))
    assert message.finish_reason == ("tool_calls" if message.tool_calls else "stop")
    if must_call:
        assert message.tool_calls and not message.content
    schemas = {one["function"]["name"]: one["function"]["parameters"] for one in tools}
    for call in message.tool_calls:
        jsonschema.Draft202012Validator(schemas[call.name]).validate(json.loads(call.arguments))


@pytest.mark.parametrize("vocabulary", ["nano", "v4"])
def test_with_real_vocabularies(vocabulary, request):
    tokenizer = request.getfixturevalue(vocabulary)
    properties = {
        "path": {"type": "string"},
        "lines": {"type": "array", "items": {"type": "integer"}},
        "mode": {"enum": ["r", "w", 1]},
    }
    tools = [tool("read", properties, ["path"]), tool("stop")]
    for choice in ("auto", "required"):
        make = constraint(tokenizer, start="content", tools=tools, tool_choice=choice)
        for seed in range(4):
            fits(walk(make(), tokenizer, random.Random(seed), 80), "content", tools, tokenizer, choice == "required")


# What fits is allowed

PAIRS = st.one_of(
    WORDS.map(lambda value: ({"type": "string"}, value)),
    WORDS.map(lambda value: ({}, value)),
    WORDS.map(lambda value: ({"enum": [value, 5]}, value)),
    st.integers(-99, 99).map(lambda value: ({"type": ["integer", "string"]}, value)),
    st.floats(-1e3, 1e3, width=32).map(lambda value: ({"type": "number"}, value)),
    st.sampled_from([True, None, [1, {"a": "</x"}], {"b": [], "a": "é\n\"\\"}]).map(lambda value: ({}, value)),
    st.just(({"$ref": "#/$defs/tree"}, {"v": "ww", "kids": [{"v": True, "kids": []}, {"v": "w"}]})),
    st.sampled_from([("date", "2024-02-28"), ("time", "23:59:00.5Z"), ("date-time", "2026-11-24T09:00:00+01:00"),
                     ("duration", "P3DT4H"), ("email", "a.b+c@x.example.org"), ("hostname", "x-1.org"),
                     ("ipv4", "192.168.0.255"), ("ipv6", "1:2:3:4:5:6:7:abcd"),
                     ("uuid", "123e4567-e89b-12d3-a456-426614174000"), ("uri", "https://x.org:80/a/b?c=d#e")])
    .map(lambda pair: ({"type": "string", "format": pair[0]}, pair[1])),
    st.sampled_from([("^a.c$", "abc"), ("b", "abc"), ("^(a|b)+$", "abba"), ("\\d{2}", "a12"), ("[]/]", "/"), ("a$", "ba")])
    .map(lambda pair: ({"type": "string", "pattern": pair[0]}, pair[1])),
)  # fmt: skip


@given(st.dictionaries(NAMES, PAIRS, max_size=4), st.data())
@settings(max_examples=80)
def test_the_usual_writing_of_what_fits_is_allowed(pairs, data):
    """Parameters in any order, optional ones left out, calls in a row, with or without text before them."""
    properties = {name: schema for name, (schema, _) in pairs.items()}
    names = data.draw(st.permutations(list(pairs)))
    left_out = data.draw(st.lists(st.sampled_from(names), unique=True)) if names else []
    offered = tool("f", properties, [name for name in names if name not in left_out])
    offered["function"]["parameters"]["$defs"] = DEFINITIONS
    arguments = [{name: pairs[name][1] for name in names if name not in left_out}, {name: pairs[name][1] for name in names}]
    calls = [{"function": {"name": "f", "arguments": one}} for one in arguments]
    content = data.draw(st.sampled_from(["", "Let me < see.\n", "x"]))
    messages = [{"role": "user", "content": "u"}]
    answer = {"role": "assistant", "content": content, "tool_calls": calls}
    options = {"tokenizer": BYTES, "tools": [offered], "thinking": False}
    prompt = encode(messages, **options)
    output = encode([*messages, answer], **options).ids[len(prompt.ids) :]
    follow(constraint(BYTES, start="content", tools=[offered])(), output, BYTES)
    if not content:
        follow(constraint(BYTES, start="content", tools=[offered], tool_choice="required")(), output, BYTES)
        opened = len(prompt.with_calls_open().ids) - len(prompt.ids)
        follow(constraint(BYTES, start="calls", tools=[offered])(), output[opened:], BYTES)


def allows(follower, text, tokenizer=BYTES):
    """True when a completion is allowed from beginning to end."""
    for token in ids_of(text + texts.EOS, tokenizer):
        if not follower.mask()[token]:
            return False
        follower.accept(token)
    return True


def calling(*parameters, name="f"):
    lines = (
        "".join(f'<{D}parameter name="{key}" string="{text}">{value}</{D}parameter>\n' for key, value, text in parameters)
        or "\n"
    )
    return f'\n\n<{D}tool_calls>\n<{D}invoke name="{name}">\n{lines}</{D}invoke>\n</{D}tool_calls>'


def test_what_does_not_fit_is_not_allowed():
    tools = [tool("f", {"s": {"type": "string", "maxLength": 3}, "n": {"type": "integer"}, "e": {"enum": ["a", 1]}}, ["s"])]
    make = constraint(BYTES, start="content", tools=tools)
    s = ("s", "abc", "true")
    assert allows(make(), calling(s)) and allows(make(), "text" + calling(s, ("n", "5", "false")))
    for wrong in (
        calling(), calling(("n", "5", "false")), calling(s, s), calling(("s", "abcd", "true")),
        calling(("s", '"abc"', "false")), calling(s, ("n", "5", "true")), calling(s, ("n", "x", "false")),
        calling(s, ("e", "1", "true")), calling(s, ("e", '"a"', "false")),
        calling(s, ("other", "x", "true")), calling(s, name="g"), calling(s) + "\n", calling(s) + "more", "a</think>b",
    ):  # fmt: skip
        assert not allows(make(), wrong), wrong
    required = constraint(BYTES, start="content", tools=tools, tool_choice="required")
    assert allows(required(), calling(s)) and not allows(required(), "text" + calling(s)) and not allows(required(), "")
    both = calling(s).replace(f"\n</{D}tool_calls>", "") + calling(s).removeprefix(f"\n\n<{D}tool_calls>")
    assert allows(make(), both)
    assert not allows(constraint(BYTES, start="content", tools=tools, parallel=False)(), both)


def test_a_named_choice_is_that_tool_alone():
    tools = [tool("f"), tool("g", strict=False)]
    named = {"type": "function", "function": {"name": "g"}}
    make = constraint(BYTES, start="content", tools=tools, tool_choice=named)
    free = calling(("anything", "5", "false"), ("more", "x", "true"), name="g")  # g declares nothing and is not strict
    assert allows(make(), calling(name="g")) and allows(make(), free) and not allows(make(), calling(name="f"))
    with pytest.raises(ProtocolError, match="none of the tools"):
        constraint(BYTES, start="content", tools=tools, tool_choice={"type": "tool", "name": "h"})


def test_tools_without_strict_keep_names_and_types():
    loose = tool(
        "f", {"s": {"type": "string", "pattern": "^a(?=b)"}, "n": {"type": "integer", "not": {}}, "x": {}}, ["s"], strict=False
    )
    make = constraint(BYTES, start="content", tools=[loose], tool_choice="required")
    s = ("s", "anything", "true")
    assert allows(make(), calling(s, ("n", "5", "false"), ("x", '{"a": []}', "false")))
    assert not allows(make(), calling(("n", "5", "false"))) and not allows(make(), calling(s, ("n", "x", "true")))
    assert not allows(make(), calling(s, ("m", "x", "true")))


def test_more_parameters_than_a_rule_has_bits():
    names = [f"p{number}" for number in range(70)]
    for required in ([], names[:2]):
        many = tool("f", {name: {"type": "integer"} for name in names}, required)
        make = constraint(BYTES, start="content", tools=[many])
        given = [(name, "1", "false") for name in names]
        assert allows(make(), calling(*given)) and allows(make(), calling(*given[:2], given[69]))
        assert allows(make(), calling()) == (not required) and not allows(make(), calling(given[0], given[0]))
        assert allows(make(), calling(given[69])) == (not required)


# Content

PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}


def test_json_object():
    make = constraint(BYTES, start="content", response_format={"type": "json_object"})
    assert allows(make(), '{"a": [1, {"b": null}],\n  "c": "</think>"}') is False  # the token, not the text
    assert allows(make(), '{"a": [1, {"b": null}],\n  "c": "é<"}') and allows(make(), "{}")
    for wrong in ("[]", "5", "", "Here: {}", "{} ", "{} {}", '{"a"}', '{"a": "\\ud83d"}', "```json\n{}\n```"):
        assert not allows(make(), wrong), wrong
    for seed in range(8):
        assert isinstance(
            json.loads(parse(walk(make(), BYTES, random.Random(seed), 40), start="content", tokenizer=BYTES).content), dict
        )


def test_white_space_in_json_has_an_end():
    make = constraint(BYTES, start="content", response_format={"type": "json_object"})
    value = {"a": [1, {"b": []}], "c": {}}
    for text in (
        json.dumps(value),
        json.dumps(value, indent=4),
        json.dumps(value, indent="\t"),
        json.dumps(value, separators=(",", ":")),
    ):
        assert allows(make(), text)
    for text in ('{"a":  1}', '{"a": 1\n\n}', "{" + "\n" + " " * 41 + "}"):
        assert not allows(make(), text)


def test_json_schema_has_every_property_and_no_other():
    make = constraint(BYTES, start="content", response_format=AS_SCHEMA)
    assert allows(make(), '{"name": "x", "age": 5}') and allows(make(), '{"name":"x","age":5}')
    for wrong in (
        "{}",
        '{"name": "x"}',
        '{"age": 5, "name": "x"}',
        '{"name": "x", "age": "5"}',
        '{"name": "x", "age": 5, "b": 1}',
        "x",
    ):
        assert not allows(make(), wrong), wrong


@given(SCHEMAS, st.integers(0, 10**6))
@settings(max_examples=40)
def test_json_of_random_schemas(schema, seed):
    schema = {**schema, "$defs": DEFINITIONS}
    make = constraint(BYTES, start="content", response_format={"type": "json_schema", "json_schema": {"schema": schema}})
    for free in (0, 80):
        message = parse(walk(make(), BYTES, random.Random(seed), free), start="content", tokenizer=BYTES)
        jsonschema.Draft202012Validator(schema).validate(json.loads(message.content))


def test_json_beside_tools():
    make = constraint(BYTES, start="content", tools=[tool("f", strict=False)], response_format=AS_SCHEMA)
    assert allows(make(), '{"name": "x", "age": 5}') and allows(make(), calling()) and not allows(make(), "text")


def test_a_schema_that_refers_to_itself_is_not_closed_to_nothing():
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}, "v": {"type": "integer"}}}
    make = constraint(BYTES, start="content", response_format={"type": "json_schema", "json_schema": {"schema": tree}})
    assert allows(make(), '{"next": {"v": 5}}') and not allows(make(), '{"x": 5}')


# Reasoning


def test_reasoning_is_free():
    follower = constraint(BYTES, start="reasoning", response_format={"type": "json_object"})()
    text = f"Anything <think> at all, {texts.USER} {{ < </ é\n"
    shut = {BYTES.special(texts.EOS), BYTES.special(D)}
    for token in ids_of(text, BYTES):
        mask = follower.mask()
        assert {number for number, allowed in enumerate(mask.tolist()) if not allowed} == shut
        follower.accept(token)
    assert allows(follower, "</think>{}")


def test_reasoning_cannot_go_round_the_grammar():
    make = constraint(BYTES, start="reasoning", tools=[tool("f")], tool_choice="required")
    assert (
        not allows(make(), "no call") and not allows(make(), f"why{calling()}") and allows(make(), f"why\n</think>{calling()}")
    )
    assert not allows(make(), "why</think>answer")


# The object that the engine holds


def test_forks_go_their_own_ways():
    make = constraint(BYTES, start="reasoning", response_format={"type": "json_object"})
    first = make()
    second = first.fork()
    follow(first, ids_of('x</think>{"a', BYTES), BYTES)
    assert second.mask()[BYTES.encode("z")[0]]
    third = first.fork()
    follow(first, ids_of('": 1}' + texts.EOS, BYTES), BYTES)
    follow(third, ids_of('b": 2}' + texts.EOS, BYTES), BYTES)
    assert allows(make(), "</think>{}") and allows(second, "</think>{}")


def test_a_token_that_is_not_allowed_is_refused_and_changes_nothing():
    follower = constraint(BYTES, start="reasoning", response_format={"type": "json_object"})()
    with pytest.raises(ProtocolError, match="not allowed"):
        follower.accept(BYTES.special(texts.EOS))
    follow(follower, ids_of("</think>{", BYTES), BYTES)
    for token in (BYTES.encode("x")[0], BYTES.special(texts.EOS), BYTES.special(D), BYTES.vocab_size + 5, -1):
        with pytest.raises(ProtocolError, match="not allowed"):
            follower.accept(token)
    follow(follower, ids_of("}" + texts.EOS + texts.EOS, BYTES), BYTES)


def test_nothing_to_constrain_is_none():
    loose, strict = tool("f", strict=False), tool("g")
    for options in (
        {}, {"tools": []}, {"tools": [loose]}, {"tools": [loose], "tool_choice": "auto"},
        {"tools": [strict], "tool_choice": "none"}, {"response_format": {"type": "text"}},
    ):  # fmt: skip
        assert constraint(BYTES, start="reasoning", **options) is None
    assert constraint(BYTES, start="content", tools=[loose, strict]) is not None


def test_it_takes_what_conversation_makes():
    made = conversation(
        [{"role": "user", "content": "u"}], tools=[tool("f"), tool("g")], tool_choice={"type": "tool", "name": "g"}
    )
    prompt = made.prompt(thinking=False, tokenizer=BYTES)
    make = constraint(BYTES, start=prompt.start, tools=made.tools, tool_choice=made.tool_choice)
    assert allows(make(), calling(name="g").removeprefix(f"\n\n<{D}tool_calls>\n"))


# What cannot be followed is said


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "string", "format": "iri"}, "format"),
        ({"type": "string", "pattern": "(?=a)b"}, "pattern"),
        ({"type": "string", "pattern": "(a"}, "pattern"),
        ({"type": "string", "pattern": "^a|b$"}, "pattern"),
        ({"type": "string", "pattern": "\\bword"}, "pattern"),
        ({"type": "string", "pattern": "(a)\\1"}, "pattern"),
        ({"type": "string", "pattern": "a^b"}, "pattern"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength|maxLength"),
        ({"type": "string", "minLength": "5"}, "minLength"),
        ({"type": "string", "not": {"const": "x"}}, "not"),
        ({"not": {}}, "not"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"type": "object", "propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "object", "dependencies": {"a": ["b"]}}, "dependencies"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"type": "object", "properties": {"a": {"type": "array", "items": {"not": {}}}}}, "not"),
        ({"type": "object", "properties": {"a": {"type": "string", "format": "iri"}}}, "format"),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)b"}}}, "pattern"),
        ({"type": "object", "patternProperties": {"^a": {}, "^ab": {}}}, "patternProperties|ab"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 2}]}, "oneOf"),
        ({"oneOf": [{"type": "object"}, {"type": "object", "properties": {"a": {}}}]}, "oneOf"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum|maximum"),
        ({"type": "text"}, "type"),
        ({"enum": []}, "enum"),
        ({"$ref": "#/$defs/missing"}, "ref"),
        ({"$ref": "http://x.org/y"}, "ref"),
        ({"$ref": "#/properties/p"}, "ref"),
        (False, "no value at all"),
        (5, "schema must be an object"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_followed_names_its_keyword(schema, keyword):
    with pytest.raises(ProtocolError, match=f"tool f.*({keyword})"):
        constraint(BYTES, start="content", tools=[tool("f", {"p": schema})])
    if isinstance(schema, dict) and "$ref" not in schema and schema.get("pattern") not in ("^a|b$", "a^b"):
        shape = {"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": {"p": schema}}}}
        with pytest.raises(ProtocolError, match=keyword):  # the two patterns left out can be followed in JSON
            constraint(BYTES, start="content", response_format=shape)


def test_what_a_strict_tool_cannot_have():
    open_tool = tool("f", {"a": {}}, additionalProperties=True)
    with pytest.raises(ProtocolError, match="tool f: additionalProperties"):
        constraint(BYTES, start="content", tools=[open_tool])
    with pytest.raises(ProtocolError, match="tool f: anyOf"):
        constraint(BYTES, start="content", tools=[tool("f", anyOf=[{}])])
    with pytest.raises(ProtocolError, match="tool f: required: 'b'"):
        constraint(BYTES, start="content", tools=[tool("f", {"a": {}}, ["b"])])
    with pytest.raises(ProtocolError, match="parameter name"):
        constraint(BYTES, start="content", tools=[tool("f", {'a"b': {}})])
    with pytest.raises(ProtocolError, match="needs tools"):
        constraint(BYTES, start="calls")
    with pytest.raises(ProtocolError, match="json_schema"):
        constraint(BYTES, start="content", response_format={"type": "grammar"})


def test_keywords_are_not_looked_for_where_they_are_data():
    schema = {"type": "object", "properties": {"not": {"type": "integer"}, "$ref": {"type": "integer"}}, "required": ["not"],
              "additionalProperties": False, "default": {"if": 1}, "examples": [{"contains": 1}]}  # fmt: skip
    make = constraint(BYTES, start="content", tools=[tool("f", {"p": schema, "e": {"enum": [{"not": 1}]}}, ["p"])])
    assert allows(make(), calling(("p", '{"not": 5, "$ref": 6}', "false"), ("e", '{"not": 1}', "false")))


JUNK_KEYS = st.sampled_from(
    ["type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf", "oneOf", "allOf", "$ref",
     "$defs", "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "minItems", "prefixItems", "not", "a",
     "patternProperties"]
)  # fmt: skip
JUNK_VALUES = st.sampled_from(
    [None, True, False, 0, -1, 2.5, 10**30, "", "string", "object", "array", "integer", "#", "#/a", "#/$defs/a", "(", "a",
     "date", "\ud83d", [], {}]
)  # fmt: skip
JUNK = st.recursive(
    JUNK_VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(JUNK_KEYS, inner, max_size=4), max_leaves=8
)


@given(JUNK, JUNK, st.booleans())
@settings(max_examples=400)
def test_any_schema_is_followed_or_refused(first, second, strict):
    """Never another error than the one that says what to change; what is accepted can be begun."""
    tools = [tool("f", {"p": first}, [], strict), {"function": {"name": "g", "strict": strict, "parameters": second}}]
    requests = [
        {"tools": tools, "tool_choice": "required"},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": first}}},
    ]
    for request in requests:
        try:
            follower = constraint(BYTES, start="content", **request)()
        except ProtocolError as error:
            assert len(str(error)) > 10
        else:
            assert follower.mask().any()


def test_schemas_that_nest_for_ever():
    deep = {"type": "object"}
    for _ in range(5000):
        deep = {"type": "array", "items": deep}
    for request in ({"tools": [tool("f", {"p": deep})]}, {"response_format": {"type": "json_schema", "schema": deep}}):
        with pytest.raises(ProtocolError, match="deep"):
            constraint(BYTES, start="content", **request)


@pytest.mark.parametrize("leaf", ["string", "integer"])
def test_references_that_branch_cost_no_more_than_they_say(leaf: str) -> None:
    definitions = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"} for _ in range(12)]} for n in range(8)}
    parameters = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/d0"}},
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {**definitions, "d8": {"type": leaf}},
    }
    begun = time.process_time()
    with contextlib.suppress(ProtocolError):  # refused or followed, but soon
        halves(parameters["properties"]["a"], parameters)
    assert time.process_time() - begun < 5


# A grammar that compiles is one that a first token can be found for; what is found then is not looked for again.


class _Failing:
    """A matcher whose first mask is an error, as llguidance has it for what it finds too late."""

    def __init__(self, *_: object, **__: object) -> None:
        self.failed = False

    def is_error(self) -> bool:
        return self.failed

    def get_error(self) -> str:
        return "ParserTooComplex"

    def compute_bitmask(self) -> bytes:
        self.failed = True
        return b""


def test_a_grammar_without_a_first_token_is_refused_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nautile.protocol.grammar.LLMatcher", _Failing)
    for start in ("reasoning", "content"):
        with pytest.raises(ProtocolError, match="ParserTooComplex"):
            constraint(BYTES, start=start, response_format={"type": "json_object"})


def test_the_first_mask_is_computed_once_for_all_choices() -> None:
    make = constraint(BYTES, start="content", response_format={"type": "json_object"})
    assert make is not None
    one, other = make(), make()
    first = one.mask()
    assert first is other.mask() is one.fork().mask()
    (brace,) = BYTES.encode("{")
    one.accept(brace)
    after = one.mask()
    assert after is not None and not torch.equal(after, first) and torch.equal(other.mask(), first)
    with pytest.raises(ProtocolError):
        other.accept(BYTES.encode("x")[0])
    assert torch.equal(other.mask(), first)
