"""What a decode step of V4-Flash should take with experts in host memory, computed from measured parts: which arrangement
reaches how many tokens a second, and what each change is worth. No figure of this is a measurement.

    python bench/flash_budget.py --out bench/results/flash_budget.json

A layer is: the card's graph until the router's choice is there (``card``), the host's decision (``decide``), copies and host
experts beside each other, and the product of what was copied with the join (``join``). Experts are drawn uniformly; the
division is the engine's own (``divide``). ``ahead`` copies begin when the guess is there (``guess`` after the layer began), and
each guess is right with probability ``right``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nautile.config import ModelConfig
from nautile.engine.expert_dispatch import Speeds, divide, fitted


@dataclass(frozen=True)
class Parts:
    """Milliseconds, for one layer. ``head``: embedding, head and sampling, once a step."""

    card: float = 0.30
    decide: float = 0.05
    join: float = 0.05
    guess: float = 0.04
    head: float = 0.5
    right: float = 0.92
    resident: float = 0.445
    ahead: int = 0


LINK = 0.282  # an expert over the link while the cores read (bench/results/flash_decode_h100.json)
ALONE = {1: 42, 2: 77, 4: 82}  # GB/s of 1, 2, 4 experts together (flash_machine_h100.json)
BUSY = 65 / 77  # of which this remains while the link is busy
EXPERT = 13.37e-3  # GB


def step(parts: Parts, speeds: Speeds, config: ModelConfig, rng: random.Random) -> float:
    """Milliseconds of one step of one token."""
    total = parts.head
    for _ in range(config.num_hidden_layers):
        missing = sum(rng.random() >= parts.resident for _ in range(config.num_experts_per_tok))
        guesses = min(parts.ahead, missing)
        hits = sum(rng.random() < parts.right for _ in range(guesses))
        busy = max(0.0, parts.guess + guesses * speeds.link - parts.card - parts.decide) if guesses else 0.0
        streamed, computed = divide([(expert, 1) for expert in range(missing - hits)], speeds, busy=busy)
        link = busy + len(streamed) * speeds.link if streamed or hits else 0.0
        host = speeds.start + len(computed) * speeds.host if computed else 0.0
        total += parts.card + parts.decide + max(link, host) + parts.join
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    host, start = fitted({count: count * EXPERT / (rate * BUSY) * 1e3 for count, rate in ALONE.items()})
    speeds, config = Speeds(LINK, host, start), ModelConfig.preset("flash")
    rows = []
    for card, ahead, resident in itertools.product((0.30, 0.25, 0.20), (0, 1, 2), (0.445, 0.472)):
        parts, rng = replace(Parts(), card=card, ahead=ahead, resident=resident), random.Random(0)
        mean = statistics.fmean(step(parts, speeds, config, rng) for _ in range(options.steps))
        rows.append({**asdict(parts), "ms": round(mean, 2), "tokens_per_s": round(1e3 / mean, 1)})
        print(f"card {card:.2f} ms, {ahead} ahead, {resident:.1%} on the card: {mean:.1f} ms, {1e3 / mean:.1f} tokens/s")
    if options.out:
        result = {"computed": True, "speeds_ms": asdict(speeds), "rows": rows, "command": "python bench/flash_budget.py"}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
