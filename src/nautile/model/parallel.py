"""One network on several ranks: attention heads, experts and the tokens of a prompt divided through torch.distributed.

Tensor parallelism cuts heads (with their groups of the output projection), the shared expert and the head's rows; expert
parallelism gives every rank some of the routed experts. In both, all ranks hold the same streams and the same state, and sum
their parts: the single key-value head, compressors, indexer and router are small and are computed by everybody.

Context parallelism cuts a long prompt. A rank needs of the ranks before it their last W window rows, the projections of the
block before its first, and their compressed entries, which are few: neighbours pass on the former, all gather the latter. The
modules do not know: a rank's state answers ``extend`` and ``store_entries`` with rows from elsewhere.

Processes are the caller's (``torch.distributed`` with gloo or NCCL); nothing here asks how many there are.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nautile.config import ModelConfig
from nautile.model.attention import Attention
from nautile.model.block import Block
from nautile.model.layers import GroupedLinear, Linear
from nautile.model.moe import Experts, MoE, Routing, clamped_swiglu
from nautile.model.transformer import Transformer
from nautile.state import LayerState, Rows, State

__all__ = ["ContextState", "prompt_slices", "shard_experts", "shard_heads"]

Group = dist.ProcessGroup


def shard_heads(model: Transformer, group: Group) -> Transformer:
    """Keep this rank's part of every attention, shared expert and of the head; in place, returns the model.

    Raises ValueError when the ranks do not divide the output groups, the experts' inner size or the vocabulary.
    """
    ranks, config = dist.get_world_size(group), model.config
    for name in ("o_groups", "moe_intermediate_size", "vocab_size"):
        if getattr(config, name) % ranks:
            raise ValueError(f"{ranks} ranks do not divide {name}={getattr(config, name)}: use a number that does")
    for block in _blocks(model):
        _shard_attention(block.attn, config, group)
        shared = block.ffn.shared_experts
        shared.w1.weight, shared.w3.weight = _rows(shared.w1.weight, group), _rows(shared.w3.weight, group)
        shared.w2 = _Summed(_columns(shared.w2.weight, group), group)
    if model.head is not None:
        model.head = _Gathered(_rows(model.head.weight, group), group)
    return model


def shard_experts(model: Transformer, group: Group) -> Transformer:
    """Keep this rank's routed experts; in place, returns the model. Raises ValueError when there are fewer than ranks."""
    if model.config.n_routed_experts < dist.get_world_size(group):
        raise ValueError(f"{dist.get_world_size(group)} ranks for {model.config.n_routed_experts} experts: use fewer ranks")
    for block in _blocks(model):
        block.ffn.experts = ExpertShard(block.ffn.experts, group)  # type: ignore[assignment]
    return model


def _blocks(model: Transformer) -> list[Block]:
    found = [module for module in (*model.layers, *model.mtp) if isinstance(module, Block)]
    for block in found:
        if not isinstance(block.ffn, MoE):
            raise ValueError("this model is not made of the ordinary blocks")
    return found


def _shard_attention(attention: Attention, config: ModelConfig, group: Group) -> None:
    ranks = dist.get_world_size(group)
    heads, groups = config.num_attention_heads // ranks, config.o_groups // ranks
    attention.config = config.replace(num_attention_heads=heads, o_groups=groups)
    attention.wq_b.weight = _rows(attention.wq_b.weight, group)
    attention.attn_sink = _rows(attention.attn_sink, group)
    down = _rows(attention.wo_a.weight, group)
    attention.wo_a = GroupedLinear(groups, heads * config.head_dim, len(down))
    attention.wo_a.weight = down
    attention.wo_b = _Summed(_columns(attention.wo_b.weight, group), group)


def _own(size: int, group: Group) -> slice:
    """This rank's part of ``size`` things; the first ranks have one more when they do not come out even."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    return slice(rank * size // ranks, (rank + 1) * size // ranks)


def _rows(weight: Tensor, group: Group) -> nn.Parameter:
    return nn.Parameter(weight.detach()[_own(weight.shape[0], group)].clone(), requires_grad=False)


def _columns(weight: Tensor, group: Group) -> nn.Parameter:
    return nn.Parameter(weight.detach()[:, _own(weight.shape[1], group)].clone(), requires_grad=False)


def _sum(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks, the same bits on each."""
    out = x.contiguous()
    dist.all_reduce(out, group=group)
    return out


class _Summed(Linear):
    """A linear whose inputs are divided: every rank multiplies its own, and the products are summed."""

    def __init__(self, weight: nn.Parameter, group: Group) -> None:
        nn.Module.__init__(self)
        self.weight, self.group, self.qat = weight, group, False

    def forward(self, x: Tensor) -> Tensor:
        """[..., own inputs] -> [..., outputs]."""
        return _sum(F.linear(x, self.weight), self.group)


class _Gathered(Linear):
    """A linear whose outputs are divided: every rank has all of them afterwards."""

    def __init__(self, weight: nn.Parameter, group: Group) -> None:
        nn.Module.__init__(self)
        self.weight, self.group, self.qat = weight, group, False

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        own = F.linear(x, self.weight).contiguous()
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, own, group=self.group)
        return torch.cat(parts, dim=-1)


