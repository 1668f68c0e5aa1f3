"""Bugs that other servers of this protocol have had, by their number in the list of the protocol notes; one test a bug.

Each names where it was seen (owner/repository and issue). That none of them is here is what these tests hold.
"""

import itertools
import json
from pathlib import Path

import pytest

from nautile.protocol import (
    ContentDelta,
    Finish,
    ProtocolError,
    ReasoningDelta,
    StreamParser,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    constraint,
    conversation,
    encode,
    parse,
    texts,
)
from nautile.server.memory import ReasoningMemory
from protocol.completions import block, byte_tokenizer, close, cut, function, ids_of, invoke, parameter, streamed, tag

D, A, O, C, E = texts.DSML, texts.ASSISTANT, texts.THINK_OPEN, texts.THINK_CLOSE, texts.EOS  # noqa: E741
TOKENIZER = byte_tokenizer()
TOOLS = [
    function("bash", command={"type": "string"}, background={"type": "boolean"}, timeout={"type": "integer"}),
    function("noop"),
]
USER = {"role": "user", "content": "u"}


def ids(raw):
    return ids_of(raw, TOKENIZER)


def parsed(raw, start="content", tools=TOOLS, **options):
    """Parsed from ids, which is how the server does it."""
    return parse(ids(raw), start=start, tokenizer=TOKENIZER, tools=tools, **options)


def arguments(message):
    return [json.loads(call.arguments) for call in message.tool_calls]


def said(events):
    return "".join(event.text for event in events if isinstance(event, ReasoningDelta | ContentDelta))


def bash(command, *more):
    return block(invoke("bash", parameter("command", command), *more))


def test_01_vllm_53227_53417_53405_no_closing_tag_in_streamed_arguments():
    raw = "ok\n\n" + bash("ls </x> && echo '</parameter>'")
    for pieces in (list(raw), cut(raw, range(0, 400, 7)), ids(raw)):
        events = streamed(pieces, start="content", tokenizer=TOKENIZER, tools=TOOLS)
        written = "".join(event.text for event in events if isinstance(event, ToolCallArguments))
        assert json.loads(written) == {"command": "ls </x> && echo '</parameter>'"} and D not in written


@pytest.mark.parametrize("ending", ["2>&1", "2>&1\n", ">", "</", "<", "a<", "｜", "</｜"])
def test_02_vllm_45877_a_command_that_ends_in_brackets(ending):
    raw = bash(f"make {ending}")
    for pieces in ([raw], list(raw), [ids(raw)], ids(raw)):
        by_ids = not isinstance(pieces[0], str)
        events = streamed(pieces, start="content", tokenizer=TOKENIZER if by_ids else None, tools=TOOLS)
        assert [json.loads(event.call.arguments) for event in events if isinstance(event, ToolCallEnd)] == [
            {"command": f"make {ending}"}
        ]


def test_03_vllm_40800_40801_no_markup_in_streamed_content():
    raw = f"I look.\n\n{bash('ls')}\nand {tag('invoke', name='nobody')} {close('tool_calls')} {D}"
    events = streamed(ids(raw), start="content", tokenizer=TOKENIZER, tools=TOOLS)
    assert D not in said(events) and "tool_calls" not in said(events)


def test_04_vllm_54686_a_leak_cannot_come_back_in_the_next_prompt():
    raw = f"Use {tag('parameter')} {close('invoke')} {D}\n\n{bash('ls')}{close('tool_calls')}"
    answer = parsed(raw).message()
    history = encode([USER, answer, {"role": "tool", "tool_call_id": "x", "content": "r"}], tokenizer=TOKENIZER, thinking=False)
    clean = {"role": "assistant", "content": "", "tool_calls": answer["tool_calls"]}
    wanted = encode([USER, clean, {"role": "tool", "tool_call_id": "x", "content": "r"}], tokenizer=TOKENIZER, thinking=False)
    mark = TOKENIZER.special(D)
    assert history.ids.count(mark) == wanted.ids.count(mark)
    assert D not in answer["content"]


