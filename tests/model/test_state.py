"""The state of sequences: one answer however the tokens arrive, and no sequence ever sees another.

The reference in this file is always the network itself without a state, one sequence at a time; that the reference is right
is the business of tests/oracles.
"""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nautile import ConfigError, State, Transformer
from nautile.model import Trace
from oracles.random_models import random_ids, tiny_network

TOLERANCE = 1e-5  # float32, quantisation off
LONGEST = 300
SCHEDULE = (0, 4, 128)


@functools.cache
def model() -> Transformer:
    return tiny_network(SCHEDULE, seed=11)


@functools.cache
def row(seed: int) -> torch.Tensor:
    """[1, LONGEST] ids."""
    return random_ids(model().config, LONGEST, seed).unsqueeze(0)


@functools.cache
def alone(seed: int) -> torch.Tensor:
    """Logits [LONGEST, V] of ``row(seed)`` in one pass without a state; by causality its rows serve every prefix."""
    with torch.no_grad():
        return model()(row(seed))[0]


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == expected.shape
    assert ours.dtype == torch.float32
    worst = (ours - expected).abs().max().item()
    assert worst <= tolerance, f"max difference {worst}"


@torch.no_grad()
def feed(state: State, seed: int, sizes: list[int]) -> torch.Tensor:
    """Append the next tokens of ``row(seed)`` to a state of one sequence, chunk by chunk: logits of all of them."""
    parts = []
    for size in sizes:
        start = int(state.lengths[0])
        parts.append(model()(row(seed)[:, start : start + size], state=state)[0])
    return torch.cat(parts)


# one sequence -------------------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(
    st.lists(
        st.sampled_from([1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 60, 124, 127, 128, 129, 132]), min_size=1, max_size=9
    )
)
@example([5, 7, 64, 100, 1, 1, 1, 121])
@example([128, 128, 1, 1])
@example([31, 1, 1, 32, 32, 33, 1])
def test_any_chunking_gives_the_same_logits(sizes: list[int]) -> None:
    kept, total = [], 0
    for size in sizes:
        if total + size <= LONGEST:
            kept.append(size)
            total += size
    state = model().new_state(1)
    close(feed(state, 0, kept), alone(0)[:total])
    assert state.lengths.tolist() == [total] and state.lengths.dtype == torch.int64 and state.lengths.device.type == "cpu"


def test_token_by_token_from_nothing() -> None:
    close(feed(model().new_state(1), 1, [1] * 133), alone(1)[:133])


@torch.no_grad()
def test_which_logits() -> None:
    ids, lengths = torch.cat((row(2)[:, :9], row(3)[:, :9])), torch.tensor([9, 4])
    everything = model()(ids, lengths=lengths)
    last = model()(ids, lengths=lengths, logits="last")
    assert last.shape == (2, model().config.vocab_size)
    close(last, torch.stack((everything[0, 8], everything[1, 3])))
    state = model().new_state(2)
    assert model()(ids, state=state, lengths=lengths, logits="none") is None
    assert state.lengths.tolist() == [9, 4]


@torch.no_grad()
def test_trace_does_not_change_the_answer() -> None:
    trace = Trace()
    assert torch.equal(model()(row(0)[:, :40], trace=trace), model()(row(0)[:, :40]))
    assert len(trace.layers) == len(SCHEDULE)


@torch.no_grad()
def test_buffers_grow_by_doubling_and_stay_put_in_between() -> None:
    state = model().new_state(1)
    sizes = set()
    for start in range(0, LONGEST, 10):
        model()(row(0)[:, start : start + 10], state=state, logits="none")
        sizes.add(state.nbytes)
    assert len(sizes) <= 3
    where = [layer.entries.data_ptr() for layer in state.layers if layer.entries is not None]
    for _ in range(8):
        model()(row(0)[:, :1], state=state, logits="none")
    assert where == [layer.entries.data_ptr() for layer in state.layers if layer.entries is not None]


