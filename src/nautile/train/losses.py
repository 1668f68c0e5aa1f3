"""What training minimises: next token, the token after it (MTP), load balance, and the indexer's divergence.

The blocks are run through one function that torch.compile can take whole; which layer it is only changes the weights, so
layers of one kind share a compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nautile.model import Transformer
from nautile.model.attention import AttentionTrace
from nautile.model.block import Block, BlockTrace
from nautile.model.chunk import Chunk
from nautile.model.mtp import MTPBlock
from nautile.train import spans

__all__ = ["Batch", "LossWeights", "Losses", "training_losses"]


@dataclass(frozen=True)
class Batch:
    """Packed rows. ``documents``: row position where each token's document starts; ``weight``: of predicting this token."""

    ids: Tensor  # [B, T] int64
    documents: Tensor  # [B, T] int64
    weight: Tensor  # [B, T] float32


@dataclass(frozen=True)
class LossWeights:
    """V4's: MTP 0.3, then 0.1 once the learning rate decays; sequence balance 1e-4; the indexer's KL is its only teacher."""

    mtp: float = 0.3
    balance: float = 1e-4
    indexer: float = 0.0  # 0 leaves the indexer out of the pass


@dataclass
class Losses:
    """Scalars of one batch. ``loads`` [layers, E] counts the tokens each score-routed expert took."""

    total: Tensor
    next_token: Tensor
    mtp: Tensor
    balance: Tensor
    indexer: Tensor
    loads: Tensor


def run_block(block: Block, streams: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One block: -> (streams, router scores [N, E], chosen experts [N, k], indexer divergence or None)."""
    trace = BlockTrace(AttentionTrace())
    streams = block(streams, chunk, None, trace)
    assert trace.routing is not None
    return streams, trace.routing.scores, trace.routing.experts, trace.attention.indexer_loss


def run_mtp(block: MTPBlock, streams: Tensor, embedded: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """The draft block: -> (hidden [B, T, d], router scores, chosen experts)."""
    trace = BlockTrace(AttentionTrace())
    _, hidden = block.draft(streams, embedded, chunk, None, trace)
    assert trace.routing is not None
    return hidden, trace.routing.scores, trace.routing.experts


def weighted_cross_entropy(model: Transformer, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Mean cross entropy of hidden [B, T, d] against targets [B, T], weighted."""
    losses = F.cross_entropy(model.logits(hidden).flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weight.flatten()).sum() / weight.sum().clamp_min(1.0)


def balance_loss(scores: Tensor, experts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """V3's sequence-wise balance: mean over rows of sum_e f_e P_e, with f the share of choices and P of probability.

    scores [B T, E], experts [B T, k] -> (loss, load [E]).
    """
    count, k = scores.shape[-1], experts.shape[-1]
    chosen = torch.zeros_like(scores).scatter_(1, experts, 1.0).unflatten(0, (rows, -1))
    share = chosen.mean(1) * (count / k)
    probability = (scores / scores.sum(-1, keepdim=True)).unflatten(0, (rows, -1)).mean(1)
    return (share * probability).sum(-1).mean(), chosen.sum((0, 1))


def training_losses(
    model: Transformer,
    batch: Batch,
    weights: LossWeights,
    compile_with: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
    span: int = 0,
) -> Losses:
    """All losses of one batch. ``compile_with`` is the identity or a cached torch.compile; with a ``span`` rows go through the
    layers that many tokens at a time and are computed again for the gradients (``spans``).

    A token counts as target only where it has weight and lies in the same document as the token that predicts it.
    """
    block, mtp, entropy = compile_with(run_block), compile_with(run_mtp), compile_with(weighted_cross_entropy)
    if span:
        block, mtp = partial(spans.block_in_spans, span=span), partial(spans.mtp_in_spans, span=span)
        entropy = spans.cross_entropy_in_spans
    chunk = model.new_chunk(batch.ids, documents=batch.documents, indexer_loss=weights.indexer > 0)
    embedded = model.embed(batch.ids)
    if torch.is_autocast_enabled(embedded.device.type):
        embedded = embedded.to(torch.get_autocast_dtype(embedded.device.type))
    streams = embedded.unsqueeze(-2).expand(-1, -1, model.config.hc_mult, -1).contiguous()
    balances: list[Tensor] = []
    loads: list[Tensor] = []
    divergences: list[Tensor] = []
    layers: list[Block] = list(model.layers)  # type: ignore[arg-type]
    for layer in layers:
        streams, scores, experts, divergence = block(layer, streams, chunk)
        if layer.ffn.gate.bias is not None:
            _append(balances, loads, balance_loss(scores, experts, batch.ids.shape[0]))
        if divergence is not None:
            divergences.append(divergence)
    targets, weight = _shifted(batch, 1)
    next_token: Tensor = entropy(model, compile_with(model.hidden)(streams), targets, weight)
    zero = next_token.new_zeros(())
    mtp_loss = zero
    if len(model.mtp) and weights.mtp > 0:
        targets_2, weight_2 = _shifted(batch, 2)
        ahead = embedded.roll(-1, 1)
        hidden, scores, experts = mtp(model.mtp[0], streams, ahead, chunk)
        _append(balances, loads, balance_loss(scores, experts, batch.ids.shape[0]))
        mtp_loss = entropy(model, hidden, targets_2, weight_2)
    balance = torch.stack(balances).sum() if balances else zero
    indexer = torch.stack(divergences).sum() if divergences else zero
    total = next_token + weights.mtp * mtp_loss + weights.balance * balance + weights.indexer * indexer
    return Losses(total, next_token, mtp_loss, balance, indexer, torch.stack(loads) if loads else zero)


def _append(balances: list[Tensor], loads: list[Tensor], pair: tuple[Tensor, Tensor]) -> None:
    balances.append(pair[0])
    loads.append(pair[1].detach())


def _shifted(batch: Batch, by: int) -> tuple[Tensor, Tensor]:
    """Targets ``by`` tokens ahead and their weights; zero where that token is in another document or past the row."""
    targets = batch.ids.roll(-by, 1)
    same = batch.documents.roll(-by, 1) == batch.documents
    weight = batch.weight.roll(-by, 1) * same
    weight[:, -by:] = 0
    return targets, weight
