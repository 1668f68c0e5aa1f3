"""GRPO in real sandboxes, with the serving engine as the rollout engine.

A step: sample groups of conversations; grade them; advantages within each group, groups without variance dropped; the clipped
loss with an unbiased KL, bad sequences that have become off-policy masked; one Muon step; a checkpoint. Everything a step needs
is on the disk before it is used, so a killed run goes on in the middle of its rollouts.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nautile.checkpoint import save_model
from nautile.model import Transformer
from nautile.protocol import Tokenizer
from nautile.train.advantage import clipped_loss, group_advantages, off_policy, unbiased_kl
from nautile.train.environments import TRAINED, environment
from nautile.train.optimizer import OptimizerConfig, Optimizers
from nautile.train.policy import Agreement, behaviour, own_routing, row_logprobs, unrolled_logprobs
from nautile.train.qat import as_stored, on_grid
from nautile.train.replay import Recorder
from nautile.train.rollout import Planned, RolloutConfig, Sample, roll_out
from nautile.train.rollout_engine import RolloutEngine, engine_options
from nautile.train.rollout_workers import RolloutWorkers, WorkerConfig
from nautile.train.run_state import RunError, clip_gradients, read_state, weights_digest, write_state

__all__ = ["GRPO", "GRPOConfig", "StepReport"]


@dataclass(frozen=True)
class GRPOConfig:
    """A run. ``deterministic``: rollouts and training go through the same products, so their log-probabilities are equal.

    ``replay`` routes training as the rollout was routed. ``qat``: rollouts on the exported file's values, and training too.
    ``workers`` rolls out in processes with native kernels: they need ``qat`` and note no decisions (no ``replay``).
    """

    kinds: tuple[str, ...]
    steps: int = 10
    groups: int = 4
    samples: int = 8
    lr: float = 1e-4
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl: float = 1e-3
    off_policy_limit: float = 0.5  # nats a token
    clip_norm: float = 1.0
    epochs: int = 1  # passes over a step's samples
    rows: int = 4  # conversations in one training pass
    first_seed: int = 1_000_000
    deterministic: bool = False
    replay: bool = True
    qat: bool = False
    workers: WorkerConfig | None = None
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise RunError("a group needs at least two samples: its mean is the baseline")
        if not self.kinds or min(self.steps, self.groups, self.epochs, self.rows) < 1:
            raise RunError("kinds, steps, groups, epochs and rows must be at least one")
        if self.workers is not None and (self.deterministic or self.replay or not self.qat):
            raise RunError(
                "rollout workers sample from the exported file without notes: use qat, and neither replay nor deterministic"
            )
        kept = [kind for kind in self.kinds if environment(kind).held_out or kind not in TRAINED]
        if kept:
            raise RunError(f"{kept[0]} is held out: it is measured, never trained on")


@dataclass
class StepReport:
    """What a step did. Differences are of log-probabilities, training against rollout, before the update."""

    step: int
    reward: float = 0.0
    rewards: dict[str, float] = field(default_factory=dict)  # by kind
    samples: int = 0
    dropped_groups: int = 0
    masked: int = 0
    disturbed: int = 0  # samples that a kill interrupted
    tokens: int = 0
    length: float = 0.0
    difference_max: float = 0.0
    difference_mean: float = 0.0
    routing_differs: float = 0.0
    unrecorded: int = 0
    kl: float = 0.0
    loss: float = 0.0
    clipped: float = 0.0
    grad_norm: float = 0.0
    rollout_seconds: float = 0.0
    train_seconds: float = 0.0

    def line(self) -> str:
        """For a terminal."""
        unnoted = f"{self.unrecorded} tokens without notes  " if self.unrecorded else ""
        return (
            f"step {self.step}  reward {self.reward:.3f}  length {self.length:.0f}  groups dropped {self.dropped_groups}  "
            f"train - rollout max {self.difference_max:.3g} mean {self.difference_mean:.3g}  "
            f"routing differs {100 * self.routing_differs:.2f} %  kl {self.kl:.3g}  clipped {100 * self.clipped:.1f} %  "
            f"masked {self.masked}  {unnoted}{self.tokens} tokens  {self.rollout_seconds:.1f} + {self.train_seconds:.1f} s"
        )

    def row(self) -> dict[str, Any]:
        """For the log."""
        return asdict(self)


class GRPO:
    """One run in one directory: ``run`` starts it or goes on with it."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, config: GRPOConfig, directory: Path) -> None:
        self.model, self.tokenizer, self.config, self.directory = model.train(), tokenizer, config, directory
        self.reference = copy.deepcopy(model).eval().requires_grad_(False)
        self.model.requires_grad_(True)
        self.optimizers = Optimizers(model, OptimizerConfig(weight_decay=0.0))  # MTP and indexer are not trained here
        self.step = 0
        self._workers: RolloutWorkers | None = None
        directory.mkdir(parents=True, exist_ok=True)

    # The run ------------------------------------------------------------------------------------------------------

    def run(self, report: Callable[[StepReport], None], finished: Callable[[Sample], None] = lambda sample: None) -> None:
        """Every step that is missing. Raises RunError, RolloutError, WalError, SandboxError."""
        self.resume()
        with contextlib.ExitStack() as stack:
            if self.config.workers is not None:
                self._workers = stack.enter_context(RolloutWorkers(self.config.workers))
            while self.step < self.config.steps and not self.enough():
                report(self.take_step(finished))
        self._workers = None

    def enough(self) -> bool:
        """Whether to stop before the next step, for a run that has less time than steps. Replace it."""
        return False

    def take_step(self, finished: Callable[[Sample], None] = lambda sample: None) -> StepReport:
        """One step: rollouts, update, checkpoint."""
        began = time.perf_counter()
        stored = as_stored(self.model) if self.config.qat else None
        place = self.directory / f"step-{self.step + 1:05d}"
        recorder = Recorder.at(place / "decisions.bin", self.model)
        samples = self._roll_out(place, stored, recorder, finished)
        rolled = time.perf_counter()
        outcome = self._summary(samples)
        if stored is None:
            self._update(samples, recorder, outcome)
        else:
            self._update_on_grid(samples, recorder, outcome, stored)
        self.step += 1
        outcome.rollout_seconds, outcome.train_seconds = rolled - began, time.perf_counter() - rolled
        self._write_down(samples, outcome)
        self.save()
        recorder.close()
        shutil.rmtree(place)
        return outcome

    def _roll_out(
        self, place: Path, stored: Transformer | None, recorder: Recorder, finished: Callable[[Sample], None]
    ) -> list[Sample]:
        config = self.config
        if self._workers is not None:
            return self._roll_out_in_processes(self._workers, place, stored, finished)
        actor = stored or copy.deepcopy(self.model)
        options = engine_options(actor, config.rollout.at_once, config.deterministic)
        noted = recorder if config.replay or config.deterministic else None
        engine = RolloutEngine(actor, self.tokenizer, options, noted, config.deterministic)
        head = {"weights": weights_digest(actor), "step": self.step + 1, "deterministic": config.deterministic}
        try:
            samples = roll_out(engine, self._plan(), place, config.rollout, head, finished)
            if config.deterministic and engine.stats().preemptions:
                raise RunError("a rollout was preempted, so its chunks differ: lower at_once, or raise the pool's size")
            return samples
        finally:
            engine.close()

    def _roll_out_in_processes(
        self, workers: RolloutWorkers, place: Path, stored: Transformer | None, finished: Callable[[Sample], None]
    ) -> list[Sample]:
        if stored is None:
            raise RunError("rollout workers need the exported file's values: use qat")
        save_model(stored, place / "model", tokenizer_dir=workers.config.tokenizer)
        head = {"weights": weights_digest(stored), "step": self.step + 1, "deterministic": False}
        return workers.roll_out(place / "model", self._plan(), place, self.config.rollout, head, finished)

    def _plan(self) -> list[Planned]:
        """The same tasks for the same step, whatever was interrupted."""
        config, rng = self.config, random.Random(f"{self.config.rollout.seed}:{self.step}")
        plan = []
        for group in range(config.groups):
            kind = config.kinds[(self.step * config.groups + group) % len(config.kinds)]
            seed = config.first_seed + rng.randrange(1_000_000)
            plan += [Planned(group * config.samples + index, group, kind, seed) for index in range(config.samples)]
        return plan

    # The update ---------------------------------------------------------------------------------------------------

    def _update_on_grid(self, samples: Sequence[Sample], recorder: Recorder, outcome: StepReport, stored: Transformer) -> None:
        for epoch in range(self.config.epochs):
            with on_grid(self.model, stored if epoch == 0 else None):
                taken = self._gradients(samples, recorder, outcome, first=epoch == 0)
            if taken:
                self._optimise(outcome)

    def _update(self, samples: Sequence[Sample], recorder: Recorder, outcome: StepReport) -> None:
        for epoch in range(self.config.epochs):
            if self._gradients(samples, recorder, outcome, first=epoch == 0):
                self._optimise(outcome)

    def _gradients(self, samples: Sequence[Sample], recorder: Recorder, outcome: StepReport, first: bool) -> bool:
        """Forward and backward of every sample that teaches something; False when none does."""
        advantages = _advantages(samples)
        taught = [sample for sample in samples if sample.planned.number in advantages and sample.sampled]
        if first and not taught and samples:
            self._compare_only(samples[0], recorder, outcome)
        total = sum(sample.sampled for sample in taught)
        for start in range(0, len(taught), self.config.rows):
            part = taught[start : start + self.config.rows]
            currents, references = self._logprobs(part, recorder, outcome, first)
            losses = [
                self._loss(current, sample, advantages[sample.planned.number], reference, outcome, total * self.config.epochs)
                for sample, current, reference in zip(part, currents, references, strict=True)
            ]
            (torch.stack(losses).sum() / total).backward()
            outcome.loss += float(sum(loss.item() for loss in losses)) / total / self.config.epochs
        if first and taught and not self.config.deterministic and self.config.replay:
            outcome.routing_differs = own_routing(self.model, taught[0], recorder).share
        return bool(taught)

    def _loss(
        self, current: Tensor, sample: Sample, advantage: float, reference: Tensor | None, outcome: StepReport, total: int
    ) -> Tensor:
        """The sum over one sample's tokens; the report's means are over ``total`` tokens."""
        config, old = self.config, behaviour(sample).to(current.device)
        losses, clipped = clipped_loss(current, old, advantage, config.clip_low, config.clip_high)
        if off_policy(current, old, advantage, config.off_policy_limit):
            outcome.masked += 1
            losses = losses * 0.0
        outcome.clipped += float(clipped.sum()) / total
        if reference is not None:
            divergence = unbiased_kl(current, old, reference)
            outcome.kl += float(divergence.detach().sum()) / total
            losses = losses + config.kl * divergence
        return losses.sum()

    def _logprobs(
        self, part: Sequence[Sample], recorder: Recorder, outcome: StepReport, first: bool
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Under the trained policy (with gradients) and under the reference."""
        config = self.config
        if config.deterministic:
            pairs = [unrolled_logprobs(self.model, sample, recorder) for sample in part]
            currents, found = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        else:
            currents, agreed = row_logprobs(self.model, part, recorder if config.replay else None)
            found = [agreed]
        if first:
            _compare(part, currents, found, outcome)
        if not config.kl:
            return currents, [None] * len(part)
        with torch.no_grad():
            references, _ = row_logprobs(self.reference, part, None)
        return currents, list(references)

    def _compare_only(self, sample: Sample, recorder: Recorder, outcome: StepReport) -> None:
        """The difference to the rollout, when no sample teaches anything."""
        if sample.sampled:
            currents, found = (
                unrolled_logprobs(self.model, sample, recorder)
                if self.config.deterministic
                else row_logprobs(self.model, [sample], recorder if self.config.replay else None)
            )
            _compare([sample], [currents] if isinstance(currents, Tensor) else currents, [found], outcome)

    def _optimise(self, outcome: StepReport) -> None:
        outcome.grad_norm = clip_gradients(self.model, self.config.clip_norm, self.step + 1)
        self.optimizers.step(self.config.lr)

    # What is kept -------------------------------------------------------------------------------------------------

    def _summary(self, samples: Sequence[Sample]) -> StepReport:
        groups, kinds = defaultdict(list), defaultdict(list)
        for sample in samples:
            groups[sample.planned.group].append(sample.reward)
            kinds[sample.planned.kind].append(sample.reward)
        outcome = StepReport(self.step + 1, samples=len(samples))
        outcome.reward = sum(sample.reward for sample in samples) / len(samples)
        outcome.rewards = {kind: sum(found) / len(found) for kind, found in sorted(kinds.items())}
        outcome.dropped_groups = sum(group_advantages(rewards).dropped for rewards in groups.values())
        outcome.tokens = sum(sample.sampled for sample in samples)
        outcome.length = outcome.tokens / len(samples)
        outcome.disturbed = sum(len(sample.segments) > len(sample.turns) for sample in samples)
        return outcome

    def _write_down(self, samples: Sequence[Sample], outcome: StepReport) -> None:
        with (self.directory / "trajectories.jsonl").open("a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps({"step": outcome.step, **sample.record()}, ensure_ascii=False) + "\n")
        with (self.directory / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(outcome.row()) + "\n")

    def save(self) -> None:
        """Write everything a resumed run needs. Raises RunError."""
        state = {
            "model": self.model.state_dict(),
            "reference": self.reference.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "step": self.step,
            "config": self.model.config.to_json(),
            "options": self._identity(),
        }
        write_state(self.directory / "checkpoint.pt", state)

    def resume(self) -> bool:
        """Go on from the directory's checkpoint, if there is one. Raises RunError when it is of another run."""
        device = self.model.embed.weight.device
        state = read_state(self.directory / "checkpoint.pt", self.model.config.to_json(), self._identity(), device)
        if state is None:
            return False
        self.model.load_state_dict(state["model"])
        self.reference.load_state_dict(state["reference"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.step = state["step"]
        return True

    def _identity(self) -> dict[str, Any]:
        """Options that make a run what it is; the number of steps and how many run at once may change."""
        options = asdict(self.config)
        del options["workers"]
        rollout = {key: value for key, value in options.pop("rollout").items() if key != "at_once"}
        return json.loads(json.dumps({**{k: v for k, v in options.items() if k != "steps"}, "rollout": rollout}))  # type: ignore[no-any-return]


def _advantages(samples: Sequence[Sample]) -> dict[int, float]:
    """By sample number; samples of groups without variance are not there."""
    groups: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.planned.group].append(sample)
    found: dict[int, float] = {}
    for members in groups.values():
        group = group_advantages([member.reward for member in members])
        if not group.dropped:
            found |= {member.planned.number: value for member, value in zip(members, group.advantages, strict=True)}
    return found


def _compare(part: Sequence[Sample], currents: Sequence[Tensor], found: Sequence[Agreement], outcome: StepReport) -> None:
    """Note how far training's log-probabilities are from the rollout's."""
    for sample, current in zip(part, currents, strict=True):
        difference = (current.detach().cpu() - behaviour(sample)).abs()
        outcome.difference_max = max(outcome.difference_max, float(difference.max()))
        outcome.difference_mean += float(difference.sum()) / max(outcome.tokens, 1)
    compared = sum(one.compared for one in found)
    if compared:
        outcome.routing_differs = max(outcome.routing_differs, sum(one.differing for one in found) / compared)
    outcome.unrecorded += sum(one.missing for one in found)
