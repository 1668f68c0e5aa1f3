"""``nautile bench``: how an engine or a server behaves under load, and how fast the GPU kernels are."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nautile.engine.load import Load, Outcome, Target

__all__ = ["app"]

app = typer.Typer(help="Measure speed under load.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Measure speed under load."""


@app.command("kernels")
def kernels(
    *,
    only: Annotated[str, typer.Option(help="Cases whose name contains this.")] = "",
    variants: Annotated[bool, typer.Option(help="Ways to compute the same, and the fastest of each shape.")] = False,
    commit: Annotated[str, typer.Option(help="The commit of this tree, where git cannot say.")] = "",
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON here, anew after each case.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on behind the cases in --out, and the one that a run ended in.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Time the GPU kernels in V4-Flash's shapes beside their floors, and beside FlashMLA and DeepGEMM where installed.

    Example: nautile bench kernels --only experts
    """
    import torch  # noqa: PLC0415

    from nautile.kernels.measure import CASES, VARIANTS, CardLostError, run  # noqa: PLC0415

    if not torch.cuda.is_available():
        typer.echo(
            "nautile bench kernels needs an NVIDIA GPU (compute capability 8.0 or newer) and PyTorch's CUDA build", err=True
        )
        raise typer.Exit(1)
    known = VARIANTS if variants else CASES
    cases = [case for case in known if only in case.name]
    if not cases:
        raise typer.BadParameter(f"no case's name contains {only!r}; they are: {', '.join(case.name for case in known)}")
    about = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": commit or _commit()}
    try:
        result = run(cases, about, out, resume=resume, told=(lambda _: None) if json_ else typer.echo)
    except CardLostError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(3) from None
    if json_:
        typer.echo(json.dumps(result))


@app.command("model")
def model(  # noqa: PLR0913  # one parameter an option
    *,
    shape: Annotated[str, typer.Option(help="flash, pro or tiny, for random weights.")] = "flash",
    weights: Annotated[str, typer.Option(help="random, or the directory of an official checkpoint.")] = "random",
    layers: Annotated[int, typer.Option(min=0, help="A slice of the first layers; 0: all.")] = 0,
    experts: Annotated[int, typer.Option(min=0, help="Routed experts a layer; 0: the model's.")] = 0,
    zipf: Annotated[float, typer.Option(min=0, help="Popularity of experts about rank^-zipf; 0: uniform.")] = 0.0,
    case: Annotated[str, typer.Option(help="Context x batch of decode steps, several with commas.")] = "4096x1",
    ahead: Annotated[int, typer.Option(min=0, help="Experts a layer copied before they are chosen.")] = 0,
    prefill: Annotated[str, typer.Option(help="Lengths of prompts, several with commas.")] = "",
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of a prompt that go through a layer together.")] = 32768,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps that are timed.")] = 48,
    card_memory: Annotated[str, typer.Option(help="Of the card's memory, such as 80GB. Default: what is free.")] = "",
    host_memory: Annotated[str, typer.Option(help="Of the host's memory.")] = "120GB",
    threads: Annotated[int, typer.Option(min=-1, help="For experts on the host; 0: stream all, -1: all cores but one.")] = -1,
    check: Annotated[bool, typer.Option(help="Compare with the modules first.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON here, anew after each line.")] = None,
) -> None:
    """Time decode steps and prompts with FP8 and FP4 weights as stored, on the card and in host memory.

    Example: nautile bench model --shape flash --weights random --case 4096x1,4096x8 --prefill 65536
    """
    import torch  # noqa: PLC0415

    from nautile.checkpoint.errors import CheckpointError  # noqa: PLC0415
    from nautile.engine.costs import parse_bytes  # noqa: PLC0415
    from nautile.engine.measure import Case, Machine, Prompt, Run, Subject, run  # noqa: PLC0415

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if shape not in ("flash", "pro", "tiny"):
        raise typer.BadParameter(f"--shape is flash, pro or tiny, not {shape!r}")
    cores = max(1, (os.cpu_count() or 2) - 1) if threads < 0 else threads
    try:
        pairs = [tuple(map(int, pair.split("x"))) for pair in case.split(",") if pair]
        plan = Run(
            Subject(shape, weights, layers, experts, zipf),
            Machine(int(parse_bytes(card_memory)) if card_memory else 0, int(parse_bytes(host_memory)), cores),
            tuple(Case(context, batch, ahead, steps) for context, batch in pairs),
            tuple(Prompt(int(tokens), chunk) for tokens in prefill.split(",") if tokens), check,
        )  # fmt: skip
    except ValueError as error:
        raise typer.BadParameter(f"{error}; --case is like 4096x1,4096x8 and --prefill like 4096,65536") from None
    result: dict[str, Any] = _where(_commit())

    def keep(key: str, value: Any) -> None:
        typer.echo(json.dumps({key: value}))
        if key == "built":
            result.update(value)
        else:
            result.setdefault(key, []).append(value)
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    try:
        run(plan, device, keep, lambda line: typer.echo(line, err=True))
    except (ValueError, OSError, CheckpointError) as error:  # ConfigError and PlacementError are ValueErrors
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    if any("failure" in row for rows in result.values() if isinstance(rows, list) for row in rows):
        raise typer.Exit(1)


@app.command("serve")
def serve(  # noqa: PLR0913  # one parameter an option
    *,
    url: Annotated[str, typer.Option(help="A running server. Without it, an engine in this process.")] = "",
    model: Annotated[str, typer.Option(help="Model of that engine. Default: the shipped nano.")] = "",
    api_key: Annotated[str, typer.Option(help="The server's key.")] = "",
    requests: Annotated[int, typer.Option(min=1, help="How many in all.")] = 32,
    rate: Annotated[float, typer.Option(min=0, help="Arrivals a second (Poisson). 0: clients wait for their answers.")] = 0.0,
    clients: Annotated[int, typer.Option(min=1, help="Clients at a time, with rate 0.")] = 8,
    input_tokens: Annotated[int, typer.Option("--input", min=1, help="Tokens of a prompt (words, with a URL).")] = 512,
    output_tokens: Annotated[int, typer.Option("--output", min=1, help="Tokens of an answer, at most with a URL.")] = 64,
    shared: Annotated[float, typer.Option(min=0, max=1, help="Part of a prompt that its group has in common.")] = 0.6,
    groups: Annotated[int, typer.Option(min=1, help="Groups of prompts with a common beginning.")] = 2,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    precision: Annotated[str, typer.Option(help="Of the native kernels: float32 or bfloat16.")] = "float32",
    speculate: Annotated[bool, typer.Option(help="Draft with the MTP block.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the times as PNG or SVG here.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Send a load; report throughput, time to the first token, time per token, hit rate.

    Example: nautile bench serve --rate 4 --requests 64 --input 512 --output 64 --plot load.png
    """
    from nautile.engine.load import Load, summary  # noqa: PLC0415

    load = Load(requests, rate, clients, input_tokens, output_tokens, shared, groups, seed)
    version = _commit()
    if url and model:
        raise typer.BadParameter("give --url or --model, not both")
    if precision not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"--precision is float32 or bfloat16, not {precision!r}")
    if url:
        outcomes, seconds = asyncio.run(_run(load, HttpTarget(url, api_key), json_))
        about: dict[str, Any] = {"target": "server"}
    else:
        outcomes, seconds, about = _run_engine(load, model, precision, speculate, json_)
    result = {**about, **summary(load, outcomes, seconds), **_where(version)}
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        _plot(outcomes, result, plot)
    if json_:
        typer.echo(json.dumps(result))
    else:
        _show(result)
    if result["errors"]:
        raise typer.Exit(1)


