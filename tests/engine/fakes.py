"""A pool and a runner without a network, for tests of the engine in milliseconds.

The pool's memory holds token ids where the real one holds rows. The runner reads a sequence's tokens back from that memory, so
a block that is shared, copied or freed wrongly changes the logits; its "model" is a hash of the tokens read.
"""

from __future__ import annotations

import hashlib

import torch

from nautile.engine.plan import Plan
from nautile.engine.sampling import Chosen, choose
from nautile.state.pages import PoolFull, Sequence

VOCABULARY = 24
EOS = 0


class FakePool:
    """Blocks with reference counts, a cache of whole blocks by prefix and partition, slots: the contract of StatePool."""

    def __init__(self, blocks: int, slots: int, block_tokens: int = 4) -> None:
        self.block_tokens = block_tokens
        self.blocks, self.slots = blocks, slots
        self.memory = [[-1] * block_tokens for _ in range(blocks)]
        self.references = [0] * blocks
        self.used_slots: set[int] = set()
        self.cache: dict[tuple[str, tuple[int, ...]], int] = {}  # prefix of whole blocks -> its last block; oldest first
        self.live: list[Sequence] = []
        self.refusals = 0

    @property
    def free_slots(self) -> int:
        return self.slots - len(self.used_slots)

    @property
    def available_blocks(self) -> int:
        return sum(count == 0 for count in self.references) + len(self._evictable())

    def blocks_needed(self, tokens: int, sequence: Sequence | None = None) -> int:
        if sequence is None:
            return -(-tokens // self.block_tokens) + 1
        copy = sequence.length % self.block_tokens != 0 and self.references[sequence.blocks[-1]] > 1
        return max(0, -(-(sequence.length + tokens) // self.block_tokens) - len(sequence.blocks)) + copy

    def open(self, ids: list[int], partition: str = "") -> Sequence:
        assert ids
        sequence = Sequence(partition, slot=self._slot())
        while sequence.length + self.block_tokens < len(ids):
            key = (partition, tuple(ids[: sequence.length + self.block_tokens]))
            if key not in self.cache:
                break
            block = self.cache[key]
            self.references[block] += 1
            sequence.blocks.append(block)
            sequence.ids += ids[sequence.length : sequence.length + self.block_tokens]
        sequence.cached = sequence.length
        self.live.append(sequence)
        return sequence

    def ensure(self, sequence: Sequence, tokens: int) -> None:
        assert sequence.slot is not None
        copy = sequence.length % self.block_tokens != 0 and self.references[sequence.blocks[-1]] > 1
        missing = self.blocks_needed(tokens, sequence) - copy
        if missing + copy > self.available_blocks:
            self.refusals += 1
            raise PoolFull("full")
        if copy:
            old, new = sequence.blocks[-1], self._block()
            self.memory[new] = list(self.memory[old])
            self.references[old] -= 1
            sequence.blocks[-1] = new
        sequence.blocks += [self._block() for _ in range(missing)]

    def append(self, sequence: Sequence, ids: list[int], seconds: float | None = None) -> None:
        sequence.ids += ids
        for end in range(self.block_tokens, sequence.length + 1, self.block_tokens):
            key = (sequence.partition, tuple(sequence.ids[:end]))
            if key not in self.cache:
                self.cache[key] = block = sequence.blocks[end // self.block_tokens - 1]
                self.references[block] += 1

    def fork(self, sequence: Sequence) -> Sequence:
        other = Sequence(sequence.partition, list(sequence.ids), list(sequence.blocks), self._slot(), sequence.cached)
        for block in other.blocks:
            self.references[block] += 1
        self.live.append(other)
        return other

    def park(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.used_slots.remove(sequence.slot)
        sequence.slot = None

    def unpark(self, sequence: Sequence) -> None:
        assert sequence.slot is None
        sequence.slot = self._slot()

    def release(self, sequence: Sequence, keep: bool = True) -> None:
        self.live.remove(sequence)
        if sequence.slot is not None:
            self.used_slots.remove(sequence.slot)
        for block in sequence.blocks:
            self.references[block] -= 1

    def check(self) -> None:
        counts = [0] * self.blocks
        for sequence in self.live:
            for block in sequence.blocks:
                counts[block] += 1
        for block in self.cache.values():
            counts[block] += 1
        assert counts == self.references
        slots = [sequence.slot for sequence in self.live if sequence.slot is not None]
        assert len(set(slots)) == len(slots) and set(slots) == self.used_slots

    def _evictable(self) -> list[tuple[str, tuple[int, ...]]]:
        return [key for key, block in self.cache.items() if self.references[block] == 1]

    def _slot(self) -> int:
        if not self.free_slots:
            raise PoolFull("no slot")
        slot = next(slot for slot in range(self.slots) if slot not in self.used_slots)
        self.used_slots.add(slot)
        return slot

    def _block(self) -> int:
        if 0 not in self.references:
            partition, prefix = self._evictable()[0]
            for key in [k for k in self.cache if k[0] == partition and k[1][: len(prefix)] == prefix]:
                self.references[self.cache.pop(key)] -= 1
        block = self.references.index(0)
        self.references[block] = 1
        return block


class HashRunner:
    """Logits that are a hash of every token of the sequence. Drafts are right about half of the time."""

    def __init__(self, pool: FakePool, eos_share: float = 0.03) -> None:
        self.pool, self.eos_share = pool, eos_share
        self.plans: list[Plan] = []

    def step(self, plan: Plan) -> torch.Tensor:
        self.plans.append(plan)
        rows = []
        for piece in plan.pieces:
            sequence, size = piece.sequence, self.pool.block_tokens
            for offset, token in enumerate(piece.ids):
                position = sequence.length + offset
                block = sequence.blocks[position // size]
                assert self.pool.references[block] >= 1
                self.pool.memory[block][position % size] = token
            count = sequence.length + len(piece.ids)
            read = [self.pool.memory[sequence.blocks[p // size]][p % size] for p in range(count)]
            wanted = range(count - piece.rows + 1, count + 1)
            rows += [hash_logits(read[:end], self.eos_share) for end in wanted]
        return torch.stack(rows) if rows else torch.zeros(0, VOCABULARY)

    def draft(self, plan: Plan, following: list[tuple[int, ...]]) -> list[int]:
        guesses = []
        for piece, after in zip(plan.pieces, following, strict=True):
            ids = [*piece.sequence.ids, *piece.ids[: len(after)], *after[-1:]]
            right = int(hash_logits(ids, self.eos_share).argmax())
            guesses.append(right if len(ids) % 2 else (right + 1) % VOCABULARY)
        return guesses


def hash_logits(ids: list[int], eos_share: float) -> torch.Tensor:
    """[VOCABULARY] float32, a function of the ids alone."""
    digest = hashlib.blake2b(bytes(value + 1 for value in ids), digest_size=48).digest()
    logits = torch.tensor([int.from_bytes(digest[2 * i : 2 * i + 2], "little") / 16384 for i in range(VOCABULARY)])
    logits[EOS] = 5.0 if digest[0] / 256 < eos_share else -5.0
    return logits


def solo(prompt: tuple[int, ...], sampling, choice: int, eos_share: float) -> list[Chosen]:
    """What a request gives on its own, written down without any engine."""
    ids, found = list(prompt), list[Chosen]()
    while len(found) < sampling.max_tokens:
        row = hash_logits(ids, eos_share)
        output = ids[len(prompt) :]
        found.append(choose(row, sampling, len(ids), choice=choice, prompt=prompt, output=output))
        ids.append(found[-1].token)
        if ids[-1] == EOS and not sampling.ignore_eos:
            break
    return found
