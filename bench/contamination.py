"""How much of the wordings kept for evaluation training requests share: runs of words, and words, by kind.

    python bench/contamination.py [--requests 20000] --out bench/results/contamination.json

Requests are composed with slots in place of values, as training composes them, so that a run of words is a run of words. A run
of ``n`` words of a kept wording counts as shared when any training request of any kind holds it. Runs that the fixed
templates of training hold too ("how many lines of") are told apart: they were there before requests were composed.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from nautile.evals.tools import commit
from nautile.train.tasks import KINDS, Pool
from nautile.train.tasks.wording import GRAM, grams
from nautile.train.traces import training_wording

_LENGTHS = range(1, 9)


def training_requests(count: int, seed: int) -> dict[str, list[str]]:
    """``count`` composed requests of every kind, slots in place of values."""
    wording = training_wording()
    pool = Pool(random.Random(f"contamination:{seed}"))
    return {name: [wording.compose(pool, name) for _ in range(count)] for name in KINDS}


def shared_runs(requests: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """For every length: runs of kept wordings, how many of them fixed templates hold, how many composed requests alone hold."""
    kept = [template for kind in KINDS.values() for template in kind.held_out_templates]
    fixed = [template for kind in KINDS.values() for template in kind.templates]
    out: dict[str, dict[str, Any]] = {}
    for length in _LENGTHS:
        runs = {run for text in kept for run in grams(text, length)}
        in_fixed = runs & {run for text in fixed for run in grams(text, length)}
        composed: set[tuple[str, ...]] = set()
        for texts in requests.values():
            for text in texts:
                composed |= grams(text, length) & runs
        alone = composed - in_fixed
        examples = [" ".join(run) for run in sorted(alone)[:8]]
        out[str(length)] = {
            "kept": len(runs), "in_fixed_templates": len(in_fixed), "in_composed_alone": len(alone), "examples": examples,
        }  # fmt: skip
    return out


def unknown_words(requests: dict[str, list[str]]) -> dict[str, dict[str, list[str]]]:
    """By kind and kept wording: its words that no training request of that kind holds."""
    out: dict[str, dict[str, list[str]]] = {}
    for name, kind in KINDS.items():
        words = {run for text in (*requests[name], *kind.templates) for run in grams(text, 1)}
        out[name] = {text: sorted(word for (word,) in grams(text, 1) - words) for text in kind.held_out_templates}
    return out


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000, help="composed requests a kind")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="of the code that is measured, where it lies outside a checkout")
    options = parser.parse_args()
    requests = training_requests(options.requests, 0)
    result = {
        "requests_per_kind": options.requests,
        "distinct_per_kind": {name: len(set(texts)) for name, texts in requests.items()},
        "refused_length": GRAM,
        "shared_runs": shared_runs(requests),
        "words_of_kept_wordings_unknown_to_their_kind": unknown_words(requests),
        "date": time.strftime("%Y-%m-%d"),
        "commit": options.commit or commit(),
    }
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
