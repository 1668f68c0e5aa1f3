"""Training on several processes: FSDP2 for everything that is dense, expert parallelism for the experts, Muon over both.

Every parameter is a DTensor. Blocks are gathered when they run and scattered again; each rank owns a part of the experts and
tokens travel to them (all-to-all, there and back). A global batch is cut by rows, so any number of ranks computes the same
loss; checkpoints are written by all ranks and read by any number of them.

    torchrun --nproc-per-node 2 -m nautile.train.distributed --data SHARDS --out RUN --steps 100
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from nautile.config import ModelConfig
from nautile.model import Transformer
from nautile.model.block import Block
from nautile.model.initialise import initialise
from nautile.model.moe import Experts, Routing, clamped_swiglu
from nautile.train.data import batches
from nautile.train.losses import Batch, LossWeights, training_losses
from nautile.train.optimizer import OptimizerConfig, newton_schulz, split_parameters
from nautile.train.run_state import RunError

__all__ = ["ParallelExperts", "ShardedOptimizer", "ShardedRun", "shard_model", "slice_batch"]


# Experts ---------------------------------------------------------------------------------------------------------------


class _Exchange(torch.autograd.Function):
    """All-to-all of rows [n, d]: ``sent[r]`` rows go to rank r, ``received[r]`` come from it; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        out = gradients[0].new_empty(sum(ctx.sent), *gradients[0].shape[1:])
        dist.all_to_all_single(out, gradients[0].contiguous(), ctx.sent, ctx.received, group=ctx.group)
        return out, None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    out: Tensor = _Exchange.apply(rows, sent, received, group)  # type: ignore[no-untyped-call]
    return out


class ParallelExperts(nn.Module):
    """The experts of one layer, E / R of them on each of R ranks; takes the place of ``Experts``."""

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        super().__init__()
        count, ranks = experts.w1.shape[0], mesh.size()
        if count % ranks:
            raise RunError(f"{count} experts cannot be shared by {ranks} ranks: use a number of ranks that divides them")
        self.mesh, self.limit, self.count = mesh, experts.limit, count
        for name in ("w1", "w3", "w2"):
            whole = getattr(experts, name).detach()
            self.register_parameter(name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """See ``Experts.forward``: [N, d] -> [N, d]."""
        ranks, group, choices = self.mesh.size(), self.mesh.get_group(), routing.experts.shape[1]
        order = routing.experts.flatten().argsort(stable=True)
        counts = torch.bincount(routing.experts.flatten(), minlength=self.count)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=group)  # [R, E / R]: how many rows of each rank for each expert here
        sent = counts.view(ranks, -1).sum(1).tolist()
        received = arriving.view(ranks, -1).sum(1).tolist()
        token = order // choices
        rows = _exchange(x[token], sent, received, group)
        back = _exchange(self._run(rows, arriving.view(ranks, -1)), received, sent, group)
        weight = routing.weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token, (back * weight).to(x.dtype))

    def _run(self, rows: Tensor, arriving: Tensor) -> Tensor:
        """Rows in order of (source rank, expert) -> the same rows through their experts."""
        w1, w3, w2 = (_local(getattr(self, name)) for name in ("w1", "w3", "w2"))
        parts = list(rows.split(arriving.flatten().tolist()))
        here = arriving.shape[1]
        out: list[Tensor] = [rows.new_empty(0)] * len(parts)
        for expert in range(here):
            places = range(expert, len(parts), here)
            joined = torch.cat([parts[place] for place in places])
            hidden = clamped_swiglu(F.linear(joined, w1[expert]), F.linear(joined, w3[expert]), self.limit)
            done = F.linear(hidden.to(joined.dtype), w2[expert])
            for place, part in zip(places, done.split([len(parts[place]) for place in places]), strict=True):
                out[place] = part
        return torch.cat(out)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


# The model -------------------------------------------------------------------------------------------------------------