@torch.no_grad()
def test_positions_up_to_the_limit() -> None:
    """The last allowed position works, the next is refused, and the refusal changes nothing."""
    small = tiny_network((4, 128), max_position_embeddings=130)
    ids = random_ids(small.config, 131, 5).unsqueeze(0)
    state = small.new_state(1)
    small(ids[:, :129], state=state, logits="none")
    with pytest.raises(ValueError, match="max_position_embeddings"):
        small(ids[:, 129:131], state=state)
    close(small(ids[:, 129:130], state=state)[0], small(ids[:, :130])[0, 129:])
    with pytest.raises(ValueError, match="max_position_embeddings"):
        small(ids[:, 130:], state=state)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        small(ids)


# batches ------------------------------------------------------------------------------------------------------------

steps = st.lists(st.lists(st.integers(1, 70), min_size=3, max_size=3), min_size=1, max_size=4)


@torch.no_grad()
def feed_batch(state: State, chunks: list[list[int]], padding: int) -> list[torch.Tensor]:
    """Sequence b continues ``row(b)``; step s gives it chunks[s][b] tokens, right-padded. Logits of each, [total, V]."""
    parts: list[list[torch.Tensor]] = [[] for _ in range(state.batch_size)]
    for real in chunks:
        ids = torch.full((len(real), max(real)), padding, dtype=torch.int64)
        for b, count in enumerate(real):
            start = int(state.lengths[b])
            ids[b, :count] = row(b)[0, start : start + count]
        logits = model()(ids, state=state, lengths=torch.tensor(real))
        for b, count in enumerate(real):
            parts[b].append(logits[b, :count])
    return [torch.cat(part) for part in parts]


@settings(max_examples=10)
@given(steps)
@example([[1, 4, 127], [3, 1, 1], [1, 1, 1], [1, 1, 1]])
@example([[128, 2, 5], [1, 2, 130], [1, 1, 1]])
@example([[40, 40, 40], [33, 33, 33], [1, 1, 1], [60, 2, 1]])
def test_padded_batches_with_positions_of_their_own(chunks: list[list[int]]) -> None:
    state = model().new_state(3)
    for b, logits in enumerate(feed_batch(state, chunks, padding=7)):
        close(logits, alone(b)[: len(logits)])
    assert state.lengths.tolist() == [sum(column) for column in zip(*chunks, strict=True)]


def test_what_stands_in_the_padding_does_not_matter() -> None:
    chunks = [[1, 5, 130], [3, 1, 2], [130, 4, 1]]
    one, other = (feed_batch(model().new_state(3), chunks, padding) for padding in (0, 95))
    for a, b in zip(one, other, strict=True):
        close(a, b)  # not bit for bit: padding shares the matrix products of the experts


@torch.no_grad()
def test_padding_without_a_state() -> None:
    lengths = [1, 6, 131]
    ids = torch.zeros(3, 131, dtype=torch.int64)
    for b, length in enumerate(lengths):
        ids[b, :length] = row(b)[0, :length]
    logits = model()(ids, lengths=torch.tensor(lengths))
    for b, length in enumerate(lengths):
        close(logits[b, :length], alone(b)[:length])


def test_a_shared_prefix_and_a_shrinking_batch() -> None:
    """expand and select: copies of one sequence go their own ways; the others leave."""
    state = model().new_state(1)
    feed(state, 0, [130])
    wide = state.expand(3)
    ids = torch.cat((row(0)[:, 130:140], row(1)[:, :10], row(2)[:, :10]))
    with torch.no_grad():
        model()(ids, state=wide, logits="none")
        left = wide.select([2, 0])
        ours = model()(torch.cat((row(2)[:, 10:13], row(0)[:, 140:143])), state=left)
        expected = model()(torch.cat((row(0)[:, :130], row(2)[:, :13]), dim=1))[0, 140:]
    close(ours[0], expected)
    close(ours[1], alone(0)[140:143])
    close(feed(state, 0, [3]), alone(0)[130:133])


