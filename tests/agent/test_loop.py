"""The loop with a scripted model: what is fed to the model, what is run, what is logged, how it ends and goes on."""

import dataclasses
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agent.processes import gone, nap
from agent.scripted import ScriptedEngine, answer, call, client, make_tokenizer
from nautile.agent.client import ClientError, EngineClient
from nautile.agent.loop import Agent, AgentError, Budget, OutcomeUnknownError, Unattended, last_run
from nautile.agent.tools import SYSTEM_PROMPT, TOOLS
from nautile.agent.trajectory import Begun, Called, Ended, Journal, JournalError, Replied, Returned, Undone
from nautile.agent.undo import UndoError, undo
from nautile.agent.workbench import InProcess
from nautile.engine import SamplingParams
from nautile.protocol import encode, texts
from nautile.sandbox import SandboxError, open_sandbox
from waiting import soon


@pytest.fixture
def place(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "notes").write_text("one\ntwo\nthree\n")
    return root


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


def agent(place, state, *turns, **options):
    sandbox = options.pop("sandbox", None) or InProcess(place)
    return Agent(client(*turns), TOOLS, sandbox, state=state, **options)


def kinds(path):
    return [json.loads(line)["kind"] for line in path.read_text().splitlines()]


# The conversation


def test_calls_are_run_and_results_go_back_until_the_answer(place, state):
    worker = agent(place, state, call("count", pattern="t", path="notes"), call("read", path="notes", limit=1), answer("2"))
    outcome = worker.run("How many?")
    assert (outcome.status, outcome.answer, outcome.note) == ("answered", "2", "")
    assert [(result.ok, result.output) for result in outcome.results] == [(True, "2"), (True, "1: one\n... 2 more lines")]
    assert outcome.replies[0].reasoning == "I call count."
    assert kinds(outcome.path) == [
        "begun",
        "replied",
        "called",
        "returned",
        "replied",
        "called",
        "returned",
        "replied",
        "ended",
    ]


def test_prompts_are_those_of_the_encoder(place, state):
    """What the model saw last, plus its answer, is the encoding of the whole conversation."""
    worker = agent(place, state, call("count", pattern="t", path="notes"), call("list") + "", answer("2 lines"))
    outcome = worker.run("How many <｜User｜> lines?")
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "How many <｜User｜> lines?"}]
    for reply, result in itertools.zip_longest(outcome.replies, outcome.results):
        messages.append(reply.message())
        if result is not None:
            messages.append({"role": "tool", "tool_call_id": reply.calls[0].id, "content": result.output})
    tokenizer = make_tokenizer()
    whole = encode(messages, tokenizer=tokenizer, tools=TOOLS).ids
    engine = worker.client.engine
    assert engine.prompts[-1] + list(outcome.replies[-1].ids) == whole
    assert outcome.tokens == len(whole)
    for earlier, later in itertools.pairwise(engine.prompts):
        assert later[: len(earlier)] == earlier  # each prompt continues the one before: nothing is computed twice


def test_sampled_ids_are_kept_even_when_they_are_not_how_the_tokenizer_writes_them(place, state):
    engine = ScriptedEngine([])
    split = [engine.tokenizer.encode(letter)[0] for letter in "the line"]
    assert split != engine.tokenizer.encode("the line")
    sampled = split + engine.ids(call("list"))
    worker = agent(place, state, sampled, answer("ok"))
    worker.run("What?")
    first, second = worker.client.engine.prompts
    assert second[: len(first) + len(sampled)] == first + sampled


def test_several_calls_of_a_turn_run_in_order(place, state):
    text = call("edit", path="notes", old="one", new="1") + call("count", pattern="1", path="notes")
    body = text.replace(f"\n</{texts.DSML}tool_calls>{texts.EOS}I call count.</think>\n\n<{texts.DSML}tool_calls>", "")
    assert body.count("invoke name") == 2 and body.count("</think>") == 1
    outcome = agent(place, state, body, answer("done")).run("Replace.")
    assert [result.output for result in outcome.results] == ["edited notes line 1", "1"]


def test_without_tools_old_reasoning_is_dropped_as_the_format_wants():
    talk = client(answer("hello"), answer("bye"))
    chat = talk.open([], ())
    for text in ("Hi", "So?"):
        chat.say([{"role": "user", "content": text}])
        chat.reply(100, lambda event: None)
    assert "I know." not in talk.engine.tokenizer.decode(talk.engine.prompts[1])
    assert "</think>hello" in talk.engine.tokenizer.decode(talk.engine.prompts[1])


