"""The independent reference: transformers' DeepseekV4ForCausalLM (eager, float32) with the weights of a state dict.

The renaming is written here from the published tensor names; the checkpoint code of ``src/nautile`` is not used.
"""

from __future__ import annotations

import re

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from nautile import ModelConfig

_SHARED_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "qk_rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window", "index_n_heads", "index_head_dim",
    "index_topk", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
    "num_hash_layers", "routed_scaling_factor", "swiglu_limit", "hc_mult", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps",
    "rope_theta", "compress_rope_theta", "max_position_embeddings", "num_nextn_predict_layers", "tie_word_embeddings",
)  # fmt: skip

_GLOBAL = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}

_COMPRESSOR = {"wkv.weight": "kv_proj.weight", "wgate.weight": "gate_proj.weight", "ape": "position_bias",
               "norm.weight": "kv_norm.weight"}  # fmt: skip

_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    **{f"hc_{site}_{leaf}": f"{site}_hc.{leaf}" for site in ("attn", "ffn") for leaf in ("fn", "base", "scale")},
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    **{f"attn.compressor.{ours}": f"self_attn.compressor.{theirs}" for ours, theirs in _COMPRESSOR.items()},
    **{f"attn.indexer.compressor.{ours}": f"self_attn.compressor.indexer.{theirs}" for ours, theirs in _COMPRESSOR.items()},
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.experts.w2": "mlp.experts.down_proj",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
}


def reference(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> DeepseekV4ForCausalLM:
    """A transformers model that holds exactly ``tensors`` (MTP left out: transformers has none)."""
    values = {name: getattr(config, name) for name in _SHARED_FIELDS}
    scaling = config.rope_scaling
    rope = None if scaling is None else {"type": "yarn", "factor": scaling.factor, "beta_fast": scaling.beta_fast,
                                         "beta_slow": scaling.beta_slow, "original_max_position_embeddings":
                                         scaling.original_max_position_embeddings}  # fmt: skip
    theirs = DeepseekV4Config(
        **values, compress_ratios=list(config.compress_ratios), rope_scaling=rope, attn_implementation="eager"
    )
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(theirs)
    model = model.to_empty(device="cpu").float().eval()
    for module in model.modules():  # buffers computed at construction (inverse frequencies) are not in the state dict
        if hasattr(module, "compute_default_rope_parameters"):
            module.__init__(theirs)
    missing, unexpected = model.load_state_dict(renamed(config, tensors), strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    left = set(missing) - tied
    assert not left, f"transformers parameters without a source: {sorted(left)}"
    assert not unexpected, f"tensors unknown to transformers: {sorted(unexpected)}"
    model.tie_weights()
    return model


def renamed(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict in transformers' names, gate and up projections stacked."""
    result = {}
    for name, value in tensors.items():
        if name.startswith("mtp."):
            continue
        if name in _GLOBAL:
            result[_GLOBAL[name]] = value
            continue
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        assert match, f"strange name {name}"
        layer, leaf = match.groups()
        if leaf == "ffn.experts.w1":
            result[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat(
                [value, tensors[f"layers.{layer}.ffn.experts.w3"]], dim=1
            )
        elif leaf != "ffn.experts.w3":
            result[f"model.layers.{layer}.{_LAYER[leaf]}"] = value
    return result