# packed documents ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(128, 256), (5, 130, 1), (127, 128, 20)], ids=str)
def test_packed_documents_equal_separate_sequences(lengths: tuple[int, ...]) -> None:
    """Documents start at multiples of 128 of a row; drafts (MTP) keep them apart too. The batch's other row is one document."""
    starts, at = [], 0
    for length in lengths:
        starts.append(at)
        at += -(-length // 128) * 128
    ids = random_ids(model().config, at, 50).unsqueeze(0).repeat(2, 1)
    documents = torch.zeros(2, at, dtype=torch.int64)
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        documents[0, start:] = start
        ids[0, start : start + length] = row(b)[0, :length]
    packed = model()(ids, documents=documents)
    chunk = model().new_chunk(ids, documents=documents)
    drafts, _ = model().forward_mtp(model().streams(ids, chunk), ids.roll(-1, 1), documents=documents)
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        close(packed[0, start : start + length], alone(b)[:length], 2e-5)  # rotations differ by the start: float32 angles
        if length == 1:
            continue
        single = row(b)[:, :length]
        streams = model().streams(single, model().new_chunk(single))
        expected, _ = model().forward_mtp(streams[:, :-1], single[:, 1:])
        close(drafts[0, start : start + length - 1], expected[0], 2e-5)
    close(packed[1], model()(ids[1:])[0])


def test_documents_do_not_go_with_a_state() -> None:
    with pytest.raises(ValueError, match="documents"):
        model()(row(0)[:, :4], state=model().new_state(1), documents=torch.zeros(1, 4, dtype=torch.int64))


# snapshots ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 3, 4, 127, 130])
def test_snapshot_restore_and_fork_are_independent(at: int) -> None:
    state = model().new_state(1)
    feed(state, 0, [at])
    kept, fork = state.snapshot(), state.fork()
    first = feed(state, 0, [1, 2, 5, 130])
    with torch.no_grad():  # the fork takes another way
        aside = model()(row(1)[:, :140], state=fork)[0]
        expected = model()(torch.cat((row(0)[:, :at], row(1)[:, :140]), dim=1))[0, at:]
    close(aside, expected)
    for _ in range(2):  # one snapshot serves many times
        state.restore(kept)
        assert state.lengths.tolist() == [at]
        close(feed(state, 0, [1, 2, 5, 130]), first, tolerance=0.0)
    close(first, alone(0)[at : at + 138])


def test_restore_refuses_another_shape() -> None:
    state = model().new_state(2)
    for other in (model().new_state(1), model().new_state(2, torch.bfloat16), tiny_network((4, 4)).new_state(2)):
        with pytest.raises(ValueError, match="another"):
            state.restore(other)


# reuse --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("short", [1, 2, 3, 4, 5])
def test_nothing_leaks_from_an_earlier_request(short: int) -> None:
    """The reference's bug: a prefill shorter than 4 tokens left the compressor halves of the request before in place."""
    state = model().new_state(1)
    empty = state.snapshot()
    feed(state, 0, [203])
    state.lengths[0] = 0  # the slot is given to another request; its rows stay where they are
    sizes = [short, 1, 1, 1, 1, 1, 120, 1, 1, 1, 1, 1, 1]
    close(feed(state, 1, sizes), alone(1)[: sum(sizes)])
    state.restore(empty)
    close(feed(state, 2, sizes), alone(2)[: sum(sizes)])


@pytest.mark.parametrize("short", [1, 3])
def test_one_slot_of_a_batch_is_reused(short: int) -> None:
    state = model().new_state(3)
    before = feed_batch(state, [[130, 97, 30]], padding=0)
    state.lengths[1] = 0
    after = feed_batch(state, [[2, short, 3], [1, 1, 1], [1, 1, 1], [1, 7, 1], [1, 120, 1]], padding=0)
    close(torch.cat((before[0], after[0])), alone(0)[:136])
    close(after[1], alone(1)[: short + 129])
    close(torch.cat((before[2], after[2])), alone(2)[:37])


# dtype --------------------------------------------------------------------------------------------------------------


def test_bfloat16_state() -> None:
    """Half the bytes; close to float32; the same answer in any chunks (compressor remainders stay float32)."""
    narrow = model().new_state(1, torch.bfloat16)
    assert narrow.nbytes < model().new_state(1).nbytes
    chunks = feed(narrow, 0, [3, 1, 1, 60, 1, 70, 1, 1])
    whole = feed(model().new_state(1, dtype=torch.bfloat16), 0, [138])
    assert chunks.isfinite().all()
    far = (chunks - whole).abs().amax(1)  # a last bit may flip in a row, and an expert after it: rare, never in the middle
    assert far.median() <= 1e-5
    assert (whole - alone(0)[:138]).abs().median() <= 0.05
    again = narrow.fork()
    close(feed(again, 0, [5]), feed(narrow, 0, [5]), tolerance=0.0)


def test_other_state_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="float16"):
        model().new_state(1, torch.float16)
    with pytest.raises(ValueError, match="batch_size=0"):
        model().new_state(0)


