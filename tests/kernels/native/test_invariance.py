"""One answer, bit for bit: however tokens are cut into chunks, whatever runs beside them, with any number of threads."""

from __future__ import annotations

import functools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nautile.engine.native import NativeRunner, pack
from nautile.engine.plan import Piece, Plan
from nautile.kernels.native import Kinds, NativeModel
from nautile.state.pages import Pages, PoolOptions, Sequence
from oracles.random_models import random_ids, tiny_network

LENGTH = 530
ROWS = {"float32": "float32", "bfloat16": "bfloat16"}


@functools.cache
def packed(dtype: str) -> NativeModel:
    return pack(tiny_network((0, 4, 128, 4), seed=7, index_topk=8, index_n_heads=3), dtype)


@functools.cache
def expected(dtype: str, seed: int) -> torch.Tensor:
    """Logits of LENGTH tokens in one chunk on one thread."""
    return run(dtype, [(seed, [LENGTH])], threads=1)[seed]


def run(dtype: str, sequences: list[tuple[int, list[int]]], threads: int, block_tokens: int = 256) -> dict[int, torch.Tensor]:
    """Sequences (seed of the ids, sizes of the chunks, repeated) side by side, one chunk of each a step: logits by seed."""
    model = packed(dtype)
    pages = Pages(
        model.config, PoolOptions(blocks=32, slots=6, rows=ROWS[dtype], block_tokens=block_tokens, snapshot_every=block_tokens)
    )
    runner = NativeRunner(model, pages, threads=threads)
    live = []
    for seed, sizes in sequences:
        state = Sequence(blocks=pages.allocate(-(-LENGTH // block_tokens)), slot=pages.allocate_slot())
        live.append((state, seed, random_ids(model.config, LENGTH, seed).tolist(), sizes))
    out: dict[int, list[torch.Tensor]] = {seed: [] for seed, _ in sequences}
    turn = 0
    while any(state.length < LENGTH for state, *_ in live):
        pieces = [
            Piece(state, tuple(ids[state.length : state.length + sizes[turn % len(sizes)]]), "all")
            for state, _, ids, sizes in live
            if state.length < LENGTH
        ]
        rows = runner.step(Plan(tuple(pieces))).split([piece.rows for piece in pieces])
        seeds = {id(state): seed for state, seed, *_ in live}
        for piece, logits in zip(pieces, rows, strict=True):
            out[seeds[id(piece.sequence)]].append(logits)
            piece.sequence.ids += piece.ids
        turn += 1
    return {seed: torch.cat(parts) for seed, parts in out.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_one_token_at_a_time(dtype, threads):
    assert torch.equal(run(dtype, [(1, [1])], threads)[1], expected(dtype, 1))


@settings(max_examples=12)
@given(
    dtype=st.sampled_from(["float32", "bfloat16"]),
    sizes=st.lists(
        st.lists(st.sampled_from([1, 2, 3, 4, 5, 47, 48, 49, 127, 128, 129, 255, 256, 257, 500]), min_size=1, max_size=5),
        min_size=1, max_size=4,
    ),
    threads=st.integers(1, 3),
    block_tokens=st.sampled_from([128, 256, 384]),
)  # fmt: skip
def test_any_chunks_of_several_sequences(dtype, sizes, threads, block_tokens):
    sequences = list(enumerate(sizes, start=1))
    for seed, logits in run(dtype, sequences, threads, block_tokens).items():
        assert torch.equal(logits, expected(dtype, seed))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("topk", [530, 600])
def test_members_share_the_softmax_of_a_token_with_many_keys(dtype, topk):
    """From some hundred keys on, chosen or all of them, heads are shared; beside another sequence nothing is."""
    model = pack(tiny_network((4, 0), seed=9, index_topk=topk), dtype)
    ids, length, out = random_ids(model.config, 2300, seed=5).tolist(), 2293, []
    for threads, together, sizes in ((1, 1, [7]), (2, 1, [1]), (3, 1, [1]), (2, 2, [1])):
        pages = Pages(model.config, PoolOptions(blocks=20, slots=2, rows=ROWS[dtype]))
        runner = NativeRunner(model, pages, threads=threads)
        states = [Sequence(blocks=pages.allocate(10), slot=pages.allocate_slot()) for _ in range(together)]
        for state in states:
            runner.step(Plan((Piece(state, tuple(ids[:length]), "none"),)))
            state.ids = ids[:length]
        rows = []
        for size in sizes * (7 // sizes[0]):
            pieces = tuple(Piece(state, tuple(ids[state.length : state.length + size]), "all") for state in states)
            rows.append(runner.step(Plan(pieces)).view(together, size, -1))
            for piece in pieces:
                piece.sequence.ids += piece.ids
        out += list(torch.cat(rows, 1))
    assert all(torch.equal(logits, out[0]) for logits in out[1:])


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 1e4]),
    grid=st.booleans(),
    topk=st.sampled_from([1, 5, 64]),
    count=st.sampled_from([1, 3, 40]),
    threads=st.integers(1, 3),
)
def test_keys_ruled_out_by_bounds_are_never_chosen(seed, spread, grid, topk, count, threads):
    """Scoring in float32 only what 8-bit bounds leave over changes no bit, whatever the keys: all alike, of very different
    sizes, or on a coarse grid with many ties."""
    whole, sifted = dense_and_sifted(topk)
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(spread**0.25 * torch.randn(4, 2, 64, 1, generator=generator))
    keys = torch.randn(4, 2, 64, 18, generator=generator) * (size if spread else 0.0)
    keys = (2 * keys).round() / 2 if grid else keys
    tokens = random_ids(whole.config, 1000 + count, seed % 1000).tolist()
    out = []
    for model in (whole, sifted):
        pages = Pages(model.config, PoolOptions(blocks=5, slots=1))
        sequence = Sequence(blocks=pages.allocate(5), slot=pages.allocate_slot())
        runner = NativeRunner(model, pages, threads=threads)
        runner.step(Plan((Piece(sequence, tuple(tokens[:1000]), "none"),)))
        pages.index[:4] = keys
        pages.changed(sequence.blocks)
        sequence.ids += tokens[:1000]
        out.append(runner.step(Plan((Piece(sequence, tuple(tokens[1000:]), "all"),))))
    assert torch.equal(*out)


@functools.cache
def dense_and_sifted(topk: int) -> tuple[NativeModel, NativeModel]:
    model = tiny_network((4, 4), seed=3, index_topk=topk, index_n_heads=5, index_head_dim=18)
    tensors = {name: getattr(model, name) for name in ("window_frequencies", "compressed_frequencies")}
    tensors = {**model.state_dict(), **tensors}
    whole, sifted = (NativeModel(model.config, tensors, Kinds(index=index)) for index in ("float32", "sifted"))
    return whole, sifted


def test_the_time_of_a_step_is_accounted_for(bench):
    run_ = bench(packed("float32"))
    ids = random_ids(run_.runner.config, 200, seed=1).tolist()
    run_.feed(run_.open(200), ids, [200])
    began = time.perf_counter()
    run_.runner.parts()
    run_.feed(run_.open(200), ids, [50, 1])
    elapsed, parts = time.perf_counter() - began, run_.runner.parts()
    assert 0 < sum(parts.values()) <= elapsed
    assert all(parts[name] > 0 for name in ("projections", "compression", "attention", "mixing", "experts", "head"))
    assert sum(run_.runner.parts().values()) == 0


def test_rows_that_somebody_else_wrote():
    """Blocks restored from a tier or written by the modules: the 8-bit keys of this runner are made anew from their rows."""
    model = packed("bfloat16")
    ids = random_ids(model.config, LENGTH, 1).tolist()
    options = PoolOptions(blocks=8, slots=2, rows="bfloat16")
    pages = Pages(model.config, options)
    first, second = NativeRunner(model, pages, threads=1), NativeRunner(model, pages, threads=1)
    a, b = (Sequence(blocks=pages.allocate(3), slot=pages.allocate_slot()) for _ in range(2))
    first.step(Plan((Piece(a, tuple(ids[:400]), "none"),)))
    second.step(Plan((Piece(b, tuple(ids[100:500]), "none"),)))  # other keys in b's blocks, known to the second runner only
    for source, target in zip(a.blocks, b.blocks, strict=True):
        pages.copy_block(source, target)
    pages.copy_slot(a.slot, b.slot)
    a.ids, b.ids = ids[:400], ids[:400]
    for runner, sequence in ((first, b), (second, a)):
        rows = runner.step(Plan((Piece(sequence, tuple(ids[400:]), "all"),)))
        assert torch.equal(rows, expected("bfloat16", 1)[400:])


def test_a_rejected_draft_leaves_no_trace(bench):
    """Two tokens in, one kept: the next step writes over the other and computes what it would have without it."""
    model = packed("float32")
    ids = random_ids(model.config, 300, seed=4).tolist()
    plain, drafted = bench(model), bench(model)
    one, other = plain.open(300), drafted.open(300)
    whole = plain.feed(one, ids, [300])
    for at, token in enumerate(ids):
        wrong = (token + 1) % model.config.vocab_size
        rows = drafted.runner.step(Plan((Piece(other, (token, wrong), "all"),)))
        other.ids.append(token)
        assert torch.equal(rows[0], whole[at])


def test_wanted_rows(bench):
    model = packed("float32")
    ids = random_ids(model.config, 40, seed=1).tolist()
    run_ = bench(model)
    every = run_.feed(run_.open(40), ids, [40])
    a, b, c = (run_.open(40) for _ in range(3))
    plan = Plan((Piece(a, tuple(ids), "last"), Piece(b, tuple(ids), "none"), Piece(c, tuple(ids[:3]), "all")))
    rows = run_.runner.step(plan)
    assert rows.shape == (4, model.config.vocab_size)
    assert torch.equal(rows[0], every[39]) and torch.equal(rows[1:], every[:3])
    assert run_.runner.step(Plan(())).shape == (0, model.config.vocab_size)
