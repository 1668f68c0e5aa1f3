"""The command line: verbs, exit statuses, one line for every error, and the main job with scripted models."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from agent.scripted import answer, call, client
from nautile import __version__
from nautile.cli import agent as agent_verb
from nautile.cli import demo, main
from nautile.evals.kinds import kind_of
from nautile.sandbox import doctor
from nautile.train.tasks import DEMO_KINDS


@pytest.fixture
def place(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "notes").write_text("one\ntwo\n")
    return root


@pytest.fixture
def scripted(monkeypatch):
    """Let the verbs work with a scripted model; gives a function that sets its turns."""

    def use(*turns):
        made = client(*turns)
        monkeypatch.setattr(agent_verb, "open_client", lambda *arguments, **options: made)
        return made

    return use


def run_agent(place, *arguments):
    return main(["agent", *arguments, "--dir", str(place), "--state", str(place.parent / "state")])


def test_help_answers_without_torch():
    script = "import sys; from nautile.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for verb in ("demo", "agent", "chat", "eval", "train"):
        assert f"\n  {verb} " in done.stdout


@pytest.mark.parametrize("verb", [["demo"], ["agent"], ["chat"], ["eval", "tools"]])
def test_every_verb_has_help_with_an_example(verb, capsys):
    assert main([*verb, "--help"]) == 0
    assert f"Example: nautile {' '.join(verb)}" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"nautile {__version__}"
    assert [line.split()[0] for line in lines] == ["nautile", "torch", "triton", "checkpoint"]


def test_python_m():
    done = subprocess.run([sys.executable, "-m", "nautile.cli", "fly"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1 and "fly" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fly"], "fly"),
        (["agent", "x", "--fly"], "--fly"),
        (["agent", "x", "--steps", "many"], "--steps"),
        (["agent", "x", "--steps", "0"], "a budget must be positive"),
        (["agent", ""], "the task is empty"),
        (["agent"], "the task is empty"),
        (["agent", "x", "--dir", "/nowhere"], "/nowhere does not exist"),
        (["agent", "x", "--dir", "/etc/passwd"], "/etc/passwd is not a directory"),
        (["agent", "x", "--resume"], "leave the task out"),
        (["eval", "tools", "--kinds", "flying"], "unknown kind flying"),
        (["eval", "tools", "--seeds", "0"], "at least one seed"),
    ],
)
def test_errors_are_one_line_and_status_one(arguments, said, capsys):
    assert main(arguments) == 1
    output = capsys.readouterr()
    assert said in output.err and output.err.count("\n") == 1 and output.out == ""


@pytest.mark.parametrize("verb", [["demo"], ["chat"], ["agent", "x"], ["eval", "tools"]])
def test_a_missing_model_says_what_is_missing(verb, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(agent_verb, "shipped_model", lambda: tmp_path)
    assert main(verb) == 1
    error = capsys.readouterr().err
    assert "lacks config.json, tokenizer.json, *.safetensors" in error and "Traceback" not in error


def test_unexpected_errors_name_themselves(scripted, place, capsys, monkeypatch):
    def broken(*arguments, **options):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(agent_verb, "open_client", broken)
    assert run_agent(place, "x") == 1
    assert (
        capsys.readouterr().err.splitlines()[-1] == "nautile: ZeroDivisionError: by zero; nautile --debug VERB ... shows where"
    )
    assert main(["--debug", "agent", "x", "--dir", str(place)]) == 1
    assert "Traceback" in capsys.readouterr().err


# agent


def test_agent_answers(place, scripted, capsys):
    scripted(call("count", pattern="o", path="notes"), answer("2"))
    assert run_agent(place, 'How many lines of notes contain "o"?') == 0
    output = capsys.readouterr().out
    assert 'count pattern="o" path="notes"' in output and "│ 2" in output and output.endswith("2\n")


def test_agent_json(place, scripted, capsys):
    scripted(answer("two"))
    assert run_agent(place, "How many?", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["status"], result["answer"]) == ("answered", "two") and Path(result["log"]).exists()


def test_agent_says_when_the_model_fails(place, scripted, capsys):
    scripted("and on and on" * 20)
    assert run_agent(place, "How many?", "--reply-tokens", "30") == 2
    assert "did not end its turn within 30 tokens" in capsys.readouterr().err


def test_agent_edits_with_yes_and_undoes(place, scripted, capsys):
    scripted(call("edit", path="notes", old="one", new="1"), answer("done"))
    assert run_agent(place, "Edit.", "--yes") == 0
    assert "-one" in capsys.readouterr().out and (place / "notes").read_text() == "1\ntwo\n"
    assert run_agent(place, "undo") == 0
    assert capsys.readouterr().out == "restored notes\n" and (place / "notes").read_text() == "one\ntwo\n"
    assert run_agent(place, "undo") == 1
    assert "has edits to take back" in capsys.readouterr().err


def test_agent_declines_without_a_terminal(place, scripted, capsys):
    scripted(call("edit", path="notes", old="one", new="1"), answer("done"))
    assert run_agent(place, "Edit.") == 0
    assert "pass --yes" in capsys.readouterr().out and (place / "notes").read_text() == "one\ntwo\n"


def test_agent_resumes(place, scripted, capsys):
    def stop():
        yield 33
        raise KeyboardInterrupt

    scripted(call("list"), stop)
    assert run_agent(place, "List.") == 1
    assert "--resume goes on" in capsys.readouterr().err
    scripted(answer("notes"))
    assert run_agent(place, "--resume") == 0
    assert "(from the log)" in capsys.readouterr().out
    assert run_agent(place, "--resume") == 1
    assert "nothing to resume" in capsys.readouterr().err


def test_control_characters_do_not_reach_the_terminal(place, scripted, capsys):
    (place / "evil").write_text("\x1b]0;owned\x07\x1b[2J\n")
    scripted(call("read", path="evil"), answer("\x1b[31mred"))
    assert run_agent(place, "Read.") == 0
    assert "\x1b" not in capsys.readouterr().out


def test_unconfined_is_said_aloud(place, scripted, capsys):
    scripted(call("run", command="echo hi"), answer("hi"))
    assert run_agent(place, "Say.", "--unconfined", "--yes") == 0
    assert "--unconfined: tools run with your rights" in capsys.readouterr().out


def test_a_task_of_no_known_kind_gets_a_warning_and_runs(place, scripted, capsys, monkeypatch, tmp_path):
    (tmp_path / "evals.json").write_text(
        json.dumps({"kinds": {"count_lines": {"passed": 50, "total": 50, "low": 0.9, "high": 1.0}}})
    )
    monkeypatch.setattr(agent_verb, "shipped_model", lambda: tmp_path)
    scripted(answer("a poem"))
    assert run_agent(place, "Write a poem about the sea") == 0
    assert "has not been measured on tasks worded like this one" in " ".join(capsys.readouterr().out.split())
    scripted(answer("3"))
    assert run_agent(place, "How many lines does notes have?") == 0
    assert "has not mastered tasks like this one" in " ".join(capsys.readouterr().out.split())
    scripted(answer("1"))
    assert run_agent(place, "How many lines of notes contain one?") == 0
    assert "mastered" not in capsys.readouterr().out
    assert main(["agent", "--kinds"]) == 0
    listed = capsys.readouterr().out
    assert "* count_lines      100.0% of 50" in listed and "  sum_column       not measured" in listed


# chat


def test_chat_streams_and_survives_ctrl_c(scripted, capsys, monkeypatch):
    def stop():
        yield from [65, 66]
        raise KeyboardInterrupt

    made = scripted(answer("hello"), stop, answer("bye"))
    lines = iter(["Hi", "", "Stop", "So?"])

    def typed(prompt):
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", typed)
    assert main(["chat"]) == 0
    output = capsys.readouterr().out
    assert "hello" in output and "(stopped; the unfinished answer is forgotten)" in output and output.endswith("bye\n")
    assert len(made.engine.prompts) == 3


# demo


def demo_turns():
    packages = sum(
        "Status: install ok installed" in line for line in Path("/var/lib/dpkg/status").read_text(encoding="utf-8").splitlines()
    )
    module = Path(importlib.util.find_spec("textwrap").origin).read_text().splitlines()
    line = module.index("class TextWrapper:") + 1
    system = Path("/etc/os-release").read_text(encoding="utf-8")
    name = system.split("VERSION_CODENAME=")[1].split("\n")[0]
    return [
        call("count", pattern="Status: install ok installed", path="status"),
        answer(str(packages)),
        call("grep", pattern="class TextWrapper", path="textwrap.py"),
        answer(f"{line}."),
        call("grep", pattern="VERSION_CODENAME", path="os-release"),
        answer(f'"{name}"'),
    ]


def test_demo_checks_three_answers(scripted, capsys):
    scripted(*demo_turns())
    assert main(["demo"]) == 0
    output = capsys.readouterr().out
    assert output.count("✓ right") == 3 and "Next: nautile agent" in output


def test_demo_says_when_the_model_was_wrong(scripted, capsys):
    scripted(*demo_turns()[:-1], answer("windows"))
    assert main(["demo"]) == 2
    output = capsys.readouterr().out
    assert "✗ wrong: 'windows', but it is" in output and "the set-up works, the model was wrong" in output


def test_demo_says_when_the_set_up_is_broken(scripted, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    missing = [doctor.Finding(kind, "missing", "not there") for kind in ("function", "container")]
    monkeypatch.setattr(doctor, "examine", lambda: iter(missing))  # containers may run on in a keeper of an earlier test
    assert main(["demo"]) == 1
    assert "apt-get install bubblewrap" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(demo, "_lookup", lambda text: next(iter(())))
    assert main(["demo"]) == 1
    assert "/etc/os-release, which every Debian and Ubuntu has" in capsys.readouterr().err


def test_the_questions_of_the_demo_are_of_its_kinds():
    assert tuple(kind_of(question.prompt) for question in demo._questions()) == DEMO_KINDS
