"""What was trained on stored values is what the exported file computes."""

import torch

from nautile.checkpoint import load_model, save_model
from nautile.quant import fp8, mxfp4
from nautile.train.optimizer import Optimizers
from nautile.train.qat import as_stored, on_grid
from oracles.random_models import random_ids, tiny_network


def network():
    """Dimensions that the formats take: multiples of 128."""
    return tiny_network((0, 4, 128, 4), seed=2, hidden_size=128, moe_intermediate_size=128, q_lora_rank=128, o_lora_rank=128)


def loss_of(model, ids):
    logits = model(ids)
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])


def trained(steps=4):
    model = network().train().requires_grad_(True)
    optimizers = Optimizers(model)
    ids = random_ids(model.config, 160, 0).unsqueeze(0)
    for _ in range(steps):
        with on_grid(model):
            loss_of(model, ids).backward()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizers.step(1e-3)
    return model, ids


def test_the_exported_file_computes_what_training_computed(tmp_path):
    """Bit for bit: the last training pass, and the file written and read by the checkpoint code."""
    model, ids = trained()
    with torch.no_grad(), on_grid(model):
        seen_in_training = model(ids)
    save_model(model, tmp_path / "export")
    exported = load_model(tmp_path / "export")
    with torch.no_grad():
        assert torch.equal(exported(ids), seen_in_training)
        assert not torch.equal(model(ids), seen_in_training)  # the kept values are others: the test could fail
    again = save_model(exported, tmp_path / "again")
    assert set(again.rounding.values()) <= {0.0}


def test_stored_values_lie_on_the_grids():
    model, _ = trained(1)
    stored = as_stored(model)
    experts, linear = stored.layers[1].ffn.experts.w1, stored.layers[1].attn.wq_a.weight
    assert torch.equal(mxfp4.fake_quant(experts), experts)
    assert torch.equal(fp8.fake_quant_blocks(linear), linear)
    assert torch.equal(stored.embed.weight.bfloat16().float(), stored.embed.weight)


def test_gradients_reach_the_kept_values_and_these_come_back():
    model = network().train().requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = random_ids(model.config, 64, 1).unsqueeze(0)
    with on_grid(model):
        loss_of(model, ids).backward()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    stored = as_stored(model).train().requires_grad_(True)
    loss_of(stored, ids).backward()
    grads = dict(stored.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, grads[name].grad), name


def test_training_on_the_grid_learns():
    model, ids = trained(8)
    with torch.no_grad(), on_grid(model):
        after = loss_of(model, ids)
    with torch.no_grad():
        assert after < loss_of(as_stored(network()), ids) - 0.1
