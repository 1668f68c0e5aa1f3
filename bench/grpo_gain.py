"""What reinforcement gives over the model it starts from, on requests in words that supervised training did not compose.

    python bench/grpo_gain.py WORK --seconds 300 --workers 7 --device cuda --out bench/results/grpo_gain.json

Measures at temperature 1, trains for the given time in real sandboxes, exports, measures again: the same tasks and the same
draws, from seeds and partly with words that no step has used. Two sets: the practised sentences (``undecided_*``) and others
(``fresh_*``). Run again it goes on where it was. ``WORK/model`` is the trained model. ``--seconds 0`` only measures.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch

from nautile.checkpoint import load_model, save_model
from nautile.evals.tools import commit, device_name, wilson
from nautile.model.moe import Experts
from nautile.protocol import Tokenizer
from nautile.train.environments import FRESH_KINDS, UNDECIDED_KINDS
from nautile.train.grpo import GRPO, GRPOConfig
from nautile.train.rollout import Planned, RolloutConfig
from nautile.train.rollout_workers import RolloutWorkers, WorkerConfig

NANO = Path(__file__).parents[1] / "src" / "nautile" / "weights" / "nano"
FIRST_SEED = 20_000_000  # no published figure uses seeds from here on
Results = dict[str, list[bool]]  # by kind, in the order of the seeds


def measure(
    model: Path, among: tuple[str, ...], seeds: int, workers: WorkerConfig, rollout: RolloutConfig, place: Path,
    kinds: tuple[str, ...] = (),
) -> Results:  # fmt: skip
    """Whether each task was done, one sample a task; of the tasks of all kinds ``among`` those of ``kinds`` alone, if given.

    A sample's draws depend on its number among all, so a part of them has the draws that the whole has.
    """
    kinds = kinds or among
    cases = [(kind, FIRST_SEED + index) for index in range(seeds) for kind in among]
    plan = [Planned(number, number, kind, seed) for number, (kind, seed) in enumerate(cases) if kind in kinds]
    shutil.rmtree(place, ignore_errors=True)
    with RolloutWorkers(workers) as processes:
        samples = processes.roll_out(model, plan, place, rollout, {"model": str(model)})
    shutil.rmtree(place)
    return {kind: [sample.reward >= 1 for sample in samples if sample.planned.kind == kind] for kind in kinds}


def score(found: list[bool]) -> dict[str, float]:
    """Passed, total, Wilson's interval."""
    low, high = wilson(sum(found), len(found))
    return {"passed": sum(found), "total": len(found), "low": round(low, 4), "high": round(high, 4)}


def gain(before: list[bool], after: list[bool]) -> dict[str, float]:
    """Points gained on the same tasks, with a 95 % interval from the tasks that changed, and the share of failures removed."""
    won = sum(new and not old for old, new in zip(before, after, strict=True))
    lost = sum(old and not new for old, new in zip(before, after, strict=True))
    n = len(before)
    share = (won - lost) / n
    half = 1.96 * math.sqrt(max(won + lost - (won - lost) ** 2 / n, 0.0)) / n
    failures = n - sum(before)
    fewer = (won - lost) / failures if failures else 0.0
    return {"points": round(100 * share, 2), "low": round(100 * (share - half), 2), "high": round(100 * (share + half), 2),
            "won": won, "lost": lost, "fewer_failures": round(fewer, 4)}  # fmt: skip


def compare(before: Results, after: Results) -> dict:
    """By kind and for each set."""
    sets = {"practised": UNDECIDED_KINDS, "fresh": FRESH_KINDS, **{kind: (kind,) for kind in before}}
    out = {}
    for name, kinds in sets.items():
        old, new = ([right for kind in kinds for right in results.get(kind, [])] for results in (before, after))
        if old:
            out[name] = {"before": score(old), "after": score(new), "gain": gain(old, new)}
    return out


