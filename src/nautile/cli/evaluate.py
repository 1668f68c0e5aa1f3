"""``nautile eval``: measure what a model can do."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

__all__ = ["app"]

app = typer.Typer(help="Measure what a model can do.", rich_markup_mode=None)


@app.callback()
def _eval() -> None:
    """Measure what a model can do."""


@app.command()
def tools(  # noqa: PLR0913  # one parameter an option
    *,
    model: Annotated[str, typer.Option(help="Model directory or Hub id. Default: the shipped nano.")] = "",
    dialect: Annotated[str | None, typer.Option(help="0731 or preview, when the checkpoint does not say.")] = None,
    kinds: Annotated[list[str] | None, typer.Option(help="Only these kinds (repeat, or separate by commas).")] = None,
    seeds: Annotated[int | None, typer.Option(help="Tasks a kind. Default: 20.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Every seed: 50 a kind, 300 for each kind of the demo.")] = False,
    held_out_wording: Annotated[bool, typer.Option("--held-out-wording", help="Ask in words never trained on.")] = False,
    renamed_tools: Annotated[
        bool, typer.Option("--renamed-tools", help="Tools and parameters under names never trained on.")
    ] = False,
    in_process: Annotated[bool, typer.Option("--in-process", help="No sandbox: quicker; the result says so.")] = False,
    first_seed: Annotated[
        int | None, typer.Option(help="Begin here instead of the published seeds, to try things without spending those.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes, each with the model and one thread.")] = 1,
    together: Annotated[int, typer.Option(min=1, help="Tasks at a time in one process; the engine batches them.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of weights and state in the native kernels.")] = "float32",
    out: Annotated[
        Path | None, typer.Option(help="Also write the result to this file, and each task's to a .jsonl beside it.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a run with the same --out, model and options was cut short.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """pass@1 of the agent on tasks from seeds that no training run has seen; exit status 1 below the bar.

    Example: nautile eval tools --kinds count_lines --seeds 50 --json
    """
    import dataclasses  # noqa: PLC0415
    import functools  # noqa: PLC0415

    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    from nautile.cli.agent import open_client  # noqa: PLC0415
    from nautile.engine import EngineConfig  # noqa: PLC0415
    from nautile.evals.tools import EvalConfig, Outcome, evaluate, evaluate_in_processes  # noqa: PLC0415
    from nautile.train.tasks import KINDS  # noqa: PLC0415

    chosen = tuple(name for part in kinds or [] for name in part.split(",") if name) or tuple(KINDS)
    try:
        config = EvalConfig.full(chosen) if full else EvalConfig(chosen)
        if seeds is not None:
            config = dataclasses.replace(config, seeds=seeds, demo_seeds=None)
        if first_seed is not None:
            config = dataclasses.replace(config, first_seed=first_seed)
        config = dataclasses.replace(config, held_out_wording=held_out_wording, confined=not in_process)
        config = dataclasses.replace(config, renamed_tools=renamed_tools)
        if min(processes, together) > 1:
            raise ValueError("choose --processes or --together: each keeps every core busy")
        engine = EngineConfig(precision=_precision(dtype), rows=_precision(dtype), threads=1 if processes > 1 else None)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    opening = functools.partial(open_client, model, dialect=dialect, config=engine)
    client = opening() if processes == 1 else None  # opened before anything is measured: a model that is missing says so
    run = {"model": _identity(model), "config": repr(config), "dtype": dtype}
    known = [Outcome(**row) for row in _begun(out, run, resume)]
    passed, done = sum(outcome.passed for outcome in known), len(known)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("tasks", total=len(config.cases()), completed=done)

        def count(outcome: Outcome) -> None:
            nonlocal passed, done
            passed, done = passed + outcome.passed, done + 1
            progress.update(bar, advance=1, description=f"{passed}/{done} right")
            if out is not None:  # a long run that is cut short leaves what it measured
                _append(out.with_suffix(".jsonl"), json.dumps(dataclasses.asdict(outcome), ensure_ascii=False))

        if client is not None:
            report = evaluate(client, config, count, known, together)
        else:
            report = evaluate_in_processes(opening, config, processes, count, known)
    result = {**report.to_json(), "dtype": dtype}
    if out is not None:
        _write(out, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    if json_:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        for kind, score in result["kinds"].items():
            typer.echo(f"{kind:16} {score['passed']:4}/{score['total']:<4} {score['low']:6.1%} to {score['high']:6.1%}")
        typer.echo(f"pass@1 {result['pass@1']:.1%}, bar {'met' if report.met else 'not met'}, {report.seconds:.0f} s")
    if not report.met:
        raise typer.Exit(1)


@app.command()
def needle(  # noqa: PLR0913  # one parameter an option
    *,
    model: Annotated[Path | None, typer.Option(help="Model directory. Default: the shipped nano.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts, separated by commas.")] = "4096,8192,16384,32768,65536",
    variants: Annotated[str, typer.Option(help="single, eight, natural; separated by commas.")] = "single,eight,natural",
    trials: Annotated[int, typer.Option(help="Texts a variant and length. The bar wants 100.")] = 10,
    texts: Annotated[
        int | None, typer.Option(help="Texts a cell that trials share, each with its own fact. Default: a text a trial.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0, help="Begin no trial after this long. Default: no limit.")] = math.inf,
    first_seed: Annotated[int | None, typer.Option(help="Begin here instead of the published seeds.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of the native kernels.")] = "float32",
    out: Annotated[
        Path | None, typer.Option(help="Also write the result to this file, and each trial's to a .jsonl beside it.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a run with the same --out, model and options was cut short.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Find a sentence in long texts, by length and depth; exit status 1 when single needles are below the bar.

    Example: nautile eval needle --lengths 4096,16384 --variants single --trials 20
    """
    import dataclasses  # noqa: PLC0415

    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    from nautile.evals.needle import NeedleConfig, NeedleOutcome, run_needles  # noqa: PLC0415

    directory = model or Path(__file__).parents[1] / "weights" / "nano"
    try:
        sizes = tuple(int(part) for part in lengths.split(","))
        kinds: tuple[Any, ...] = tuple(variants.split(","))
        config = NeedleConfig(sizes, kinds, trials, precision=_precision(dtype), texts=texts)
        if first_seed is not None:
            config = dataclasses.replace(config, first_seed=first_seed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    run = {"model": _identity(str(directory)), "config": repr(config)}
    known = [NeedleOutcome(**row) for row in _begun(out, run, resume)]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("trials", total=len(config.cases()), completed=len(known))

        def count(outcome: NeedleOutcome) -> None:
            progress.update(bar, advance=1, description=f"{outcome.length} tokens, {outcome.variant}")
            if out is not None:
                _append(out.with_suffix(".jsonl"), json.dumps(dataclasses.asdict(outcome), ensure_ascii=False))

        report = run_needles(directory, config, count, known, 60 * minutes)
    result = report.to_json()
    if out is not None:
        _write(out, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    if json_:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        for variant, cells in result["needle"].items():
            for length, cell in cells.items():
                depths = " ".join(f"{right}/{all_}" for right, all_ in cell["by_depth"])
                typer.echo(
                    f"{variant:8} {length:>6}  {cell['passed']:3}/{cell['total']:<3} {cell['low']:6.1%} to "
                    f"{cell['high']:6.1%}   by depth {depths}"
                )
        judged = ("bar met" if report.met else "bar not met") if "bar" in result else "no bar for these variants"
        typer.echo(f"{judged}, {report.seconds:.0f} s, {report.runner}")
    if not report.met:
        raise typer.Exit(1)


@app.command()
def recall(
    *,
    model: Annotated[Path | None, typer.Option(help="Model directory. Default: the shipped nano.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the texts, separated by commas.")] = "8192,16384,32768,65536",
    texts: Annotated[int, typer.Option(min=1, help="Texts a length: haystacks with a question at the end.")] = 1,
    queries: Annotated[int, typer.Option(min=1, help="Last tokens of each text to look at.")] = 128,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this file.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """How much of what full attention looks at the indexer picks, by length and layer.

    Example: nautile eval recall --lengths 16384 --texts 2
    """
    from rich.console import Console  # noqa: PLC0415

    from nautile.evals.recall import recall_report  # noqa: PLC0415

    console = Console(stderr=True)

    def keep(result: dict[str, Any]) -> None:
        if out is not None:  # after each text: a run that is cut short leaves what it measured
            _write(out, json.dumps(result, indent=1) + "\n")

    directory = model or Path(__file__).parents[1] / "weights" / "nano"
    try:
        sizes = tuple(int(part) for part in lengths.split(","))
        with console.status("reading"):
            result = recall_report(directory, sizes, texts, queries, keep)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if json_:
        typer.echo(json.dumps(result))
        return
    for length, layers in result["lengths"].items():
        for layer in layers:
            typer.echo(
                f"{length:>6} tokens, layer {layer['layer']}: recall {layer['recall']:.1%}, of the 64 most attended "
                f"{layer['recall_top']:.1%}, mass {layer['mass']:.1%} (chance {layer['chance']:.1%})"
            )


@app.command()
def bfcl(  # noqa: PLR0913  # one parameter an option
    *,
    model: Annotated[str, typer.Option(help="Model directory or Hub id. Default: the shipped nano.")] = "",
    categories: Annotated[
        str, typer.Option(help="Separated by commas; single_turn, multi_turn or all for several.")
    ] = "single_turn",
    tasks: Annotated[int, typer.Option(min=0, help="Tasks a category, drawn with a fixed seed; 0 for all.")] = 100,
    constrained: Annotated[bool, typer.Option("--constrained", help="Calls follow the schemas, by grammar.")] = False,
    together: Annotated[int, typer.Option(min=1, help="Tasks at a time; the engine batches them.")] = 16,
    minutes: Annotated[float, typer.Option(min=0, help="Begin no task after this long. Default: no limit.")] = math.inf,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of weights and state in the native kernels.")] = "float32",
    out: Annotated[
        Path | None, typer.Option(help="Also write the result to this file, and each task's to a .jsonl beside it.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a run with the same --out, model and options was cut short.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """The Berkeley function-calling leaderboard's tasks, judged by its own checkers: an outside check, without a bar.

    The tasks come with a package: pip install --no-deps bfcl-eval==2026.3.23

    Example: nautile eval bfcl --categories simple_python,multiple --tasks 20
    """
    import dataclasses  # noqa: PLC0415

    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    from nautile.cli.agent import open_engine  # noqa: PLC0415
    from nautile.engine import EngineConfig  # noqa: PLC0415
    from nautile.evals.bfcl import CATEGORIES, MULTI_TURN, SINGLE_TURN, Bfcl  # noqa: PLC0415
    from nautile.evals.bfcl_run import BfclConfig, BfclOutcome, run_bfcl  # noqa: PLC0415

    several = {"single_turn": SINGLE_TURN, "multi_turn": MULTI_TURN, "all": CATEGORIES}
    chosen = tuple(name for part in categories.split(",") for name in several.get(part, (part,)))
    try:
        Bfcl()  # before a model is loaded: a package that is missing says so
        config = BfclConfig(chosen, tasks or None, constrained)
        precision = _precision(dtype)
        options = EngineConfig(precision=precision, rows=precision, snapshot_bytes=1 << 30)  # the same long offers come again
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    run = {"model": _identity(model), "config": repr(config), "dtype": dtype}
    known = [BfclOutcome(**{**row, "replies": tuple(row["replies"])}) for row in _begun(out, run, resume)]
    engine = open_engine(model, options)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("tasks", total=None)

        def count(outcome: BfclOutcome) -> None:
            progress.update(bar, advance=1, description=outcome.category)
            if out is not None:
                _append(out.with_suffix(".jsonl"), json.dumps(dataclasses.asdict(outcome), ensure_ascii=False))

        limits: dict[str, Any] = {"together": together, "known": known, "seconds": 60 * minutes}
        report = run_bfcl(engine, config, count, name=model or "nano", **limits)
    engine.close()
    result = {**report.to_json(), "dtype": dtype}
    if out is not None:
        _write(out, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    if json_:
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    for category, cell in result["categories"].items():
        typer.echo(f"{category:26} {cell['passed']:4}/{cell['total']:<4} {cell['low']:6.1%} to {cell['high']:6.1%}")
    typer.echo(f"bfcl-eval {report.package}, {report.seconds:.0f} s")


def _precision(name: str) -> Literal["float32", "bfloat16"]:
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype is float32 or bfloat16, not {name!r}")
    return "float32" if name == "float32" else "bfloat16"


def _identity(model: str) -> str:
    """The model as a string that changes with its weights: a directory's files with sizes and times, or the Hub id."""
    directory = Path(model) if model else Path(__file__).parents[1] / "weights" / "nano"
    if not directory.is_dir():
        return model
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(directory.glob("*.safetensors"))]
    return f"{directory.resolve()} {files}"


def _begun(out: Path | None, run: dict[str, str], resume: bool) -> list[dict[str, Any]]:
    """Begin the log beside ``out``, or with ``resume`` read the outcomes that it holds.

    Raises BadParameter when it is another run's.
    """
    if out is None:
        if resume:
            raise typer.BadParameter("--resume goes on with a run that had --out; give the same --out")
        return []
    log = out.with_suffix(".jsonl")
    if not resume or not log.exists():
        log.unlink(missing_ok=True)
        _append(log, json.dumps(run))
        return []
    whole = [line for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]  # the last may be torn
    try:
        first, *rows = [json.loads(line) for line in whole]
    except ValueError:
        raise typer.BadParameter(f"{log} is not the log of a run; run without --resume") from None
    if first != run:
        raise typer.BadParameter(f"{log} is of another model or other options; run without --resume, or choose another --out")
    _write(log, "".join(line + "\n" for line in whole))
    return rows


def _append(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log:
        log.write(line + "\n")


def _write(path: Path, text: str) -> None:
    """All or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