def test_05_vllm_56184_an_empty_block_swallows_nothing():
    message = parsed(f"{tag('tool_calls')}\n{close('tool_calls')}\n\nThe answer.{close('invoke')}")
    assert (message.content, message.tool_calls, message.finish_reason) == ("The answer.", (), "stop")


def test_06_vllm_41122_booleans_are_booleans():
    raw = block(invoke("bash", parameter("background", "true"), parameter("timeout", "5"), parameter("command", "true")))
    assert arguments(parsed(raw)) == [{"background": True, "timeout": 5, "command": "true"}]


@pytest.mark.parametrize("name", ["arguments", "input"])
def test_07_vllm_41240_41241_wrapped_arguments(name):
    whole = '{"command": "ls", "timeout": 5}'
    for string in ("true", "false"):
        message = parsed(block(invoke("bash", parameter(name, whole, string))))
        assert arguments(message) == [json.loads(whole)] and f"repaired:{name}" in message.tool_calls[0].flags
    real = [function("run", **{name: {"type": "object"}})]
    assert arguments(parsed(block(invoke("run", parameter(name, whole, "false"))), tools=real)) == [{name: json.loads(whole)}]
    other = block(invoke("bash", parameter(name, '{"other": 1}', "false")))
    assert arguments(parsed(other)) == [{name: {"other": 1}}]  # not the tool's parameters: left as it is
    both = block(invoke("bash", parameter(name, whole, "false"), parameter("timeout", "1", "false")))
    assert arguments(parsed(both)) == [{name: json.loads(whole), "timeout": 1}]
    parser = StreamParser(start="content", tools=TOOLS)
    assert said(parser.feed("2 <") + parser.finish()) == "2 <"  # what was held back comes out


def test_08_vllm_48645_50753_no_end_of_reasoning():
    message = parsed(f"The answer is 5.{E}", start="reasoning")
    assert (message.reasoning, message.content, message.finish_reason) == ("The answer is 5.", "", "stop")
    assert E not in message.reasoning


def test_09_vllm_45603_45862_a_call_inside_unclosed_reasoning():
    message = parsed(f"I need ls\n\n{bash('ls')}", start="reasoning")
    assert (message.reasoning, arguments(message), message.finish_reason) == ("I need ls", [{"command": "ls"}], "tool_calls")


@pytest.mark.parametrize("empty", [None, "", "null", "{}", {}])
def test_10_vllm_40991_arguments_of_null_in_history(empty):
    call = {"id": "c", "type": "function", "function": {"name": "noop", "arguments": empty}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": None},
    ]
    text = conversation(messages, tools=TOOLS).prompt().text
    assert f'<{D}invoke name="noop">\n\n</{D}invoke>' in text and "null" not in text.partition(A)[2]


@pytest.mark.parametrize(
    "hostile", ["<" * 5000, f"<{D}tool_calls" + " " * 5000, f'<{D}invoke name="' + "x" * 5000, "</" * 3000]
)
def test_11_vllm_40854_nothing_waits_for_ever(hostile):
    for pieces in (hostile, ids(hostile)):
        parser = StreamParser(start="content", tokenizer=TOKENIZER, tools=TOOLS)
        events = [event for piece in pieces for event in parser.feed(piece)]
        assert len(parser._buffer) < 2000
        events += parser.finish("stop")
        assert isinstance(events[-1], Finish) and sum(isinstance(event, Finish) for event in events) == 1


def test_12_sglang_39277_28035_arguments_in_history_as_an_object():
    as_object = {"id": "c", "function": {"name": "bash", "arguments": {"command": "ls", "timeout": 5}}}
    as_text = {"id": "c", "function": {"name": "bash", "arguments": '{"command": "ls", "timeout": 5}'}}
    prompts = [encode([USER, {"role": "assistant", "tool_calls": [call]}], tools=TOOLS).text for call in (as_object, as_text)]
    assert prompts[0] == prompts[1] and 'name="arguments"' not in prompts[0]