class _LossModule(nn.Module):
    """The whole training pass as one module, so that FSDP2 gathers what lies outside the blocks around all of it."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, weights: LossWeights, shares: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
        """-> (this rank's part of the loss, times the number of ranks; its next-token part; loads [layers, E])."""
        losses = training_losses(self.model, batch, weights)
        total = losses.next_token * shares[0] + weights.mtp * shares[1] * losses.mtp
        total = total + weights.balance * losses.balance + weights.indexer * losses.indexer
        return total, losses.next_token.detach() * shares[0], losses.loads


def shard_model(model: Transformer, mesh: DeviceMesh) -> _LossModule:
    """Cut a whole model, the same on every rank, over the mesh; gives the training pass. Raises RunError."""
    blocks: list[Block] = [*model.layers, *model.mtp]
    for block in blocks:
        block.ffn.experts = ParallelExperts(block.ffn.experts, mesh)  # type: ignore[assignment]
    wrapped = _LossModule(model)
    experts = {p for block in blocks for p in block.ffn.experts.parameters()}
    for block in blocks[: len(model.layers)]:  # MTP is not called as a module: it is gathered with what lies outside the blocks
        fully_shard(block, mesh=mesh, ignored_params={p for p in block.parameters() if p in experts})
    fully_shard(wrapped, mesh=mesh, ignored_params=experts)
    return wrapped


def slice_batch(batch: Batch, rank: int, ranks: int) -> Batch:
    """This rank's rows of a global batch. Raises RunError when they cannot be shared evenly."""
    rows = len(batch.ids)
    if rows % ranks:
        raise RunError(f"{rows} rows cannot be shared by {ranks} ranks: choose a batch that they divide")
    part = slice(rank * rows // ranks, (rank + 1) * rows // ranks)
    return Batch(batch.ids[part], batch.documents[part], batch.weight[part])


def _target_weight(batch: Batch, ahead: int) -> Tensor:
    """Sum of the weights of the targets ``ahead`` tokens on, as the losses count them."""
    same = batch.documents.roll(-ahead, 1) == batch.documents
    weight = batch.weight.roll(-ahead, 1) * same
    return weight[:, :-ahead].sum()


# The optimizer ---------------------------------------------------------------------------------------------------------


class ShardedOptimizer:
    """Muon and AdamW over DTensors, with the split and the formulas of ``nautile.train.optimizer``.

    A dense matrix is gathered, orthogonalised by every rank, and each keeps its rows; an expert is whole where it lives.
    """

    def __init__(self, model: Transformer, config: OptimizerConfig | None = None) -> None:
        self.config = config or OptimizerConfig()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        muon, adam = split_parameters(model)
        self.muon = {names[id(parameter)]: parameter for parameter in muon}
        self.adam = {names[id(parameter)]: parameter for parameter in adam}
        self.momentum = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.muon.items()}
        self.first = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.adam.items()}
        self.second = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.adam.items()}
        self.steps = 0

    @torch.no_grad()
    def clip(self, limit: float) -> float:
        """Scale all gradients so that their norm over all ranks is at most ``limit``; gives the norm."""
        gradients = [_local(p.grad) for p in (*self.muon.values(), *self.adam.values()) if p.grad is not None]
        square = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()
        dist.all_reduce(square)
        norm = float(square.sqrt())
        for gradient in gradients:
            gradient.mul_(min(1.0, limit / (norm + 1e-6)))
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter and clear the gradients."""
        self.steps += 1
        for name, parameter in self.muon.items():
            self._muon(parameter, self.momentum[name], lr)
        for name, parameter in self.adam.items():
            self._adam(parameter, self.first[name], self.second[name], lr * self.config.adam_scale)
        for parameter in (*self.muon.values(), *self.adam.values()):
            parameter.grad = None

    def _muon(self, parameter: Tensor, momentum: Tensor, lr: float) -> None:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        momentum.mul_(self.config.momentum).add_(gradient)
        ahead = gradient + momentum * self.config.momentum
        rows, columns = parameter.shape[-2:]
        whole = ahead.full_tensor() if isinstance(ahead, DTensor) and ahead.dim() == 2 else _local(ahead)
        scale = max(rows, columns) ** 0.5 * self.config.gamma
        update = newton_schulz(whole.reshape(-1, rows, columns)).to(whole.dtype).view(whole.shape) * scale
        if isinstance(parameter, DTensor) and parameter.dim() == 2:
            cut = distribute_tensor(update, parameter.device_mesh, parameter.placements, src_data_rank=None)
            update = cut.to_local()
        _local(parameter).mul_(1 - lr * self.config.weight_decay).add_(update, alpha=-lr)

    def _adam(self, parameter: Tensor, first: Tensor, second: Tensor, lr: float) -> None:
        config = self.config
        gradient = _local(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        values, mean, square = _local(parameter), _local(first), _local(second)
        mean.lerp_(gradient, 1 - config.beta1)
        square.mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
        if parameter.dim() >= 2:  # norms, sinks and gates are not decayed
            values.mul_(1 - lr * config.weight_decay)
        scaled = (square.sqrt() / (1 - config.beta2**self.steps) ** 0.5).add_(config.adam_eps)
        values.addcdiv_(mean, scaled, value=-lr / (1 - config.beta1**self.steps))

    def state(self) -> dict[str, Tensor]:
        """Every moment by name, for a checkpoint."""
        named = (("momentum", self.momentum), ("first", self.first), ("second", self.second))
        return {f"{kind}.{name}": tensor for kind, tensors in named for name, tensor in tensors.items()}


# The run ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardedConfig:
    """``rows`` of a global batch, whatever the number of ranks."""

    rows: int
    lr: float = 1e-3
    clip: float = 1.0
    bias_speed: float = 1e-3
    weights: LossWeights = LossWeights()  # noqa: RUF009  # frozen


class ShardedRun:
    """Training of one model by all ranks of the default process group. ``directory`` is shared by them."""

    def __init__(self, model: Transformer, config: ShardedConfig, directory: Path, device: str = "cpu") -> None:
        self.config, self.directory = config, directory
        self.mesh = init_device_mesh(device, (dist.get_world_size(),))
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.model, self.shape = model, model.config.to_json()
        self.step, self.shard, self.row = 0, 0, 0
        self.loss = shard_model(model, self.mesh)
        self.optimizer = ShardedOptimizer(model)
        directory.mkdir(parents=True, exist_ok=True)

    def train_step(self, batch: Batch) -> tuple[float, float]:
        """One step on a global batch (every rank passes all of it): (loss over all ranks, gradient norm).

        Raises RunError when the loss or the gradient is not a number; nothing has been changed then.
        """
        mine = slice_batch(batch, self.rank, self.ranks)
        shares = tuple(
            float(_target_weight(mine, ahead) * self.ranks / _target_weight(batch, ahead).clamp_min(1e-9)) for ahead in (1, 2)
        )
        total, next_token, loads = self.loss(mine, self.config.weights, shares)
        total.backward()
        for name, parameter in self.model.named_parameters():
            if ".experts." in name and parameter.grad is not None:  # every rank's tokens are in it; the others are averages
                _local(parameter.grad).div_(self.ranks)
        norm = self.optimizer.clip(self.config.clip)
        seen = next_token / self.ranks
        dist.all_reduce(seen)
        if not (torch.isfinite(seen) and norm < float("inf")):
            where = f"step {self.step + 1}, shard {self.shard}, row {self.row}"
            raise RunError(f"the loss is not a number ({where}); the last checkpoint is untouched")
        self.optimizer.step(self.config.lr)
        dist.all_reduce(loads)
        self._balance(loads)
        self.step += 1
        return seen.item(), norm

    @torch.no_grad()
    def _balance(self, loads: Tensor) -> None:
        blocks: list[Any] = [*self.model.layers, *self.model.mtp]
        biases = [block.ffn.gate.bias for block in blocks if block.ffn.gate.bias is not None]
        for bias, load in zip(biases, loads, strict=True):
            bias.add_(torch.sign(load.mean() - load), alpha=self.config.bias_speed)

    def fit(self, feed: Iterator[tuple[Batch, int, int]], steps: int, report: Callable[[dict[str, float]], None]) -> None:
        """Train up to step ``steps`` and save."""
        while self.step < steps:
            batch, self.shard, self.row = next(feed)
            loss, norm = self.train_step(batch)
            report({"step": self.step, "loss": loss, "grad_norm": norm})
        self.save()

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """All ranks write their parts into a new directory; ``latest`` names it once it is whole, then the last one goes.

        Raises RunError when a rank cannot write; the last checkpoint is untouched then.
        """
        name = f"checkpoint-{self.step:06d}"
        place = self.directory / name
        why = ""
        try:
            save_parts(self._state(), checkpoint_id=str(place))
        except Exception as error:  # any rank's disk
            why = str(error).splitlines()[0]
        if any(self._gathered(why)):
            raise RunError(f"no checkpoint could be written to {self.directory} ({why or 'another rank failed'})")
        if self.rank == 0:
            before = self._latest()
            facts = {"name": name, "step": self.step, "shard": self.shard, "row": self.row, "config": self.shape}
            temporary = self.directory / "latest.tmp"
            temporary.write_text(json.dumps(facts), encoding="utf-8")
            temporary.replace(self.directory / "latest.json")
            if before is not None and before["name"] != name:
                shutil.rmtree(self.directory / before["name"])
        dist.barrier()
        return place

    def resume(self) -> bool:
        """Go on from the directory's checkpoint, written by any number of ranks. Raises RunError for another model's."""
        facts = self._latest()
        if facts is None:
            return False
        if facts["config"] != json.loads(json.dumps(self.shape)):
            raise RunError(f"{self.directory} belongs to another model: choose another --out directory")
        state = self._state()
        load_parts(state, checkpoint_id=str(self.directory / facts["name"]))
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                if f"buffer.{name}" in state:
                    buffer.copy_(state[f"buffer.{name}"])
        self.step, self.shard, self.row = facts["step"], facts["shard"], facts["row"]
        self.optimizer.steps = self.step
        return True

    def _state(self) -> dict[str, Any]:
        parameters = {f"model.{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        kept = self.model.state_dict().keys()
        buffers = {f"buffer.{name}": buffer for name, buffer in self.model.named_buffers() if name in kept}
        return {**parameters, **buffers, **self.optimizer.state()}

    def _latest(self) -> dict[str, Any] | None:
        path = self.directory / "latest.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _gathered(self, value: str) -> list[str]:
        found = [""] * self.ranks
        dist.all_gather_object(found, value)
        return found

    def whole_state(self) -> dict[str, Tensor]:
        """The state dict of an ordinary model, gathered on every rank."""
        found = {}
        for name, tensor in self.model.state_dict().items():
            found[name] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return found


def main() -> None:
    """``torchrun ... -m nautile.train.distributed``: pretrain on packed shards with all processes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8, help="of a global batch")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        device = "cuda" if cuda else "cpu"
        model = initialise(Transformer(ModelConfig.preset(options.preset)), options.seed).to(device)
        run = ShardedRun(model, ShardedConfig(options.rows, options.lr), options.out, device)
        run.resume()
        feed = batches(options.data, options.rows, torch.device(device), (run.shard, run.row))
        run.fit(feed, options.steps, lambda row: print(json.dumps(row), flush=True) if run.rank == 0 else None)
    except RunError as error:
        raise SystemExit(f"nautile: {error}") from None
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
