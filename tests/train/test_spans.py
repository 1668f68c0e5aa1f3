"""A row in spans gives the losses and gradients of the whole row: documents, top-k, the indexer's loss, the draft block."""

import pytest
import torch

from nautile.model import Transformer
from nautile.model.initialise import initialise
from nautile.train.losses import Batch, LossWeights, training_losses
from oracles.random_models import tiny_network


def network(topk: int) -> Transformer:
    config = tiny_network((0, 4, 128), seed=1).config.replace(
        index_topk=topk, num_nextn_predict_layers=1, initializer_range=0.3
    )
    return initialise(Transformer(config), seed=2).double()


def batch(vocabulary: int, length: int, starts: list[list[int]]) -> Batch:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, vocabulary, (len(starts), length), generator=generator)
    documents = torch.zeros(len(starts), length, dtype=torch.int64)
    for row, places in enumerate(starts):
        for place in places:
            documents[row, place:] = place
    weight = (torch.rand(len(starts), length, generator=generator) < 0.3).double()
    return Batch(ids, documents, weight)


def gradients(model: Transformer, one: Batch, span: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    model.zero_grad()
    losses = training_losses(model, one, LossWeights(mtp=0.3, balance=0.01, indexer=1.0), span=span)
    losses.total.backward()
    values = [losses.next_token, losses.mtp, losses.balance, losses.indexer]
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return [value.item() for value in values], found


@pytest.mark.parametrize(("topk", "span"), [(8, 96), (10_000, 128)])
def test_spans_are_the_whole_row(topk: int, span: int) -> None:
    model = network(topk)
    one = batch(model.config.vocab_size, 256, [[128], []])
    whole, expected = gradients(model, one, 0)
    parts, found = gradients(model, one, span)
    assert whole[3] > 0.01
    assert parts == pytest.approx(whole, rel=1e-9)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


def test_a_row_without_targets_has_gradients_of_zero() -> None:
    model = network(8)
    one = batch(model.config.vocab_size, 256, [[]])
    losses = training_losses(model, Batch(one.ids, one.documents, one.weight * 0), LossWeights(balance=0.0), span=128)
    losses.total.backward()
    assert losses.next_token.item() == 0
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