class ExpertShard(nn.Module):
    """The routed experts that one rank has; sees all tokens, and the parts of all ranks are summed."""

    def __init__(self, experts: Experts, group: Group) -> None:
        super().__init__()
        own = _own(experts.w1.shape[0], group)
        self.group, self.first, self.limit = group, own.start, experts.limit
        self.w1, self.w3, self.w2 = (_rows(weight, group) for weight in (experts.w1, experts.w3, experts.w2))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x [N, d] -> [N, d]; see ``Experts``."""
        out = torch.zeros_like(x)
        local = routing.experts - self.first
        for expert in range(len(self.w1)):
            token, choice = (local == expert).nonzero(as_tuple=True)
            if len(token):
                hidden = clamped_swiglu(F.linear(x[token], self.w1[expert]), F.linear(x[token], self.w3[expert]), self.limit)
                weighted = (hidden * routing.weights[token, choice].unsqueeze(-1)).to(x.dtype)
                out.index_add_(0, token, F.linear(weighted, self.w2[expert]))
        return _sum(out, self.group)


# A prompt in slices ------------------------------------------------------------------------------------------------


def prompt_slices(tokens: int, ranks: int, window: int) -> list[range]:
    """Which tokens each rank takes: multiples of 128, so that no block is cut, the last rank what is left.

    Raises ValueError when a slice would be shorter than the window or a block, because a rank then needs rows of more than
    one neighbour.
    """
    least = max(128, -(-window // 128) * 128)
    size = tokens // ranks // 128 * 128
    if ranks > 1 and size < least:
        raise ValueError(f"a prompt of {tokens} tokens on {ranks} ranks: each needs {least} tokens at least, use fewer ranks")
    ends = [size * rank for rank in range(ranks)] + [tokens]
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]


class ContextState:
    """The state of one prompt whose slices are on the ranks of ``group``, for one pass of the network over this rank's slice.

    After it the last rank's ``state`` is that of the whole prompt, as if it had computed all of it: it decodes.
    """

    def __init__(self, config: ModelConfig, tokens: int, group: Group, device: str | torch.device = "cpu") -> None:
        self.config, self.group = config, group
        self.slices = prompt_slices(tokens, dist.get_world_size(group), config.sliding_window)
        self.own = self.slices[dist.get_rank(group)]
        self.state = State(config, 1, torch.float32, device)
        self.state.reserve(tokens + 128)
        self.state.lengths = torch.tensor([self.own.start])
        layers = zip(self.state.layers, config.layer_ratios, strict=True)
        self.layers = [_ContextRows(layer, self, ratio) for layer, ratio in layers]

    @property
    def batch_size(self) -> int:
        """One prompt."""
        return 1

    @property
    def lengths(self) -> Tensor:
        """See ``BatchState``."""
        return self.state.lengths

    @lengths.setter
    def lengths(self, value: Tensor) -> None:
        self.state.lengths = value

    def begin(self, lengths: tuple[int, ...], width: int) -> None:
        """See ``BatchState``. Raises ValueError for other tokens than this rank's slice."""
        if lengths != (len(self.own),) or width != len(self.own):
            raise ValueError(f"this rank takes tokens {self.own.start} to {self.own.stop - 1} in one pass, got {width}")

    def from_before(self, rows: Tensor) -> Tensor | None:
        """Give these rows to the next rank; those of the rank before, None on the first."""
        rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        received = torch.empty_like(rows) if rank else None
        work = []
        if rank + 1 < ranks:
            work.append(dist.P2POp(dist.isend, rows.contiguous(), group=self.group, group_peer=rank + 1))
        if received is not None:
            work.append(dist.P2POp(dist.irecv, received, group=self.group, group_peer=rank - 1))
        for request in dist.batch_isend_irecv(work) if work else ():
            request.wait()
        return received


@dataclass(frozen=True)
class _ContextTail:
    kv: _ContextBuffer
    gate: _ContextBuffer


class _ContextBuffer:
    """The last rows of a slice: before a rank appends its own, it takes over those of the rank before."""

    def __init__(self, rows: Rows, owner: ContextState) -> None:
        self.rows, self.owner, self.size = rows, owner, rows.size

    def extend(self, new: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """See ``RowBuffer``."""
        before = self.owner.from_before(new[:, -self.size :].to(self.rows.buffer.dtype))
        if before is not None:
            self.rows.rows().copy_(before)
        return self.rows.extend(new, lengths)


class _ContextRows:
    """One layer: ring rows from the neighbour, entries from everybody."""

    def __init__(self, layer: LayerState, owner: ContextState, ratio: int) -> None:
        self.layer, self.owner, self.ratio = layer, owner, ratio
        self.window = _ContextBuffer(layer.window, owner)
        self.tail = self.index_tail = None
        if layer.tail is not None:
            self.tail = _ContextTail(_ContextBuffer(layer.tail.kv, owner), _ContextBuffer(layer.tail.gate, owner))
        if layer.index_tail is not None:
            index = layer.index_tail
            self.index_tail = _ContextTail(_ContextBuffer(index.kv, owner), _ContextBuffer(index.gate, owner))

    def store_entries(self, new: Tensor, first: tuple[int, ...], count: int) -> Tensor:
        """See ``LayerRows``."""
        for rows, start in self._everybody(new):
            self.layer.store_entries(rows, (start,), count)
        return self.layer.store_entries(new[:, :0], first, count)

    def store_index_keys(self, new: Tensor, first: tuple[int, ...], count: int) -> Tensor:
        """See ``LayerRows``."""
        for rows, start in self._everybody(new):
            self.layer.store_index_keys(rows, (start,), count)
        return self.layer.store_index_keys(new[:, :0], first, count)

    def _everybody(self, new: Tensor) -> list[tuple[Tensor, int]]:
        """The entries of every rank's slice and the number of the first."""
        slices = self.owner.slices
        counts = [part.stop // self.ratio - part.start // self.ratio for part in slices]
        padded = F.pad(new, (0, 0, 0, max(counts) - new.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in slices]
        dist.all_gather(parts, padded, group=self.owner.group)
        return [(part[:, :n], own.start // self.ratio) for part, n, own in zip(parts, counts, slices, strict=True)]
