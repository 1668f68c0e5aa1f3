"""The NumPy path for one token computes what the modules compute, from any state, and leaves the same state behind."""

import pytest
import torch

from nautile import ModelConfig
from nautile.model import Transformer
from nautile.model.decode import TokenDecoder, can_decode
from oracles.random_models import random_ids, tiny_network

SCHEDULES = [(0, 0), (4, 4), (128, 128), (0, 4, 128, 4)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("prefilled", [0, 1, 3, 127, 130])
def test_same_logits_as_the_modules(schedule, prefilled):
    model = tiny_network(schedule, seed=sum(schedule) + prefilled, index_topk=8)
    ids = random_ids(model.config, 180, seed=prefilled)
    decoder = TokenDecoder(model)
    with torch.inference_mode():
        expected = model(ids[None])[0]
        state = model.new_state(1)
        if prefilled:
            model(ids[None, :prefilled], state=state, logits="none")
        for position in range(prefilled, 180):
            logits = decoder.step(int(ids[position]), state)
            assert (logits[0] - expected[position]).abs().max() <= 5e-5, position
        after = model(ids[None, :40], state=state)[0, -1]
        whole = model(torch.cat((ids, ids[:40]))[None])[0, -1]
    assert (after - whole).abs().max() <= 5e-5


def test_the_state_is_not_shared_with_a_fork():
    model = tiny_network((0, 4, 128, 4), seed=5)
    ids = random_ids(model.config, 40, seed=1)
    decoder = TokenDecoder(model)
    with torch.inference_mode():
        state = model.new_state(1)
        model(ids[None], state=state, logits="none")
        fork = state.fork()
        first = [decoder.step(token, state) for token in (1, 2, 3, 4, 5)]
        again = [decoder.step(token, fork) for token in (1, 2, 3, 4, 5)]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_what_it_cannot_do_is_refused():
    with torch.device("meta"):
        quantised = Transformer(ModelConfig.preset("nano").replace(fake_quant_kv=True))
    assert not can_decode(quantised)
    with pytest.raises(ValueError, match="fake quantisation off"):
        TokenDecoder(quantised)
    model = tiny_network((0, 4), seed=1)
    decoder = TokenDecoder(model)
    with pytest.raises(ValueError, match="token ids"):
        decoder.step(model.config.vocab_size, model.new_state(1))
    with pytest.raises(ValueError, match="one sequence"):
        decoder.step(0, model.new_state(2))
