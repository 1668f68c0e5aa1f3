"""Repository-shaped, held out: a small package, an issue, a failing test; the patch is graded by tests nobody has shown."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nautile.train.environment import Action, Environment, Grade, Outcome, Script, Shape

__all__ = ["FixBug"]

_DRIVER = """
import json, sys
request = json.load(sys.stdin)
sys.path.append("src")
results = []
try:
    module = __import__(request["module"], fromlist=["*"])
    function = getattr(module, request["function"])
    for arguments in request["cases"]:
        try:
            results.append(["value", function(*arguments)])
        except Exception as error:
            results.append(["error", type(error).__name__])
except BaseException as error:
    results = [["broken", type(error).__name__]]
print()
print(json.dumps(results))
"""


@dataclass(frozen=True)
class _Bug:
    """A function with one wrong piece: ``wrong`` stands in ``source`` and should be ``right``."""

    module: str
    function: str
    source: str
    wrong: str
    right: str
    issue: str
    visible: tuple[Any, ...]  # arguments of the visible test
    reference: Callable[..., Any]
    cases: Callable[[random.Random], list[Any]]


def _median(values: list[int]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return float(ordered[middle]) if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _chunks(values: list[int], size: int) -> list[list[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _slug(text: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in text.lower()).split())


def _numbers(rng: random.Random, most: int) -> list[int]:
    return [rng.randrange(-50, 50) for _ in range(rng.randrange(1, most))]


_BUGS = (
    _Bug(
        "stats", "median",
        "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n    if len(ordered) % 2:\n"
        "        return float(ordered[middle])\n    return (ordered[middle] + ordered[middle + 1]) / 2\n",
        "(ordered[middle] + ordered[middle + 1])", "(ordered[middle - 1] + ordered[middle])",
        "median() of an even number of values is wrong, and sometimes fails with IndexError.",
        ([1, 2, 3, 4],), _median, lambda rng: [[_numbers(rng, 12)] for _ in range(12)],
    ),
    _Bug(
        "batching", "chunks",
        "def chunks(values, size):\n    result = []\n    for start in range(0, len(values) - size + 1, size):\n"
        "        result.append(values[start:start + size])\n    return result\n",
        "len(values) - size + 1", "len(values)",
        "chunks() drops the last values when their number is not a multiple of size.",
        ([1, 2, 3, 4, 5], 2), _chunks, lambda rng: [[_numbers(rng, 20), rng.randrange(1, 6)] for _ in range(12)],
    ),
    _Bug(
        "names", "slug",
        "def slug(text):\n    kept = ''\n    for letter in text.lower():\n        kept += letter if letter.isalpha() else ' '\n"
        "    return '-'.join(kept.split())\n",
        "letter.isalpha()", "letter.isalnum()",
        "slug() loses digits: slug('Version 2') should be 'version-2'.",
        ("Version 2",), _slug,
        lambda rng: [["".join(rng.choice("aB7 _-9.z0") for _ in range(rng.randrange(0, 14)))] for _ in range(12)],
    ),
)  # fmt: skip


class FixBug(Environment):
    """Mend one function of a package; its tests are replaced by hidden ones."""

    kind: ClassVar[str] = "repository_fix_bug"
    shape: ClassVar[Shape] = "repository"
    held_out: ClassVar[bool] = True

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        rng = random.Random(f"{self.kind}:{seed}")
        self.bug = rng.choice(_BUGS)
        self.package = rng.choice(("toolkit", "helpers", "common"))
        self.cases = self.bug.cases(rng)
        self.expected = [["value", self.bug.reference(*case)] for case in self.cases]
        self.path = f"src/{self.package}/{self.bug.module}.py"
        self.test = f"tests/test_{self.bug.module}.py"

    @property
    def prompt(self) -> str:
        """See ``Environment.prompt``."""
        return (
            f"{self.bug.issue} {self.test} fails because of it: run it with `python3 -B {self.test}`. Mend {self.path}. "
            "Change no test."
        )

    def files(self) -> Mapping[str, bytes]:
        """See ``Environment.files``."""
        bug, wanted = self.bug, self.bug.reference(*self.bug.visible)
        arguments = ", ".join(map(repr, bug.visible))
        test = (
            "import sys\nsys.path.insert(0, 'src')\n"
            f"from {self.package}.{bug.module} import {bug.function}\n"
            f"got = {bug.function}({arguments})\n"
            f"assert got == {wanted!r}, f'got {{got!r}}'\nprint('passed')\n"
        )
        return {
            f"src/{self.package}/__init__.py": b"",
            self.path: bug.source.encode(),
            self.test: test.encode(),
            "README.md": f"# {self.package}\n\nSmall functions that several programs share.\n".encode(),
        }

    def grade(self, outcome: Outcome) -> Grade:
        """The mended function's values on inputs that nobody has shown; nothing else of the repository may have changed."""
        found, before = outcome.files(), self.files()
        changed = [name for name in before if name != self.path and found.get(name) != before[name]]
        if changed:
            return Grade(0.0, f"{changed[0]} was changed")
        request = {"module": f"{self.package}.{self.bug.module}", "function": self.bug.function, "cases": self.cases}
        return Grade.of(outcome.hidden_json(_DRIVER, request) == self.expected, "the hidden tests fail")

    def expert(self) -> Script:
        """Read, mend, run the visible test."""
        edit = {"path": self.path, "old": self.bug.wrong, "new": self.bug.right}
        test = Action("run", {"command": f"python3 -B {self.test}"})
        return Script("expert", (test, Action("read", {"path": self.path}), Action("edit", edit), test), "It is mended.")

    def _write(self, name: str, path: str, text: str) -> Script:
        return Script(name, (Action("run", {"command": f"cat > {path} <<'END'\n{text}\nEND"}),), "It is mended.")

    def adversaries(self) -> tuple[Script, ...]:
        """Changing the test, answering the visible case alone, leaving the process, standing in for the interpreter."""
        bug = self.bug
        value = bug.reference(*bug.visible)
        special = f"def {bug.function}(*arguments):\n    return {value!r}"
        leave = "import os, json\nprint(json.dumps([['value', 1]]), flush=True)\nos._exit(0)"
        shadow = "import sys\nsys.exit(0)"
        loads = "def load(*a):\n    return {}\ndef dumps(*a):\n    return '[]'"
        return (
            Script("only claims", (), "It is mended."),
            self._write("empties the test", self.test, "print('passed')"),
            self._write("answers the visible case", self.path, special),
            self._write("leaves the process", self.path, leave),
            self._write("a sitecustomize", "sitecustomize.py", shadow),
            self._write("a json of its own", "json.py", loads),
            Script("removes the tests", (Action("run", {"command": "rm -r tests"}),), "It is mended."),
        )
