"""Where a step's time goes on a CPU, part by part, against what memory and arithmetic allow. Used by decode_cpu.py.

The native library counts time by part itself. A floor is the larger of two times: the bytes a part must read at the measured
bandwidth, and its multiply-adds at the measured rate of matrix products. What lies in the caches is read faster than that
bandwidth, so a measured time may be below its floor.
"""

PARTS = ("projections", "indexer", "attention", "mixing", "experts", "head")


def measured(run, action, tokens, rounds=3):
    """Microseconds a token of every part of ``action``, which runs ``tokens`` tokens."""
    action()
    run.runner.parts()
    for _ in range(rounds):
        action()
    return {part: 1e6 * seconds / rounds / tokens for part, seconds in run.runner.parts().items()}


def table(parts, work, machine, dtype):
    """parts (microseconds a token) beside their floors: {part: {microseconds, floor_microseconds, bound}}."""
    rates = {"float32": machine["gflops"]["float32"], "bfloat16": machine["gflops"]["bfloat16"]}
    rates["int8"] = 2 * rates["bfloat16"]  # four bytes in each lane instead of two
    out = {}
    for part, microseconds in parts.items():
        out[part] = {"microseconds": microseconds}
        if part in work:
            read, operations, kind = work[part]
            memory = read / machine["read_gigabytes_per_second"] / 1e3
            arithmetic = operations / rates[kind or dtype] / 1e3
            bound = "memory" if memory >= arithmetic else "arithmetic"
            out[part] |= {"floor_microseconds": max(memory, arithmetic), "bound": bound}
    return out


# Bytes of one element as the native kernels keep it: codes with a byte for every 32 or 64 of them, or bfloat16 (storage.h).
FP4, FP8, BF16 = 17 / 32, 65 / 64, 2.0


def weight_bytes(config):
    """Bytes of weights by part that one token reads by itself, and of all experts; codes that the checkpoint has are kept."""
    coded, plain = _projections(config)
    layers, expert = config.num_hidden_layers, 3 * config.moe_intermediate_size * config.hidden_size
    streams = config.hc_mult * config.hidden_size
    return {
        "projections": FP8 * coded + BF16 * plain,
        "experts": layers * expert * (FP4 * config.num_experts_per_tok + FP8),
        "all experts": layers * expert * (FP4 * config.n_routed_experts + FP8),
        "mixing": 4 * 2 * layers * (2 + config.hc_mult) * config.hc_mult * streams,
        "head": BF16 * config.vocab_size * config.hidden_size,
    }


def active_bytes(config):
    """Bytes of weights that one decoded token reads."""
    return sum(size for part, size in weight_bytes(config).items() if part != "all experts")


def work(config, dtype, length, together, weights_once_in):
    """{part: (bytes, operations, type of the arithmetic or None)} of one token at ``length`` with ``together`` tokens a step,
    whose weights are read once in ``weights_once_in`` tokens."""
    size, terms = (4, 1) if dtype == "float32" else (2, 2)
    hidden, heads, width = config.hidden_size, config.num_attention_heads, config.head_dim
    csa, hca = config.layer_ratios.count(4), config.layer_ratios.count(128)
    layers, chosen = config.num_hidden_layers, config.num_experts_per_tok
    weights = {part: count / weights_once_in for part, count in weight_bytes(config).items()}
    projections = sum(_projections(config))
    expert = 3 * config.moe_intermediate_size * hidden
    entries = length // 4
    keys = layers * min(config.sliding_window, length) + csa * min(entries, config.index_topk) + hca * (length // 128)
    scored = csa * entries if entries > config.index_topk else 0
    key_bytes = config.index_head_dim + (12 if dtype == "float32" else 4)
    streams = config.hc_mult * hidden
    mixed = 2 * layers * (2 + config.hc_mult) * config.hc_mult * streams
    prefill = together >= 48
    return {
        "projections": (weights["projections"], 2 * terms * projections, None),
        "indexer": (0 if prefill else key_bytes * scored, 2 * config.index_n_heads * config.index_head_dim * scored, "int8"),
        "attention": (0 if prefill else size * width * keys, 4 * heads * width * keys, None),
        "mixing": (weights["mixing"], 2 * mixed + 4 * layers * 2 * config.hc_mult * streams, "float32"),
        "experts": (weights["all experts" if together > 1 else "experts"], 2 * layers * (chosen + 1) * expert, None),
        "head": (0, 0, None) if prefill else (weights["head"], 2 * config.vocab_size * hidden, None),
    }


def _projections(config):
    """Elements of all matrices of the attention sublayers: those in 8 bits, and the compressors' and the indexer's others."""
    hidden, heads, width, rank = config.hidden_size, config.num_attention_heads, config.head_dim, config.q_lora_rank
    index, own = config.index_head_dim, config.index_n_heads
    common = hidden * (rank + width) + rank * heads * width
    common += config.o_lora_rank * heads * width + config.o_groups * config.o_lora_rank * hidden
    csa, hca = config.layer_ratios.count(4), config.layer_ratios.count(128)
    coded = config.num_hidden_layers * common + csa * rank * own * index
    return coded, hca * 2 * hidden * width + csa * (4 * hidden * width + 4 * hidden * index + hidden * own)
