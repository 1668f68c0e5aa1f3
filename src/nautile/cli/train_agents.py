"""``nautile train env|grpo|distill|demo|page``: environments, reinforcement learning, distillation, and seeing it."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nautile.train.distill import Teacher
    from nautile.train.rollout_workers import WorkerConfig

__all__ = ["app_env", "demo", "distill", "grpo", "page"]

app_env = typer.Typer(help="Environments to train and measure agents in.", no_args_is_help=True)


@app_env.command("list")
def list_environments(*, as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
    """Every kind of task. Example: nautile train env list"""
    from nautile.train.environments import ENVIRONMENTS  # noqa: PLC0415

    rows = [{"kind": kind, "shape": one.shape, "held_out": one.held_out} for kind, one in ENVIRONMENTS.items()]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        typer.echo(f"{row['kind']:24} {row['shape']:11} {'held out' if row['held_out'] else 'trained'}")


@app_env.command("check")
def check_environments(
    kinds: Annotated[list[str] | None, typer.Argument(help="Kinds to check; all of them when none is given.")] = None,
    *,
    seeds: Annotated[int, typer.Option(help="Tasks of each kind.", min=1)] = 2,
    substrate: Annotated[str, typer.Option(help="function or container.")] = "function",
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Run each class's expert and adversaries in sandboxes: exit status 2 when a trick is rewarded or an expert is not.

    Example: nautile train env check terminal_status_report --seeds 3
    """
    from nautile.train.environment_check import check  # noqa: PLC0415
    from nautile.train.environments import ENVIRONMENTS, environment  # noqa: PLC0415

    try:
        classes = [environment(kind) for kind in kinds or ENVIRONMENTS]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    total = wrong = 0
    for one in check(classes, range(seeds), substrate):
        total, wrong = total + 1, wrong + (not one.right)
        if as_json:
            row = {"kind": one.kind, "seed": one.seed, "script": one.script, "reward": one.grade.reward, "right": one.right}
            typer.echo(json.dumps(row))
        elif one.right:
            typer.echo(f"ok     {one.kind} {one.seed}: {one.script}: {one.grade.reward:g} ({one.grade.reason})")
        else:
            typer.echo(f"WRONG  {one.kind} {one.seed}: {one.script}: {one.grade.reward:g} ({one.grade.reason})")
    typer.echo(f"{total - wrong} of {total} scripts got what they should", err=as_json)
    if wrong:
        raise typer.Exit(2)


