"""One token of one sequence on a CPU, in NumPy: the fast path below the modules, which stay the meaning.

A decode step of a small model is hundreds of operations on a few hundred numbers. Each costs 3 to 5 microseconds in PyTorch
and about 1 in NumPy, and one product with all of a layer's input projections costs less than seven: together four times the
tokens per second for nano. The state is the same object that the modules use, read and written through zero-copy views, so
prefill and decode may alternate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nautile.kernels.sinkhorn import sinkhorn_floats
from nautile.model.block import Block
from nautile.model.compressor import Compressor
from nautile.model.transformer import Transformer
from nautile.state import LayerState, Rows, State

__all__ = ["Array", "LayerArrays", "TailArrays", "TokenDecoder", "can_decode"]

Array = np.ndarray[Any, np.dtype[np.float32]]


class TailArrays(Protocol):
    """What a compressor keeps of its last tokens."""

    def push(self, kv: Array, gate: Array) -> None:
        """Take in the projections of one token."""

    def rows(self) -> tuple[Array, Array]:
        """The last 2m (CSA) or m (HCA) rows of both, in order of position; asked at the end of a block only."""


class LayerArrays(Protocol):
    """State of one layer of one sequence, as this decoder reads and writes it, whatever memory is behind it."""

    def push(self, kv: Array) -> Array:
        """Take in a window row; gives the rows of the last W positions, in any order."""

    @property
    def tail(self) -> TailArrays | None: ...
    @property
    def index_tail(self) -> TailArrays | None: ...
    @property
    def entries(self) -> Any: ...
    @property
    def index_keys(self) -> Any:
        """Like ``entries``: supports ``x[block] = row``, ``x[:count]`` and ``x[indices]``."""


def can_decode(model: Transformer) -> bool:
    """Whether this path computes what the modules would: float32 on the CPU, four streams, fake quantisation off."""
    weight, config = model.embed.weight, model.config
    quantised = config.fake_quant_kv or config.fake_quant_indexer
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and config.hc_mult == 4 and not quantised


class TokenDecoder:
    """Decodes with the weights of a model. Keeps views of them, so it stays right when they are changed in place; the input
    projections of attention are copied side by side (24 MB for nano)."""

    def __init__(self, model: Transformer) -> None:
        if not can_decode(model):
            raise ValueError("this decoder needs float32 weights on the CPU, four streams and fake quantisation off")
        self.config = model.config
        self.layers = [_Layer(block) for block in model.layers]  # type: ignore[arg-type]
        self.embed = _array(model.embed.weight)
        self.head = self.embed if model.head is None else _array(model.head.weight)
        self.norm = _array(model.norm.weight)
        self.collapse = (_array(model.hc_head_fn), _array(model.hc_head_base), model.hc_head_scale.item())
        self.frequencies = (_array(model.window_frequencies), _array(model.compressed_frequencies))

    def step(self, token: int, state: State) -> Tensor:
        """Append one token to a state of one float32 sequence; returns the logits after it, [1, V] float32.

        Raises ValueError when the token is outside the vocabulary, the state is not such a state, or it is full.
        """
        config, position = self.config, int(state.lengths[0])
        if state.batch_size != 1 or state.dtype != torch.float32:
            raise ValueError("the decoder takes a state of one sequence in float32")
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"token ids must lie in 0..{config.vocab_size - 1}, got {token}")
        if position >= config.max_position_embeddings:
            raise ValueError(f"position {position} is past max_position_embeddings={config.max_position_embeddings}")
        state.reserve(position + 1)
        layers = [_DenseLayer(layer, min(position + 1, config.sliding_window)) for layer in state.layers]
        logits = self.advance(token, position, layers)
        state.lengths = state.lengths + 1
        return logits

    def advance(self, token: int, position: int, layers: Sequence[LayerArrays]) -> Tensor:
        """The same on any memory: ``layers`` take in the token at ``position``; nothing is checked or counted."""
        config = self.config
        angles = [np.float32(position) * frequencies for frequencies in self.frequencies]
        here = _Here(token, position, [np.cos(angle) + 1j * np.sin(angle) for angle in angles], self.frequencies[1])
        streams = np.repeat(self.embed[token][None], config.hc_mult, axis=0)
        for layer, kept in zip(self.layers, layers, strict=True):
            streams = layer.step(streams, kept, here)
        fn, base, scale = self.collapse
        z = _projected(streams, fn, config.rms_norm_eps)
        pre = 1 / (1 + np.exp(-(scale * z + base))) + np.float32(config.hc_eps)
        hidden = _normalised(pre @ streams, self.norm, config.rms_norm_eps)
        return torch.from_numpy(self.head @ hidden).unsqueeze(0)


@dataclass(frozen=True)
class _Here:
    """The token being decoded. ``phases``: e^(i angle) of the window-only and the compressed rotation."""

    token: int
    position: int
    phases: list[Any]
    frequencies: Array


class _Layer:
    """One block's weights as arrays, and its step."""

    def __init__(self, block: Block) -> None:
        attention, config = block.attn, block.config
        self.config, self.ratio = config, attention.ratio
        self.sites = [
            (
                _array(getattr(block, f"hc_{site}_fn")),
                _array(getattr(block, f"hc_{site}_base")).tolist(),
                _array(getattr(block, f"hc_{site}_scale")).tolist(),
            )
            for site in ("attn", "ffn")
        ]
        self.norms = (_array(block.attn_norm.weight), _array(block.ffn_norm.weight))
        self.q_norm, self.kv_norm = _array(attention.q_norm.weight), _array(attention.kv_norm.weight)
        self.wq_b, self.wo_b = _array(attention.wq_b.weight), _array(attention.wo_b.weight)
        self.wo_a = _array(attention.wo_a.weight).reshape(config.o_groups, config.o_lora_rank, -1)
        self.sink = _array(attention.attn_sink)
        inputs = [attention.wq_a.weight, attention.wkv.weight]
        self.compressor = self.indexer = None
        if attention.compressor is not None:
            self.compressor = _Pool(attention.compressor)
            inputs += [attention.compressor.wkv.weight, attention.compressor.wgate.weight]
        if attention.indexer is not None:
            self.indexer = _Pool(attention.indexer.compressor)
            self.index_wq_b = _array(attention.indexer.wq_b.weight)
            inner = attention.indexer.compressor
            inputs += [inner.wkv.weight, inner.wgate.weight, attention.indexer.weights_proj.weight]
        self.inputs = np.concatenate([_array(weight) for weight in inputs])
        self.cuts = np.cumsum([len(weight) for weight in inputs])[:-1]
        self.moe = _Experts(block)

    def step(self, streams: Array, state: LayerArrays, here: _Here) -> Array:
        """Streams [n, d] of one token -> streams after this block."""
        for site, sublayer in enumerate((self._attention, self._moe)):
            pre, post, matrix = self._mixing(streams, site)
            x = _normalised(pre @ streams, self.norms[site], self.config.rms_norm_eps)
            streams = matrix.T @ streams + post[:, None] * sublayer(x, state, here)
        return streams

    def _moe(self, x: Array, state: LayerArrays, here: _Here) -> Array:
        return self.moe(x, here.token)

    def _mixing(self, streams: Array, site: int) -> tuple[Array, Array, Array]:
        fn, base, (scale_pre, scale_post, scale_mix) = self.sites[site]
        eps, exp = self.config.hc_eps, math.exp
        z = _projected(streams, fn, self.config.rms_norm_eps).tolist()
        pre = [1 / (1 + exp(-(scale_pre * z[k] + base[k]))) + eps for k in range(4)]
        post = [2 / (1 + exp(-(scale_post * z[k] + base[k]))) for k in range(4, 8)]
        rows = []
        for start in range(8, 24, 4):
            logits = [scale_mix * z[k] + base[k] for k in range(start, start + 4)]
            top = max(logits)
            weights = [exp(value - top) for value in logits]
            total = sum(weights)
            rows.append([weight / total + eps for weight in weights])
        matrix = sinkhorn_floats(rows, self.config.hc_sinkhorn_iters, eps)
        return np.array(pre, np.float32), np.array(post, np.float32), np.array(matrix, np.float32)

    def _attention(self, x: Array, state: LayerArrays, here: _Here) -> Array:
        config = self.config
        parts = np.split(self.inputs @ x, self.cuts)
        phase = here.phases[int(self.ratio != 0)]
        q_low = _normalised(parts[0], self.q_norm, config.rms_norm_eps)
        q = (self.wq_b @ q_low).reshape(config.num_attention_heads, config.head_dim)
        q *= 1 / np.sqrt((q * q).mean(-1, keepdims=True) + np.float32(config.rms_norm_eps))
        _rotate(q, phase)
        kv = _normalised(parts[1], self.kv_norm, config.rms_norm_eps)
        _rotate(kv, phase)
        near = state.push(kv)
        far = self._entries(parts, q_low, state, here)
        return self._output(self._softmax(q, near, far), phase)

    def _entries(self, parts: list[Array], q_low: Array, state: LayerArrays, here: _Here) -> Array | None:
        """The compressed entries that this query attends to, [n, c], in order of position; None without any."""
        if self.compressor is None or state.tail is None:
            return None
        count = (here.position + 1) // self.ratio
        entries = state.entries
        self.compressor.push(parts[2], parts[3], state.tail, entries, here)
        keys = None
        if self.indexer is not None and state.index_tail is not None:
            keys = state.index_keys
            self.indexer.push(parts[4], parts[5], state.index_tail, keys, here)
        if keys is None or count <= self.config.index_topk:
            found: Array | None = entries[:count] if count else None
            return found
        picked: Array = entries[self._picks(q_low, parts[6], keys[:count], here)]
        return picked

    def _picks(self, q_low: Array, weights: Array, keys: Array, here: _Here) -> Any:
        """Indices of the ``index_topk`` best entries, ties to the lowest index, ascending."""
        heads, dim = self.config.index_n_heads, self.config.index_head_dim
        q = (self.index_wq_b @ q_low).reshape(heads, dim)
        _rotate(q, here.phases[1])
        scores = (weights * np.float32(dim**-0.5 * heads**-0.5)) @ np.maximum(q @ keys.T, 0)
        return np.sort(np.argsort(-scores, kind="stable")[: self.config.index_topk])

    def _softmax(self, q: Array, near: Array, far: Array | None) -> Array:
        """sum of window rows and entries under one softmax with the sink, [H, c]."""
        split = len(near)
        logits = np.empty((len(q), split + (0 if far is None else len(far)) + 1), np.float32)
        np.matmul(q, near.T, out=logits[:, :split])
        if far is not None:
            np.matmul(q, far.T, out=logits[:, split:-1])
        logits *= np.float32(self.config.head_dim**-0.5)
        logits[:, -1] = self.sink
        logits -= logits.max(-1, keepdims=True)
        np.exp(logits, out=logits)
        out = logits[:, :split] @ near
        if far is not None:
            out += logits[:, split:-1] @ far
        out /= logits.sum(-1, keepdims=True)
        return out

    def _output(self, out: Array, phase: Any) -> Array:
        _rotate(out, phase.conj())
        slices = out.reshape(len(self.wo_a), -1)
        low = np.concatenate([weight @ part for weight, part in zip(self.wo_a, slices, strict=True)])
        result: Array = self.wo_b @ low
        return result


