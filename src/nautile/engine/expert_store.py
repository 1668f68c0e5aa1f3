"""The bytes of all routed experts, and products with them wherever they lie.

On the card there are six arenas (codes and scales of w1, w3, w2) with one slot an expert and some slots more for experts that
are streamed in. In host memory an expert is one run of bytes in the order w1, s1, w3, s3, w2, s2, so that the host's cores
read it in one go. Nothing is ever copied to make it: weights are written where they stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nautile.config import ModelConfig
from nautile.engine.placement import ExpertPlacement, expert_bytes
from nautile.kernels.fp4_experts import FewTiles, FP4Experts, fp4_experts, fp4_experts_reference
from nautile.kernels.host import ExpertStream

__all__ = ["PARTS", "ExpertStore", "host_memory"]

PARTS = ("w1", "s1", "w3", "s3", "w2", "s2")
_CHUNK = 1 << 30  # bytes of one pinned allocation: PyTorch rounds them up to powers of two


def part_shapes(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """Shapes of an expert's six tensors in bytes, in the order of ``PARTS``."""
    d, inner = config.hidden_size, config.moe_intermediate_size
    up, down = ((inner, d // 2), (inner, d // 32)), ((d, inner // 2), (d, inner // 32))
    return (*up, *up, *down)


def host_memory(size: int, pinned: bool) -> Tensor:
    """``size`` bytes of host memory, page-locked for a card."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


class ExpertStore:
    """All experts of a model; the placement says where each one is."""

    def __init__(self, placement: ExpertPlacement, device: torch.device) -> None:
        """Allocate everything. Raises torch.OutOfMemoryError when a budget was wrong."""
        config = placement.config
        self.config, self.placement, self.device = config, placement, device
        self.shapes, self.bytes = part_shapes(config), expert_bytes(config)
        slots = placement.on_card + placement.staging
        self.arenas = tuple(torch.empty(slots, *shape, dtype=torch.uint8, device=device) for shape in self.shapes)
        self.staged = self._view(placement.on_card, slots)
        for scales in (self.staged.s1, self.staged.s3, self.staged.s2):
            scales.zero_()  # pairs that are not streamed multiply slot 0 by nothing: it must hold numbers
        self.slot = torch.full((config.num_hidden_layers, config.n_routed_experts), -1, dtype=torch.int64)
        self.row = torch.full_like(self.slot, -1)
        self.local = torch.full_like(self.slot, -1)  # place among the layer's experts on the card
        self.resident = self._number()
        per = max(1, _CHUNK // self.bytes)
        sizes = [min(per, placement.in_host - first) for first in range(0, placement.in_host, per)]
        self._per_chunk = per
        self._chunks = [host_memory(count * self.bytes, device.type == "cuda").view(count, self.bytes) for count in sizes]
        self.device_local = self.local.to(device)
        self._rows: list[list[int]] = self.row.tolist()
        self._bases = [chunk.data_ptr() for chunk in self._chunks]
        self._stream = ExpertStream(self.arenas)

    def _number(self) -> tuple[FP4Experts, ...]:
        """Give every expert its place; the experts on the card, layer by layer."""
        slot = row = 0
        views = []
        for layer, resident in enumerate(self.placement.resident):
            first, on_card = slot, set(resident)
            for expert in range(self.config.n_routed_experts):
                if expert in on_card:
                    self.slot[layer, expert], self.local[layer, expert], slot = slot, slot - first, slot + 1
                else:
                    self.row[layer, expert], row = row, row + 1
            views.append(self._view(first, slot))
        return tuple(views)

    def _view(self, start: int, stop: int) -> FP4Experts:
        w1, s1, w3, s3, w2, s2 = (arena[start:stop] for arena in self.arenas)
        return FP4Experts(w1, s1, w3, s3, w2, s2, self.config.swiglu_limit)

    @property
    def all_on_card(self) -> bool:
        """Whether no expert is in host memory."""
        return self.placement.in_host == 0

    def parts(self, layer: int, expert: int) -> tuple[Tensor, ...]:
        """The six tensors of an expert where they lie, uint8, to be written."""
        slot = int(self.slot[layer, expert])
        if slot >= 0:
            return tuple(arena[slot] for arena in self.arenas)
        return self._cut(self.blob(layer, expert))

    def blob(self, layer: int, expert: int) -> Tensor:
        """An expert in host memory, uint8 [bytes]."""
        row = int(self.row[layer, expert])
        return self._chunks[row // self._per_chunk][row % self._per_chunk]

    def tensors(self) -> list[Tensor]:
        """Everything that holds codes or scales, for filling: card arenas, then host chunks."""
        return [*self.arenas, *self._chunks]

    def _cut(self, blob: Tensor) -> tuple[Tensor, ...]:
        parts, start = [], 0
        for rows, columns in self.shapes:
            parts.append(blob[start : start + rows * columns].view(rows, columns))
            start += rows * columns
        return tuple(parts)

    # Products -----------------------------------------------------------------------------------------------------

    def stream(self, layer: int, experts: Sequence[int], first: int = 0) -> None:
        """Start copying experts into the staging slots ``first``, first + 1, ..., on the current stream.

        Raises ValueError for more than there are slots, RuntimeError when the driver refuses.
        """
        if first + len(experts) > self.placement.staging:
            raise ValueError(f"{len(experts)} experts from {first} on for {self.placement.staging} staging slots")
        stream = torch.cuda.current_stream().cuda_stream if self.device.type == "cuda" else 0
        self._stream.copy([self.address(layer, expert) for expert in experts], self.placement.on_card + first, stream)

    def address(self, layer: int, expert: int) -> int:
        """Where an expert lies in host memory."""
        row = self._rows[layer][expert]
        return self._bases[row // self._per_chunk] + row % self._per_chunk * self.bytes

    def product(self, x: Tensor, chosen: Tensor, weights: Tensor, experts: FP4Experts, tiles: FewTiles | None = None) -> Tensor:
        """x [T, d], numbers [T, k] of experts in this view, weights [T, k] -> float32 [T, d]. ``tiles`` None: as suits T."""
        if x.is_cuda:
            return fp4_experts(x, chosen, weights, experts, tiles=tiles)
        return fp4_experts_reference(x, chosen, weights, experts).float()

    def resident_product(self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor, tiles: FewTiles | None = None) -> Tensor:
        """The part of the chosen experts that is on the card: x [T, d], experts [T, k] -> float32 [T, d]. Others count with
        weight 0, so nothing depends on the host."""
        if not self.placement.resident[layer]:
            return torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        local = self.device_local[layer][chosen.long()]
        if not self.all_on_card:
            weights = weights * (local >= 0)
            local = local.clamp_min(0)
        return self.product(x, local, weights, self.resident[layer], tiles)

    def run(self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Many tokens (prefill): x [T, d], experts and weights [T, k] -> float32 [T, d]. Experts that are not on the card
        are streamed in groups that fit the staging slots; each pair is computed alone and a token's pairs are added in the
        order of its choices."""
        if self.all_on_card:
            return self.resident_product(layer, x, chosen, weights)
        pairs = x.unsqueeze(1).expand(-1, chosen.shape[1], -1).flatten(0, 1)
        flat, shares = chosen.flatten().cpu(), weights.flatten().unsqueeze(1)
        out = torch.empty(len(flat), x.shape[1], dtype=torch.float32, device=x.device)
        local = self.local[layer][flat]
        missing = flat[local < 0].unique().tolist()
        self._some(out, pairs, local, shares, self.resident[layer])
        for first in range(0, len(missing), self.placement.staging):
            group = missing[first : first + self.placement.staging]
            where = torch.full((self.config.n_routed_experts,), -1)
            where[group] = torch.arange(len(group))
            self.stream(layer, group)
            self._some(out, pairs, where[flat], shares, self.staged)
        return out.view(*chosen.shape, -1).sum(1)

    def _some(self, out: Tensor, pairs: Tensor, numbers: Tensor, shares: Tensor, experts: FP4Experts) -> None:
        """The pairs whose number in this view is not negative."""
        live = numbers >= 0
        if not bool(live.any()):
            return
        index = live.nonzero().squeeze(1)
        count = len(index)
        padded = _padded(count) if out.is_cuda else count
        index = F.pad(index, (0, padded - count)).to(out.device)
        numbers = F.pad(numbers[live], (0, padded - count)).unsqueeze(1).to(out.device)
        out[index[:count]] = self.product(pairs[index], numbers, shares[index], experts)[:count]


def _padded(pairs: int) -> int:
    """Kernels are compiled by the number of pairs; how many fall to a group of experts differs every time. So few numbers, of
    which the larger ones need no table of a compiled size."""
    return 16 if pairs <= 16 else max(2048, 1 << (pairs - 1).bit_length())
