"""The pool: live sequences on shared pages, with prefix reuse, fork, rewind and park. The engine's only door to the state.

A step is: ``ensure`` room, run the network (``batch`` gives the modules a view; kernels read ``pages`` themselves), then
``append`` the ids. What is reused was computed by the same step on the same tokens, so a hit is what computing gives.
Not thread-safe: one thread owns a pool.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nautile.config import ModelConfig
from nautile.state.cache import PrefixCache
from nautile.state.pages import CSA_RING, Pages, PoolError, PoolFull, PoolOptions, Sequence
from nautile.state.prefix import Node
from nautile.state.store import NodeStore, StoreUnavailable, layout
from nautile.state.view import BatchView

__all__ = ["Guard", "Part", "PoolCorrupted", "PoolStats", "StatePool"]


class PoolCorrupted(RuntimeError):  # noqa: N818  # says what has happened
    """``check`` found the pool's books wrong: a bug. The text lists what does not add up."""


@dataclass(frozen=True)
class PoolStats:
    """What is so now, and counters since the start; a copy."""

    free_blocks: int
    evictable_blocks: int
    free_slots: int
    sequences: int
    parked: int
    nodes: dict[str, int]  # by tier
    bytes_by_kind: dict[str, int]  # allocated on the device
    bytes_by_tier: dict[str, int]  # device: tail snapshots
    lookup_tokens: int
    hit_tokens: int
    snapshots: int
    missed_snapshots: int
    dropped_snapshots: int
    demotions: int
    promotions: int
    forgotten: int
    set_aside: int
    disk_writable: bool


@dataclass(frozen=True)
class Guard:
    """Ring rows that a few tokens are about to overwrite, so that they can be taken back. See ``StatePool.guard``."""

    start: int
    rows: dict[str, Tensor]  # by tensor: [layers, tokens, w]


@dataclass(frozen=True)
class Part:
    """Saved state up to ``length`` tokens, from where the part before it ends (a multiple of the block). See ``load``."""

    length: int
    history: Tensor  # [blocks, block_bytes] uint8
    tail: Tensor | None  # as of ``length``


_RINGS = ("window", "csa_kv", "csa_gate", "index_kv", "index_gate", "hca_kv", "hca_gate")


