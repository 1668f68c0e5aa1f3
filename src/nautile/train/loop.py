"""The training loop shared by the stages: schedule, compiled steps, load balancing, progress, checkpoints that resume.

A stage is a ``StageConfig``; everything that must survive an interruption (weights, optimizer, data cursor, step, random
state) goes into one file, written beside the old one and renamed.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from nautile.model import Transformer
from nautile.model.layers import Linear
from nautile.model.moe import Experts, Gate
from nautile.train.losses import Batch, Losses, LossWeights, training_losses
from nautile.train.optimizer import Optimizers
from nautile.train.run_state import RunError, read_state, write_state

__all__ = ["StageConfig", "Trainer", "learning_rate", "quantisation_aware"]


@dataclass(frozen=True)
class StageConfig:
    """One stage. Lengths in optimizer steps; ``seconds`` ends the stage early, schedule included, when it is not None."""

    steps: int
    peak_lr: float = 4e-3
    end_lr_fraction: float = 0.05
    warmup_steps: int = 100
    decay_fraction: float = 0.4  # last part of the stage over which the rate falls to its end value
    batch_rows: int = 32
    micro_batches: int = 1
    clip: float = 1.0
    bias_speed: float = 1e-3  # of the balancing bias of each expert
    seconds: float | None = None
    qat: bool = False
    indexer_weight: float = 0.0
    compile: bool = True
    dense_experts: bool = True
    save_every: int = 500
    log_every: int = 20
    peak_flops: float | None = None  # of the device, for MFU; None leaves MFU out
    flops_per_token: float = 0.0  # forward and backward, from the cost formula
    seed: int = 0
    span: int = 0  # tokens of a row in memory at once, computed twice; 0 keeps whole rows
    only: str = ""  # train parameters with this in their name alone ("indexer"); empty trains all

    @property
    def mtp_weight(self) -> float:
        """Of the draft loss before the rate decays; a stage that trains a part leaves the draft block out."""
        return 0.0 if self.only else 0.3


@dataclass
class Progress:
    """Where a stage is. Written by the trainer, saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    shard: int = 0  # data cursor: shard and row within it
    row: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def learning_rate(progress: float, step: int, config: StageConfig) -> float:
    """Warm-up, constant, linear decay (WSD). ``progress`` in [0, 1] is how much of the stage is over, in steps or in time."""
    start = 1.0 - config.decay_fraction
    rate = config.peak_lr * min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if progress > start:
        left = max(0.0, 1.0 - (progress - start) / max(config.decay_fraction, 1e-9))
        rate *= config.end_lr_fraction + (1 - config.end_lr_fraction) * left
    return rate


def quantisation_aware(model: Transformer, on: bool) -> None:
    """Turn straight-through quantisation of the stored formats on or off: FP8 128x128 linears, MXFP4 experts.

    Only matrices that the official layout stores quantised take part; compressors, gates and indexer weights stay bfloat16.
    """
    plain = ("wgate", "weights_proj", "compressor.wkv")
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            module.qat = on and not any(part in name for part in plain) and name != "head"
        elif isinstance(module, Experts):
            module.qat = on


