"""An indexer and the attention it stands for are made to fit each other, layer by layer, with everything else frozen.

An indexer alone learns what a given attention looks at, as far as its few heads can say it. What is left over is attention
spread thinly over thousands of entries; there the attention can follow the indexer at hardly any cost. So for sampled queries
of a CSA layer both minimise

    KL(attention || softmax(scores))  +  hold * |o - o_before|^2 / |o_before|^2

over all visible entries (window and sink in the denominator, heads added up), o being the attention's output: the output stays
what it was, and the attention is spread as the indexer can predict it. Only the queries' up projection, the compressor and the
sinks of the attention move; with ``attention_lr`` 0 nothing but the indexer does. A row passes through the frozen network once,
without gradients; every CSA layer takes several steps on its inputs. An indexer may be made as wide as the attention's heads
first: it then begins as a copy of the attention's compressor and of its first heads (``widened``).

    python -m nautile.train.matching SHARDS OUT --init MODEL --seconds 60 [--index-head-dim 128]
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nautile.kernels.topk import topk_mask
from nautile.model import Transformer
from nautile.model.attention import Attention, _indexer_divergence
from nautile.model.block import Block
from nautile.model.chunk import Chunk
from nautile.model.initialise import initialise
from nautile.model.layers import unit_rms
from nautile.model.rope import Rotation, rotate
from nautile.train.data import batches
from nautile.train.loop import StageConfig, learning_rate, quantisation_aware
from nautile.train.losses import Batch
from nautile.train.optimizer import Optimizers
from nautile.train.run_state import write_state
from nautile.train.spans import _prepared, _Row, block_in_spans
from nautile.train.stages import DENSE, configuration, load_weights
from nautile.train.vocabulary import check_same, record

__all__ = ["Loss", "MatchConfig", "Matched", "match", "recall", "widened"]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of weights, scores and what is visible, [1, Q, n] each


@dataclass(frozen=True)
class MatchConfig:
    """``queries`` of a row are drawn for each of ``steps`` steps of a layer; ``index_topk`` is what recall is counted at."""

    index_topk: int
    seconds: float
    rows: int | None = None  # end after so many
    queries: int = 512
    steps: int = 4
    lr: float = 3e-3
    attention_lr: float = 3e-3
    hold: float = 3.0
    span: int = 4096
    sparse: bool = False  # inputs as the network gives them with the indexer it began with, not as dense attention does
    seed: int = 0


@dataclass(frozen=True)
class Matched:
    """One layer after the steps of one row, means over them: ``recall`` of the entries with most attention, the KL, and how far
    the attention's output is from what it was (squared, relative)."""

    layer: int
    recall: float
    divergence: float
    moved: float


def widened(model: Transformer, dim: int, heads: int | None = None) -> Transformer:
    """The same model with indexers of ``dim`` a head, which must be the attention's: copies of its compressor and first heads.
    ``heads`` None keeps their number.

    Attention over every entry gives what it gave; the new indexers know nothing of weighing their heads until they are trained.
    """
    old = model.config
    if dim != old.head_dim:
        raise ValueError(f"an indexer is widened to the attention's own {old.head_dim} a head, not to {dim}")
    made = initialise(Transformer(old.replace(index_head_dim=dim, index_n_heads=heads or old.index_n_heads)), 0)
    state = model.state_dict()
    # Of the old indexers nothing stays: the weights of as many heads were learnt for other heads and cost 0.8 points of recall.
    made.load_state_dict({name: tensor for name, tensor in state.items() if ".attn.indexer." not in name}, strict=False)
    for block in made.layers:
        attn: Attention = block.attn  # type: ignore[assignment]
        if attn.indexer is not None and attn.compressor is not None:
            attn.indexer.compressor.load_state_dict(attn.compressor.state_dict())
            rows = attn.indexer.wq_b.weight.data
            rows[: attn.wq_b.weight.shape[0]] = attn.wq_b.weight.data[: rows.shape[0]]
    return made.to(model.embed.weight.device)


