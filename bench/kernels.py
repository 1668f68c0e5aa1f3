"""Kernels of V4-Flash's shape on one GPU beside their floors: one line an op, JSON for the record.

    python bench/kernels.py --out bench/results/kernels_h100.json

Peers (FlashMLA, DeepGEMM) are not timed here yet. Times are medians of CUDA-graph replays over several input sets, so that no
cache flatters them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nautile.kernels.fp4_experts import FP4Experts, fp4_experts, fp4_experts_reference
from nautile.kernels.index_select import index_scores_reference, index_select, index_select_reference
from nautile.kernels.sparse_attention import RowPool, sparse_attention, sparse_attention_reference
from nautile.quant import mxfp4

HEADS, C, ROW = 64, 512, 584


def median_us(calls: list[Callable[[], object]], rounds: int = 30) -> float:
    """Median time of one call in microseconds. ``calls`` do the same on different inputs; each is one graph."""
    graphs = []
    for call in calls:
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graphs.append(graph)
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for graph in graphs:
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(graphs))
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """Copy bandwidth in GB/s (read plus written) and bf16 product rate in TFLOP/s of this card."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = median_us([lambda: target.copy_(source)], 10)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = median_us([lambda: torch.mm(a, b, out=out)], 10)
    return {"copy_GBps": 2 * source.nbytes / copy / 1e3, "bf16_TFLOPS": 2 * 8192**3 / product / 1e6}