class _Pool:
    """A compressor's pooling: keeps the projections of each token and, at the end of a block, writes its entry."""

    def __init__(self, compressor: Compressor) -> None:
        self.ratio, self.overlap = compressor.ratio, compressor.overlap
        self.ape, self.norm, self.eps = _array(compressor.ape), _array(compressor.norm.weight), compressor.norm.eps

    def push(self, kv: Array, gate: Array, tail: TailArrays, entries: Any, here: _Here) -> None:
        """Take in one token; ``entries`` gets a row when the token completes a block."""
        tail.push(kv, gate)
        m, block = self.ratio, here.position // self.ratio
        if (here.position + 1) % m:
            return
        values, gates = tail.rows()
        scores = gates[-m:] + self.ape
        if self.overlap:
            dim = len(self.norm)
            own, own_scores, last = values[-m:, dim:], scores[:, dim:], values[-2 * m : -m, :dim]
            if block:
                last_scores = gates[-2 * m : -m, :dim] + self.ape[:, :dim]
                values, scores = np.concatenate((last, own)), np.concatenate((last_scores, own_scores))
            else:
                values, scores = own, own_scores
        weights = np.exp(scores - scores.max(0))
        entry = _normalised((weights * values).sum(0) / weights.sum(0), self.norm, self.eps)
        angle = np.float32(block * m) * here.frequencies
        _rotate(entry, np.cos(angle) + 1j * np.sin(angle))
        entries[block] = entry


