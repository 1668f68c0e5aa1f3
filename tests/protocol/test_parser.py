"""Completions -> events: the published cases, the rules where they leave off, and the bugs that other servers have had."""

import json
from pathlib import Path

import pytest

from nautile.protocol import (
    ContentDelta,
    Finish,
    ProtocolError,
    ReasoningDelta,
    StreamParser,
    Tokenizer,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    parse,
    texts,
)
from protocol.completions import (
    block,
    byte_tokenizer,
    close,
    cut,
    function,
    ids_of,
    invoke,
    parameter,
    streamed,
    tag,
)  # fmt: skip

HERE = Path(__file__).parent
CASES = [json.loads(line) for line in (HERE / "vectors/parse_cases.jsonl").read_text(encoding="utf-8").splitlines()]
OVERRIDES = json.loads((HERE / "overrides.json").read_text(encoding="utf-8"))
D = texts.DSML
GET = block(invoke("get", parameter("a", "x")))
TOOLS = [function("get", a={"type": "string"}, n={"type": "integer"}), function("put", b={"type": "array"})]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def v4():
    return Tokenizer.load("deepseek-v4")


def names(message):
    return [call.name for call in message.tool_calls]


def arguments(message):
    return [json.loads(call.arguments) for call in message.tool_calls]


# The published cases


def overridden(case, fed):
    found = [o for o in OVERRIDES if (o["case"], o["thinking"]) == (case["case"], case["thinking"]) and fed in o["fed"]]
    return found[0]["expected"] if found else {}