@app_env.command("measure")
def measure_environments(  # noqa: PLR0913
    kinds: Annotated[list[str] | None, typer.Argument(help="Kinds to measure; the held-out ones when none is given.")] = None,
    *,
    model: Annotated[Path, typer.Option(help="Model directory.")],
    seeds: Annotated[int, typer.Option(help="Tasks of each kind.", min=1)] = 20,
    first_seed: Annotated[int, typer.Option(help="Training uses seeds below 10,000,000.", min=10_000_000)] = 10_000_000,
    substrate: Annotated[str, typer.Option(help="function or container.")] = "function",
    reply_tokens: int = 512,
    turns: int = 12,
    out: Annotated[Path | None, typer.Option(help="Write the scores to this file too.")] = None,
) -> None:
    """pass@1 of a model in environments, sampled at temperature 1, with Wilson's intervals; JSON on stdout.

    Example: nautile train env measure --model src/nautile/weights/nano --seeds 20
    """
    from nautile.engine import Engine  # noqa: PLC0415
    from nautile.evals.tools import commit, device_name, wilson  # noqa: PLC0415
    from nautile.train.environments import HELD_OUT, environment  # noqa: PLC0415
    from nautile.train.rollout import Planned, RolloutConfig, roll_out  # noqa: PLC0415

    chosen = list(kinds or HELD_OUT)
    try:
        for kind in chosen:
            environment(kind)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    cases = [(kind, first_seed + index) for index in range(seeds) for kind in chosen]
    plan = [Planned(number, number, kind, seed) for number, (kind, seed) in enumerate(cases)]
    config = RolloutConfig(turns=turns, reply_tokens=reply_tokens, tokens=8192, substrate=substrate, at_once=8)
    version, began = commit(), time.monotonic()
    engine = Engine(model)
    try:
        with tempfile.TemporaryDirectory(prefix="nautile-measure-") as scratch:
            samples = roll_out(engine, plan, Path(scratch), config, {"model": str(model)})
    finally:
        engine.close()
    scores: dict[str, dict[str, float]] = {}
    for kind in chosen:
        rewards = [sample.reward >= 1 for sample in samples if sample.planned.kind == kind]
        low, high = wilson(sum(rewards), len(rewards))
        scores[kind] = {"passed": sum(rewards), "total": len(rewards), "low": round(low, 4), "high": round(high, 4)}
    statuses = Counter(sample.reason for sample in samples if sample.reward < 1)
    facts = {"model": model.name, "device": device_name(), "commit": version, "seconds": round(time.monotonic() - began, 1)}
    text = json.dumps({"kinds": scores, "failures": dict(statuses.most_common(8)), "temperature": 1.0, **facts}, indent=1)
    typer.echo(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")


def grpo(  # noqa: PLR0913
    *,
    init: Annotated[Path, typer.Option(help="Model directory to start from; its tokenizer is used.")],
    out: Annotated[Path, typer.Option(help="Directory of the run; what is there is continued.")],
    kinds: Annotated[str, typer.Option(help="Environments, separated by commas.")] = "edit_value,count_lines",
    steps: int = 10,
    groups: Annotated[int, typer.Option(help="Tasks a step.")] = 4,
    samples: Annotated[int, typer.Option(help="Conversations of each task.")] = 8,
    lr: Annotated[float, typer.Option(help="Learning rate of Muon.")] = 1e-4,
    kl: Annotated[float, typer.Option(help="Weight of the divergence from the first weights.")] = 1e-3,
    seed: int = 0,
    substrate: Annotated[str, typer.Option(help="Where tools run: function or container.")] = "function",
    reply_tokens: Annotated[int, typer.Option(help="Tokens of one turn.")] = 256,
    turns: int = 8,
    deterministic: Annotated[bool, typer.Option(help="Rollouts and training through the same products.")] = False,
    qat: Annotated[bool, typer.Option(help="Roll out and train on the values of the exported file.")] = False,
    workers: Annotated[int, typer.Option(help="Processes that roll out with native kernels; 0: here. Needs --qat.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Threads of a worker.", min=1)] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Reinforcement learning in real sandboxes. Killed, it goes on where it was, in the middle of its conversations.

    Example: nautile train grpo --init src/nautile/weights/nano --out runs/out/grpo --kinds edit_value,rename_file --steps 3
    """
    from nautile.checkpoint import load_model  # noqa: PLC0415
    from nautile.protocol import Tokenizer  # noqa: PLC0415
    from nautile.train.grpo import GRPO, GRPOConfig  # noqa: PLC0415
    from nautile.train.rollout import RolloutConfig  # noqa: PLC0415
    from nautile.train.stages import save_weights  # noqa: PLC0415

    rollout = RolloutConfig(seed=seed, turns=turns, reply_tokens=reply_tokens, substrate=substrate)
    try:
        config = GRPOConfig(
            kinds=tuple(kinds.split(",")), steps=steps, groups=groups, samples=samples, lr=lr, kl=kl,
            deterministic=deterministic, qat=qat, rollout=rollout, workers=_workers(init, workers, threads),
            replay=not workers,
        )  # fmt: skip
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    model = load_model(init, device=device)
    run = GRPO(model, Tokenizer.load(init), config, out)
    run.run(lambda report: typer.echo(report.line()))
    save_weights(model, out / "weights.safetensors")
    typer.echo(f"wrote {out}/weights.safetensors; next: nautile train page {out}")


def distill(  # noqa: PLR0913
    *,
    init: Annotated[Path, typer.Option(help="The student: a model directory; its tokenizer is used.")],
    out: Annotated[Path, typer.Option(help="Directory of the run; what is there is continued.")],
    teacher: Annotated[list[str], typer.Option(help="NAME=DIRECTORY:kind,kind or NAME=DIRECTORY:kind,kind:weight; repeat it.")],
    steps: int = 10,
    tasks: Annotated[int, typer.Option(help="Tasks a step.")] = 4,
    samples: Annotated[int, typer.Option(help="Conversations of each task.")] = 2,
    lr: Annotated[float, typer.Option(help="Learning rate of Muon.")] = 1e-4,
    seed: int = 0,
    substrate: Annotated[str, typer.Option(help="Where tools run: function or container.")] = "function",
    reply_tokens: Annotated[int, typer.Option(help="Tokens of one turn.")] = 256,
    turns: int = 8,
    qat: Annotated[bool, typer.Option(help="Roll out and train on the values of the exported file.")] = False,
    workers: Annotated[int, typer.Option(help="Processes that roll out with native kernels; 0: here. Needs --qat.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Threads of a worker.", min=1)] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Several specialists into one model: full-vocabulary reverse KL on the student's own conversations.

    Example: nautile train distill --init M --out runs/out/distill --teacher a=A:rename_file,find_file --teacher b=B:sum_column
    """
    from nautile.checkpoint import load_model  # noqa: PLC0415
    from nautile.protocol import Tokenizer  # noqa: PLC0415
    from nautile.train.distill import Distill, DistillConfig  # noqa: PLC0415
    from nautile.train.rollout import RolloutConfig  # noqa: PLC0415
    from nautile.train.stages import save_weights  # noqa: PLC0415

    rollout = RolloutConfig(seed=seed, turns=turns, reply_tokens=reply_tokens, substrate=substrate)
    try:
        teachers = tuple(_teacher(text) for text in teacher)
        config = DistillConfig(
            teachers, steps=steps, tasks=tasks, samples=samples, lr=lr, qat=qat, rollout=rollout,
            workers=_workers(init, workers, threads), replay=not workers,
        )  # fmt: skip
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    run = Distill(load_model(init, device=device), Tokenizer.load(init), config, out)
    run.run(lambda report: typer.echo(report.line()))
    save_weights(run.model, out / "weights.safetensors")
    typer.echo(f"wrote {out}/weights.safetensors; next: nautile train page {out}")


def page(
    run: Annotated[Path, typer.Argument(help="Directory of a run.")],
    out: Annotated[Path | None, typer.Option(help="Where to write it; run.html in the directory otherwise.")] = None,
) -> None:
    """One HTML page of a run: curves, expert load, recall, rewards, every trajectory.

    Example: nautile train page runs/out/grpo
    """
    from nautile.train.page import page as written  # noqa: PLC0415

    target = out or run / "run.html"
    text = written(run)
    target.write_text(text, encoding="utf-8")
    typer.echo(f"wrote {target} ({len(text) / 1e6:.1f} MB); it needs nothing else, open it in a browser")


def demo(
    out: Annotated[Path, typer.Option(help="Directory of the run; it must not hold one.")] = Path("runs/out/demo"),
    seconds: Annotated[float, typer.Option(help="How long to train.", min=5)] = 300.0,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Directory of a tokenizer; that of the shipped model otherwise.")
    ] = None,
) -> None:
    """Train a network of 10 million parameters on this CPU for five minutes: its loss falls, and it says something.

    Example: nautile train demo --out runs/out/demo --seconds 300
    """
    from nautile.train.demo import run_demo  # noqa: PLC0415
    from nautile.train.page import page as written  # noqa: PLC0415

    if (out / "log.jsonl").exists():
        raise typer.BadParameter(f"{out} holds a run already: choose another --out")
    shipped = Path(__file__).parents[1] / "weights" / "nano"

    def report(row: dict[str, float]) -> None:
        typer.echo(
            f"step {row['step']:4.0f}  loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tokens/s  {row['seconds']:.0f} s"
        )

    progress, text = run_demo(out, tokenizer or shipped, seconds, report)
    losses = [row["loss"] for row in progress.history]
    typer.echo(
        f"{progress.step} steps, {progress.tokens:,} tokens; loss {losses[0]:.3f} -> {losses[-1]:.3f}. A sample:\n\n{text}\n"
    )
    (out / "run.html").write_text(written(out), encoding="utf-8")
    typer.echo(f"The page of this run: {out}/run.html")


def _workers(tokenizer: Path, count: int, threads: int) -> WorkerConfig | None:
    from nautile.train.rollout_workers import WorkerConfig  # noqa: PLC0415

    return WorkerConfig(tokenizer, count, threads) if count else None


def _teacher(text: str) -> Teacher:
    from nautile.train.distill import Teacher  # noqa: PLC0415

    name, _, rest = text.partition("=")
    path, *more = rest.split(":")
    if not name or not path or not 1 <= len(more) <= 2:
        raise ValueError(f"a teacher is NAME=DIRECTORY:kind,kind or NAME=DIRECTORY:kind,kind:weight, got {text!r}")
    return Teacher(name, Path(path), tuple(kind for kind in more[0].split(",") if kind), float(more[1]) if more[1:] else 1.0)
