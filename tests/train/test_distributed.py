"""FSDP2 and expert parallelism over two gloo processes: the loss of one, a checkpoint for any number."""

import json

import pytest
import torch

from nautile.train.losses import LossWeights, training_losses
from nautile.train.optimizer import Optimizers
from ranks import run_ranks
from train import distributed_worker as worker


def run(ranks, directory, until, steps=4):
    run_ranks(worker.main, ranks, str(directory), steps, until)
    rows = json.loads((directory / f"rows-{until}.json").read_text())
    return rows, torch.load(directory / f"state-{until}.pt", weights_only=True)


@pytest.fixture(scope="module")
def plain():
    """Four steps by the ordinary loop's functions, without a process group: losses, first and last weights, and for each
    element of a tensor its smallest gradient of a step."""
    model = worker.model()
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizers, rows, least = Optimizers(model), [], {}
    for step in range(4):
        losses = training_losses(model, worker.batch(step), LossWeights())
        losses.total.backward()
        for name, parameter in model.named_parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            least[name] = torch.minimum(least.get(name, parameter.grad.abs()), parameter.grad.abs()).clone()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(2e-3)
        biases = [block.ffn.gate.bias for block in [*model.layers, *model.mtp] if block.ffn.gate.bias is not None]
        for bias, load in zip(biases, losses.loads, strict=True):
            bias.add_(torch.sign(load.mean() - load), alpha=1e-3)
        rows.append({"loss": losses.next_token.item(), "grad_norm": norm.item()})
    return rows, first, model.state_dict(), least


def check_rows(rows, wanted):
    assert len(rows) == len(wanted)
    for row, other in zip(rows, wanted, strict=True):
        assert abs(row["loss"] - other["loss"]) < 1e-5 and abs(row["grad_norm"] - other["grad_norm"]) < 1e-5


def check_state(state, plain):
    """What training moved, it moved to the same place: within 1 % of the way. Elements whose gradient is rounding (most of the
    first layer's mixing, whose streams are equal) do not count: both optimizers follow the rounding there."""
    _, first, last, least = plain
    assert set(state) == set(last)
    compared = 0
    for name, tensor in last.items():
        if name not in least:
            assert torch.equal(state[name], tensor), name  # tables, and the balancing biases
            continue
        real = least[name] > 1e-5
        if real.any():
            compared += 1
            assert (state[name] - tensor)[real].norm() < 0.01 * (tensor - first[name])[real].norm(), name
    assert compared > 50


def test_two_ranks_are_one_process_and_one_goes_on_where_two_were(tmp_path, plain):
    """Losses and gradient norms within 1e-5 of a process alone, and still after a checkpoint has changed hands."""
    check_rows(run(2, tmp_path, 2)[0], plain[0][:2])
    rows, state = run(1, tmp_path, 4)
    check_rows(rows, plain[0][2:])
    check_state(state, plain)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-000004", "latest.json"]


@pytest.mark.slow
def test_one_rank_goes_on_as_two(tmp_path, plain):
    run(1, tmp_path, 1)
    rows, state = run(2, tmp_path, 4)
    check_rows(rows, plain[0][1:])
    check_state(state, plain)


def test_what_goes_wrong_is_said_by_every_rank(tmp_path):
    run_ranks(worker.failing, 2, str(tmp_path))
    for rank in range(2):
        rows, experts, nan, untouched, other = json.loads((tmp_path / f"said-{rank}.json").read_text())
        assert "3 rows cannot be shared by 2 ranks" in rows
        assert "7 experts cannot be shared by 2 ranks" in experts
        assert "not a number (step 2, shard 0, row 1)" in nan
        assert untouched == "True"
        assert "another" in other