class _Experts:
    """The MoE of one block."""

    def __init__(self, block: Block) -> None:
        moe, self.config = block.ffn, block.config
        self.gate = _array(moe.gate.weight)
        self.bias = None if moe.gate.bias is None else _array(moe.gate.bias)
        self.table = None if moe.gate.tid2eid is None else moe.gate.tid2eid.numpy()
        shared = moe.shared_experts
        self.shared = tuple(_array(layer.weight) for layer in (shared.w1, shared.w3, shared.w2))
        self.routed = tuple(_array(weight) for weight in (moe.experts.w1, moe.experts.w3, moe.experts.w2))

    def __call__(self, x: Array, token: int) -> Array:
        """x [d] -> [d]."""
        config, limit = self.config, np.float32(self.config.swiglu_limit)
        scores = np.sqrt(np.logaddexp(self.gate @ x, np.float32(0)))
        if self.table is not None:
            chosen = self.table[token].tolist()
        else:
            chosen = np.argsort(-(scores + self.bias), kind="stable")[: config.num_experts_per_tok].tolist()
        weights = scores[chosen]
        weights *= np.float32(config.routed_scaling_factor) / (weights.sum() + np.float32(1e-20))
        w1, w3, w2 = self.routed
        gate = np.stack([*(w1[expert] @ x for expert in chosen), self.shared[0] @ x])
        up = np.stack([*(w3[expert] @ x for expert in chosen), self.shared[1] @ x])
        np.minimum(gate, limit, out=gate)
        hidden = gate / (1 + np.exp(-gate)) * np.clip(up, -limit, limit)
        hidden[:-1] *= weights[:, None]
        out: Array = self.shared[2] @ hidden[-1]
        for row, expert in zip(hidden, chosen, strict=False):
            out += w2[expert] @ row
        return out


