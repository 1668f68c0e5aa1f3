"""Traces: token for token what the agent loop feeds and the model generates."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from nautile.agent.tools import SYSTEM_PROMPT, TOOLS
from nautile.protocol import Tokenizer, encode
from nautile.train.slips import failed
from nautile.train.tasks import HELD_OUT_START, KINDS, Pool
from nautile.train.tasks.words import HELD_OUT_WORDS
from nautile.train.traces import Conversations, TraceError, TraceMaker, TraceMix, lexicon_of, run_tasks, tokenise

NANO = Path(__file__).parents[2] / "src" / "nautile" / "weights" / "nano"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(NANO)


def spans(loss: bytearray) -> list[tuple[int, int]]:
    """(start, end) of every run of ones."""
    edges = [
        index for index in range(len(loss) + 1) if (loss[index - 1 : index] or b"\0") != (loss[index : index + 1] or b"\0")
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("thinking", [True, False])
def test_training_ids_are_inference_ids(tokenizer: Tokenizer, thinking: bool) -> None:
    """Before every assistant turn the loop's prompt is exactly what precedes it in the trace, and the turn parses back."""
    with Conversations(TraceMix(thinking=float(thinking), real_python=False, slips=0)) as conversations:
        for seed in range(12):
            talk = conversations.make(seed)
            ids, loss, system = tokenise(talk.messages, talk.tools, tokenizer, talk.thinking, {})
            assert ids == encode(talk.messages, tools=talk.tools, thinking=thinking, tokenizer=tokenizer, dialect="0731").ids
            turns = [index for index, message in enumerate(talk.messages) if message["role"] == "assistant"]
            assert len(spans(loss)) == len(turns)
            assert ids[system] == tokenizer.special("<｜User｜>")
            for (start, end), turn in zip(spans(loss), turns, strict=True):
                prompt = encode(talk.messages[:turn], tools=talk.tools, thinking=thinking, tokenizer=tokenizer, dialect="0731")
                assert prompt.ids == ids[:start]
                assert ids[end - 1] == tokenizer.special("<｜end▁of▁sentence｜>")


def test_the_models_own_tokens_parse_back(tokenizer: Tokenizer) -> None:
    with Conversations(TraceMix(real_python=False, slips=0)) as conversations:
        for seed in range(12):
            talk = conversations.make(seed)
            ids, loss, _ = tokenise(talk.messages, talk.tools, tokenizer, talk.thinking, {})
            turns = [message for message in talk.messages if message["role"] == "assistant"]
            for (start, end), turn in zip(spans(loss), turns, strict=True):
                check_turn(tokenizer, ids[start : end - 1], turn, talk.tools, "reasoning" if talk.thinking else "content")


def check_turn(tokenizer: Tokenizer, own: list[int], message: dict, tools: list, start: str) -> None:
    from nautile.protocol import parse  # noqa: PLC0415

    parsed = parse(own, start=start, tokenizer=tokenizer, tools=tools)
    assert (parsed.reasoning or None) == message.get("reasoning_content")
    assert parsed.content.strip() == message["content"].strip()
    wanted = [call["function"] for call in message.get("tool_calls", [])]
    assert [call.name for call in parsed.tool_calls] == [function["name"] for function in wanted]
    for call, function in zip(parsed.tool_calls, wanted, strict=True):
        assert json.loads(call.arguments) == json.loads(function["arguments"])
        assert not call.flags


def test_pieces_never_merge_across_specials(tokenizer: Tokenizer) -> None:
    """Encoding pieces apart, as generation does, gives the ids of encoding the whole."""
    with TraceMaker(tokenizer, TraceMix(real_python=False)) as maker:
        ids = maker.make(1).ids
    pieces: list[list[int]] = [[]]
    for token in ids:
        if tokenizer.is_special(token):
            pieces += [[token], []]
        else:
            pieces[-1].append(token)
    for piece in pieces:
        if piece and not tokenizer.is_special(piece[0]):
            assert tokenizer.encode(tokenizer.decode(piece)) == piece


def test_seeds_reproduce_and_the_mix_is_kept(tokenizer: Tokenizer) -> None:
    mix = TraceMix(kinds={"count_lines": 1.0, "read_line": 1.0}, chained=1.0, real_python=False)
    with TraceMaker(tokenizer, mix) as one, TraceMaker(tokenizer, mix) as two:
        for seed in range(8):
            trace = one.make(seed)
            assert trace == two.make(seed)
            assert set(trace.kinds) <= {"count_lines", "read_line"}
            assert len(trace.ids) == len(trace.loss)
    assert not one.conversations._scratch.exists()


def test_offered_tools_contain_the_needed_ones() -> None:
    with Conversations(TraceMix(all_tools=0.0, real_python=False, renamed=0, other_system=0)) as conversations:
        orders = set()
        for seed in range(30):
            talk = conversations.make(seed)
            names = [tool["function"]["name"] for tool in talk.tools]
            used = {call["function"]["name"] for message in talk.messages for call in message.get("tool_calls", [])}
            assert used <= set(names)
            assert talk.messages[0] == {"role": "system", "content": SYSTEM_PROMPT}
            orders.add(tuple(names))
    assert len(orders) > 10
    assert len(TOOLS) == 6


def test_disagreement_between_tools_and_task_is_an_error(tmp_path: Path) -> None:
    task = KINDS["edit_value"].generate(random.Random(0))
    (tmp_path / "stray").write_text("x")
    with pytest.raises(TraceError, match="directory is not"):
        run_tasks([task], tmp_path)


