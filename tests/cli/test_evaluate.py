"""``nautile eval tools`` with experts in the place of the model: what is run, how it is graded and reported."""

import functools
import itertools
import json
import threading
from queue import Queue

import pytest

from agent.scripted import answer, call, client
from nautile.agent.client import Reply
from nautile.agent.tools import TOOLS
from nautile.cli import agent as agent_verb
from nautile.cli import main
from nautile.evals import tools
from nautile.evals.tools import EvalConfig, Outcome, Report, evaluate, evaluate_in_processes, wilson
from nautile.protocol import ToolCall
from nautile.train.renaming import HELD_OUT_RENAMING
from nautile.train.tasks import DEMO_KINDS, HELD_OUT_START, KINDS


class Experts:
    """A client that knows every task of ``cases`` by its prompt, and does it as its expert does; ``wrong`` are botched."""

    name = "experts"

    def __init__(self, cases, wrong=()):
        self.tasks = {}
        for kind, seed in cases:
            task = KINDS[kind].from_seed(seed)
            self.tasks[task.prompt] = (task, (kind, seed) in wrong)

    def open(self, messages, tools):
        assert tuple(tools) == TOOLS
        return ExpertChat(*self.tasks[messages[1]["content"]])


class ExpertChat:
    def __init__(self, task, wrong):
        self.turns = [
            Reply("", "", (ToolCall(f"c{index}", step.tool, json.dumps(dict(step.arguments))),), True)
            for index, step in enumerate(task.steps)
        ]
        self.turns.append(Reply("", "wrong" if wrong else task.final, (), True))
        self.tokens = 0

    def say(self, messages):
        assert messages[0]["role"] == "tool"

    def reply(self, max_tokens, watch):
        return self.turns.pop(0)


def test_every_kind_is_solved_by_its_expert_through_the_loop():
    config = EvalConfig(seeds=3, confined=False)
    report = evaluate(Experts(config.cases()), config, lambda outcome: None)
    assert [vars(outcome) for outcome in report.outcomes if not outcome.passed] == []
    assert report.met and len(report.outcomes) == 3 * len(KINDS)


