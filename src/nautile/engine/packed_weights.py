"""A network's weights as an official checkpoint stores them: FP8, FP4 and bfloat16 bytes, laid out for a decode step.

Matrices that multiply the same vector lie below each other, so that one launch reads them. ``destinations`` says for every
tensor of an official checkpoint where its bytes belong; a loader writes there, and nothing is held twice. ``network`` gives
the ordinary modules over the same memory, for prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nautile.config import ModelConfig
from nautile.engine.expert_store import ExpertStore
from nautile.kernels.decode.linear import MOST_TOKENS, Matrix, decoded, linear, linear_reference
from nautile.kernels.decode.streams import Site
from nautile.model import Transformer
from nautile.model.moe import Routing
from nautile.model.rope import inverse_frequencies

__all__ = ["LayerWeights", "PackedNetwork", "PackedWeights", "network"]


@dataclass(frozen=True)
class CompressorWeights:
    """ape float32 [m, w], norm float32 [dim]."""

    ape: Tensor
    norm: Tensor


@dataclass(frozen=True)
class LayerWeights:
    """One layer. ``down``: wq_a and wkv; ``plain``: the compressors' projections and the index weights (bfloat16); ``up``:
    wq_b and the indexer's; ``shared_up``: w1 and w3 of the shared expert."""

    ratio: int
    attention: Site
    feed_forward: Site
    down: Matrix
    plain: Matrix | None
    up: Matrix
    q_norm: Tensor
    kv_norm: Tensor
    sink: Tensor
    wo_a: Matrix
    wo_b: Matrix
    compressor: CompressorWeights | None
    indexer: CompressorWeights | None
    gate: Matrix
    bias: Tensor | None
    table: Tensor | None
    shared_up: Matrix
    shared_down: Matrix


@dataclass(frozen=True)
class PackedWeights:
    """Everything but the routed experts, which ``store`` has."""

    config: ModelConfig
    layers: tuple[LayerWeights, ...]
    embed: Tensor  # bfloat16 [V, d]
    head: Matrix
    norm: Tensor
    collapse: tuple[Tensor, Tensor, Tensor]  # fn [n, n d], base [n], scale [1]
    store: ExpertStore

    @classmethod
    def allocate(cls, store: ExpertStore, device: torch.device) -> PackedWeights:
        """Unwritten memory for all of it. The draft block is left out."""
        config, new = store.config, _Allocator(device)
        n, d = config.hc_mult, config.hidden_size
        layers = tuple(_layer(new, config, index) for index in range(config.num_hidden_layers))
        embed = new.bf16(config.vocab_size, d)
        head = Matrix(embed) if config.tie_word_embeddings else Matrix(new.bf16(config.vocab_size, d))
        return cls(config, layers, embed, head, new.f32(d), (new.f32(n, n * d), new.f32(n), new.f32(1)), store)

    def destinations(self) -> Iterator[tuple[str, Tensor]]:
        """Name in an official checkpoint and the memory it belongs to, for every tensor but those of the draft block."""
        yield "embed.weight", self.embed
        if not self.config.tie_word_embeddings:
            yield "head.weight", self.head.data
        yield "norm.weight", self.norm
        yield from zip(("hc_head_fn", "hc_head_base", "hc_head_scale"), self.collapse, strict=True)
        for index, layer in enumerate(self.layers):
            for name, tensor in _names(layer, self.config):
                yield f"layers.{index}.{name}", tensor
            for expert in range(self.config.n_routed_experts):
                parts = self.store.parts(index, expert)
                for leaf, payload, scales in zip(("w1", "w3", "w2"), parts[::2], parts[1::2], strict=True):
                    stem = f"layers.{index}.ffn.experts.{expert}.{leaf}"
                    yield f"{stem}.weight", payload.view(torch.int8)
                    yield f"{stem}.scale", scales.view(torch.float8_e8m0fnu)

    @property
    def nbytes(self) -> int:
        """Bytes without routed experts."""
        seen = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self._tensors()}
        return sum(seen.values())

    def _tensors(self) -> Iterator[Tensor]:
        yield from (self.embed, self.head.data, self.norm, *self.collapse)
        for layer in self.layers:
            yield from (tensor for _, tensor in _names(layer, self.config))


