"""What an indexer can find: recall of the top sixteenth of entries after short trainings of one layer's indexer, by variant.

    python bench/indexer_recall.py [--layer 4] [--variants shipped kl copy-4x128] --out bench/results/indexer_small.json

Rows are haystacks drawn by seed, to learn from and (words held out, or the Python reference) to judge by. They pass once
through the shipped network with dense attention, and what one layer gets of them is kept. Each variant then trains that layer's
indexer, and where it has a rate for it the attention, on 128 queries a step with the pieces of ``nautile.train.matching``;
nothing else moves. Results are written after every variant, in place of what the file has of the same variant, layer, length
and steps; everything else in it stays. Rows take about three minutes of one core, 240 steps half a minute to two.
``--tiny`` shows in seconds that all of it runs.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nautile.evals.tools import commit, device_name
from nautile.kernels.topk import topk_mask
from nautile.model import Transformer
from nautile.model.attention import Attention
from nautile.model.block import Block
from nautile.model.chunk import Chunk
from nautile.model.initialise import initialise
from nautile.protocol import Tokenizer
from nautile.train.loop import StageConfig, learning_rate
from nautile.train.losses import Batch
from nautile.train.matching import Loss, MatchConfig, _at, _attention, _divergence, _layer_inputs, _Pupil, recall, widened
from nautile.train.needles import Filler, haystack, random_pool
from nautile.train.packing import NANO
from nautile.train.spans import _Row
from nautile.train.stages import DENSE, configuration, load_weights
from nautile.train.tasks import Pool
from nautile.train.tasks.lexicon import Lexicon
from nautile.train.traces import lexicon_of, tokenise

_QUERIES = 128  # a step
_SHARE = 16  # the best of so many entries are to be found
_BLOCK = 128  # rows end where compressor blocks end
_WHAT = (
    "one layer of the shipped nano, all else frozen, in percent; recall: of the sixteenth of entries with most attention, the "
    "share among those with the highest scores; held: of the attention entries get, by those; best: by the best choice; moved, "
    "sparse_error: squared distance, relative, of the attention's output to the shipped one's, over every entry, over those"
)


@dataclass(frozen=True)
class Variant:
    """How an indexer of ``heads`` of ``dim`` begins and is trained; ``attention_lr`` 0 leaves the attention as it is."""

    name: str
    loss: Literal["kl", "root", "set", "border"] = "kl"
    steps: int = 240
    heads: int = 4
    dim: int = 64
    start: Literal["shipped", "random", "attention"] = "shipped"
    lr: float = 3e-3
    attention_lr: float = 0.0
    hold: float = 3.0
    falling: float = 0.5  # share of the steps over which rates fall ...
    end: float = 0.05  # ... to this share of theirs


VARIANTS = (
    Variant("shipped", steps=0),
    Variant("kl"),
    Variant("kl-fast", lr=1e-2),
    Variant("root", loss="root"),
    Variant("set", loss="set"),
    Variant("border", loss="border"),
    Variant("random-12x64", start="random", heads=12),
    Variant("random-4x96", start="random", dim=96),
    Variant("random-4x128", start="random", dim=128),
    Variant("random-2x128", start="random", heads=2, dim=128),
    Variant("copy-2x128", start="attention", heads=2, dim=128),
    Variant("copy-4x128", start="attention", dim=128),
    Variant("copy-6x128", start="attention", heads=6, dim=128),
    Variant("copy-6x128-root", loss="root", start="attention", heads=6, dim=128, steps=600),
    Variant("copy-12x128", start="attention", heads=12, dim=128),
    Variant("matched", attention_lr=6e-4),
    Variant("matched-long", attention_lr=3e-3, steps=400),
    Variant("matched-4x128", start="attention", dim=128, attention_lr=6e-4),
    Variant("matched-4x128-long", start="attention", dim=128, attention_lr=3e-3, steps=400),
    Variant("matched-4x128-falling", start="attention", dim=128, attention_lr=3e-3, steps=400, falling=0.8, end=0.02),
    Variant("matched-2x128-long", start="attention", heads=2, dim=128, attention_lr=3e-3, steps=400),
    Variant("matched-4x128-loose", start="attention", dim=128, attention_lr=3e-3, steps=300, hold=0.3),
)


@dataclass(frozen=True)
class Sample:
    """What the layer gets from one row, the queries that are looked at, and what its attention gave them [1, Q, H, c]."""

    row: _Row
    chunk: Chunk
    places: Tensor
    output: Tensor


@dataclass(frozen=True)
class Judged:
    """Shares in [0, 1]: of the wanted entries found, of the entries' attention held by those picked and by the best choice;
    squared distances, relative, of the output over every entry and over those picked to what the output was."""

    recall: float
    held: float
    best: float
    moved: float
    sparse_error: float


def judged_ids(number: int, length: int, tokenizer: Tokenizer) -> list[int]:
    """A haystack of words held out, or of the Python reference, for about ``length`` tokens."""
    filler: Filler = "natural" if number % 2 else "words"
    found = haystack(random_pool(f"recall:{length}:{number}", True), tokenizer, length - 160, filler=filler)
    return tokenise(found.messages(), (), tokenizer)[0]


def learning_ids(number: int, length: int, tokenizer: Tokenizer, lexicon: Lexicon) -> list[int]:
    """A haystack as training has them, of half of ``length`` tokens at least."""
    rng, ids = random.Random(f"indexing:{length}:{number}"), list[int]()
    fillers: tuple[Filler, ...] = ("words", "files", "code", "facts", "words", "files")
    while len(ids) <= length // 2:
        wide = dataclasses.replace(lexicon, share=rng.uniform(0.15, 0.85)) if rng.random() < 0.6 else None
        tokens = int(length * 0.97)
        facts = rng.choice((1, 8, max(1, tokens // 600), max(1, tokens // 300)))
        filler = rng.choice(fillers)
        room = tokens - 1500 * length // 8192  # the rest is for questions and answers
        found = haystack(Pool(rng, lexicon=wide), tokenizer, room, facts=facts, asked=min(facts, 24), filler=filler)
        ids = tokenise(found.messages(), (), tokenizer)[0][:length]
    return ids


def judged_places(length: int) -> Tensor:
    """The last queries and as many of the second half before them."""
    generator = torch.Generator().manual_seed(1)
    earlier = torch.randint(length // 2, length - _QUERIES, (_QUERIES,), generator=generator)
    return torch.cat((torch.arange(length - _QUERIES, length), earlier))


def learning_places(length: int) -> Tensor:
    """Queries of which steps draw theirs: four times as many, not from the first sixteenth of the row."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(length // 16, length, (4 * _QUERIES,), generator=generator).sort().values


