"""What a model costs, from its configuration alone: bytes by kind, FLOPs by kind, and what fits where.

Every cost is a frozen dataclass whose fields are the terms of its formula; ``FORMULAS`` says each in words and symbols:
L context, m compression ratio of a layer, W window, c head_dim, r rotated dims, d hidden size, n streams, H heads, k experts
per token, E experts, T tokens of a prefill chunk, V vocabulary. Source: architecture notes, section 5; the precision weights
of FLOPs are inferred there from the published percentages.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from nautile.checkpoint.layout import Entry, entries, stored_tensors
from nautile.config import ModelConfig
from nautile.state import Rows
from nautile.state.formats import RowName, index_row_bytes, row_bytes

__all__ = [
    "Baselines",
    "DecodeFlops",
    "KVBytes",
    "Placement",
    "Plan",
    "PlanOptions",
    "WeightBytes",
    "WorkspaceBytes",
    "decode_flops",
    "gqa8_kv_bytes",
    "history_bytes",
    "kv_bytes",
    "make_plan",
    "parse_bytes",
    "parse_tokens",
    "place",
    "train_flops_per_token",
    "v32_decode_flops",
    "v32_kv_bytes",
    "weight_bytes",
    "workspace_bytes",
]

KVFormat = Literal["packed", "bf16", "fp32"]
WeightFormat = Literal["stored", "bf16", "fp32"]

_FP32 = 4
_ROWS: dict[KVFormat, RowName] = {"packed": "packed", "bf16": "bfloat16", "fp32": "float32"}


# Costs as data -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cost:
    """A sum of named terms."""

    FORMULAS: ClassVar[Mapping[str, str]] = {}

    def terms(self) -> dict[str, float]:
        """Name and amount of every term."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def total(self) -> float:
        """Sum of the terms."""
        return sum(self.terms().values())


@dataclass(frozen=True)
class WeightBytes(_Cost):
    """Bytes of the weights."""

    experts: int
    shared_experts: int
    attention: int
    routers: int
    streams: int
    embedding: int
    head: int
    mtp: int

    FORMULAS: ClassVar[Mapping[str, str]] = {
        "experts": "layers x E x 3 matrices: the routed experts (FP4: 1/2 byte + 1/32 scale an element)",
        "shared_experts": "layers x 3 matrices (FP8: 1 byte + 1/16384 scale an element)",
        "attention": "projections, compressors and indexers of every layer",
        "routers": "router matrices, biases, token-to-expert tables",
        "streams": "stream mappings (F32) and norms",
        "embedding": "V x d; only looked up",
        "head": "V x d; 0 when tied",
        "mtp": "the draft block with its own experts",
    }

    @property
    def resident(self) -> int:
        """What every token reads: all but routed experts, the embedding table and the draft block."""
        return self.shared_experts + self.attention + self.routers + self.streams + self.head


@dataclass(frozen=True)
class KVBytes(_Cost):
    """Bytes of the state of ``batch`` sequences of L tokens. History grows with L, the tail does not."""

    entries: int
    index_keys: int
    window: int
    tails: int
    index_tails: int
    spare: int

    FORMULAS: ClassVar[Mapping[str, str]] = {
        "entries": "layers with m > 0: floor(L / m) x row(c)",
        "index_keys": "CSA layers: floor(L / 4) x row(index_head_dim)",
        "window": "layers x W x row(c)",
        "tails": "CSA: 2 x 2m rows x 2c fp32; HCA: 2 x m rows x c fp32 (values and scores)",
        "index_tails": "CSA: 2 x 2m rows x 2 index_head_dim fp32",
        "spare": "in-memory state only: room behind every window and tail for appending without moving",
    }

    @property
    def history(self) -> int:
        """Bytes that grow with the context."""
        return self.entries + self.index_keys

    @property
    def tail(self) -> int:
        """Bytes that do not."""
        return self.window + self.tails + self.index_tails + self.spare