class Trainer:
    """Runs one stage of one model over packed rows."""

    def __init__(self, model: Transformer, config: StageConfig, directory: Path) -> None:
        self.model, self.config, self.directory = model, config, directory
        self.device = model.embed.weight.device
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(config.only in name)
        self.optimizers = Optimizers(model)
        self.progress = Progress()
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
        directory.mkdir(parents=True, exist_ok=True)
        for module in model.modules():
            if isinstance(module, Experts):
                module.dense = config.dense_experts
        quantisation_aware(model, config.qat)

    def compile_with(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """torch.compile, once per function; the identity when the stage says so."""
        if not self.config.compile:
            return function
        if function not in self._compiled:
            torch._dynamo.config.recompile_limit = 64
            self._compiled[function] = torch.compile(function, dynamic=False)
        return self._compiled[function]

    def fit(
        self,
        batches: Iterator[tuple[Batch, int, int]],
        report: Callable[[dict[str, float]], None],
        until: int | None = None,
    ) -> Progress:
        """Train to the end of the stage, or only to step ``until``, and save.

        ``batches`` yields (micro batch, shard, next row); see ``data.batches``.
        """
        config, progress, first = self.config, self.progress, self.progress.step
        began, log = time.perf_counter() - progress.seconds, (self.directory / "log.jsonl").open("a")
        mark, marked_tokens = time.perf_counter(), progress.tokens
        while progress.step < (config.steps if until is None else min(until, config.steps)):
            elapsed = time.perf_counter() - began
            done = progress.step / config.steps
            if config.seconds is not None:
                done = max(done, elapsed / config.seconds)
                if elapsed >= config.seconds:
                    break
            lr = learning_rate(done, progress.step, config)
            try:
                losses, norm = self._step(batches, lr, decaying=done > 1 - config.decay_fraction)
            except TimeoutError as error:  # the data ran out: keep what has been learnt, and say so
                warnings.warn(f"the stage ends at step {progress.step} of {config.steps}: {error}", stacklevel=2)
                break
            progress.step += 1
            progress.seconds = time.perf_counter() - began
            if progress.step % config.log_every == 0 or progress.step == 1:
                row = self._measure(losses, norm, lr, mark, marked_tokens)
                mark, marked_tokens = time.perf_counter(), progress.tokens
                _write_row(log, row)
                report(row)
            if progress.step % config.save_every == 0:
                self._require_finite(losses, norm)
                self.save()
        log.close()
        if progress.step > first:
            self._require_finite(losses, norm)
        self.save()
        return progress

    def _require_finite(self, losses: Losses, norm: Tensor) -> None:
        """Raises RunError when the last step gave no numbers: what is on the disk is the last good state."""
        if not (math.isfinite(losses.next_token.item()) and math.isfinite(norm.item())):
            where = f"step {self.progress.step}, shard {self.progress.shard}, row {self.progress.row}"
            raise RunError(
                f"the loss is not a number ({where}): the checkpoint in {self.directory} is the last good one; run again to "
                "go on from it, with a lower learning rate or without that shard if it happens again"
            )

    def _step(self, batches: Iterator[tuple[Batch, int, int]], lr: float, decaying: bool) -> tuple[Losses, Tensor]:
        config = self.config
        weights = LossWeights(mtp=min(0.1, config.mtp_weight) if decaying else config.mtp_weight, indexer=config.indexer_weight)
        loads: Tensor | None = None
        for _ in range(config.micro_batches):
            batch, self.progress.shard, self.progress.row = next(batches)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                losses = training_losses(self.model, batch, weights, self.compile_with, config.span)
            (losses.total / config.micro_batches).backward()
            loads = losses.loads if loads is None else loads + losses.loads
            self.progress.tokens += batch.ids.numel()
        for parameter in self.model.parameters():  # the indexer has no gradient until its loss is on
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizers.step(lr)
        if loads is not None and not config.only:
            self._balance(loads)
        return losses, norm

    @torch.no_grad()
    def _balance(self, loads: Tensor) -> None:
        """Aux-loss-free balancing: an expert's bias falls when it took more than its share, rises when it took less."""
        blocks: list[Any] = [*self.model.layers, *self.model.mtp]
        gates: list[Gate] = [block.ffn.gate for block in blocks]
        biases = [gate.bias for gate in gates if gate.bias is not None]
        for bias, load in zip(biases, loads, strict=True):
            bias.add_(torch.sign(load.mean() - load), alpha=self.config.bias_speed)

    def _measure(self, losses: Losses, norm: Tensor, lr: float, mark: float, marked: int) -> dict[str, float]:
        self._require_finite(losses, norm)
        total = losses.next_token.item()  # waits for the device, so the clock below is honest
        now = time.perf_counter()
        rate = (self.progress.tokens - marked) / max(now - mark, 1e-9)
        row: dict[str, float] = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "loss": total,
            "mtp": losses.mtp.item(),
            "indexer": losses.indexer.item(),
            "balance": losses.balance.item(),
            "grad_norm": norm.item(),
            "lr": lr,
            "tokens_per_second": rate,
            "seconds": self.progress.seconds,
        }
        if self.device.type == "cuda":
            row["gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        if self.config.peak_flops is not None:
            row["mfu"] = rate * self.config.flops_per_token / self.config.peak_flops
        self.progress.history.append(row)
        return row

    def save(self) -> Path:
        """Write everything a resumed run needs. Raises RunError when it cannot be written; the last one is untouched then."""
        path = self.directory / "checkpoint.pt"
        random_state: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state()
        state = {
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "progress": asdict(self.progress),
            "config": self.model.config.to_json(),
            "random": random_state,
            "options": self._options(),
        }
        write_state(path, state)
        return path

    def resume(self) -> bool:
        """Continue from this directory's checkpoint, if there is one: weights, optimizer, data cursor and random state.

        Raises RunError when it is damaged, of another model, or of a stage with other rows or quantisation.
        """
        path = self.directory / "checkpoint.pt"
        state = read_state(path, self.model.config.to_json(), self._options(), self.device)
        if state is None:
            return False
        self.model.load_state_dict(state["model"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.progress = Progress(**state["progress"])
        torch.set_rng_state(state["random"]["cpu"].cpu())
        if "cuda" in state["random"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"].cpu())
        return True

    def _options(self) -> dict[str, Any]:
        """What a stage cannot change halfway: the data cursor counts batches, and weights lie on the grid or not."""
        return {"batch_rows": self.config.batch_rows, "qat": self.config.qat}


def _write_row(log: TextIO, row: dict[str, float]) -> None:
    log.write(json.dumps({key: round(value, 6) for key, value in row.items()}) + "\n")
    log.flush()
