"""Training throughput of nano on one GPU: eager, compiled, compiled with every expert on every token; with and without QAT.

    python bench/train_throughput.py [--rows 32] [--length 2048] [--steps 8] [--out bench/results/train_throughput.json]
    python bench/train_throughput.py --log RUN/log.jsonl --device "NVIDIA H100" --date 2026-11-24 [--commit C] --out FILE

Rows are random packed documents; the figure is tokens per second over ``steps`` optimizer steps after warm-up, median. With
``--log`` nothing is run: the throughput and MFU of a real run are read from its log (medians over its intervals).
"""

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

import torch

from nautile.config import ModelConfig
from nautile.engine.costs import train_flops_per_token
from nautile.kernels.sinkhorn import sinkhorn, sinkhorn_reference
from nautile.model import Transformer
from nautile.model.initialise import initialise
from nautile.train.data import synthetic_batch
from nautile.train.loop import StageConfig, Trainer

LENGTH = 2048
PEAK_FLOPS = 766e12  # of an H100 in bfloat16, measured with a large product of random matrices

VARIANTS = {
    "eager, grouped experts": {"compile": False, "dense_experts": False},
    "eager, dense experts": {"compile": False, "dense_experts": True},
    "compiled, dense experts": {"compile": True, "dense_experts": True},
    "compiled, dense, qat": {"compile": True, "dense_experts": True, "qat": True},
    "compiled, dense, qat, indexer loss": {"compile": True, "dense_experts": True, "qat": True, "indexer_weight": 1.0},
}


def check_sinkhorn() -> float:
    """Largest relative difference of the Triton kernels from float64, values and gradients."""
    logits = torch.randn(5000, 4, 4, device="cuda", requires_grad=True)
    wide = logits.detach().double().requires_grad_()
    grad = torch.randn(5000, 4, 4, device="cuda")
    out = sinkhorn(logits, 20, 1e-6)
    ref = sinkhorn_reference(wide, 20, 1e-6)
    out.backward(grad)
    ref.backward(grad.double())
    worst = max((out - ref).norm() / ref.norm(), (logits.grad - wide.grad).norm() / wide.grad.norm())
    return float(worst)


def measure(options: dict, rows: int, length: int, steps: int) -> dict:
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    model = initialise(Transformer(ModelConfig.preset("nano"))).cuda()
    micro = options.pop("micro_batches", 1)
    trainer = Trainer(model, StageConfig(steps=steps, micro_batches=micro, **options), Path("/tmp/probe"))
    batch = synthetic_batch(rows, length, model.config.vocab_size, torch.device("cuda"))
    feed = iter(lambda: (batch, 0, 0), None)
    began, times, losses = time.perf_counter(), [], []
    for step in range(steps + 3):
        mark = time.perf_counter()
        result, _ = trainer._step(feed, 4e-3, decaying=False)
        losses.append(result.next_token.item())
        if step == 0:
            first = time.perf_counter() - began
        if step >= 3:
            times.append(time.perf_counter() - mark)
    return {
        "tokens_per_second": rows * length * micro / statistics.median(times),
        "first_step_seconds": first,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "loss": [losses[0], losses[-1]],
    }


def summary(log: Path) -> dict:
    """Throughput and MFU of a run from its log: the first row ends the compilation, the last fifth has no builders beside it.

    MFU counts useful FLOPs only (``engine.costs.train_flops_per_token``); logs from before that formula hold zeros.
    """
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    first, steady = rows[0], rows[1:]
    last = steady[-len(steady) // 5 :]
    flops = train_flops_per_token(ModelConfig.preset("nano"), LENGTH)

    def rate(part: list[dict]) -> dict:
        tokens = statistics.median(row["tokens_per_second"] for row in part)
        return {"tokens_per_second": round(tokens), "mfu": round(tokens * flops / PEAK_FLOPS, 4)}

    return {
        "tokens": rows[-1]["tokens"],
        "steps": rows[-1]["step"],
        "seconds": rows[-1]["seconds"],
        "first_step_seconds": first["seconds"],
        "flops_per_token": flops,
        "peak_flops": PEAK_FLOPS,
        "whole_run": rate(steady),
        "last_fifth": rate(last),
        "final_loss": statistics.mean(row["loss"] for row in last),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--device", default="")
    parser.add_argument("--date", default="")
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    if arguments.log:
        made = {"device": arguments.device, "date": arguments.date, "commit": arguments.commit, "log": arguments.log.name}
        text = json.dumps(made | summary(arguments.log), indent=1) + "\n"
        print(text, end="")
        if arguments.out:
            arguments.out.write_text(text)
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    results = {"device": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"), "commit": commit}
    results |= {"rows": arguments.rows, "length": arguments.length, "sinkhorn_error": check_sinkhorn(), "variants": {}}
    print("sinkhorn error", results["sinkhorn_error"])
    for name, options in VARIANTS.items():
        if arguments.only and arguments.only not in name:
            continue
        try:
            figures = measure(dict(options), arguments.rows, arguments.length, arguments.steps)
        except Exception as error:  # one variant that does not run must not hide the others
            figures = {"error": f"{type(error).__name__}: {error}"[:600]}
        results["variants"][name] = figures
        print(name, json.dumps(figures), flush=True)
        torch.cuda.empty_cache()
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
