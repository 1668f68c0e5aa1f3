"""``nautile eval bfcl``: what is asked, executed and judged, with a package of the same shape in the place of bfcl-eval.

The last test takes the real package where it is installed: its checker must accept its own answers.
"""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest

from nautile.agent.client import Reply
from nautile.cli import main
from nautile.evals import bfcl_run
from nautile.evals.bfcl import SINGLE_TURN, Bfcl, BfclError, openai_tools
from nautile.evals.bfcl_run import BfclConfig, run_bfcl
from nautile.protocol import ToolCall

ADD = {
    "name": "math.add",
    "description": "Adds.",
    "parameters": {
        "type": "dict",
        "properties": {
            "a": {"type": "float", "description": "One."},
            "b": {"type": "list", "items": {"type": "tuple", "items": {"type": "any"}}, "optional": True},
            "how": {"type": "string", "enum": ["fast", "slow"], "description": "Way."},
            "digits": {"type": "integer", "enum": ["1", "2"], "description": "Few."},
        },
        "required": ["a", "unknown"],
    },
}
GET, PUT = (
    {"name": name, "description": "", "parameters": {"type": "dict", "properties": {"key": {"type": "string"}}, "required": []}}
    for name in ("get", "put")
)
MODULES = {
    "constants/enums.py": "from enum import Enum\nclass Language(Enum):\n    PYTHON = 'python'\n",
    "constants/executable_backend_config.py": "MULTI_TURN_FUNC_DOC_FILE_MAPPING = {'Store': 'store.json'}\n",
    "eval_checker/ast_eval/ast_checker.py": """
from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING
def ast_checker(functions, output, answer, language, category, model):
    assert MODEL_CONFIG_MAPPING[model].underscore_to_dot
    if output[0].get("math_add") == {"a": "stop"}:
        raise TypeError("a list was expected")
    return {"valid": output == answer, "error_type": "value_error"}
""",
    "eval_checker/multi_turn_eval/multi_turn_utils.py": """
def execute_multi_turn_func_call(calls, config, classes, name, task, long_context=False, is_evaL_run=False):
    globals()[f"{name}_{task}_Store_instance"] = config
    return [f"ran {call}" for call in calls], {}
""",
    "eval_checker/multi_turn_eval/multi_turn_checker.py": """
def multi_turn_checker(made, answer, entry, category, name):
    flat = [[call for step in turn for call in step] for turn in made]
    return {"valid": flat == answer, "error_type": "state"}
""",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with one task of one turn, one where no call is right, and two of several turns; a function comes late."""
    root = tmp_path / "bfcl_eval"
    for name, text in MODULES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    data = root / "data"
    (data / "possible_answer").mkdir(parents=True)
    (data / "multi_turn_func_doc").mkdir()
    (root / "__init__.py").touch()
    (tmp_path / "bfcl_eval-7.dist-info").mkdir()
    (tmp_path / "bfcl_eval-7.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: bfcl-eval\nVersion: 7\n")
    said = [[{"role": "user", "content": "Go."}]]
    store = {"initial_config": {"Store": {}}, "involved_classes": ["Store"]}
    late = {**store, "missed_function": {"1": ["put"]}}
    lines = {
        "BFCL_v4_multiple.json": [{"id": f"multiple_{n}", "question": said, "function": [ADD]} for n in range(5)],
        "possible_answer/BFCL_v4_multiple.json": [{"ground_truth": [{"math_add": {"a": n}}]} for n in range(5)],
        "BFCL_v4_irrelevance.json": [{"id": "irrelevance_0", "question": said, "function": []}],
        "BFCL_v4_multi_turn_miss_func.json": [{"id": "multi_turn_miss_func_0", "question": [*said, []], **late}],
        "possible_answer/BFCL_v4_multi_turn_miss_func.json": [{"ground_truth": [["get(key='x')"], ["put(key='y')"]]}],
        "multi_turn_func_doc/store.json": [GET, PUT],
    }
    for name, entries in lines.items():
        (data / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for name in [name for name in sys.modules if name.partition(".")[0] == "bfcl_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Bfcl()
    for name in [name for name in sys.modules if name.partition(".")[0] == "bfcl_eval"]:
        del sys.modules[name]


class Scripted:
    """A client whose turns come from ``say(messages, tools)``."""

    def __init__(self, say):
        self.say = say

    def __call__(self, engine, sampling):
        return self

    def open(self, messages, tools):
        return ScriptedChat(self.say, list(messages), tools)


class ScriptedChat:
    def __init__(self, script, messages, tools):
        self.script, self.messages, self.tools, self.tokens = script, messages, tools, 10

    def say(self, messages):
        self.messages += messages

    def reply(self, most, watch):
        made = self.script(self.messages, [tool["function"]["name"] for tool in self.tools])
        self.messages.append(made.message())
        return made


def calls(*made):
    return Reply("", "", tuple(ToolCall(f"c{n}", name, json.dumps(a)) for n, (name, a) in enumerate(made)), True)


def run(monkeypatch, say, **options):
    monkeypatch.setattr(bfcl_run, "EngineClient", Scripted(say))
    report = run_bfcl(SimpleNamespace(tokenizer=None), BfclConfig(**options), lambda outcome: None, together=2)
    return report, {outcome.id: outcome for outcome in report.outcomes}


def test_functions_become_tools(package):
    [tool] = openai_tools(package.tasks("multiple", 1)[0].functions)
    function = tool["function"]
    assert function["name"] == "math_add" and function["description"].endswith("in Python 3 syntax.")
    kinds = function["parameters"]["properties"]
    assert [kinds[key]["type"] for key in ("a", "b", "how")] == ["number", "array", "string"]
    assert kinds["b"]["items"] == {"type": "array", "items": {"type": "string"}}
    assert kinds["a"]["description"] == "One. This is a float type value."
    [strict] = openai_tools([ADD], strict=True)
    assert strict["function"]["parameters"]["required"] == ["a"]  # what is no property cannot be asked for
    assert strict["function"]["parameters"]["properties"]["how"] == {"type": "string", "enum": ["fast", "slow"]}
    assert strict["function"]["parameters"]["properties"]["digits"] == {"type": "integer"}


def test_a_sample_is_drawn_once_and_for_all(package):
    assert [task.id for task in package.tasks("multiple", 3)] == [task.id for task in package.tasks("multiple", 3)]
    assert len(package.tasks("multiple")) == 5 and len(package.tasks("multiple", 3)) == 3
    with pytest.raises(BfclError, match="unknown category"):
        package.tasks("simple")


def test_one_turn(package, monkeypatch):
    def say(messages, tools):
        return calls(("math_add", {"a": 3})) if tools else Reply("", "None of them.", (), True)

    report, outcomes = run(monkeypatch, say, categories=("multiple", "irrelevance"), tasks=None)
    assert [one.id for one in report.outcomes if one.passed] == ["multiple_3", "irrelevance_0"]
    assert outcomes["multiple_0"].why == "value_error"
    made = report.to_json()["categories"]
    assert made["multiple"] | {"low": 0, "high": 0} == {
        "passed": 1, "total": 5, "low": 0, "high": 0, "of": 5, "right_but_cut_off": 0, "failures": {"value_error": 4},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (Reply("", "Four.", (), True), "no call"),
        (Reply("for ever", "", (), False), "cut off"),
        (Reply("", "", (ToolCall("c", "math_add", "[1]"),), True), "arguments are not JSON"),
        (calls(("math_add", {"a": "stop"})), "checker stopped: TypeError"),
    ],
)
def test_what_is_no_answer_fails(package, monkeypatch, reply, why):
    _, outcomes = run(monkeypatch, lambda messages, tools: reply, categories=("multiple",), tasks=1)
    [outcome] = outcomes.values()
    assert not outcome.passed and outcome.why == why


def test_an_answer_that_never_ended_is_told_from_a_refusal(package, monkeypatch):
    reply = Reply("for ever", "", (), False)
    report, _ = run(monkeypatch, lambda messages, tools: reply, categories=("irrelevance",), tasks=1)
    cell = report.to_json()["categories"]["irrelevance"]
    assert (cell["passed"], cell["right_but_cut_off"]) == (1, 1)


def test_several_turns_with_a_function_that_comes_late(package, monkeypatch):
    """Results go back to the model; the new function is offered from its turn on, with the words that say so."""
    seen = []

    def say(messages, tools):
        seen.append((messages[-1]["role"], messages[-1]["content"][:14], tuple(tools)))
        if messages[-1]["role"] == "user":
            return calls(("put", {"key": "y"})) if "put" in tools else calls(("get", {"key": "x"}))
        return Reply("", "Done.", (), True)

    _, outcomes = run(monkeypatch, say, categories=("multi_turn_miss_func",), tasks=None)
    assert outcomes["multi_turn_miss_func_0"].passed
    both = ("get", "put")
    assert seen == [
        ("user", "Go.", ("get",)),
        ("tool", "ran get(key='x", ("get",)),
        ("user", "I have updated", both),
        ("tool", "ran put(key='y", both),
    ]
    utils = sys.modules["bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils"]
    assert not [name for name in vars(utils) if name.startswith("nautile")]  # nothing stays behind


def test_a_model_that_never_ends_is_stopped(package, monkeypatch):
    asked = []
    say = lambda messages, tools: asked.append(1) or calls(("get", {"key": "x"}))  # noqa: E731
    _, outcomes = run(monkeypatch, say, categories=("multi_turn_miss_func",), tasks=None)
    assert outcomes["multi_turn_miss_func_0"].why == "multi_turn:force_terminated" and len(asked) == 21


def test_nothing_that_a_model_writes_is_executed(package):
    """The package gives calls to ``eval``: only offered names with plain parameter names and JSON values get that far."""
    simulators = package.simulators(package.tasks("multi_turn_miss_func")[0])
    for call in [("__import__('os').system", {}), ("get", {"key=print(1)#": "x"}), ("eval", {"key": "1"})]:
        assert simulators.written(call) == "no_such_function()"
    written = simulators.written(("get", {"key": "'); print(1) #\\"}))
    assert eval(written, {"get": lambda key: key}) == "'); print(1) #\\"


def test_bad_input(package, capsys, monkeypatch):
    assert main(["eval", "bfcl", "--categories", "chess"]) == 1
    assert "unknown category chess" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["eval", "bfcl"]) == 1
    assert "pip install --no-deps bfcl-eval" in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.skipif(importlib.util.find_spec("bfcl_eval") is None, reason="bfcl-eval is not installed")
def test_the_real_checker_accepts_its_own_answers():
    package = Bfcl()
    for category in (name for name in SINGLE_TURN if "relevance" not in name):
        tasks = package.tasks(category)
        right = 0
        for task in tasks:
            wanted = [next(iter(one.items())) for one in task.answer]
            pick = [
                (
                    name.replace(".", "_"),
                    {k: next(v for v in values if v != "") for k, values in arguments.items() if any(v != "" for v in values)},
                )
                for name, arguments in wanted
            ]
            right += package.judge(task, pick).valid
        assert right > 0.9 * len(tasks)  # the rest are nested alternatives that this test does not choose among
    task = package.tasks("multi_turn_base", 1)[0]
    simulators = package.simulators(task)
    assert simulators.judge([[turn] if turn else [] for turn in task.answer]).valid
    assert not simulators.judge([[] for _ in task.answer]).valid
