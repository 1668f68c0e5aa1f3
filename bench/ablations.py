"""What V4's parts give at 10 million parameters: against dense attention, without mHC, without MoE; three seeds each.

    python bench/ablations.py train WORK --data SHARDS --held-out SHARDS --variant v4     # runs, then costs
    python bench/ablations.py report WORK --out bench/results/ablations.json

Every run of a seed reads the same rows. ``dense``: every layer attends to every token (one key-value head as in V4), trained
for as many FLOPs as ``v4``.
``no_mhc``: one residual stream, added to. ``no_moe``: one feed-forward network with the inner size that is active in ``v4``.
Quality: loss on rows that no run reads. Cost: time and memory of reading 4K to 256K tokens and of one token after them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from nautile.config import ModelConfig
from nautile.engine.costs import train_flops_per_token
from nautile.evals.tools import commit
from nautile.model import Transformer
from nautile.model.initialise import initialise
from nautile.train.data import batches
from nautile.train.demo import SMALL
from nautile.train.loop import StageConfig, Trainer
from nautile.train.losses import LossWeights, training_losses
from nautile.train.optimizer import Optimizers

LENGTH = 2048
VARIANTS = ("v4", "dense", "no_mhc", "no_moe")
CONTEXTS = (4096, 16_384, 65_536, 262_144)
_CHUNK = 2048  # tokens of a prompt in one pass; half of it over the longest, where dense attention needs the memory


def config_of(variant: str, length: int = LENGTH) -> ModelConfig:
    """The configuration of a variant for contexts of ``length`` tokens."""
    base = replace(SMALL, index_topk=LENGTH // 4)  # rows of training leave nothing out, so no indexer has to be trained
    if variant == "dense":  # a window over everything, no compressor anywhere
        return base.replace(compress_ratios=(0,) * 7, sliding_window=length)
    if variant == "no_mhc":
        return base.replace(hc_mult=1)
    if variant == "no_moe":  # shared and routed expert of 1.5 times the size: what 1 + 2 of 3 are together
        return base.replace(n_routed_experts=1, num_experts_per_tok=1, moe_intermediate_size=192, routed_scaling_factor=1.0,
                            num_hash_layers=0)  # fmt: skip
    return base


def network(variant: str, seed: int, length: int = LENGTH) -> Transformer:
    """A fresh network; without mHC what is left of it is fixed: reads and writes with weight one."""
    model = initialise(Transformer(config_of(variant, length)), seed)
    if variant == "no_mhc":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "hc_" in name and name.endswith(("fn", "base")):
                    parameter.zero_()  # 2 sigmoid(0) = 1; what is read is normalised, so its size does not matter
    return model


class Plain(Trainer):
    """A trainer that can leave the mixing of streams as it is."""

    def __init__(self, model: Transformer, config: StageConfig, directory: Path, frozen: bool) -> None:
        super().__init__(model, config, directory)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (frozen and "hc_" in name))
        self.optimizers = Optimizers(model)


def train(options: argparse.Namespace) -> None:
    """All seeds of one variant, then the costs."""
    device = torch.device(options.device)
    here = options.work / options.variant
    here.mkdir(parents=True, exist_ok=True)
    budget = tokens_allowed(options)
    rows = []
    for seed in range(options.seeds):
        model = network(options.variant, seed).to(device)
        settings = StageConfig(
            steps=budget // (options.rows * LENGTH), batch_rows=options.rows, peak_lr=4e-3, warmup_steps=50,
            decay_fraction=0.5, end_lr_fraction=0.02, compile=device.type == "cuda" and not options.eager, save_every=10**9,
            log_every=50,
        )  # fmt: skip
        trainer = Plain(model, settings, here / f"seed-{seed}", frozen=options.variant == "no_mhc")
        began = time.monotonic()
        trainer.fit(batches(options.data, options.rows, device, patience=120.0), lambda row: None)
        rows.append({"seed": seed, "loss": held_out_loss(model, options, device), "tokens": trainer.progress.tokens,
                     "seconds": round(time.monotonic() - began, 1)})  # fmt: skip
        print(options.variant, json.dumps(rows[-1]), flush=True)
        write(here / "result.json", options, rows, {})
    write(here / "result.json", options, rows, costs(options.variant, device, options.contexts))


def tokens_allowed(options: argparse.Namespace) -> int:
    """``tokens`` for ``v4``; for the others as many as cost the same FLOPs."""
    flops = {name: train_flops_per_token(config_of(name), LENGTH) for name in ("v4", options.variant)}
    return int(options.tokens * flops["v4"] / flops[options.variant])


@torch.no_grad()
def held_out_loss(model: Transformer, options: argparse.Namespace, device: torch.device) -> float:
    """Mean loss of the tokens that count, over rows of another seed."""
    feed = batches(options.held_out, options.rows, device, patience=120.0)
    losses = []
    for _ in range(options.held_out_batches):
        batch, _, _ = next(feed)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses.append(training_losses(model, batch, LossWeights()).next_token.item())
    return statistics.mean(losses)


@torch.no_grad()
def costs(variant: str, device: torch.device, contexts: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """By context: seconds to read it in chunks, of the next token (median of nine), bytes of state."""
    out = {}
    for context in contexts:
        model = network(variant, 0, context).to(device).eval()
        state = model.new_state(1, dtype=torch.bfloat16)
        ids = torch.randint(3, 8000, (1, context), device=device)
        wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            model(ids[:, :1], state=model.new_state(1, dtype=torch.bfloat16))
            wait()
            began = time.perf_counter()
            chunk = _CHUNK if context <= 65_536 else _CHUNK // 2
            for start in range(0, context - 16, chunk):
                model(ids[:, start : min(start + chunk, context - 16)], state=state, logits="none")
            wait()
            reading, steps = time.perf_counter() - began, []
            for place in range(context - 16, context):
                began = time.perf_counter()
                model(ids[:, place : place + 1], state=state, logits="last")
                wait()
                steps.append(time.perf_counter() - began)
        out[str(context)] = {"read_seconds": round(reading, 3), "token_seconds": round(statistics.median(steps), 5),
                             "state_bytes": state.nbytes}  # fmt: skip
        print(variant, context, out[str(context)], flush=True)
    return out


def write(path: Path, options: argparse.Namespace, rows: list, found: dict) -> None:
    """What a variant has so far."""
    config = config_of(options.variant)
    count = sum(parameter.numel() for parameter in Transformer(config).parameters())
    losses = [row["loss"] for row in rows]
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    path.write_text(json.dumps({
        "parameters": count, "train_flops_per_token": train_flops_per_token(config, LENGTH),
        "loss": round(statistics.mean(losses), 4), "deviation": round(spread, 4), "runs": rows, "costs": found,
    }, indent=1) + "\n")  # fmt: skip


def report(options: argparse.Namespace) -> None:
    """One file of all variants."""
    found = {name: json.loads(path.read_text()) for name in VARIANTS if (path := options.work / name / "result.json").exists()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {"variants": found, "device": device, "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, one in found.items():
        print(
            f"{name:8} loss {one['loss']} +- {one['deviation']}  {one['parameters']:,} parameters  {one['costs'].get('65536')}"
        )


def main() -> None:
    """Train one variant, or report them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("train", "report"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, default="v4")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--held-out", type=Path, help="shards of another seed")
    parser.add_argument("--held-out-batches", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=20_000_000, help="of a run of v4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--contexts", type=lambda text: tuple(map(int, text.split(","))), default=CONTEXTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("ablations.json"))
    options = parser.parse_args()
    (train if options.verb == "train" else report)(options)


if __name__ == "__main__":
    main()
