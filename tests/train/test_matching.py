"""An indexer and its attention are matched: the attention of single queries is attention, outputs hold, nothing else moves."""

import itertools

import pytest
import torch

from nautile.kernels.attention import attend
from nautile.model import Transformer
from nautile.model.initialise import initialise
from nautile.train.losses import Batch
from nautile.train.matching import MatchConfig, _at, _attention, _far_queries, match, recall, widened
from nautile.train.spans import _prepared, _Row
from oracles.random_models import tiny_network

LENGTH = 384


def network() -> Transformer:
    config = tiny_network((0, 4, 128), seed=1).config
    return initialise(Transformer(config.replace(index_topk=16, initializer_range=0.3)), seed=2)


def batch(seed: int, starts: tuple[int, ...] = (0,)) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (1, LENGTH), generator=generator)
    documents = torch.zeros(1, LENGTH, dtype=torch.int64)
    for start in starts:
        documents[0, start:] = start
    return Batch(ids, documents, torch.ones(1, LENGTH))


def test_attention_of_single_queries_is_that_of_the_row():
    """Beside ``attend`` over the whole row, in two documents: outputs and probabilities at any places."""
    model, one = network().double(), batch(1, (0, 256))
    chunk = model.new_chunk(one.ids, documents=one.documents)
    block, places = model.layers[1], torch.tensor([5, 255, 256, 300, 383])
    streams = model.embed(one.ids).unsqueeze(-2).expand(-1, -1, model.config.hc_mult, -1)
    with torch.no_grad():
        row = _Row(*_prepared(block, streams, chunk))
        visible = block.attn._complete(LENGTH // 4, chunk)
        out, weights = attend(row.q, row.raw, row.entries, visible, block.attn.attn_sink, block.attn._first_row(chunk))
        part = block.attn._complete(LENGTH // 4, _at(chunk, places))
        found, shares = _attention(block.attn, row, chunk, places, part, row.entries)
    assert torch.equal(part, visible[:, places])
    torch.testing.assert_close(found, out[:, places], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(shares.double(), weights.sum(2)[:, places], rtol=1e-6, atol=1e-7)


def test_queries_that_see_everything_are_not_drawn():
    assert _far_queries(batch(1, (0, 256)), 16).tolist() == [*range(67, 256), *range(256 + 67, LENGTH)]


def test_a_wider_indexer_leaves_dense_attention_alone():
    model = network()
    wide = widened(model, model.config.head_dim, 2)
    assert wide.config.index_n_heads == 2
    assert wide.config.index_head_dim == model.config.head_dim != model.config.index_head_dim
    ids = batch(2).ids[:, :64]  # as many entries as the indexer keeps
    torch.testing.assert_close(wide(ids), model(ids))
    same = widened(model, model.config.head_dim)  # as many heads as before, whose weights were learnt for other heads
    old, new = (one.layers[1].attn.indexer.weights_proj.weight for one in (model, same))
    assert new.shape == old.shape and not torch.equal(new, old)
    with pytest.raises(ValueError, match="the attention's own"):
        widened(model, 8)


def test_recall_is_the_share_of_what_is_wanted():
    """Two of the three best entries that can be seen; the best of all cannot."""
    weights = torch.tensor([[[0.1, 0.5, 0.2, 0.15, 0.9]]])
    scores = torch.tensor([[[3.0, 9.0, 0.0, 7.0, 8.0]]])
    assert recall(weights, scores, torch.tensor([[[True, True, True, True, False]]]), 3) == pytest.approx(2 / 3)


@pytest.mark.parametrize("attention_lr", [3e-3, 0.0])
def test_both_sides_learn_and_outputs_hold(attention_lr):
    """On one row again and again the divergence falls. What may not move does not, to the bit; without a rate of its own the
    attention is among that."""
    model, seen = network(), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = itertools.repeat(batch(10))
    config = MatchConfig(16, 1e9, rows=4, queries=64, steps=4, lr=1e-2, attention_lr=attention_lr, span=LENGTH)
    assert match(model, rows, config, lambda *row: seen.append(row[2])) == 4
    for first, last in zip(seen[0], seen[-1], strict=True):
        assert last.divergence < 0.9 * first.divergence
        assert (last.moved > 0) == (attention_lr > 0) and last.moved < 0.1
    moving = ("attn.indexer.", *(("attn.wq_b.", "attn.compressor.", "attn.attn_sink") if attention_lr else ()))
    for name, tensor in model.state_dict().items():
        free = name.startswith("layers.1.") and name.removeprefix("layers.1.").startswith(moving)
        assert torch.equal(tensor, before[name]) != free, name