class _Parts(nn.Module):
    """What of an attention may move."""

    def __init__(self, attn: Attention) -> None:
        super().__init__()
        self.wq_b, self.compressor, self.attn_sink = attn.wq_b, attn.compressor, attn.attn_sink


class _Pupil:
    """One CSA layer: its attention as it was, and as it becomes."""

    def __init__(self, number: int, attn: Attention, config: MatchConfig, loss: Loss | None = None) -> None:
        assert attn.indexer is not None
        self.number, self.attn, self.config, self.loss = number, attn, config, loss or _divergence
        self.before = copy.deepcopy(attn).requires_grad_(False)
        attn.requires_grad_(False)
        attn.indexer.requires_grad_(True)
        self.indexer, self.parts = Optimizers(attn.indexer), None
        if config.attention_lr:
            parts = _Parts(attn).requires_grad_(True)
            self.parts = Optimizers(parts)

    def learn(self, row: _Row, chunk: Chunk, draw: Callable[[], Tensor], rate: float) -> Matched:
        """Some steps on one row of this layer's inputs; ``rate`` in [0, 1] scales the learning rates."""
        found = [self._step(row, chunk, draw(), rate) for _ in range(self.config.steps)]
        recall, divergence, moved = (sum(column) / len(found) for column in zip(*found, strict=True))
        return Matched(self.number, recall, divergence, moved)

    def _step(self, row: _Row, chunk: Chunk, places: Tensor, rate: float) -> tuple[float, float, float]:
        attn, part = self.attn, _at(chunk, places)
        assert attn.indexer is not None and row.entries is not None
        device = places.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            visible = attn._complete(row.entries.shape[1], part)
            keys = attn._append_index_keys(row.x, chunk, None)
            assert keys is not None
            scores = attn.indexer.scores(row.x[:, places], row.q_low[:, places], keys, part)
            with torch.no_grad():
                wanted, weights = _attention(self.before, row, chunk, places, visible, row.entries)
            moved = scores.new_zeros(())
            if self.parts is not None:
                entries = attn._append_entries(row.x, chunk, None)
                assert entries is not None
                out, weights = _attention(attn, row, chunk, places, visible, entries)
                moved = (out - wanted).float().square().sum() / wanted.float().square().sum()
            divergence = self.loss(weights, scores, visible)
        (divergence + self.config.hold * moved).backward()
        self._update(rate)
        shown = recall(weights.detach(), scores.detach(), visible, self.config.index_topk)
        return shown, divergence.item(), moved.item()

    def _update(self, rate: float) -> None:
        for optimizers, lr in ((self.indexer, self.config.lr), (self.parts, self.config.attention_lr)):
            if optimizers is None:
                continue
            groups = (*optimizers.muon.param_groups, *optimizers.adam.param_groups)
            torch.nn.utils.clip_grad_norm_([one for group in groups for one in group["params"]], 1.0)
            optimizers.step(lr * rate)