class StatePool:
    """State of many sequences in memory that is allocated once."""

    def __init__(
        self,
        config: ModelConfig,
        options: PoolOptions | None = None,
        device: str | torch.device = "cpu",
        fingerprint: str = "",
        report: Callable[[str], None] | None = None,
    ) -> None:
        """``fingerprint`` names the model in files (see ``nautile.state.fingerprint``; needed with a disk tier). ``report`` is
        told, once each, what went wrong on the disk; without it that is a warning. ``computed_by``, set by the owner of a
        runner, names its arithmetic in files: two runners differ in the last bits."""
        self.config, self.options = config, options or PoolOptions()
        self.pages, self.fingerprint, self.computed_by = Pages(config, self.options, device), fingerprint, ""
        self.cache = PrefixCache(self.pages, report or _warn)
        self._live: dict[Sequence, Node | None] = {}  # the node that each continues from
        if self.options.disk is not None:
            self.open_disk(self.options.disk)

    def open_disk(self, directory: Path) -> None:
        """Begin the disk tier. Files of other models, layouts or arithmetic (``computed_by``) are left alone, so that a hit is
        what this pool's runner would compute, to the last bit."""
        if not self.fingerprint:
            raise PoolError("a disk tier needs the model's fingerprint: files of another model must not be used")
        try:
            self.cache.open_store(NodeStore(directory, layout(self.pages, self.fingerprint, self.computed_by)))
        except StoreUnavailable as error:
            self.cache.report(f"{error.strerror}; the prefix cache goes on without its disk tier")

    # Life of a sequence -------------------------------------------------------------------------------------------

    def open(self, ids: Many[int], partition: str = "") -> Sequence:
        """A new sequence that begins with the longest known prefix of ``ids``, shorter than all of them.

        ``length`` = ``cached`` tokens are there; the caller computes the rest. Raises PoolFull, PoolError for no ids.
        """
        if not len(ids):
            raise PoolError("a sequence is opened with the tokens it will take in: at least one")
        sequence = Sequence(partition, slot=self.pages.allocate_slot())
        self._live[sequence] = None
        try:
            self._start_at(sequence, ids, len(ids) - 1)
        except PoolFull:
            self.release(sequence, keep=False)
            raise
        sequence.cached = sequence.length
        self.cache.counters.lookups += 1
        self.cache.counters.lookup_tokens += len(ids)
        self.cache.counters.hit_tokens += sequence.cached
        return sequence

    def ensure(self, sequence: Sequence, new_tokens: int) -> None:
        """Make room for ``new_tokens`` more, and make sure that nobody else reads the block they begin in.

        Raises PoolFull when the blocks are not there; nothing has changed then.
        """
        self._check_live(sequence, needs_slot=False)
        size = self.options.block_tokens
        wanted = max(0, -(-(sequence.length + new_tokens) // size) - len(sequence.blocks))
        partial = sequence.length // size
        copies = new_tokens > 0 and sequence.length % size > 0 and self.pages.references[sequence.blocks[partial]] > 1
        self._need(wanted + copies)
        taken = self.pages.allocate(wanted + copies)
        if copies:
            block = taken.pop()
            self.pages.copy_block(sequence.blocks[partial], block)
            self.pages.drop([sequence.blocks[partial]])
            sequence.blocks[partial] = block
        sequence.blocks += taken

    def batch(self, sequences: Many[Sequence]) -> BatchView:
        """A state for ``model(ids, state=view)``: its rows are read from and written to the pages. Does not ``append``."""
        for sequence in sequences:
            self._check_live(sequence)
        return BatchView(self.pages, sequences)

    def append(self, sequence: Sequence, ids: Many[int], seconds: float | None = None) -> None:
        """The state of these tokens has been written: count them, and take a snapshot where one is due.

        ``seconds``: what computing them took (this sequence's share of the step), for what eviction keeps.
        """
        self._check_live(sequence)
        before, after = sequence.length, sequence.length + len(ids)
        if after > len(sequence.blocks) * self.options.block_tokens:
            raise PoolError(f"{after} tokens in {len(sequence.blocks)} blocks: call ensure before the step")
        sequence.ids.extend(ids)
        if seconds is not None:
            self.cache.costs.record(before, len(ids), seconds)
        k = self.options.snapshot_every
        due = after % k == 0 and after > before
        self.cache.counters.missed_snapshots += after // k - before // k - due
        if due and self.options.prefix_cache:
            assert sequence.slot is not None
            self._continue_from(sequence, self._publish(sequence, self.pages.read_tail(sequence.slot, after)))

    def release(self, sequence: Sequence, keep: bool = True) -> None:
        """End a sequence. ``keep``: what it computed stays for prompts that begin like it, while there is room."""
        self._check_live(sequence, needs_slot=False)
        if keep and self.options.prefix_cache and sequence.length % self.options.snapshot_every:
            self.cache.prune(self._publish(sequence, self.read_tail(sequence)))
        self._continue_from(sequence, None)
        del self._live[sequence]
        self.pages.drop(sequence.blocks)
        if sequence.slot is not None:
            self.pages.drop_slot(sequence.slot)
        sequence.blocks, sequence.slot, sequence.parked, sequence.open = [], None, None, False

    def fork(self, sequence: Sequence) -> Sequence:
        """An independent sequence with the same state; blocks are shared until one of the two writes. Raises PoolFull."""
        self._check_live(sequence, needs_slot=False)
        slot = None if sequence.slot is None else self.pages.allocate_slot()
        covering = sequence.blocks[: -(-sequence.length // self.options.block_tokens)]
        other = Sequence(sequence.partition, list(sequence.ids), covering, slot, sequence.length, sequence.parked)
        self.pages.share(covering)
        if slot is not None and sequence.slot is not None:
            self.pages.copy_slot(sequence.slot, slot)
        self._live[other] = None
        self._continue_from(other, self._live[sequence])
        return other

    def rewind(self, sequence: Sequence, length: int) -> int:
        """Go back to the last snapshot at or before ``length`` tokens; gives where that is (``sequence.length``).

        The caller computes the tokens from there to ``length`` again: fewer than k while the snapshots fit their budget.
        Raises PoolError for a length the sequence has not reached, PoolFull when the snapshot cannot be brought back.
        """
        self._check_live(sequence)
        if not 0 <= length <= sequence.length:
            raise PoolError(f"cannot rewind a sequence of {sequence.length} tokens to {length}")
        if length < sequence.length:
            self._start_at(sequence, sequence.ids, length)
            sequence.cached = min(sequence.cached, sequence.length)
        return sequence.length

    def park(self, sequence: Sequence) -> None:
        """Take a sequence out of its slot; its blocks stay. It computes nothing until ``unpark``."""
        self._check_live(sequence)
        assert sequence.slot is not None
        sequence.parked = self.pages.read_tail(sequence.slot, sequence.length)
        self.pages.drop_slot(sequence.slot)
        sequence.slot = None

    def unpark(self, sequence: Sequence) -> None:
        """Give a parked sequence a slot again. Raises PoolFull."""
        self._check_live(sequence, needs_slot=False)
        if sequence.parked is None:
            raise PoolError("this sequence is not parked")
        sequence.slot = self.pages.allocate_slot()
        self.pages.write_tail(sequence.slot, sequence.length, sequence.parked)
        sequence.parked = None

    # Bytes in and out ---------------------------------------------------------------------------------------------

    def read_history(self, sequence: Sequence, start: int, stop: int) -> Tensor:
        """The bytes of the blocks of tokens start (a multiple of the block) .. stop - 1: [blocks, block_bytes] uint8."""
        size = self.options.block_tokens
        return self.pages.read_blocks(sequence.blocks[start // size : -(-stop // size)])

    def read_tail(self, sequence: Sequence) -> Tensor:
        """The bytes of a sequence's tail, parked or not."""
        self._check_live(sequence, needs_slot=False)
        if sequence.parked is not None:
            return sequence.parked
        assert sequence.slot is not None
        return self.pages.read_tail(sequence.slot, sequence.length)

    def snapshot(self, sequence: Sequence, length: int) -> Tensor | None:
        """The tail that was taken when the sequence had ``length`` tokens, if it is still somewhere."""
        node = self._live[sequence]
        while node is not None and node.length > length:
            node = node.parent
        return self.cache.tail(node) if node is not None and node.length == length else None

    def load(self, ids: Many[int], parts: Many[Part], partition: str = "") -> Sequence:
        """A new sequence with saved state: that of the last part with a tail. Snapshots on the way become cached prefixes.

        Raises PoolFull, and PoolError when the bytes are not of this layout.
        """
        last = max((index for index, part in enumerate(parts) if part.tail is not None), default=-1)
        sequence = Sequence(partition, slot=self.pages.allocate_slot())
        self._live[sequence] = None
        try:
            for part in parts[: last + 1]:
                self._load_part(sequence, ids, part)
        except (PoolFull, PoolError):
            self.release(sequence, keep=False)
            raise
        sequence.cached = sequence.length
        return sequence

    def _load_part(self, sequence: Sequence, ids: Many[int], part: Part) -> None:
        size, start = self.options.block_tokens, sequence.length
        count = -(-part.length // size) - len(sequence.blocks)
        if start % size or part.history.shape != (count, self.pages.block_bytes):
            raise PoolError(f"history of {tuple(part.history.shape)} bytes does not continue {start} tokens to {part.length}")
        self._need(count)
        blocks = self.pages.allocate(count)
        sequence.blocks += blocks
        self.pages.write_blocks(blocks, part.history)
        sequence.ids.extend(ids[start : part.length])
        if part.tail is None:
            return
        assert sequence.slot is not None
        self.pages.write_tail(sequence.slot, part.length, part.tail)
        if part.length % self.options.snapshot_every == 0 and self.options.prefix_cache:
            self._continue_from(sequence, self._publish(sequence, part.tail))

    # Tokens that may be taken back --------------------------------------------------------------------------------

    def guard(self, sequence: Sequence, tokens: int) -> Guard:
        """Keep what the next ``tokens`` (at most 8) overwrite, before a step some of whose tokens may be rejected."""
        self._check_live(sequence)
        if not 0 < tokens <= min(CSA_RING, self.config.sliding_window):
            raise PoolError(f"a guard covers 1 to {min(CSA_RING, self.config.sliding_window)} tokens, got {tokens}")
        rows = {}
        for name in _RINGS:
            ring = getattr(self.pages, name)[sequence.slot]
            rows[name] = ring[:, self._places(ring, sequence.length, tokens)].clone()
        return Guard(sequence.length, rows)

    def rollback(self, sequence: Sequence, guard: Guard, accepted: int) -> None:
        """Undo the tokens of the guarded step after the first ``accepted``; ``append`` exactly those afterwards."""
        self._check_live(sequence)
        if guard.start != sequence.length:
            raise PoolError("a guard belongs to the step right after it")
        for name, old in guard.rows.items():
            ring = getattr(self.pages, name)[sequence.slot]
            rejected = old.shape[1] - accepted
            if rejected > 0:
                ring[:, self._places(ring, guard.start + accepted, rejected)] = old[:, accepted:]

    def _places(self, ring: Tensor, start: int, tokens: int) -> Tensor:
        return torch.arange(start, start + tokens, device=ring.device) % ring.shape[1]

    # Arithmetic ---------------------------------------------------------------------------------------------------

    def blocks_needed(self, tokens: int, sequence: Sequence | None = None) -> int:
        """Blocks that a new sequence of ``tokens`` tokens takes at most, or ``sequence`` for ``tokens`` more."""
        size = self.options.block_tokens
        if sequence is None:
            return -(-tokens // size) + 1  # its first block may be a copy of a shared one
        partial = sequence.length // size
        shared = sequence.length % size > 0 and self.pages.references[sequence.blocks[partial]] > 1
        return max(0, -(-(sequence.length + tokens) // size) - len(sequence.blocks)) + (shared and tokens > 0)

    @property
    def free_blocks(self) -> int:
        """Blocks that hold nothing."""
        return len(self.pages.free_blocks)

    @property
    def evictable_blocks(self) -> int:
        """Blocks that hold cached prefixes only; ``ensure`` takes them when it must."""
        return self.pages.evictable

    @property
    def available_blocks(self) -> int:
        """What ``ensure`` can give out now."""
        return self.free_blocks + self.evictable_blocks

    @property
    def free_slots(self) -> int:
        """Sequences that can be opened, forked or unparked now."""
        return len(self.pages.free_slots)

    def stats(self) -> PoolStats:
        """Gauges and counters."""
        counters, store = self.cache.counters, self.cache.store
        places = [node.place for node in self.cache.tree.nodes()]
        return PoolStats(
            free_blocks=self.free_blocks,
            evictable_blocks=self.evictable_blocks,
            free_slots=self.free_slots,
            sequences=len(self._live),
            parked=sum(sequence.parked is not None for sequence in self._live),
            nodes={place: places.count(place) for place in ("device", "host", "disk")},
            bytes_by_kind=self.pages.bytes_by_kind,
            bytes_by_tier={str(place): size for place, size in self.cache.bytes.items()},
            lookup_tokens=counters.lookup_tokens,
            hit_tokens=counters.hit_tokens,
            snapshots=counters.snapshots,
            missed_snapshots=counters.missed_snapshots,
            dropped_snapshots=counters.dropped_tails,
            demotions=counters.demotions,
            promotions=counters.promotions,
            forgotten=counters.forgotten,
            set_aside=store.aside if store is not None else 0,
            disk_writable=store is not None and store.writable,
        )

    def clear_cache(self) -> None:
        """Forget every cached prefix (files stay)."""
        self.cache.forget_all()

    def close(self) -> None:
        """Write what a restart can use to the disk tier, if there is one, and forget the rest. Live sequences end."""
        for sequence in list(self._live):
            self.release(sequence)
        self.cache.flush()
        self.cache.forget_all()

    def check(self) -> None:
        """Recount everything. Raises PoolCorrupted with a list of what does not add up."""
        found = [*self._sequence_problems(), *self._count_problems(), *self.cache.problems()]
        if found:
            raise PoolCorrupted("; ".join(found))

    # Parts --------------------------------------------------------------------------------------------------------

    def _start_at(self, sequence: Sequence, ids: Many[int], most: int) -> None:
        """Replace the state of a sequence by the longest known prefix of ``ids`` of at most ``most`` tokens."""
        found = self.cache.find(sequence.partition, ids, most) if self.options.prefix_cache and most > 0 else None
        blocks: list[int] = []
        if found is not None:
            blocks = self.cache.blocks(found[0])
            self.pages.share(blocks)
        self.pages.drop(sequence.blocks)
        sequence.blocks = blocks
        sequence.ids = list(ids[: found[0].length]) if found is not None else []
        if found is not None and sequence.slot is not None:
            self.pages.write_tail(sequence.slot, found[0].length, found[1])
        self._continue_from(sequence, found[0] if found is not None else None)

    def _publish(self, sequence: Sequence, tail: Tensor) -> Node:
        return self.cache.publish(sequence, self._live[sequence], tail)

    def _continue_from(self, sequence: Sequence, node: Node | None) -> None:
        """Remember the step that a sequence hangs on; ends have no children, so theirs is the step above."""
        if node is not None and node.length % self.options.snapshot_every:
            node = node.parent
        old = self._live[sequence]
        if node is not None:
            node.users += 1
        self._live[sequence] = node
        if old is not None:
            old.users -= 1
            self.cache.prune(old)

    def _need(self, blocks: int) -> None:
        if blocks > self.free_blocks and (blocks > self.available_blocks or not self.cache.make_room(blocks)):
            raise PoolFull(
                f"{blocks} blocks wanted, {self.available_blocks} of {self.options.blocks} are free or can be: "
                "release or park sequences, or make the pool larger"
            )

    def _check_live(self, sequence: Sequence, needs_slot: bool = True) -> None:
        if sequence not in self._live:
            raise PoolError("this sequence has been released, or belongs to another pool")
        if needs_slot and sequence.slot is None:
            raise PoolError("this sequence is parked: unpark it first")

    def _sequence_problems(self) -> list[str]:
        found, slots = [], []
        for sequence, node in self._live.items():
            if len(sequence.blocks) * self.options.block_tokens < sequence.length:
                found.append(f"{sequence.length} tokens in {len(sequence.blocks)} blocks")
            if (sequence.slot is None) == (sequence.parked is None):
                found.append(
                    f"a sequence has slot {sequence.slot} and {'a' if sequence.parked is not None else 'no'} parked tail"
                )
            if sequence.slot is not None:
                slots.append(sequence.slot)
            if node is not None and node.attached and tuple(sequence.ids[: node.length][-len(node.ids) :]) != node.ids:
                found.append(f"a sequence hangs on a node of other tokens at {node.length}")
        if sorted(slots + self.pages.free_slots) != list(range(self.options.slots)):
            found.append(f"slots {sorted(slots)} are used and {sorted(self.pages.free_slots)} free")
        return found

    def _count_problems(self) -> list[str]:
        counted = [0] * self.options.blocks
        owners = [sequence.blocks for sequence in self._live] + [node.blocks for node in self.cache.tree.nodes()]
        for blocks in owners:
            for block in blocks:
                counted[block] += 1
        found = []
        if counted != self.pages.references:
            wrong = [block for block, count in enumerate(counted) if count != self.pages.references[block]]
            found.append(f"reference counts of blocks {wrong[:8]} are wrong")
        held = [0] * self.options.blocks
        for node in self.cache.tree.nodes():
            for block in node.blocks:
                held[block] += 1
        evictable = sum(0 < count == mine for count, mine in zip(counted, held, strict=True))
        if (held, evictable) != (self.pages.cached, self.pages.evictable):
            found.append(f"{evictable} blocks are evictable, the counter says {self.pages.evictable}")
        if sorted(self.pages.free_blocks) != [block for block, count in enumerate(counted) if not count]:
            found.append("the list of free blocks is wrong")
        users = [node for node in self._live.values() if node is not None]
        nodes = list(self.cache.tree.nodes())
        if any(node.users != users.count(node) for node in nodes):
            found.append("a node's number of users is wrong")
        return found


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)
