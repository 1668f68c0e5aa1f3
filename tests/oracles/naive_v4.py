"""DeepSeek-V4 a second time: float64, one token at a time, straight from the formulas, slow on purpose.

This file shares no code with ``src/nautile`` and must stay that way: it reads the configuration (plain numbers) and a
state dict (names of the official checkpoint, routed experts stacked) and nothing else. Every matrix product is a vector
product of one token. Ties go to the lowest index, in the indexer and in the router.

Notation: d hidden size, n streams, H heads, c head_dim, r rope dims (the last r of c), m compression ratio, t position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Vector = np.ndarray  # float64 [size]
Matrix = np.ndarray  # float64 [rows, columns]


@dataclass
class NaiveTrace:
    """What was decided on the way, by block name ("layers.2", "mtp.0"); one list element a token."""

    picks: dict[str, list[list[int]]] = field(default_factory=dict)  # CSA entries read by each query, ascending
    index_scores: dict[str, list[Vector]] = field(default_factory=dict)  # score of every visible entry
    experts: dict[str, list[list[int]]] = field(default_factory=dict)  # chosen experts, best first
    clamped: dict[str, int] = field(default_factory=dict)  # how many SwiGLU values met the limit
    margin: float = math.inf  # smallest gap between a chosen and a refused candidate (router or indexer)
    margin_at: str = ""


@dataclass
class NaiveOutput:
    logits: Matrix  # [T, V]
    streams: np.ndarray  # [T, n, d] trunk streams before the final collapse
    mtp_logits: Matrix | None  # [T - 1, V]: position t saw the streams of t and the embedding of token t + 1
    mtp_streams: np.ndarray | None  # [T - 1, n, d] the draft block's streams before its collapse
    trace: NaiveTrace


def run(config: Any, tensors: Mapping[str, torch.Tensor], ids: Sequence[int], *, mtp: bool = False) -> NaiveOutput:
    """The network over one sequence ``ids`` from position 0."""
    net = _Network(config, tensors)
    streams = [np.tile(net.weight("embed.weight")[token], (config.hc_mult, 1)) for token in ids]
    for layer in range(config.num_hidden_layers):
        streams = net.block(f"layers.{layer}", config.compress_ratios[layer], layer < config.num_hash_layers, streams, ids)
    logits = np.stack([net.readout("", X) for X in streams])
    drafts = net.draft(streams, ids) if mtp and len(ids) > 1 else []
    draft_logits = np.stack([net.readout("mtp.0.", X) for X in drafts]) if drafts else None
    return NaiveOutput(logits, np.stack(streams), draft_logits, np.stack(drafts) if drafts else None, net.trace)


class _Network:
    def __init__(self, config: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        self.config = config
        self.tensors = {name: value.detach().to("cpu") for name, value in tensors.items()}
        self.arrays: dict[str, np.ndarray] = {}
        self.trace = NaiveTrace()

    def weight(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            self.arrays[name] = self.tensors[name].to(torch.float64).numpy()
        return self.arrays[name]

    def norm(self, name: str, x: Vector) -> Vector:
        return self.weight(f"{name}.weight") * x / math.sqrt(np.mean(x * x) + self.config.rms_norm_eps)

    # one block -----------------------------------------------------------------------------------------------------

    def block(self, name: str, ratio: int, hashed: bool, streams: list[Matrix], ids: Sequence[int]) -> list[Matrix]:
        sites = [self.mix(f"{name}.hc_attn", X) for X in streams]
        inputs = [self.norm(f"{name}.attn_norm", pre @ X) for X, (pre, _, _) in zip(streams, sites, strict=True)]
        outputs = self.attention(f"{name}.attn", ratio, inputs)
        streams = [spread(X, y, post, M) for X, y, (_, post, M) in zip(streams, outputs, sites, strict=True)]
        result = []
        for t, X in enumerate(streams):
            pre, post, M = self.mix(f"{name}.hc_ffn", X)
            x = self.norm(f"{name}.ffn_norm", pre @ X)
            result.append(spread(X, self.experts(f"{name}.ffn", x, ids[t] if hashed else None), post, M))
        return result

    # residual streams ----------------------------------------------------------------------------------------------

    def mix(self, name: str, X: Matrix) -> tuple[Vector, Vector, Matrix]:
        """pre [n], post [n], M [n, n] (row = source, column = destination) of one site and token."""
        n, eps = self.config.hc_mult, self.config.hc_eps
        v = X.reshape(-1)
        z = self.weight(f"{name}_fn") @ v / math.sqrt(np.mean(v * v) + self.config.rms_norm_eps)
        s, b = self.weight(f"{name}_scale"), self.weight(f"{name}_base")
        pre = sigmoid(s[0] * z[:n] + b[:n]) + eps
        post = 2.0 * sigmoid(s[1] * z[n : 2 * n] + b[n : 2 * n])
        raw = (s[2] * z[2 * n :] + b[2 * n :]).reshape(n, n)
        M = np.exp(raw - raw.max(axis=1, keepdims=True))
        M = M / M.sum(axis=1, keepdims=True) + eps
        M = M / (M.sum(axis=0, keepdims=True) + eps)
        for _ in range(self.config.hc_sinkhorn_iters - 1):
            M = M / (M.sum(axis=1, keepdims=True) + eps)
            M = M / (M.sum(axis=0, keepdims=True) + eps)
        return pre, post, M

    def readout(self, prefix: str, X: Matrix) -> Vector:
        """Collapse the streams of one token, normalise, multiply by the head. ``prefix`` is "" or "mtp.0."."""
        v = X.reshape(-1)
        z = self.weight(f"{prefix}hc_head_fn") @ v / math.sqrt(np.mean(v * v) + self.config.rms_norm_eps)
        scale = self.weight(f"{prefix}hc_head_scale")[0]
        pre = sigmoid(scale * z + self.weight(f"{prefix}hc_head_base")) + self.config.hc_eps
        head = self.weight("embed.weight" if self.config.tie_word_embeddings else "head.weight")
        return head @ self.norm(f"{prefix}norm", pre @ X)

    # attention -----------------------------------------------------------------------------------------------------

    def attention(self, name: str, ratio: int, inputs: list[Vector]) -> list[Vector]:
        config = self.config
        theta = frequencies(config, compressed=ratio != 0)
        raw_keys = [self.quantise_kv(rotate(self.norm(f"{name}.kv_norm", self.weight(f"{name}.wkv.weight") @ x), t * theta))
                    for t, x in enumerate(inputs)]  # fmt: skip
        entries: list[Vector] = []
        index_keys: list[Vector] = []
        if ratio:
            entries = [self.quantise_kv(e) for e in self.compress(f"{name}.compressor", ratio, config.head_dim, inputs, theta)]
        if ratio == 4:
            found = self.compress(f"{name}.indexer.compressor", ratio, config.index_head_dim, inputs, theta)
            index_keys = [self.quantise_index(k) for k in found]
        outputs = []
        for t, x in enumerate(inputs):
            low_rank = self.norm(f"{name}.q_norm", self.weight(f"{name}.wq_a.weight") @ x)
            visible = list(range((t + 1) // ratio)) if ratio else []
            if ratio == 4:
                visible = self.select(name, x, low_rank, index_keys[: len(visible)], t * theta)
            keys = [raw_keys[j] for j in range(max(0, t - config.sliding_window + 1), t + 1)] + [entries[i] for i in visible]
            outputs.append(self.attend(name, low_rank, np.stack(keys), t * theta))
        return outputs

    def attend(self, name: str, low_rank: Vector, keys: Matrix, angles: Vector) -> Vector:
        config = self.config
        H, c = config.num_attention_heads, config.head_dim
        q = (self.weight(f"{name}.wq_b.weight") @ low_rank).reshape(H, c)
        sinks = self.weight(f"{name}.attn_sink")
        heads = []
        for h in range(H):
            query = rotate(q[h] / math.sqrt(np.mean(q[h] * q[h]) + config.rms_norm_eps), angles)
            scores = keys @ query / math.sqrt(c)
            top = max(scores.max(), sinks[h])
            weights = np.exp(scores - top)
            weights = weights / (weights.sum() + math.exp(sinks[h] - top))
            heads.append(rotate(weights @ keys, -angles))
        per_group, rank = H // config.o_groups, config.o_lora_rank
        wo_a = self.weight(f"{name}.wo_a.weight")
        inner = []
        for g in range(config.o_groups):
            part = np.concatenate(heads[g * per_group : (g + 1) * per_group])
            inner.append(wo_a[g * rank : (g + 1) * rank] @ part)
        return self.weight(f"{name}.wo_b.weight") @ np.concatenate(inner)

    def compress(self, name: str, m: int, c: int, inputs: list[Vector], theta: Vector) -> list[Vector]:
        """Entries of ``c`` dims from complete blocks of ``m`` tokens; rotated at the block's first token."""
        ape = self.weight(f"{name}.ape")
        values = [self.weight(f"{name}.wkv.weight") @ x for x in inputs]
        scores = [self.weight(f"{name}.wgate.weight") @ x + ape[t % m] for t, x in enumerate(inputs)]
        entries = []
        for i in range(len(inputs) // m):
            own = range(m * i, m * i + m)
            if m == 128:
                slots = [(values[t], scores[t]) for t in own]
            else:  # the first c columns speak for the next block, the last c for the token's own
                before = range(m * (i - 1), m * i) if i else ()
                slots = [(values[t][:c], scores[t][:c]) for t in before] + [(values[t][c:], scores[t][c:]) for t in own]
            v, s = np.stack([a for a, _ in slots]), np.stack([b for _, b in slots])
            e = np.exp(s - s.max(axis=0))
            entry = (e * v).sum(axis=0) / e.sum(axis=0)  # one softmax a channel
            entries.append(rotate(self.norm(f"{name}.norm", entry), m * i * theta))
        return entries

    def select(self, name: str, x: Vector, low_rank: Vector, keys: list[Vector], angles: Vector) -> list[int]:
        """The best ``index_topk`` visible entries of one query, ascending; ties to the lowest index."""
        config = self.config
        H, c = config.index_n_heads, config.index_head_dim
        q = (self.weight(f"{name}.indexer.wq_b.weight") @ low_rank).reshape(H, c)
        q = [self.quantise_index(rotate(q[h], angles)) for h in range(H)]
        w = self.weight(f"{name}.indexer.weights_proj.weight") @ x / math.sqrt(c) / math.sqrt(H)
        scores = [sum(w[h] * max(float(q[h] @ k), 0.0) for h in range(H)) for k in keys]
        order = sorted(range(len(keys)), key=lambda i: (-scores[i], i))
        chosen = order[: config.index_topk]
        block = name.removesuffix(".attn")
        if len(order) > config.index_topk:
            self._margin(f"{block} indexer", scores[chosen[-1]] - scores[order[config.index_topk]])
        self.trace.picks.setdefault(block, []).append(sorted(chosen))
        self.trace.index_scores.setdefault(block, []).append(np.array(scores))
        return sorted(chosen)

    def quantise_kv(self, k: Vector) -> Vector:
        plain = self.config.head_dim - self.config.qk_rope_head_dim
        if not self.config.fake_quant_kv:
            return k
        groups = [fake_e4m3(k[start : start + 64]) for start in range(0, plain, 64)]
        return np.concatenate([*groups, k[plain:]])

    def quantise_index(self, k: Vector) -> Vector:
        if not self.config.fake_quant_indexer:
            return k
        k = hadamard(k)
        return np.concatenate([fake_e2m1(k[start : start + 32]) for start in range(0, len(k), 32)])

    # experts -------------------------------------------------------------------------------------------------------

    def experts(self, name: str, x: Vector, token: int | None) -> Vector:
        """Routed and shared experts of one token; ``token`` is its id in a hash-routed layer, else None."""
        config = self.config
        p = np.sqrt(np.logaddexp(0.0, self.weight(f"{name}.gate.weight") @ x))
        block = name.removesuffix(".ffn")
        if token is None:
            biased = p + self.weight(f"{name}.gate.bias")
            order = sorted(range(len(p)), key=lambda e: (-biased[e], e))
            chosen = order[: config.num_experts_per_tok]
            if len(order) > len(chosen):
                self._margin(f"{block} router", biased[chosen[-1]] - biased[order[len(chosen)]])
        else:
            chosen = [int(e) for e in self.tensors[f"{name}.gate.tid2eid"][token]]
        self.trace.experts.setdefault(block, []).append(chosen)
        total = sum(p[e] for e in chosen)
        y = self.swiglu(block, x, *(self.weight(f"{name}.shared_experts.{w}.weight") for w in ("w1", "w2", "w3")))
        for e in chosen:
            matrices = (self.weight(f"{name}.experts.{w}")[e] for w in ("w1", "w2", "w3"))
            y = y + config.routed_scaling_factor * p[e] / total * self.swiglu(block, x, *matrices)
        return y

    def swiglu(self, block: str, x: Vector, w1: Matrix, w2: Matrix, w3: Matrix) -> Vector:
        limit = self.config.swiglu_limit
        gate, up = w1 @ x, w3 @ x
        hit = int((gate > limit).sum() + (np.abs(up) > limit).sum())
        self.trace.clamped[block] = self.trace.clamped.get(block, 0) + hit
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return w2 @ (gate * sigmoid(gate) * up)

    # drafts --------------------------------------------------------------------------------------------------------

    def draft(self, streams: list[Matrix], ids: Sequence[int]) -> list[Matrix]:
        """The T - 1 streams of the draft block: trunk streams of position t with the embedding of token t + 1."""
        mixed = []
        for t in range(len(ids) - 1):
            e = self.weight("mtp.0.e_proj.weight") @ self.norm("mtp.0.enorm", self.weight("embed.weight")[ids[t + 1]])
            h_proj = self.weight("mtp.0.h_proj.weight")
            mixed.append(np.stack([e + h_proj @ self.norm("mtp.0.hnorm", stream) for stream in streams[t]]))
        return self.block("mtp.0", 0, False, mixed, ids[1:])

    def _margin(self, where: str, gap: float) -> None:
        if gap < self.trace.margin:
            self.trace.margin, self.trace.margin_at = float(gap), where


# small algebra -----------------------------------------------------------------------------------------------------


def sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-x))