def new_pool(rows: int) -> RowPool:
    """Packed rows of random values."""
    data = torch.zeros(rows, ROW, dtype=torch.uint8, device="cuda")
    data[:, :448] = (torch.randn(rows, 448, device="cuda") * 20).to(torch.float8_e4m3fn).view(torch.uint8)
    data[:, 448:576] = torch.randn(rows, 64, device="cuda").bfloat16().view(torch.uint8)
    data[:, 576:583] = torch.randint(119, 125, (rows, 7), device="cuda", dtype=torch.uint8)
    return RowPool(data.flatten(), ROW, C, 64)


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - ref|| / ||ref||."""
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def attention(tokens: int, far_count: int, far_rows: int, tiles: int, sets: int = 3) -> dict[str, float]:
    """128 window rows and ``far_count`` of ``far_rows`` entries a query."""
    calls, wrong = [], 0.0
    sink = torch.randn(HEADS, device="cuda")
    for _ in range(sets):
        near, far = new_pool(max(1024, 128 * tokens) if tokens <= 128 else 4096 + 128), new_pool(far_rows)
        q = torch.randn(tokens, HEADS, C, device="cuda", dtype=torch.bfloat16)
        near_ids = torch.randint(0, near.data.numel() // ROW, (tokens, 128), dtype=torch.int32, device="cuda")
        far_ids = torch.randint(0, far_rows, (tokens, far_count), dtype=torch.int32, device="cuda")
        calls.append(
            lambda q=q, n=near, i=near_ids, f=far, j=far_ids: sparse_attention(q, n, i, f, j, sink, tiles_per_split=tiles)
        )
        some = slice(0, 4)
        reference = sparse_attention_reference(q[some].double(), near, near_ids[some], far, far_ids[some], sink)
        wrong = max(wrong, error(calls[-1]()[some], reference))
    flops = 4.0 * tokens * HEADS * (128 + far_count) * C
    return {
        "us": (us := median_us(calls)),
        "error": wrong,
        "TFLOPS": flops / us / 1e6,
        "bytes": tokens * (128 + far_count) * ROW,
    }


def indexer(tokens: int, count: int, k: int = 512, sets: int = 3) -> dict[str, float]:
    """64 heads of 128 over ``count`` stored FP4 keys, exact top-k."""
    calls, right = [], True
    visible = torch.full((tokens,), count, dtype=torch.int32, device="cuda")
    for _ in range(sets):
        codes, scales = mxfp4.encode(torch.randn(count, 128, device="cuda"))
        keys = torch.cat((codes.view(torch.uint8), scales.view(torch.uint8)), dim=-1)
        q = mxfp4.decode(*mxfp4.encode(torch.randn(tokens, 64, 128, device="cuda"))).bfloat16()
        weights = torch.randn(tokens, 64, device="cuda")
        calls.append(lambda q=q, w=weights, s=keys: index_select(q, w, s, visible, k))
        scores, selected = calls[-1]()
        right &= torch.equal(selected[:1], index_select_reference(scores[:1], visible[:1], k))
    wrong = error(scores[:1], index_scores_reference(q[:1], weights[:1], keys))
    flops = 2.0 * tokens * 64 * 128 * count
    return {"us": (us := median_us(calls)), "error": wrong, "exact": right, "TFLOPS": flops / us / 1e6, "bytes": count * 68}


def experts(tokens: int, top: int = 6, count: int = 256) -> dict[str, float]:
    """Flash's routed experts (4,096 x 2,048) on FP4 weights, uniform routing."""

    def packed(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(0, 256, (count, rows, columns // 2), dtype=torch.uint8, device="cuda")
        return codes, torch.randint(118, 122, (count, rows, columns // 32), dtype=torch.uint8, device="cuda")

    weights = FP4Experts(*packed(2048, 4096), *packed(2048, 4096), *packed(4096, 2048), 10.0)
    calls, read = [], 0.0
    for _ in range(4):
        x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
        chosen = torch.stack([torch.randperm(count, device="cuda")[:top] for _ in range(tokens)])
        shares = torch.rand(tokens, top, device="cuda")
        calls.append(lambda x=x, c=chosen, s=shares: fp4_experts(x, c, s, weights))
        read += len(chosen.unique()) * 3 * 4096 * 2048 * (0.5 + 1 / 32) / 4
    some = min(tokens, 4)
    wrong = error(calls[-1]()[:some], fp4_experts_reference(x[:some], chosen[:some], shares[:some], weights))
    flops = 2.0 * tokens * top * 3 * 4096 * 2048
    return {"us": (us := median_us(calls)), "error": wrong, "TFLOPS": flops / us / 1e6, "bytes": read}


CASES: dict[str, Callable[[], dict[str, float]]] = {
    **{f"decode 128+512, batch {b}": (lambda b=b: attention(b, 512, 65536, 1 if b <= 8 else 4)) for b in (1, 8, 32, 128)},
    **{f"decode 128+8192, batch {b}": (lambda b=b: attention(b, 8192, 8192, 2 if b == 1 else 8)) for b in (1, 8, 32)},
    "prefill 4096 x (128+512 of 5,120)": lambda: attention(4096, 512, 5120, 0, 1),
    "prefill 4096 x (128+512 of 262,144)": lambda: attention(4096, 512, 262144, 0, 1),
    "indexer 1 x 262,144 + top-512": lambda: indexer(1, 262144),
    "indexer 16 x 65,536 + top-512": lambda: indexer(16, 65536),
    "FP4 experts, 1 token": lambda: experts(1),
    "FP4 experts, 32 tokens": lambda: experts(32),
    "FP4 experts, 4096 tokens": lambda: experts(4096),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown", help="the commit this tree is at, where git cannot say")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    rates = ceilings()
    print(
        f"{torch.cuda.get_device_name()}: copy {rates['copy_GBps']:.0f} GB/s, bf16 {rates['bf16_TFLOPS']:.0f} TFLOP/s",
        flush=True,
    )
    results: dict[str, dict[str, float] | str] = {}
    for name, case in CASES.items():
        if options.only not in name:
            continue
        try:
            row = case()
        except Exception as failure:  # a kernel that fails is a line of the table, not the end of it
            results[name] = repr(failure)[:300]
            print(f"{name:38s} FAILED {results[name]}", flush=True)
            continue
        row["of_bandwidth"] = row["bytes"] / row["us"] / 1e3 / rates["copy_GBps"]
        row["of_product_rate"] = row["TFLOPS"] / rates["bf16_TFLOPS"]
        results[name] = row
        print(
            f"{name:38s} {row['us']:9.1f} us  {row['TFLOPS']:7.1f} TFLOPS ({row['of_product_rate']:.0%})"
            f"  {row['bytes'] / row['us'] / 1e3:7.0f} GB/s ({row['of_bandwidth']:.0%})  error {row['error']:.1e}", flush=True,
        )  # fmt: skip
    if options.out:
        head = {
            "device": torch.cuda.get_device_name(), "host": platform.processor(), "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": options.commit, "ceilings": rates,
        }  # fmt: skip
        options.out.write_text(json.dumps({**head, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
