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


def work(config, dtype, length, together, weights_once_in):
    """{part: (bytes, operations, type of the arithmetic or None)} of one token at ``length`` with ``together`` tokens a step,
    whose weights are read once in ``weights_once_in`` tokens."""
    size, terms = (4, 1) if dtype == "float32" else (2, 2)
    hidden, heads, width = config.hidden_size, config.num_attention_heads, config.head_dim
    csa, hca = config.layer_ratios.count(4), config.layer_ratios.count(128)
    layers, chosen, all_experts = config.num_hidden_layers, config.num_experts_per_tok, config.n_routed_experts
    projections = _projections(config)
    expert = 3 * config.moe_intermediate_size * hidden
    present = all_experts if together > 1 else chosen
    entries = length // 4
    keys = layers * min(config.sliding_window, length) + csa * min(entries, config.index_topk) + hca * (length // 128)
    scored = csa * entries if entries > config.index_topk else 0
    key_bytes = config.index_head_dim + (12 if dtype == "float32" else 4)
    streams = config.hc_mult * hidden
    mixed = 2 * layers * (2 + config.hc_mult) * config.hc_mult * streams
    prefill = together >= 48
    return {
        "projections": (size * projections / weights_once_in, 2 * terms * projections, None),
        "indexer": (0 if prefill else key_bytes * scored, 2 * config.index_n_heads * config.index_head_dim * scored, "int8"),
        "attention": (0 if prefill else size * width * keys, 4 * heads * width * keys, None),
        "mixing": (4 * mixed / weights_once_in, 2 * mixed + 4 * layers * 2 * config.hc_mult * streams, "float32"),
        "experts": (size * layers * (present + 1) * expert / weights_once_in, 2 * layers * (chosen + 1) * expert, None),
        "head": (0, 0, None)
        if prefill
        else (size * config.vocab_size * hidden / weights_once_in, 2 * config.vocab_size * hidden, None),
    }


def _projections(config):
    """Elements of all matrices of the attention sublayers."""
    hidden, heads, width, rank = config.hidden_size, config.num_attention_heads, config.head_dim, config.q_lora_rank
    index, own = config.index_head_dim, config.index_n_heads
    common = hidden * (rank + width) + rank * heads * width
    common += config.o_lora_rank * heads * width + config.o_groups * config.o_lora_rank * hidden
    total = config.num_hidden_layers * common
    total += config.layer_ratios.count(128) * 2 * hidden * width
    return total + config.layer_ratios.count(4) * (4 * hidden * width + 4 * hidden * index + hidden * own + rank * own * index)