def spread(X: Matrix, y: Vector, post: Vector, M: Matrix) -> Matrix:
    """X'_k = post_k y + sum_j M_jk X_j."""
    n = len(post)
    return np.stack([post[k] * y + sum(M[j, k] * X[j] for j in range(n)) for k in range(n)])


def frequencies(config: Any, *, compressed: bool) -> Vector:
    """Angle a position for each of the r/2 pairs; YaRN only in layers that have a compressor."""
    r = config.qk_rope_head_dim
    base = config.compress_rope_theta if compressed else config.rope_theta
    theta = np.array([base ** (-2 * i / r) for i in range(r // 2)])
    scaling = config.rope_scaling
    if not compressed or scaling is None:
        return theta

    def pair_of(rotations: float) -> float:
        return r * math.log(scaling.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(pair_of(scaling.beta_fast)), 0), min(math.ceil(pair_of(scaling.beta_slow)), r - 1)
    width = high - low if high != low else 0.001
    ramp = np.array([min(max((i - low) / width, 0.0), 1.0) for i in range(r // 2)])
    return theta * (1 - ramp) + theta / scaling.factor * ramp


def rotate(x: Vector, angles: Vector) -> Vector:
    """Turn pairs (2i, 2i+1) of the last 2 * len(angles) dims."""
    start = len(x) - 2 * len(angles)
    y = x.copy()
    even, odd = x[start::2], x[start + 1 :: 2]
    y[start::2] = even * np.cos(angles) - odd * np.sin(angles)
    y[start + 1 :: 2] = even * np.sin(angles) + odd * np.cos(angles)
    return y


def hadamard(x: Vector) -> Vector:
    """Sylvester order: entry (i, j) is (-1)^popcount(i & j), over sqrt(size)."""
    size = len(x)
    if size not in _HADAMARD:
        _HADAMARD[size] = np.array([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])
    return _HADAMARD[size] @ x / math.sqrt(size)


_HADAMARD: dict[int, Matrix] = {}


def e4m3_value(code: int) -> float:
    """Positive OCP e4m3 codes 0..126: 4 exponent bits (bias 7), 3 mantissa bits, largest 448."""
    exponent, mantissa = code >> 3, code & 7
    return mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3 = np.array([e4m3_value(code) for code in range(127)])
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def nearest(table: Vector, x: Vector) -> Vector:
    """The table values nearest to |x| with x's sign; halfway goes to the even code (its index in the table)."""
    distance = np.abs(table[None, :] - np.abs(x)[:, None])
    codes = distance.argmin(axis=1)  # the lower of two equally near codes
    above = np.minimum(codes + 1, len(table) - 1)
    rows = np.arange(len(x))
    tie = (distance[rows, above] == distance[rows, codes]) & (above != codes)
    codes = np.where(tie & (codes % 2 == 1), above, codes)
    return np.copysign(table[codes], x)


def fake_e4m3(x: Vector) -> Vector:
    scale = 2.0 ** math.ceil(math.log2(max(np.abs(x).max(), 1e-4) / 448))
    return nearest(E4M3, x / scale) * scale


def fake_e2m1(x: Vector) -> Vector:
    scale = 2.0 ** math.ceil(math.log2(max(np.abs(x).max(), 6 * 2.0**-126) / 6))
    return nearest(E2M1, x / scale) * scale
