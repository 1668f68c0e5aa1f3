"""The C++ library from Python: its structures, a network's weights packed for it, and one step over tensors of a state pool.

What this file does not know: engines, plans, pools. Names of tensors are those of the official checkpoint with the routed
experts of a layer stacked, which is what ``Transformer.state_dict`` gives.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from nautile.config import ModelConfig
from nautile.kernels.native.build import NativeUnavailable, library_path

__all__ = ["Kinds", "NativeModel", "NativeStep", "StatePools", "features"]

_int, _double, _pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p

_SHAPE = (
    "vocabulary", "hidden", "layers", "heads", "head_dim", "rotated", "q_rank", "groups", "o_rank", "window", "index_heads",
    "index_dim", "index_topk", "experts", "chosen", "inner", "streams", "iterations", "main_kind", "output_kind", "expert_kind",
    "head_kind", "attention_kind", "index_kind", "quantise_kv", "quantise_index", "narrow",
)  # fmt: skip
_POOLS = ("csa", "index", "hca", "window", "csa_kv", "csa_gate", "index_kv", "index_gate", "hca_kv", "hca_gate")

# Field of LayerTensors in model.h -> name of the tensor in a layer.
_LAYER = {
    "attn_norm": "attn_norm.weight", "ffn_norm": "ffn_norm.weight",
    "attn_fn": "hc_attn_fn", "attn_base": "hc_attn_base", "attn_scale": "hc_attn_scale",
    "ffn_fn": "hc_ffn_fn", "ffn_base": "hc_ffn_base", "ffn_scale": "hc_ffn_scale",
    "wq_a": "attn.wq_a.weight", "q_norm": "attn.q_norm.weight", "wq_b": "attn.wq_b.weight", "wkv": "attn.wkv.weight",
    "kv_norm": "attn.kv_norm.weight", "wo_a": "attn.wo_a.weight", "wo_b": "attn.wo_b.weight", "sink": "attn.attn_sink",
    "ape": "attn.compressor.ape", "comp_wkv": "attn.compressor.wkv.weight", "comp_wgate": "attn.compressor.wgate.weight",
    "comp_norm": "attn.compressor.norm.weight",
    "index_wq_b": "attn.indexer.wq_b.weight", "index_weights": "attn.indexer.weights_proj.weight",
    "index_ape": "attn.indexer.compressor.ape", "index_wkv": "attn.indexer.compressor.wkv.weight",
    "index_wgate": "attn.indexer.compressor.wgate.weight", "index_norm": "attn.indexer.compressor.norm.weight",
    "gate": "ffn.gate.weight", "gate_bias": "ffn.gate.bias", "table": "ffn.gate.tid2eid",
    "w1": "ffn.experts.w1", "w3": "ffn.experts.w3", "w2": "ffn.experts.w2",
    "shared_w1": "ffn.shared_experts.w1.weight", "shared_w3": "ffn.shared_experts.w3.weight",
    "shared_w2": "ffn.shared_experts.w2.weight",
}  # fmt: skip
_GLOBAL = {
    "embed": "embed.weight", "head": "head.weight", "norm": "norm.weight", "fn": "hc_head_fn", "base": "hc_head_base",
    "scale": "hc_head_scale", "window_frequencies": "window_frequencies", "compressed_frequencies": "compressed_frequencies",
}  # fmt: skip
_PACKED = {  # copied into panels, so the originals need not stay
    "wq_a", "wq_b", "wkv", "wo_a", "wo_b", "comp_wkv", "comp_wgate", "index_wq_b", "index_weights", "index_wkv", "index_wgate",
    "gate", "w1", "w3", "w2", "shared_w1", "shared_w3", "shared_w2", "attn_fn", "ffn_fn", "head", "fn",
}  # fmt: skip


PARTS = ("projections", "compression", "indexer", "attention", "mixing", "experts", "head", "rest", "waiting")  # of clock.h


class _Shape(ctypes.Structure):
    _fields_: ClassVar = [(name, _int) for name in _SHAPE]


class _Numbers(ctypes.Structure):
    _fields_: ClassVar = [(name, _double) for name in ("eps", "norm_eps", "limit", "routed_scale")]


class _Layer(ctypes.Structure):
    _fields_: ClassVar = [(name, _pointer) for name in _LAYER]


class _Globals(ctypes.Structure):
    _fields_: ClassVar = [(name, _pointer) for name in _GLOBAL]


class _Pool(ctypes.Structure):
    _fields_: ClassVar = [("base", _pointer), ("first", _int), ("layer", _int), ("row", _int)]


class _Pools(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, _Pool) for name in _POOLS),
        *((name, _int) for name in ("row_type", "index_type", "block_tokens", "blocks")),
        ("version", _pointer),
    ]


class _Piece(ctypes.Structure):
    _fields_: ClassVar = [(name, _int) for name in ("slot", "start", "count", "wanted", "block_offset")]


@dataclass(frozen=True)
class Kinds:
    """How each kind of product reads its numbers: "float32"; "bfloat16" (weights and rows); or "split" (weights in bfloat16,
    rows as a high and a low bfloat16 part, 16 bits together). Indexer keys may also be "int8": bytes with a scale a key; or
    "sifted": float32 scores, but only of keys that bounds on their 8-bit scores do not rule out, which changes no choice."""

    main: str = "float32"  # what attention's queries and keys are made with
    output: str = "float32"  # its output projections
    experts: str = "float32"
    head: str = "float32"
    attention: str = "float32"
    index: str = "float32"
    narrow: bool = True  # keep weights in 8 or 4 bits where these stand for exactly the same numbers (AVX-512 only)

    NUMBER: ClassVar[Mapping[str, int]] = {"float32": 0, "bfloat16": 1, "split": 2, "int8": 3, "sifted": 4}

    def numbers(self) -> dict[str, int]:
        """The fields of Shape in model.h."""
        names = {"main_kind": self.main, "output_kind": self.output, "expert_kind": self.experts, "head_kind": self.head}
        names |= {"attention_kind": self.attention, "index_kind": self.index}
        return {"narrow": int(self.narrow), **{field: self.NUMBER[kind] for field, kind in names.items()}}


class _Library:
    """The loaded library with the types of its functions."""

    def __init__(self, path: Path) -> None:
        try:
            self.handle = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeUnavailable(f"the compiled kernels do not load: {error}") from error
        self.model = self._function("nautile_model", _pointer, [_pointer] * 5)
        self.free_model = self._function("nautile_free_model", None, [_pointer])
        self.weight_bytes = self._function("nautile_weight_bytes", _int, [_pointer])
        self.runner = self._function("nautile_runner", _pointer, [_pointer, _int, _pointer])
        self.free_runner = self._function("nautile_free_runner", None, [_pointer])
        self.step = self._function("nautile_step", _int, [_pointer, _pointer, _int, *[_pointer] * 5])
        self.parts = self._function("nautile_parts", None, [_pointer, _pointer])
        self.features = self._function("nautile_features", ctypes.c_char_p, [])

    def _function(self, name: str, result: type | None, arguments: list[type]) -> ctypes._NamedFuncPointer:
        function = getattr(self.handle, name)
        function.restype, function.argtypes = result, arguments
        return function  # type: ignore[no-any-return]


def features(path: Path | None = None) -> str:
    """The instruction sets that the kernels were compiled for. Raises NativeUnavailable."""
    text: bytes = _Library(path or library_path()).features()
    return text.decode()


class NativeModel:
    """A network's weights, packed. The originals may be freed afterwards."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], kinds: Kinds, path: Path | None = None) -> None:
        """Raises NativeUnavailable when the library cannot be built, or is not made for this shape."""
        _check(config)
        self.config, self.kinds = config, kinds
        self.library = _Library(path or library_path())
        self._kept: list[Tensor] = []
        scratch: list[Tensor] = []
        head = tensors["embed.weight"] if config.tie_word_embeddings else tensors["head.weight"]
        named = {**tensors, "head.weight": head}
        layers = (_Layer * config.num_hidden_layers)()
        for index in range(config.num_hidden_layers):
            self._point(layers[index], _LAYER, f"layers.{index}.", named, scratch)
        globals_ = _Globals()
        self._point(globals_, _GLOBAL, "", named, scratch)
        numbers = _Numbers(config.hc_eps, config.rms_norm_eps, config.swiglu_limit, config.routed_scaling_factor)
        ratios = (_int * config.num_hidden_layers)(*config.layer_ratios)
        shape = _shape(config, kinds)
        pointers = (ctypes.byref(part) for part in (shape, numbers, globals_, layers, ratios))
        self.handle: int | None = self.library.model(*pointers)
        if not self.handle:
            raise MemoryError("not enough memory to pack the weights")
        weakref.finalize(self, self.library.free_model, self.handle)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed matrices: what lies on an FP8 or FP4 grid takes 8 or 4 bits (``Kinds.narrow``)."""
        return int(self.library.weight_bytes(self.handle))

    def _point(
        self,
        record: ctypes.Structure,
        fields: Mapping[str, str],
        prefix: str,
        tensors: Mapping[str, Tensor],
        scratch: list[Tensor],
    ) -> None:
        """Set the pointers of a record; tensors that are read in place later are kept alive with the model."""
        for field, name in fields.items():
            tensor = tensors.get(prefix + name)
            if tensor is None:
                continue
            wide = tensor.detach().to("cpu", torch.int64 if field == "table" else torch.float32).contiguous()
            (scratch if field in _PACKED else self._kept).append(wide)
            setattr(record, field, wide.data_ptr())


@dataclass(frozen=True)
class StatePools:
    """The tensors of a state pool, as ``nautile.state.Pages`` lays them out: [first, layer, row, elements]."""

    tensors: Mapping[str, Tensor]
    block_tokens: int
    version: Tensor  # int64 [blocks], raised whenever rows of a block are written


class NativeStep:
    """Threads and scratch memory that run steps of one model over one pool. Not for two threads at a time."""

    def __init__(self, model: NativeModel, pools: StatePools, threads: int) -> None:
        """Raises NativeUnavailable when the pool's rows are neither float32 nor bfloat16 in host memory."""
        self.model = model
        self._pools, self._kept = _Pools(), dict(pools.tensors)
        for name in _POOLS:
            setattr(self._pools, name, _pool(name, pools.tensors[name]))
        types = [_row_type(name, pools.tensors[name]) for name in ("window", "index")]
        self._pools.row_type, self._pools.index_type = types
        self._pools.block_tokens, self._pools.blocks = pools.block_tokens, len(pools.version)
        self._pools.version, self._version = pools.version.data_ptr(), pools.version
        self.handle: int | None = model.library.runner(model.handle, threads, ctypes.byref(self._pools))
        if not self.handle:
            raise MemoryError("not enough memory for the native kernels' buffers")
        weakref.finalize(self, model.library.free_runner, self.handle)

    def run(
        self,
        pieces: Sequence[tuple[int, int, int, int]],
        ids: Sequence[int],
        blocks: Sequence[Sequence[int]],
        rows: int,
        streams: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Tensor:
        """pieces (slot, start, count, logits wanted: 0 none, 1 last, 2 all), their ids one after another, their block numbers
        -> float32 [rows, V]. The caller has checked every number: they become addresses.

        ``streams``: where the residual streams begin, instead of at the embedding, and where they go after the last layer;
        each float32 [tokens, n, d], contiguous, or None."""
        size = (len(ids), self.model.config.hc_mult, self.model.config.hidden_size)
        for tensor in streams:
            if tensor is not None and (tensor.shape != size or tensor.dtype != torch.float32 or not tensor.is_contiguous()):
                raise ValueError(f"streams are float32 {size}, contiguous; got {tensor.dtype} {tuple(tensor.shape)}")
        table, flat = (_Piece * len(pieces))(), array("q")
        for record, piece, numbers in zip(table, pieces, blocks, strict=True):
            record.slot, record.start, record.count, record.wanted = piece
            record.block_offset = len(flat)
            flat.extend(numbers)
        tokens, logits = array("q", ids), torch.empty(rows, self.model.config.vocab_size)
        failed = self.model.library.step(
            self.handle, table, len(pieces), tokens.buffer_info()[0], flat.buffer_info()[0],
            logits.data_ptr(), *(None if tensor is None else tensor.data_ptr() for tensor in streams),
        )  # fmt: skip
        if failed:
            raise MemoryError("not enough memory for the native kernels' buffers")
        return logits

    def parts(self) -> dict[str, float]:
        """Seconds of wall time in each part of a step (``PARTS``) since the last call, all threads counting alike."""
        seconds = (_double * len(PARTS))()
        self.model.library.parts(self.handle, seconds)
        return dict(zip(PARTS, seconds, strict=True))


def _shape(config: ModelConfig, kinds: Kinds) -> _Shape:
    sizes = {
        "vocabulary": config.vocab_size, "hidden": config.hidden_size, "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads, "head_dim": config.head_dim, "rotated": config.qk_rope_head_dim,
        "q_rank": config.q_lora_rank, "groups": config.o_groups, "o_rank": config.o_lora_rank, "window": config.sliding_window,
        "index_heads": config.index_n_heads, "index_dim": config.index_head_dim, "index_topk": config.index_topk,
        "experts": config.n_routed_experts, "chosen": config.num_experts_per_tok, "inner": config.moe_intermediate_size,
        "streams": config.hc_mult, "iterations": config.hc_sinkhorn_iters, "quantise_kv": config.fake_quant_kv,
        "quantise_index": config.fake_quant_indexer,
    }  # fmt: skip
    return _Shape(**sizes, **kinds.numbers())


def _check(config: ModelConfig) -> None:
    """Sizes that the kernels' fixed buffers and pairs of bfloat16 need."""
    slices = config.num_attention_heads * config.head_dim // config.o_groups
    rules = {
        "hc_mult at most 8": config.hc_mult <= 8,
        "head_dim, index_head_dim and q_lora_rank at most 4096": max(config.head_dim, config.index_head_dim, config.q_lora_rank)
        <= 4096,
        "qk_rope_head_dim at most 1024": config.qk_rope_head_dim <= 1024,
        "even head_dim and index_head_dim": config.head_dim % 2 == 0 and config.index_head_dim % 2 == 0 and slices % 2 == 0,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise NativeUnavailable(f"the native kernels need {'; '.join(broken)}")


def _pool(name: str, tensor: Tensor) -> _Pool:
    if tensor.device.type != "cpu" or (tensor.numel() and tensor.stride(-1) != 1):
        raise NativeUnavailable(f"the native kernels need the pool's {name} rows in host memory, one after another")
    first, layer, row = (stride * tensor.element_size() for stride in tensor.stride()[:3])
    return _Pool(tensor.data_ptr(), first, layer, row)


def _row_type(name: str, tensor: Tensor) -> int:
    types = {torch.float32: 0, torch.bfloat16: 1}
    if tensor.dtype not in types:
        raise NativeUnavailable(f'{name} rows are {tensor.dtype}; the native kernels read "float32" and "bfloat16" rows')
    return types[tensor.dtype]