def test_the_command(monkeypatch, tmp_path, capsys):
    cases = [("count_lines", HELD_OUT_START + seed) for seed in range(4)]
    monkeypatch.setattr(agent_verb, "open_client", lambda *a, **k: Experts(cases, cases[:1]))
    out = tmp_path / "new" / "result.json"
    assert main(["eval", "tools", "--kinds", "count_lines", "--seeds", "4", "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert list(printed)[:2] == ["pass@1", "kinds"] and printed["pass@1"] == 0.75
    assert printed["kinds"] == {"count_lines": {"passed": 3, "total": 4, "low": 0.3006, "high": 0.9544}}
    assert printed["sandbox"] == "bubblewrap" and printed["failures"][0]["seed"] == HELD_OUT_START
    assert {"device", "date", "commit", "seconds", "model"} <= set(printed)
    monkeypatch.setattr(agent_verb, "open_client", lambda *a, **k: Experts(cases, cases[:2]))
    assert main(["eval", "tools", "--kinds", "count_lines", "--seeds", "4", "--in-process"]) == 1
    assert "pass@1 50.0%, bar not met" in capsys.readouterr().out


def test_a_run_that_was_cut_short_goes_on(monkeypatch, tmp_path, capsys):
    """What the log holds is not measured again; a log of another run is refused; a torn last line is measured again."""
    config = EvalConfig(kinds=("count_lines",), seeds=4)
    cases, out = config.cases(), tmp_path / "result.json"
    command = ["eval", "tools", "--kinds", "count_lines", "--seeds", "4", "--in-process", "--out", str(out), "--json"]
    monkeypatch.setattr(agent_verb, "open_client", lambda *a, **k: Experts(cases, cases[:1]))
    assert main(command) == 0
    whole = json.loads(capsys.readouterr().out)
    log = out.with_suffix(".jsonl")
    lines = log.read_text().splitlines()
    assert len(lines) == 5
    log.write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])
    monkeypatch.setattr(agent_verb, "open_client", lambda *a, **k: Experts(cases[2:]))  # the first two cannot be asked again
    assert main([*command, "--resume"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["kinds"], again["failures"], again["measured_before"]) == (whole["kinds"], whole["failures"], 2)
    assert len(log.read_text().splitlines()) == 5
    assert main([*command[:4], "--seeds", "3", "--in-process", "--out", str(out), "--resume"]) == 1
    assert "other options" in capsys.readouterr().err
    assert main(["eval", "tools", "--resume"]) == 1


def test_renamed_tools_reach_the_tools_as_they_are(tmp_path):
    """An expert who speaks in the new words is right; one who uses the old ones hears that there is no such tool."""

    class Renamed(Experts):
        def open(self, messages, tools):
            names = {tool["function"]["name"] for tool in tools}
            assert not names & {tool["function"]["name"] for tool in TOOLS}
            chat = ExpertChat(*self.tasks[messages[1]["content"]])
            chat.turns = [Reply(t.reasoning, t.content, tuple(map(self.renamed, t.calls)), t.ended) for t in chat.turns]
            return chat

        def renamed(self, call):
            name, arguments = HELD_OUT_RENAMING.call(call.name, json.loads(call.arguments))
            return ToolCall(call.id, name, json.dumps(arguments))

    config = EvalConfig(seeds=2, confined=False, renamed_tools=True)
    report = evaluate(Renamed(config.cases()), config, lambda outcome: None)
    assert [vars(outcome) for outcome in report.outcomes if not outcome.passed] == []


def open_experts(cases, wrong=()):
    return Experts(cases, wrong)


def open_nothing():
    raise OSError("no weights here")


def test_processes_measure_what_one_does():
    config = EvalConfig(kinds=("count_lines", "edit_value"), seeds=3, confined=False)
    wrong = config.cases()[2:3]
    seen = []
    opening = functools.partial(open_experts, config.cases(), wrong)
    many = evaluate_in_processes(opening, config, 2, seen.append)
    one = evaluate(opening(), config, lambda outcome: None)
    assert many.outcomes == one.outcomes and {outcome.seed for outcome in seen} == {seed for _, seed in config.cases()}
    assert (many.model, many.commit, many.processes, many.score()) == (one.model, one.commit, 2, one.score())


def test_tasks_together_measure_what_one_after_the_other_does():
    """Three tasks are under way at once (a barrier proves it); outcomes and their order are those of a run alone."""
    config = EvalConfig(kinds=("count_lines", "edit_value"), seeds=3, confined=False)
    cases, seen = config.cases(), []
    meeting = threading.Barrier(3)

    class Meeting(Experts):
        def open(self, messages, tools):
            meeting.wait(timeout=60)
            return super().open(messages, tools)

    many = evaluate(Meeting(cases, cases[2:3]), config, seen.append, together=3)
    one = evaluate(Experts(cases, cases[2:3]), config, lambda outcome: None)
    assert many.outcomes == one.outcomes and sorted(outcome.seed for outcome in seen) == sorted(seed for _, seed in cases)
    assert many.to_json()["together"] == 3 and one.to_json()["together"] == 1


def test_a_task_that_breaks_ends_the_measurement():
    with pytest.raises(KeyError):
        evaluate(Experts([]), EvalConfig(kinds=("count_lines",), seeds=3, confined=False), lambda outcome: None, together=2)


def test_a_process_that_fails_ends_the_measurement():
    with pytest.raises(RuntimeError, match="no weights here"):
        evaluate_in_processes(open_nothing, EvalConfig(kinds=("count_lines",), seeds=2), 2, lambda outcome: None)


def test_workers_end_when_the_measurement_was_killed(monkeypatch):
    """Killed outright, a measurement once left its workers to finish hours of tasks for nobody."""
    parents = itertools.chain([7, 7], itertools.repeat(1))
    monkeypatch.setattr(tools.os, "getppid", lambda: next(parents))
    config = EvalConfig(kinds=("count_lines",), seeds=6, confined=False)
    queue = Queue()
    tools._work(functools.partial(open_experts, config.cases()), config, config.cases(), queue)
    assert queue.qsize() == 2


def test_the_commit_is_the_one_at_the_start(monkeypatch):
    """Somebody commits while a long measurement runs: the result must name the code that was measured."""
    versions = iter(("before", "after"))
    monkeypatch.setattr(tools, "commit", lambda: next(versions))
    config = EvalConfig(kinds=("count_lines",), seeds=1, confined=False)
    assert evaluate(Experts(config.cases()), config, lambda outcome: None).to_json()["commit"] == "before"


def test_training_seeds_are_not_evaluated():
    with pytest.raises(ValueError, match="are for training"):
        EvalConfig(first_seed=5)


def test_garbage_fails_the_task_and_not_the_measurement():
    config = EvalConfig(kinds=("count_lines",), seeds=3, confined=False)
    report = evaluate(client("for ever " * 500, call("list"), answer("7 or 8"), ""), config, lambda outcome: None)
    assert [outcome.passed for outcome in report.outcomes] == [False] * 3
    assert report.to_json()["pass@1"] == 0


def test_a_full_run_has_the_seeds_of_the_bar():
    counts = {}
    for kind, seed in EvalConfig.full().cases():
        assert seed >= HELD_OUT_START
        counts[kind] = counts.get(kind, 0) + 1
    assert counts == {kind: 300 if kind in DEMO_KINDS else 50 for kind in KINDS}


def test_a_full_run_judges_the_kinds_of_the_demo_harder():
    config = EvalConfig.full(("count_lines",))

    def report(right):
        outcomes = [Outcome("count_lines", seed, seed < right, "answered", "", "", None, 0) for seed in range(300)]
        return Report(tuple(outcomes), config, "m", 1.0)

    assert report(294).met and not report(293).met


@pytest.mark.parametrize(
    ("passed", "total", "low", "high"), [(0, 0, 0, 1), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (50, 100, 0.4038, 0.5962)]
)
def test_wilson(passed, total, low, high):
    assert wilson(passed, total) == pytest.approx((low, high), abs=1e-4)
