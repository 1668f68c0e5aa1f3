"""Packed weights have exactly the tensors of an official checkpoint, at full size, without a byte being allocated."""

import pytest
import torch

from engine.flash_models import budget, flash_config, packed
from nautile.checkpoint.layout import entries, stored_tensors
from nautile.checkpoint.shards import _TORCH
from nautile.config import ModelConfig
from nautile.engine.expert_store import ExpertStore
from nautile.engine.packed_weights import PackedWeights
from nautile.engine.placement import place_experts

WIDER = {torch.bfloat16: (torch.bfloat16, torch.float32)}  # norms and the router are kept in float32


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_every_tensor_of_the_official_layout_has_its_place(name):
    config = ModelConfig.preset(name).replace(
        num_nextn_predict_layers=0, n_routed_experts=12
    )  # the rest differs by number only
    everything = config.num_hidden_layers * config.n_routed_experts
    placement = place_experts(config, budget(config, everything))
    weights = PackedWeights.allocate(ExpertStore(placement, torch.device("meta")), torch.device("meta"))
    found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in weights.destinations()}
    wanted = {tensor.name: tensor for entry in entries(config) for tensor in stored_tensors(entry)}
    assert found.keys() == wanted.keys()
    for official, tensor in wanted.items():
        shape, dtype = found[official]
        stored = _TORCH[tensor.dtype]
        assert shape == tensor.shape and dtype in WIDER.get(stored, (stored,)), official


def test_random_values_fill_everything_and_are_numbers():
    weights = packed(flash_config(), 26, seed=3)
    again = packed(flash_config(), 26, seed=3)
    for (name, tensor), (_, same) in zip(weights.destinations(), again.destinations(), strict=True):
        assert torch.equal(tensor.view(torch.uint8), same.view(torch.uint8)), name
        assert bool(torch.isfinite(tensor.float()).all()) if tensor.dtype != torch.int8 else tensor.unique().numel() > 100, name
        assert tensor.numel() == 1 or tensor.float().std() > 0 or name.endswith((".bias", ".scale")), name
    table = dict(weights.destinations())["layers.0.ffn.gate.tid2eid"]
    assert all(len(set(row)) == len(row) for row in table.tolist())
    assert torch.bincount(table.flatten(), minlength=16).min() > 0