def test_a_checkpoint_that_names_no_dialect_is_not_guessed():
    quiet = dataclasses.replace(client(), engine=type("Engine", (), {"tokenizer": make_tokenizer(), "config": None})())
    quiet.engine.config = type("Config", (), {"dialect": None})()
    with pytest.raises(ClientError, match="--dialect"):
        quiet.open([], TOOLS)
    assert dataclasses.replace(quiet, dialect="preview").open([], TOOLS).tokens > 0
    with pytest.raises(ClientError, match="tokenizer"):
        EngineClient(type("Engine", (), {"tokenizer": None, "config": quiet.engine.config})(), SamplingParams()).open([], ())


# What can go wrong


@pytest.mark.parametrize("task", ["", "  \n"])
def test_an_empty_task_is_refused(place, state, task):
    with pytest.raises(AgentError, match="the task is empty"):
        agent(place, state).run(task)
    assert not state.exists()


def test_a_task_that_is_not_text_is_refused(place, state):
    with pytest.raises(AgentError, match="not valid text"):
        agent(place, state).run("caf\udce9")


def test_an_answer_of_a_tool_that_is_not_text_is_made_text(place, state):
    class Odd(InProcess):
        def call(self, program, request, *, time_limit):
            return {"ok": 1, "output": "a\ud800b"}

    outcome = agent(place, state, call("list"), answer("?"), sandbox=Odd(place)).run("What?")
    assert (outcome.results[0].ok, outcome.results[0].output) == (False, "a?b")


def test_a_budget_must_be_positive():
    with pytest.raises(AgentError, match="must be positive"):
        Budget(steps=0)


def test_a_call_that_is_wrong_is_an_error_the_model_sees(place, state):
    worker = agent(
        place,
        state,
        call("write", path="notes"),
        call("restore", path="notes", before="", after_sha256=""),
        call("read", file="notes"),
        call("edit", path="notes", old="nine", new="9"),
        answer("no"),
    )
    outputs = [result.output for result in worker.run("Write.").results]
    assert outputs[0] == "error: unknown tool 'write'; tools are list, read, grep, count, edit, run"
    assert outputs[1].startswith("error: unknown tool 'restore'")
    assert outputs[2:] == ["error: unknown argument 'file'; known are path, offset, limit", "error: old text not found"]


@pytest.mark.parametrize(
    ("garbage", "status"),
    [
        (texts.EOS, "no_answer"),
        ("I think and think" + texts.EOS, "no_answer"),
        (f"</think>  \n{texts.EOS}", "no_answer"),
        (f"x</think>{texts.THINK_OPEN}{texts.USER}{texts.DSML}{texts.EOS}", "answered"),
        (f'x</think>\n\n<{texts.DSML}tool_calls>\n<{texts.DSML}invoke name="li{texts.EOS}', "no_answer"),
        ([255, 254, 0, 199, 198], "reply_budget"),
        ([], "reply_budget"),
    ],
)
def test_garbage_ends_the_run_and_says_so(place, state, garbage, status):
    outcome = agent(place, state, garbage).run("What?")
    assert outcome.status == status
    assert outcome.note or outcome.status == "answered"
    assert kinds(outcome.path)[-1] == "ended"
    assert (place / "notes").read_text() == "one\ntwo\nthree\n"


def test_output_that_never_ends_is_cut(place, state):
    outcome = agent(place, state, lambda: itertools.repeat(7), budget=Budget(reply_tokens=50)).run("What?")
    assert outcome.status == "reply_budget" and "within 50 tokens" in outcome.note
    assert len(outcome.replies[0].ids) == 50


def test_calls_of_a_turn_that_was_cut_are_not_run(place, state):
    text = call("run", command="touch made").removesuffix(texts.EOS)
    outcome = agent(place, state, text).run("Make it.")
    assert outcome.status == "reply_budget" and not (place / "made").exists()


def test_steps_and_tokens_are_bounded(place, state):
    outcome = agent(place, state, *[call("list")] * 3, budget=Budget(steps=3)).run("Loop.")
    assert outcome.status == "step_budget" and "3 turns" in outcome.note and len(outcome.results) == 3
    limit = outcome.tokens - 100  # the third turn is cut
    outcome = agent(place, state, *[call("list")] * 3, budget=Budget(tokens=limit)).run("Loop.")
    assert outcome.status == "token_budget" and outcome.tokens == limit and len(outcome.results) == 2


