"""What a task is, what an expert's step is, and what every kind of task shares: wording, recovery, seeds.

A kind turns a random number generator into a directory, a prompt and the steps of an expert that knows the answer. Nothing
here runs a tool or knows tokens: ``nautile.train.traces`` runs the steps through the real tools and checks them.
"""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from nautile.train.tasks.lexicon import Lexicon
from nautile.train.tasks.wording import Wording
from nautile.train.tasks.words import Pool
from nautile.train.tasks.workspace import Workspace

__all__ = [
    "HELD_OUT_START", "NONE", "NOTHING", "Approach", "Kind", "Step", "Task", "approach", "compared", "file_phrase", "fill",
    "quote",
]  # fmt: skip

HELD_OUT_START = 10_000_000  # seeds below it train, seeds from it on evaluate
NONE = "none"  # the answer when there is nothing to find
NOTHING = "There is none."  # what the expert concludes then


@dataclass(frozen=True)
class Step:
    """One tool call of the expert: what it thinks first, the tool, its arguments.

    ``shows`` must occur in the tool's output, otherwise generator and tools disagree and recording the trace fails.
    """

    reasoning: str
    tool: str
    arguments: Mapping[str, str | int]
    shows: str = ""


@dataclass(frozen=True)
class Task:
    """A directory, what to do with it, and how to tell whether it was done."""

    kind: str
    files: dict[str, bytes]  # before the task, by relative path
    prompt: str
    answer: str | None  # None when only the directory is graded
    steps: tuple[Step, ...]
    reasoning: str  # what the expert thinks before it answers
    final: str  # what it answers
    after: dict[str, bytes] = field(default_factory=dict)  # files it must have written, by path
    removed: tuple[str, ...] = ()  # files that must be gone

    def expert(self) -> tuple[Step, ...]:
        """The scripted steps, in order."""
        return self.steps

    def write(self, root: Path) -> None:
        """Create the task's files under ``root``, which exists."""
        for path, content in self.files.items():
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

    def grade(self, root: Path, final_content: str) -> bool:
        """Whether the answer is right and the directory holds exactly the files it should.

        Quotes around the answer, a full stop after it and a leading "./" are forgiven; anything else is not.
        """
        if self.answer is not None and not _same(final_content, self.answer):
            return False
        expected = {path: content for path, content in self.files.items() if path not in self.removed} | self.after
        found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
        return found == set(expected) and all((root / path).read_bytes() == content for path, content in expected.items())


def _same(given: str, answer: str) -> bool:
    def bare(text: str) -> str:
        text = text.strip()
        text = text[:-1] if text.endswith(".") and not answer.endswith(".") else text
        if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'`" and text != answer:
            text = text[1:-1]
        return text.removeprefix("./")

    return given.strip() == answer.strip() or bare(given) == answer.strip().removeprefix("./")


def compared(wrote: str, said: str) -> str:
    """What the expert thinks when a tool finds nothing: first what it wrote beside what it was told, then what follows.

    Both are written out before anything is decided, so that a miscopied name can be seen and written again.
    """
    return f'I wrote "{wrote}"; the task says "{said}".'


# ------------------------------------------------------------------------------------------------------------------ wording

_PLAIN = re.compile(r"[A-Za-z0-9_./][\w./-]*[\w]|\w")
_GREETINGS = (
    "Please: ", "Hello. ", "Hi, ", "Quick question: ", "Task: ", "Hey, ", "One thing: ", "Next: ", "Question: ", "Now: ",
    "OK. ", "Could you help? ", "I need your help. ", "Dear agent, ", "And ",
)  # fmt: skip
_THANKS = (" Thanks.", " Thank you!", " Thanks in advance.", " Be quick.", " Please.", " Use your tools.", " Check the file.")


def quote(pool: Pool, text: str, bare: float) -> str:
    """``text`` as a person would put it in a sentence: in quotes or backticks, or with probability ``bare`` as it is."""
    rng = pool.rng
    if rng.random() < bare and _PLAIN.fullmatch(text):
        return text
    marks = rng.choices(('"', "`", "'", "“"), (60, 24, 14, 2))[0]
    if marks in text or (marks == "“" and '"' in text):
        marks = next((mark for mark in ('"', "`", "'") if mark not in text), '"')
    return f"“{text}”" if marks == "“" else f"{marks}{text}{marks}"