SHAPES = list(
    itertools.product(
        ["tool_calls", "function_calls", None],  # the block's name, or no block
        ["\n", "", " "],  # between tags
        ["whole", "no parameter closer", "no invoke closer", "no block closer", "misspelt closers"],
        [
            'name="command" string="true"',
            'string="true" name="command"',
            "name=command string=true",
            "name=“command” string=“true”",
        ],
    )
)


@pytest.mark.parametrize("by_ids", [True, False])
def test_13_sglang_40236_40237_every_shape_of_a_call_is_a_call(by_ids):
    for wrapper, between, fault, attributes in SHAPES:
        parts = [f'<{D}invoke name="bash">', f"<{D}parameter {attributes}>ls"]
        parts += (
            [] if fault == "no parameter closer" else [f"</{D}param>" if fault == "misspelt closers" else close("parameter")]
        )
        parts += [] if fault == "no invoke closer" else [f"</{D}inv>" if fault == "misspelt closers" else close("invoke")]
        if wrapper:
            parts = [tag(wrapper), *parts]
        if wrapper and fault != "no block closer":
            parts.append(close("tool_ccalls" if fault == "misspelt closers" else wrapper))
        if fault == "no invoke closer" and not wrapper:
            parts.append(close("tool_calls"))
        raw = "".join(part + (between if not part.endswith("ls") else "") for part in parts)
        message = parsed(raw) if by_ids else parse(raw, start="content", tools=TOOLS)
        assert [json.loads(call.arguments)["command"].strip() for call in message.tool_calls] == ["ls"], raw
        assert D not in message.content and "invoke" not in message.content, raw


def test_14_sglang_32539_no_markup_in_reasoning():
    message = parsed(f"first {tag('parameter', name='x')} then {D} and {close('invoke')}</think>done", start="reasoning")
    assert D not in message.reasoning and (message.content, message.tool_calls) == ("done", ())


def test_15_sglang_33140_33145_33389_the_effort_tiers_of_0731():
    lengths = [len(encode([USER], effort=effort).text) for effort in ("low", "high", "max")]
    assert lengths[0] == len(encode([USER]).text) and lengths == sorted(set(lengths))
    assert encode([USER], effort="high").text == encode([USER], effort="max", dialect="preview").text
    with pytest.raises(ProtocolError, match="effort"):
        encode([USER], effort="low", dialect="preview")


def test_16_sglang_39909_v41_is_another_protocol_and_refused():
    for name in ("v4.1", "V4.1", "deepseek_v41"):
        with pytest.raises(ProtocolError, match="unknown dialect"):
            encode([USER], dialect=name)


def test_17_smg_2080_the_dialect_is_named_never_guessed():
    assert encode([USER], effort="high", dialect="preview").text != encode([USER], effort="high", dialect="0731").text
    with pytest.raises(ProtocolError, match="choose one of preview, 0731"):
        encode([USER], dialect="")


def test_18_local_inference_lab_vllm_220_no_tier_is_one_too_low():
    for effort, words in (("high", "Absolute maximum"), ("max", "Beyond maximum")):
        assert f"Reasoning Effort: {words}" in encode([USER], effort=effort).text


def test_19_vllm_deepseek_v4_sm89_100_parser_and_prompt_agree_on_thinking():
    assert encode([USER]).start == "reasoning"  # the defaults of encode and parse are the same
    assert parse("a").reasoning == "a" and parse("a", start=encode([USER], thinking=False).start).content == "a"


