"""Wrong names for training: the mistakes a small model makes, what the tool says to them, and how they are put right.

A slip is a step of the expert with one name written wrongly, as the model does it: miscopied (a piece of it replaced, doubled
or lost) or misread (another word of the request taken for it, two names exchanged). The tool finds nothing; the expert then
writes down what it wrote beside what the task says, and does the step again. The slip itself must carry no loss: mistakes are
shown, not taught. What this file does not know: tools, tokens and messages.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from nautile.train.tasks import Pool, Step, compared

__all__ = ["Slip", "failed", "make_misreading", "make_slip"]

_QUOTED = re.compile(r'"([^"]+)"')
_RUNS = re.compile(r"[A-Za-z]+|[0-9]+")
_DEFINITION = re.compile(r"(?:def |class )?(.+?)\(?")
_PROMPT_WORDS = re.compile(r"[\w./-]*\w")
_FAILURES = ("no matches", "0")


@dataclass(frozen=True)
class Slip:
    """``wrong`` is the step with a name miscopied; ``repaired`` is the step as the expert does it once it has looked again."""

    wrong: Step
    repaired: Step


def make_slip(pool: Pool, step: Step, files: Mapping[str, bytes]) -> Slip | None:
    """Miscopy one name of ``step``; None when it has none that may safely be wrong.

    The wrong name neither exists as a file nor occurs in one, so the step finds nothing and changes nothing.
    """
    names = [name for name in _QUOTED.findall(step.reasoning) if _may_be_wrong(name, step, files)]
    if not names:
        return None
    name = pool.rng.choice(names)
    wrong = _miscopied(pool, name)
    if wrong is None or wrong in files or any(wrong.encode() in content for content in files.values()):
        return None
    if any(path.startswith(f"{wrong}/") for path in files):
        return None
    arguments = {key: value.replace(name, wrong) if isinstance(value, str) else value for key, value in step.arguments.items()}
    thought = step.reasoning if pool.rng.random() < 0.3 else step.reasoning.replace(f'"{name}"', f'"{wrong}"')
    bad = Step(thought, step.tool, arguments)  # some go wrong only when the call is written
    return Slip(bad, replace(step, reasoning=f"{compared(_core(wrong), _core(name))} {step.reasoning}"))


def make_misreading(pool: Pool, step: Step, prompt: str, files: Mapping[str, bytes]) -> Slip | None:
    """``step`` as one does it who took another word of ``prompt`` for a name; None when that could change or find something."""
    names = [name for name in _QUOTED.findall(step.reasoning) if _may_be_wrong(name, step, files)]
    if not names:
        return None
    name = pool.rng.choice(names)
    others = [other for other in _QUOTED.findall(step.reasoning) if other != name]
    words = [word for word in _PROMPT_WORDS.findall(prompt) if word != name]
    exchanged = bool(others) and pool.rng.random() < 0.6
    if not (exchanged or words):
        return None
    wrong = pool.rng.choice(others) if exchanged else pool.rng.choice(words)
    searched = step.tool != "run" and name != step.arguments.get("path")
    if wrong in files or any(path.startswith(f"{wrong}/") for path in files) or wrong in (".", ""):
        return None
    if searched and any(wrong.encode() in content for content in files.values()):
        return None

    def misread(text: str) -> str:
        return text.replace(name, "\0").replace(wrong, name if exchanged else wrong).replace("\0", wrong)

    arguments = {key: misread(value) if isinstance(value, str) else value for key, value in step.arguments.items()}
    bad = Step(misread(step.reasoning), step.tool, arguments)
    return Slip(bad, replace(step, reasoning=f"{compared(_core(wrong), _core(name))} {step.reasoning}"))


def failed(output: str) -> bool:
    """Whether a tool's output says that a name was not found."""
    return output in _FAILURES or output.startswith("error: ") or "[exit " in output


def _may_be_wrong(name: str, step: Step, files: Mapping[str, bytes]) -> bool:
    if step.tool == "run":
        return name in files  # not a rename's new name, not a directory whose files are counted
    return name in (step.arguments.get("pattern"), step.arguments.get("path"), step.arguments.get("old"))


def _core(name: str) -> str:
    """What the task calls it: a definition's name without what the search adds to it."""
    match = _DEFINITION.fullmatch(name)
    return match[1] if match and name.startswith(("def ", "class ")) else name


def _miscopied(pool: Pool, name: str) -> str | None:
    """``name`` with one run of letters or digits, or a part of it, replaced, doubled or left out."""
    rng = pool.rng
    prefix = "class " if name.startswith("class ") else "def " if name.startswith("def ") else ""
    runs = [match.span() for match in _RUNS.finditer(name, len(prefix))]
    if not runs:
        return None
    start, end = rng.choice(runs)
    if end - start > 3 and rng.random() < 0.6:  # a part: as much as a token or two
        start, end = _part(rng, start, end)
    old = name[start:end]
    pick = rng.random()
    if pick < 0.7:
        new = "".join(rng.choices("0123456789", k=len(old))) if old.isdigit() else pool.word()
    else:
        new = old + old if pick < 0.85 else ""
    wrong = name[:start] + new + name[end:]
    return wrong if wrong not in (name, "") and wrong.strip() == wrong and wrong != prefix.strip() else None


def _part(rng: random.Random, start: int, end: int) -> tuple[int, int]:
    cut = rng.randrange(start + 1, end)
    return (start, cut) if rng.random() < 0.5 else (cut, end)
