"""Rows too long for one pass: attention and experts go through the row a span at a time and are computed again on the way back.

What a layer needs of the whole row (keys, compressed entries) is small and kept; what is large, [T, heads, entries] and the
experts' inner values, exists for one span at a time. Same losses and gradients as ``losses.run_block`` (tests/train/
test_spans.py), more arithmetic: each span is computed twice forward. A row of 65,536 tokens keeps 0.4 GiB a layer at nano's
width in bfloat16, and a span of 4,096 needs some 12 GiB while it is worked on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nautile.kernels.attention import attend
from nautile.kernels.topk import topk_mask
from nautile.model import Transformer
from nautile.model.attention import Attention, _indexer_divergence
from nautile.model.block import Block
from nautile.model.chunk import Chunk
from nautile.model.layers import unit_rms
from nautile.model.mhc import collapse, distribute, head_collapse, mixing
from nautile.model.mtp import MTPBlock
from nautile.model.rope import Rotation, rotate

__all__ = ["block_in_spans", "cross_entropy_in_spans", "mtp_in_spans"]

_LOGITS = 8192  # tokens whose logits are in memory at once


@dataclass(frozen=True)
class _Place:
    """Tokens ``start`` to ``end`` of a row, which see nothing before token ``first``."""

    start: int
    end: int
    first: int


@dataclass(frozen=True)
class _Row:
    """What the spans of one layer share: [B, T, ...], but entries and keys are [B, n, ...] and raw is [B, W + T, c]."""

    q: Tensor
    q_low: Tensor
    x: Tensor
    raw: Tensor
    entries: Tensor | None
    keys: Tensor | None
    post: Tensor
    matrix: Tensor


def _again(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it, keep its arguments alone, call it again in the backward pass."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def block_in_spans(block: Block, streams: Tensor, chunk: Chunk, span: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``losses.run_block`` by spans of ``span`` tokens: (streams, router scores [N, E], chosen experts [N, k], divergence)."""
    row = _Row(*_again(_prepared, block, streams, chunk))
    parts = [_again(_one_span, block, row, streams, chunk, place) for place in _places(chunk, span)]
    out, scores, experts, sums, counts = (list(column) for column in zip(*parts, strict=True))
    divergence = None
    if block.attn.indexer is not None and chunk.indexer_loss and row.entries is not None:
        divergence = torch.stack(sums).sum() / torch.stack(counts).sum().clamp_min(1)
    return torch.cat(out, 1), torch.cat(scores, 1).flatten(0, 1), torch.cat(experts, 1).flatten(0, 1), divergence


def mtp_in_spans(block: MTPBlock, streams: Tensor, embedded: Tensor, chunk: Chunk, span: int) -> tuple[Tensor, Tensor, Tensor]:
    """``losses.run_mtp`` by spans: (hidden [B, T, d], router scores, chosen experts)."""
    joined = _again(_joined, block, streams, embedded)
    streams, scores, experts, _ = block_in_spans(block, joined, chunk, span)
    hidden: Tensor = _again(_collapsed, block, streams)
    return hidden, scores, experts