class Timed(GRPO):
    """Steps until the time is up: none is begun that would end later, judged by the last one."""

    def __init__(self, *arguments, deadline: float, **named) -> None:
        super().__init__(*arguments, **named)
        self.deadline, self.last = deadline, 0.0

    def enough(self) -> bool:
        """See ``GRPO.enough``."""
        return time.monotonic() + self.last > self.deadline

    def take_step(self, finished=lambda sample: None):
        """A step, timed."""
        began = time.monotonic()
        report = super().take_step(finished)
        self.last = time.monotonic() - began
        return report


def options_given() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--init", type=Path, default=NANO)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--groups", type=int, default=28)
    parser.add_argument("--samples", type=int, default=14)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16, help="conversations in one training pass")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of a worker")
    parser.add_argument("--at-once", type=int, default=16, help="conversations of a worker at a time")
    parser.add_argument("--seeds", type=int, default=40, help="tasks of a practised kind, half of it of a fresh one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--unenforced-limits", action="store_true", help="where no cgroups can be made")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure, train, measure."""
    options = options_given()
    began, work = time.monotonic(), options.work
    work.mkdir(parents=True, exist_ok=True)
    rollout = RolloutConfig(
        reply_tokens=200, turns=6, tokens=3072, at_once=options.at_once, unenforced_limits=options.unenforced_limits
    )  # fmt: skip
    workers = WorkerConfig(options.init, options.workers, options.threads)

    def measured(name: str, model: Path) -> Results:
        path = work / f"{name}.json"
        if not path.exists():
            found = measure(model, UNDECIDED_KINDS, options.seeds, workers, rollout, work / "measuring")
            found |= measure(model, FRESH_KINDS, max(1, options.seeds // 2), workers, rollout, work / "measuring")
            path.write_text(json.dumps(found))
        found = json.loads(path.read_text())
        total = [right for kind in UNDECIDED_KINDS for right in found[kind]]
        print(f"[{time.monotonic() - began:.0f} s] {name}: {sum(total)} of {len(total)} in practised words", flush=True)
        return found

    before = measured("before", options.init)
    config = GRPOConfig(
        UNDECIDED_KINDS, steps=options.steps, groups=options.groups, samples=options.samples, lr=options.lr,
        epochs=options.epochs, rows=options.rows, qat=True, replay=False, workers=workers, rollout=replace(rollout),
    )  # fmt: skip
    model = load_model(options.init, device=options.device)
    for module in model.modules():
        if isinstance(module, Experts):
            module.dense = options.device == "cuda"  # one large product; elsewhere a token's own experts alone are cheaper
    run = Timed(model, Tokenizer.load(options.init), config, work / "run", deadline=time.monotonic() + options.seconds)

    def report(step) -> None:
        print(f"[{time.monotonic() - began:.0f} s] {step.line()}", flush=True)
        if step.step % 4 == 0:
            leave(run.model, work / "model", options.init)

    run.run(report)
    leave(run.model, work / "model", options.init)
    after = measured("after", work / "model")
    rows = [json.loads(line) for line in (work / "run" / "log.jsonl").read_text().splitlines()] if run.step else []
    kept = ("step", "reward", "length", "samples", "dropped_groups", "difference_max", "difference_mean", "kl", "clipped",
            "grad_norm", "rollout_seconds", "train_seconds")  # fmt: skip
    result = {
        "what": "GRPO in function sandboxes from the shipped model; temperature 1, tasks not trained on, same draws",
        "options": {key: value for key, value in vars(options).items() if key not in ("work", "out", "init")},
        "steps": run.step, "scores": compare(before, after), "rows": [{key: row[key] for key in kept} for row in rows],
        "device": torch.cuda.get_device_name() if options.device == "cuda" else device_name(), "commit": commit(),
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    for name in ("practised", "fresh"):
        print(name, json.dumps(result["scores"][name]))
    (options.out or work / "result.json").write_text(text + "\n")


def leave(model, directory: Path, tokenizer: Path) -> None:
    """The model as a directory, whole or as it was before."""
    fresh = directory.with_name(directory.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    save_model(model, fresh, tokenizer_dir=tokenizer)
    shutil.rmtree(directory, ignore_errors=True)
    fresh.rename(directory)


if __name__ == "__main__":
    main()
