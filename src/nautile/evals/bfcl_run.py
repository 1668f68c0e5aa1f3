"""A model on BFCL's tasks, with and without constrained decoding: conversations, outcomes, the report.

Decoding is greedy and in thinking mode, without a system prompt, as the leaderboard asks. ``constrained`` makes every call true
to the schema of an offered function; where the category says that a call is due, one is required. Where the question is whether
to call at all (irrelevance, several turns), the constraint leaves that to the model.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from nautile.agent.client import Chat, EngineClient, Reply
from nautile.engine import Engine, EngineError, SamplingParams
from nautile.engine.request import Finished, Request, TokenSampled
from nautile.evals.bfcl import CATEGORIES, SINGLE_TURN, Bfcl, BfclTask, Call, Simulators, Verdict, openai_tools
from nautile.evals.tools import KindScore, commit, device_name, wilson
from nautile.protocol import Tokenizer
from nautile.protocol.grammar import GrammarConstraint, constraint

__all__ = ["BfclConfig", "BfclOutcome", "BfclReport", "run_bfcl"]

_STEPS = 20  # of one turn; the leaderboard stops a model that goes on
_LATE = "I have updated some more functions you can choose from. What about now?"  # said when functions come with a turn
_FAILURES_KEPT = 120
_CUT = "cut off"


@dataclass(frozen=True)
class BfclConfig:
    """What to measure: at most ``tasks`` of each category, drawn with a fixed seed; None for all."""

    categories: tuple[str, ...] = SINGLE_TURN
    tasks: int | None = 100
    constrained: bool = False
    reply_tokens: int = 384  # of one turn of the model
    tokens: int = 131_072  # of a conversation: the right calls of the longest take 74,500 of nano's

    def __post_init__(self) -> None:
        unknown = [category for category in self.categories if category not in CATEGORIES]
        if unknown or not self.categories:
            raise ValueError(f"unknown category {', '.join(unknown) or '(none given)'}; choose from {', '.join(CATEGORIES)}")
        if self.tasks is not None and self.tasks < 1:
            raise ValueError("at least one task a category is needed")


@dataclass(frozen=True)
class BfclOutcome:
    """One task. ``replies`` are the model's own words; nothing of the task is kept but its id."""

    id: str
    category: str
    passed: bool
    why: str
    prompt_tokens: int
    replies: tuple[str, ...]


@dataclass(frozen=True)
class BfclReport:
    """Outcomes in the order of the tasks, and how they were made."""

    outcomes: tuple[BfclOutcome, ...]
    config: BfclConfig
    model: str
    package: str
    seconds: float
    commit: str
    totals: Mapping[str, int]  # tasks of each category in the package
    known: int = 0

    def score(self, category: str) -> KindScore:
        """Tasks of a category that the package's checker accepts."""
        chosen = [outcome.passed for outcome in self.outcomes if outcome.category == category]
        return KindScore(sum(chosen), len(chosen), *wilson(sum(chosen), len(chosen)))

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "categories": {category: self._cell(category) for category in self.config.categories},
            "constrained": self.config.constrained,
            "model": self.model,
            "package": f"bfcl-eval {self.package}",
            "reply_tokens": self.config.reply_tokens,
            "tokens": self.config.tokens,
            "device": device_name(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": self.commit,
            "seconds": round(self.seconds, 1),
            **({"measured_before": self.known} if self.known else {}),
            "failures": [
                {"id": outcome.id, "why": outcome.why, "reply": " | ".join(outcome.replies)[:300]}
                for outcome in self.outcomes
                if not outcome.passed
            ][:_FAILURES_KEPT],
        }

    def _cell(self, category: str) -> dict[str, Any]:
        score = self.score(category)
        whys = Counter(one.why for one in self.outcomes if one.category == category and not one.passed)
        bounds = {"low": round(score.low, 4), "high": round(score.high, 4)}
        return {
            "passed": score.passed,
            "total": score.total,
            **bounds,
            "right_but_cut_off": sum(one.passed and one.why == _CUT for one in self.outcomes if one.category == category),
            "of": self.totals[category],
            "failures": dict(whys.most_common()),
        }


def run_bfcl(
    engine: Engine,
    config: BfclConfig,
    report_progress: Callable[[BfclOutcome], None],
    *,
    name: str = "nano",
    together: int = 16,
    known: Sequence[BfclOutcome] = (),
    seconds: float = float("inf"),
) -> BfclReport:
    """Run ``together`` tasks at a time, but those whose outcome is ``known``; no task begins after ``seconds``.

    ``report_progress`` sees each new outcome, in this thread. Raises BfclError when the package is missing.
    """
    began, version, package = time.monotonic(), commit(), Bfcl()
    tasks = [task for category in config.categories for task in package.tasks(category, config.tasks)]
    totals = {category: len(package.tasks(category)) for category in config.categories}
    outcomes = {outcome.id: outcome for outcome in known}
    run = _Run(engine, package, config)
    todo = _taking_turns([task for task in tasks if task.id not in outcomes])
    in_time = itertools.takewhile(lambda _: time.monotonic() - began < seconds, todo)
    for outcome in _together(run.outcome, in_time, together):
        outcomes[outcome.id] = outcome
        report_progress(outcome)
    ordered = tuple(outcomes[task.id] for task in tasks if task.id in outcomes)
    took = time.monotonic() - began
    return BfclReport(ordered, config, name, package.version, took, version, totals, len(known))


def _taking_turns(tasks: Sequence[BfclTask]) -> list[BfclTask]:
    """One of each category after the other, so that a run that is cut short has seen them all."""
    by_category: dict[str, list[BfclTask]] = {}
    for task in tasks:
        by_category.setdefault(task.category, []).append(task)
    rounds = itertools.zip_longest(*by_category.values())
    return [task for one_round in rounds for task in one_round if task is not None]


