"""Properties of encoder and parser together, on inputs that hypothesis makes up."""

import concurrent.futures
import datetime
import json
import multiprocessing
import platform
import random
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nautile.protocol import ContentDelta, Finish, ReasoningDelta, ToolCallEnd, encode, parse, texts
from protocol.completions import (
    block,
    byte_ids,
    byte_tokenizer,
    close,
    cut,
    function,
    ids_of,
    ids_of_bytes,
    invoke,
    parameter,
    streamed,
    tag,
)  # fmt: skip

RESULTS = Path(__file__).parents[2] / "bench" / "results"
TOKENIZER = byte_tokenizer()
TOOLS = [function("get", a={"type": "string"}, n={"type": "integer"}), function("put")]
D = texts.DSML
PIECES = (
    "<", "</", "｜", ">", "/>", "\n", "\n\n", " ", '"', "a", "no", "é", "😀", "5", "True", "{", "[1]", "tool_calls", "invoke",
    D, texts.THINK_CLOSE, texts.THINK_OPEN, tag("tool_calls"), tag("function_calls"), tag("invoke", name="get"),
    tag("invoke", name="rm"), tag("parameter", name="a", string="true"), tag("parameter", name="n", string="false"),
    tag("parameter", name="a"), tag("parameter", string="x", name="q"), close("parameter"), close("invoke"),
    close("tool_calls"), parameter("n", "5", "false"), invoke("get", parameter("a", "x<y")), block(invoke("put")), texts.EOS,
)  # fmt: skip
OFFERED = st.sampled_from([None, TOOLS, []])
STARTS = st.sampled_from(["reasoning", "content", "calls"])
COMPLETIONS = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
CUTS = st.lists(st.integers(0, 400), max_size=12)


def sound(events, raw, spelled_out):
    """What holds for every output."""
    assert isinstance(events[-1], Finish)
    calls = [event.call for event in events if isinstance(event, ToolCallEnd)]
    assert (events[-1].reason == "tool_calls") == bool(calls)
    for call in calls:
        assert isinstance(json.loads(call.arguments), dict)
    said = "".join(event.text for event in events if isinstance(event, ReasoningDelta | ContentDelta))
    if not spelled_out:
        assert D not in said
    rest = iter(raw)
    assert all(character in rest for character in said), "only what was written is said, in its order"


@given(COMPLETIONS, CUTS, STARTS, OFFERED, st.sampled_from([None, "stop", "length"]), st.booleans())
@settings(max_examples=200)
@example(f"a{tag('tool_calls')}b{texts.THINK_CLOSE}c", [3], "reasoning", None, None, False)
def test_text_is_parsed_alike_however_it_is_cut(raw, cuts, start, tools, reason, continued):
    start = "content" if tools == [] and start == "calls" else start
    options = {"start": start, "tools": tools, "continued": continued}
    whole = streamed([raw], reason, **options)
    assert streamed(list(raw), reason, **options) == whole
    assert streamed(cut(raw, cuts), reason, **options) == whole
    assert streamed(cut(raw.encode(), cuts), reason, **options) == whole
    sound(whole, raw, spelled_out=True)


@given(COMPLETIONS, CUTS, STARTS, OFFERED, st.sampled_from([None, "stop", "length"]), st.booleans())
@settings(max_examples=200)
def test_ids_are_parsed_alike_however_they_are_cut(raw, cuts, start, tools, reason, continued):
    start = "content" if tools == [] and start == "calls" else start
    options = {"start": start, "tools": tools, "tokenizer": TOKENIZER, "continued": continued}
    ids = ids_of(raw, TOKENIZER)
    whole = streamed([ids], reason, **options)
    assert streamed(ids, reason, **options) == whole
    assert streamed(cut(ids, cuts), reason, **options) == whole
    assert streamed(byte_ids(raw, TOKENIZER), reason, **options) == whole  # other tokens, every character split
    sound(whole, raw, spelled_out=tools == [])


@given(st.binary(max_size=30), CUTS)
def test_broken_utf8_is_read_alike_however_it_is_cut(data, cuts):
    ids = ids_of_bytes(data)
    assert TOKENIZER.decode_bytes(ids) == data
    expected = data.decode("utf-8", errors="replace")
    for events in (
        streamed([data], start="content"),
        streamed(cut(data, cuts), start="content"),
        streamed(ids, start="content", tokenizer=TOKENIZER),
    ):
        assert "".join(event.text for event in events if isinstance(event, ContentDelta)) == expected.lstrip("\n")


@given(st.lists(st.sampled_from(["a", "b ", "<", "</", ">", "\n", "</x>", "invoke", "é", "</thin"]), max_size=12).map("".join))
def test_no_text_without_markup_is_lost(raw):
    assert parse(raw, start="content").content == raw.lstrip("\n")
    held_back = streamed(list(raw), start="content")
    assert held_back == streamed([raw], start="content")


