"""How much of what full attention would look at the indexer picks, after a long text.

The text is taken in as the model always does, with sparse attention; then, for the last queries, attention over every entry is
computed beside the indexer's choice. ``recall``: of the k entries with most attention (window and sink in the denominator,
heads added up), the share that the indexer's k hold. ``mass``: of all attention that entries get, the share on the chosen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from nautile.checkpoint import load_model
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
from nautile.train.needles import haystack, random_pool

__all__ = ["LayerRecall", "indexer_recall", "recall_report"]

_CHUNK = 512  # tokens taken in at a time


@dataclass(frozen=True)
class LayerRecall:
    """One CSA layer: shares in [0, 1] over the queries that were looked at."""

    layer: int
    recall: float
    mass: float


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
    text, state = torch.tensor([list(ids)]), model.new_state(1)
    for start in range(0, before, _CHUNK):
        model(text[:, start : min(start + _CHUNK, before)], state=state, logits="none")
    blocks: list[Block] = list(model.layers)  # type: ignore[arg-type]
    found: list[LayerRecall] = []
    hooks = []
    for number, block in enumerate(blocks):
        if block.attn.indexer is not None:
            look = _Look(number, state.layers[number].window.rows().clone(), found)
            hooks.append(block.attn.register_forward_hook(look))
    try:
        model(text[:, before:], state=state, logits="none")
    finally:
        for hook in hooks:
            hook.remove()
    return found


@dataclass(frozen=True)
class _Look:
    """Sees the last pass of one layer: ``window`` are the raw rows before it; writes to ``found``."""

    number: int
    window: Tensor
    found: list[LayerRecall]

    def __call__(self, layer: Attention, given: tuple[Any, ...], _: Tensor) -> None:
        x, chunk, state = given[0], given[1], given[2]
        assert layer.indexer is not None
        count = (chunk.starts[0] + chunk.lengths[0]) // 4
        entries, keys = state.entries[:, :count], state.index_keys[:, :count]
        q, low, raw = _queries(layer, x, chunk, self.window)
        visible = layer._complete(count, chunk)
        _, weights = attend(q, raw, entries, visible, layer.attn_sink, layer._first_row(chunk))
        assert weights is not None
        attention = weights.sum(2)
        k = layer.config.index_topk
        wanted = topk_mask(attention.masked_fill(~visible, -torch.inf), k)
        picked = topk_mask(layer.indexer.scores(x, low, keys, chunk).masked_fill(~visible, -torch.inf), k)
        recall = float((wanted & picked).sum() / wanted.sum())
        mass = float((attention * picked).sum() / attention.sum())
        self.found.append(LayerRecall(self.number, round(recall, 4), round(mass, 4)))


def _queries(layer: Attention, x: Tensor, chunk: Chunk, window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, T, H, c], their low-rank form, and the raw rows they can see [B, W + T, c]."""
    turn = chunk.rotations[1]
    heads = Rotation(turn.cos.unsqueeze(2), turn.sin.unsqueeze(2))
    low = layer.q_norm(layer.wq_a(x))
    q = layer.wq_b(low).unflatten(-1, (layer.config.num_attention_heads, layer.config.head_dim))
    rows = layer._quantise(rotate(layer.kv_norm(layer.wkv(x)), turn))
    return rotate(unit_rms(q, layer.config.rms_norm_eps), heads), low, torch.cat((window, rows), 1)


def recall_report(directory: Path, lengths: Sequence[int], texts: int, queries: int) -> dict[str, Any]:
    """Means over ``texts`` haystacks of each length, for machines. Raises ValueError as ``indexer_recall`` does."""
    began, model, tokenizer = time.monotonic(), load_model(directory), Tokenizer.load(directory)
    rows: dict[str, list[dict[str, float]]] = {}
    for length in lengths:
        runs = []
        for number in range(texts):
            pool = random_pool(f"recall:{length}:{number}", True)
            found = haystack(pool, tokenizer, length - 16, filler=("words", "natural")[number % 2])
            prompt = encode(found.messages()[:1], tokenizer=tokenizer, thinking=True, dialect="0731")
            runs.append(indexer_recall(model, prompt.ids, queries))
        rows[str(length)] = [
            {
                "layer": layers[0].layer,
                "recall": round(fmean(one.recall for one in layers), 4),
                "mass": round(fmean(one.mass for one in layers), 4),
            }
            for layers in zip(*runs, strict=True)
        ]
    return {
        "lengths": rows,
        "index_topk": model.config.index_topk,
        "texts": texts,
        "queries": queries,
        "model": directory.name,
        "device": device_name(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "seconds": round(time.monotonic() - began, 1),
    }
