"""One rank of a small distributed run: ``main(rank, ranks, directory, plan)`` trains and leaves losses and weights."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from nautile.model.initialise import initialise
from nautile.train.distributed import ShardedConfig, ShardedRun, slice_batch
from nautile.train.losses import Batch
from nautile.train.run_state import RunError
from oracles.random_models import tiny_network

LENGTH, ROWS = 256, 4


def model():
    network = tiny_network((0, 4, 128), seed=1)
    return initialise(type(network)(network.config.replace(initializer_range=0.02)), seed=3)


def batch(step):
    """A global batch whose rows have different weights and documents."""
    generator = torch.Generator().manual_seed(100 + step)
    documents = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    documents[::2, 128:] = 128
    weight = (torch.rand(ROWS, LENGTH, generator=generator) < torch.tensor([[0.9], [0.5], [0.2], [0.7]])).float()
    return Batch(torch.randint(3, 60, (ROWS, LENGTH), generator=generator), documents, weight)


def failing(rank, ranks, directory):
    """What goes wrong: too many ranks for the experts, a row that cannot be shared, a loss that is no number."""
    torch.set_num_threads(1)
    place = Path(directory)
    dist.init_process_group("gloo", init_method=f"file://{place}/rendezvous", rank=rank, world_size=ranks)
    said = []
    try:
        whole = batch(0)
        said.append(_error(lambda: slice_batch(Batch(whole.ids[:3], whole.documents[:3], whole.weight[:3]), rank, ranks)))
        said.append(_error(lambda: ShardedRun(tiny_network((0,), n_routed_experts=7), ShardedConfig(ROWS), place / "odd")))
        run = ShardedRun(model(), ShardedConfig(ROWS), place / "run")
        run.fit(iter([(batch(0), 0, 1)]), 1, lambda row: None)
        before = run.whole_state()
        broken = Batch(whole.ids, whole.documents, whole.weight * float("nan"))
        said.append(_error(lambda: run.train_step(broken)))
        after = run.whole_state()
        said.append(str(all(torch.equal(tensor, after[name]) for name, tensor in before.items())))
        other = ShardedRun(tiny_network((0, 4)), ShardedConfig(ROWS), place / "run")
        said.append(_error(other.resume))
        (place / f"said-{rank}.json").write_text(json.dumps(said))
    finally:
        dist.destroy_process_group()


def _error(action):
    try:
        action()
    except RunError as error:
        return str(error)
    return "nothing"


def main(rank, ranks, directory, steps, until):
    """Resume if there is something, train up to ``until`` of the batches 0 .. steps - 1, save, write what came out."""
    torch.set_num_threads(1)
    place = Path(directory)
    dist.init_process_group("gloo", init_method=f"file://{place}/rendezvous-{ranks}-{until}", rank=rank, world_size=ranks)
    try:
        run = ShardedRun(model(), ShardedConfig(ROWS, lr=2e-3), place / "run")
        run.resume()
        rows = []
        run.fit(((batch(step), 0, step + 1) for step in range(run.step, steps)), until, rows.append)
        state = run.whole_state()
        if rank == 0:
            (place / f"rows-{until}.json").write_text(json.dumps(rows))
            torch.save(
                {name.replace("experts.", "experts."): tensor for name, tensor in state.items()}, place / f"state-{until}.pt"
            )
    finally:
        dist.destroy_process_group()
