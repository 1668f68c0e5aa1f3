"""The real package ``bfcl-eval``, where it is installed: tasks of several turns through client, simulators and checker.

The model is a script. What it says is written in the model's own markup, so it is encoded, streamed as ids and parsed like any
answer: a script that makes the package's own calls must have every task right, one that says nothing must have none.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from nautile.engine.request import TokenSampled
from nautile.evals.bfcl import MULTI_TURN, Bfcl, BfclTask
from nautile.evals.bfcl_run import BfclConfig, BfclReport, _taking_turns, run_bfcl
from nautile.protocol import Tokenizer, encode
from nautile.train.packing import NANO

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bfcl_eval") is None, reason="bfcl-eval is not installed")


class Script:
    """An engine that says ``replies`` one after the other, as ids, whatever it is asked; ``heard`` are its prompts."""

    def __init__(self, tokenizer: Tokenizer, replies: list[list[dict]]) -> None:
        self.tokenizer, self.config = tokenizer, SimpleNamespace(dialect="0731")
        self.replies, self.heard = iter(replies), []

    def submit_sync(self, request) -> Iterator[TokenSampled]:
        self.heard.append(request.prompt_ids)
        calls = next(self.replies)
        said = {"role": "assistant", "reasoning_content": "So.", "content": "" if calls else "Done.", "tool_calls": calls}
        ids = encode([said], tokenizer=self.tokenizer, context=[{"role": "user", "content": "?"}]).ids
        return (TokenSampled(token) for token in ids)


def spoken(task: BfclTask, text: str) -> dict:
    """``cd('a')`` of the package's answers as a call with named arguments."""
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    offered = {function["name"]: function for functions in (task.functions, *task.late.values()) for function in functions}
    names = list(offered[call.func.id]["parameters"]["properties"])
    values = {names[place]: value for place, value in enumerate(call.args)} | {one.arg: one.value for one in call.keywords}
    arguments = {name: ast.literal_eval(value) for name, value in values.items()}
    return {"id": "", "function": {"name": call.func.id, "arguments": json.dumps(arguments)}}


def perfect(task: BfclTask) -> list[list[dict]]:
    """Turn by turn the right calls, then a word without one."""
    turns = [[spoken(task, text) for text in turn] for turn in task.answer]
    return [reply for turn in turns for reply in ((turn, []) if turn else ([],))]


def run(tasks: int | None, say) -> tuple[BfclReport, Script]:
    package = Bfcl()
    order = _taking_turns([task for category in MULTI_TURN for task in package.tasks(category, tasks)])
    engine = Script(Tokenizer.load(NANO), [reply for task in order for reply in say(task)])
    return run_bfcl(engine, BfclConfig(MULTI_TURN, tasks), lambda outcome: None, together=1), engine


@pytest.mark.parametrize("tasks", [2, pytest.param(None, marks=pytest.mark.slow)])
def test_the_packages_own_calls_are_all_right(tasks):
    """Every task of the four categories; the whole script is used up, so no turn was asked twice or left out."""
    report, engine = run(tasks, perfect)
    assert [(one.id, one.why) for one in report.outcomes if not one.passed] == []
    assert {report.score(category).total for category in MULTI_TURN} == {tasks or 200}
    assert next(engine.replies, None) is None
    words = engine.tokenizer.decode(engine.heard[-1])
    assert "<tool_result>" in words and words.count("## Tools") == 1


@pytest.mark.parametrize("tasks", [2, pytest.param(None, marks=pytest.mark.slow)])
def test_silence_is_never_right(tasks):
    """A model that ends each turn without a call, however long the conversation."""
    report, _ = run(tasks, lambda task: [[] for _ in task.turns])
    assert not any(outcome.passed for outcome in report.outcomes)
    assert {outcome.why for outcome in report.outcomes} == {"multi_turn:empty_turn_model_response"}
