"""Drafts by the native kernels: the MTP block is run as a network of one layer whose streams are given instead of embedded.

Joining the trunk's streams with the next token's embedding is a few small products and stays in PyTorch; the block, its
collapse and the head are native. Drafts need no exactness: a wrong one costs a token's work and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence as Many
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nautile.engine.native import KINDS, NativeRunner
from nautile.engine.plan import Plan
from nautile.kernels.native import NativeModel, NativeStep, StatePools
from nautile.model import Transformer
from nautile.state.pages import HISTORY, TAIL, Pages

__all__ = ["NativeDraftingRunner"]


class NativeDraftingRunner(NativeRunner):
    """A native runner that keeps the streams of its last step and drafts from them."""

    def __init__(
        self,
        model: Transformer,
        pages: Pages,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        threads: int | None = None,
        library: Path | None = None,
    ) -> None:
        """Raises ValueError for a checkpoint without an MTP block, NativeUnavailable as ``NativeRunner``."""
        if not len(model.mtp) or pages.mtp_layer is None:
            raise ValueError("this checkpoint has no MTP block: run without speculation")
        super().__init__(model, pages, dtype=dtype, threads=threads, library=library)
        self._embed, self._mtp = model.embed, model.mtp[0]
        tensors = {name: getattr(pages, name) for name in (*HISTORY, *TAIL)}
        tensors["window"] = pages.window[:, pages.mtp_layer : pages.mtp_layer + 1]
        pools = StatePools(tensors, pages.options.block_tokens, pages.version)
        kinds = replace(KINDS[dtype], index="float32")  # the block has no indexer to keep 8-bit keys for
        block = NativeModel(_config(model), _tensors(model), kinds, library)
        self._block = NativeStep(block, pools, threads or os.cpu_count() or 1)
        self._last: tuple[Plan, Tensor] | None = None

    def _keep_streams(self, plan: Plan) -> Tensor:
        streams = torch.empty(plan.tokens, self.config.hc_mult, self.config.hidden_size)
        self._last = (plan, streams)
        return streams

    @torch.inference_mode()
    def draft(self, plan: Plan, following: Many[tuple[int, ...]]) -> list[int]:
        """See ``DraftingRunner.draft``. Of a prompt chunk the last W tokens are enough: no row of the block's window depends
        on earlier ones."""
        last, self._last = self._last, None
        if last is None or last[0] is not plan:
            raise ValueError("draft follows the step of the same plan, once")
        guesses, wanted, first = [-1] * len(plan.pieces), [], 0
        for index, (piece, after) in enumerate(zip(plan.pieces, following, strict=True)):
            if after:
                wanted.append((index, piece, after, last[1][first : first + len(after)]))
            first += len(piece.ids)
        if not wanted:
            return guesses
        size, pieces, ids, streams = self.config.sliding_window, [], list[int](), []
        for _, piece, after, rows in wanted:
            count = min(len(after), size)
            pieces.append((piece.sequence.slot or 0, piece.sequence.length + len(after) - count, count, 1))
            ids += after[-count:]
            streams.append(rows[-count:])
        joined = self._joined(torch.cat(streams), ids)
        blocks = [piece.sequence.blocks for _, piece, _, _ in wanted]
        logits = self._block.run(pieces, ids, blocks, len(wanted), (joined, None))
        for (index, *_), guess in zip(wanted, logits.argmax(-1).tolist(), strict=True):
            guesses[index] = guess
        return guesses

    def _joined(self, streams: Tensor, ids: list[int]) -> Tensor:
        """What enters the block: z_j = e_proj(enorm(e)) + h_proj(hnorm(X_j)), [T, n, d]."""
        mtp: Any = self._mtp
        embedded = self._embed(torch.tensor(ids, dtype=torch.int64))
        joined: Tensor = mtp.e_proj(mtp.enorm(embedded)).unsqueeze(-2) + mtp.h_proj(mtp.hnorm(streams))
        return joined.float().contiguous()


def _config(model: Transformer) -> Any:
    """The block as a network: one window layer, routed by score."""
    return replace(model.config, num_hidden_layers=1, compress_ratios=(0,), num_hash_layers=0, num_nextn_predict_layers=0)


def _tensors(model: Transformer) -> dict[str, Tensor]:
    """The block's tensors under the names of a network of one layer."""
    whole, prefix = model.state_dict(), "mtp.0."
    head = whole["embed.weight"] if model.head is None else whole["head.weight"]
    found = {"embed.weight": whole["embed.weight"], "head.weight": head}
    for name in ("window_frequencies", "compressed_frequencies"):
        found[name] = getattr(model, name)
    for name, tensor in whole.items():
        if name.startswith(prefix):
            own = name.removeprefix(prefix)
            ends = own.startswith("hc_head_") or own == "norm.weight"
            found[own if ends else f"layers.0.{own}"] = tensor
    return found