@pytest.mark.parametrize("fed", ["text", "bytes", "characters", "ids", "one id at a time"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['case']}-{case['thinking']}")
def test_published_case(case, fed, v4):
    raw, ids = case["raw"], ids_of(case["raw"], v4)
    pieces = {"text": [raw], "bytes": cut(raw.encode(), range(999)), "characters": list(raw), "ids": [ids]}.get(fed, ids)
    by_ids = "id" in fed
    events = streamed(pieces, start="reasoning" if case["thinking"] else "content", tokenizer=v4 if by_ids else None)
    expected = overridden(case, "ids" if by_ids else "text")
    assert "".join(e.text for e in events if isinstance(e, ReasoningDelta)) == case["reasoning"]
    assert "".join(e.text for e in events if isinstance(e, ContentDelta)) == expected.get("content", case["content"])
    assert events[-1].reason == expected.get("finish_reason", case["finish_reason"])
    calls = [e.call for e in events if isinstance(e, ToolCallEnd)]
    for call, wanted in zip(calls, expected.get("tool_calls", case["tool_calls"]), strict=True):
        assert call.name == wanted["name"]
        wanted_arguments = wanted["arguments"]
        if isinstance(wanted_arguments, str):
            wanted_arguments = json.loads(wanted_arguments)
        assert json.loads(call.arguments) == wanted_arguments
        assert "flags" not in wanted or list(call.flags) == wanted["flags"]


def test_every_override_names_a_case_and_changes_it():
    for override in OVERRIDES:
        case = next(c for c in CASES if (c["case"], c["thinking"]) == (override["case"], override["thinking"]))
        assert override["rule"]
        assert any(case[key] != value for key, value in override["expected"].items())


# Reasoning and content


@pytest.mark.parametrize(
    ("raw", "reasoning", "content"),
    [
        ("why\n</think>\n\nans\n", "why", "ans\n"),
        ("\n\nwhy\n\nso </think>ans", "why\n\nso ", "ans"),
        ("why\n", "why\n", ""),
        ("a <", "a <", ""),
        ("a </thin", "a </thin", ""),
        ("a ｜DSM", "a ｜DSM", ""),
        ("a <｜", "a <｜", ""),
        ("a < b </x> </think>x <", "a < b </x> ", "x <"),
        ("</think></think>\nx", "", "x"),
        ("<think>x</think>y", "<think>x", "y"),
        ("", "", ""),
        ("\n\n", "", ""),
    ],
)
def test_text(raw, reasoning, content, tokenizer):
    for output, options in ((raw, {}), (list(raw), {}), (ids_of(raw, tokenizer), {"tokenizer": tokenizer})):
        pieces = output if isinstance(output, list) else [output]
        events = streamed(pieces, **options)
        assert "".join(e.text for e in events if isinstance(e, ReasoningDelta)) == reasoning
        assert "".join(e.text for e in events if isinstance(e, ContentDelta)) == content


def test_text_is_emitted_as_it_arrives(tokenizer):
    parser = StreamParser(tokenizer=tokenizer)
    assert parser.feed(tokenizer.encode("so")) == [ReasoningDelta("so")]
    assert parser.feed(tokenizer.encode("\n")) == []  # may stand before </think>
    assert parser.feed(tokenizer.encode("a")) == [ReasoningDelta("\na")]
    assert parser.feed(tokenizer.special("</think>")) == []
    assert parser.feed(tokenizer.encode("2 <")) == [ContentDelta("2 ")]
    assert parser.feed(tokenizer.encode(" 3")) == [ContentDelta("< 3")]
    assert parser.finish("stop") == [Finish("stop")]


def test_a_character_split_over_ids_waits(tokenizer):
    ids = tokenizer.encode("😀")
    assert len(ids) == 4
    parser = StreamParser(start="content", tokenizer=tokenizer)
    assert [parser.feed(one) for one in ids] == [[], [], [], [ContentDelta("😀")]]
    assert parser.feed(ids[:2]) == []
    assert parser.finish() == [ContentDelta("\ufffd"), Finish("stop")]


def test_ids_are_recognised_by_id_only(tokenizer):
    spelled = f"</think>{GET}{texts.EOS}<｜User｜>"
    message = parse(tokenizer.encode(spelled), start="reasoning", tokenizer=tokenizer)
    assert message.reasoning == spelled and not message.tool_calls and not message.content


def test_what_follows_the_end_of_sentence_is_ignored(tokenizer):
    message = parse(ids_of(f"a</think>b{texts.EOS}c{GET}", tokenizer), tokenizer=tokenizer)
    assert (message.reasoning, message.content, message.tool_calls) == ("a", "b", ())


# Calls


def test_events_of_a_call():
    parser = StreamParser(start="content", tools=TOOLS)
    *early, last = list("hello\n\n" + GET)
    before = [event for character in early for event in parser.feed(character)]
    assert before[-3:] != [] and isinstance(before[-1], ToolCallEnd)
    start, fragment, end = before[-3:]
    assert start == ToolCallStart(0, end.call.id, "get") and fragment == ToolCallArguments(0, '{"a": "x"}')
    assert end.call.id.startswith("call_00_") and len(end.call.id) == 32 and end.call.id[8:].isalnum()
    assert parser.feed(last) == [] and parser.finish("stop") == [Finish("tool_calls")]


def test_ids_of_calls_differ_between_calls_and_seeds():
    two = parse(block(invoke("get"), invoke("get")), start="content").tool_calls
    assert len({call.id for call in two}) == 2
    seeds = []
    for seed in ("turn 1", "turn 2"):
        parser = StreamParser(start="content", call_seed=seed)
        seeds += [event.call.id for event in parser.feed(GET) if isinstance(event, ToolCallEnd)]
    assert len(set(seeds)) == 2


@pytest.mark.parametrize(
    ("raw", "content"),
    [
        (f"hello\n\n{GET}\n\nbye", "hello\n\nbye"),
        (f"{GET}\n\nbye\n", "bye\n"),
        (f"hello\n{GET}\n", "hello"),
        (f"{GET}\n\n{GET}\nx", "x"),
        (f"{tag('tool_calls')}\n{close('tool_calls')}after", "after"),  # an empty block swallows nothing
        (f"{tag('tool_calls')}\nplan\n{close('tool_calls')}after", "planafter"),
        (f"{GET}{close('tool_calls')}\n{close('invoke')}x", "x"),  # closers too many
        (f"a </think> {GET}", "a  "),
    ],
)
def test_content_around_calls(raw, content, tokenizer):
    assert parse(raw, start="content").content == content
    assert parse(ids_of(raw, tokenizer), start="content", tokenizer=tokenizer).content == content


def test_a_call_inside_reasoning_ends_it(tokenizer):
    message = parse(ids_of(f"why\n\n{GET}\nthen</think>ans", tokenizer), tokenizer=tokenizer)
    assert (message.reasoning, message.content, names(message)) == ("why", "thenans", ["get"])


def test_talk_about_a_block_in_reasoning_is_not_a_block(tokenizer):
    raw = f"I write {tag('tool_calls')} to call.</think>Done."
    assert parse(raw).reasoning == f"I write {tag('tool_calls')} to call."
    by_id = parse(ids_of(raw, tokenizer), tokenizer=tokenizer)
    assert (by_id.reasoning, by_id.content) == ("I write  to call.", "Done.")
    assert parse(raw).content == "Done."


def test_a_block_that_the_prompt_opened():
    message = parse(f"{invoke('get', parameter('a', 'x'))}\n{close('tool_calls')}", start="calls", tools=TOOLS)
    assert names(message) == ["get"] and message.tool_calls[0].flags == ()


def test_aliases_and_missing_closers(tokenizer):
    opened = f"{tag('invoke', name='get')}{tag('parameter', name='a', string='true')}"
    raw = f"{tag('function_calls')}{opened}x</{D}inv></{D}tool_ccalls>y"
    for message in (parse(raw, start="content"), parse(ids_of(raw, tokenizer), start="content", tokenizer=tokenizer)):
        assert (names(message), arguments(message), message.content) == (["get"], [{"a": "x"}], "y")
    opened = f"{tag('invoke', name='get')}{parameter('n', '1', 'false')}"
    raw = f"{tag('tool_calls')}{opened}{tag('invoke', name='put')}{close('tool_calls')}"
    message = parse(raw, start="content")
    assert (names(message), arguments(message)) == (["get", "put"], [{"n": 1}, {}])
    assert [call.flags for call in message.tool_calls] == [("unclosed",), ("unclosed",)]
    assert names(parse(f'{tag("tool_calls")}<{D}invoke name="get"/>{close("tool_calls")}', start="content")) == ["get"]
    assert arguments(parse(block(f"<{D}invoke name=get>{parameter('a', 'x')}</{D}invoke\n"), start="content")) == [{"a": "x"}]


def test_attributes_in_any_order_and_quotes_in_names():
    one = f'<{D}parameter string="false" name="n">1</{D}parameter>'
    two = f'<{D}parameter name="a>b" string="true">2</{D}parameter>'
    three = f'<{D}parameter name="c"d" string="true">3</{D}parameter>'
    assert arguments(parse(block(invoke("get", one, two, three)), start="content")) == [{"n": 1, "a>b": "2", 'c"d': "3"}]


def test_values_are_verbatim(tokenizer):
    value = f"if a < b && c>d 2>&1\n</parameter> &lt; </{'x'} {tag('parameter', name='z')} </think>"
    raw = block(invoke("get", parameter("a", value)))
    for message in (parse(raw, start="content"), parse(ids_of(raw, tokenizer), start="content", tokenizer=tokenizer)):
        assert arguments(message) == [{"a": value}]
    merged = tokenizer.encode("2><")
    assert len(merged) == 2  # ">" and "<" are one token
    opened = f'<{D}tool_calls><{D}invoke name="get"><{D}parameter name="a" string="true">2>&1</'
    ids = [*ids_of(opened, tokenizer), *ids_of(f"{D}parameter></{D}invoke></{D}tool_calls>", tokenizer)]
    assert arguments(parse(ids, start="content", tokenizer=tokenizer)) == [{"a": "2>&1"}]


@pytest.mark.parametrize("reason", ["stop", "length", None])
@pytest.mark.parametrize("fed", ["text", "ids"])
def test_no_prefix_of_a_call_is_a_call(reason, fed, tokenizer):
    raw = block(invoke("get", parameter("a", "x y"), parameter("n", "12", "false")))
    whole = ids_of(raw, tokenizer) if fed == "ids" else raw
    complete = len(ids_of(raw[: raw.index(f"\n</{D}tool")], tokenizer)) if fed == "ids" else raw.index(f"\n</{D}tool")
    for end in range(complete):
        events = streamed([whole[:end]], reason, start="content", tokenizer=tokenizer)
        *text, finish = events
        assert "".join(event.text for event in text) in ("", "<", "<｜"), whole[:end]
        assert finish.reason == (reason or ("length" if "truncated_call" in finish.flags else "stop"))
    assert len(streamed([whole[:complete]], reason, start="content", tokenizer=tokenizer)) == 4


def test_end_of_sentence_inside_a_call(tokenizer):
    raw = f"{tag('tool_calls')}{invoke('get', parameter('a', 'x'))}{tag('invoke', name='put')}{parameter('b', '[1]', 'false')}"
    message = parse(ids_of(raw + texts.EOS, tokenizer), start="content", tokenizer=tokenizer)
    assert (names(message), message.finish_reason, message.flags) == (["get"], "tool_calls", ("truncated_call",))
    alone = parse(ids_of(f"{tag('invoke', name='put')}{texts.EOS}", tokenizer), start="content", tokenizer=tokenizer)
    assert (alone.tool_calls, alone.finish_reason, alone.flags) == ((), "stop", ("truncated_call",))


def test_text_between_calls_is_dropped_and_flagged():
    message = parse(
        f"{tag('tool_calls')}one{invoke('get')}two{invoke('put', 'three')}four{close('tool_calls')}", start="content"
    )
    assert (names(message), message.content, message.flags) == (["get", "put"], "", ("text_dropped",))
    assert [call.flags for call in message.tool_calls] == [("text_dropped",), ("text_dropped",)]


# Markup where it means nothing


def test_calls_without_a_block(tokenizer):
    raw = f"text {invoke('get', parameter('a', 'x'))}\n{invoke('get', parameter('a', 'y'))}\n{close('tool_calls')}more"
    for options in ({}, {"tools": TOOLS}):
        for output in (raw, ids_of(raw, tokenizer)):
            message = parse(output, start="content", tokenizer=tokenizer, **options)
            assert (names(message), message.content) == (["get", "get"], "text more")
            assert all(call.flags == ("unwrapped",) for call in message.tool_calls)


def test_an_undeclared_call_without_a_block_is_not_one(tokenizer):
    raw = f"see {invoke('rm', parameter('path', '/'))} end"
    as_text = parse(raw, start="content", tools=TOOLS)
    assert (as_text.content, as_text.tool_calls, as_text.finish_reason) == (raw, (), "stop")
    by_id = parse(ids_of(raw, tokenizer), start="content", tokenizer=tokenizer, tools=TOOLS)
    assert (by_id.content, by_id.tool_calls, by_id.flags) == ("see \n/\n end", (), ("markup_dropped",))
    in_block = parse(block(invoke("rm")), start="content", tools=TOOLS).tool_calls
    assert [call.flags for call in in_block] == [("undeclared",)]


@pytest.mark.parametrize(
    ("raw", "as_text", "by_id"),
    [
        (f"Use <{D}parameter> here", f"Use <{D}parameter> here", "Use  here"),
        (f"Use <{D}parameter", "Use ", "Use "),
        (f"Use\n<{D}tool_c", "Use", "Use"),
        (f"Use <{D}", "Use ", "Use "),
        (f"Use <{D}foo> x", f"Use <{D}foo> x", "Use  x"),
        (f"The token {D} is", f"The token {D} is", "The token  is"),
        (f"{D}{D}<{D}{D}", f"{D}{D}<{D}{D}", ""),
        (f"<{D}invoke marks a call, as in a > b", f"<{D}invoke marks a call, as in a > b", "invoke marks a call, as in a > b"),
        (f"a {close('parameter')} b", f"a {close('parameter')} b", "a  b"),
        (f"a {tag('tool_calls')} b", f"a {tag('tool_calls')} b", "a  b"),
        (f"a {tag('tool_calls')}\n", "a ", "a "),
        ("<|DSML|tool_calls>", "<|DSML|tool_calls>", "<|DSML|tool_calls>"),
    ],
)
def test_markup_outside_its_grammar(raw, as_text, by_id, tokenizer):
    message = parse(raw, start="content")
    assert (message.content, message.tool_calls) == (as_text, ())
    message = parse(ids_of(raw, tokenizer), start="content", tokenizer=tokenizer)
    assert (message.content, message.tool_calls) == (by_id, ())
    assert bool(message.flags) == (D in raw)


@pytest.mark.parametrize("raw", ["é</｜DSML", "é\n<｜DS", f"é\n</{D}too"])
def test_a_tag_cut_off_in_a_block_without_calls_adds_no_text(raw):
    message = parse(raw, start="calls", tools=TOOLS)
    assert (message.content.rstrip("\n"), message.flags) == ("é", ("truncated_markup",))


def test_without_tools_markup_is_left_alone(tokenizer):
    for output in (GET, ids_of(GET, tokenizer)):
        message = parse(output, start="content", tokenizer=tokenizer, tools=[])
        assert (message.content, message.tool_calls) == (GET, ())


# Long inputs


def test_time_grows_with_length(tokenizer):
    hostile = ["\n" * 4000, "<" * 4000, f'<{D}invoke name="' + ">" * 1200, f"<{D}" * 1500, '"' * 9000]
    for text in hostile:
        for start in ("content", "calls"):
            streamed(list(text), start=start)
    big = block(invoke("get", *(parameter(f"p{number}", "x" * 500) for number in range(1000))))
    assert len(arguments(parse(big, start="content"))[0]) == 1000


# Wrong use


def test_wrong_use(tokenizer):
    with pytest.raises(ProtocolError, match="tokenizer"):
        parse([1, 2])
    with pytest.raises(ProtocolError, match="start"):
        StreamParser(start="middle")
    with pytest.raises(ProtocolError, match="tools"):
        StreamParser(start="calls", tools=[])
    with pytest.raises(ProtocolError, match="name"):
        StreamParser(tools=[{"type": "function"}])
    parser = StreamParser(tokenizer=tokenizer)
    parser.feed("text")
    with pytest.raises(ProtocolError, match="not with both"):
        parser.feed([1])
    with pytest.raises(ProtocolError, match="reason"):
        parser.finish("tired")
    parser.finish()
    with pytest.raises(ProtocolError, match="finished"):
        parser.feed("more")
    with pytest.raises(ProtocolError, match="finished"):
        parser.finish()
    assert parse("\ud800 half").reasoning == "\ufffd half"
