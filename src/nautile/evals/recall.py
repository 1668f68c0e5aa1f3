"""How much of what full attention would look at the indexer picks, after a long text.

The text is taken in as the engine always does it, by its quickest kernels and with sparse attention; then the last queries go
through the network's modules over the same state, and attention over every entry is computed beside the indexer's choice.
``recall``: of the k entries with most attention (window and sink in the denominator, heads added up), the share that the
indexer's k hold; ``recall_top``: the same for the 64 with most attention. ``mass``: of all attention that entries get, the
share on the chosen. Picks that know nothing would have ``chance``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from nautile.checkpoint import load_model
from nautile.engine import EngineConfig
from nautile.engine.plan import Piece, Plan
from nautile.engine.runner import TorchRunner
from nautile.engine.runners import make_runner
from nautile.evals.tools import commit, device_name
from nautile.kernels.attention import attend
from nautile.kernels.topk import topk_mask
from nautile.model import Transformer
from nautile.model.attention import Attention
from nautile.model.block import Block
from nautile.model.chunk import Chunk
from nautile.model.layers import unit_rms
from nautile.model.rope import Rotation, rotate
from nautile.protocol import Tokenizer, encode
from nautile.state import PoolOptions, StatePool
from nautile.state.interface import LayerRows, RowBuffer
from nautile.train.needles import haystack, random_pool

__all__ = ["LayerRecall", "indexer_recall", "recall_report"]

_CHUNK = 1024  # tokens taken in at a time
_BLOCK = 256  # tokens of a block of the pool
_TOP = 64  # entries that ``recall_top`` is about


@dataclass(frozen=True)
class LayerRecall:
    """One CSA layer: shares in [0, 1] over the queries that were looked at."""

    layer: int
    recall: float
    recall_top: float
    mass: float
    chance: float


@torch.inference_mode()
def indexer_recall(model: Transformer, ids: Sequence[int], queries: int = 128) -> list[LayerRecall]:
    """Measure on the last ``queries`` tokens of ``ids``, which must leave more than index_topk entries before them.

    Raises ValueError when the text is so short that nothing is left out.
    """
    k = model.config.index_topk
    before = len(ids) - queries
    if before // 4 <= k:
        raise ValueError(
            f"{len(ids)} tokens have at most {len(ids) // 4} entries, of which the indexer keeps {k}: nothing to choose"
        )
    pool = StatePool(model.config, PoolOptions(-(-len(ids) // _BLOCK) + 1, 1, _BLOCK, prefix_cache=False))
    sequence, (runner, _) = pool.open(ids), make_runner(model, pool, EngineConfig())
    for start in range(0, before, _CHUNK):
        piece = tuple(ids[start : min(start + _CHUNK, before)])
        pool.ensure(sequence, len(piece))
        runner.step(Plan((Piece(sequence, piece, "none"),)))
        pool.append(sequence, piece)
    pool.ensure(sequence, queries)
    found: list[LayerRecall] = []
    blocks: list[Block] = list(model.layers)  # type: ignore[arg-type]
    looks = [_Look(number, found) for number, block in enumerate(blocks) if block.attn.indexer is not None]
    hooks = [handle for look in looks for handle in look.attach(blocks[look.number].attn)]
    try:
        TorchRunner(model, pool).step(Plan((Piece(sequence, tuple(ids[before:]), "none"),)))
    finally:
        for hook in hooks:
            hook.remove()
    return found


class _Rows:
    """The state of one layer, with what it gave during a pass: ``raw`` rows, ``entries`` and indexer ``keys``."""

    def __init__(self, rows: LayerRows) -> None:
        self.rows, self.window, self.tail, self.index_tail = rows, _Window(rows.window), rows.tail, rows.index_tail
        self.entries = self.keys = torch.empty(0)

    def store_entries(self, new: Tensor, first: tuple[int, ...], count: int) -> Tensor:
        """See ``LayerRows``."""
        self.entries = self.rows.store_entries(new, first, count)
        return self.entries

    def store_index_keys(self, new: Tensor, first: tuple[int, ...], count: int) -> Tensor:
        """See ``LayerRows``."""
        self.keys = self.rows.store_index_keys(new, first, count)
        return self.keys


class _Window:
    """The window of one layer; ``raw`` is what it gave last."""

    def __init__(self, rows: RowBuffer) -> None:
        self.rows, self.size, self.raw = rows, rows.size, torch.empty(0)

    def extend(self, new: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """See ``RowBuffer``."""
        self.raw = self.rows.extend(new, lengths)
        return self.raw


@dataclass(frozen=True)
class _Look:
    """Sees the last pass of one layer; writes to ``found``."""

    number: int
    found: list[LayerRecall]

    def attach(self, layer: Attention) -> list[Any]:
        """The hooks, to be removed after the pass."""
        return [layer.register_forward_pre_hook(self._watch), layer.register_forward_hook(self._measure)]

    def _watch(self, layer: Attention, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x, chunk, rows, *rest = given
        return x, chunk, _Rows(rows), *rest

    def _measure(self, layer: Attention, given: tuple[Any, ...], _: Tensor) -> None:
        x, chunk, rows = given[:3]
        assert layer.indexer is not None
        q, low = _queries(layer, x, chunk)
        visible = layer._complete(rows.entries.shape[1], chunk)
        _, weights = attend(q, rows.window.raw, rows.entries, visible, layer.attn_sink, layer._first_row(chunk))
        assert weights is not None
        attention = weights.sum(2)
        hidden, k = attention.masked_fill(~visible, -torch.inf), layer.config.index_topk
        picked = topk_mask(layer.indexer.scores(x, low, rows.keys, chunk).masked_fill(~visible, -torch.inf), k)
        shares = [_share(topk_mask(hidden, count), picked) for count in (k, min(_TOP, k))]
        mass = float((attention * picked).sum() / attention.sum())
        chance = float((k / visible.sum(-1)).mean())
        self.found.append(LayerRecall(self.number, *(round(share, 4) for share in (*shares, mass, chance))))


def _share(wanted: Tensor, picked: Tensor) -> float:
    return float((wanted & picked).sum() / wanted.sum())


def _queries(layer: Attention, x: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Queries [B, T, H, c] and their low-rank form."""
    turn = chunk.rotations[1]
    heads = Rotation(turn.cos.unsqueeze(2), turn.sin.unsqueeze(2))
    low = layer.q_norm(layer.wq_a(x))
    q = layer.wq_b(low).unflatten(-1, (layer.config.num_attention_heads, layer.config.head_dim))
    return rotate(unit_rms(q, layer.config.rms_norm_eps), heads), low


