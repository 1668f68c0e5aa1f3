"""Where reinforcement can learn: how often a model does each kind of task at temperature 1, and how many groups of samples have
both outcomes. Kinds that are always done, or never, give a group of rollouts nothing to prefer.

    python bench/rollout_variance.py --kinds reworded_ fresh_ --tasks 10 --samples 8 --out bench/results/rollout_variance.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from nautile.evals.tools import commit, device_name, wilson
from nautile.train.environments import ENVIRONMENTS
from nautile.train.rollout import Planned, RolloutConfig
from nautile.train.rollout_workers import RolloutWorkers, WorkerConfig

NANO = Path(__file__).parents[1] / "src" / "nautile" / "weights" / "nano"


def main() -> None:
    """Sample, count, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=NANO)
    parser.add_argument("--kinds", nargs="+", default=["reworded_"], help="beginnings of the names of environments")
    parser.add_argument("--tasks", type=int, default=10, help="of each kind")
    parser.add_argument("--samples", type=int, default=8, help="of each task")
    parser.add_argument("--first-seed", type=int, default=3_000_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kinds = [kind for start in options.kinds for kind in ENVIRONMENTS if kind.startswith(start)]
    cases = [(kind, options.first_seed + task) for task in range(options.tasks) for kind in kinds]
    plan = [
        Planned(group * options.samples + index, group, kind, seed)
        for group, (kind, seed) in enumerate(cases)
        for index in range(options.samples)
    ]
    began = time.monotonic()
    rollout = RolloutConfig(reply_tokens=200, turns=6, tokens=3072, at_once=8)
    workers = WorkerConfig(options.model, options.workers, 1, seconds=36_000.0)
    with tempfile.TemporaryDirectory() as scratch, RolloutWorkers(workers) as processes:
        samples = processes.roll_out(options.model, plan, Path(scratch), rollout, {"model": str(options.model)})
    groups: dict[tuple[str, int], list[float]] = defaultdict(list)
    for sample in samples:
        groups[sample.planned.kind, sample.planned.group].append(sample.reward)
    rows = {}
    for kind in kinds:
        of_kind = [rewards for (name, _), rewards in groups.items() if name == kind]
        passed, total = int(sum(map(sum, of_kind))), sum(map(len, of_kind))
        low, high = wilson(passed, total)
        both = sum(len(set(rewards)) > 1 for rewards in of_kind)
        rows[kind] = {"passed": passed, "total": total, "low": round(low, 4), "high": round(high, 4),
                      "groups_with_both": both, "groups": len(of_kind)}  # fmt: skip
        print(f"{kind:28} {passed:4}/{total:<4} groups with both outcomes {both}/{len(of_kind)}")
    result = {"kinds": rows, "samples_of_a_task": options.samples, "temperature": 1.0, "first_seed": options.first_seed,
              "tokens_sampled": sum(sample.sampled for sample in samples), "device": device_name(), "commit": commit(),
              "date": time.strftime("%Y-%m-%d"), "seconds": round(time.monotonic() - began, 1)}  # fmt: skip
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
