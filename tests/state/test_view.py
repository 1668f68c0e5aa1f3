"""The network on pages computes what it computes on a dense state: any chunking, ragged batches, every row format."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nautile.state import PoolError, PoolFull
from oracles.random_models import tiny_network
from state.pools import LONGEST, close, feed, logits_of, model, new_pool, quantised, row

SIZES = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 60, 124, 127, 128, 129, 132]


@settings(max_examples=12)
@given(st.lists(st.sampled_from(SIZES), min_size=1, max_size=9))
@example([5, 7, 64, 100, 1, 1, 1, 121])
@example([128, 128, 1, 1])
@example([127, 2, 127, 1, 130])
def test_any_chunking_gives_the_same_logits(sizes: list[int]) -> None:
    pool = new_pool()
    sequence = pool.open(row(0))
    total = 0
    for wanted in sizes:
        size = min(wanted, LONGEST - total)
        if not size:
            break
        close(feed(pool, sequence, row(0)[total : total + size]), logits_of(row(0))[total : total + size])
        total += size
    assert sequence.length == total
    pool.check()


steps = st.lists(st.lists(st.integers(1, 70), min_size=3, max_size=3), min_size=1, max_size=4)


@settings(max_examples=10)
@given(steps)
@example([[1, 4, 127], [3, 1, 1], [1, 1, 1], [1, 1, 1]])
@example([[128, 2, 5], [1, 2, 130], [1, 1, 1]])
@example([[40, 40, 40], [33, 33, 33], [1, 1, 1], [60, 2, 1]])
@torch.no_grad()
def test_ragged_batches(chunks: list[list[int]]) -> None:
    pool = new_pool(prefix_cache=False)
    sequences = [pool.open(row(b)) for b in range(3)]
    pool.pages.csa.fill_(float("nan"))  # what nobody wrote must not be read
    pool.pages.hca.fill_(float("nan"))
    pool.pages.index.fill_(float("nan"))
    pool.pages.window.fill_(float("nan"))
    for ring in (pool.pages.csa_kv, pool.pages.csa_gate, pool.pages.hca_kv, pool.pages.hca_gate, pool.pages.index_gate):
        ring.fill_(float("nan"))
    for real in chunks:
        ids = torch.full((3, max(real)), 7)
        starts = [sequence.length for sequence in sequences]
        for b, count in enumerate(real):
            ids[b, :count] = torch.tensor(row(b)[starts[b] : starts[b] + count])
            pool.ensure(sequences[b], count)
        logits = model()(ids, state=pool.batch(sequences), lengths=torch.tensor(real))
        for b, count in enumerate(real):
            close(logits[b, :count], logits_of(row(b))[starts[b] : starts[b] + count])
            pool.append(sequences[b], row(b)[starts[b] : starts[b] + count])
    pool.check()


@pytest.mark.parametrize("schedule", [(0, 0), (4, 4), (128, 128), (0, 0, 4, 128, 4)], ids=str)
@torch.no_grad()
def test_every_kind_of_layer(schedule: tuple[int, ...]) -> None:
    net = tiny_network(schedule, seed=sum(schedule))
    pool = new_pool(net)
    sequence = pool.open(row(0))
    ours = torch.cat([feed(pool, sequence, row(0)[start : start + 67], net) for start in range(0, 268, 67)])
    close(ours, net(torch.tensor([row(0)[:268]]))[0], 2e-5)


@torch.no_grad()
def test_a_view_serves_several_passes() -> None:
    pool = new_pool()
    sequence = pool.open(row(0))
    pool.ensure(sequence, 40)
    view = pool.batch([sequence])
    first = model()(torch.tensor([row(0)[:30]]), state=view)[0]
    second = model()(torch.tensor([row(0)[30:40]]), state=view)[0]
    assert sequence.length == 0 and view.lengths.tolist() == [40]
    pool.append(sequence, row(0)[:40])
    close(torch.cat((first, second)), logits_of(row(0))[:40])


@torch.no_grad()
def test_packed_rows_lose_nothing_but_the_last_bits_of_rotated_dimensions() -> None:
    """One answer in any chunks, and that of the dense bfloat16 state up to the FP8 part, which is exact in both."""
    net, ids = quantised(), row(0)[:200]
    pool = new_pool(net, rows="packed")
    whole = feed(pool, pool.open(ids), ids, net)
    sequence = pool.open(row(1))
    pool.release(sequence, keep=False)
    sequence = pool.open((ids[0] + 1, *ids))  # no hit
    pieces = torch.cat([feed(pool, sequence, ids[start : start + 23], net) for start in range(0, 200, 23)])
    far = (whole - pieces).abs().amax(1)  # a last bit may flip, and an expert after it: rare
    assert far.median() <= 1e-5 and (far <= 1e-4).float().mean() >= 0.9
    dense = net(torch.tensor([ids]))[0]
    assert (dense - whole).abs().median() <= 0.05
    assert pool.pages.window.dtype == torch.uint8


def test_bfloat16_rows() -> None:
    pool = new_pool(rows="bfloat16")
    ours = feed(pool, pool.open(row(0)), row(0)[:300])
    assert (ours - logits_of(row(0))[:300]).abs().median() <= 0.05
    with torch.no_grad():
        dense = model()(torch.tensor([row(0)[:128]]), state=model().new_state(1, torch.bfloat16))[0]
    close(ours[:128], dense)


def test_room_is_made_before_a_step() -> None:
    pool = new_pool(blocks=2)
    sequence = pool.open(row(0))
    with pytest.raises(PoolError, match="ensure"), torch.no_grad():
        model()(torch.tensor([row(0)[:3]]), state=pool.batch([sequence]))
    with pytest.raises(PoolError, match="ensure"):
        pool.append(sequence, row(0)[:3])
    with pytest.raises(PoolFull, match="3 blocks wanted, 2"):
        pool.ensure(sequence, 257)
    assert sequence.blocks == [] and pool.free_blocks == 2
    with pytest.raises(PoolError, match="once"):
        pool.batch([sequence, sequence])
    with pytest.raises(PoolError, match="one or more"):
        pool.batch([])