def _together(work: Callable[[BfclTask], BfclOutcome], tasks: Iterator[BfclTask], together: int) -> Iterator[BfclOutcome]:
    """Outcomes as they come; a new task begins when one ends, so that the engine's batch stays full."""
    with ThreadPoolExecutor(together, thread_name_prefix="nautile-bfcl") as pool:
        running: set[Future[BfclOutcome]] = set()
        try:
            while True:
                running |= {pool.submit(work, task) for task in itertools.islice(tasks, together - len(running))}
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            for future in running:
                future.cancel()


class _Constrained:
    """An engine whose every answer follows ``rule``; the part of it that a client uses."""

    def __init__(self, engine: Engine, rule: Callable[[], GrammarConstraint] | None) -> None:
        self.engine, self.rule = engine, rule

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.engine.tokenizer

    @property
    def config(self) -> Any:
        return self.engine.config

    def stream(self, prompt_ids: Sequence[int], sampling: SamplingParams | None = None) -> Iterator[int]:
        """See ``Engine.stream``."""
        events = self.engine.submit_sync(Request(tuple(prompt_ids), sampling or SamplingParams(), constraint=self.rule))
        try:
            for event in events:
                if isinstance(event, TokenSampled):
                    yield event.token
                elif isinstance(event, Finished) and event.reason == "error":
                    raise EngineError(event.error or "the request failed")
        finally:
            events.close()


@dataclass(frozen=True)
class _Run:
    engine: Engine
    package: Bfcl
    config: BfclConfig

    def outcome(self, task: BfclTask) -> BfclOutcome:
        """One task, asked and judged."""
        replies: list[Reply] = []
        if task.category in SINGLE_TURN:
            verdict, tokens = self._one_turn(task, replies)
        else:
            simulators = self.package.simulators(task)
            try:
                verdict, tokens = self._turns(task, simulators, replies)
            finally:
                simulators.close()
        said = tuple(_shown(reply) for reply in replies)
        return BfclOutcome(task.id, task.category, verdict.valid, verdict.why, tokens, said)

    def _open(self, task: BfclTask, messages: Sequence[Mapping[str, Any]], functions: Sequence[Mapping[str, Any]]) -> Chat:
        """A conversation that offers ``functions``; constrained, where that is asked for."""
        rule = None
        if self.config.constrained:
            assert self.engine.tokenizer is not None
            due = task.category in SINGLE_TURN and task.wants_call
            strict = openai_tools(functions, strict=True)
            choice = "required" if due else "auto"
            rule = constraint(self.engine.tokenizer, start="reasoning", tools=strict, tool_choice=choice)
        client = EngineClient(_Constrained(self.engine, rule), SamplingParams())
        return client.open(messages, openai_tools(functions))

    def _one_turn(self, task: BfclTask, replies: list[Reply]) -> tuple[Verdict, int]:
        chat = self._open(task, task.turns[0], task.functions)
        tokens = chat.tokens
        reply = _reply(chat, self.config)
        replies.append(reply)
        if not reply.ended:  # no call, so right where none is: the report says how many were right in this way
            return Verdict(not task.wants_call, _CUT), tokens
        calls = _calls(reply)
        if calls is None:
            return Verdict(not task.wants_call, "arguments are not JSON"), tokens
        return self.package.judge(task, calls), tokens

    def _turns(self, task: BfclTask, simulators: Simulators, replies: list[Reply]) -> tuple[Verdict, int]:
        messages: list[Mapping[str, Any]] = []
        functions = list(task.functions)
        chat: Chat | None = None
        made: list[list[list[str]]] = []
        for number, turn in enumerate(task.turns):
            said = turn
            if number in task.late:
                functions += task.late[number]
                said, chat = ({"role": "user", "content": _LATE},), None  # the offer stands at the beginning: all of it anew
            messages += said
            if chat is None:
                chat = self._open(task, messages, functions)
            else:
                chat.say(said)
            steps = self._turn(chat, simulators, messages, replies)
            if steps is None:
                break  # stopped: the checker fails a task with turns missing
            made.append(steps)
        assert chat is not None
        return simulators.judge(made), chat.tokens

    def _turn(
        self, chat: Chat, simulators: Simulators, messages: list[Mapping[str, Any]], replies: list[Reply]
    ) -> list[list[str]] | None:
        """The calls of each step until the model answers without one; None when it does not come to an end."""
        steps: list[list[str]] = []
        while len(steps) <= _STEPS and chat.tokens < self.config.tokens:
            reply = _reply(chat, self.config)
            replies.append(reply)
            messages.append(reply.message())
            calls = _calls(reply) if reply.ended else []
            if not calls:
                return steps
            written = [simulators.written(call) for call in calls]
            results = simulators.execute(written)
            steps.append(written)
            answers = [
                {"role": "tool", "tool_call_id": call.id, "content": result}
                for call, result in zip(reply.calls, results, strict=True)
            ]
            chat.say(answers)
            messages += answers
        return None


def _reply(chat: Chat, config: BfclConfig) -> Reply:
    return chat.reply(config.reply_tokens, lambda event: None)


def _calls(reply: Reply) -> list[Call] | None:
    """The calls of a reply; None when the arguments of one are not a JSON object."""
    try:
        calls = [(call.name, json.loads(call.arguments)) for call in reply.calls]
    except ValueError:
        return None
    return calls if all(isinstance(arguments, dict) for _, arguments in calls) else None


def _shown(reply: Reply) -> str:
    calls = "; ".join(f"{call.name} {call.arguments}" for call in reply.calls)
    return (calls or reply.content or f"({reply.reasoning})")[:300] + ("" if reply.ended else " [cut off]")
