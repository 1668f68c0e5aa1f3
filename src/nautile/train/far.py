"""How far a model in training reads: needles in long texts, judged in one pass each instead of by decoding.

A trial counts when every token of the answer, reasoning included, is the most likely one after the tokens before it: then
greedy decoding gives exactly this text. Another text may end in the right value too, so the figure is a lower bound of what
``nautile eval needle`` measures; it needs no engine and costs one forward pass by spans.

    python -m nautile.train.far MODEL --lengths 4096,65536 --trials 25 --out far.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nautile.model import Transformer
from nautile.protocol import Tokenizer
from nautile.train.needles import haystack, random_pool
from nautile.train.spans import block_in_spans
from nautile.train.stages import configuration, load_weights
from nautile.train.traces import tokenise

__all__ = ["Trial", "far_trials", "right_tokens"]

FIRST_SEED = 20_000_000  # no published figure uses seeds from here on
_ROOM = 160  # tokens of the question and the answer


@dataclasses.dataclass(frozen=True)
class Trial:
    """One text: ``right`` of its ``wanted`` answer tokens would be chosen; ``passed`` when all would."""

    length: int
    depth: float
    right: int
    wanted: int

    @property
    def passed(self) -> bool:
        """Whether greedy decoding gives the answer."""
        return self.right == self.wanted


@torch.no_grad()
def right_tokens(model: Transformer, ids: Sequence[int], own: Sequence[int], span: int) -> tuple[int, int]:
    """Of the tokens of ``ids`` that are the model's own (``own`` is 1): how many are the most likely ones, and how many there
    are. The row goes through the layers ``span`` tokens at a time."""
    device = model.embed.weight.device
    row = torch.tensor([ids], dtype=torch.int64, device=device)
    chunk = model.new_chunk(row)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        embedded = model.embed(row)
        if device.type == "cuda":
            embedded = embedded.bfloat16()
        streams: Tensor = embedded.unsqueeze(-2).expand(-1, -1, model.config.hc_mult, -1).contiguous()
        for layer in model.layers:
            streams, _, _, _ = block_in_spans(layer, streams, chunk, span)  # type: ignore[arg-type]
        places = torch.tensor([place for place, one in enumerate(own) if one], device=device)
        chosen = model.logits(model.hidden(streams[0, places - 1])).argmax(-1)
    return int((chosen == row[0, places]).sum()), len(places)


def far_trials(
    model: Transformer, tokenizer: Tokenizer, length: int, trials: int, span: int = 4096, first_seed: int = FIRST_SEED
) -> list[Trial]:
    """Single needles in texts of ``length`` tokens, depth uniform: trial t of n lies in the t-th n-th of the text."""
    found = []
    for number in range(trials):
        pool = random_pool(f"{first_seed}:far:{length}:{number}", True)
        depth = (number + pool.rng.random()) / trials
        text = haystack(pool, tokenizer, length - _ROOM, depth=depth)
        ids, loss, _ = tokenise(text.messages(), (), tokenizer)
        right, wanted = right_tokens(model, ids, loss, span)
        found.append(Trial(length, round(depth, 4), right, wanted))
    return found


def main() -> None:
    """Measure a model directory or a stage's weights."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=Path(__file__).parents[1] / "weights" / "nano")
    parser.add_argument("--preset", default="nano", help="nano, or the config.json of the weights")
    parser.add_argument("--lengths", default="4096,8192,16384,32768,65536")
    parser.add_argument("--trials", type=int, default=25)
    parser.add_argument("--span", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=120.0, help="Stop before the next length after this time.")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_weights(configuration(options.preset), options.weights, device).eval()
    tokenizer, began = Tokenizer.load(options.tokenizer), time.monotonic()
    rows = []
    for length in map(int, options.lengths.split(",")):
        if time.monotonic() - began > options.seconds:
            print(f"stopped before {length} tokens: {options.seconds:.0f} s are over", flush=True)
            break
        trials = far_trials(model, tokenizer, length, options.trials, options.span)
        passed, right, wanted = (
            sum(one.passed for one in trials),
            sum(one.right for one in trials),
            sum(one.wanted for one in trials),
        )
        rows.append({"length": length, "passed": passed, "total": len(trials), "tokens_right": right, "tokens": wanted,
                     "failed_depths": [one.depth for one in trials if not one.passed]})  # fmt: skip
        print(
            f"{length} tokens: {passed}/{len(trials)} needles, {right}/{wanted} tokens [{time.monotonic() - began:.0f} s]",
            flush=True,
        )
        if options.out is not None:
            options.out.write_text(json.dumps({"first_seed": FIRST_SEED, "lengths": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
