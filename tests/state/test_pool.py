"""The pool against a model: a dictionary of token lists, recomputed from scratch. Whatever is done to a sequence, what it
computes next is what the network computes for its tokens alone, and the books add up after every step."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from nautile.state import PoolError, PoolFull, PoolOptions, Sequence, StatePool
from nautile.state.costs import RecomputeCost
from state.pools import LONGEST, check_index_keys, close, feed, logits_of, model, new_pool, poison, row

K = 128
TINY_NODE = 60_000  # bytes: about what one node of the test network takes

POOLS = {
    "roomy": {"blocks": 48},
    "few blocks": {"blocks": 14},
    "few snapshots": {"blocks": 48, "snapshot_bytes": 3 * TINY_NODE},
    "no snapshots": {"blocks": 24, "snapshot_bytes": 0},
    "host": {"blocks": 14, "host_bytes": 6 * TINY_NODE},
    "disk": {"blocks": 14, "snapshot_bytes": 3 * TINY_NODE, "disk": True},
    "all tiers, all small": {
        "blocks": 14, "snapshot_bytes": 4 * TINY_NODE, "host_bytes": 3 * TINY_NODE, "disk": True, "disk_bytes": 8 * TINY_NODE,
    },
}  # fmt: skip


class Machine(RuleBasedStateMachine):
    """``self.ids`` is the model: the tokens of each live sequence."""

    sequences = Bundle("sequences")

    @initialize(kind=st.sampled_from(sorted(POOLS)), k=st.sampled_from([128, 256]))
    def start(self, kind: str, k: int) -> None:
        settings = dict(POOLS[kind])
        self.directory = Path(tempfile.mkdtemp())
        if settings.pop("disk", False):
            settings["disk"] = self.directory
        self.reports: list[str] = []
        options = PoolOptions(slots=4, block_tokens=128, snapshot_every=k, **settings)
        self.pool = StatePool(model().config, options, fingerprint="tiny", report=self.reports.append)
        self.ids: dict[Sequence, tuple[int, ...]] = {}
        self.k, self.lossless = k, kind == "roomy"

    def take(self, sequence: Sequence, new: tuple[int, ...]) -> None:
        """Feed tokens as far as there is room; the logits of each are those of a pass from scratch."""
        new = new[: LONGEST - sequence.length]
        if not new:
            return
        before = sequence.length
        try:
            ours = feed(self.pool, sequence, new)
        except PoolFull:
            done = sequence.length - before
            self.ids[sequence] = (*self.ids[sequence][:before], *new[:done])
            return
        self.ids[sequence] = (*self.ids[sequence][:before], *new)
        close(ours, logits_of(self.ids[sequence])[before:])

    @rule(target=sequences, seed=st.integers(0, 2), length=st.integers(1, 520), partition=st.sampled_from(["", "", "b"]))
    def open(self, seed: int, length: int, partition: str):
        try:
            sequence = self.pool.open(row(seed)[:length], partition)
        except PoolFull:
            return multiple()
        assert sequence.cached == sequence.length < length and tuple(sequence.ids) == row(seed)[: sequence.length]
        self.ids[sequence] = row(seed)[: sequence.length]
        self.take(sequence, row(seed)[sequence.length : length])
        return sequence

    @rule(sequence=sequences, seed=st.integers(0, 2), count=st.integers(1, 140))
    def extend(self, sequence: Sequence, seed: int, count: int) -> None:
        if sequence.open and sequence.slot is not None:
            self.take(sequence, row(seed)[-count:])

    @rule(data=st.data())
    def everybody_goes_on(self, data: st.DataObject) -> None:
        """Each in its own way, so that a row that two of them share by mistake is wrong for one."""
        for sequence in self.ids:
            if sequence.slot is not None:
                start, count = data.draw(st.integers(0, 600)), data.draw(st.integers(1, 9))
                self.take(sequence, row(1)[start : start + count])

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence: Sequence):
        if not sequence.open:
            return multiple()
        try:
            other = self.pool.fork(sequence)
        except PoolFull:
            return multiple()
        self.ids[other] = self.ids[sequence]
        return other

    @rule(sequence=sequences, part=st.floats(0, 1))
    def rewind(self, sequence: Sequence, part: float) -> None:
        if not sequence.open or sequence.slot is None:
            return
        wanted, before = int(part * sequence.length), tuple(sequence.ids)
        try:
            reached = self.pool.rewind(sequence, wanted)
        except PoolFull:
            assert tuple(sequence.ids) == before
            return
        assert reached == sequence.length <= wanted and tuple(sequence.ids) == before[:reached]
        assert wanted - reached < self.k or not self.lossless
        self.ids[sequence] = before[:reached]
        self.take(sequence, before[reached:wanted])

    @rule(sequence=sequences)
    def park_or_unpark(self, sequence: Sequence) -> None:
        if not sequence.open:
            return
        if sequence.slot is not None:
            self.pool.park(sequence)
        elif self.pool.free_slots:
            self.pool.unpark(sequence)

    @rule(sequence=consumes(sequences), keep=st.sampled_from([True, True, False]))
    def release(self, sequence: Sequence, keep: bool) -> None:
        if sequence.open:
            self.pool.release(sequence, keep=keep)
            del self.ids[sequence]

    @rule()
    def demand_every_block(self) -> None:
        """Everything that is said to be evictable can be evicted."""
        available = self.pool.available_blocks
        assert self.pool.cache.make_room(available) and self.pool.free_blocks == available

    @rule()
    def restart(self) -> None:
        """Only what is on the disk is left."""
        if self.pool.options.disk is not None and not self.ids:
            self.pool.close()
            assert self.pool.free_blocks == self.pool.options.blocks
            self.pool = StatePool(self.pool.config, self.pool.options, fingerprint="tiny", report=self.reports.append)

    @invariant()
    def the_books_add_up(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check()
            poison(self.pool)
            assert not self.reports
            for sequence, ids in self.ids.items():
                assert tuple(sequence.ids) == ids
            if self.pool.options.disk is not None:
                files = sum(path.stat().st_size for path in self.directory.iterdir())
                assert files == self.pool.cache.bytes["disk"] <= self.pool.options.disk_bytes

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for sequence in list(self.ids):
                if sequence.slot is None and self.pool.free_slots:
                    self.pool.unpark(sequence)
                if sequence.slot is not None:
                    self.take(sequence, row(2)[:3])  # every sequence still computes what it should
                    check_index_keys(self.pool, sequence)
                self.pool.release(sequence)
                self.pool.check()
            self.pool.clear_cache()
            assert self.pool.free_blocks == self.pool.options.blocks and self.pool.free_slots == 4
            shutil.rmtree(self.directory)


TestPool = Machine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


# by hand ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 4, 5, 127, 128, 129, 131, 255, 256, 257, 300])
def test_a_released_sequence_is_found_again_whole(length: int) -> None:
    pool = new_pool()
    first = pool.open(row(0))
    feed(pool, first, row(0)[:length])
    pool.release(first)
    poison(pool)
    again = pool.open(row(0))
    assert again.cached == length
    close(feed(pool, again, row(0)[length : length + 40]), logits_of(row(0))[length : length + 40])
    exact = pool.open(row(0)[:length])  # one token must remain to be computed
    assert exact.cached == (length - 1) // 128 * 128
    pool.check()


def test_a_hit_is_bit_for_bit_what_was_computed() -> None:
    """Device, host, disk, parked and forked: the next step gets the same bytes, so it gives the same bits."""
    with tempfile.TemporaryDirectory() as directory:
        expected = None
        for where in ("live", "device", "host", "disk", "restart"):
            options = {"host_bytes": 1 << 30} if where == "host" else {}
            options |= {"disk": Path(directory) / where} if where in ("disk", "restart") else {}
            pool = new_pool(**options)
            sequence = pool.open(row(0))
            feed(pool, sequence, row(0)[:300])
            if where != "live":
                pool.release(sequence)
                if where in ("host", "disk"):
                    assert pool.cache.make_room(24) and pool.stats().nodes[where] == 3
                if where == "restart":
                    pool.close()
                    pool = new_pool(**options)
                sequence = pool.open(row(0))
                assert sequence.cached == 300
            pool.park(sequence)
            pool.unpark(sequence)
            fork = pool.fork(sequence)
            step = row(1)[:20]
            ours = [feed(pool, one, step) for one in (fork, sequence)]
            expected = ours[0] if expected is None else expected
            assert all(torch.equal(one, expected) for one in ours), where
            pool.check()


def test_a_prompt_that_parts_late_from_a_known_one_computes_less_than_k_more() -> None:
    pool = new_pool()
    sequence = pool.open(row(0))
    feed(pool, sequence, row(0)[:400])
    pool.release(sequence)
    for same in (128, 129, 255, 256, 383, 399):
        ids = (*row(0)[:same], (row(0)[same] + 1) % 90, *row(1)[:20])
        parted = pool.open(ids)
        assert parted.cached == same // 128 * 128
        close(feed(pool, parted, ids[parted.cached :]), logits_of(ids)[parted.cached :])
        pool.release(parted, keep=False)


@pytest.mark.parametrize("length", [1, 126, 130, 250])
def test_forks_write_into_blocks_of_their_own(length: int) -> None:
    pool = new_pool()
    one = pool.open(row(0))
    feed(pool, one, row(0)[:length])
    ways = {one: row(0)[:length]}
    for _ in range(2):
        ways[pool.fork(one)] = row(0)[:length]
    for turn in range(3):
        for index, sequence in enumerate(ways):
            new = row(index)[300 + 5 * turn : 309 + 6 * turn]
            ways[sequence] += new
            close(feed(pool, sequence, new), logits_of(ways[sequence])[-len(new) :])
        pool.check()


@pytest.mark.parametrize("length", [1, 9, 77, 127, 300])
def test_a_parked_sequence_takes_everything_along(length: int) -> None:
    pool = new_pool()
    sequence = pool.open(row(0))
    feed(pool, sequence, row(0)[:length])
    pool.park(sequence)
    poison(pool)
    pool.unpark(sequence)
    close(feed(pool, sequence, row(0)[length : length + 200]), logits_of(row(0))[length : length + 200])


def test_partitions_share_nothing() -> None:
    pool = new_pool()
    first = pool.open(row(0), "one")
    feed(pool, first, row(0)[:300])
    pool.release(first)
    assert pool.open(row(0), "other").cached == 0
    assert pool.open(row(0), "one").cached == 300


def test_two_sequences_with_equal_prefixes_end_up_on_the_same_blocks() -> None:
    pool = new_pool()
    one, other = pool.open(row(0)), pool.open(row(0))
    feed(pool, one, row(0)[:256])
    feed(pool, other, row(0)[:256])
    assert one.blocks == other.blocks and pool.free_blocks == 22
    pool.check()


def test_ten_turns_compute_only_what_is_new() -> None:
    """A growing conversation: after the first turn less than one block is computed again, here nothing at all."""
    pool = new_pool(blocks=48)
    length = 200
    for turn in range(8):
        sequence = pool.open(row(0)[: length + 50])
        assert sequence.cached == (0 if not turn else length)
        feed(pool, sequence, row(0)[sequence.cached : length + 50])
        length += 50
        pool.release(sequence)
    pool.check()


def test_rejected_tokens_leave_no_trace() -> None:
    """The network writes up to 8 tokens, some are taken back: the next step is that of a sequence that never saw them."""
    for accepted in (0, 1, 7):
        for length in (1, 125, 250):
            pool = new_pool(prefix_cache=False)
            one, other = pool.open(row(0)), pool.open(row(0))
            feed(pool, one, row(0)[:length])
            feed(pool, other, row(0)[:length])
            guard = pool.guard(one, 8)
            pool.ensure(one, 8)
            drafts = (*row(0)[length : length + accepted], *row(1)[: 8 - accepted])
            with torch.no_grad():
                model()(torch.tensor([drafts]), state=pool.batch([one]), logits="none")
            pool.rollback(one, guard, accepted)
            pool.append(one, drafts[:accepted])
            feed(pool, other, row(0)[length : length + accepted])
            step = row(2)[:140]
            close(feed(pool, one, step), feed(pool, other, step))


def test_a_step_across_a_boundary_is_counted() -> None:
    pool = new_pool()
    sequence = pool.open(row(0))
    pool.ensure(sequence, 300)
    with torch.no_grad():
        model()(torch.tensor([row(0)[:300]]), state=pool.batch([sequence]), logits="none")
    pool.append(sequence, row(0)[:300])
    assert pool.stats().missed_snapshots == 2
    pool.check()
    pool.release(sequence)
    assert pool.open(row(0)).cached == 300


def take_in(pool: StatePool, ids: tuple[int, ...], seconds: float | None = None) -> None:
    """Book tokens without computing them, and release."""
    sequence = pool.open(ids)
    while sequence.length < len(ids):
        step = ids[sequence.length :][: 128 - sequence.length % 128]
        pool.ensure(sequence, len(step))
        pool.append(sequence, step, seconds)
    pool.release(sequence)


@pytest.mark.parametrize(("early", "late", "kept"), [(0.1, 10.0, "late"), (10.0, 0.1, "early")])
def test_eviction_keeps_what_takes_long_to_compute(early: float, late: float, kept: str) -> None:
    """Same size, same use: the measured seconds per token at its position decide which of two leaves goes."""
    pool = new_pool(blocks=24)
    short, long = row(0)[:128], (*row(1), *row(2))[:1280]
    take_in(pool, short)
    take_in(pool, long)
    pool.cache.costs.record(0, 128, early)
    pool.cache.costs.record(1152, 128, late)
    assert pool.cache.make_room(pool.free_blocks + 1)
    cached = {"early": pool.open((*short, 1)).cached == 128, "late": pool.open((*long, 1)).cached == 1280}
    assert cached == {"early": kept == "early", "late": kept == "late"}


def test_eviction_keeps_what_is_used_and_forgets_what_was() -> None:
    pool = new_pool(blocks=6)
    for seed in (0, 1, 2):
        take_in(pool, row(seed)[:128])
    for _ in range(3):
        for seed in (0, 2):
            pool.release(pool.open(row(seed)), keep=False)
    pool.cache.make_room(4)
    assert [pool.open(row(seed)).cached for seed in (0, 1, 2)] == [128, 0, 128]
    pool = new_pool(blocks=6)
    take_in(pool, row(0)[:128])
    for _ in range(5):
        pool.release(pool.open(row(0)), keep=False)
    for seed in range(1, 40):  # its use was long ago: others come and go, and in the end it goes too
        take_in(pool, (seed, *row(1)[: 128 * 3 - 1]))
    assert pool.open(row(0)).cached == 0


def test_measured_costs_follow_the_machine() -> None:
    costs = RecomputeCost()
    before = costs.per_token(5)
    assert before > 0
    costs.record(0, 100, 1.0)
    assert costs.per_token(0) == costs.per_token(900_000) == pytest.approx(0.01)
    costs.record(100_000, 100, 5.0)
    assert costs.per_token(99_000) == pytest.approx(0.05) and costs.per_token(3) == pytest.approx(0.01)
    for _ in range(100):
        costs.record(0, 100, 3.0)
    assert costs.per_token(0) == pytest.approx(0.03, rel=0.01)
    costs.record(0, 0, 3.0)
    costs.record(0, 3, 0.0)  # nothing was measured
    assert costs.per_token(0) == pytest.approx(0.03, rel=0.01)


def test_a_pool_that_is_full_says_so_and_loses_nothing() -> None:
    pool = new_pool(blocks=4, slots=2)
    one, other = pool.open(row(0)), pool.open(row(1))
    feed(pool, one, row(0)[:256])
    feed(pool, other, row(1)[:200])
    with pytest.raises(PoolFull, match="slots"):
        pool.open(row(2))
    with pytest.raises(PoolFull, match="slots"):
        pool.fork(one)
    with pytest.raises(PoolFull, match="release or park"):
        pool.ensure(one, 1)
    close(feed(pool, other, row(1)[200:256]), logits_of(row(1))[200:256])
    pool.release(one)
    pool.ensure(other, 1)  # the released one's blocks are evictable
    pool.check()


def test_calls_that_make_no_sense() -> None:
    pool = new_pool()
    sequence = pool.open(row(0))
    with pytest.raises(PoolError, match="at least one"):
        pool.open([])
    with pytest.raises(PoolError, match="cannot rewind"):
        pool.rewind(sequence, 1)
    pool.park(sequence)
    for call in (lambda: pool.append(sequence, [1]), lambda: pool.batch([sequence]), lambda: pool.park(sequence)):
        with pytest.raises(PoolError, match="unpark"):
            call()
    pool.unpark(sequence)
    with pytest.raises(PoolError, match="not parked"):
        pool.unpark(sequence)
    pool.release(sequence)
    with pytest.raises(PoolError, match="released"):
        pool.release(sequence)
    for bad in ({"blocks": 0}, {"block_tokens": 100}, {"snapshot_every": 192}, {"rows": "int8"}, {"host_bytes": -1}):
        with pytest.raises(PoolError):
            new_pool(**bad)
    with pytest.raises(PoolError, match="fingerprint"):
        StatePool(model().config, PoolOptions(disk=Path("nowhere")))