def cross_entropy_in_spans(model: Transformer, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """``losses.weighted_cross_entropy`` with logits of the tokens that count alone, some thousands at a time."""
    counted = weight.flatten() > 0
    rows, wanted, weights = hidden.flatten(0, 1)[counted], targets.flatten()[counted], weight.flatten()[counted]
    total: Tensor = hidden.sum() * 0.0  # a row without a target still has a graph
    for start in range(0, len(rows), _LOGITS):
        part = slice(start, start + _LOGITS)
        total = total + _again(_entropy, model, rows[part], wanted[part], weights[part])
    return total / weight.sum().clamp_min(1.0)


def _entropy(model: Transformer, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    return (F.cross_entropy(model.logits(hidden), targets, reduction="none") * weight).sum()


def _places(chunk: Chunk, span: int) -> list[_Place]:
    length = chunk.ids.shape[1]
    starts = list(range(0, length, span))
    first = [0] * len(starts) if chunk.documents is None else chunk.documents[:, starts].amin(0).tolist()
    return [_Place(start, min(start + span, length), seen) for start, seen in zip(starts, first, strict=True)]


def _prepared(block: Block, streams: Tensor, chunk: Chunk) -> tuple[Any, ...]:
    """Everything of a layer's attention that needs the whole row: the fields of ``_Row``."""
    attn = block.attn
    pre, post, matrix = mixing(streams, block.hc_attn_fn, block.hc_attn_base, block.hc_attn_scale, block.config)
    x = block.attn_norm(collapse(streams, pre))
    turn = chunk.rotations[int(attn.ratio != 0)]
    q_low = attn.q_norm(attn.wq_a(x))
    q = attn.wq_b(q_low).unflatten(-1, (attn.config.num_attention_heads, attn.config.head_dim))
    q = rotate(unit_rms(q, attn.config.rms_norm_eps), Rotation(turn.cos.unsqueeze(2), turn.sin.unsqueeze(2)))
    raw = attn._append_window(attn._quantise(rotate(attn.kv_norm(attn.wkv(x)), turn)), chunk, None)
    keys = attn._append_index_keys(x.detach(), chunk, None)
    entries = attn._append_entries(x, chunk, None)
    return q, q_low.detach(), x.detach(), raw, entries, keys, post, matrix


def _one_span(block: Block, row: _Row, streams: Tensor, chunk: Chunk, place: _Place) -> tuple[Tensor, ...]:
    """(streams, router scores [B, S, E], experts [B, S, k], sum of the indexer's divergences, number of queries in it)."""
    part = _cut(chunk, place)
    y, divergence, queries = _attention(block.attn, row, chunk, part, place)
    inside = slice(place.start, place.end)
    streams = distribute(streams[:, inside], y, row.post[:, inside], row.matrix[:, inside])
    pre, post, matrix = mixing(streams, block.hc_ffn_fn, block.hc_ffn_base, block.hc_ffn_scale, block.config)
    y, routing = block.ffn(block.ffn_norm(collapse(streams, pre)), part.ids)
    shape = (streams.shape[0], place.end - place.start)
    scores, experts = routing.scores.unflatten(0, shape), routing.experts.unflatten(0, shape)
    return distribute(streams, y, post, matrix), scores, experts, divergence, queries


def _attention(attn: Attention, row: _Row, chunk: Chunk, part: Chunk, place: _Place) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, S, d] of a span's attention, the sum of its queries' divergences, and how many queries that is."""
    inside = slice(place.start, place.end)
    zero = row.q.new_zeros((), dtype=torch.float32)
    entries = visible = scores = None
    if row.entries is not None and (count := place.end // attn.ratio):
        seen = slice(place.first // attn.ratio, count)  # nothing outside of it is visible
        entries, visible = row.entries[:, seen], attn._complete(count, part)[..., seen]
        if row.keys is not None and (chunk.indexer_loss or entries.shape[1] > attn.config.index_topk):
            assert attn.indexer is not None
            scores = attn.indexer.scores(row.x[:, inside], row.q_low[:, inside], row.keys[:, seen], part)
            visible = topk_mask(scores.detach().masked_fill(~visible, -torch.inf), attn.config.index_topk)
    raw = row.raw[:, place.start : place.end + attn.config.sliding_window]
    out, weights = attend(row.q[:, inside], raw, entries, visible, attn.attn_sink, _first_row(attn, chunk, place))
    turn = part.rotations[int(attn.ratio != 0)]
    back = Rotation(turn.cos.unsqueeze(2), turn.sin.unsqueeze(2)).inverse()
    y: Tensor = attn.wo_b(attn.wo_a(rotate(out, back).flatten(2)))
    if not chunk.indexer_loss or scores is None or weights is None or visible is None:
        return y, zero, zero
    queries = visible.any(-1).sum()
    return y, _indexer_divergence(weights, scores, visible) * queries, queries.float()


def _first_row(attn: Attention, chunk: Chunk, place: _Place) -> Tensor | None:
    """``Attention._first_row`` counted from the raw rows of the span."""
    rows = attn._first_row(chunk)
    if rows is None:
        return None
    return (rows[:, place.start : place.end] if rows.shape[1] > 1 else rows) - place.start


def _cut(chunk: Chunk, place: _Place) -> Chunk:
    """The span as a chunk: what the mechanisms ask about single tokens."""
    inside = slice(place.start, place.end)
    near, far = (Rotation(turn.cos[:, inside], turn.sin[:, inside]) for turn in chunk.rotations)
    return replace(
        chunk,
        lengths=(place.end - place.start,) * len(chunk.lengths),
        positions=chunk.positions[:, inside],
        documents=None if chunk.documents is None else chunk.documents[:, inside],
        rotations=(near, far),
        ids=chunk.ids[:, inside],
    )


def _joined(block: MTPBlock, streams: Tensor, embedded: Tensor) -> Tensor:
    joined: Tensor = block.e_proj(block.enorm(embedded)).unsqueeze(-2) + block.h_proj(block.hnorm(streams))
    return joined.to(streams.dtype)


def _collapsed(block: MTPBlock, streams: Tensor) -> Tensor:
    h = head_collapse(streams, block.hc_head_fn, block.hc_head_base, block.hc_head_scale, block.config)
    out: Tensor = block.norm(h)
    return out
