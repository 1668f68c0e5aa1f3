"""Which kind of task a sentence asks for, and which kinds a model has mastered."""

from __future__ import annotations

import re
from pathlib import Path

from nautile.evals.tools import KindScore, measured_kinds
from nautile.train.tasks import KINDS

__all__ = ["MASTERED", "kind_of", "mastered"]

MASTERED = 0.90  # share of held-out tasks from which on a kind counts as mastered


def kind_of(task: str) -> str | None:
    """The kind whose wording the task follows, or None. A kind with more fixed text in its wording wins."""
    best: tuple[int, str] | None = None
    for name, kind in KINDS.items():
        for template in (*kind.templates, *kind.held_out_templates):
            fixed = re.split(r"\{\w+\}", template.rstrip(".?!"))
            pattern = "(.+?)".join(re.escape(piece) for piece in fixed)
            if re.search(pattern, task, re.IGNORECASE):
                weight = sum(map(len, fixed))
                best = max(best or (0, ""), (weight, name))
    return best[1] if best else None


def mastered(model: Path) -> dict[str, KindScore]:
    """Kinds that the model in directory ``model`` has mastered by its own measurements; empty when it was never measured."""
    scores = measured_kinds(model)
    return {kind: score for kind, score in scores.items() if score.total and score.passed / score.total >= MASTERED}
