"""Small networks of Flash's shape (FP8 and FP4 weights, packed rows) for tests of the packed path."""

import torch

from nautile.config import ModelConfig, RopeScaling
from nautile.engine import expert_dispatch
from nautile.engine.expert_store import ExpertStore
from nautile.engine.fill import fill_random
from nautile.engine.packed_weights import PackedWeights
from nautile.engine.placement import Budget, dense_bytes, expert_bytes, place_experts

SHAPE = {
    "vocab_size": 160, "hidden_size": 128, "num_attention_heads": 16, "head_dim": 128, "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_groups": 2, "o_lora_rank": 64, "sliding_window": 16, "index_n_heads": 16, "index_head_dim": 64, "index_topk": 64,
    "n_routed_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 128, "num_hash_layers": 1,
    "max_position_embeddings": 8192, "num_nextn_predict_layers": 0,
    "rope_scaling": RopeScaling(original_max_position_embeddings=256),
}  # fmt: skip


def flash_config(schedule=(0, 4, 128, 4), **changes):
    return ModelConfig(**{**SHAPE, "num_hidden_layers": len(schedule), "compress_ratios": (*schedule, 0), **changes})


def budget(config, experts_on_card, staging=8):
    """Room for exactly so many experts on the card, and for all others in host memory."""
    everything = config.num_hidden_layers * config.n_routed_experts
    staging = max(0, min(staging, everything - experts_on_card - 1))  # with more, everything would lie on the card
    card = dense_bytes(config) + (experts_on_card + staging) * expert_bytes(config)
    return Budget(card, (everything - experts_on_card) * expert_bytes(config), 0, 0, staging)


def packed(config, experts_on_card=10**6, seed=0, staging=8, device="cpu"):
    """Random packed weights with so many experts on the card."""
    everything = config.num_hidden_layers * config.n_routed_experts
    placement = place_experts(config, budget(config, min(experts_on_card, everything), staging))
    weights = PackedWeights.allocate(ExpertStore(placement, torch.device(device)), torch.device(device))
    fill_random(weights, seed)
    return weights


def measure_and_forget(monkeypatch):
    """Speeds are measured, and then both are called the same: how fast the machine is at this moment must not say which experts
    are computed on the host, whose sums are rounded otherwise."""
    measured = expert_dispatch.measured_speeds

    def same(store, team):
        assert measured(store, team).link > 0
        return expert_dispatch.Speeds(1.0, 1.0)

    monkeypatch.setattr(expert_dispatch, "measured_speeds", same)