def _array(tensor: Tensor) -> Array:
    return tensor.detach().numpy()


def _projected(streams: Array, fn: Array, eps: float) -> Array:
    v = streams.reshape(-1)
    out: Array = (fn @ v) * np.float32(1 / math.sqrt(float(v @ v) / len(v) + eps))
    return out


def _normalised(x: Array, weight: Array, eps: float) -> Array:
    out: Array = x * np.float32(1 / math.sqrt(float(x @ x) / len(x) + eps)) * weight
    return out


def _rotate(x: Array, phase: Any) -> None:
    """Turn the pairs of the last 2 len(phase) dimensions of x [..., c] in place."""
    pairs = x[..., -2 * len(phase) :].view(np.complex64)
    pairs *= phase.astype(np.complex64, copy=False)


class _DenseLayer:
    """A layer of a dense state of one sequence; ``visible`` window rows exist after the token."""

    def __init__(self, layer: LayerState, visible: int) -> None:
        self.window, self.visible = layer.window, visible
        self.tail = None if layer.tail is None else _DenseTail(layer.tail.kv, layer.tail.gate)
        self.index_tail = None if layer.index_tail is None else _DenseTail(layer.index_tail.kv, layer.index_tail.gate)
        self.entries = None if layer.entries is None else layer.entries.numpy()[0]
        self.index_keys = None if layer.index_keys is None else layer.index_keys.numpy()[0]

    def push(self, kv: Array) -> Array:
        _push(self.window, kv)
        return _rows(self.window)[-self.visible :]


class _DenseTail:
    """A compressor's rows in a dense state."""

    def __init__(self, kv: Rows, gate: Rows) -> None:
        self.kv, self.gate = kv, gate

    def push(self, kv: Array, gate: Array) -> None:
        _push(self.kv, kv)
        _push(self.gate, gate)

    def rows(self) -> tuple[Array, Array]:
        return _rows(self.kv), _rows(self.gate)


def _push(rows: Rows, row: Array) -> None:
    """Append one row to a state's buffer."""
    if rows.end == rows.buffer.shape[1]:
        rows.buffer[:, : rows.size] = rows.rows().clone()
        rows.end = rows.size
    rows.buffer.numpy()[0, rows.end] = row
    rows.end += 1


def _rows(rows: Rows) -> Array:
    view: Array = rows.buffer.numpy()[0, rows.end - rows.size : rows.end]
    return view
