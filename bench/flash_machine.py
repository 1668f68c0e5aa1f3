"""What the machine around a card can do for experts that are not on it: host reads, the link, both at once, products.

    python bench/flash_machine.py --out bench/results/flash_machine_h100.json

Everything is measured over more memory than any cache holds, with one expert of V4-Flash (13.4 MB in FP4) as the unit.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nautile.config import ModelConfig
from nautile.engine.placement import expert_bytes
from nautile.kernels.host import ExpertJob, HostTeam, host_fast_path, read_rate_words


def seconds(call: Callable[[], object], least: float = 0.5) -> float:
    """Time of one call: the best of several within ``least`` seconds."""
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < least:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def host_memory(size: int, pinned: bool) -> torch.Tensor:
    """Random bytes that are really there (memory nobody has written is read from one page of zeros)."""
    out = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    block = torch.randint(0, 256, (1 << 24,), dtype=torch.uint8)
    for start in range(0, size, 1 << 24):
        out[start : start + (1 << 24)] = block[: size - start]
    return out


def expert_rate(blobs: torch.Tensor, threads: int, config: ModelConfig, together: int) -> float:
    """GB/s of FP4 bytes through the host's products, ``together`` experts of one token at a time."""
    team = HostTeam(threads, config.hidden_size, config.moe_intermediate_size, config.swiglu_limit)
    x, out = torch.randn(1, config.hidden_size).bfloat16(), torch.empty(1, config.hidden_size)
    spent, done = 0.0, 0
    for first in range(0, len(blobs) - together, together):
        jobs = [ExpertJob(blobs[first + index].data_ptr(), 0, 1.0) for index in range(together)]
        start = time.perf_counter()
        team.start(jobs, x, out)
        team.wait()
        spent += time.perf_counter() - start
        done += together
    team.close()
    return done * blobs.shape[1] / spent / 1e9


def bf16_gemv(threads: int) -> float:
    """GB/s of torch's bfloat16 matrix-vector product."""
    torch.set_num_threads(threads)
    weights, x = torch.randn(24, 8192, 4096).bfloat16(), torch.randn(4096).bfloat16()
    return weights.nbytes / seconds(lambda: [torch.mv(w, x) for w in weights], 1.0) / 1e9


def with_copies(copy: Callable[[], float], call: Callable[[], float]) -> tuple[float, float]:
    """Rates of copying in the background and of something on the cores meanwhile. ``copy`` starts copies and gives bytes."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    copied = copy()
    end.record()
    rate = call()
    torch.cuda.synchronize()
    return copied / begin.elapsed_time(end) / 1e6, rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--experts", type=int, default=300, help="how many of 13.4 MB")
    options = parser.parse_args()
    config, threads = ModelConfig.preset("flash"), options.threads
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    found: dict[str, object] = {
        "cpu": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        "cores": os.cpu_count(), "threads": threads, "flags": [f for f in flags if f.startswith(("avx512", "amx"))],
        "host_experts_fast_path": host_fast_path(),
    }  # fmt: skip
    card = torch.cuda.is_available()
    data = host_memory(options.experts * expert_bytes(config), card).view(options.experts, -1)
    rates = {"host_read": data.nbytes / seconds(lambda: read_rate_words(data, threads)) / 1e9}
    for together in (1, 2, 4):
        rates[f"fp4_experts_{together}"] = expert_rate(data, threads, config, together)
    rates["torch_bf16_gemv"] = bf16_gemv(threads)
    if card:
        target = torch.empty_like(data[:32], device="cuda")

        def copy(rounds: int = 4) -> float:
            for first in [start for _ in range(rounds) for start in range(0, len(data) - 32, 32)]:
                target.copy_(data[first : first + 32], non_blocking=True)
            return rounds * len(range(0, len(data) - 32, 32)) * target.nbytes

        rates["link"], _ = with_copies(copy, lambda: 0.0)
        for name, call in (
            ("read", lambda: data.nbytes / seconds(lambda: read_rate_words(data, threads), 0.2) / 1e9),
            ("experts", lambda: expert_rate(data[:200], threads, config, 2)),
        ):
            rates[f"link_with_{name}"], rates[f"{name}_with_link"] = with_copies(copy, call)
    found["GBps"] = {name: round(rate, 1) for name, rate in rates.items()}
    found["device"] = torch.cuda.get_device_name() if card else "none"
    found["date"], found["commit"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), options.commit
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