def _run_engine(
    load: Load, model: str, precision: str, speculate: bool, quiet: bool
) -> tuple[list[Outcome], float, dict[str, Any]]:
    from nautile.cli.agent import shipped_model  # noqa: PLC0415
    from nautile.engine import Engine, EngineConfig, SamplingParams  # noqa: PLC0415
    from nautile.engine.load import EngineTarget  # noqa: PLC0415

    options = EngineConfig(precision="bfloat16" if precision == "bfloat16" else "float32", speculate=speculate)
    engine = Engine(model or shipped_model(), options)
    try:
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=8, ignore_eos=True))  # warm-up
        outcomes, seconds = asyncio.run(_run(load, EngineTarget(engine), quiet))
        stats = engine.stats()
    finally:
        engine.close()
    about = {
        "target": "engine",
        "runner": engine.runner_name,
        "precision": precision,
        "steps": stats.steps,
        "preemptions": stats.preemptions,
        "drafted": stats.drafted_tokens,
        "accepted": stats.accepted_tokens,
    }
    return outcomes, seconds, about


async def _run(load: Load, target: Target, quiet: bool) -> tuple[list[Outcome], float]:
    from rich.progress import Progress  # noqa: PLC0415

    from nautile.engine.load import run_load  # noqa: PLC0415

    with Progress(transient=True, disable=quiet) as bar:
        task = bar.add_task("requests", total=load.requests)
        return await run_load(load, target, lambda ended: bar.update(task, completed=ended))


