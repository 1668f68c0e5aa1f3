"""On-policy distillation: a student learns from several teachers on what it says itself.

L = sum_i w_i KL(student || teacher_i) over the whole vocabulary, on the student's own conversations, each with the teacher of
its kind. A teacher's trunk runs once over its conversations; its last hidden states are cached on the disk, and logits are
rebuilt from them head by head, a few tokens at a time: samples are ordered by teacher, so one head and one block of logits are
in memory.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
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
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from nautile.checkpoint import load_model, save_model
from nautile.model import Transformer
from nautile.protocol import Tokenizer
from nautile.train.environments import environment
from nautile.train.optimizer import OptimizerConfig, Optimizers
from nautile.train.policy import hidden_rows
from nautile.train.qat import as_stored, on_grid
from nautile.train.replay import Recorder
from nautile.train.rollout import Planned, RolloutConfig, Sample, roll_out
from nautile.train.rollout_engine import RolloutEngine, engine_options
from nautile.train.rollout_workers import RolloutWorkers, WorkerConfig
from nautile.train.run_state import RunError, clip_gradients, read_state, weights_digest, write_state

__all__ = ["Distill", "DistillConfig", "DistillReport", "Teacher", "reverse_kl"]


@dataclass(frozen=True)
class Teacher:
    """A specialist: a model directory and the environments it teaches."""

    name: str
    path: Path
    kinds: tuple[str, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.kinds:
            raise RunError(f"teacher {self.name} teaches no kind: give it one")
        for kind in self.kinds:
            environment(kind)


@dataclass(frozen=True)
class DistillConfig:
    """A run. ``chunk``: tokens whose logits of student and teacher are in memory at once."""

    teachers: tuple[Teacher, ...]
    steps: int = 10
    tasks: int = 4  # a step, taken in turn from the teachers' kinds
    samples: int = 2  # of each task
    lr: float = 1e-4
    rows: int = 4
    chunk: int = 256
    clip_norm: float = 1.0
    first_seed: int = 2_000_000
    replay: bool = True
    qat: bool = False
    workers: WorkerConfig | None = None  # roll out in processes with native kernels: needs qat, and no replay
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    def __post_init__(self) -> None:
        if not self.teachers or min(self.steps, self.tasks, self.samples, self.rows, self.chunk) < 1:
            raise RunError("distillation needs a teacher, and steps, tasks, samples, rows and chunk of at least one")
        if self.workers is not None and (self.replay or not self.qat):
            raise RunError("rollout workers sample from the exported file without notes: use qat, and no replay")
        if len({teacher.name for teacher in self.teachers}) < len(self.teachers):
            raise RunError("teachers need names of their own")


@dataclass
class DistillReport:
    """What a step did. ``divergence``: nats a token, by teacher."""

    step: int
    divergence: dict[str, float] = field(default_factory=dict)
    reward: float = 0.0
    rewards: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    length: float = 0.0
    grad_norm: float = 0.0
    rollout_seconds: float = 0.0
    train_seconds: float = 0.0

    def line(self) -> str:
        """For a terminal."""
        parts = "  ".join(f"KL {name} {value:.4f}" for name, value in self.divergence.items())
        return (
            f"step {self.step}  {parts}  reward {self.reward:.3f}  length {self.length:.0f}  {self.tokens} tokens  "
            f"{self.rollout_seconds:.1f} + {self.train_seconds:.1f} s"
        )


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) of each row over the whole vocabulary, logits [n, V] each -> [n] in float32."""
    ours, theirs = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return (ours.exp() * (ours - theirs)).sum(-1)