@dataclass(frozen=True)
class WorkspaceBytes(_Cost):
    """Bytes that a pass over a chunk of T tokens holds at once: an estimate, for kernels that reduce over heads as they go
    (the plain PyTorch code holds the scores of every head)."""

    streams: int
    attention: int
    index_scores: int
    experts: int
    logits: int

    FORMULAS: ClassVar[Mapping[str, str]] = {
        "streams": "T x n x d x 4 B, before and after a site",
        "attention": "T x H x c x 2 B: queries and outputs in bf16",
        "index_scores": "T x floor(L / 4) x 4 B: one CSA layer's scores",
        "experts": "T x (k + 1) x (2 x intermediate + d) x 2 B: gate, up and output rows",
        "logits": "batch x V x 4 B",
    }


@dataclass(frozen=True)
class _Flops(_Cost):
    """FLOPs of one decoded token. ``WEIGHTS`` turn them into equivalent FP8 FLOPs: precision and factor, inferred."""

    WEIGHTS: ClassVar[Mapping[str, tuple[str, float]]] = {}

    @property
    def weighted(self) -> float:
        """Equivalent FP8 FLOPs."""
        return sum(amount * self.WEIGHTS[name][1] for name, amount in self.terms().items())


@dataclass(frozen=True)
class DecodeFlops(_Flops):
    """V4: FLOPs of one decoded token at context L."""

    experts: float
    shared_experts: float
    attention: float
    compressors: float
    index_queries: float
    index_weights: float
    routers: float
    stream_mappings: float
    stream_mixing: float
    head: float
    core: float
    index_scores: float

    FORMULAS: ClassVar[Mapping[str, str]] = {
        "experts": "2 x layers x k x 3 x d x intermediate",
        "shared_experts": "2 x layers x 3 x d x intermediate",
        "attention": "2 x layers x (wq_a, wq_b, wkv, wo_a, wo_b)",
        "compressors": "2 x wkv and wgate of entries and indexer keys",
        "index_queries": "2 x CSA layers x q_lora_rank x index heads x index_head_dim",
        "index_weights": "2 x CSA layers x d x index heads",
        "routers": "2 x layers x d x E",
        "stream_mappings": "2 x (2 layers x (2 + n) n + n) x n d",
        "stream_mixing": "2 x (2 layers x (n + n^2) + n) x d: collapse and distribute",
        "head": "2 x V x d",
        "core": "2 x H x 2c x keys; keys = W, + min(topk, L / 4) in CSA, + L / 128 in HCA",
        "index_scores": "2 x CSA layers x index heads x index_head_dim x L / 4",
    }
    WEIGHTS: ClassVar[Mapping[str, tuple[str, float]]] = {
        "experts": ("fp4 x fp8", 1.0),
        "shared_experts": ("fp8", 1.0),
        "attention": ("fp8", 1.0),
        "compressors": ("bf16", 2.0),
        "index_queries": ("fp8", 1.0),
        "index_weights": ("bf16", 2.0),
        "routers": ("bf16", 2.0),
        "stream_mappings": ("fp32", 2.0),
        "stream_mixing": ("fp32", 2.0),
        "head": ("bf16", 2.0),
        "core": ("bf16", 2.0),
        "index_scores": ("fp4 x fp4", 0.5),
    }


@dataclass(frozen=True)
class V32Flops(_Flops):
    """DeepSeek-V3.2: FLOPs of one decoded token at context L."""

    linear_fp8: float
    linear_bf16: float
    core: float
    index_scores: float

    FORMULAS: ClassVar[Mapping[str, str]] = {
        "linear_fp8": "2 x active parameters stored in FP8",
        "linear_bf16": "2 x (head, routers, indexer weights)",
        "core": "2 x 128 heads x (576 + 512) x min(2048, L) x 61 layers",
        "index_scores": "2 x 64 heads x 128 x L x 61 layers",
    }
    WEIGHTS: ClassVar[Mapping[str, tuple[str, float]]] = {
        "linear_fp8": ("fp8", 1.0),
        "linear_bf16": ("bf16", 2.0),
        "core": ("bf16", 2.0),
        "index_scores": ("fp8", 1.0),
    }


# V4 ------------------------------------------------------------------------------------------------------------------


def weight_bytes(config: ModelConfig, dtype: WeightFormat = "stored") -> WeightBytes:
    """Bytes of the weights as the official files store them, or as ``load_model`` holds them in "bf16" or "fp32"."""
    sums = dict.fromkeys((field.name for field in dataclasses.fields(WeightBytes)), 0)
    for entry in entries(config):
        sums[_weight_kind(entry)] += _entry_bytes(entry, dtype)
    return WeightBytes(**sums)


