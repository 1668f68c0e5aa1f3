"""Three specialists into one model by on-policy distillation: is the one within two points of each specialist on its kinds?

    python bench/distill_gain.py WORK --teacher files=DIR --teacher data=DIR --teacher retrieval=DIR --seconds 150 \
        --workers 7 --device cuda --out bench/results/distill_gain.json

The kinds are the reworded tool tasks; everything is measured at temperature 1 on the same tasks with the same draws, from seeds
that nothing trained on. Run again it goes on where it was. ``WORK/model`` is the student.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from grpo_gain import NANO, Results, gain, leave, measure, score

from nautile.checkpoint import load_model
from nautile.evals.tools import commit, device_name
from nautile.model.moe import Experts
from nautile.protocol import Tokenizer
from nautile.train.distill import Distill, DistillConfig, Teacher
from nautile.train.rollout import RolloutConfig
from nautile.train.rollout_workers import WorkerConfig

SPECIALISTS = {
    "files": ("find_file", "rename_file", "count_files", "largest_file", "replace_text"),
    "data": ("lookup_value", "edit_value", "sum_column", "count_lines"),
    "retrieval": ("find_definition", "find_line", "read_line", "last_line", "file_length"),
}
REWORDED = {name: tuple(f"reworded_{kind}" for kind in kinds) for name, kinds in SPECIALISTS.items()}
KINDS = tuple(kind for kinds in REWORDED.values() for kind in kinds)


class Timed(Distill):
    """Steps until the time is up, judged by the last one."""

    deadline, last = 0.0, 0.0

    def enough(self) -> bool:
        """See ``Distill.enough``."""
        return time.monotonic() + self.last > self.deadline

    def take_step(self, finished=lambda sample: None):
        """A step, timed."""
        began = time.monotonic()
        report = super().take_step(finished)
        self.last = time.monotonic() - began
        return report


def compare(results: dict[str, Results]) -> dict:
    """For each specialist's kinds: its score, the base model's, the student's, and the student's points over the specialist."""
    out = {}
    for name, kinds in REWORDED.items():
        found = {who: [right for kind in kinds for right in results[who][kind]] for who in ("base", name, "student")}
        out[name] = {**{("specialist" if who == name else who): score(one) for who, one in found.items()},
                     "student_over_specialist": gain(found[name], found["student"])}  # fmt: skip
    return out


def options_given() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--teacher", action="append", required=True, help="NAME=DIRECTORY, for files, data and retrieval")
    parser.add_argument("--init", type=Path, default=NANO)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=28)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=20, help="tasks a kind")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--unenforced-limits", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure base and specialists, distil, measure the student."""
    options = options_given()
    began, work = time.monotonic(), options.work
    work.mkdir(parents=True, exist_ok=True)
    rollout = RolloutConfig(
        reply_tokens=200, turns=6, tokens=3072, at_once=options.at_once, unenforced_limits=options.unenforced_limits
    )  # fmt: skip
    workers = WorkerConfig(options.init, options.workers, options.threads)
    teachers = {name: Path(path) for name, _, path in (text.partition("=") for text in options.teacher)}
    if teachers.keys() != REWORDED.keys():
        raise SystemExit(f"give --teacher for each of {', '.join(REWORDED)}")

    def measured(name: str, model: Path, kinds: tuple[str, ...]) -> Results:
        path = work / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(measure(model, KINDS, options.seeds, workers, rollout, work / "measuring", kinds)))
        found: Results = json.loads(path.read_text())
        total = [right for one in found.values() for right in one]
        print(f"[{time.monotonic() - began:.0f} s] {name}: {sum(total)} of {len(total)}", flush=True)
        return found

    results = {"base": measured("base", options.init, KINDS)}
    results |= {name: measured(name, teachers[name], REWORDED[name]) for name in REWORDED}
    config = DistillConfig(
        tuple(Teacher(name, teachers[name], kinds) for name, kinds in REWORDED.items()), steps=options.steps,
        tasks=options.tasks, samples=options.samples, lr=options.lr, rows=options.rows, chunk=4096, qat=True, replay=False,
        workers=workers, rollout=rollout,
    )  # fmt: skip
    model = load_model(options.init, device=options.device)
    for module in model.modules():
        if isinstance(module, Experts):
            module.dense = options.device == "cuda"
    run = Timed(model, Tokenizer.load(options.init), config, work / "run")
    run.deadline = time.monotonic() + options.seconds

    def report(step) -> None:
        print(f"[{time.monotonic() - began:.0f} s] {step.line()}", flush=True)
        if step.step % 4 == 0:
            leave(run.model, work / "model", options.init)

    run.run(report)
    leave(run.model, work / "model", options.init)
    results["student"] = measured("student", work / "model", KINDS)
    rows = [json.loads(line) for line in (work / "run" / "log.jsonl").read_text().splitlines()] if run.step else []
    result = {
        "what": "three specialists into one model; temperature 1, tasks not trained on, same draws",
        "steps": run.step, "scores": compare(results),
        "rows": [{key: row[key] for key in ("step", "divergence", "reward", "tokens", "rollout_seconds", "train_seconds")}
                 for row in rows],
        "device": torch.cuda.get_device_name() if options.device == "cuda" else device_name(), "commit": commit(),
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    for name, scores in result["scores"].items():
        print(name, json.dumps(scores))
    (options.out or work / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