# bad input ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("ids", "lengths", "text"),
    [
        ([[1, 96]], None, r"0\.\.95"),
        ([[-1, 3]], None, r"0\.\.95"),
        ([[]], None, "empty"),
        ([[1, 2]], [0], "from 1 to 2"),
        ([[1, 2]], [3], "from 1 to 2"),
        ([[1, 2]], [1, 1], "lengths"),
        ([[1, 2], [3, 4]], None, "holds 1 sequences"),
    ],
    ids=["past the vocabulary", "negative", "empty", "no length", "too long", "too many lengths", "wrong batch"],
)
def test_bad_input_is_refused_and_changes_nothing(ids: list[list[int]], lengths: list[int] | None, text: str) -> None:
    state = model().new_state(1)
    feed(state, 0, [6])
    batch = torch.tensor(ids, dtype=torch.int64)
    with pytest.raises(ValueError, match=text):
        model()(batch, state=state, lengths=None if lengths is None else torch.tensor(lengths))
    close(feed(state, 0, [3]), alone(0)[6:9])


@pytest.mark.parametrize("ids", [torch.ones(1, 3), torch.ones(3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int32)])
def test_ids_of_another_kind_are_refused(ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="int64"):
        model()(ids)


def test_draft_without_mtp_is_a_config_error() -> None:
    plain = tiny_network((0,), num_nextn_predict_layers=0)
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ConfigError, match="MTP"):
        plain.forward_mtp(plain.streams(ids, plain.new_chunk(ids)), ids)


# gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantised", [False, True], ids=["exact", "fake quantisation on"])
def test_every_parameter_learns(quantised: bool) -> None:
    """A loss over logits and drafts reaches every parameter, through fake quantisation too (straight-through).

    Two exceptions, both by design: the indexer only chooses entries, and a choice has no gradient (a loss of its own trains
    it); the gate's bias only chooses experts and is a buffer that the balancer moves.
    """
    sizes = {"head_dim": 72, "index_head_dim": 32, "fake_quant_kv": True, "fake_quant_indexer": True} if quantised else {}
    net = tiny_network((0, 4, 128), seed=3, index_topk=4, **sizes)
    ids = random_ids(net.config, 140, 4).unsqueeze(0)
    streams = net.streams(ids, net.new_chunk(ids))
    logits = net.logits(net.hidden(streams))
    drafts, _ = net.forward_mtp(streams[:, :-1], ids[:, 1:])
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    ((logits * weights).sum() + (drafts * weights[:, 1:]).sum()).backward()
    silent = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert silent == {name for name, _ in net.named_parameters() if ".indexer." in name}
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    buffers = dict(net.named_buffers())
    assert "layers.1.ffn.gate.bias" in buffers and "mtp.0.ffn.gate.bias" in buffers


def test_the_indexer_has_a_loss_of_its_own() -> None:
    """It reaches every parameter of the indexers and nothing else."""
    net = tiny_network((4, 0, 4), seed=3, index_topk=4)
    ids = random_ids(net.config, 40, 4).unsqueeze(0)
    trace = Trace()
    net.streams(ids, net.new_chunk(ids, indexer_loss=True), trace=trace)
    losses = [layer.attention.indexer_loss for layer in trace.layers if layer.attention.indexer_loss is not None]
    assert len(losses) == 2
    torch.stack(losses).sum().backward()
    reached = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {name for name, _ in net.named_parameters() if ".indexer." in name}