def kv_bytes(config: ModelConfig, context: int, batch: int = 1, dtype: KVFormat = "packed") -> KVBytes:
    """Bytes of the state of ``batch`` sequences of ``context`` tokens.

    "packed": entries and window rows in FP8 with bf16 rotated dims and one scale byte per 64, padded to 8; indexer keys in
    FP4 with a scale byte per 32. "bf16" and "fp32": the in-memory ``State``, which allocates multiples of 128 tokens and
    spare rows. Compressor tails are fp32 everywhere.
    """
    if context < 0 or batch < 1:
        raise ValueError(f"context must not be negative and batch at least 1, got {context} and {batch}")
    ratios = config.layer_ratios
    csa, hca = ratios.count(4), ratios.count(128)
    c, ci, window = config.head_dim, config.index_head_dim, config.sliding_window
    in_memory = dtype != "packed"
    tokens = -(-context // 128) * 128 if in_memory else context
    rows = _ROWS[dtype]
    row, index_row = row_bytes(c, config.qk_rope_head_dim, rows), index_row_bytes(ci, rows)
    spare = Rows.SPARE if in_memory else 0
    widths = csa * 2 * 2 * c + hca * 2 * c + csa * 2 * 2 * ci  # fp32 elements of one row in every tail
    return KVBytes(
        entries=batch * (csa * (tokens // 4) + hca * (tokens // 128)) * row,
        index_keys=batch * csa * (tokens // 4) * index_row,
        window=batch * len(ratios) * window * row,
        tails=batch * 2 * (csa * 8 * 2 * c + hca * 128 * c) * _FP32,
        index_tails=batch * 2 * csa * 8 * 2 * ci * _FP32,
        spare=batch * spare * (len(ratios) * row + widths * _FP32),
    )


def history_bytes(config: ModelConfig, tokens: int, rows: RowName) -> int:
    """Bytes that ``tokens`` tokens of one sequence take in the blocks of a pool with rows of this format."""
    formats: dict[RowName, KVFormat] = {"float32": "fp32", "bfloat16": "bf16", "packed": "packed"}
    return kv_bytes(config, tokens, dtype=formats[rows]).history


def workspace_bytes(config: ModelConfig, context: int, chunk: int = 512, batch: int = 1) -> WorkspaceBytes:
    """Estimate of what a prefill pass over ``chunk`` tokens at the end of ``context`` holds beside weights and state."""
    n, d, inner = config.hc_mult, config.hidden_size, config.moe_intermediate_size
    has_indexer = 4 in config.layer_ratios
    return WorkspaceBytes(
        streams=2 * chunk * n * d * _FP32,
        attention=2 * chunk * config.num_attention_heads * config.head_dim * 2,
        index_scores=chunk * (context // 4) * _FP32 if has_indexer else 0,
        experts=chunk * (config.num_experts_per_tok + 1) * (2 * inner + d) * 2,
        logits=batch * config.vocab_size * _FP32,
    )


def decode_flops(config: ModelConfig, context: int, *, gathered: bool = True) -> DecodeFlops:
    """FLOPs (2 per multiply-add) of the token that brings a sequence to ``context`` tokens, MTP and embedding left out.

    ``gathered``: the core of CSA layers reads the selected entries only (fast kernels); False counts all entries, as the
    plain PyTorch code multiplies and then masks.
    """
    ratios = config.layer_ratios
    csa, hca = ratios.count(4), ratios.count(128)
    near, far = min(context, config.sliding_window), context // 4
    chosen = min(config.index_topk, far) if gathered else far
    keys = len(ratios) * near + csa * chosen + hca * (context // 128)
    n, d = config.hc_mult, config.hidden_size
    return DecodeFlops(
        **_linear_flops(config),
        stream_mixing=2.0 * (2 * len(ratios) * (n + n * n) + n) * d,
        core=2.0 * config.num_attention_heads * 2 * config.head_dim * keys,
        index_scores=2.0 * csa * config.index_n_heads * config.index_head_dim * far,
    )


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of training on one token, for MFU: three times the forward pass, averaged over the positions of a sequence.

    Useful work only: causal keys, selected entries, k experts, the MTP block when there is one, and the indexer where it
    has something to select (more entries than ``index_topk``). Recomputation and masked products do not count.
    """
    if sequence_length < 1:
        raise ValueError(f"a sequence has at least one token, got {sequence_length}")
    T, ratios, drafts = sequence_length, config.layer_ratios, config.num_nextn_predict_layers
    csa, hca = ratios.count(4), ratios.count(128)
    selecting = config.index_topk < T // 4
    linear = _linear_flops(config)
    if not selecting:
        linear["index_queries"] = linear["index_weights"] = 0.0
    forward = sum(linear.values()) + drafts * (_mtp_flops(config) + linear["head"])
    keys = (len(ratios) + drafts) * _mean_blocks(T, 1, config.sliding_window)
    keys += csa * _mean_blocks(T, 4, config.index_topk) + hca * _mean_blocks(T, 128)
    forward += 2.0 * config.num_attention_heads * 2 * config.head_dim * keys
    if selecting:
        forward += 2.0 * csa * config.index_n_heads * config.index_head_dim * _mean_blocks(T, 4)
    n = config.hc_mult
    forward += 2.0 * (2 * (len(ratios) + drafts) * (n + n * n) + n * (1 + drafts)) * config.hidden_size
    return 3.0 * forward


# Other models --------------------------------------------------------------------------------------------------------


def v32_kv_bytes(context: int, batch: int = 1) -> int:
    """DeepSeek-V3.2: 61 layers x (512 FP8 + 16 scales + 64 bf16 rotated, and a 128-dim FP8 indexer key + 4 scale bytes)."""
    return batch * context * 61 * (512 + 16 + 128 + 128 + 4)


def gqa8_kv_bytes(context: int, layers: int, batch: int = 1) -> int:
    """Grouped-query attention with 8 key-value heads of 128 in bf16: keys and values of every token and layer."""
    return batch * context * layers * 2 * 8 * 128 * 2


def v32_decode_flops(context: int) -> V32Flops:
    """DeepSeek-V3.2 at ``context``: 61 layers (3 dense), d 7168, 128 MLA heads, 8 of 256 experts and a shared one, DSA."""
    layers, dense, d, heads, rank, kv_rank = 61, 3, 7168, 128, 1536, 512
    attention = d * rank + rank * heads * 192 + d * (kv_rank + 64) + kv_rank * heads * 256 + heads * 128 * d
    indexer = rank * 64 * 128 + d * 128
    experts = 9 * 3 * d * 2048
    fp8 = layers * (attention + indexer) + (layers - dense) * experts + dense * 3 * d * 18432
    bf16 = 129280 * d + (layers - dense) * 256 * d + layers * 64 * d
    return V32Flops(
        linear_fp8=2.0 * fp8,
        linear_bf16=2.0 * bf16,
        core=2.0 * heads * (576 + 512) * min(2048, context) * layers,
        index_scores=2.0 * 64 * 128 * context * layers,
    )


# Plans ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanOptions:
    """What to plan for. Memory in bytes; None: not asked."""

    context: int = 1 << 20
    batch: int = 1
    chunk: int = 512
    weights: WeightFormat = "stored"
    kv: KVFormat = "packed"
    gpu_memory: int | None = None
    host_memory: int | None = None


@dataclass(frozen=True)
class Placement:
    """Where the bytes of one kind go; ``missing`` fit nowhere."""

    kind: str
    total: int
    gpu: int
    host: int
    missing: int


@dataclass(frozen=True)
class Baselines:
    """Costs at one context beside those of V3.2 and of a bf16 GQA-8 of the same depth (per sequence and token)."""

    context: int
    kv: int
    v32_kv: int
    gqa8_kv: int
    flops: float  # weighted
    v32_flops: float  # weighted

    @property
    def ratios(self) -> dict[str, float]:
        """This model's share of the others' costs."""
        return {
            "kv_of_v32": self.kv / self.v32_kv,
            "kv_of_gqa8": self.kv / self.gqa8_kv,
            "flops_of_v32": self.flops / self.v32_flops,
        }


@dataclass(frozen=True)
class Plan:
    """Everything ``nautile plan`` says."""

    options: PlanOptions
    weights: WeightBytes
    kv: KVBytes
    workspace: WorkspaceBytes
    flops: DecodeFlops
    baselines: tuple[Baselines, ...]
    placement: tuple[Placement, ...]
    expert_bytes: int  # one routed expert of one layer

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return int(self.weights.total + self.kv.total + self.workspace.total)

    @property
    def fits(self) -> bool | None:
        """Whether everything has a place; None when no memory was given."""
        return all(not row.missing for row in self.placement) if self.placement else None

    def to_json(self) -> dict[str, Any]:
        """Plain data: bytes and FLOPs by kind, placement, baselines."""
        flops = {
            name: {"flops": amount, "precision": self.flops.WEIGHTS[name][0], "weight": self.flops.WEIGHTS[name][1]}
            for name, amount in self.flops.terms().items()
        }
        return {
            "context": self.options.context,
            "batch": self.options.batch,
            "formats": {"weights": self.options.weights, "kv": self.options.kv},
            "bytes": {
                "total": self.total_bytes,
                "weights": self.weights.terms(),
                "kv_history": {"entries": self.kv.entries, "index_keys": self.kv.index_keys},
                "kv_tail": {name: getattr(self.kv, name) for name in ("window", "tails", "index_tails", "spare")},
                "workspace": self.workspace.terms(),
            },
            "flops_per_token": {"total": self.flops.total, "weighted": self.flops.weighted, "terms": flops},
            "precision_weights": "inferred from the published percentages",
            "baselines": [{**dataclasses.asdict(row), **row.ratios} for row in self.baselines],
            "placement": [dataclasses.asdict(row) for row in self.placement],
            "fits": self.fits,
        }


def make_plan(config: ModelConfig, options: PlanOptions) -> Plan:
    """All costs of a configuration, and, when memory is given, a place for them.

    Raises ValueError when the context is longer than the model's positions.
    """
    if not 1 <= options.context <= config.max_position_embeddings:
        raise ValueError(
            f"a context of {options.context:,} tokens: this model takes 1 to {config.max_position_embeddings:,} positions"
        )
    weights = weight_bytes(config, options.weights)
    kv = kv_bytes(config, options.context, options.batch, options.kv)
    workspace = workspace_bytes(config, options.context, min(options.chunk, options.context), options.batch)
    expert = sum(_entry_bytes(entry, options.weights) for entry in entries(config) if _is_first_expert(entry))
    contexts = sorted({options.context, min(1_000_000, config.max_position_embeddings)})
    plan = Plan(
        options=options,
        weights=weights,
        kv=kv,
        workspace=workspace,
        flops=decode_flops(config, options.context),
        baselines=tuple(_baselines(config, context, options.kv) for context in contexts),
        placement=(),
        expert_bytes=expert,
    )
    if options.gpu_memory is None and options.host_memory is None:
        return plan
    return dataclasses.replace(plan, placement=place(plan, options.gpu_memory or 0, options.host_memory or 0))


def place(plan: Plan, gpu: int, host: int) -> tuple[Placement, ...]:
    """Give every kind a place, what each token reads first; routed experts go whole to the GPU while there is room.

    The embedding table is only looked up, so it goes to the host first.
    """
    weights, kv = plan.weights, plan.kv
    free = {"gpu": gpu, "host": host}
    wanted = (
        ("workspace", int(plan.workspace.total), ("gpu", "host"), 1),
        ("KV tail", kv.tail, ("gpu", "host"), 1),
        ("attention and other dense weights", weights.resident, ("gpu", "host"), 1),
        ("KV history", kv.history, ("gpu", "host"), 1),
        ("MTP block", weights.mtp, ("gpu", "host"), 1),
        ("embedding table", weights.embedding, ("host", "gpu"), 1),
        ("experts", weights.experts, ("gpu", "host"), plan.expert_bytes),
    )
    rows = []
    for kind, total, order, unit in wanted:
        put = {"gpu": 0, "host": 0}
        for where in order:
            amount = min(total - sum(put.values()), free[where] // unit * unit)
            put[where] = amount
            free[where] -= amount
        rows.append(Placement(kind, total, put["gpu"], put["host"], total - sum(put.values())))
    return tuple(rows)


def parse_tokens(text: str) -> int:
    """A number of tokens: "1000000", "128K" (131,072), "1M" (1,048,576). Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KkMm]?)", text.strip().replace(",", "").replace("_", ""))
    if match is None:
        raise ValueError(f"{text!r} is no number of tokens; write 1000000, 128K or 1M")
    return int(float(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()])


def parse_bytes(text: str) -> int:
    """A number of bytes: "80GB" is 80e9, "80GiB" is 80 x 2^30; also KB, MB, TB, and plain bytes. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no amount of memory; write 80GB or 80GiB")
    power = "KMGT".index(match[2].upper()) + 1 if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


# Parts ---------------------------------------------------------------------------------------------------------------


def _weight_kind(entry: Entry) -> str:
    name = entry.name
    if name.startswith("mtp."):
        return "mtp"
    for kind, mark in (("experts", ".ffn.experts."), ("shared_experts", ".shared_experts."), ("routers", ".ffn.gate.")):
        if mark in name:
            return kind
    if name in ("embed.weight", "head.weight"):
        return "embedding" if name == "embed.weight" else "head"
    return "attention" if ".attn." in name else "streams"


def _entry_bytes(entry: Entry, dtype: WeightFormat) -> int:
    if dtype == "stored":
        return sum(tensor.nbytes for tensor in stored_tensors(entry))
    wide = entry.storage == "f32" or entry.target.endswith(".ffn.gate.weight")  # stays fp32 in a bf16 model
    size = 8 if entry.storage == "i64" else _FP32 if wide or dtype == "fp32" else 2
    return math.prod(entry.shape) * size


def _is_first_expert(entry: Entry) -> bool:
    return entry.expert == 0 and entry.name.startswith("layers.0.")


def _matrices(config: ModelConfig, mtp: bool) -> Iterator[Entry]:
    """Every matrix that multiplies a token, routers left out: those of a network that has only the k chosen experts."""
    for entry in entries(config.replace(n_routed_experts=config.num_experts_per_tok)):
        if len(entry.shape) != 2 or entry.storage == "i64" or entry.name == "embed.weight":
            continue
        if not entry.name.endswith((".ape", ".gate.weight")) and entry.name.startswith("mtp.") == mtp:
            yield entry


def _flop_kind(name: str) -> str:
    for kind, mark in (
        ("experts", ".ffn.experts."),
        ("shared_experts", ".shared_experts."),
        ("compressors", ".compressor."),
        ("index_queries", ".indexer.wq_b."),
        ("index_weights", ".indexer.weights_proj."),
        ("stream_mappings", "hc_"),
        ("head", "head.weight"),
    ):
        if mark in name:
            return kind
    return "attention"


def _linear_flops(config: ModelConfig) -> dict[str, float]:
    kinds = (
        "experts",
        "shared_experts",
        "attention",
        "compressors",
        "index_queries",
        "index_weights",
        "stream_mappings",
        "head",
    )
    sums = dict.fromkeys(kinds, 0.0)
    for entry in _matrices(config, mtp=False):
        sums[_flop_kind(entry.name)] += 2.0 * math.prod(entry.shape)
    if config.tie_word_embeddings:
        sums["head"] += 2.0 * config.vocab_size * config.hidden_size
    return {**sums, "routers": 2.0 * config.num_hidden_layers * config.hidden_size * config.n_routed_experts}


def _mtp_flops(config: ModelConfig) -> float:
    """Of the draft block's matrices; h_proj runs on every stream."""
    total = 2.0 * config.hidden_size * config.n_routed_experts
    for entry in _matrices(config, mtp=True):
        streams = config.hc_mult if entry.name.endswith(".h_proj.weight") else 1
        total += 2.0 * streams * math.prod(entry.shape)
    return total


def _mean_blocks(tokens: int, m: int, most: int | None = None) -> float:
    """Mean of min(most, floor(s / m)) over s = 1 .. tokens: the entries a causal query sees."""
    full = tokens // m
    if most is not None and full > most:
        return (m * most * (most - 1) / 2 + most * (tokens - m * most + 1)) / tokens
    return (m * full * (full - 1) / 2 + full * (tokens % m + 1)) / tokens


def _baselines(config: ModelConfig, context: int, dtype: KVFormat) -> Baselines:
    return Baselines(
        context=context,
        kv=int(kv_bytes(config, context, 1, dtype).total),
        v32_kv=v32_kv_bytes(context),
        gqa8_kv=gqa8_kv_bytes(context, config.num_hidden_layers),
        flops=decode_flops(config, context).weighted,
        v32_flops=v32_decode_flops(context).weighted,
    )