@dataclass(frozen=True)
class _Allocator:
    device: torch.device

    def f32(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def bf16(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device)

    def fp8(self, rows: int, columns: int, groups: int = 1) -> Matrix:
        scales = torch.empty(-(-rows // 128), -(-columns // 128), dtype=torch.uint8, device=self.device)
        data = torch.empty(rows, columns, dtype=torch.uint8, device=self.device).view(torch.float8_e4m3fn)
        return Matrix(data, scales.view(torch.float8_e8m0fnu), groups)

    def site(self, config: ModelConfig) -> Site:
        n, d = config.hc_mult, config.hidden_size
        rows = (2 + n) * n
        constants = (config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps)
        return Site(self.f32(rows, n * d), self.f32(rows), self.f32(3), self.f32(d), *constants)


def _layer(new: _Allocator, config: ModelConfig, index: int) -> LayerWeights:
    ratio, hashed = config.layer_ratios[index], index < config.num_hash_layers
    d, c, rank, heads = config.hidden_size, config.head_dim, config.q_lora_rank, config.num_attention_heads
    inner, ci, index_heads = config.moe_intermediate_size, config.index_head_dim, config.index_n_heads
    _check(config)
    plain = {0: 0, 4: 4 * c + 4 * ci + index_heads, 128: 2 * c}[ratio]
    width = {0: 0, 4: 2 * c, 128: c}[ratio]
    return LayerWeights(
        ratio=ratio,
        attention=new.site(config),
        feed_forward=new.site(config),
        down=new.fp8(rank + c, d),
        plain=Matrix(new.bf16(plain, d)) if ratio else None,
        up=new.fp8(heads * c + (index_heads * ci if ratio == 4 else 0), rank),
        q_norm=new.f32(rank),
        kv_norm=new.f32(c),
        sink=new.f32(heads),
        wo_a=new.fp8(config.o_groups * config.o_lora_rank, heads * c // config.o_groups, config.o_groups),
        wo_b=new.fp8(d, config.o_groups * config.o_lora_rank),
        compressor=CompressorWeights(new.f32(ratio, width), new.f32(c)) if ratio else None,
        indexer=CompressorWeights(new.f32(4, 2 * ci), new.f32(ci)) if ratio == 4 else None,
        gate=Matrix(new.f32(config.n_routed_experts, d)),
        bias=None if hashed else new.f32(config.n_routed_experts),
        table=torch.empty(config.vocab_size, config.num_experts_per_tok, dtype=torch.int64, device=new.device)
        if hashed
        else None,
        shared_up=new.fp8(2 * inner, d),
        shared_down=new.fp8(d, inner),
    )


def _check(config: ModelConfig) -> None:
    """Stacked FP8 matrices begin at borders of tiles."""
    for name in ("q_lora_rank", "moe_intermediate_size"):
        if getattr(config, name) % 128:
            raise ValueError(f"packed weights need {name} to be a multiple of 128, got {getattr(config, name)}")
    if config.num_attention_heads * config.head_dim % 128 or config.hidden_size % 128:
        raise ValueError("packed weights need hidden_size and heads x head_dim to be multiples of 128")
    if not (config.fake_quant_kv and config.fake_quant_indexer):
        raise ValueError("packed weights run with packed rows: the model must have fake_quant_kv and fake_quant_indexer on")


def _split(layer: LayerWeights, config: ModelConfig) -> dict[str, Matrix]:
    """The checkpoint's matrices as parts of the stacked ones."""
    c, rank, ci, wide = config.head_dim, config.q_lora_rank, config.index_head_dim, config.num_attention_heads * config.head_dim
    inner = config.moe_intermediate_size
    parts = {
        "attn.wq_a": layer.down.rows(0, rank),
        "attn.wkv": layer.down.rows(rank, rank + c),
        "attn.wq_b": layer.up.rows(0, wide),
        "attn.wo_a": layer.wo_a,
        "attn.wo_b": layer.wo_b,
        "ffn.shared_experts.w1": layer.shared_up.rows(0, inner),
        "ffn.shared_experts.w3": layer.shared_up.rows(inner, 2 * inner),
        "ffn.shared_experts.w2": layer.shared_down,
        "ffn.gate": layer.gate,
    }
    if layer.plain is None:
        return parts
    width = 2 * c if layer.ratio == 4 else c
    parts["attn.compressor.wkv"] = layer.plain.rows(0, width)
    parts["attn.compressor.wgate"] = layer.plain.rows(width, 2 * width)
    if layer.ratio == 4:
        start = 2 * width
        parts["attn.indexer.compressor.wkv"] = layer.plain.rows(start, start + 2 * ci)
        parts["attn.indexer.compressor.wgate"] = layer.plain.rows(start + 2 * ci, start + 4 * ci)
        parts["attn.indexer.weights_proj"] = layer.plain.rows(start + 4 * ci, start + 4 * ci + config.index_n_heads)
        parts["attn.indexer.wq_b"] = layer.up.rows(wide, wide + config.index_n_heads * ci)
    return parts


def _names(layer: LayerWeights, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Name within the layer and memory of every tensor but the routed experts'."""
    for name, matrix in _split(layer, config).items():
        yield f"{name}.weight", matrix.data
        if matrix.scales is not None:
            yield f"{name}.scale", matrix.scales
    yield from _small(layer)


def _small(layer: LayerWeights) -> Iterator[tuple[str, Tensor]]:
    yield from (("attn.q_norm.weight", layer.q_norm), ("attn.kv_norm.weight", layer.kv_norm), ("attn.attn_sink", layer.sink))
    for name, site in (("attn", layer.attention), ("ffn", layer.feed_forward)):
        yield f"{name}_norm.weight", site.norm
        yield from ((f"hc_{name}_fn", site.fn), (f"hc_{name}_base", site.base), (f"hc_{name}_scale", site.scale))
    for name, owner in (("attn.compressor", layer.compressor), ("attn.indexer.compressor", layer.indexer)):
        if owner is not None:
            yield from ((f"{name}.ape", owner.ape), (f"{name}.norm.weight", owner.norm))
    if layer.bias is not None:
        yield "ffn.gate.bias", layer.bias
    if layer.table is not None:
        yield "ffn.gate.tid2eid", layer.table


# The modules over the same memory --------------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A ``Linear`` (or ``GroupedLinear``) over stored weights; many tokens multiply weights decoded for the occasion."""

    def __init__(self, matrix: Matrix, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix, self.dtype = matrix, dtype

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs] in x's dtype."""
        flat = x.reshape(-1, x.shape[-1]).to(self.dtype)
        if self.dtype == torch.float32:
            out = linear_reference(flat, self.matrix)
        elif flat.shape[0] <= MOST_TOKENS and flat.is_cuda:
            out = linear(flat, self.matrix)
        else:
            out = self._product(flat)
        return out.to(x.dtype).view(*x.shape[:-1], -1)

    def _product(self, flat: Tensor) -> Tensor:
        weight, groups = decoded(self.matrix, self.dtype), self.matrix.groups
        if groups == 1:
            return F.linear(flat, weight)
        slices = flat.unflatten(-1, (groups, -1)).transpose(0, 1)
        return torch.bmm(slices, weight.unflatten(0, (groups, -1)).transpose(1, 2)).transpose(0, 1).flatten(1)


class StoredExperts(nn.Module):
    """The routed experts of one layer, wherever they lie."""

    def __init__(self, store: ExpertStore, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.store, self.layer, self.dtype = store, layer, dtype

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """[N, d] -> [N, d]; see ``Experts``."""
        return self.store.run(self.layer, x.to(self.dtype), routing.experts, routing.weights).to(x.dtype)


class PackedEmbedding(nn.Module):
    """Rows of a bfloat16 table as float32: the residual streams are float32 throughout."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., d] float32."""
        return F.embedding(ids, self.weight).float()


class PackedNetwork(Transformer):
    """The modules over packed weights, which an engine runs with the packed runner. ``packed`` is set by ``network``."""

    packed: PackedWeights


def network(weights: PackedWeights, dtype: torch.dtype | None = None) -> PackedNetwork:
    """The modules over these weights, streams in float32; products in ``dtype``: bfloat16 on a card, float32 elsewhere."""
    config = weights.config.replace(num_nextn_predict_layers=0)
    dtype = dtype or (torch.bfloat16 if weights.embed.is_cuda else torch.float32)
    with torch.device("meta"):
        model = PackedNetwork(config)
    model.packed = weights
    state: dict[str, Tensor] = dict(zip(("hc_head_fn", "hc_head_base", "hc_head_scale"), weights.collapse, strict=True))
    state["norm.weight"] = weights.norm
    model.embed = PackedEmbedding(weights.embed)  # type: ignore[assignment]
    if model.head is not None:
        model.head = PackedLinear(weights.head, dtype)  # type: ignore[assignment]
    for index, layer in enumerate(weights.layers):
        for name, matrix in _split(layer, config).items():
            if name == "ffn.gate":
                state[f"layers.{index}.ffn.gate.weight"] = matrix.data
            else:
                parent, _, leaf = f"layers.{index}.{name}".rpartition(".")
                setattr(model.get_submodule(parent), leaf, PackedLinear(matrix, dtype))
        model.get_submodule(f"layers.{index}.ffn").experts = StoredExperts(weights.store, index, dtype)
        state |= {f"layers.{index}.{name}": tensor for name, tensor in _small(layer)}
    state["embed.weight"] = weights.embed
    model.load_state_dict(state, strict=True, assign=True)
    device = weights.embed.device
    model.window_frequencies = inverse_frequencies(config, compressed=False).to(device)
    model.compressed_frequencies = inverse_frequencies(config, compressed=True).to(device)
    return model.eval().requires_grad_(False)
