"""``nautile convert``: a checkpoint from one layout to another, or the list of tensors that a configuration calls for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

if TYPE_CHECKING:
    from nautile.checkpoint import SaveReport
    from nautile.config import ModelConfig

__all__ = ["convert"]


def convert(  # noqa: PLR0913  # one parameter an option
    source: Annotated[str, typer.Argument(metavar="SRC", help="Model directory or Hub id.")] = "",
    target: Annotated[Path | None, typer.Argument(metavar="DST", help="Directory to write.")] = None,
    *,
    to: Annotated[str, typer.Option(help="Layout to write: official or transformers.")] = "official",
    expert_dtype: Annotated[str, typer.Option(help="Routed experts of an official checkpoint: fp4 or fp8.")] = "",
    max_shard: Annotated[str, typer.Option(help="Largest file, such as 5GB.")] = "5GB",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of a Hub id.")] = "",
    manifest: Annotated[str, typer.Option(help="List the tensors of flash, pro, nano or a model directory instead.")] = "",
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Convert a checkpoint, tensor by tensor, or print a manifest.

    Example: nautile convert deepseek-ai/DeepSeek-V4-Flash ./flash-fp8 --to official --expert-dtype fp8

    Example: nautile convert --manifest pro --json
    """
    if manifest:
        _print_manifest(manifest, expert_dtype, json_)
        return
    if not source or target is None:
        raise typer.BadParameter("give SRC and DST, or --manifest flash|pro")
    if to not in ("official", "transformers"):
        raise typer.BadParameter(f"--to is official or transformers, not {to!r}")
    if expert_dtype not in ("", "fp4", "fp8"):
        raise typer.BadParameter(f"--expert-dtype is fp4 or fp8, not {expert_dtype!r}")
    if to == "transformers" and expert_dtype:
        raise typer.BadParameter("--expert-dtype belongs to the official layout; the transformers layout is written in bf16")
    report = _convert(source, target, to, expert_dtype, _bytes(max_shard), revision)
    _print_report(report, to, json_)


def _convert(source: str, target: Path, to: str, expert_dtype: str, limit: int, revision: str) -> SaveReport:
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    from nautile.checkpoint import Checkpoint, SaveOptions, resolve_model, write_checkpoint  # noqa: PLC0415

    directory = resolve_model(source, revision or None)
    if target.exists() and target.resolve() == directory.resolve():
        raise typer.BadParameter("SRC and DST are the same directory")
    options = SaveOptions(
        layout=cast(Literal["official", "transformers"], to),
        expert_dtype=cast(Literal["fp4", "fp8"], expert_dtype) if expert_dtype else None,
        max_shard_bytes=limit,
        companions=directory if (directory / "tokenizer.json").exists() else None,
    )
    with Checkpoint(directory) as checkpoint, Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("writing")
        return write_checkpoint(
            checkpoint.read,
            checkpoint.config,
            target,
            options,
            lambda done, total: progress.update(bar, completed=done, total=total),
        )


def _print_report(report: SaveReport, to: str, as_json: bool) -> None:
    result: dict[str, Any] = {
        "path": str(report.path),
        "layout": to,
        "tensors": report.tensors,
        "bytes": report.nbytes,
        "files": report.files,
        "rounding": report.rounding,
        "left_out": list(report.left_out),
    }
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(f"{report.path}: {report.tensors:,} tensors, {report.nbytes:,} bytes, {len(report.files)} files")
    for kind, worst in sorted(report.rounding.items()):
        text = "exact" if worst == 0 else f"rounded, at most {worst:.2%} of a tensor's largest value"
        typer.echo(f"  {kind}: {text}")
    if report.left_out:
        typer.echo(f"  left out, because the {to} layout has no place for it: {', '.join(report.left_out)}")


def _print_manifest(name: str, expert_dtype: str, as_json: bool) -> None:
    from nautile.checkpoint import manifest  # noqa: PLC0415

    tensors = manifest(_config(name), expert_dtype or None)
    total = sum(tensor.nbytes for tensor in tensors)
    if as_json:
        listed = [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "nbytes": t.nbytes} for t in tensors]
        typer.echo(json.dumps({"model": name, "count": len(tensors), "bytes": total, "tensors": listed}))
        return
    kinds: dict[str, list[int]] = {}
    for tensor in tensors:
        count = kinds.setdefault(tensor.dtype, [0, 0])
        count[0] += 1
        count[1] += tensor.nbytes
    for dtype, (count_, nbytes) in sorted(kinds.items()):
        typer.echo(f"{dtype:8} {count_:>9,} tensors {nbytes:>19,} bytes")
    typer.echo(f"{name:8} {len(tensors):>9,} tensors {total:>19,} bytes (every tensor: --json)")


def _config(name: str) -> ModelConfig:
    from nautile.checkpoint import resolve_config  # noqa: PLC0415
    from nautile.config import ModelConfig  # noqa: PLC0415

    return ModelConfig.preset(name) if name in ("flash", "pro", "nano") else resolve_config(name)


def _bytes(text: str) -> int:
    from nautile.engine.costs import parse_bytes  # noqa: PLC0415

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