def test_a_tool_that_never_ends_is_killed_and_the_run_goes_on(place, state):
    worker = agent(
        place, state, call("run", command=f"{nap(7311)} & {nap(7312)}"), answer("gone"),
        sandbox=open_sandbox(place), budget=Budget(tool_seconds=0.4),
    )  # fmt: skip
    outcome = worker.run("Wait.")
    assert outcome.results[0].output == "[killed after 0.4 s]" and outcome.answer == "gone"
    assert gone(nap(7311), nap(7312))


def test_a_sandbox_that_fails_is_an_error_the_model_sees(place, state):
    class Broken(InProcess):
        def call(self, program, request, *, time_limit):
            raise SandboxError("the tool gave no answer: it was killed")

    outcome = agent(place, state, call("list"), answer("?"), sandbox=Broken(place)).run("What?")
    assert outcome.results[0].output == "error: the tool gave no answer: it was killed"


def test_huge_and_binary_files_are_answers_not_crashes(place, state):
    (place / "binary").write_bytes(b"\0" * 100)
    with (place / "huge").open("wb") as stream:
        stream.truncate(2**30)
    worker = agent(
        place, state, call("read", path="binary"), call("read", path="huge"), answer("no"), sandbox=open_sandbox(place)
    )
    outputs = [result.output for result in worker.run("Read.").results]
    assert outputs == ["error: binary is a binary file", "error: huge is a binary file"]


# Asking


def test_edits_and_commands_need_approval_and_nothing_else_does(place, state):
    asked = []

    class Front(Unattended):
        def approve(self, called, edit):
            asked.append((called.name, edit.diff if edit else None))
            return False

    worker = agent(
        place,
        state,
        call("edit", path="notes", old="two", new="2"),
        call("run", command="touch made"),
        call("read", path="notes"),
        answer("no"),
        front=Front(),
    )
    outcome = worker.run("Change.")
    assert asked == [("edit", "--- a/notes\n+++ b/notes\n@@ -1,3 +1,3 @@\n one\n-two\n+2\n three"), ("run", None)]
    outputs = [result.output for result in outcome.results[:2]]
    assert outputs == ["error: the user declined this edit", "error: the user declined this command"]
    assert (place / "notes").read_text() == "one\ntwo\nthree\n" and not (place / "made").exists()


# Stopping and going on


def interrupting(count):
    def turn():
        yield from range(33, 33 + count)
        raise KeyboardInterrupt

    return turn


def test_ctrl_c_keeps_the_trajectory_and_resume_goes_on(place, state):
    worker = agent(place, state, call("run", command="echo x >> log"), interrupting(5))
    outcome = worker.run("Log it.")
    assert outcome.status == "interrupted" and "--resume" in outcome.note
    again = agent(place, state, answer("done"))
    resumed = again.resume(last_run(state, place))
    assert resumed.status == "answered" and resumed.answer == "done" and resumed.path == outcome.path
    assert (place / "log").read_text() == "x\n"  # not run twice
    assert again.client.engine.prompts[0] == worker.client.engine.prompts[1]  # token for token where it stopped
    with pytest.raises(AgentError, match="nothing to resume"):
        agent(place, state).resume(outcome.path)


def test_a_spent_budget_can_be_raised(place, state):
    outcome = agent(place, state, call("list"), call("list"), budget=Budget(steps=2)).run("Look.")
    assert outcome.status == "step_budget"
    assert agent(place, state, answer("ok")).resume(outcome.path).answer == "ok"
    outcome = agent(place, state, "long " * 100, budget=Budget(reply_tokens=20)).run("Say.")
    assert outcome.status == "reply_budget"
    resumed = agent(place, state, answer("short")).resume(outcome.path)
    assert (resumed.status, resumed.answer, len(resumed.replies)) == ("answered", "short", 1)


def stopped_during(path, step=0):
    """Cut a log as a crash during the call of ``step`` would have left it."""
    lines = path.read_text().splitlines(keepends=True)
    keep = [index for index, line in enumerate(lines) if json.loads(line)["kind"] == "called"][step]
    path.write_text("".join(lines[: keep + 1]))


