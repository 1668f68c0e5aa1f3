"""Finding one sentence in a long text: depth by length, in the format that training used, with Wilson's interval.

Variants: ``single`` hides one fact in sentences of random words; ``eight`` hides eight facts of the same form and asks for one;
``natural`` hides one in the Python reference, which no training run has read; ``ten`` hides ten facts that have nothing to do
with each other and asks for each alone, ten trials a text. Words are half of them ones kept for evaluation, and depth is
uniform: trial t of n lies in the t-th n-th of the text (of ``ten``, in the t-th tenth of its text).

With ``texts`` the trials of ``single`` or ``natural`` at a length share that many texts: each trial hides another fact at its
own depth in one of them, so what stands before it need not be computed again. Questions, facts and depths are as independent
as ever, the lines around the facts are not. What is computed once changes what a trial costs, never its answer.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from nautile.engine import Engine, EngineConfig, SamplingParams
from nautile.evals.tools import KindScore, commit, device_name, wilson
from nautile.protocol import Prompt, Tokenizer, encode, parse
from nautile.train.needles import Filler, Haystack, haystack, random_pool
from nautile.train.tasks import HELD_OUT_START

__all__ = ["BAR", "VARIANTS", "NeedleConfig", "NeedleOutcome", "NeedleReport", "Variant", "needle_case", "run_needles"]

BAR = 0.95  # of single needles, at every length
Variant = Literal["single", "eight", "natural", "ten"]
Case = tuple[Variant, int, int]  # variant, length, trial
VARIANTS: tuple[Variant, ...] = get_args(Variant)
_FILLERS: dict[Variant, Filler] = {"single": "words", "eight": "words", "natural": "natural", "ten": "words"}
_TEN = 10  # facts of a text of that variant
_FACT = 72  # tokens of a fact and its question, at most
_GOLDEN = (5**0.5 - 1) / 2  # its multiples fill [0, 1) evenly, however many there are
_PARTS = 5  # of depth, in the report
_SMALL = 512  # tokens of a text that is made for its fact alone
_OVERHEAD = 16  # tokens of the conversation around the text
_REPLY = 96  # tokens an answer may have
_SNAPSHOT_BYTES = 1 << 20  # of one tail of a model of nano's size, at most


@dataclass(frozen=True)
class NeedleConfig:
    """What to measure: ``trials`` of every variant at every length (tokens of the whole prompt, at most)."""

    lengths: tuple[int, ...] = (4096, 8192, 16_384, 32_768, 65_536)
    variants: tuple[Variant, ...] = ("single", "eight", "natural")
    trials: int = 10
    first_seed: int = HELD_OUT_START
    precision: Literal["float32", "bfloat16"] = "float32"
    texts: int | None = None  # different texts in a cell; None: every trial has its own

    def __post_init__(self) -> None:
        unknown = [variant for variant in self.variants if variant not in VARIANTS]
        if unknown or not self.variants:
            raise ValueError(f"unknown variant {', '.join(unknown) or '(none given)'}; choose from {', '.join(VARIANTS)}")
        if not self.lengths or min(self.lengths) < 512:
            raise ValueError("give lengths of at least 512 tokens: a question and eight facts need that")
        if self.trials < 1:
            raise ValueError("at least one trial a length is needed")
        if self.texts is not None and not 1 <= self.texts <= self.trials:
            raise ValueError(
                f"texts that trials share must be 1 to {self.trials}, one for each trial at most; got {self.texts}"
            )

    def cases(self) -> list[Case]:
        """(variant, length, trial), short texts first. Trials that share a text follow each other, the deepest first: each
        finds everything before its own fact computed. Others come in an order that spreads the depth, even when cut short.
        """
        return [
            (variant, length, trial) for length in self.lengths for variant in self.variants for trial in self._order(variant)
        ]

    def text_of(self, variant: Variant, trial: int) -> int | None:
        """The number of the text that a trial shares with others, None when it has its own."""
        if variant == "ten":
            return trial // _TEN
        return None if self.texts is None or variant == "eight" else trial % self.texts

    def beside(self, variant: Variant, trial: int) -> list[int]:
        """The trials that share the text of this one, itself among them."""
        number = self.text_of(variant, trial)
        return [trial] if number is None else [one for one in range(self.trials) if self.text_of(variant, one) == number]

    def seed(self, variant: Variant, length: int, trial: int | str) -> str:
        """What the random words of a trial, or of a shared text, are drawn from."""
        return f"{self.first_seed}:{variant}:{length}:{trial}"

    def depth(self, variant: Variant, length: int, trial: int) -> float:
        """Where in its text the fact of a trial stands, in [0, 1)."""
        place, parts = (trial % _TEN, _TEN) if variant == "ten" else (trial, self.trials)
        return (place + random.Random(f"depth:{self.seed(variant, length, trial)}").random()) / parts

    def _order(self, variant: Variant) -> list[int]:
        if self.text_of(variant, 0) is None:
            return sorted(range(self.trials), key=lambda trial: trial * _GOLDEN % 1)
        return sorted(range(self.trials), key=lambda trial: (self.text_of(variant, trial), -trial))


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
    reused: int = 0  # tokens of the prompt that an earlier trial had computed


@dataclass(frozen=True)
class NeedleReport:
    """All trials of a run and how it was made."""

    outcomes: tuple[NeedleOutcome, ...]
    config: NeedleConfig
    model: str
    runner: str
    seconds: float
    commit: str
    known: int = 0  # outcomes that an earlier part of the run, cut short, had measured

    def score(self, variant: Variant, length: int) -> KindScore:
        """Right answers of one variant at one length."""
        chosen = [one.passed for one in self.outcomes if (one.variant, one.length) == (variant, length)]
        return KindScore(sum(chosen), len(chosen), *wilson(sum(chosen), len(chosen)))

    @property
    def met(self) -> bool:
        """Whether single needles reach the bar at every length, with every trial made."""
        scores = [self.score("single", length) for length in self.config.lengths] if "single" in self.config.variants else []
        return all(score.total == self.config.trials and score.passed >= BAR * score.total for score in scores)

    def to_json(self) -> dict[str, Any]:
        """For machines: by variant and length, with the right answers in each fifth of the depth, from the start on."""
        config = self.config
        return {
            "needle": {
                variant: {str(length): self._cell(variant, length) for length in config.lengths} for variant in config.variants
            },
            **({"bar": {"single": BAR, "met": self.met}} if "single" in config.variants else {}),  # others have none
            "model": self.model,
            "runner": self.runner,
            "precision": config.precision,
            "trials": config.trials,
            "texts": config.texts,
            "first_seed": config.first_seed,
            "device": device_name(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": self.commit,
            "seconds": round(self.seconds, 1),
            **({"measured_before": self.known} if self.known else {}),
            "prompt_tokens": sum(one.tokens for one in self.outcomes),
            "reused_tokens": sum(one.reused for one in self.outcomes),
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
    depth = config.depth(variant, length, trial)
    if config.text_of(variant, trial) is not None:
        found = _shared(config, variant, length, trial, engine.tokenizer)
    else:
        pool, facts = random_pool(config.seed(variant, length, trial), True), 8 if variant == "eight" else 1
        filler = _FILLERS[variant]
        found = haystack(pool, engine.tokenizer, length - _OVERHEAD, facts=facts, depth=depth, filler=filler)
    prompt = encode(found.messages()[:1], tokenizer=engine.tokenizer, thinking=True, dialect="0731")
    return found, prompt, depth


def _shared(config: NeedleConfig, variant: Variant, length: int, trial: int, tokenizer: Tokenizer) -> Haystack:
    """The lines that the trials of a text have in common, with this trial's fact in them, or with those of all (``ten``)."""
    beside, filler = config.beside(variant, trial), _FILLERS[variant]
    small = [haystack(random_pool(config.seed(variant, length, one), True), tokenizer, _SMALL) for one in beside]
    facts = [one.asked[0] for one in small]
    room = length - _OVERHEAD - _FACT * (len(facts) if variant == "ten" else 1)
    seed = config.seed(variant, length, f"text {config.text_of(variant, trial)}")
    common = haystack(random_pool(seed, True), tokenizer, room, filler=filler)
    taken = [common.facts[0].sentence, *(fact.name for fact in facts)]
    lines = [line for line in common.text.split("\n") if not any(words in line for words in taken)]
    placed = list(zip(beside, facts, strict=True)) if variant == "ten" else [(trial, facts[beside.index(trial)])]
    total = len(lines)
    for number, fact in reversed(placed):  # the deepest first: the others' places stay what they are
        lines.insert(round(config.depth(variant, length, number) * total), fact.sentence)
    mine = small[beside.index(trial)]
    return Haystack("\n".join(lines), tuple(fact for _, fact in placed), mine.asked, mine.questions)


