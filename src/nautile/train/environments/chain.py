"""Compositional, held out: follow a chain of pointers through files to the code at its end."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar

from nautile.train.environment import Action, Environment, Grade, Outcome, Script

__all__ = ["FollowChain"]

_PLACES = ("attic", "cellar", "garden", "harbour", "library", "market", "museum", "office", "station", "tower")


class FollowChain(Environment):
    """Each file names the next one; the last holds the code. Other files look the same and lead astray."""

    kind: ClassVar[str] = "follow_chain"
    held_out: ClassVar[bool] = True

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        rng = random.Random(f"{self.kind}:{seed}")
        names = [f"{place}.txt" for place in rng.sample(_PLACES, 7)]
        self.path, others = names[: rng.choice((3, 4))], names[4:]
        codes = rng.sample(range(10_000, 99_999), 4)
        self.code, self.wrong = str(codes[0]), [str(code) for code in codes[1:]]
        texts = {here: f"next: {there}" for here, there in pairwise(self.path)}
        texts[self.path[-1]] = f"code: {self.code}"
        texts |= {name: f"code: {code}" for name, code in zip(others, self.wrong, strict=True)}
        self.texts = {name: f"notes of the {name.removesuffix('.txt')}\n{text}\n" for name, text in texts.items()}

    @property
    def prompt(self) -> str:
        """See ``Environment.prompt``."""
        return (
            f"Begin with {self.path[0]}. A file with a line that begins with `next:` sends you to that file; the last one has "
            "a line that begins with `code:`. Which code is it? Answer with the code only."
        )

    def files(self) -> Mapping[str, bytes]:
        """See ``Environment.files``."""
        return {name: text.encode() for name, text in self.texts.items()}

    def grade(self, outcome: Outcome) -> Grade:
        """The code, and an untouched directory."""
        if outcome.files() != dict(self.files()):
            return Grade(0.0, "the files were changed")
        return Grade.of(outcome.answer.strip().strip("`\"'.") == self.code, "another code")

    def expert(self) -> Script:
        """Read one file after the other."""
        return Script("expert", tuple(Action("read", {"path": name}) for name in self.path), self.code)

    def adversaries(self) -> tuple[Script, ...]:
        """A code of the wrong file, every code, and rewriting the chain."""
        shortcut = Action("edit", {"path": self.path[0], "old": "next: ", "new": "code: "})
        return (
            Script("silent", (), ""),
            Script("the first code in sight", (), self.wrong[0]),
            Script("every code", (Action("grep", {"pattern": "code:"}),), " ".join([self.code, *self.wrong])),
            Script("changes the files", (*self.expert().actions, shortcut), self.code),
        )
