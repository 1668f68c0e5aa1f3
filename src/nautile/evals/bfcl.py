"""The Berkeley function-calling leaderboard's own tasks and its own checkers, from the package ``bfcl-eval`` (Apache-2.0).

Nothing of it is copied here: tasks are read from the installed package, answers are judged by its AST checker and by its
multi-turn checker with the simulators it ships. ``pip install --no-deps bfcl-eval==2026.3.23``: without ``--no-deps`` it brings
the SDKs of a dozen vendors and pins NumPy 1. Covered are the Python categories of single turns and the four of several turns;
Java and JavaScript, web search and memory are left out. Functions are offered and calls are read as that package does for
models that take tools: types in JSON's words, dots in names as underscores, a note on the language.

What this file does not know: the model, how a conversation is held.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import random
import re
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

__all__ = ["CATEGORIES", "MULTI_TURN", "SINGLE_TURN", "Bfcl", "BfclError", "BfclTask", "Call", "Verdict", "openai_tools"]

SINGLE_TURN = (
    "simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance",
    "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_relevance", "live_irrelevance",
)  # fmt: skip
MULTI_TURN = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
CATEGORIES = (*SINGLE_TURN, *MULTI_TURN)
VERSION = "2026.3.23"  # that this file was written for
_FILES = "BFCL_v4_{}.json"
_HINT = " Note that the provided function is in Python 3 syntax."
_MODEL = "nautile"  # under which the checker finds how names are written
_TYPES = {
    "integer": "integer", "number": "number", "float": "number", "string": "string", "boolean": "boolean", "bool": "boolean",
    "array": "array", "list": "array", "dict": "object", "object": "object", "tuple": "array", "any": "string",
}  # fmt: skip

Call = tuple[str, Mapping[str, Any]]  # name as offered, arguments


class BfclError(ValueError):
    """The package is missing or is another one than this file knows; the text says what to do."""


@dataclass(frozen=True)
class BfclTask:
    """``turns`` of messages with the ``functions`` on offer, in the package's own words; ``late`` come with a turn."""

    id: str
    category: str
    turns: tuple[tuple[Mapping[str, Any], ...], ...]
    functions: tuple[Mapping[str, Any], ...]
    late: Mapping[int, tuple[Mapping[str, Any], ...]]
    answer: Any  # what the checker compares with; None where no call is the answer, or any
    scenario: Mapping[str, Any] = field(default_factory=dict)  # of a task of several turns: configuration and classes

    @property
    def wants_call(self) -> bool:
        """Whether a right answer holds a call, as far as the category says."""
        return "irrelevance" not in self.category


@dataclass(frozen=True)
class Verdict:
    """Of the package's checker; ``why`` is its name for the mistake."""

    valid: bool
    why: str = ""


