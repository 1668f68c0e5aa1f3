"""``nautile train``: the recipe, one command a stage."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train a V4 model: tokenizer, data, pretrain, sft.", no_args_is_help=True)

_H100_BF16 = 766e12  # measured with a large product of random matrices


@app.command()
def tokenizer(out: Annotated[Path, typer.Option(help="Directory for tokenizer.json.")], seed: int = 0) -> None:
    """Train nano's byte-level BPE of 8,192. Example: nautile train tokenizer --out runs/out/tokenizer"""
    from nautile.train.tokenizer import train_to_file  # noqa: PLC0415

    train_to_file(out, seed=seed)
    typer.echo(f"wrote {out}/tokenizer.json")


@app.command()
def data(  # noqa: PLR0913
    stage: Annotated[str, typer.Argument(help="pretrain or sft")],
    out: Annotated[Path, typer.Option(help="Directory for the shards.")],
    tokens: int = 50_000_000,
    length: int = 2048,
    processes: int = 2,
    seed: int = 0,
) -> None:
    """Write packed shards for a stage. Example: nautile train data sft --out data/sft --tokens 5000000"""
    from nautile.train.packing import build  # noqa: PLC0415

    if stage not in ("pretrain", "sft"):
        raise typer.BadParameter("stage is pretrain or sft")
    build(out, "pretrain" if stage == "pretrain" else "sft", tokens, length, processes, seed)


@app.command()
def pretrain(  # noqa: PLR0913
    data: Annotated[Path, typer.Option(help="Shards, or where to write them.")],
    out: Annotated[Path, typer.Option(help="Directory of the run; a checkpoint there is resumed.")],
    init: Annotated[Path | None, typer.Option(help="Start from these weights.")] = None,
    preset: str = "nano",
    steps: int | None = None,
    seconds: Annotated[float | None, typer.Option(help="End the stage, schedule included, after this time.")] = None,
    rows: int | None = None,
    build_tokens: Annotated[int, typer.Option(help="Also build the shards, this many tokens.")] = 0,
    processes: int = 2,
    device: str = "auto",
    compile: Annotated[bool, typer.Option(help="torch.compile the blocks (CUDA only).")] = True,
) -> None:
    """Pretrain. Example: nautile train pretrain --data data/pretrain --out runs/out/pretrain --build-tokens 50000000"""
    _stage("pretrain", data, out, init, preset, build_tokens, processes, device, compile, steps=steps, seconds=seconds, batch_rows=rows)


@app.command()
def sft(  # noqa: PLR0913
    data: Annotated[Path, typer.Option(help="Shards, or where to write them.")],
    out: Annotated[Path, typer.Option(help="Directory of the run; a checkpoint there is resumed.")],
    init: Annotated[Path, typer.Option(help="Weights of the pretraining stage.")],
    preset: str = "nano",
    steps: int | None = None,
    seconds: float | None = None,
    rows: int | None = None,
    build_tokens: int = 0,
    processes: int = 2,
    device: str = "auto",
    compile: bool = True,
    indexer_weight: float | None = None,
) -> None:
    """Supervised fine-tuning on tool traces. Example: nautile train sft --data data/sft --out runs/out/sft --init W"""
    _stage(
        "sft", data, out, init, preset, build_tokens, processes, device, compile,
        steps=steps, seconds=seconds, batch_rows=rows, indexer_weight=indexer_weight,
    )  # fmt: skip


def _stage(  # noqa: PLR0913
    name: str,
    data: Path,
    out: Path,
    init: Path | None,
    preset: str,
    build_tokens: int,
    processes: int,
    device: str,
    compile: bool,
    **changes: float | None,
) -> None:
    import torch  # noqa: PLC0415

    from nautile.config import ModelConfig  # noqa: PLC0415
    from nautile.train import stages  # noqa: PLC0415

    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    builder = None
    if build_tokens:
        builder = stages.build_in_background(data, "pretrain" if name == "pretrain" else "sft", build_tokens, 2048, processes)
    config = stages.stage_config(
        name, compile=compile and device == "cuda", peak_flops=_H100_BF16 if device == "cuda" else None, **changes
    )
    model = stages.load_weights(ModelConfig.preset(preset), init, device)
    typer.echo(json.dumps({"stage": name, "parameters": sum(p.numel() for p in model.parameters()), "device": device}))
    progress = stages.run_stage(model, data, out, config, _reporter())
    typer.echo(f"{name}: {progress.step} steps, {progress.tokens:,} tokens, {progress.seconds:.0f} s -> {out}")
    if builder is not None:
        builder.terminate()


def _reporter() -> Callable[[dict[str, float]], None]:
    began = time.monotonic()

    def report(row: dict[str, float]) -> None:
        shown = "  ".join(
            f"{key} {row[key]:{form}}"
            for key, form in (
                ("step", ".0f"), ("loss", ".4f"), ("mtp", ".3f"), ("indexer", ".3f"), ("balance", ".2f"), ("grad_norm", ".2f"),
                ("lr", ".2e"), ("tokens_per_second", ",.0f"), ("mfu", ".3f"),
            )
            if key in row
        )  # fmt: skip
        typer.echo(f"[{time.monotonic() - began:6.0f} s] {shown}")

    return report

if __name__ == "__main__":
    app()