class Distill:
    """One run in one directory: ``run`` starts it or goes on with it."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, config: DistillConfig, directory: Path) -> None:
        self.model, self.tokenizer, self.config, self.directory = model.train(), tokenizer, config, directory
        self.model.requires_grad_(True)
        self.optimizers = Optimizers(model, OptimizerConfig(weight_decay=0.0))
        self.step = 0
        self._workers: RolloutWorkers | None = None
        directory.mkdir(parents=True, exist_ok=True)
        for teacher in config.teachers:
            _check_tokenizer(teacher, tokenizer)

    def run(self, report: Callable[[DistillReport], None], finished: Callable[[Sample], None] = lambda sample: None) -> None:
        """Every step that is missing. Raises RunError, RolloutError, WalError, SandboxError, CheckpointError."""
        self._resume()
        with contextlib.ExitStack() as stack:
            if self.config.workers is not None:
                self._workers = stack.enter_context(RolloutWorkers(self.config.workers))
            while self.step < self.config.steps and not self.enough():
                report(self.take_step(finished))
        self._workers = None

    def enough(self) -> bool:
        """Whether to stop before the next step, for a run that has less time than steps. Replace it."""
        return False

    def take_step(self, finished: Callable[[Sample], None] = lambda sample: None) -> DistillReport:
        """Conversations of the student, hidden states of the teachers, one update, a checkpoint."""
        began, config = time.perf_counter(), self.config
        stored = as_stored(self.model) if config.qat else None
        place = self.directory / f"step-{self.step + 1:05d}"
        recorder = Recorder.at(place / "decisions.bin", self.model) if config.replay else None
        samples = self._roll_out(place, stored, recorder, finished)
        rolled = time.perf_counter()
        outcome = self._summary(samples)
        by_teacher = self._by_teacher(samples)
        for teacher, part in by_teacher:
            _cache_hidden(teacher, part, _cache(place, teacher), config.rows, self.model.embed.weight.device)
        if stored is None:
            self._gradients(by_teacher, recorder, place, outcome)
        else:
            with on_grid(self.model, stored):
                self._gradients(by_teacher, recorder, place, outcome)
        self._optimise(outcome)
        self.step += 1
        outcome.rollout_seconds, outcome.train_seconds = rolled - began, time.perf_counter() - rolled
        self._write_down(samples, outcome)
        self._save()
        if recorder is not None:
            recorder.close()
        shutil.rmtree(place)
        return outcome

    def _roll_out(
        self, place: Path, stored: Transformer | None, recorder: Recorder | None, finished: Callable[[Sample], None]
    ) -> list[Sample]:
        if self._workers is not None and stored is not None:
            save_model(stored, place / "model", tokenizer_dir=self._workers.config.tokenizer)
            known = {"weights": weights_digest(stored), "step": self.step + 1}
            return self._workers.roll_out(place / "model", self._plan(), place, self.config.rollout, known, finished)
        actor = stored or copy.deepcopy(self.model)
        options = engine_options(actor, self.config.rollout.at_once, deterministic=False)
        engine = RolloutEngine(actor, self.tokenizer, options, recorder, deterministic=False)
        try:
            head = {"weights": weights_digest(actor), "step": self.step + 1}
            return roll_out(engine, self._plan(), place, self.config.rollout, head, finished)
        finally:
            engine.close()

    def _plan(self) -> list[Planned]:
        config, rng = self.config, random.Random(f"{self.config.rollout.seed}:{self.step}")
        kinds = [kind for teacher in config.teachers for kind in teacher.kinds]
        plan = []
        for group in range(config.tasks):
            kind, seed = kinds[(self.step * config.tasks + group) % len(kinds)], config.first_seed + rng.randrange(1_000_000)
            plan += [Planned(group * config.samples + index, group, kind, seed) for index in range(config.samples)]
        return plan

    def _by_teacher(self, samples: Sequence[Sample]) -> list[tuple[Teacher, list[Sample]]]:
        """Samples in the order of the teachers; those in which nothing was sampled are left out."""
        found = [
            (teacher, [sample for sample in samples if sample.planned.kind in teacher.kinds and sample.sampled])
            for teacher in self.config.teachers
        ]
        return [(teacher, part) for teacher, part in found if part]

    def _gradients(
        self, by_teacher: Sequence[tuple[Teacher, list[Sample]]], recorder: Recorder | None, place: Path, outcome: DistillReport
    ) -> None:
        total = sum(sample.sampled for _, part in by_teacher for sample in part)
        for teacher, part in by_teacher:
            cached, divergence = load_file(_cache(place, teacher)), 0.0
            head = cached.pop("head").to(self.model.embed.weight.device)
            for start in range(0, len(part), self.config.rows):
                rows = part[start : start + self.config.rows]
                hidden, _ = hidden_rows(self.model, rows, recorder)
                theirs = torch.cat([cached[str(sample.planned.number)] for sample in rows]).to(head.device)
                divergence += self._backward(torch.cat(hidden), theirs, head, teacher.weight / max(total, 1))
            outcome.divergence[teacher.name] = divergence / sum(sample.sampled for sample in part)

    def _backward(self, hidden: Tensor, theirs: Tensor, head: Tensor, scale: float) -> float:
        """Backward of ``scale`` times the summed divergence, logits of ``chunk`` tokens at a time; gives the sum.

        The head's gradients are added chunk by chunk; the trunk's backward runs once, from the collected gradient.
        """
        cut, total = hidden.detach().requires_grad_(True), 0.0
        for start in range(0, len(cut), self.config.chunk):
            part = slice(start, start + self.config.chunk)
            divergence = reverse_kl(self.model.logits(cut[part]), F.linear(theirs[part], head)).sum()
            (divergence * scale).backward()
            total += divergence.item()
        hidden.backward(cut.grad)
        return total

    def _optimise(self, outcome: DistillReport) -> None:
        outcome.grad_norm = clip_gradients(self.model, self.config.clip_norm, self.step + 1)
        self.optimizers.step(self.config.lr)

    # What is kept -------------------------------------------------------------------------------------------------

    def _summary(self, samples: Sequence[Sample]) -> DistillReport:
        kinds: dict[str, list[float]] = defaultdict(list)
        for sample in samples:
            kinds[sample.planned.kind].append(sample.reward)
        outcome = DistillReport(self.step + 1, samples=len(samples), tokens=sum(sample.sampled for sample in samples))
        outcome.reward = sum(sample.reward for sample in samples) / len(samples)
        outcome.rewards = {kind: sum(found) / len(found) for kind, found in sorted(kinds.items())}
        outcome.length = outcome.tokens / len(samples)
        return outcome

    def _write_down(self, samples: Sequence[Sample], outcome: DistillReport) -> None:
        with (self.directory / "trajectories.jsonl").open("a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps({"step": outcome.step, **sample.record()}, ensure_ascii=False) + "\n")
        with (self.directory / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")

    def _identity(self) -> dict[str, Any]:
        options = asdict(self.config)
        rollout = {key: value for key, value in options.pop("rollout").items() if key != "at_once"}
        kept = {key: value for key, value in options.items() if key not in ("steps", "rows", "chunk", "workers")}
        return json.loads(json.dumps({**kept, "rollout": rollout}, default=str))  # type: ignore[no-any-return]

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "step": self.step,
            "config": self.model.config.to_json(),
            "options": self._identity(),
        }
        write_state(self.directory / "checkpoint.pt", state)

    def _resume(self) -> None:
        device = self.model.embed.weight.device
        state = read_state(self.directory / "checkpoint.pt", self.model.config.to_json(), self._identity(), device)
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizers.load_state_dict(state["optimizers"])
            self.step = state["step"]


def _cache(place: Path, teacher: Teacher) -> Path:
    return place / f"hidden-{teacher.name}.safetensors"


@torch.no_grad()
def _cache_hidden(teacher: Teacher, samples: Sequence[Sample], path: Path, rows: int, device: torch.device) -> None:
    """Write the teacher's hidden states of every sampled token, by sample, and its head; the trunk is released at the end."""
    if path.exists():
        return
    model = load_model(teacher.path, device=device)
    found: dict[str, Tensor] = {"head": (model.embed.weight if model.head is None else model.head.weight).cpu().contiguous()}
    for start in range(0, len(samples), rows):
        part = samples[start : start + rows]
        hidden, _ = hidden_rows(model, part, None)
        found |= {str(sample.planned.number): states.cpu().contiguous() for sample, states in zip(part, hidden, strict=True)}
    temporary = path.with_suffix(".tmp")
    save_file(found, temporary)
    temporary.replace(path)


def _check_tokenizer(teacher: Teacher, tokenizer: Tokenizer) -> None:
    """A teacher's logits mean nothing over another vocabulary. Raises RunError."""
    other = Tokenizer.load(teacher.path)
    probe = "def f(x):\n\treturn {'a': 1.5, \"ß\": [None]}  # 12 €"
    same = other.vocab_size == tokenizer.vocab_size and other.encode(probe) == tokenizer.encode(probe)
    if not same or _vocabulary(other) != _vocabulary(tokenizer):
        raise RunError(f"teacher {teacher.name} has another tokenizer than the student: distillation needs one vocabulary")


def _vocabulary(tokenizer: Tokenizer) -> str:
    total = hashlib.sha256()
    for token in range(tokenizer.vocab_size):
        total.update(tokenizer.decode_bytes([token]) + b"\0")
    return total.hexdigest()