def test_a_call_with_unknown_outcome_is_not_run_again_unasked(place, state):
    outcome = agent(place, state, call("run", command="echo x >> log"), answer("done")).run("Log it.")
    stopped_during(outcome.path)
    with pytest.raises(OutcomeUnknownError, match="--unfinished"):
        agent(place, state).resume(outcome.path)
    assert (place / "log").read_text() == "x\n"
    skipping = agent(place, state, answer("unsure"), front=Unattended(reruns=False))
    resumed = skipping.resume(outcome.path)
    assert resumed.results[0].output == "error: the run was stopped during this call; what came of it is unknown"
    assert (place / "log").read_text() == "x\n"
    stopped_during(outcome.path)
    assert agent(place, state, answer("done"), front=Unattended(reruns=True)).resume(outcome.path).answer == "done"
    assert (place / "log").read_text() == "x\nx\n"


def test_a_look_that_was_under_way_is_simply_taken_again(place, state):
    outcome = agent(place, state, call("read", path="notes"), answer("done")).run("Read.")
    stopped_during(outcome.path)
    assert agent(place, state, answer("done")).resume(outcome.path).status == "answered"


def test_a_cut_line_is_dropped(place, state):
    outcome = agent(place, state, call("list"), interrupting(1)).run("List.")
    with outcome.path.open("a") as stream:
        stream.write('{"kind": "replied", "st')
    assert agent(place, state, answer("ok")).resume(outcome.path).answer == "ok"
    assert all(json.loads(line) for line in outcome.path.read_text().splitlines())


def test_only_the_same_model_and_directory_resume(place, state, tmp_path):
    outcome = agent(place, state, interrupting(1)).run("List.")
    other = Agent(dataclasses.replace(client(), name="other"), TOOLS, InProcess(place), state=state)
    with pytest.raises(AgentError, match="--model scripted"):
        other.resume(outcome.path)
    with pytest.raises(AgentError, match="worked on"):
        agent(tmp_path, state).resume(outcome.path)
    with pytest.raises(JournalError, match="nothing to resume"):
        last_run(state, tmp_path)


def test_a_damaged_log_is_named(place, state):
    outcome = agent(place, state, interrupting(1)).run("List.")
    text = outcome.path.read_text()
    outcome.path.write_text(text.replace('"step"', '"stop"').replace('"status"', '"stat"'))
    with pytest.raises(JournalError, match=r"line 2, is damaged"):
        agent(place, state).resume(outcome.path)
    outcome.path.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(JournalError, match="log version 2"):
        agent(place, state).resume(outcome.path)


def test_a_state_that_cannot_be_written_is_named(place):
    with pytest.raises(JournalError, match="--state"):
        agent(place, place / "notes" / "state").run("List.")


