"""Does GRPO in real sandboxes raise rewards? The shipped model is damaged by noise, then trained on three kinds of tasks alone.

    python bench/grpo_repair.py WORK [--steps 12] [--out bench/results/grpo_repair.json]

pass@1 at temperature 1 on seeds that no step has used, before and after. Run again it goes on where it was, also after a kill.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from nautile.checkpoint import load_model, save_model
from nautile.engine import Engine
from nautile.evals.tools import commit, device_name, wilson
from nautile.protocol import Tokenizer
from nautile.train.grpo import GRPO, GRPOConfig
from nautile.train.rollout import Planned, RolloutConfig, roll_out

NANO = Path(__file__).parents[1] / "src" / "nautile" / "weights" / "nano"
KINDS = ("last_line", "file_length", "count_lines")
ROLLOUT = RolloutConfig(reply_tokens=120, turns=4, at_once=24)


def damaged(noise: float):
    """The shipped model with noise of this share of each matrix's deviation."""
    model, generator = load_model(NANO), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * noise * parameter.std())
    return model


def measure(directory: Path, seeds: int) -> dict:
    """pass@1 by kind with Wilson's intervals, on evaluation seeds."""
    engine = Engine(directory)
    cases = [(kind, 10_000_000 + index) for index in range(seeds) for kind in KINDS]
    plan = [Planned(number, number, kind, seed) for number, (kind, seed) in enumerate(cases)]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            samples = roll_out(engine, plan, Path(scratch), ROLLOUT, {})
    finally:
        engine.close()
    scores = {}
    for kind in (*KINDS, "all"):
        found = [sample.reward >= 1 for sample in samples if kind in ("all", sample.planned.kind)]
        low, high = wilson(sum(found), len(found))
        scores[kind] = {"passed": sum(found), "total": len(found), "low": round(low, 4), "high": round(high, 4)}
    return scores


def main() -> None:
    """Damage, measure, train, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    tokenizer, first = Tokenizer.load(NANO), options.work / "damaged"
    options.work.mkdir(parents=True, exist_ok=True)
    if not (first / "model.safetensors").exists():
        save_model(damaged(options.noise), first, tokenizer_dir=NANO)
    if not (options.work / "before.json").exists():
        (options.work / "before.json").write_text(json.dumps(measure(first, options.seeds)))
    config = GRPOConfig(KINDS, steps=options.steps, groups=3, samples=8, lr=options.lr, rows=4, rollout=ROLLOUT)
    run = GRPO(load_model(first), tokenizer, config, options.work / "run")
    run.run(lambda report: print(report.line(), flush=True))
    last = options.work / "trained"
    save_model(run.model, last, tokenizer_dir=NANO)
    rows = [json.loads(line) for line in (options.work / "run" / "log.jsonl").read_text().splitlines()]
    kept = (
        "step",
        "reward",
        "length",
        "dropped_groups",
        "difference_max",
        "kl",
        "disturbed",
        "rollout_seconds",
        "train_seconds",
    )
    result = {
        "what": "GRPO in function sandboxes on the shipped model after noise; temperature 1, seeds not trained on",
        "noise": options.noise, "lr": options.lr, "steps": options.steps, "kinds": list(KINDS),
        "before": json.loads((options.work / "before.json").read_text()), "after": measure(last, options.seeds),
        "rows": [{key: row[key] for key in kept} for row in rows], "device": device_name(), "commit": commit(),
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
