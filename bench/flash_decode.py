"""Decoding with packed weights of V4-Flash's or Pro's full layout, random values, experts on the card and in host memory.

    python bench/flash_decode.py --case 4096x1 4096x8 1000000x1 --out bench/results/flash_decode_h100.json
    python bench/flash_decode.py --layers 6 --case 4096x1 4096x32          # a slice that lies on the card alone

Every step is fed fresh random ids, because greedy text of random weights collapses onto few tokens and would flatter the
cache of experts. A figure is void when the measured hit rate is further than 2 points from the share of experts on the card.
The state of each sequence is filled with random rows instead of by a prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

from nautile.config import ModelConfig, RopeScaling
from nautile.engine.costs import weight_bytes
from nautile.engine.expert_dispatch import Dispatch, open_dispatch
from nautile.engine.gpu_runner import GPURunner
from nautile.engine.packed import card_memory, load_packed, random_packed
from nautile.engine.packed_weights import PackedWeights
from nautile.engine.placement import Budget, expert_bytes
from nautile.engine.plan import Piece, Plan
from nautile.engine.runner import TorchRunner
from nautile.state import PoolOptions, StatePool
from nautile.state.pages import Pages

WORKSPACE = 5 << 30  # bytes of the card for a step, its graphs, and the stacks of kernels that spill
TINY = {
    "vocab_size": 160, "hidden_size": 128, "num_attention_heads": 16, "head_dim": 128, "q_lora_rank": 128, "o_groups": 2,
    "o_lora_rank": 64, "sliding_window": 16, "index_n_heads": 16, "index_head_dim": 64, "index_topk": 64,
    "n_routed_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 128, "num_hash_layers": 1,
    "num_hidden_layers": 4, "compress_ratios": (0, 4, 128, 4, 0),
    "rope_scaling": RopeScaling(original_max_position_embeddings=256),
}  # fmt: skip


def configuration(options: argparse.Namespace) -> ModelConfig:
    """Of the checkpoint, or of the preset with the changes that were asked for."""
    if options.weights != "random":
        return ModelConfig.from_json(options.weights).replace(num_nextn_predict_layers=0)
    config = ModelConfig(**TINY) if options.model == "tiny" else ModelConfig.preset(options.model)
    config = config.replace(num_nextn_predict_layers=0)
    if options.layers:
        config = config.replace(num_hidden_layers=options.layers, num_hash_layers=min(options.layers, config.num_hash_layers))
    return config.replace(n_routed_experts=options.experts) if options.experts else config


def pool_options(context: int, batch: int) -> PoolOptions:
    blocks = batch * (-(-(context + 512) // 256))
    return PoolOptions(blocks=blocks, slots=batch, rows="packed", prefix_cache=False)


def state_bytes(config: ModelConfig, context: int, batch: int) -> int:
    """Bytes of the pool that ``decode`` runs in."""
    options = pool_options(context, batch)
    one = Pages(config, PoolOptions(blocks=1, slots=1, rows="packed"), "meta")
    return options.blocks * one.block_bytes + options.slots * one.slot_bytes


def fill_state(pages: Pages) -> None:
    """Random rows that are all numbers: payload below 2, powers of two near one."""
    for rows, row in ((pages.csa, None), (pages.hca, None), (pages.window, None), (pages.index, "key")):
        if not rows.numel():
            continue
        rows.view(-1).random_(0, 256)
        if row == "key":
            half = pages.config.index_head_dim // 2
            rows[..., half:] = 126
            continue
        plain = pages.config.head_dim - pages.config.qk_rope_head_dim
        rows[..., :plain].bitwise_and_(0xBF)
        rows[..., plain : plain + 2 * pages.config.qk_rope_head_dim].bitwise_and_(0x3F)
        rows[..., plain + 2 * pages.config.qk_rope_head_dim :] = 127


def decode(runner: GPURunner, pool: StatePool, context: int, batch: int, steps: int, warm: int) -> dict[str, float]:
    """Median seconds of a step of ``batch`` sequences of ``context`` tokens, fresh random ids in each."""
    vocabulary, rng = runner.weights.config.vocab_size, random.Random(batch)
    sequences = []
    for _ in range(batch):
        sequence = pool.open([0])
        pool.ensure(sequence, context)
        pool.append(sequence, [rng.randrange(vocabulary) for _ in range(context)])
        sequences.append(sequence)
    times = []
    dispatch = runner.dispatch
    for number in range(warm + steps):
        for sequence in sequences:
            pool.ensure(sequence, 1)
        plan = Plan(tuple(Piece(sequence, (rng.randrange(vocabulary),)) for sequence in sequences))
        if number == warm and dispatch is not None:
            dispatch.counts = type(dispatch.counts)()
        start = time.perf_counter()
        logits = runner.step(plan)
        if logits.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        for sequence, piece in zip(sequences, plan.pieces, strict=True):
            pool.append(sequence, piece.ids)
    parts = runner.host_times(batch, context).microseconds_a_layer() if dispatch is not None else {}
    if not bool(torch.isfinite(logits).all()):
        raise SystemExit("the logits are not finite: this run is void")
    for sequence in sequences:
        pool.release(sequence)
    timed = sorted(times[warm:])
    return {
        "median_ms": statistics.median(timed) * 1e3, "mean_ms": statistics.fmean(timed) * 1e3,
        "p90_ms": timed[int(len(timed) * 0.9)] * 1e3, "first_ms": times[0] * 1e3,
        "tokens_per_s": batch / statistics.fmean(timed),
        **{f"host_{name}_us_a_layer": value for name, value in parts.items()},
    }  # fmt: skip


def check(runner: GPURunner, pool: StatePool, prompt: int = 300, steps: int = 6) -> dict[str, float]:
    """Decode pieces against the ordinary modules on the same card and weights: two sequences of the same tokens."""
    rng, modules = random.Random(7), TorchRunner(runner.model, pool)
    ids = [rng.randrange(runner.weights.config.vocab_size) for _ in range(prompt + steps)]
    sequences, errors, same = [], [], 0
    for _ in range(2):
        sequence = pool.open([0])
        pool.ensure(sequence, prompt)
        modules.step(Plan((Piece(sequence, tuple(ids[:prompt]), "none"),)))
        pool.append(sequence, ids[:prompt])
        sequences.append(sequence)
    for token in ids[prompt:]:
        logits = []
        for sequence, one in zip(sequences, (runner, modules), strict=True):
            pool.ensure(sequence, 1)
            logits.append(one.step(Plan((Piece(sequence, (token,)),)))[0].double())
            pool.append(sequence, [token])
        errors.append(float((logits[0] - logits[1]).norm() / logits[1].norm()))
        same += int(logits[0].argmax() == logits[1].argmax())
    for sequence in sequences:
        pool.release(sequence)
    return {"relative_error": statistics.median(errors), "worst": max(errors), "same_argmax": same / steps}


def floor_bytes(config: ModelConfig, context: int, batch: int) -> float:
    """Bytes that a step must read: dense weights once, each chosen expert once (uniform routing), the state that is seen."""
    dense = weight_bytes(config, "stored").resident
    unique = config.n_routed_experts * (1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch)
    experts = config.num_hidden_layers * unique * expert_bytes(config)
    row = config.head_dim + config.qk_rope_head_dim + 8
    per = {0: 0, 4: min(config.index_topk, context // 4) * row + context // 4 * 68, 128: context // 128 * row}
    rows = sum(config.sliding_window * row + per[ratio] for ratio in config.layer_ratios)
    return dense + experts + batch * rows


def profile(runner: GPURunner, pool: StatePool, context: int, batch: int) -> list[tuple[str, float, int]]:
    """Card time by kernel of one step: (name, microseconds, launches)."""
    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        decode(runner, pool, context, batch, 1, 0)
    rows = [(event.key[:48], event.self_device_time_total, event.count) for event in recorded.key_averages()]
    return sorted(rows, key=lambda row: -row[1])[:24]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("flash", "pro", "tiny"), default="flash")
    parser.add_argument("--weights", default="random", help="random, or the directory of an official checkpoint")
    parser.add_argument("--layers", type=int, default=0, help="a slice of the first layers")
    parser.add_argument("--experts", type=int, default=0, help="other than the model's number of routed experts")
    parser.add_argument("--case", nargs="+", default=["4096x1"], help="context x batch, each a line of the result")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--warm", type=int, default=8)
    parser.add_argument("--card-gb", type=float, default=0, help="card memory to use; 0: what is free")
    parser.add_argument("--host-gb", type=float, default=120)
    threads = max(1, (os.cpu_count() or 2) - 1)
    parser.add_argument("--threads", type=int, default=threads, help="for host experts; 0: stream all")
    parser.add_argument("--bandwidth", type=float, default=3030, help="GB/s of the card, for floors")
    parser.add_argument("--check", action="store_true", help="compare with the modules first")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    return parser.parse_args()


def build(
    options: argparse.Namespace, cases: list[tuple[int, int]], device: torch.device
) -> tuple[PackedWeights, Dispatch | None, float]:
    """Weights, what serves their experts, and the seconds it took to allocate and fill them."""
    config = configuration(options)
    most = max(batch for _, batch in cases)
    state = max(state_bytes(config, context, batch) for context, batch in cases)
    on_card = device.type == "cuda"
    card = int(options.card_gb * 1e9) or (card_memory(device) if on_card else 1 << 30)
    budget = Budget(card, int(options.host_gb * 1e9), state, WORKSPACE if on_card else 0)
    began = time.perf_counter()
    random_values = options.weights == "random"
    weights = random_packed(config, budget, device) if random_values else load_packed(options.weights, budget, device)
    loaded, placement = time.perf_counter() - began, weights.store.placement
    host = placement.in_host * expert_bytes(config) / 1e9
    print(
        f"{options.model}: {placement.on_card:,} of {placement.on_card + placement.in_host:,} experts on the card "
        f"({placement.fraction:.1%}), dense {weights.nbytes / 1e9:.2f} GB, host {host:.1f} GB, state {state / 1e9:.2f} GB; "
        f"allocated and filled in {loaded:.1f} s", flush=True,
    )  # fmt: skip
    dispatch = open_dispatch(weights.store, options.threads, max(2, most))
    if dispatch is not None:
        link, cores = dispatch.speeds.link * 1e6, dispatch.speeds.host * 1e6
        start = dispatch.speeds.start * 1e6
        print(f"one expert: link {link:.0f} us, host {start:.0f} + {cores:.0f} us (both busy)", flush=True)
    return weights, dispatch, loaded


def measure(
    options: argparse.Namespace, weights: PackedWeights, dispatch: Dispatch | None, context: int, batch: int
) -> dict[str, object]:
    """One line of the result."""
    config, device = weights.config, weights.embed.device
    pool = StatePool(config, pool_options(context, batch), device)
    fill_state(pool.pages)
    runner = GPURunner(weights, pool, dispatch)
    row: dict[str, object] = {"context": context, "batch": batch, "layers": config.num_hidden_layers}
    row |= decode(runner, pool, context, batch, options.steps, options.warm)
    row["floor_ms"] = floor_bytes(config, context, batch) / options.bandwidth / 1e6
    if dispatch is not None:
        row |= {**asdict(dispatch.counts), "hit_rate": dispatch.counts.hit_rate}
        row["void"] = abs(dispatch.counts.hit_rate - weights.store.placement.fraction) > 0.02
    print(json.dumps(row), flush=True)
    if options.profile and device.type == "cuda":
        for name, micro, count in profile(runner, pool, context, batch):
            print(f"  {micro:9.0f} us {count:5d} x {name}", flush=True)
    return row


def main() -> None:
    options = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = [(int(context), int(batch)) for context, batch in (case.split("x") for case in options.case)]
    weights, dispatch, loaded = build(options, cases, device)
    if options.check:
        pool = StatePool(weights.config, pool_options(1024, 2), device)
        print("decode pieces against the modules:", json.dumps(check(GPURunner(weights, pool, dispatch), pool)), flush=True)
        del pool
    rows = [measure(options, weights, dispatch, context, batch) for context, batch in cases]
    if options.out:
        placement = weights.store.placement
        head = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "model": options.model,
            "resident_fraction": placement.fraction, "experts_on_card": placement.on_card,
            "experts_in_host": placement.in_host, "load_s": loaded,
            "seconds_an_expert": asdict(dispatch.speeds) if dispatch else None, "commit": options.commit,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "command": "python bench/flash_decode.py",
        }  # fmt: skip
        options.out.write_text(json.dumps({**head, "results": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