class Bfcl:
    """The installed package."""

    def __init__(self) -> None:
        """Raises BfclError when it is not installed."""
        spec = importlib.util.find_spec("bfcl_eval")
        if spec is None or spec.origin is None:
            raise BfclError(f"BFCL's tasks come with a package: pip install --no-deps bfcl-eval=={VERSION}")
        self.root, self.version = Path(spec.origin).parent, importlib.metadata.version("bfcl-eval")
        self._names = itertools.count()

    # Tasks --------------------------------------------------------------------------------------------------------

    def tasks(self, category: str, most: int | None = None) -> list[BfclTask]:
        """The tasks of a category, or ``most`` of them drawn with a fixed seed, in the package's order."""
        if category not in CATEGORIES:
            raise BfclError(f"unknown category {category!r}; choose from {', '.join(CATEGORIES)}")
        entries = self._lines(Path(_FILES.format(category)))
        answers = self._answers(category)
        chosen = range(len(entries))
        if most is not None and most < len(entries):
            chosen = sorted(random.Random(f"bfcl:{category}").sample(chosen, most))  # type: ignore[assignment]
        return [self._task(category, entries[index], answers[index] if answers else None) for index in chosen]

    def _answers(self, category: str) -> list[Any] | None:
        path = Path("possible_answer", _FILES.format(category))
        return [line["ground_truth"] for line in self._lines(path)] if (self.root / "data" / path).exists() else None

    def _lines(self, path: Path) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in (self.root / "data" / path).read_text(encoding="utf-8").splitlines() if line]
        except OSError:
            raise BfclError(f"bfcl-eval {self.version} has no {path}: pip install --no-deps bfcl-eval=={VERSION}") from None

    def _task(self, category: str, entry: dict[str, Any], answer: Any) -> BfclTask:
        functions = entry["function"] if "function" in entry else self._documented(entry["involved_classes"])
        held_back = {int(turn): tuple(names) for turn, names in (entry.get("missed_function") or {}).items()}
        hinted = {function["name"]: {**function, "description": function["description"] + _HINT} for function in functions}
        late = {turn: tuple(hinted[name] for name in names) for turn, names in held_back.items()}
        missing = {name for names in held_back.values() for name in names}
        return BfclTask(
            id=entry["id"],
            category=category,
            turns=tuple(tuple(turn) for turn in entry["question"]),
            functions=tuple(function for name, function in hinted.items() if name not in missing),
            late=late,
            answer=answer,
            scenario={key: entry[key] for key in ("initial_config", "involved_classes") if key in entry},
        )

    def _documented(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """The functions of the simulators that a task of several turns involves."""
        files = _module("constants.executable_backend_config").MULTI_TURN_FUNC_DOC_FILE_MAPPING
        return [function for name in classes for function in self._lines(Path("multi_turn_func_doc", files[name]))]

    # Judging ------------------------------------------------------------------------------------------------------

    def judge(self, task: BfclTask, calls: Sequence[Call]) -> Verdict:
        """Of the calls of a task of one turn."""
        if "relevance" in task.category:  # and irrelevance: only whether there is a call
            right = bool(calls) == task.wants_call
            return Verdict(right, "" if right else "called" if calls else "no call")
        if not calls:
            return Verdict(False, "no call")
        _register_model()
        python, check = _module("constants.enums").Language.PYTHON, _module("eval_checker.ast_eval.ast_checker").ast_checker
        output = [{name: dict(arguments)} for name, arguments in calls]
        functions = deepcopy(list(task.functions))
        try:
            verdict = check(functions, output, task.answer, python, task.category, _MODEL)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # it expects values of about the right shape
            return Verdict(False, f"checker stopped: {type(error).__name__}")
        return Verdict(bool(verdict["valid"]), "" if verdict["valid"] else str(verdict.get("error_type")))

    def simulators(self, task: BfclTask) -> Simulators:
        """What carries out the calls of a task of several turns, from its beginning."""
        return Simulators(task, f"{_MODEL}_{next(self._names)}")


class Simulators:
    """The package's simulated file system, tickets, trading and so on, for one run of one task."""

    def __init__(self, task: BfclTask, name: str) -> None:
        checks = "eval_checker.multi_turn_eval.multi_turn_"
        self.task, self.name, self._checker, self._utils = task, name, _module(f"{checks}checker"), _module(f"{checks}utils")
        self._known = {function["name"] for functions in (task.functions, *task.late.values()) for function in functions}

    def written(self, call: Call) -> str:
        """A call as the package executes it: Python text, which it gives to ``eval``. What no simulator offers, or what is not
        the name of a parameter, becomes a call of something that does not exist, so nothing of a model's is ever run."""
        name, arguments = call
        if name not in self._known or not all(key.isidentifier() for key in arguments):
            return "no_such_function()"
        return f"{name}({','.join(f'{key}={value!r}' for key, value in arguments.items())})"

    def execute(self, calls: Sequence[str]) -> list[str]:
        """The results of calls that ``written`` wrote; an error is a result."""
        results, _ = self._utils.execute_multi_turn_func_call(
            list(calls),
            self.task.scenario["initial_config"],
            self.task.scenario["involved_classes"],
            self.name,
            self.task.id,
            long_context="long_context" in self.task.category,
        )
        return [str(result) for result in results]

    def judge(self, turns: Sequence[Sequence[Sequence[str]]]) -> Verdict:
        """Of all calls: by turn, by step of the turn. A turn too few means that the model was stopped."""
        if len(turns) != len(self.task.answer):
            return Verdict(False, "multi_turn:force_terminated")
        entry = {"id": self.task.id, **deepcopy(dict(self.task.scenario))}
        made = [[list(step) for step in turn] for turn in turns]
        verdict = self._checker.multi_turn_checker(made, self.task.answer, entry, self.task.category, self.name)
        return Verdict(bool(verdict["valid"]), "" if verdict["valid"] else str(verdict.get("error_type")))

    def close(self) -> None:
        """Forget the instances; the package keeps them among its module's globals."""
        kept = vars(self._utils)
        for key in [key for key in list(kept) if key.startswith(f"{self.name}_")]:
            kept.pop(key, None)


def _module(name: str) -> Any:
    """A module of the package; its attributes are taken as they come."""
    return importlib.import_module(f"bfcl_eval.{name}")


def _register_model() -> None:
    """Tell the checker that this model's names have underscores for dots.

    Its registry of models imports every vendor's SDK, so one with a single entry takes its place, unless it is loaded already.
    """
    name = "bfcl_eval.constants.model_config"
    if name not in sys.modules:
        registry = ModuleType(name, "The models that Nautile's measurements name.")
        registry.MODEL_CONFIG_MAPPING = {_MODEL: SimpleNamespace(underscore_to_dot=True)}  # type: ignore[attr-defined]
        sys.modules[name] = registry
    sys.modules[name].MODEL_CONFIG_MAPPING.setdefault(_MODEL, SimpleNamespace(underscore_to_dot=True))


def openai_tools(functions: Sequence[Mapping[str, Any]], strict: bool = False) -> list[dict[str, Any]]:
    """Functions of the package as tools. ``strict`` keeps what decides about values alone, for a grammar to follow."""
    return [_tool(function, strict) for function in functions]


def _tool(function: Mapping[str, Any], strict: bool) -> dict[str, Any]:
    parameters = function["parameters"]
    properties = {key: _schema(value, strict) for key, value in parameters["properties"].items()}
    name = re.sub(r"\.", "_", function["name"])
    if strict:
        required = [key for key in parameters.get("required") or () if key in properties]
        closed = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        return {"type": "function", "function": {"name": name, "parameters": closed, "strict": True}}
    return {
        "type": "function",
        "function": {**function, "name": name, "parameters": {**parameters, "type": "object", "properties": properties}},
    }


def _schema(value: Mapping[str, Any], strict: bool) -> dict[str, Any]:
    """A parameter in JSON schema's words; unknown types are strings, as the package has it."""
    kind = _TYPES.get(value.get("type", "string"), "string")
    made = {} if strict else dict(value)
    if strict and kind == "string" and all(isinstance(one, str) for one in value.get("enum", [0])):
        made["enum"] = list(value["enum"])  # others name numbers by their digits, or say what a list may hold
    made["type"] = kind
    if value.get("type") == "float" and not strict:
        made |= {"format": "float", "description": value.get("description", "") + " This is a float type value."}
    if kind in ("array", "object"):
        if "properties" in value:
            made["properties"] = {key: _schema(inner, strict) for key, inner in value["properties"].items()}
        elif "items" in value:
            made["items"] = _schema(value["items"], strict)
    return made