def test_the_log_of_a_run_that_was_killed_as_it_started_a_tool_is_waited_for(state):
    """What is about to become the tool holds the lock for a moment longer than the run."""
    Journal.create(state, Begun("t", "/d", "m", 1.0)).close()
    (path,) = state.glob("*")
    held = os.open(path, os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Timer(0.1, os.close, [held]).start()
    Journal.open(path).close()


def test_records_survive_the_file(state, monkeypatch):
    reply = client(call("run", command='a \u2028 b\n"')).open([], TOOLS).reply(500, lambda event: None)
    records = [
        Replied(0, reply),
        Called(0, 0, "run"),
        Returned(0, 0, False, "tail é\u2028 \udcff"),
        Ended("interrupted", ""),
        Undone(1.5),
    ]
    with Journal.create(state, Begun("t", "/d", "m", 1.0)) as journal:
        for record in records:
            journal.append(record)
        with monkeypatch.context() as hurried, pytest.raises(JournalError, match="still going on"):
            hurried.setattr("nautile.agent.trajectory._HANDING_OVER", 0.05)
            Journal.open(journal.path)
    with Journal.open(journal.path) as journal:
        assert journal.records[1:] == records
    assert journal.path.stat().st_mode & 0o077 == 0 and state.stat().st_mode & 0o077 == 0


_KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from agent.scripted import answer, call, client
from nautile.agent.loop import Agent
from nautile.agent.tools import TOOLS
from nautile.sandbox import open_sandbox
root, state = Path(sys.argv[2]), Path(sys.argv[3])
turns = [call("run", command=sys.argv[4].replace("N", str(n))) for n in range(40)]
Agent(client(*turns, answer("done")), TOOLS, open_sandbox(root), state=state).run("Log.")
"""


def test_a_killed_run_loses_nothing_and_repeats_nothing(place, state):
    tests = Path(__file__).parent.parent
    command = "echo N >> log; until [ N -lt 20 -o -e go ]; do sleep 0.01; done"  # it cannot get beyond half of them
    process = subprocess.Popen([sys.executable, "-c", _KILLED, tests, place, state, command])
    soon(lambda: any(path.read_bytes().count(b'"kind": "returned"') >= 5 for path in state.glob("*")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    (place / "go").touch()
    path = last_run(state, place)
    with Journal.open(path) as journal:
        finished = sum(isinstance(record, Returned) for record in journal.records)
        replied = sum(isinstance(record, Replied) for record in journal.records)
    turns = [call("run", command=command.replace("N", str(n))) for n in range(40)]
    resumed = agent(place, state, *turns[replied:], answer("done"), front=Unattended(reruns=False), budget=Budget(steps=99))
    assert resumed.resume(path).answer == "done"
    lines = (place / "log").read_text().split()
    assert len(lines) == len(set(lines))  # nothing ran twice
    lost = set(map(str, range(40))) - set(lines)
    assert len(lost) <= 1 and not lost & set(map(str, range(finished)))  # at most the one that was under way


# Undo


def test_undo_puts_back_what_the_last_run_edited(place, state):
    (place / "other").write_bytes(b"caf\xe9 old\r\n")
    worker = agent(
        place,
        state,
        call("edit", path="notes", old="one", new="1"),
        call("edit", path="notes", old="two", new="2"),
        call("edit", path="./other", old="old", new="new"),
        call("run", command="echo made > made"),
        answer("done"),
        sandbox=open_sandbox(place),
    )
    worker.run("Edit.")
    agent(place, state, call("list"), answer("a look")).run("Look.")
    assert (place / "other").read_bytes() == b"caf\xe9 new\r\n"
    assert undo(state, open_sandbox(place)) == ("notes", "other")
    assert (place / "notes").read_text() == "one\ntwo\nthree\n"
    assert (place / "other").read_bytes() == b"caf\xe9 old\r\n" and (place / "made").exists()
    with pytest.raises(UndoError, match="has edits to take back"):
        undo(state, open_sandbox(place))


def test_undo_goes_back_run_by_run(place, state):
    for old, new in (("one", "1"), ("1", "I")):
        agent(place, state, call("edit", path="notes", old=old, new=new), answer("ok")).run("Edit.")
    for expected in ("1", "one"):
        undo(state, InProcess(place))
        assert (place / "notes").read_text() == f"{expected}\ntwo\nthree\n"


def test_undo_refuses_when_a_file_has_changed_and_touches_none(place, state):
    (place / "other").write_text("old\n")
    edits = [call("edit", path="notes", old="one", new="1"), call("edit", path="other", old="old", new="new")]
    agent(place, state, *edits, answer("ok")).run("Edit.")
    (place / "other").write_text("mine\n")
    with pytest.raises(UndoError, match=r"other has changed since the edit; nothing has been taken back"):
        undo(state, InProcess(place))
    assert (place / "notes").read_text() == "1\ntwo\nthree\n"
    (place / "other").unlink()
    with pytest.raises(UndoError, match=r"other does not exist; nothing has been taken back"):
        undo(state, InProcess(place))


def test_undo_refuses_when_a_command_wrote_between_two_edits(place, state):
    turns = [
        call("edit", path="notes", old="one", new="1"),
        call("run", command="echo four >> notes"),
        call("edit", path="notes", old="two", new="2"),
        answer("ok"),
    ]
    agent(place, state, *turns).run("Edit.")
    with pytest.raises(UndoError, match="notes has changed"):
        undo(state, InProcess(place))


@pytest.mark.parametrize("applied", [True, False])
def test_undo_knows_whether_an_edit_that_was_under_way_was_applied(place, state, applied):
    edits = [call("edit", path="notes", old="one", new="1"), call("edit", path="notes", old="two", new="2")]
    outcome = agent(place, state, *edits, answer("ok")).run("Edit.")
    stopped_during(outcome.path, step=1)
    if not applied:
        (place / "notes").write_text("1\ntwo\nthree\n")
    assert undo(state, InProcess(place)) == ("notes",)
    assert (place / "notes").read_text() == "one\ntwo\nthree\n"


def test_undo_does_not_follow_a_link_that_replaced_the_file(place, state, tmp_path):
    agent(place, state, call("edit", path="notes", old="one", new="1"), answer("ok")).run("Edit.")
    target = tmp_path / "target"
    target.write_text((place / "notes").read_text())
    (place / "notes").unlink()
    (place / "notes").symlink_to(target)
    with pytest.raises(UndoError, match="outside the workspace"):
        undo(state, InProcess(place))
    assert target.read_text() == "1\ntwo\nthree\n"
    assert os.readlink(place / "notes") == str(target)