def test_text_that_looks_special_stays_text(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": "What is </think><｜User｜>?"},
        {"role": "assistant", "reasoning_content": "It is <｜end▁of▁sentence｜>.", "content": "</think>"},
    ]
    ids, loss, _ = tokenise(messages, TOOLS, tokenizer)
    assert ids.count(tokenizer.special("<｜User｜>")) == 1
    assert ids.count(tokenizer.special("<｜end▁of▁sentence｜>")) == 1
    assert sum(tokenizer.special("</think>") == token for token, own in zip(ids, loss, strict=True) if own) == 1


def test_slips_are_seen_and_not_learnt(tokenizer: Tokenizer) -> None:
    """A miscopied call really finds nothing, carries no loss, and is followed by the expert's own call, which does."""
    mix, seen = TraceMix(thinking=1.0, slips=1.0, real_python=False), 0
    with Conversations(mix, lexicon_of(tokenizer)) as conversations:
        for seed in range(40):
            talk = conversations.make(seed)
            ids, loss, _ = tokenise(talk.messages, talk.tools, tokenizer, talk.thinking, {}, talk.slips)
            whole, everything, _ = tokenise(talk.messages, talk.tools, tokenizer, talk.thinking)
            turns = [index for index, message in enumerate(talk.messages) if message["role"] == "assistant"]
            assert ids == whole
            assert [own for own, _ in zip(spans(everything), turns, strict=True) if loss[own[0]]] == spans(loss)
            for number in talk.slips:
                seen += 1
                wrong, output, repaired = talk.messages[turns[number] : turns[number] + 3]
                assert failed(output["content"])
                assert not any(loss[slice(*spans(everything)[number])])
                assert all(loss[slice(*spans(everything)[number + 1])])
                assert re.match('I wrote "(.+)"; the task says "(.+)". ', repaired["reasoning_content"], re.DOTALL)
                assert wrong["tool_calls"] != repaired["tool_calls"]
            assert len(talk.slips) <= len(talk.kinds)
    assert seen > 60


def test_misreadings_take_a_word_of_the_request_for_a_name(tokenizer: Tokenizer) -> None:
    mix, swapped, seen = TraceMix(thinking=1.0, slips=1.0, misread=1.0, chained=0, renamed=0, real_python=False), 0, 0
    with Conversations(mix, lexicon_of(tokenizer)) as conversations:
        for seed in range(150):
            talk = conversations.make(seed)
            for number in talk.slips:
                turns = [message for message in talk.messages if message["role"] == "assistant"]
                wrong, right = (json.loads(turns[n]["tool_calls"][0]["function"]["arguments"]) for n in (number, number + 1))
                seen += 1
                if set(wrong) >= {"old", "new"} and (wrong["old"], wrong["new"]) == (right["new"], right["old"]):
                    swapped += 1
                said = talk.messages[1]["content"]
                named = re.match('I wrote "(.+?)"; the task says ', turns[number + 1]["reasoning_content"], re.DOTALL)
                assert named and (named[1] in said or named[1].startswith(("def", "class"))), turns[number + 1]
    assert seen > 40
    assert swapped


def test_renamed_tools_are_those_that_are_offered(tokenizer: Tokenizer) -> None:
    with TraceMaker(tokenizer, TraceMix(renamed=1.0, real_python=False)) as maker:
        changed = 0
        for seed in range(30):
            talk = maker.conversations.make(seed)
            offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in talk.tools}
            for message in talk.messages:
                for call in message.get("tool_calls", []):
                    function = call["function"]
                    arguments = json.loads(function["arguments"])
                    assert set(arguments) <= set(offered[function["name"]]["properties"])
                    assert set(offered[function["name"]]["required"]) <= set(arguments)
            changed += set(offered) != {tool["function"]["name"] for tool in TOOLS}
        assert changed > 25
        assert maker.make(1).needs_system


def test_what_is_not_there_is_compared_before_it_is_given_up(tokenizer: Tokenizer) -> None:
    found = 0
    for seed in range(400):
        task = KINDS["lookup_value"].from_seed(seed)
        if task.answer == "none":
            found += 1
            name = task.steps[-1].arguments["pattern"]
            assert task.reasoning == f'I wrote "{name}"; the task says "{name}". There is none.'
    assert found


def test_names_of_the_whole_vocabulary_occur_and_words_kept_for_evaluation_do_not(tokenizer: Tokenizer) -> None:
    lexicon = lexicon_of(tokenizer)
    rng = random.Random(0)
    words = [lexicon.word(rng) for _ in range(70_000)]
    assert not {word.lower() for word in words} & set(HELD_OUT_WORDS)
    letters = [number for number in range(tokenizer.vocab_size) if tokenizer.decode([number]) in lexicon.pieces]
    used = {number for word in words for number in tokenizer.encode(word)}
    assert len(used.intersection(letters)) > 0.97 * len(letters)
    pool = Pool(rng, lexicon=replace(lexicon, share=1.0))
    assert not {part.lower() for _ in range(2000) for part in pool.snake().split("_")} & set(HELD_OUT_WORDS)


def test_a_lexicon_changes_nothing_for_evaluation(tokenizer: Tokenizer) -> None:
    """The pinned first tasks of the published measurement: they must not move when training data changes."""
    prompts = [KINDS[kind].from_seed(HELD_OUT_START).prompt for kind in ("lookup_value", "find_file", "replace_text")]
    assert prompts == [
        'What value has "freng-language" in repeat/vision.yaml? Give only the value.',
        'Give me the name of the file with "Father shape horse apple home chalk field brand power limit.". Give only the path.',
        KINDS["replace_text"].generate(random.Random(f"replace_text:{HELD_OUT_START}"), held_out=True).prompt,
    ]
