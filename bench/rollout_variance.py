"""Where reinforcement can learn: how often a model does each kind of task at temperature 1, and how many groups of samples have
both outcomes. Kinds that are always done, or never, give a group of rollouts nothing to prefer.

    python bench/rollout_variance.py --kinds reworded_ fresh_ --tasks 10 --samples 8 --out bench/results/rollout_variance.json
    python bench/rollout_variance.py --recorded RUN/trajectories.jsonl
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


Rewards = dict[tuple[str, str], list[float]]  # by kind and group


def sampled(options: argparse.Namespace) -> Rewards:
    """Rewards of fresh samples."""
    kinds = [kind for start in options.kinds for kind in ENVIRONMENTS if kind.startswith(start)]
    cases = [(kind, options.first_seed + task) for task in range(options.tasks) for kind in kinds]
    plan = [
        Planned(group * options.samples + index, group, kind, seed)
        for group, (kind, seed) in enumerate(cases)
        for index in range(options.samples)
    ]
    rollout = RolloutConfig(reply_tokens=200, turns=6, tokens=3072, at_once=8)
    workers = WorkerConfig(options.model, options.workers, 1, seconds=36_000.0)
    groups: Rewards = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch, RolloutWorkers(workers) as processes:
        for sample in processes.roll_out(options.model, plan, Path(scratch), rollout, {"model": str(options.model)}):
            groups[sample.planned.kind, str(sample.planned.group)].append(sample.reward)
    return groups


def recorded(files: list[Path]) -> Rewards:
    """Rewards of samples that lie in files: one JSON object a line with kind, group and reward, as ``trajectories.jsonl``."""
    groups: Rewards = defaultdict(list)
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            groups[row["kind"], f"{file}:{row.get('step', 0)}:{row['group']}"].append(row["reward"])
    return groups


def counted(groups: Rewards) -> dict[str, dict[str, float]]:
    """By kind: how many samples were done, and how many groups have both outcomes."""
    rows = {}
    for kind in dict.fromkeys(kind for kind, _ in groups):
        of_kind = [rewards for (name, _), rewards in groups.items() if name == kind]
        passed, total = int(sum(map(sum, of_kind))), sum(map(len, of_kind))
        low, high = wilson(passed, total)
        both = sum(len(set(rewards)) > 1 for rewards in of_kind)
        rows[kind] = {"passed": passed, "total": total, "low": round(low, 4), "high": round(high, 4),
                      "groups_with_both": both, "groups": len(of_kind)}  # fmt: skip
        print(f"{kind:28} {passed:4}/{total:<4} groups with both outcomes {both}/{len(of_kind)}")
    return rows


def main() -> None:
    """Sample or read, count, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=NANO)
    parser.add_argument("--kinds", nargs="+", default=["reworded_"], help="beginnings of the names of environments")
    parser.add_argument("--tasks", type=int, default=10, help="of each kind")
    parser.add_argument("--samples", type=int, default=8, help="of each task")
    parser.add_argument("--first-seed", type=int, default=3_000_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--recorded", type=Path, nargs="+", help="count these samples instead of making some")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    began = time.monotonic()
    rows = counted(recorded(options.recorded) if options.recorded else sampled(options))
    result = {"kinds": rows, "temperature": 1.0, "first_seed": options.first_seed, "model": options.model.name,
              "device": device_name(), "commit": commit(), "date": time.strftime("%Y-%m-%d"),
              **({"from_records": True} if options.recorded else {"seconds": round(time.monotonic() - began, 1)})}  # fmt: skip
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