@dataclass(frozen=True)
class HttpTarget:
    """A server with OpenAI's /v1/completions. Prompts are words, one for each number."""

    url: str
    api_key: str

    async def ask(self, prompt: tuple[int, ...], output_tokens: int) -> AsyncIterator[tuple[int, int] | None]:
        """See ``Target.ask``."""
        import httpx  # noqa: PLC0415

        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        text = " ".join(f"{_SYLLABLES[n % 8]}{_SYLLABLES[n // 8 % 8]}" for n in prompt)
        body = {"prompt": text, "max_tokens": output_tokens, "temperature": 0, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        usage = (0, 0)
        async with httpx.AsyncClient(base_url=self.url.rstrip("/"), headers=headers, timeout=600) as client:
            body["model"] = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    data = json.loads(line[6:])
                    if data.get("usage"):
                        usage = data["usage"]["prompt_tokens"], data["usage"].get("prompt_cache_hit_tokens", 0)
                    if data.get("choices") and data["choices"][0].get("text"):
                        yield None
        yield usage


_SYLLABLES = ("ra", "to", "mi", "len", "sor", "ka", "pe", "dun")


def _where(version: str) -> dict[str, str]:
    return {"device": _device(), "date": time.strftime("%Y-%m-%d"), "commit": version}


def _device() -> str:
    from nautile.evals.tools import device_name  # noqa: PLC0415

    return device_name() or platform.machine()


def _commit() -> str:
    from nautile.evals.tools import commit  # noqa: PLC0415

    return commit()


def _show(result: dict[str, Any]) -> None:
    rates = f"{result['output_tokens_per_second']:,.1f} output and {result['prompt_tokens_per_second']:,.1f} prompt tokens/s"
    typer.echo(
        f"{rates}, {result['requests_per_second']:.2f} requests/s; hit rate {result['hit_rate']:.1%}; {result['errors']} errors"
    )
    for key, label in (("ttft_ms", "to the first token"), ("tpot_ms", "per token after it")):
        if result[key]:
            typer.echo(f"{label}, ms: " + ", ".join(f"{name} {value:,.1f}" for name, value in result[key].items()))
    if result["first_error"]:
        typer.echo(f"first error: {result['first_error']}", err=True)


def _plot(outcomes: Sequence[Outcome], result: dict[str, Any], path: Path) -> None:
    """Two panels: the distribution of both times; tokens a second over time."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise typer.BadParameter("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    firsts = sorted(1000 * outcome.token_times[0] for outcome in outcomes if outcome.token_times)
    gaps = sorted(
        1000 * (later - earlier)
        for outcome in outcomes
        for earlier, later in zip(outcome.token_times, outcome.token_times[1:], strict=False)
    )
    for values, label in ((firsts, "to the first token"), (gaps, "between tokens")):
        left.plot(values, [(index + 1) / len(values) for index in range(len(values))], label=label)
    left.set(xscale="log", xlabel="milliseconds", ylabel="share of requests or tokens", ylim=(0, 1))
    left.legend()
    moments = [outcome.sent + moment for outcome in outcomes for moment in outcome.token_times]
    bins = max(10, min(60, int(result["seconds"] * 2)))
    width = result["seconds"] / bins
    counts = [0.0] * bins
    for moment in moments:
        counts[min(bins - 1, int(moment / width))] += 1 / width
    right.step([index * width for index in range(bins)], counts, where="post")
    right.set(xlabel="seconds", ylabel="output tokens per second", ylim=(0, None))
    figure.suptitle(f"{result['device']}, {result['date']}, {result['commit']}", fontsize=9)
    figure.savefig(path, dpi=120)
