"""Finding one sentence in a long text: depth by length, in the format that training used, with Wilson's interval.

Variants: ``single`` hides one fact in sentences of random words; ``eight`` hides eight facts of the same form and asks for one;
``natural`` hides one in the Python reference, which no training run has read. Words are half of them ones kept for
evaluation, and depth is uniform: trial t of n lies in the t-th n-th of the text.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from nautile.engine import Engine, EngineConfig, SamplingParams
from nautile.evals.tools import KindScore, commit, device_name, wilson
from nautile.protocol import Prompt, encode, parse
from nautile.train.needles import Filler, Haystack, haystack, random_pool
from nautile.train.tasks import HELD_OUT_START

__all__ = ["BAR", "VARIANTS", "NeedleConfig", "NeedleOutcome", "NeedleReport", "Variant", "needle_case", "run_needles"]

BAR = 0.95  # of single needles, at every length
Variant = Literal["single", "eight", "natural"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
_SHAPES: dict[Variant, tuple[int, Filler]] = {"single": (1, "words"), "eight": (8, "words"), "natural": (1, "natural")}
_PARTS = 5  # of depth, in the report
_OVERHEAD = 16  # tokens of the conversation around the text
_REPLY = 96  # tokens an answer may have


@dataclass(frozen=True)
class NeedleConfig:
    """What to measure: ``trials`` of every variant at every length (tokens of the whole prompt, at most)."""

    lengths: tuple[int, ...] = (4096, 8192, 16_384, 32_768, 65_536)
    variants: tuple[Variant, ...] = VARIANTS
    trials: int = 10
    first_seed: int = HELD_OUT_START
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        unknown = [variant for variant in self.variants if variant not in VARIANTS]
        if unknown or not self.variants:
            raise ValueError(f"unknown variant {', '.join(unknown) or '(none given)'}; choose from {', '.join(VARIANTS)}")
        if not self.lengths or min(self.lengths) < 512:
            raise ValueError("give lengths of at least 512 tokens: a question and eight facts need that")
        if self.trials < 1:
            raise ValueError("at least one trial a length is needed")

    def cases(self) -> list[tuple[Variant, int, int]]:
        """(variant, length, trial), short texts first."""
        return [
            (variant, length, trial) for length in self.lengths for variant in self.variants for trial in range(self.trials)
        ]


@dataclass(frozen=True)
class NeedleOutcome:
    """One trial."""

    variant: Variant
    length: int
    trial: int
    depth: float
    tokens: int  # of the prompt
    passed: bool
    answer: str
    expected: str
    seconds: float


@dataclass(frozen=True)
class NeedleReport:
    """All trials of a run and how it was made."""

    outcomes: tuple[NeedleOutcome, ...]
    config: NeedleConfig
    model: str
    runner: str
    seconds: float
    commit: str

    def score(self, variant: Variant, length: int) -> KindScore:
        """Right answers of one variant at one length."""
        chosen = [one.passed for one in self.outcomes if (one.variant, one.length) == (variant, length)]
        return KindScore(sum(chosen), len(chosen), *wilson(sum(chosen), len(chosen)))

    @property
    def met(self) -> bool:
        """Whether single needles reach the bar at every length."""
        scores = [self.score("single", length) for length in self.config.lengths] if "single" in self.config.variants else []
        return all(score.passed >= BAR * score.total for score in scores)

    def to_json(self) -> dict[str, Any]:
        """For machines: by variant and length, with the right answers in each fifth of the depth, from the start on."""
        config = self.config
        return {
            "needle": {
                variant: {str(length): self._cell(variant, length) for length in config.lengths} for variant in config.variants
            },
            "bar": {"single": BAR, "met": self.met},
            "model": self.model,
            "runner": self.runner,
            "precision": config.precision,
            "trials": config.trials,
            "first_seed": config.first_seed,
            "device": device_name(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": self.commit,
            "seconds": round(self.seconds, 1),
            "failures": [vars(one) for one in self.outcomes if not one.passed][:60],
        }

    def _cell(self, variant: Variant, length: int) -> dict[str, Any]:
        score = self.score(variant, length)
        parts = [[0, 0] for _ in range(_PARTS)]
        for one in self.outcomes:
            if (one.variant, one.length) == (variant, length):
                part = parts[min(int(one.depth * _PARTS), _PARTS - 1)]
                part[0] += one.passed
                part[1] += 1
        bounds = {"low": round(score.low, 4), "high": round(score.high, 4)}
        return {"passed": score.passed, "total": score.total, **bounds, "by_depth": parts}


def needle_case(
    config: NeedleConfig, variant: Variant, length: int, trial: int, engine: Engine
) -> tuple[Haystack, Prompt, float]:
    """The text of a trial, its prompt, and the depth of what is asked for, in [0, 1)."""
    if engine.tokenizer is None:
        raise ValueError("needles need a model directory with a tokenizer")
    seed = f"{config.first_seed}:{variant}:{length}:{trial}"
    depth = (trial + random.Random(f"depth:{seed}").random()) / config.trials
    facts, filler = _SHAPES[variant]
    found = haystack(random_pool(seed, True), engine.tokenizer, length - _OVERHEAD, facts=facts, depth=depth, filler=filler)
    prompt = encode(found.messages()[:1], tokenizer=engine.tokenizer, thinking=True, dialect="0731")
    return found, prompt, depth


def run_needles(model: Path, config: NeedleConfig, report_progress: Callable[[NeedleOutcome], None]) -> NeedleReport:
    """Run every trial with greedy decoding, one after another. ``report_progress`` sees each outcome."""
    began, version = time.monotonic(), commit()
    options = EngineConfig(precision=config.precision, prefix_cache=False, max_running=1, token_budget=1024)
    engine = Engine(model, options)
    try:
        outcomes = []
        for outcome in _outcomes(engine, config):
            outcomes.append(outcome)
            report_progress(outcome)
        return NeedleReport(tuple(outcomes), config, model.name, engine.runner_name, time.monotonic() - began, version)
    finally:
        engine.close()


def _outcomes(engine: Engine, config: NeedleConfig) -> Iterator[NeedleOutcome]:
    for variant, length, trial in config.cases():
        found, prompt, depth = needle_case(config, variant, length, trial, engine)
        began = time.monotonic()
        [completion] = engine.generate([prompt], SamplingParams(max_tokens=_REPLY))
        answer = parse(completion.ids, start="reasoning", tokenizer=engine.tokenizer, tools=[]).content.strip()
        expected, seconds = found.asked[0].value, round(time.monotonic() - began, 2)
        passed = answer == expected
        yield NeedleOutcome(variant, length, trial, round(depth, 4), len(prompt.ids), passed, answer, expected, seconds)