def run_needles(
    model: Path,
    config: NeedleConfig,
    report_progress: Callable[[NeedleOutcome], None],
    known: Sequence[NeedleOutcome] = (),
    seconds: float = math.inf,
) -> NeedleReport:
    """Run every trial with greedy decoding, one after another, but those whose outcome is ``known`` from a run that was cut
    short. ``report_progress`` sees each new outcome. No trial begins after ``seconds``; the report says how many there are.
    """
    began, version = time.monotonic(), commit()
    outcomes = {(one.variant, one.length, one.trial): one for one in known}
    engine = Engine(model, _options(config))
    try:
        for outcome in _outcomes(engine, config, [case for case in config.cases() if case not in outcomes]):
            outcomes[outcome.variant, outcome.length, outcome.trial] = outcome
            report_progress(outcome)
            if time.monotonic() - began > seconds:
                break
        ordered = tuple(outcomes[case] for case in config.cases() if case in outcomes)
        took = time.monotonic() - began
        return NeedleReport(ordered, config, model.name, engine.runner_name, took, version, len(known))
    finally:
        engine.close()


def _options(config: NeedleConfig) -> EngineConfig:
    """One sequence at a time; prefixes are kept when texts are shared, room for two of the longest and their snapshots."""
    if config.texts is None and "ten" not in config.variants:
        return EngineConfig(precision=config.precision, prefix_cache=False, max_running=1, token_budget=1024)
    return EngineConfig(
        precision=config.precision,
        max_running=1,
        token_budget=1024,
        pool_bytes=1 << 30,
        snapshot_bytes=2 * (max(config.lengths) // 256 + 2) * _SNAPSHOT_BYTES,  # one every 256 tokens
    )


def _outcomes(engine: Engine, config: NeedleConfig, cases: Sequence[Case]) -> Iterator[NeedleOutcome]:
    for variant, length, trial in cases:
        found, prompt, depth = needle_case(config, variant, length, trial, engine)
        began = time.monotonic()
        [completion] = engine.generate([prompt], SamplingParams(max_tokens=_REPLY))
        answer = parse(completion.ids, start="reasoning", tokenizer=engine.tokenizer, tools=[]).content.strip()
        yield NeedleOutcome(
            variant,
            length,
            trial,
            round(depth, 4),
            len(prompt.ids),
            answer == found.asked[0].value,
            answer,
            found.asked[0].value,
            round(time.monotonic() - began, 2),
            completion.reused_tokens,
        )
