"""The writer alone: tokens in, events out, whatever the reader makes of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nautile.engine.request import TokenSampled
from nautile.protocol import ContentDelta, StreamParser, ToolCallEnd
from nautile.server.generation import Output, TokenLogprobs, Writer
from server.local import TOOLS
from server.scripted import calls, ids_of, v4_tokenizer


def written(text: str, *, reason: str = "stop", scored: bool = True, **options: object) -> tuple[list[Output], Writer]:
    """What a text leads to, in an answer that starts with content."""
    tokenizer = v4_tokenizer()
    reader = StreamParser(start="content", tokenizer=tokenizer, tools=TOOLS)
    writer = Writer(tokenizer, reader, start="content", **options)
    outputs: list[Output] = []
    for token in ids_of(text):
        if writer.done:
            break
        outputs += writer.token(TokenSampled(token, logprob=-1.0 if scored else None))
    return [*outputs, *writer.finish(reason)], writer


def content(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs if isinstance(output, ContentDelta))


def scored(outputs: list[Output]) -> str:
    return b"".join(output.data for output in outputs if isinstance(output, TokenLogprobs)).decode()


def test_every_token_that_is_shown_is_scored() -> None:
    for text in ("one two three", "2 < 3 <", "é🙂 ü\n\nx", "a STO b"):
        outputs, _ = written(text, stop=("STOP",))
        assert content(outputs) == text == scored(outputs)


def test_a_stop_string_in_the_last_text_still_scores_what_was_shown() -> None:
    outputs, writer = written("one <STOP two", stop=("<STOP",))
    assert content(outputs) == "one " and writer.done
    assert scored(outputs).startswith("one") and "two" not in scored(outputs)


def test_held_text_goes_before_a_call() -> None:
    outputs, writer = written("look ST" + calls(("read", {"path": "x"})), stop=("STOP",))
    kinds = [type(output) for output in outputs if not isinstance(output, TokenLogprobs)]
    assert content(outputs) == "look ST" == scored(outputs)
    assert kinds.index(ToolCallEnd) > max(place for place, kind in enumerate(kinds) if kind is ContentDelta)
    assert writer.finished(1, 0).reason == "tool_calls"


def test_one_call_of_two() -> None:
    block = calls(("read", {"path": "x"}), ("list", {"path": "y"}))
    outputs, writer = written("look" + block, parallel_calls=False)
    assert [output.call.name for output in outputs if isinstance(output, ToolCallEnd)] == ["read"] and writer.done
    assert scored(outputs) == "look"


def test_content_after_calls_is_scored() -> None:
    for before in ("look", "", "look\n\n\n\n\n\n\n\n\n\n"):
        outputs, _ = written(before + calls(("read", {"path": "x"})) + " and so on")
        assert content(outputs) == scored(outputs) == before.rstrip("\n") + " and so on"


PLAIN = st.text(alphabet="ab \n<é🙂|", max_size=12)


@given(PLAIN, PLAIN, st.booleans())
def test_scores_spell_what_was_said(reasoning: str, answer: str, thinks: bool) -> None:
    tokenizer = v4_tokenizer()
    start = "reasoning" if thinks else "content"
    writer = Writer(tokenizer, StreamParser(start=start, tokenizer=tokenizer, tools=TOOLS), start=start, stop=("ab<",))
    outputs: list[Output] = []
    for token in ids_of((reasoning + "</think>" if thinks else "") + answer):
        if not writer.done:
            outputs += writer.token(TokenSampled(token, logprob=-1.0))
    outputs += writer.finish("stop")
    for section, said in (("reasoning", "".join(writer.reasoning)), ("content", "".join(writer.content))):
        data = b"".join(output.data for output in outputs if isinstance(output, TokenLogprobs) and output.section == section)
        spelled = data.decode().lstrip("\n")  # a first token may carry newlines that were trimmed
        assert spelled.startswith(said.lstrip("\n")) if writer.done else spelled.strip("\n") == said.strip("\n")
