"""Attention over a raw window and compressed entries with a sink, one shared key-value head.

The plain PyTorch meaning. Queries are taken in tiles of the window size: tile i sees raw rows [i S, i S + W + S), of which
each query keeps the W up to its own, so the window part costs 2 W products per query however long the chunk is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend"]


def attend(
    q: Tensor, raw: Tensor, entries: Tensor | None, visible: Tensor | None, sink: Tensor, first_row: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """o_h = (sum_j e^l_hj k_j) / (sum_j e^l_hj + e^sink_h), l_hj = q_h . k_j / sqrt(c), over window rows and entries.

    Args:
        q: [B, T, H, c] queries. raw: [B, W + T, c]; query t sees rows t + 1 .. t + W. entries: [B, n, c] or None.
        visible: [B or 1, T, n] bool, entries each query may see. sink: [H] logits whose value is zero.
        first_row: [B or 1, T or 1], raw rows before it are hidden; None when all of the window is there.
    Returns the outputs [B, T, H, c] and the probabilities of the entries [B, T, H, n], None without entries.
    """
    scale = q.shape[-1] ** -0.5
    if q.shape[1] == 1 and not torch.is_grad_enabled():
        return _attend_one(q, raw, entries, visible, sink, first_row)
    window = _window_logits(q, raw, first_row) * scale
    top = torch.maximum(window.detach().amax(-1), sink.detach().to(window.dtype))
    far = None
    if entries is not None and visible is not None:
        logits = torch.matmul(q.flatten(1, 2), entries.transpose(1, 2)).view(*q.shape[:3], -1)
        far = _wide(logits).mul(scale).masked_fill(~visible.unsqueeze(2), -torch.inf)
        top = torch.maximum(top, far.detach().amax(-1))
    near_weights = (window - top.unsqueeze(-1)).exp()
    total = near_weights.sum(-1) + (sink - top).exp()
    out = _window_sum(near_weights.to(q.dtype), raw)
    far_weights = None
    if far is not None and entries is not None:
        far_weights = (far - top.unsqueeze(-1)).exp()
        total = total + far_weights.sum(-1)
        out = out + torch.matmul(far_weights.to(q.dtype).flatten(1, 2), entries).view(q.shape)
        far_weights = far_weights / total.unsqueeze(-1)
    return (out / total.unsqueeze(-1)).to(q.dtype), far_weights


def _attend_one(
    q: Tensor, raw: Tensor, entries: Tensor | None, visible: Tensor | None, sink: Tensor, first_row: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One query per sequence: two products for the logits, one softmax over both and the sink, two products for the sum."""
    query, near = q[:, 0], raw[:, 1:]
    logits = [torch.matmul(query, near.transpose(1, 2))]
    if first_row is not None:
        hidden = torch.arange(1, raw.shape[1], device=q.device) < first_row
        logits[0].masked_fill_(hidden.unsqueeze(1), -torch.inf)
    if entries is not None:
        far = torch.matmul(query, entries.transpose(1, 2))
        logits.append(far if visible is None else far.masked_fill_(~visible, -torch.inf))
    column = (sink * q.shape[-1] ** 0.5).to(q.dtype).view(1, -1, 1).expand(q.shape[0], -1, -1)  # scaled back below
    weights = (_wide(torch.cat((*logits, column), dim=-1)) * q.shape[-1] ** -0.5).softmax(-1)
    split = near.shape[1]
    out = torch.matmul(weights[..., :split].to(q.dtype), near)
    if entries is None:
        return out.unsqueeze(1), None
    far_weights = weights[..., split:-1]
    return (out + torch.matmul(far_weights.to(q.dtype), entries)).unsqueeze(1), far_weights.unsqueeze(1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _tiles(raw: Tensor, tokens: int) -> tuple[int, int, Tensor]:
    """Tile size S, number of tiles, and the raw rows of each tile: [B, tiles, c, W + S] (a view of a padded buffer)."""
    window = raw.shape[1] - tokens
    size = min(tokens, window)
    count = -(-tokens // size)
    padded = F.pad(raw, (0, 0, 0, count * size - tokens)) if count * size > tokens else raw
    return size, count, padded.unfold(1, window + size, size)


def _window_logits(q: Tensor, raw: Tensor, first_row: Tensor | None) -> Tensor:
    """Unscaled logits of the rows of each query's tile, hidden ones at -inf: [B, T, H, W + S], at least float32."""
    batch, tokens, heads, dim = q.shape
    size, count, rows = _tiles(raw, tokens)
    queries = F.pad(q, (0, 0, 0, 0, 0, count * size - tokens)) if count * size > tokens else q
    logits = _wide(torch.matmul(queries.reshape(batch, count, size * heads, dim), rows))
    logits = logits.view(batch, count, size, heads, -1)
    seen = _band(size, rows.shape[-1], q.device)
    if first_row is not None:
        row = torch.arange(count, device=q.device).unsqueeze(1) * size + torch.arange(rows.shape[-1], device=q.device)
        first = first_row.expand(-1, tokens)
        first = F.pad(first, (0, count * size - tokens)).unflatten(1, (count, size))
        seen = seen & (row.unsqueeze(1) >= first.unsqueeze(-1))
        logits = logits.masked_fill(~seen.unsqueeze(-2), -torch.inf)
    else:
        logits = logits.masked_fill(~seen.unsqueeze(-2), -torch.inf)
    return logits.view(batch, count * size, heads, -1)[:, :tokens]


def _band(size: int, width: int, device: torch.device) -> Tensor:
    """Row j of a tile is in the window of its query a iff a < j <= a + W, [size, W + size] bool."""
    query = torch.arange(size, device=device).unsqueeze(1)
    row = torch.arange(width, device=device)
    return (row > query) & (row <= query + (width - size))


def _window_sum(weights: Tensor, raw: Tensor) -> Tensor:
    """sum_j weights_j raw_j over each tile: weights [B, T, H, W + S] -> [B, T, H, c]."""
    batch, tokens, heads, width = weights.shape
    size, count, rows = _tiles(raw, tokens)
    padded = F.pad(weights, (0, 0, 0, 0, 0, count * size - tokens)) if count * size > tokens else weights
    out = torch.matmul(padded.reshape(batch, count, size * heads, width), rows.transpose(-1, -2))
    return out.view(batch, count * size, heads, -1)[:, :tokens]