def fill(pool: Pool, template: str, values: Mapping[str, str], suffixes: tuple[str, ...] = ()) -> str:
    """A template with its values, sometimes with a greeting, thanks or a remark on the form of the answer."""
    rng = pool.rng
    text = re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)
    if rng.random() < 0.12:
        text = text[:-1] if template[-1] in ".?" else text
    elif suffixes and rng.random() < 0.25:
        text += f" {rng.choice(suffixes)}"
    elif rng.random() < 0.08:
        text += rng.choice(_THANKS)
    changeable = not template.startswith(("{", "I "))
    if rng.random() < 0.12:
        text = rng.choice(_GREETINGS) + (text[0].lower() + text[1:] if changeable else text)
    elif rng.random() < 0.08 and changeable:
        text = text[0].lower() + text[1:]
    return text


# -------------------------------------------------------------------------------------------------------------------- kinds


class Kind(ABC):
    """One kind of task. Subclasses say what they need, how they are worded, and how one is made."""

    name: ClassVar[str]
    needs: ClassVar[str]  # the kind of document it asks about, or "any"
    templates: ClassVar[tuple[str, ...]]
    held_out_templates: ClassVar[tuple[str, ...]]
    suffixes: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def generate(
        cls,
        rng: random.Random,
        *,
        held_out: bool = False,
        held_out_wording: bool = False,
        real_python: bool = False,
        lexicon: Lexicon | None = None,
        wording: Wording | None = None,
    ) -> Task:
        """A task in a directory of its own. ``held_out`` draws half of the words from the part kept for evaluation."""
        pool = Pool(rng, held_out, lexicon, wording)
        while True:
            task = cls.make(pool, Workspace.random(pool, (cls.needs,), real_python), held_out_wording)
            if task is not None:
                return task

    @classmethod
    def from_seed(cls, seed: int, *, held_out_wording: bool = False, real_python: bool = False) -> Task:
        """The task of a seed; from ``HELD_OUT_START`` on with the words kept for evaluation. The same on every machine
        unless ``real_python`` is set."""
        rng = random.Random(f"{cls.name}:{seed}")
        held_out = seed >= HELD_OUT_START
        return cls.generate(rng, held_out=held_out, held_out_wording=held_out_wording, real_python=real_python)

    @classmethod
    @abstractmethod
    def make(cls, pool: Pool, workspace: Workspace, held_out_wording: bool = False) -> Task | None:
        """A task on this workspace, which is changed as the task will change it; None when none can be made of it."""

    @classmethod
    def ask(cls, pool: Pool, held_out_wording: bool, values: Mapping[str, str], starting: str = "") -> str:
        """A prompt from the kind's templates, or composed where the pool has a ``wording`` (training only).

        ``starting`` keeps those whose text contains it.
        """
        if pool.wording is not None and not held_out_wording and pool.rng.random() < pool.wording.share:
            return pool.wording.request(pool, cls.name, values, re.findall(r"\w+", starting))
        templates = cls.held_out_templates if held_out_wording else cls.templates
        fitting = tuple(template for template in templates if starting in template)
        return fill(pool, pool.rng.choice(fitting or templates), values, cls.suffixes)


def file_phrase(pool: Pool, path: str) -> str:
    """How a person names a file: its path, mostly; now and then with "./", or its name and its directory."""
    rng = pool.rng
    folder, _, name = path.rpartition("/")
    pick = rng.random()
    if folder and pick < 0.06:
        between = rng.choice((" in ", " in the directory ", " in the folder ", " inside "))
        return quote(pool, name, 0.5) + between + quote(pool, folder, 0.5)
    if pick > 0.97:
        path = f"./{path}"
    return quote(pool, path, 0.5)


@dataclass(frozen=True)
class Approach:
    """How the prompt names a file, the path the expert ends up with, and its steps up to the first call that succeeds."""

    phrase: str
    path: str
    steps: tuple[Step, ...]


def approach(pool: Pool, workspace: Workspace, path: str, call: Callable[[str], Step], wrong: float = 0.05) -> Approach:
    """Name ``path`` in a prompt and make the first ``call`` on it.

    With probability ``wrong`` (twice that where requests are composed) the prompt misspells the name: the call fails, the
    directory is listed, the call is repeated.
    """
    chance = wrong if pool.wording is None else 2 * wrong
    given = workspace.misspelt(pool, path) if pool.rng.random() < chance else None
    if given is None:
        phrase = file_phrase(pool, path)
        used = f"./{path}" if phrase.strip("\"'`“”").startswith("./") else path
        return Approach(phrase, used, (call(used),))
    folder = given.rpartition("/")[0] or "."
    failing = replace(call(given), shows="error")
    listing = Step(f'{compared(given, given)} I list "{folder}".', "list", {"path": folder}, shows=path.rpartition("/")[2])
    last = call(path)
    last = replace(last, reasoning=f'It is "{path}". {last.reasoning}')
    return Approach(quote(pool, given, 0.5), path, (failing, listing, last))