@torch.no_grad()
def sample(model: Transformer, layer: int, ids: Sequence[int], judged: bool) -> Sample:
    """Pass a row through the layers before ``layer``; its front is cut to whole blocks."""
    length = len(ids) // _BLOCK * _BLOCK
    tokens = torch.tensor([ids[len(ids) - length :]])
    batch = Batch(tokens, torch.zeros_like(tokens), torch.ones(tokens.shape))
    ((_, row, chunk),) = _layer_inputs(model, (layer,), batch, 1024)
    nothing = row.x.new_empty(0)
    row = dataclasses.replace(row, q=nothing, keys=None, post=nothing, matrix=nothing)  # large, and not looked at here
    places = judged_places(length) if judged else learning_places(length)
    attn = attention_of(model, layer)
    assert row.entries is not None
    visible = attn._complete(row.entries.shape[1], _at(chunk, places))
    return Sample(row, chunk, places, _attention(attn, row, chunk, places, visible, row.entries)[0])


def attention_of(model: Transformer, layer: int) -> Attention:
    """The attention of a layer that has an indexer."""
    block = model.layers[layer]
    assert isinstance(block, Block) and block.attn.indexer is not None
    return block.attn


def wanted_entries(visible: Tensor) -> int:
    """How many of a row's entries [1, Q, n] are to be found."""
    return max(1, visible.shape[-1] // _SHARE)


def root_divergence(weights: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
    """KL of the attention's square root, which gives thin attention more weight."""
    return _divergence(weights.clamp_min(1e-12).sqrt() * visible, scores, visible)


def set_entropy(weights: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
    """Cross entropy to the entries that are wanted, all alike."""
    k = wanted_entries(visible)
    wanted = topk_mask(weights.masked_fill(~visible, -torch.inf), k)
    logs = scores.masked_fill(~visible, -1e30).log_softmax(-1).clamp_min(-60)
    chooses = visible.sum(-1) > k
    return -((wanted * logs).sum(-1) / k * chooses).sum() / chooses.sum().clamp_min(1)


def border_loss(weights: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
    """Logistic loss of lying on the right side of the k-th score, in units of the scores' mean distance to it."""
    k = wanted_entries(visible)
    wanted = topk_mask(weights.masked_fill(~visible, -torch.inf), k)
    fixed, chooses = scores.detach().masked_fill(~visible, -1e30), visible.sum(-1) > k
    edge = fixed.topk(k + 1, -1).values[..., -2:].mean(-1, keepdim=True)
    count = visible.sum(-1, keepdim=True).clamp_min(1)
    spread = (fixed - edge).masked_fill(~visible, 0).abs().sum(-1, keepdim=True) / count
    beyond = (scores - edge) / (0.5 * spread + 1e-6)
    missed = (F.softplus(-beyond) * wanted).sum(-1) / k
    false = (F.softplus(beyond) * (visible & ~wanted)).sum(-1) / k
    return ((missed + false) * chooses).sum() / chooses.sum().clamp_min(1)


LOSSES: dict[str, Loss] = {"kl": _divergence, "root": root_divergence, "set": set_entropy, "border": border_loss}


def begin(model: Transformer, layer: int, variant: Variant) -> Attention:
    """A copy of the layer's attention with the indexer that the variant begins with."""
    attn, source = copy.deepcopy(attention_of(model, layer)), model
    if variant.start == "attention":
        source = widened(model, variant.dim, variant.heads)
    elif variant.start == "random":
        shape = model.config.replace(index_head_dim=variant.dim, index_n_heads=variant.heads)
        source = initialise(Transformer(shape), 0)
    attn.indexer = copy.deepcopy(attention_of(source, layer).indexer)
    return attn


@torch.no_grad()
def judge(attn: Attention, samples: Sequence[Sample]) -> list[Judged]:
    """Each row's figures."""
    found = []
    for one in samples:
        row, chunk, places, part = one.row, one.chunk, one.places, _at(one.chunk, one.places)
        entries, keys = attn._append_entries(row.x, chunk, None), attn._append_index_keys(row.x, chunk, None)
        assert entries is not None and keys is not None and attn.indexer is not None
        visible = attn._complete(entries.shape[1], part)
        scores = attn.indexer.scores(row.x[:, places], row.q_low[:, places], keys, part)
        k = wanted_entries(visible)
        picked = topk_mask(scores.masked_fill(~visible, -torch.inf), k)
        full, weights = _attention(attn, row, chunk, places, visible, entries)
        sparse, _ = _attention(attn, row, chunk, places, picked, entries)
        best = topk_mask(weights.masked_fill(~visible, -torch.inf), k)
        held, most = (float((weights * chosen).sum() / weights.sum()) for chosen in (picked, best))
        errors = [float((out - one.output).square().sum() / one.output.square().sum()) for out in (full, sparse)]
        found.append(Judged(recall(weights, scores, visible, k), held, most, *errors))
    return found


def percent(rows: Sequence[Judged]) -> dict[str, Any]:
    """Means over rows, and each row's recall, in percent."""
    names = [field.name for field in dataclasses.fields(Judged)]
    means = {name: round(100 * fmean(getattr(row, name) for row in rows), 3) for name in names}
    return {**means, "each_recall": [round(100 * row.recall, 1) for row in rows]}


def train(
    attn: Attention, layer: int, variant: Variant, learning: Sequence[Sample], judged: Sequence[Sample]
) -> dict[str, float]:
    """Train in place; recall in percent after a quarter and half of the steps."""
    config = MatchConfig(
        attn.config.index_topk, math.inf, queries=_QUERIES, steps=1, lr=variant.lr, attention_lr=variant.attention_lr,
        hold=variant.hold,
    )  # fmt: skip
    pupil = _Pupil(layer, attn, config, LOSSES[variant.loss])
    schedule = StageConfig(
        steps=variant.steps, peak_lr=1.0, end_lr_fraction=variant.end, decay_fraction=variant.falling, warmup_steps=10
    )
    generator, along = torch.Generator().manual_seed(0), dict[str, float]()
    for step in range(variant.steps):
        one = learning[int(torch.randint(len(learning), (1,), generator=generator))]

        def draw(places: Tensor = one.places) -> Tensor:
            return places[torch.randint(len(places), (_QUERIES,), generator=generator)]

        pupil.learn(one.row, one.chunk, draw, learning_rate(step / variant.steps, step, schedule))
        if step + 1 in (variant.steps // 4, variant.steps // 2):
            along[str(step + 1)] = round(100 * fmean(row.recall for row in judge(attn, judged)), 1)
    return along


def measure(
    model: Transformer, layer: int, variant: Variant, learning: Sequence[Sample], judged: Sequence[Sample]
) -> dict[str, Any]:
    """Before, along the way, after."""
    began, attn = time.monotonic(), begin(model, layer, variant)
    before = percent(judge(attn, judged))
    along = train(attn, layer, variant, learning, judged) if variant.steps else {}
    after = percent(judge(attn, judged)) if variant.steps else before
    settings = {key: value for key, value in dataclasses.asdict(variant).items() if key != "name"}
    figures = {"before": before, "along_recall": along, "after": after, "seconds": round(time.monotonic() - began, 1)}
    return {"variant": variant.name, "layer": layer, **settings, **figures}


def keep(path: Path, entry: dict[str, Any]) -> None:
    """Put a variant's result into the file, in place of an earlier one of the same kind."""
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = ("variant", "layer", "length", "steps")
    others = [one for one in known.get("variants", []) if any(one[key] != entry[key] for key in same)]
    order = {variant.name: number for number, variant in enumerate(VARIANTS)}
    entries = sorted((*others, entry), key=lambda one: (one["length"], one["layer"], order.get(one["variant"], len(order))))
    text = json.dumps({"what": _WHAT, **known, "variants": entries}, indent=1) + "\n"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def samples(model: Transformer, options: argparse.Namespace) -> tuple[list[Sample], list[Sample]]:
    """Rows to learn from and to judge by."""
    tokenizer, length = Tokenizer.load(NANO), options.length
    lexicon = lexicon_of(tokenizer)
    learning = [learning_ids(number, length, tokenizer, lexicon) for number in range(options.rows)]
    judged = [judged_ids(number, length, tokenizer) for number in range(options.judged)]
    print("tokens of rows:", *map(len, learning), "and of those judged:", *map(len, judged), flush=True)
    first = [sample(model, options.layer, ids, judged=False) for ids in learning]
    return first, [sample(model, options.layer, ids, judged=True) for ids in judged]


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """What the command line asks for; ``--tiny`` makes it small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--variants", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    indexed = [layer for layer, ratio in enumerate(configuration("nano").layer_ratios) if ratio == 4]
    parser.add_argument("--layer", type=int, default=4, choices=indexed)
    parser.add_argument("--steps", type=int, help="of every variant that is trained; as the variant says when left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="two short rows, two steps: whether it runs, not what it finds")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(given)
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"{options.out.parent} is not there: make it first")
    if options.steps is not None and options.steps < 1:
        parser.error("--steps needs 1 at least; the variant shipped takes none")
    options.length, options.rows, options.judged = (768, 1, 1) if options.tiny else (8192, 16, 4)
    options.steps = 2 if options.tiny else options.steps
    return options


def main(given: Sequence[str] | None = None) -> None:
    """Compute the rows, train the variants, print and write each."""
    options = arguments(given)
    torch.set_num_threads(options.threads)
    model = load_weights(configuration("nano").replace(index_topk=DENSE), NANO, "cpu").eval().requires_grad_(False)
    began, (learning, judged) = time.monotonic(), samples(model, options)
    print(f"inputs of layer {options.layer}: {time.monotonic() - began:.0f} s", flush=True)
    stamp = {"length": options.length, "rows": options.rows, "judged_rows": options.judged, "commit": commit()}
    device = f"{device_name()}, {options.threads} threads used, float32"
    known = {variant.name: variant for variant in VARIANTS}
    for variant in (known[name] for name in options.variants):
        steps = options.steps if options.steps and variant.steps else variant.steps
        entry = measure(model, options.layer, dataclasses.replace(variant, steps=steps), learning, judged)
        entry |= {**stamp, "device": device, "date": time.strftime("%Y-%m-%d")}
        print(json.dumps(entry), flush=True)
        if options.out is not None:
            keep(options.out, entry)


if __name__ == "__main__":
    main()
