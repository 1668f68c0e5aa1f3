"""The memory of all sequences: one pool of tensors per kind of state, cut into blocks (history) and slots (tails).

A block is ``block_tokens`` tokens of one sequence in all layers at once; its number indexes every history tensor. A slot is
the tail of one live sequence; its tensors are rings indexed by absolute position (row ``position % R``), so nothing moves
when a token is appended and nothing needs clearing: rows of negative positions are never read. Blocks are shared by
reference count and copied before the first write by somebody who is not their only owner.

What this file does not know: the network, prefixes, snapshots, files. It allocates, copies and counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nautile.config import ModelConfig
from nautile.state.formats import RowName, index_format, row_format

__all__ = ["CSA_RING", "HCA_RING", "HISTORY", "TAIL", "Pages", "PoolError", "PoolFull", "PoolOptions", "Sequence"]

CSA_RING, HCA_RING = 8, 128  # tokens whose projections a compressor may still need
HISTORY = ("csa", "index", "hca")  # block-indexed tensors
TAIL = ("window", "csa_kv", "csa_gate", "index_kv", "index_gate", "hca_kv", "hca_gate")  # slot-indexed tensors


class PoolError(ValueError):
    """A call that the pool cannot make sense of; the text says which rule it broke. Nothing was changed."""


class PoolFull(RuntimeError):  # noqa: N818  # the name is what happened, as in queue.Full
    """No free and no evictable memory for this request now. Nothing was changed: release, park or wait, then try again."""


@dataclass(frozen=True)
class PoolOptions:
    """Sizes of a pool. Everything is allocated at once, so what fits is known before anything runs.

    ``snapshot_every`` (a multiple of ``block_tokens``) is the interval k between tail snapshots: a prefix is found, and a
    sequence rewound, at the cost of recomputing fewer than k tokens. ``snapshot_bytes`` bounds the snapshots of the device
    tier, ``host_bytes`` what is kept in host memory after it left the blocks, ``disk_bytes`` the files under ``disk``.
    """

    blocks: int = 64
    slots: int = 8
    block_tokens: int = 256
    snapshot_every: int = 256
    rows: RowName = "float32"
    prefix_cache: bool = True
    snapshot_bytes: int = 256 << 20
    host_bytes: int = 0
    disk: Path | None = None
    disk_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.slots < 1:
            raise PoolError("a pool needs at least one block and one slot")
        if self.block_tokens < HCA_RING or self.block_tokens % HCA_RING:
            raise PoolError(f"block_tokens must be a multiple of {HCA_RING}, got {self.block_tokens}")
        if self.snapshot_every < self.block_tokens or self.snapshot_every % self.block_tokens:
            raise PoolError(f"snapshot_every must be a multiple of block_tokens={self.block_tokens}, got {self.snapshot_every}")
        if self.rows not in ("float32", "bfloat16", "packed"):
            raise PoolError(f'rows is "float32", "bfloat16" or "packed", got {self.rows!r}')
        if min(self.snapshot_bytes, self.host_bytes, self.disk_bytes) < 0:
            raise PoolError("snapshot_bytes, host_bytes and disk_bytes must not be negative")


@dataclass(eq=False)
class Sequence:
    """One live sequence. Written by the pool only; read by the engine and the runners.

    ``ids`` are the tokens whose state is here (``length`` of them); ``blocks`` cover them in order and may reach further.
    ``cached`` of them were found in the prefix tree when the sequence was opened. ``slot`` is None while it is parked.
    """

    partition: str = ""
    ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    slot: int | None = None
    cached: int = 0
    parked: Tensor | None = None  # the bytes of the tail while it has no slot
    open: bool = True

    @property
    def length(self) -> int:
        """Number of tokens taken in."""
        return len(self.ids)


class Pages:
    """The tensors, and who owns which block and slot.

    ``csa`` [blocks, CSA layers, block_tokens / 4, row], ``index`` the same with index_row, ``hca`` [blocks, HCA layers,
    block_tokens / 128, row]; ``window`` [slots, layers (+ 1 for MTP), W, row]; ``csa_kv``, ``csa_gate`` [slots, CSA layers,
    8, 2c], ``index_kv``, ``index_gate`` [slots, CSA layers, 8, 2ci] and ``hca_kv``, ``hca_gate`` [slots, HCA layers, 128,
    c], float32, gates without the positional bias. ``ordinal[layer]`` is a layer's place among those of its kind.
    """

    def __init__(self, config: ModelConfig, options: PoolOptions, device: str | torch.device = "cpu") -> None:
        self.config, self.options, self.device = config, options, torch.device(device)
        self.row_format, self.index_format = row_format(config, options.rows), index_format(config, options.rows)
        ratios = config.layer_ratios
        self.ordinal = tuple(ratios[:layer].count(ratio) for layer, ratio in enumerate(ratios))
        self.mtp_layer = len(ratios) if config.num_nextn_predict_layers else None
        csa, hca = ratios.count(4), ratios.count(HCA_RING)
        c, ci, per_block = config.head_dim, config.index_head_dim, options.block_tokens
        row, index_row = self.row_format.width, self.index_format.width
        blocks, slots, windows = options.blocks, options.slots, len(ratios) + (self.mtp_layer is not None)
        self.csa = self._new((blocks, csa, per_block // 4, row), self.row_format.dtype)
        self.index = self._new((blocks, csa, per_block // 4, index_row), self.index_format.dtype)
        self.hca = self._new((blocks, hca, per_block // HCA_RING, row), self.row_format.dtype)
        self.window = self._new((slots, windows, config.sliding_window, row), self.row_format.dtype)
        self.csa_kv, self.csa_gate = (self._new((slots, csa, CSA_RING, 2 * c), torch.float32) for _ in range(2))
        self.index_kv, self.index_gate = (self._new((slots, csa, CSA_RING, 2 * ci), torch.float32) for _ in range(2))
        self.hca_kv, self.hca_gate = (self._new((slots, hca, HCA_RING, c), torch.float32) for _ in range(2))
        self.version = torch.zeros(blocks, dtype=torch.int64)  # raised by whoever writes history rows; see ``changed``
        self.references, self.cached = [0] * blocks, [0] * blocks  # owners of each block; those in the prefix cache
        self.evictable = 0  # blocks whose owners are all in the prefix cache
        self.free_blocks = list(range(blocks - 1, -1, -1))  # the lowest number is taken first
        self.free_slots = list(range(slots - 1, -1, -1))

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    # Bytes --------------------------------------------------------------------------------------------------------

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """Allocated bytes of every tensor, by name."""
        return {name: tensor.nbytes for name in (*HISTORY, *TAIL) for tensor in (getattr(self, name),)}

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all history tensors."""
        return sum(self.bytes_by_kind[name] for name in HISTORY) // self.options.blocks

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot over all tail tensors."""
        return sum(self.bytes_by_kind[name] for name in TAIL) // self.options.slots

    # Blocks -------------------------------------------------------------------------------------------------------

    def allocate(self, count: int, cached: bool = False) -> list[int]:
        """``count`` free blocks with one reference each. Raises PoolFull (and takes none) when there are not as many.

        ``cached``, here and below: the reference is the prefix cache's. ``evictable`` counts the blocks without other owners.
        """
        if count > len(self.free_blocks):
            raise PoolFull(f"{count} blocks wanted, {len(self.free_blocks)} free of {self.options.blocks}")
        taken = [self.free_blocks.pop() for _ in range(count)]
        self._count(taken, 1, cached)
        return taken

    def share(self, blocks: Iterable[int], cached: bool = False) -> None:
        """One more owner for each of these blocks."""
        blocks = list(blocks)
        assert all(self.references[block] for block in blocks), "a block without an owner cannot be shared"
        self._count(blocks, 1, cached)

    def drop(self, blocks: Iterable[int], cached: bool = False) -> None:
        """One owner fewer; a block without owners is free again."""
        blocks = list(blocks)
        assert all(self.references[block] for block in blocks), "a block is released twice"
        self._count(blocks, -1, cached)
        self.free_blocks.extend(block for block in blocks if not self.references[block])

    def _count(self, blocks: list[int], change: int, cached: bool) -> None:
        for block in blocks:
            self.evictable -= 0 < self.references[block] == self.cached[block]
            self.references[block] += change
            self.cached[block] += change if cached else 0
            self.evictable += 0 < self.references[block] == self.cached[block]

    def copy_block(self, source: int, target: int) -> None:
        """Copy all rows of a block."""
        self.changed([target])
        for name in HISTORY:
            tensor = getattr(self, name)
            tensor[target].copy_(tensor[source])

    def equal_blocks(self, one: list[int], other: list[int]) -> bool:
        """Whether two lists of blocks hold the same bytes."""
        return torch.equal(self.read_blocks(one), self.read_blocks(other))

    def changed(self, blocks: Iterable[int]) -> None:
        """Rows of these blocks were written: what somebody derived from them (the native kernels' 8-bit keys) is stale."""
        for block in blocks:
            self.version[block] += 1

    def read_blocks(self, blocks: list[int]) -> Tensor:
        """The bytes of these blocks in host memory: uint8 [blocks, block_bytes]; per block csa, index, hca."""
        chosen = torch.tensor(blocks, dtype=torch.int64, device=self.device)
        parts = [_bytes(getattr(self, name).index_select(0, chosen)) for name in HISTORY]
        return torch.cat(parts, dim=1).cpu()

    def write_blocks(self, blocks: list[int], data: Tensor) -> None:
        """The inverse of ``read_blocks``."""
        self.changed(blocks)
        start = 0
        for name in HISTORY:
            tensor = getattr(self, name)
            size = tensor[0].nbytes
            for block, row in zip(blocks, data, strict=True):
                part = row[start : start + size].clone().view(tensor.dtype).view(tensor.shape[1:])
                tensor[block].copy_(part)
            start += size

    # Slots --------------------------------------------------------------------------------------------------------

    def allocate_slot(self) -> int:
        """A free slot. Raises PoolFull."""
        if not self.free_slots:
            raise PoolFull(f"all {self.options.slots} slots hold a live sequence: release or park one")
        return self.free_slots.pop()

    def drop_slot(self, slot: int) -> None:
        """Give a slot back."""
        assert slot not in self.free_slots, f"slot {slot} is released twice"
        self.free_slots.append(slot)

    def copy_slot(self, source: int, target: int) -> None:
        """Copy a whole tail."""
        for name in TAIL:
            tensor = getattr(self, name)
            tensor[target].copy_(tensor[source])

    def tail_bytes(self, length: int) -> int:
        """Size of ``read_tail`` of a sequence of this length."""
        return sum(self._tail_part(name, 0, length).nbytes for name in TAIL)

    def read_tail(self, slot: int, length: int) -> Tensor:
        """What a sequence of ``length`` tokens needs of its slot, in host memory: uint8 [n], tensors in order of ``TAIL``.

        Window rows from 0 on (all W once there are as many tokens); all 8 rows of the CSA rings; of the HCA rings the
        rows of the block that has begun, none at a multiple of 128.
        """
        return torch.cat([_bytes(self._tail_part(name, slot, length)).flatten() for name in TAIL]).cpu()

    def write_tail(self, slot: int, length: int, data: Tensor) -> None:
        """The inverse of ``read_tail``."""
        if data.nbytes != self.tail_bytes(length):
            raise PoolError(f"a tail at {length} tokens has {self.tail_bytes(length)} bytes, got {data.nbytes}")
        start = 0
        for name in TAIL:
            part = self._tail_part(name, slot, length)
            part.copy_(data[start : start + part.nbytes].clone().view(part.dtype).view(part.shape))
            start += part.nbytes

    def _tail_part(self, name: str, slot: int, length: int) -> Tensor:
        tensor: Tensor = getattr(self, name)[slot]
        if name == "window":
            return tensor[:, : min(length, self.config.sliding_window)]
        return tensor[:, : length % HCA_RING] if name.startswith("hca") else tensor


def _bytes(x: Tensor) -> Tensor:
    """The bytes of each first index, [n, bytes] uint8."""
    return x.contiguous().flatten(1).view(torch.uint8)
