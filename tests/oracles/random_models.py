"""Small random networks for the comparisons: a configuration and every tensor of it, none left at a neutral value.

The names and shapes are those of the official checkpoint (routed experts stacked), written down here a second time so
that a wrong shape in the network shows up as an error and not as agreement.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from nautile import ModelConfig, Transformer
from nautile.config import RopeScaling

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 24,
    "o_groups": 2,
    "o_lora_rank": 16,
    "sliding_window": 16,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_hash_layers": 1,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
    "fake_quant_kv": False,
    "fake_quant_indexer": False,
    "rope_scaling": RopeScaling(factor=16.0, original_max_position_embeddings=256, beta_fast=32.0, beta_slow=1.0),
}


def tiny_config(schedule: tuple[int, ...] = (0, 0, 4, 128, 4), **changes: Any) -> ModelConfig:
    """A network of a few thousand parameters with the given compression ratios; an MTP entry follows them."""
    return ModelConfig(**{**TINY, "num_hidden_layers": len(schedule), "compress_ratios": (*schedule, 0), **changes})


def random_ids(config: ModelConfig, length: int, seed: int) -> torch.Tensor:
    """[length] int64 ids, uniform over the vocabulary."""
    return torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def random_tensors(config: ModelConfig, seed: int, *, gain: float = 1.0) -> dict[str, torch.Tensor]:
    """Every tensor of the network, float32 (tid2eid int64), scaled so that logits are of order one.

    ``gain`` multiplies the gate and up projections of all experts (large: the SwiGLU limit is met).
    """
    draw = _Draw(seed)
    d, V = config.hidden_size, config.vocab_size
    draw.normal("embed.weight", (V, d), 1.0)
    if not config.tie_word_embeddings:
        draw.linear("head.weight", V, d)
    draw.scale("norm.weight", d)
    _head(draw, "", config)
    for i in range(config.num_hidden_layers):
        _block(draw, f"layers.{i}", config, config.compress_ratios[i], i < config.num_hash_layers, gain)
    if config.num_nextn_predict_layers:
        _block(draw, "mtp.0", config, 0, False, gain)
        _head(draw, "mtp.0.", config)
        for name in ("e_proj", "h_proj"):
            draw.linear(f"mtp.0.{name}.weight", d, d)
        for name in ("enorm", "hnorm", "norm"):
            draw.scale(f"mtp.0.{name}.weight", d)
    return draw.tensors


def network(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> Transformer:
    """The network under test with exactly these tensors: a missing, unexpected or misshapen name is an error."""
    model = Transformer(config)
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def tiny_network(schedule: tuple[int, ...] = (0, 0, 4, 128, 4), seed: int = 0, **changes: Any) -> Transformer:
    """``tiny_config`` with ``random_tensors``."""
    config = tiny_config(schedule, **changes)
    return network(config, random_tensors(config, seed))


class _Draw:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, torch.Tensor] = {}

    def normal(self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> None:
        self.tensors[name] = torch.randn(shape, generator=self.generator) * std + mean

    def linear(self, name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        self.normal(name, (rows, columns), gain / math.sqrt(columns))

    def scale(self, name: str, size: int) -> None:
        self.tensors[name] = 0.5 + torch.rand((size,), generator=self.generator)


def _head(draw: _Draw, prefix: str, config: ModelConfig) -> None:
    n = config.hc_mult
    draw.linear(f"{prefix}hc_head_fn", n, n * config.hidden_size)
    draw.normal(f"{prefix}hc_head_base", (n,), 0.7)
    draw.normal(f"{prefix}hc_head_scale", (1,), 0.3, 1.0)


def _block(draw: _Draw, name: str, config: ModelConfig, ratio: int, hashed: bool, gain: float) -> None:
    d, n = config.hidden_size, config.hc_mult
    for site in ("attn", "ffn"):
        draw.scale(f"{name}.{site}_norm.weight", d)
        draw.linear(f"{name}.hc_{site}_fn", (2 + n) * n, n * d)
        draw.normal(f"{name}.hc_{site}_base", ((2 + n) * n,), 0.7)
        draw.normal(f"{name}.hc_{site}_scale", (3,), 0.3, 1.0)
    _attention(draw, f"{name}.attn", config, ratio)
    _experts(draw, f"{name}.ffn", config, hashed, gain)


def _attention(draw: _Draw, name: str, config: ModelConfig, ratio: int) -> None:
    d, H, c, low_rank = config.hidden_size, config.num_attention_heads, config.head_dim, config.q_lora_rank
    draw.normal(f"{name}.attn_sink", (H,), 1.0)
    draw.linear(f"{name}.wq_a.weight", low_rank, d)
    draw.linear(f"{name}.wq_b.weight", H * c, low_rank)
    draw.linear(f"{name}.wkv.weight", c, d)
    draw.linear(f"{name}.wo_a.weight", config.o_groups * config.o_lora_rank, H * c // config.o_groups)
    draw.linear(f"{name}.wo_b.weight", d, config.o_groups * config.o_lora_rank)
    draw.scale(f"{name}.q_norm.weight", low_rank)
    draw.scale(f"{name}.kv_norm.weight", c)
    if ratio:
        _compressor(draw, f"{name}.compressor", d, c, ratio)
    if ratio == 4:
        heads, dim = config.index_n_heads, config.index_head_dim
        draw.linear(f"{name}.indexer.wq_b.weight", heads * dim, low_rank)
        draw.linear(f"{name}.indexer.weights_proj.weight", heads, d)
        _compressor(draw, f"{name}.indexer.compressor", d, dim, ratio)


def _compressor(draw: _Draw, name: str, d: int, c: int, ratio: int) -> None:
    width = 2 * c if ratio == 4 else c
    draw.normal(f"{name}.ape", (ratio, width), 0.7)
    draw.linear(f"{name}.wkv.weight", width, d)
    draw.linear(f"{name}.wgate.weight", width, d)
    draw.scale(f"{name}.norm.weight", c)


def _experts(draw: _Draw, name: str, config: ModelConfig, hashed: bool, gain: float) -> None:
    d, E, inner = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    draw.linear(f"{name}.gate.weight", E, d)
    if hashed:
        order = torch.rand((config.vocab_size, E), generator=draw.generator).argsort(dim=1)
        draw.tensors[f"{name}.gate.tid2eid"] = order[:, : config.num_experts_per_tok].contiguous()
    else:
        draw.normal(f"{name}.gate.bias", (E,), 0.2)
    draw.normal(f"{name}.experts.w1", (E, inner, d), gain / math.sqrt(d))
    draw.normal(f"{name}.experts.w3", (E, inner, d), gain / math.sqrt(d))
    draw.normal(f"{name}.experts.w2", (E, d, inner), 1 / math.sqrt(inner) / gain)
    draw.linear(f"{name}.shared_experts.w1.weight", inner, d, gain)
    draw.linear(f"{name}.shared_experts.w3.weight", inner, d, gain)
    draw.linear(f"{name}.shared_experts.w2.weight", d, inner, 1 / gain)