def test_20_llama_cpp_25891_26398_24162_call_before_the_end_of_reasoning_and_options_kept():
    message = parsed(f"hm{bash('ls')}</think>", start="reasoning")
    assert (message.reasoning, arguments(message), message.content) == ("hm", [{"command": "ls"}], "")
    messages = [USER, {"role": "assistant", "content": "a", "reasoning_content": "why"}, USER]
    assert "Beyond maximum" in encode(messages, effort="max").text
    assert '{"type": "object"}' in encode(messages, response_format={"type": "object"}).text
    assert "why" in encode(messages, drop_thinking=False).text and "why" not in encode(messages).text
    assert encode(messages).text.endswith(f"{A}{O}")  # it reasons


def test_21_ds4_42_167_318_273_192_389_635_broken_output_costs_its_own_turn_only():
    cut_off = parsed(bash("make").partition("make")[0], finish_reason="length")
    assert (cut_off.tool_calls, cut_off.finish_reason, cut_off.flags) == ((), "length", ("truncated_call",))
    stalled = parsed("hm", start="reasoning", finish_reason="length")
    assert (stalled.reasoning, stalled.finish_reason) == ("hm", "length")
    repaired = parsed(
        f"</think>{tag('invoke', name='bash')}{tag('parameter', name='command')}ls</{D}", start="reasoning"
    ).message()
    history = [USER, {"role": "assistant", "content": "a", "reasoning_content": "why"}, USER]
    before = encode(history, tools=TOOLS, tokenizer=TOKENIZER).ids
    after = encode([*history, repaired, USER], tools=TOOLS, tokenizer=TOKENIZER).ids
    assert after[: len(before)] == before  # nothing before the broken turn has to be computed again


def test_22_ds4_on_spark_20_tools_in_the_form_of_responses():
    flat = [
        {"type": "function", "name": "bash", "parameters": {"type": "object", "properties": {"timeout": {"type": "integer"}}}}
    ]
    message = parsed(block(invoke("bash", parameter("timeout", "5"))), tools=flat)
    assert (arguments(message), message.content) == ([{"timeout": 5}], "")


def test_23_deepseek_v3_1376_a_required_call_is_made():
    for thinking in (True, False):
        made = conversation([USER], tools=TOOLS, tool_choice="required")
        start = made.prompt(thinking=thinking).start
        follower = constraint(TOKENIZER, start=start, tools=made.tools, tool_choice=made.tool_choice)()
        if thinking:
            follower.accept(TOKENIZER.special(C))
        assert not follower.mask()[TOKENIZER.special(E)]


def test_24_opencode_qwen_code_litellm_reasoning_that_was_not_passed_back():
    call = {"id": "c", "type": "function", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "c", "content": "r"}
    memory = ReasoningMemory()
    memory.remember("key", [USER], {**answer, "reasoning_content": "why"})
    made = conversation([USER, answer, result], tools=TOOLS)
    assert f"{O}why{C}" in encode(memory.restored("key", made.messages, tools=True), tools=TOOLS).text
    assert f"{O}{C}" in made.prompt().text  # without memory: an empty reasoning, never an error
    bridged = conversation([USER, {**answer, "reasoning": "mine"}, result], tools=TOOLS)
    assert f"{O}mine{C}" in bridged.prompt().text


@pytest.mark.parametrize("number", ["25_opencode_34676", "26_cline_13348", "28_xagent_790"])
def test_25_26_28_markup_is_never_text_whatever_stands_around_it(number):
    around = {"25": ("", ""), "26": ("Let me look:\n", "\nDone."), "28": ("```xml\n", "\n```")}[number[:2]]
    message = parsed(around[0] + bash("ls") + around[1])
    assert arguments(message) == [{"command": "ls"}] and D not in message.content and "invoke" not in message.content


def test_27_frontend_crates_123_echoed_markup_is_not_executed():
    echoed = TOKENIZER.encode(bash("rm -rf /"))  # the text of a file or a web page: no token of the protocol in it
    message = parse(echoed, start="content", tokenizer=TOKENIZER, tools=TOOLS)
    assert (message.tool_calls, message.content) == ((), bash("rm -rf /"))
    assert parsed(invoke("rm", parameter("command", "/"))).tool_calls == ()  # no block, and no tool of that name
    for tools in (TOOLS, None):
        assert parsed(invoke("bash", parameter("command", "ls")), tools=tools).tool_calls[0].flags == ("unwrapped",)
    assert parsed(invoke("bash", parameter("command", "ls")), tools=[]).tool_calls == ()