# encode -> parse -> encode

TEXT = st.text(max_size=20) | st.lists(st.sampled_from([*PIECES, "x", " y"]), max_size=4).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
# A quote in a parameter's name cannot be told from the end of the name: the format has no escape.
KEYS = st.text(max_size=12).filter(lambda key: '"' not in key) | st.sampled_from(["a", "arguments", "x y", "a>b", "名", ""])
CALLS = st.lists(
    st.tuples(st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True), st.dictionaries(KEYS, JSON, max_size=3)), max_size=3
)


@st.composite
def answers(draw):
    """Assistant messages that the format can carry: newlines at its seams belong to the format."""
    calls = draw(CALLS)
    content = draw(TEXT).lstrip("\n")
    message = {"role": "assistant", "content": content.rstrip("\n") if calls else content}
    if reasoning := draw(TEXT).strip("\n"):
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"id": f"c{number}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for number, (name, arguments) in enumerate(calls)
        ]
    return message


@given(answers(), st.booleans(), st.booleans(), CUTS)
@settings(max_examples=250)
def test_what_is_encoded_is_parsed_back(answer, thinking, tools, cuts):
    if not thinking:
        answer.pop("reasoning_content", None)
    history = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    options = {"tokenizer": TOKENIZER, "thinking": thinking, "tools": TOOLS if tools else None}
    prompt = encode(history, **options)
    whole = encode([*history, answer], **options).ids
    assert whole[: len(prompt.ids)] == prompt.ids
    output = whole[len(prompt.ids) :]
    message = parse(output, start=prompt.start, tokenizer=TOKENIZER, tools=None)
    assert message.content == answer["content"]
    assert message.reasoning == answer.get("reasoning_content", "")
    wanted = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in answer.get("tool_calls", ())]
    assert [(call.name, json.loads(call.arguments)) for call in message.tool_calls] == wanted
    assert not message.flags and not any(call.flags for call in message.tool_calls)
    assert encode([*history, message.message()], **options).ids == whole
    events = streamed(cut(output, cuts), start=prompt.start, tokenizer=TOKENIZER)
    assert events == streamed([output], start=prompt.start, tokenizer=TOKENIZER)


# The long run: make test-slow


def fuzzed(number):
    """Random ids or text made of the protocol's own pieces and of noise."""
    rng = random.Random(number)
    raw = "".join(rng.choice(PIECES) for _ in range(rng.randrange(12)))
    if rng.random() < 0.3:
        place = rng.randrange(len(raw) + 1)
        raw = raw[:place] + raw[place + rng.randrange(4) :]
    tools = rng.choice([None, TOOLS, TOOLS, []])
    start = rng.choice(["reasoning", "content", "content" if tools == [] else "calls"])
    options = {"start": start, "tools": tools}
    by_ids = rng.random() < 0.7
    whole = raw
    if by_ids:
        options["tokenizer"] = TOKENIZER
        whole = ids_of(raw, TOKENIZER)
        for _ in range(rng.choice([0, 0, 1, 5])):
            whole.insert(rng.randrange(len(whole) + 1), rng.randrange(TOKENIZER.vocab_size))
    events = streamed([whole], **options)
    # Half a mark cut off above may be put together again by the removal of what stood inside it: text, not a leak.
    plain = TOKENIZER.decode([token for token in whole if not TOKENIZER.is_special(token)]) if by_ids else ""
    sound(events, TOKENIZER.decode(whole) if by_ids else raw, not by_ids or tools == [] or D.strip("｜") in plain)
    if number % 8 == 0:
        assert streamed(cut(whole, [rng.randrange(200) for _ in range(4)]), **options) == events


def test_thousands_of_random_completions():
    for number in range(2000):
        fuzzed(number)


def fuzzed_range(numbers):
    """The failures among these."""
    failures = []
    for number in numbers:
        try:
            fuzzed(number)
        except Exception as error:
            failures.append({"number": number, "error": f"{type(error).__name__}: {error}"[:200]})
    return failures


@pytest.mark.slow
def test_a_million_random_completions():
    """On two processes; writes what it found to bench/results/protocol_fuzz.json, pass or fail."""
    inputs, began = 1_000_000, time.perf_counter()
    chunks = [range(first, first + 20_000) for first in range(0, inputs, 20_000)]
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        failures = [failure for found in pool.map(fuzzed_range, chunks) for failure in found]
    result = {
        "what": "random completions: no exception, no markup in text, no text made up, the same cut or whole",
        "inputs": inputs,
        "failures": failures[:20],
        "failed": len(failures),
        "seconds": round(time.perf_counter() - began, 1),
        "device": f"{platform.processor() or platform.machine()}, 2 processes",
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=RESULTS
        ).stdout.strip(),
    }
    (RESULTS / "protocol_fuzz.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert not failures
