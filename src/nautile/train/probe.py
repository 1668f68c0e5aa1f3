"""What a training run should watch besides its loss: how evenly experts are used, and whether the indexer finds what matters.

Recall: of the k entries to which attention over everything gives most, how many the indexer's own k hold, over the queries that
see more than k entries. The attention weights are under the full denominator, window and sink included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nautile.kernels.attention import attend
from nautile.kernels.topk import topk_mask
from nautile.model import Transformer
from nautile.model.attention import Attention
from nautile.model.block import Block
from nautile.model.chunk import Chunk
from nautile.model.layers import unit_rms
from nautile.model.rope import Rotation, rotate
from nautile.model.transformer import Trace

__all__ = ["Probe", "probe"]


@dataclass(frozen=True)
class Probe:
    """``load``: for each score-routed layer the share of choices of each expert (1 / E is even). ``recall``: of each CSA layer,
    None where no query sees more than ``k`` entries."""

    load: list[list[float]]
    recall: list[float | None]
    k: int

    def row(self) -> dict[str, Any]:
        """For the log."""
        return {"load": self.load, "recall": self.recall, "k": self.k}


@torch.no_grad()
def probe(model: Transformer, ids: Tensor, k: int) -> Probe:
    """Measure on rows ids [B, T]. The model runs with attention over everything it would see; nothing of it changes."""
    seen: list[float | None] = []
    hooks = []
    blocks: list[Block] = list(model.layers)  # type: ignore[arg-type]

    def note(layer: Attention, given: tuple[Any, ...]) -> None:
        seen.append(_recall(layer, given[0], given[1], k))

    for block in blocks:
        if block.attn.indexer is not None:
            hooks.append(block.attn.register_forward_pre_hook(note))
    trace = Trace()
    try:
        model.streams(ids, model.new_chunk(ids), trace=trace)
    finally:
        for hook in hooks:
            hook.remove()
    return Probe([_load(layer.routing) for layer, block in zip(trace.layers, blocks, strict=True) if _scored(block)], seen, k)


def _scored(block: Block) -> bool:
    return block.ffn.gate.bias is not None


def _load(routing: Any) -> list[float]:
    counts = torch.bincount(routing.experts.flatten(), minlength=routing.scores.shape[1])
    return [round(float(share), 4) for share in counts / counts.sum()]


def _recall(layer: Attention, x: Tensor, chunk: Chunk, k: int) -> float | None:
    """Of one CSA layer with normalised input x [B, T, d]."""
    assert layer.indexer is not None
    turn = chunk.rotations[1]
    heads = Rotation(turn.cos.unsqueeze(2), turn.sin.unsqueeze(2))
    low = layer.q_norm(layer.wq_a(x))
    q = layer.wq_b(low).unflatten(-1, (layer.config.num_attention_heads, layer.config.head_dim))
    q = rotate(unit_rms(q, layer.config.rms_norm_eps), heads)
    raw = layer._append_window(layer._quantise(rotate(layer.kv_norm(layer.wkv(x)), turn)), chunk, None)
    entries, keys = layer._append_entries(x, chunk, None), layer._append_index_keys(x, chunk, None)
    if entries is None or keys is None:
        return None
    visible = layer._complete(entries.shape[1], chunk)
    _, weights = attend(q, raw, entries, visible, layer.attn_sink, layer._first_row(chunk))
    assert weights is not None
    wanted = topk_mask(weights.sum(2).masked_fill(~visible, -torch.inf), k)
    found = topk_mask(layer.indexer.scores(x, low, keys, chunk).masked_fill(~visible, -torch.inf), k)
    many = visible.sum(-1) > k
    total = (wanted & many.unsqueeze(-1)).sum()
    return round(float((wanted & found & many.unsqueeze(-1)).sum() / total), 4) if total else None
