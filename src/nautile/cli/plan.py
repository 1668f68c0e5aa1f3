"""``nautile plan``: what a model costs and where it fits, before anything is loaded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from nautile.config import ModelConfig
    from nautile.engine.costs import KVFormat, Plan, PlanOptions, WeightFormat

__all__ = ["plan"]


def plan(  # noqa: PLR0913  # one parameter an option
    *,
    model: Annotated[str, typer.Option(help="flash, pro, nano, a model directory or a Hub id (its config alone is read).")],
    context: Annotated[str, typer.Option(help="Tokens a sequence: 1M is 1,048,576, 128K is 131,072.")] = "1M",
    batch: Annotated[int, typer.Option(help="Sequences of that length.")] = 1,
    gpu_memory: Annotated[str, typer.Option(help="Say what fits: 80GB (80e9 bytes) or 80GiB.")] = "",
    host_memory: Annotated[str, typer.Option(help="Say what fits: 128GB.")] = "",
    weights: Annotated[str, typer.Option(help="stored (FP8 and FP4 files), bf16 or fp32 (as loaded).")] = "stored",
    kv: Annotated[str, typer.Option(help="packed (FP8 rows, FP4 keys), bf16 or fp32 (the in-memory state).")] = "packed",
    chunk: Annotated[int, typer.Option(help="Tokens of a prefill pass, for the workspace.")] = 512,
    json_: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Bytes by kind, FLOPs by kind, what fits where, beside DeepSeek-V3.2 and a bf16 GQA-8 of the same depth.

    Example: nautile plan --model flash --context 1M --gpu-memory 80GB --host-memory 128GB
    """
    from nautile.engine.costs import PlanOptions, make_plan, parse_bytes, parse_tokens  # noqa: PLC0415

    if weights not in ("stored", "bf16", "fp32"):
        raise typer.BadParameter(f"--weights is stored, bf16 or fp32, not {weights!r}")
    if kv not in ("packed", "bf16", "fp32"):
        raise typer.BadParameter(f"--kv is packed, bf16 or fp32, not {kv!r}")
    if batch < 1 or chunk < 1:
        raise typer.BadParameter("--batch and --chunk are at least 1")
    try:
        options = PlanOptions(
            context=parse_tokens(context),
            batch=batch,
            chunk=chunk,
            weights=cast("WeightFormat", weights),
            kv=cast("KVFormat", kv),
            gpu_memory=parse_bytes(gpu_memory) if gpu_memory else None,
            host_memory=parse_bytes(host_memory) if host_memory else None,
        )
        result = make_plan(_config(model), options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if json_:
        typer.echo(json.dumps({"model": model, **result.to_json()}))
    else:
        _show(model, result)


def _config(name: str) -> ModelConfig:
    from nautile.checkpoint import resolve_config  # noqa: PLC0415
    from nautile.config import ModelConfig  # noqa: PLC0415

    return ModelConfig.preset(name) if name in ("flash", "pro", "nano") else resolve_config(name)


def _show(model: str, plan: Plan) -> None:
    from rich.console import Console  # noqa: PLC0415

    options = plan.options
    console = Console()
    console.print(f"{model}: {_sequences(options)}, weights {options.weights}, KV {options.kv}", highlight=False)
    tables = [_bytes_table(plan), _flops_table(plan), _baseline_table(plan)]
    if plan.placement:
        tables.append(_placement_table(plan))
    for table in tables:
        console.print()
        console.print(table)
    for line in _verdict(plan):
        console.print(line, highlight=False)


def _sequences(options: PlanOptions) -> str:
    return f"{options.batch:,} sequence{'s' if options.batch > 1 else ''} of {options.context:,} tokens"


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=title, title_justify="left", title_style="bold", header_style="")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or column == "formula" else "right", overflow="fold")
    return table


def _bytes_table(plan: Plan) -> Table:
    table = _table("Bytes", "kind", "size", "formula")
    kv = plan.kv
    groups = (
        ("weights", plan.weights.terms(), plan.weights.FORMULAS, plan.weights.total),
        ("KV history", {name: getattr(kv, name) for name in ("entries", "index_keys")}, kv.FORMULAS, kv.history),
        ("KV tail", {name: getattr(kv, name) for name in ("window", "tails", "index_tails", "spare")}, kv.FORMULAS, kv.tail),
        ("workspace (estimate)", plan.workspace.terms(), plan.workspace.FORMULAS, plan.workspace.total),
    )
    for group, terms, formulas, total in groups:
        for name, amount in terms.items():
            if amount:
                table.add_row("  " + name, _size(amount), formulas[name], style="dim")
        table.add_row(group, _size(total), "", end_section=True)
    table.add_row("total", _size(plan.total_bytes), "")
    return table


def _flops_table(plan: Plan) -> Table:
    flops = plan.flops
    table = _table(
        "FLOPs of one decoded token (precision weights: inferred)", "kind", "GFLOP", "as", "x", "FP8-equiv.", "formula"
    )
    for name, amount in flops.terms().items():
        precision, weight = flops.WEIGHTS[name]
        table.add_row(
            "  " + name, _giga(amount), precision, f"{weight:g}", _giga(amount * weight), flops.FORMULAS[name], style="dim"
        )
    table.add_section()
    table.add_row("total", _giga(flops.total), "", "", _giga(flops.weighted), "")
    return table


def _baseline_table(plan: Plan) -> Table:
    table = _table("Beside other models (one sequence)", "", *(f"at {row.context:,}" for row in plan.baselines))
    rows = plan.baselines
    table.add_row("KV bytes", *(_size(row.kv) for row in rows))
    table.add_row("  of DeepSeek-V3.2", *(f"{row.ratios['kv_of_v32']:.1%} of {_size(row.v32_kv)}" for row in rows))
    table.add_row("  of bf16 GQA-8, same depth", *(f"{row.ratios['kv_of_gqa8']:.1%} of {_size(row.gqa8_kv)}" for row in rows))
    table.add_row("FP8-equivalent GFLOP a token", *(_giga(row.flops) for row in rows))
    table.add_row("  of DeepSeek-V3.2", *(f"{row.ratios['flops_of_v32']:.1%} of {_giga(row.v32_flops)}" for row in rows))
    return table


def _placement_table(plan: Plan) -> Table:
    gpu, host = plan.options.gpu_memory or 0, plan.options.host_memory or 0
    table = _table("What fits where", "kind", "size", f"GPU {_size(gpu)}", f"host {_size(host)}", "no room")
    for row in plan.placement:
        table.add_row(row.kind, *(_size(amount) if amount else "-" for amount in (row.total, row.gpu, row.host, row.missing)))
    table.add_section()
    sums = [sum(getattr(row, name) for row in plan.placement) for name in ("total", "gpu", "host", "missing")]
    table.add_row("total", *(_size(amount) if amount else "-" for amount in sums))
    return table


def _verdict(plan: Plan) -> list[str]:
    if plan.fits is None:
        return []
    experts = next(row for row in plan.placement if row.kind == "experts")
    count = experts.total // plan.expert_bytes
    lines = [f"Routed experts on the GPU: {experts.gpu // plan.expert_bytes:,} of {count:,} ({_size(plan.expert_bytes)} each)."]
    missing = sum(row.missing for row in plan.placement)
    lines.append("It fits." if plan.fits else f"It does not fit: {_size(missing)} have no room.")
    return lines


def _size(amount: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if amount >= scale:
            return f"{amount / scale:,.2f} {unit}"
    return f"{amount:,.0f} B"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.3f}"
