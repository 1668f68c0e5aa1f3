"""``nautile train``: the recipe, one command a stage."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nautile.cli import train_agents

if TYPE_CHECKING:
    from nautile.config import ModelConfig

app = typer.Typer(help="Train a V4 model: tokenizer, data, pretrain, sft, practice, grpo, distill.", no_args_is_help=True)
app.add_typer(train_agents.app_env, name="env")
app.command()(train_agents.grpo)
app.command()(train_agents.distill)
app.command()(train_agents.demo)
app.command()(train_agents.page)

_H100_BF16 = 766e12  # measured with a large product of random matrices
_LENGTH = 2048  # tokens of a row
_WHOLE, _SPAN = 16_384, 4096  # tokens of the longest row that is taken whole; of a span of longer ones


@app.command()
def tokenizer(out: Annotated[Path, typer.Option(help="Directory for tokenizer.json.")], seed: int = 0) -> None:
    """Train nano's byte-level BPE of 8,192. Example: nautile train tokenizer --out runs/out/tokenizer"""
    from nautile.train.tokenizer import train_to_file  # noqa: PLC0415

    train_to_file(out, seed=seed)
    typer.echo(f"wrote {out}/tokenizer.json")


@app.command()
def data(
    stage: Annotated[str, typer.Argument(help="pretrain, practice, functions, sft or long")],
    out: Annotated[Path, typer.Option(help="Directory for the shards.")],
    tokens: int = 50_000_000,
    length: int = 2048,
    processes: int = 2,
    seed: int = 0,
) -> None:
    """Write packed shards for a stage. Example: nautile train data sft --out data/sft --tokens 5000000"""
    from nautile.train.packing import build, stage_named  # noqa: PLC0415

    try:
        build(out, stage_named(stage), tokens, length, processes, seed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@dataclass(frozen=True)
class _Run:
    """What a training stage is run with; the stage's own settings are its ``StageConfig``."""

    data: Path
    out: Path
    init: Path | None
    preset: str
    build_tokens: int
    processes: int
    device: str
    compile: bool
    length: int = _LENGTH
    index_topk: int | None = None  # None: the preset's
    first_shard: int = 0


@app.command()
def pretrain(  # noqa: PLR0913
    *,
    data: Annotated[Path, typer.Option(help="Shards, or where to write them.")],
    out: Annotated[Path, typer.Option(help="Directory of the run; a checkpoint there is resumed.")],
    init: Annotated[Path | None, typer.Option(help="Start from these weights.")] = None,
    preset: Annotated[str, typer.Option(help="nano, flash or pro, or a config.json.")] = "nano",
    steps: int | None = None,
    seconds: Annotated[float | None, typer.Option(help="End the stage, schedule included, after this time.")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of 2,048 tokens a step.")] = None,
    build_tokens: Annotated[int, typer.Option(help="Also build the shards, this many tokens.")] = 0,
    processes: Annotated[int, typer.Option(help="Processes that build.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    compile: Annotated[bool, typer.Option(help="torch.compile the blocks (CUDA only).")] = True,
) -> None:
    """Pretrain. Example: nautile train pretrain --data data/pretrain --out runs/out/pretrain --build-tokens 50000000"""
    run = _Run(data, out, init, preset, build_tokens, processes, device, compile)
    _stage("pretrain", run, steps=steps, seconds=seconds, batch_rows=rows)


@app.command()
def practice(  # noqa: PLR0913
    *,
    data: Annotated[Path, typer.Option(help="Shards, or where to write them.")],
    out: Annotated[Path, typer.Option(help="Directory of the run; a checkpoint there is resumed.")],
    init: Annotated[Path, typer.Option(help="Weights to continue from: a file of a stage, or a model directory.")],
    preset: Annotated[str, typer.Option(help="nano, flash or pro, or a config.json.")] = "nano",
    steps: int | None = None,
    seconds: Annotated[float | None, typer.Option(help="End the stage, schedule included, after this time.")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of 2,048 tokens a step.")] = None,
    peak_lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    build_tokens: Annotated[int, typer.Option(help="Also build the shards, this many tokens.")] = 0,
    processes: Annotated[int, typer.Option(help="Processes that build.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    compile: Annotated[bool, typer.Option(help="torch.compile the blocks (CUDA only).")] = True,
) -> None:
    """Continue a trained model on traces and copying exercises.

    Example: nautile train practice --data data/practice --out runs/out/practice --init src/nautile/weights/nano
    """
    run = _Run(data, out, init, preset, build_tokens, processes, device, compile)
    _stage("practice", run, steps=steps, seconds=seconds, batch_rows=rows, peak_lr=peak_lr)


@app.command()
def sft(  # noqa: PLR0913
    *,
    data: Annotated[Path, typer.Option(help="Shards, or where to write them.")],
    out: Annotated[Path, typer.Option(help="Directory of the run; a checkpoint there is resumed.")],
    init: Annotated[Path, typer.Option(help="Weights of the pretraining stage.")],
    preset: Annotated[str, typer.Option(help="nano, flash or pro, or a config.json.")] = "nano",
    steps: int | None = None,
    seconds: Annotated[float | None, typer.Option(help="End the stage, schedule included, after this time.")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of 2,048 tokens a step.")] = None,
    build_tokens: Annotated[int, typer.Option(help="Also build the shards, this many tokens.")] = 0,
    processes: Annotated[int, typer.Option(help="Processes that build.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    compile: Annotated[bool, typer.Option(help="torch.compile the blocks (CUDA only).")] = True,
    indexer_weight: Annotated[float | None, typer.Option(help="Train the indexer by KL with this weight.")] = None,
) -> None:
    """Supervised fine-tuning on tool traces. Example: nautile train sft --data data/sft --out runs/out/sft --init W"""
    run = _Run(data, out, init, preset, build_tokens, processes, device, compile)
    _stage("sft", run, steps=steps, seconds=seconds, batch_rows=rows, indexer_weight=indexer_weight)


@app.command()
def long(  # noqa: PLR0913
    *,
    data: Annotated[Path, typer.Option(help="Shards of the stage long, or where to write them.")],
    out: Annotated[Path, typer.Option(help="Directory of the run; a checkpoint there is resumed.")],
    init: Annotated[Path, typer.Option(help="Weights to continue from: a file of a stage, or a model directory.")],
    indexer_only: Annotated[bool, typer.Option("--indexer-only", help="Dense attention; train the indexer alone.")] = False,
    preset: Annotated[str, typer.Option(help="nano, flash or pro, or a config.json.")] = "nano",
    length: Annotated[int, typer.Option(help="Tokens of a row, as the shards have.")] = 16_384,
    span: Annotated[
        int | None, typer.Option(help="Tokens in memory at once, computed twice. Default: 4,096 in rows over 16,384, else all.")
    ] = None,
    steps: int | None = None,
    seconds: Annotated[float | None, typer.Option(help="End the stage, schedule included, after this time.")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of a micro batch.")] = None,
    peak_lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    first_shard: Annotated[int, typer.Option(help="Begin with this shard.")] = 0,
    build_tokens: Annotated[int, typer.Option(help="Also build the shards, this many tokens.")] = 0,
    processes: Annotated[int, typer.Option(help="Processes that build.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
) -> None:
    """Continue on long rows with sparse attention; first with --indexer-only, so that the indexer knows what to choose.

    Example: nautile train long --indexer-only --data data/long --out runs/out/indexer --init model --build-tokens 4000000
    """
    from nautile.train.stages import DENSE  # noqa: PLC0415

    topk = DENSE if indexer_only else None
    run = _Run(data, out, init, preset, build_tokens, processes, device, False, length, topk, first_shard)
    cut = (_SPAN if length > _WHOLE else 0) if span is None else span
    name = "indexer" if indexer_only else "long"
    rows_a_step = 1 if length > _WHOLE else None  # micro batches: a row of these is a batch
    _stage(
        name, run, steps=steps, seconds=seconds, batch_rows=rows, peak_lr=peak_lr, span=cut, micro_batches=rows_a_step
    )  # fmt: skip


@app.command()
def export(
    weights: Annotated[Path, typer.Argument(help="weights.safetensors or checkpoint.pt of a stage.")],
    out: Annotated[Path, typer.Option(help="Directory for the official layout.")],
    tokenizer: Annotated[Path, typer.Option(help="Directory whose tokenizer files are copied.")],
    preset: Annotated[str, typer.Option(help="nano, flash or pro, or a config.json.")] = "nano",
) -> None:
    """Write a stage's weights as an official checkpoint (FP4 experts, FP8 linears).

    Example: nautile train export runs/out/sft/weights.safetensors --out model --tokenizer src/nautile/weights/nano
    """
    from nautile.checkpoint import save_model  # noqa: PLC0415
    from nautile.train import stages  # noqa: PLC0415
    from nautile.train.vocabulary import check_same  # noqa: PLC0415

    check_same(weights, tokenizer)
    model = stages.load_weights(_configuration(preset), weights, "cpu")
    written = save_model(model, out, tokenizer_dir=tokenizer)
    typer.echo(f"{out}: {written.tensors} tensors, {written.nbytes / 1e6:.1f} MB, largest rounding {written.rounding}")


def _configuration(name: str) -> ModelConfig:
    """A preset, or what a config.json says."""
    from nautile.config import ConfigError  # noqa: PLC0415
    from nautile.train.stages import configuration  # noqa: PLC0415

    try:
        return configuration(name)
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--preset") from None


def _stage(name: str, run: _Run, **changes: float | None) -> None:
    import torch  # noqa: PLC0415

    from nautile.engine.costs import train_flops_per_token  # noqa: PLC0415
    from nautile.train import stages, vocabulary  # noqa: PLC0415
    from nautile.train.packing import stage_named  # noqa: PLC0415

    known = vocabulary.check_same(run.data, run.init) if run.init is not None else vocabulary.digest_beside(run.data)
    config, builder = _configuration(run.preset), None
    if run.index_topk is not None:
        config = dataclasses.replace(config, index_topk=run.index_topk)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if run.device == "auto" else run.device
    if run.build_tokens:
        kind = stage_named("long" if name == "indexer" else name)
        builder = stages.build_in_background(run.data, kind, run.build_tokens, run.length, run.processes)
    stage = stages.stage_config(
        name,
        compile=run.compile and device == "cuda",
        peak_flops=_H100_BF16 if device == "cuda" else None,
        flops_per_token=train_flops_per_token(config, run.length),
        **changes,
    )
    model = stages.load_weights(config, run.init, device)
    typer.echo(json.dumps({"stage": name, "parameters": sum(p.numel() for p in model.parameters()), "device": device}))
    progress = stages.run_stage(model, run.data, run.out, stage, _reporter(), run.first_shard)
    if known is not None:
        vocabulary.record(run.out, known)
    typer.echo(f"{name}: {progress.step} steps, {progress.tokens:,} tokens, {progress.seconds:.0f} s -> {run.out}")
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