def test_29_osaurus_1242_misspelt_closing_tags():
    opened = f"{tag('tool_calls')}{tag('invoke', name='bash')}{tag('parameter', name='command', string='true')}"
    message = parsed(f"{opened}ls{close('parameter')}</{D}inv></{D}tool_ccalls>then")
    assert (arguments(message), message.content) == ([{"command": "ls"}], "then")


@pytest.mark.parametrize("by_ids", [True, False])
def test_30_paper_chat_for_zotero_28_doubled_bars_and_curly_quotes(by_ids):
    raw = bash("ls").replace("<｜", "<｜｜").replace("</｜", "</｜｜").replace("DSML｜", "DSML｜｜").replace('"', "”")
    whole = ids(raw) if by_ids else raw
    for pieces in ([whole], whole):
        events = streamed(pieces, start="content", tokenizer=TOKENIZER if by_ids else None, tools=TOOLS)
        calls = [event.call for event in events if isinstance(event, ToolCallEnd)]
        assert [(call.name, json.loads(call.arguments)) for call in calls] == [("bash", {"command": "ls"})]
        assert said(events) == ""


def test_31_omniroute_13930_parameters_without_a_call():
    message = parsed(f"a\n{parameter('command', 'ls')}")
    assert message.tool_calls == () and D not in message.content and "parameter" not in message.content
    in_block = parsed(f"{tag('tool_calls')}\n{parameter('command', 'ls')}\n{close('tool_calls')}")
    assert in_block.tool_calls == () and D not in in_block.content


def test_32_vllm_ascend_14511_no_call_is_made_up():
    raw = bash("ls", parameter("timeout", "5", "false"))
    whole = ids(raw)
    for end in range(len(whole)):
        for call in parse(whole[:end], start="content", tokenizer=TOKENIZER, tools=TOOLS).tool_calls:
            assert json.loads(call.arguments) == {"command": "ls", "timeout": 5}
    events = streamed(whole, start="content", tokenizer=TOKENIZER, tools=TOOLS)
    assert sum(isinstance(event, ToolCallStart) for event in events) == 1
    assert parsed(raw, tools=[]).tool_calls == ()  # calls that nobody asked for are text
    assert conversation([USER], tools=TOOLS, tool_choice="none").tools == ()


def test_33_vllm_ascend_deepseekv4_72_the_texts_are_those_of_the_official_vectors():
    vectors = Path(__file__).parent / "vectors/official"
    official = "".join(path.read_text(encoding="utf-8") for path in sorted(vectors.glob("test_output_*.txt")))
    before, after = texts.TOOLS_TEMPLATE.split("{tool_schemas}")
    assert before in official and after in official
    assert texts.CALLS_OPEN in official and texts.CALLS_CLOSE in official


def test_34_xorbitsai_inference_5372_vmlx_165_types_and_empty_arguments():
    raw = block(invoke("noop"), invoke("bash", parameter("timeout", "", "false"), parameter("command", "", "true")))
    message = parsed(raw)
    assert arguments(message) == [{}, {"timeout": "", "command": ""}]
    assert [call.flags for call in message.tool_calls] == [(), ("mismatch:timeout",)]
    assert all(isinstance(call.arguments, str) for call in message.tool_calls)


def test_35_opencode_40777_low_effort_asks_for_the_least():
    prompts = {effort: encode([USER], effort=effort).text for effort in ("low", "high", "max")}
    assert "Reasoning Effort" not in prompts["low"]
    assert all("Reasoning Effort" in prompts[effort] for effort in ("high", "max"))
