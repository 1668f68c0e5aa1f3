"""THE map of a checkpoint: which tensors a configuration has, how the official files store them, and what others call them.

Three layouts hold the same network:

- *official*: ``layers.0.attn.wq_a.weight``, one tensor per expert, FP8 and FP4 payloads with ``.scale`` beside them;
- *transformers*: ``model.layers.0.self_attn.q_a_proj.weight``, experts stacked as ``gate_up_proj`` and ``down_proj``;
- *hybrid*: what transformers' ``save_pretrained`` writes, official leaves behind ``model.`` (and two of them renamed).

Every other file of this room walks ``entries(config)``. Source: architecture notes, section 2.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from nautile.checkpoint.errors import CheckpointError
from nautile.config import ModelConfig

__all__ = [
    "Entry",
    "Layout",
    "Location",
    "Storage",
    "StoredTensor",
    "detect_layout",
    "entries",
    "locate",
    "scale_location",
    "scale_name",
    "stored_tensors",
    "target_shapes",
]

Layout = Literal["official", "transformers", "hybrid"]
Storage = Literal["bf16", "f32", "i64", "fp8", "fp4"]

TILE = 128  # FP8: one scale per 128 x 128 tile
GROUP = 32  # FP4: one scale per row and 32 inputs


@dataclass(frozen=True)
class Entry:
    """One tensor of the network as the official checkpoint cuts it: a matrix per expert, everything else whole."""

    name: str  # official
    shape: tuple[int, ...]  # of the values, not of the packed bytes
    storage: Storage  # in an official checkpoint
    target: str  # key of the state dict
    expert: int | None = None  # index in the first dimension of the target


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: what its safetensors header says."""

    name: str
    dtype: str  # safetensors' name: BF16, F32, I64, I8, F8_E4M3, F8_E8M0
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return _count(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Location:
    """Where an entry lies in a file: a tensor, or ``rows`` (start, stop) of element ``index`` of a stacked one."""

    name: str
    index: int | None = None
    rows: tuple[int, int] | None = None


ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E8M0": 1}


def entries(config: ModelConfig, expert_dtype: str | None = None) -> Iterator[Entry]:
    """Every tensor of the network, in the order of the layers. ``expert_dtype`` ("fp4", "fp8") overrides the config's."""
    d, n = config.hidden_size, config.hc_mult
    expert: Storage = "fp8" if (expert_dtype or config.expert_dtype) == "fp8" else "fp4"
    yield Entry("embed.weight", (config.vocab_size, d), "bf16", "embed.weight")
    for index, ratio in enumerate(config.layer_ratios):
        yield from _block(f"layers.{index}", config, ratio, index < config.num_hash_layers, expert)
    for index in range(config.num_nextn_predict_layers):
        yield from _mtp(f"mtp.{index}", config, expert)
    yield from _same("", ("norm.weight", (d,), "bf16"), *_collapse(n, d))
    if not config.tie_word_embeddings:
        yield Entry("head.weight", (config.vocab_size, d), "bf16", "head.weight")


def target_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor of the state dict (routed experts stacked)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries(config):
        stack = () if entry.expert is None else (config.n_routed_experts,)
        shapes[entry.target] = (*stack, *entry.shape)
    return shapes


def stored_tensors(entry: Entry) -> tuple[StoredTensor, ...]:
    """What an official file holds for an entry: the payload, and for FP8 and FP4 its scales.

    Raises CheckpointError when FP4 cannot hold the shape (inputs not a multiple of 32).
    """
    if entry.storage == "fp8":
        rows, columns = entry.shape
        scales = (-(-rows // TILE), -(-columns // TILE))
        return StoredTensor(entry.name, "F8_E4M3", entry.shape), StoredTensor(scale_name(entry.name), "F8_E8M0", scales)
    if entry.storage == "fp4":
        rows, columns = entry.shape
        if columns % GROUP:
            raise CheckpointError(
                f"{entry.name} has {columns} inputs; FP4 stores groups of {GROUP}: choose expert_dtype fp8 or another size"
            )
        payload = StoredTensor(entry.name, "I8", (rows, columns // 2))
        return payload, StoredTensor(scale_name(entry.name), "F8_E8M0", (rows, columns // GROUP))
    return (StoredTensor(entry.name, {"bf16": "BF16", "f32": "F32", "i64": "I64"}[entry.storage], entry.shape),)


def scale_name(name: str) -> str:
    """``layers.0.attn.wq_a.weight`` -> ``layers.0.attn.wq_a.scale``."""
    return name.removesuffix(".weight") + ".scale"


def detect_layout(names: Collection[str]) -> Layout:
    """Which layout a checkpoint with these tensor names has. Raises CheckpointError when it is none of the three."""
    if any(name.startswith("layers.") for name in names):
        return "official"
    inside = [name for name in names if name.startswith("model.layers.")]
    if any(".self_attn." in name for name in inside):
        return "transformers"
    if any(".attn." in name for name in inside):
        return "hybrid"
    shown = ", ".join(sorted(names)[:3]) or "none at all"
    raise CheckpointError(
        f"the tensor names ({shown}, ...) belong to no DeepSeek-V4 layout: expected layers.0.attn... (official) or "
        f"model.layers.0.self_attn... (transformers)"
    )


def locate(entry: Entry, layout: Layout) -> Location:
    """Where a checkpoint of this layout keeps the values (or the payload) of an entry."""
    if layout == "official":
        return Location(entry.name)
    if layout == "hybrid":
        return Location(_hybrid_name(entry.name))
    if entry.expert is not None:
        return _stacked(entry)
    return Location(_transformers_name(entry.name))


def scale_location(entry: Entry, layout: Layout) -> Location | None:
    """Where the scales of a quantised entry are; None where the layout has none (transformers' own names)."""
    if entry.storage not in ("fp8", "fp4") or layout == "transformers":
        return None
    return Location(scale_name(locate(entry, layout).name))


# The official names ------------------------------------------------------------------------------------------------

_Row = tuple[str, tuple[int, ...], Storage]


def _same(prefix: str, *rows: _Row) -> Iterator[Entry]:
    for leaf, shape, storage in rows:
        yield Entry(prefix + leaf, shape, storage, prefix + leaf)


def _collapse(n: int, d: int) -> tuple[_Row, ...]:
    return ("hc_head_fn", (n, n * d), "f32"), ("hc_head_base", (n,), "f32"), ("hc_head_scale", (1,), "f32")


def _block(name: str, config: ModelConfig, ratio: int, hashed: bool, expert: Storage) -> Iterator[Entry]:
    d, n = config.hidden_size, config.hc_mult
    mixes = (2 + n) * n
    yield from _attention(f"{name}.attn.", config, ratio)
    yield from _feed_forward(f"{name}.ffn.", config, hashed, expert)
    for site in ("attn", "ffn"):
        yield from _same(
            f"{name}.",
            (f"{site}_norm.weight", (d,), "bf16"),
            (f"hc_{site}_fn", (mixes, n * d), "f32"),
            (f"hc_{site}_base", (mixes,), "f32"),
            (f"hc_{site}_scale", (3,), "f32"),
        )


def _attention(prefix: str, config: ModelConfig, ratio: int) -> Iterator[Entry]:
    d, c, heads, rank = config.hidden_size, config.head_dim, config.num_attention_heads, config.q_lora_rank
    inner = config.o_groups * config.o_lora_rank
    yield from _same(
        prefix,
        ("attn_sink", (heads,), "f32"),
        ("wq_a.weight", (rank, d), "fp8"),
        ("q_norm.weight", (rank,), "bf16"),
        ("wq_b.weight", (heads * c, rank), "fp8"),
        ("wkv.weight", (c, d), "fp8"),
        ("kv_norm.weight", (c,), "bf16"),
        ("wo_a.weight", (inner, heads * c // config.o_groups), "fp8"),
        ("wo_b.weight", (d, inner), "fp8"),
    )
    if ratio:
        yield from _compressor(f"{prefix}compressor.", d, c, ratio)
    if ratio == 4:
        indexer, index_heads = f"{prefix}indexer.", config.index_n_heads
        yield from _same(
            indexer,
            ("wq_b.weight", (index_heads * config.index_head_dim, rank), "fp8"),
            ("weights_proj.weight", (index_heads, d), "bf16"),
        )
        yield from _compressor(f"{indexer}compressor.", d, config.index_head_dim, ratio)


def _compressor(prefix: str, d: int, dim: int, ratio: int) -> Iterator[Entry]:
    width = 2 * dim if ratio == 4 else dim  # CSA blocks overlap: every token speaks for two
    yield from _same(
        prefix,
        ("ape", (ratio, width), "f32"),
        ("wkv.weight", (width, d), "bf16"),
        ("wgate.weight", (width, d), "bf16"),
        ("norm.weight", (dim,), "bf16"),
    )


def _feed_forward(prefix: str, config: ModelConfig, hashed: bool, expert: Storage) -> Iterator[Entry]:
    d, count, inner = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    yield from _same(prefix, ("gate.weight", (count, d), "bf16"))
    if hashed:
        yield from _same(prefix, ("gate.tid2eid", (config.vocab_size, config.num_experts_per_tok), "i64"))
    else:
        yield from _same(prefix, ("gate.bias", (count,), "f32"))
    matrices = (("w1", (inner, d)), ("w2", (d, inner)), ("w3", (inner, d)))
    for index in range(count):
        for leaf, shape in matrices:
            yield Entry(f"{prefix}experts.{index}.{leaf}.weight", shape, expert, f"{prefix}experts.{leaf}", index)
    for leaf, shape in matrices:
        yield from _same(f"{prefix}shared_experts.", (f"{leaf}.weight", shape, "fp8"))


def _mtp(name: str, config: ModelConfig, expert: Storage) -> Iterator[Entry]:
    d = config.hidden_size
    yield from _block(name, config, 0, False, expert)
    projections: tuple[_Row, ...] = (("e_proj.weight", (d, d), "fp8"), ("h_proj.weight", (d, d), "fp8"))
    norms: tuple[_Row, ...] = tuple((f"{leaf}.weight", (d,), "bf16") for leaf in ("enorm", "hnorm", "norm"))
    yield from _same(f"{name}.", *projections, *norms, *_collapse(config.hc_mult, d))


# The names of transformers 5.23 ------------------------------------------------------------------------------------

_GLOBAL = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
_COMPRESSOR = {"wkv.": "kv_proj.", "wgate.": "gate_proj.", "ape": "position_bias", "norm.": "kv_norm."}
_LAYER = {
    "attn_norm.": "input_layernorm.",
    "ffn_norm.": "post_attention_layernorm.",
    **{f"hc_{site}_{leaf}": f"{site}_hc.{leaf}" for site in ("attn", "ffn") for leaf in ("fn", "base", "scale")},
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a.": "self_attn.q_a_proj.",
    "attn.q_norm.": "self_attn.q_a_norm.",
    "attn.wq_b.": "self_attn.q_b_proj.",
    "attn.wkv.": "self_attn.kv_proj.",
    "attn.kv_norm.": "self_attn.kv_norm.",
    "attn.wo_a.": "self_attn.o_a_proj.",
    "attn.wo_b.": "self_attn.o_b_proj.",
    **{f"attn.compressor.{ours}": f"self_attn.compressor.{theirs}" for ours, theirs in _COMPRESSOR.items()},
    **{f"attn.indexer.compressor.{ours}": f"self_attn.compressor.indexer.{theirs}" for ours, theirs in _COMPRESSOR.items()},
    "attn.indexer.wq_b.": "self_attn.compressor.indexer.q_b_proj.",
    "attn.indexer.weights_proj.": "self_attn.compressor.indexer.scorer.weights_proj.",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1.": "mlp.shared_experts.gate_proj.",
    "ffn.shared_experts.w2.": "mlp.shared_experts.down_proj.",
    "ffn.shared_experts.w3.": "mlp.shared_experts.up_proj.",
}


def _transformers_name(name: str) -> str:
    if name in _GLOBAL:
        return _GLOBAL[name]
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if match is None:
        raise CheckpointError(f"transformers has no place for {name}")
    index, leaf = match.groups()
    stem = leaf.removesuffix("weight")
    found = _LAYER.get(leaf)
    return f"model.layers.{index}.{found}" if found else f"model.layers.{index}.{_LAYER[stem]}weight"


def _stacked(entry: Entry) -> Location:
    """w1 is the first half of the rows of ``gate_up_proj``, w3 the second; w2 is ``down_proj``."""
    prefix, leaf = _transformers_experts(entry.target)
    if leaf == "w2":
        return Location(f"{prefix}.down_proj", entry.expert)
    inner = entry.shape[0]
    return Location(f"{prefix}.gate_up_proj", entry.expert, (0, inner) if leaf == "w1" else (inner, 2 * inner))


def _transformers_experts(target: str) -> tuple[str, str]:
    match = re.fullmatch(r"layers\.(\d+)\.ffn\.experts\.(w[123])", target)
    if match is None:
        raise CheckpointError(f"transformers has no place for {target}")
    return f"model.layers.{match[1]}.mlp.experts", match[2]


def _hybrid_name(name: str) -> str:
    if name == "head.weight":
        return name
    if name in _GLOBAL:
        return _GLOBAL[name]
    return "model." + name.replace(".attn.kv_norm.", ".attn.norm.")


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
