"""How often a layer's router can be foreseen, with random weights: the share of its chosen experts that it would also choose on
the last layer's input, on the streams before the last layer's experts, or on the streams before its own attention.

    python bench/expert_guesses.py --out bench/results/expert_guesses.json

V4-Flash's number of experts and choices in a narrower network of 22 layers, on the CPU. Real weights will give other shares:
load a checkpoint with ``nautile bench model --weights DIR --ahead 1``, which prints what became of the guesses.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from nautile.config import ModelConfig
from nautile.engine.decode_step import DecodeStep
from nautile.engine.measure import TINY
from nautile.engine.packed import random_packed
from nautile.engine.packed_weights import LayerWeights
from nautile.engine.placement import Budget
from nautile.kernels.decode.linear import linear
from nautile.kernels.decode.routing import route
from nautile.kernels.decode.streams import mix
from nautile.state import PoolOptions, StatePool

SCHEDULE = (0, 0, *(4, 128) * 10)
SHAPE = {
    "hidden_size": 512, "o_lora_rank": 128, "n_routed_experts": 256, "num_experts_per_tok": 6, "num_hash_layers": 3,
    "num_hidden_layers": len(SCHEDULE), "compress_ratios": (*SCHEDULE, 0), "num_nextn_predict_layers": 0,
}  # fmt: skip


class Watched(DecodeStep):
    """A step that counts how many of the chosen experts each guess had named."""

    def watch(self) -> None:
        """Begin to count."""
        self.hits: dict[str, list[int]] = defaultdict(list)
        self.guesses: dict[str, set[int]] = {}

    def enter(self, index: int) -> None:
        super().enter(index)
        if index < len(self.weights.layers):
            self._guess("streams before its attention", index, None)

    def _guess(self, name: str, index: int, x: Tensor | None) -> None:
        layer = self.weights.layers[index]
        x = mix(self._streams, layer.feed_forward, self.dtype)[0] if x is None else x
        chosen = route(linear(x, layer.gate), self.inputs.ids, self._router(layer))[0]
        self.guesses[name] = set(chosen[0].tolist())

    def _route(self, index: int, layer: LayerWeights) -> None:
        super()._route(index, layer)
        chosen = set(self._chosen[0][0].tolist())
        if index >= self.config.num_hash_layers:  # those are foreseen exactly
            for name, guess in self.guesses.items():
                self.hits[name].append(len(chosen & guess))
        self.guesses = {}
        if index + 1 < len(self.weights.layers):
            self._guess("last layer's input", index + 1, self._x)
            self._guess("streams before the last layer's experts", index + 1, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=40)
    options = parser.parse_args()
    config = ModelConfig(**{**TINY, **SHAPE})
    weights = random_packed(config, Budget(8 << 30, 0), "cpu", seed=1)
    pool = StatePool(config, PoolOptions(blocks=4, slots=1, rows="packed", prefix_cache=False))
    sequence, rng = pool.open([0]), random.Random(0)
    step = Watched(weights, pool.pages, 1, 1024, None)
    step.watch()
    with torch.inference_mode():
        for position in range(options.tokens):
            pool.ensure(sequence, 1)
            token = rng.randrange(config.vocab_size)
            step.inputs.ids[0], step.inputs.positions[0], step.inputs.slots[0] = token, position, sequence.slot
            step.inputs.table[0, : len(sequence.blocks)] = torch.tensor(sequence.blocks)
            for index in range(step.pieces):
                step.enter(index)
                step.piece(index)
                if index + 1 < step.pieces:
                    step.meanwhile(index)
            pool.append(sequence, [token])
    chosen = config.num_experts_per_tok
    shares = {name: round(sum(hits) / (chosen * len(hits)), 3) for name, hits in step.hits.items()}
    result = {"model": "random weights", "tokens": options.tokens, "layers": len(SCHEDULE), "right": shares}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result | {"command": "python bench/expert_guesses.py"}, indent=1) + "\n")


if __name__ == "__main__":
    main()