def recall_report(
    directory: Path, lengths: Sequence[int], texts: int, queries: int, progress: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Means over ``texts`` haystacks of each length, for machines; every other text is the natural one. ``progress`` sees the
    report as it is after each text. Raises ValueError as ``indexer_recall`` does."""
    began, version = time.monotonic(), commit()
    model, tokenizer = load_model(directory).requires_grad_(False), Tokenizer.load(directory)
    runs: dict[str, list[list[LayerRecall]]] = {}
    report: dict[str, Any] = {}
    for length in lengths:
        for number in range(texts):
            pool = random_pool(f"recall:{length}:{number}", True)
            found = haystack(pool, tokenizer, length - 16, filler=("words", "natural")[number % 2])
            prompt = encode(found.messages()[:1], tokenizer=tokenizer, thinking=True, dialect="0731")
            runs.setdefault(str(length), []).append(indexer_recall(model, prompt.ids, queries))
            report = {
                "lengths": {size: _means(texts) for size, texts in runs.items()},
                "texts": {size: len(done) for size, done in runs.items()},
                "index_topk": model.config.index_topk,
                "queries": queries,
                "model": directory.name,
                "device": device_name(),
                "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "commit": version,
                "seconds": round(time.monotonic() - began, 1),
            }
            progress(report)
    return report


def _means(runs: Sequence[Sequence[LayerRecall]]) -> list[dict[str, float]]:
    """Each layer's means over the texts, and its lowest recall."""
    rows = []
    for layers in zip(*runs, strict=True):
        names = ("recall", "recall_top", "mass", "chance")
        means = {name: round(fmean(getattr(one, name) for one in layers), 4) for name in names}
        rows.append({"layer": layers[0].layer, **means, "lowest": min(one.recall for one in layers)})
    return rows
