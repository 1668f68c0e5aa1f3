"""The native kernels against the modules: random small networks of every kind, and the shipped model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nautile import Tokenizer, load_model
from nautile.cli.agent import shipped_model
from nautile.engine.native import NativeRunner
from nautile.engine.plan import Piece, Plan
from nautile.state.pages import Pages, PoolOptions, Sequence
from nautile.state.view import BatchView
from nautile.train.tasks import HELD_OUT_START
from nautile.train.traces import TraceMaker
from oracles.random_models import random_ids, tiny_network

QUANTISED = {"head_dim": 72, "qk_rope_head_dim": 8, "index_head_dim": 32, "fake_quant_kv": True, "fake_quant_indexer": True}
CASES = {
    "window": ((0, 0), 150, {}),
    "csa": ((4, 4), 300, {}),
    "hca": ((128, 128), 400, {}),
    "everything": ((0, 4, 128, 4), 400, {}),
    "ties": ((4, 4), 200, {"index_n_heads": 1, "index_topk": 5}),
    "window of one, tied head": ((128, 0, 4), 140, {"sliding_window": 1, "tie_word_embeddings": True, "rope_scaling": None}),
    "odd sizes": ((4, 128), 260, {"vocab_size": 101, "hidden_size": 60, "o_lora_rank": 10, "q_lora_rank": 22, "head_dim": 20,
                                  "moe_intermediate_size": 24, "index_head_dim": 18, "n_routed_experts": 7}),
    "two streams": ((0, 4), 60, {"hc_mult": 2}),
    "eight streams": ((0, 4), 60, {"hc_mult": 8}),
    "many heads": ((4, 128), 260, {"num_attention_heads": 10, "index_n_heads": 6}),
}  # fmt: skip


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", CASES)
def test_float32_logits_are_those_of_the_modules(name, bench):
    schedule, length, changes = CASES[name]
    model = tiny_network(schedule, seed=len(name), **changes)
    ids = random_ids(model.config, length, seed=1)
    with torch.inference_mode():
        expected = model(ids[None])[0]
    run = bench(model)
    assert relative(run.feed(run.open(length), ids.tolist(), [length]), expected) <= 1e-5


@pytest.mark.parametrize("ratio", [4, 128])
def test_quantised_rows_and_keys(ratio, bench):
    """FP8 rows and FP4 keys fall on the codes of the modules, but for a value in thousands at the border of two codes. One
    layer: behind a code that fell differently everything may differ."""
    model = tiny_network((ratio,), seed=5, index_topk=6, **QUANTISED)
    ids = random_ids(model.config, 260, seed=2)
    run = bench(model)
    sequence = run.open(260)
    ours = run.feed(sequence, ids.tolist(), [260])
    other = Pages(model.config, PoolOptions(blocks=2, slots=1))
    with torch.inference_mode():
        expected = model(ids[None], state=BatchView(other, [Sequence(blocks=other.allocate(2), slot=other.allocate_slot())]))[0]
    close = ((ours - expected).abs().amax(-1) / expected.abs().max()) <= 1e-5
    assert close.float().mean() > 0.8
    for name, rows in (("window", 16), ("csa", 64), ("index", 64), ("hca", 2)):
        mine, theirs = (getattr(pages, name)[:1, :1, :rows] for pages in (run.pages, other))
        if mine.numel():
            same = (mine - theirs).abs() <= 1e-5 * theirs.abs().max()
            assert same.float().mean() > 0.995, name
            assert (mine - theirs).abs().max() <= 0.5 * theirs.abs().max(), name


@settings(max_examples=12)
@given(
    first=st.sampled_from([1, 3, 4, 5, 127, 128, 129, 255, 256, 257]),
    then=st.lists(st.sampled_from([1, 2, 3, 4, 63, 128]), min_size=1, max_size=4),
    seed=st.integers(0, 3),
)
def test_the_pool_is_left_as_the_modules_leave_it(first, then, seed):
    """Native and module steps over the same kind of pool: the rows they leave are the same, so either can go on."""
    model = tiny_network((0, 4, 128), seed=seed)
    pages = [Pages(model.config, PoolOptions(blocks=4, slots=2)) for _ in range(2)]
    sequences = [Sequence(blocks=p.allocate(3), slot=p.allocate_slot()) for p in pages]
    runner = NativeRunner(model, pages[0], threads=2)
    for turn, size in enumerate([first, *then]):
        ids = random_ids(model.config, size, seed=turn)
        ours = runner.step(Plan((Piece(sequences[0], tuple(ids.tolist()), "all"),)))
        with torch.inference_mode():
            theirs = model(ids[None], state=BatchView(pages[1], [sequences[1]]))[0]
        assert relative(ours, theirs) <= 1e-5
        for sequence in sequences:
            sequence.ids += ids.tolist()
    for name in ("csa", "index", "hca", "window", "csa_kv", "csa_gate", "index_kv", "index_gate", "hca_kv", "hca_gate"):
        ours, theirs = getattr(pages[0], name), getattr(pages[1], name)
        assert (ours - theirs).abs().max() <= 1e-4 * (1 + theirs.abs().max()), name


@pytest.fixture(scope="module")
def nano():
    """The shipped model and a conversation of an agent that it has not seen."""
    path = shipped_model()
    tokenizer = Tokenizer.load(path)
    with TraceMaker(tokenizer) as maker:
        ids = maker.make(HELD_OUT_START).ids[:900]
    model = load_model(path).eval().requires_grad_(False)
    with torch.inference_mode():
        return model, ids, model(torch.tensor([ids]))[0]


def test_nano_in_float32(nano, bench):
    model, ids, expected = nano
    run = bench(model)
    assert relative(run.feed(run.open(len(ids)), ids, [600, 100]), expected) <= 1e-5


def test_nano_in_bfloat16_chooses_the_same_tokens(nano, bench):
    model, ids, expected = nano
    run = bench(model, dtype="bfloat16", rows="bfloat16")
    ours = run.feed(run.open(len(ids)), ids, [600, 100])
    assert (ours.argmax(-1) == expected.argmax(-1)).float().mean() >= 0.99
    drift = (expected.log_softmax(-1).exp() * (expected.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).mean()
    assert drift <= 5e-3