def _attention(
    attn: Attention, row: _Row, chunk: Chunk, places: Tensor, visible: Tensor, entries: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the queries at ``places`` [Q] of one row: outputs [1, Q, H, c] before they are turned back, and the probabilities of
    the entries, heads added up, [1, Q, n]."""
    size, dim = attn.config.sliding_window, attn.config.head_dim
    turn = chunk.rotations[1]
    heads = Rotation(turn.cos[:, places].unsqueeze(2), turn.sin[:, places].unsqueeze(2))
    q = attn.wq_b(row.q_low[:, places]).unflatten(-1, (attn.config.num_attention_heads, dim))
    q = rotate(unit_rms(q, attn.config.rms_norm_eps), heads)
    rows = places.unsqueeze(1) + 1 + torch.arange(size, device=places.device)  # of the raw buffer: W of them lie before the row
    first = size if chunk.documents is None else chunk.documents[0, places].unsqueeze(1) + size
    near_rows = row.raw[0, rows]
    near = torch.matmul(q[0], near_rows.transpose(1, 2)).float() * dim**-0.5
    near = near.masked_fill((rows < first).unsqueeze(1), -torch.inf)
    far = torch.matmul(q[0].flatten(0, 1), entries[0].T).unflatten(0, (len(places), -1)).float() * dim**-0.5
    far = far.masked_fill(~visible[0].unsqueeze(1), -torch.inf)
    sink = attn.attn_sink.float().view(1, -1, 1).expand(len(places), -1, 1)
    weights = torch.cat((near, far, sink), -1).softmax(-1)
    close, distant = weights[..., :size], weights[..., size:-1]
    out = torch.matmul(close.to(q.dtype), near_rows) + torch.matmul(distant.to(q.dtype), entries[0])
    return out.unsqueeze(0), distant.sum(1).unsqueeze(0)


def _divergence(weights: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
    """``_indexer_divergence`` with gradients to both sides: weights [1, Q, n] are summed over heads."""
    if not weights.requires_grad:
        return _indexer_divergence(weights.unsqueeze(2), scores, visible)
    target = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    log_scores = scores.masked_fill(~visible, -1e30).log_softmax(-1)
    return (target * (target.clamp_min(1e-12).log() - log_scores)).masked_fill(~visible, 0.0).sum(-1).mean()


def recall(weights: Tensor, scores: Tensor, visible: Tensor, k: int) -> float:
    """Of the k entries with most attention, the share among the k with the highest scores."""
    wanted, picked = (topk_mask(one.float().masked_fill(~visible, -torch.inf), k) for one in (weights, scores))
    return float((wanted & picked).sum() / wanted.sum().clamp_min(1))


def _at(chunk: Chunk, places: Tensor) -> Chunk:
    """The queries at ``places`` [Q] as a chunk: what the indexer asks about single tokens."""
    near, far = (Rotation(turn.cos[:, places], turn.sin[:, places]) for turn in chunk.rotations)
    return dataclasses.replace(
        chunk,
        lengths=(len(places),),
        positions=chunk.positions[:, places],
        documents=None if chunk.documents is None else chunk.documents[:, places],
        rotations=(near, far),
        ids=chunk.ids[:, places],
    )


def _far_queries(batch: Batch, k: int) -> Tensor:
    """Places of a row whose queries see more than ``k`` entries, so that there is something to choose."""
    positions = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    return ((positions + 1 - batch.documents[0]) // 4 > k).nonzero().squeeze(1)


def match(
    model: Transformer,
    rows: Iterator[Batch],
    config: MatchConfig,
    report: Callable[[int, float, list[Matched]], None],
) -> int:
    """Train ``model``'s CSA layers in place on rows of one sequence each; how many rows that were.

    Rows in which no query has a choice are passed over. ``report`` gets the row's number, the seconds and each layer.
    """
    frozen = copy.deepcopy(model).requires_grad_(False)
    shape = model.config if config.sparse else model.config.replace(index_topk=DENSE)
    for module in frozen.modules():
        if isinstance(module, Attention | Block):
            module.config = shape
    quantisation_aware(model, True)
    model.requires_grad_(False)
    layers: list[Block] = list(model.layers)  # type: ignore[arg-type]
    pupils = {number: _Pupil(number, one.attn, config) for number, one in enumerate(layers) if one.attn.indexer is not None}
    schedule = StageConfig(steps=1, peak_lr=1.0, end_lr_fraction=0.02, decay_fraction=0.8, warmup_steps=4)
    generator = torch.Generator().manual_seed(config.seed)
    began, done = time.monotonic(), 0
    for batch in rows:
        over = max((time.monotonic() - began) / config.seconds, done / config.rows if config.rows else 0.0)
        if over >= 1:
            break
        far = _far_queries(batch, config.index_topk)
        if len(far) == 0:
            continue
        draw = lambda far=far: far[torch.randint(len(far), (config.queries,), generator=generator).to(far.device)]  # noqa: E731
        found = _one_row(frozen, pupils, batch, draw, config.span, learning_rate(over, done, schedule))
        done += 1
        report(done, time.monotonic() - began, found)
    quantisation_aware(model, False)
    return done


def _one_row(
    frozen: Transformer, pupils: dict[int, _Pupil], batch: Batch, draw: Callable[[], Tensor], span: int, rate: float
) -> list[Matched]:
    inputs = _layer_inputs(frozen, pupils, batch, span)
    return [pupils[number].learn(row, chunk, draw, rate) for number, row, chunk in inputs]


def _layer_inputs(frozen: Transformer, wanted: Collection[int], batch: Batch, span: int) -> Iterator[tuple[int, _Row, Chunk]]:
    """What the attentions of the layers ``wanted`` get from one row, without gradients, one layer after the other."""
    device = batch.ids.device.type
    chunk = frozen.new_chunk(batch.ids, documents=batch.documents)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        embedded = frozen.embed(batch.ids)
        embedded = embedded.bfloat16() if device == "cuda" else embedded
        streams = embedded.unsqueeze(-2).expand(-1, -1, frozen.config.hc_mult, -1).contiguous()
    for number, block in enumerate(frozen.layers):
        assert isinstance(block, Block)
        if number in wanted:
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                row = _Row(*_prepared(block, streams, chunk))
            yield number, row, chunk
        if number == max(wanted):
            return
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            streams, _, _, _ = block_in_spans(block, streams, chunk, span)


def main() -> None:
    """Match the layers of a model; leaves OUT/checkpoint.pt, OUT/config.json and OUT/log.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="of the stage long")
    parser.add_argument("out", type=Path)
    parser.add_argument("--init", type=Path, required=True, help="a model directory, or weights of a stage")
    parser.add_argument("--preset", default="nano", help="nano, or the config.json of --init")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--hold", type=float, default=3.0)
    parser.add_argument("--attention-lr", type=float, default=3e-3, help="0 trains the indexer alone")
    parser.add_argument("--index-head-dim", type=int, help="first make the indexer as wide as the attention's heads")
    parser.add_argument("--index-heads", type=int, help="with --index-head-dim: heads of the wider indexer")
    parser.add_argument("--first-shard", type=int, default=0)
    parser.add_argument("--span", type=int, default=4096)
    parser.add_argument("--sparse", action="store_true", help="inputs of sparse attention, as the model is used")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known, shape = check_same(options.shards, options.init), configuration(options.preset)
    model = load_weights(shape, options.init, device)
    if options.index_head_dim not in (None, shape.index_head_dim):
        model = widened(model, options.index_head_dim, options.index_heads)
    options.out.mkdir(parents=True, exist_ok=True)
    options.out.joinpath("config.json").write_text(json.dumps(model.config.to_json(), indent=1) + "\n", encoding="utf-8")
    config = MatchConfig(
        model.config.index_topk, options.seconds, options.rows, options.queries, attention_lr=options.attention_lr,
        hold=options.hold, span=options.span, sparse=options.sparse,
    )  # fmt: skip
    with (options.out / "log.jsonl").open("a", encoding="utf-8") as log:

        def report(number: int, seconds: float, layers: list[Matched]) -> None:
            row = {"row": number, "seconds": round(seconds, 2), "layers": [dataclasses.asdict(layer) for layer in layers]}
            log.write(json.dumps(row) + "\n")
            log.flush()
            if number % 10 == 1:
                shown = "  ".join(
                    f"{one.layer}: {one.recall:.1%} KL {one.divergence:.3f} moved {one.moved:.2%}" for one in layers
                )
                print(f"[{seconds:6.1f} s] row {number}  {shown}", flush=True)

        feed = (batch for batch, _, _ in batches(options.shards, 1, torch.device(device), (options.first_shard, 0)))
        done = match(model, feed, config, report)
    if done == 0:
        parser.error(f"no query of these rows sees more than {model.config.index_topk} entries: longer rows are needed")
    write_state(options.out / "checkpoint.pt", {"model": model.state_dict(), "config": model.config.to_json()})
    if known is not None:
        record(options.out, known)
    print(f"{done} rows -> {options.out}")


if __name__ == "__main__":
    main()
