"""The routed experts of many tokens: those on the card at once, the others group by group as they pass through it.

A layer's missing experts are cut into fixed groups of half of the staging slots. While one half is multiplied, the link fills
the other, so that with enough tokens copying costs no time. A token's pairs are added in a fixed order: experts on the card
first, then group by group, within each in the order of its choices; it does not depend on the other tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nautile.engine.expert_store import ExpertStore
from nautile.kernels.fp4_experts import FP4Experts

__all__ = ["ExpertGroups"]

_TOKENS = 8192  # whose pairs are multiplied at once
_ALL_USED = 16  # choices for each expert from which on it is certain enough that all are used


class ExpertGroups:
    """Products with one store's experts. Nobody else may use the staging slots between ``begin_chunk`` and the last ``run``."""

    def __init__(self, store: ExpertStore) -> None:
        """Raises ValueError when experts are in host memory and there are no two staging slots."""
        self.store = store
        self._half = store.placement.staging // 2
        if not self._half and not store.all_on_card:
            raise ValueError("prompts need two staging slots or more, so that one is filled while the other is read")
        self._groups = [_cut((row >= 0).nonzero().flatten().tolist(), self._half) for row in store.row]
        on_card = store.device.type == "cuda"
        self._copies = torch.cuda.Stream(store.device) if on_card else None
        self._filled, self._read = ([torch.cuda.Event() for _ in range(2)] if on_card else [] for _ in range(2))
        self._begun: list[int] = []  # the first group of the layer that comes, where its copy has been started

    def begin_chunk(self) -> None:
        """Whoever used the staging slots before is waited for."""
        self._begun = []
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream())

    def begin_layer(self, layer: int, tokens: int) -> None:
        """Start copying the first group of a layer that ``tokens`` tokens will go through, if they will use all experts."""
        config = self.store.config
        groups = self._groups[layer]
        if groups and tokens * config.num_experts_per_tok >= _ALL_USED * config.n_routed_experts:
            self._copy(layer, groups[0], 0)
            self._begun = groups[0]

    def run(self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [T, d], experts and weights [T, k] -> float32 [T, d]."""
        store, out = self.store, torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        if store.placement.resident[layer]:
            self._add(out, x, store.device_local[layer][chosen], weights, store.resident[layer])
        groups = self._wanted(layer, chosen)
        for number, group in enumerate(groups):
            if number == 0 and group != self._begun:
                self._copy(layer, group, 0)
            if number + 1 < len(groups):
                self._copy(layer, groups[number + 1], number + 1)
            half = number % 2
            where = torch.full((store.config.n_routed_experts,), -1)
            where[group] = torch.arange(len(group)) + half * self._half
            if self._copies is not None:
                torch.cuda.current_stream().wait_event(self._filled[half])
            self._add(out, x, where.to(x.device)[chosen], weights, store.staged)
            if self._copies is not None:
                self._read[half].record()
        self._begun = []
        return out

    def _wanted(self, layer: int, chosen: Tensor) -> list[list[int]]:
        """The layer's groups without the experts that nobody chose (a group that was begun stays whole)."""
        groups = self._groups[layer]
        if not groups:
            return []
        used = set(chosen.unique().tolist())
        kept = [group if group == self._begun else [expert for expert in group if expert in used] for group in groups]
        return [group for group in kept if group]

    def _copy(self, layer: int, group: list[int], number: int) -> None:
        half = number % 2
        if self._copies is None:
            self.store.stream(layer, group, half * self._half)
            return
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._read[half])
            self.store.stream(layer, group, half * self._half)
            self._filled[half].record()

    def _add(self, out: Tensor, x: Tensor, numbers: Tensor, shares: Tensor, experts: FP4Experts) -> None:
        """Add to ``out`` the pairs whose number [T, k] in this view is not negative."""
        for first in range(0, len(x), _TOKENS):
            rows = slice(first, first + _TOKENS)
            token, choice = (numbers[rows] >= 0).nonzero(as_tuple=True)  # by token, then by choice
            if not len(token):
                continue
            padding = _padded(len(token)) - len(token) if x.is_cuda else 0
            at, which = F.pad(token, (0, padding)), F.pad(choice, (0, padding))
            number, share = numbers[rows][at, which], shares[rows][at, which]
            number = number.clamp_min(0)  # padding repeats token 0, whose choice 0 may lie elsewhere
            parts = self.store.product(x[rows][at], number.unsqueeze(1), share.unsqueeze(1), experts)
            _accumulate(out[rows], token, parts[: len(token)], numbers.shape[1])


def _accumulate(out: Tensor, token: Tensor, parts: Tensor, most: int) -> None:
    """Add parts [P, d] to their tokens' rows, ``token`` [P] being sorted: a token's first part, then its second, ..."""
    rank = torch.arange(len(token), device=token.device) - torch.searchsorted(token, token)
    order = rank.argsort(stable=True)
    start = 0
    for count in torch.bincount(rank, minlength=most).tolist():
        index = order[start : start + count]
        out.index_add_(0, token[index], parts[index])  # every token at most once
        start += count


def _cut(experts: list[int], size: int) -> list[list[int]]:
    return [experts[first : first + size] for first in range(0, len(experts), max(1, size))]


def _padded(pairs: int) -> int:
    """Few numbers of pairs for kernels that are compiled by it; from 2,048 on none is."""
    return 16 if pairs <= 16 else max(2048, -(-pairs // 128) * 128)
