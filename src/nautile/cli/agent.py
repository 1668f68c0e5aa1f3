"""``nautile agent``: the shipped model, or another, works on the files of one directory."""

from __future__ import annotations

import dataclasses
import enum
import importlib.resources
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from nautile.agent.client import ChatClient, EngineClient
    from nautile.agent.http_client import HttpClient
    from nautile.agent.loop import Budget
    from nautile.agent.trajectory import Trajectory
    from nautile.engine import Engine, EngineConfig
    from nautile.sandbox import ToolSandbox

__all__ = ["SetupError", "agent", "computes_in", "open_client", "open_engine", "open_remote", "shipped_model"]


class SetupError(RuntimeError):
    """Something the command needs is not there; the text says what, and how to get it."""


class Unfinished(enum.StrEnum):
    """What to do with a call that was under way when the run stopped."""

    ask = "ask"
    rerun = "rerun"
    skip = "skip"


def agent(  # noqa: PLR0913  # one parameter an option
    task: Annotated[str, typer.Argument(help="What to do; or undo, to take back the edits of the last run.")] = "",
    *,
    dir: Annotated[Path, typer.Option(help="The directory to work on; tools see nothing else.")] = Path("."),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Apply edits and run commands without asking.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the last run on this directory.")] = False,
    unfinished: Annotated[Unfinished, typer.Option(help="With --resume: a call whose outcome is unknown.")] = Unfinished.ask,
    model: Annotated[
        str, typer.Option(help="Model directory or Hub id (with --url: its name). Default: the shipped nano.")
    ] = "",
    url: Annotated[str, typer.Option(help="Use the model of this OpenAI-compatible server, as http://127.0.0.1:8000")] = "",
    api_key: Annotated[str, typer.Option(help="The server's key.")] = "",
    api_key_file: Annotated[Path | None, typer.Option(help="A file whose first line is the server's key.")] = None,
    dialect: Annotated[str | None, typer.Option(help="0731 or preview, when the checkpoint does not say.")] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16 where this CPU multiplies it), float32 for parity, bfloat16.")
    ] = "auto",
    kinds: Annotated[bool, typer.Option("--kinds", help="List the kinds of task the model has mastered.")] = False,
    unconfined: Annotated[bool, typer.Option("--unconfined", help="Run tools with your rights, without a sandbox.")] = False,
    sandbox: Annotated[str, typer.Option(help="Where tools run: bubblewrap, function, container, microvm, vm.")] = "bubblewrap",
    emulate: Annotated[bool, typer.Option("--emulate", help="Let QEMU emulate a machine's processor without KVM.")] = False,
    steps: Annotated[int, typer.Option(help="Most turns of the model.")] = 24,
    tokens: Annotated[int, typer.Option(help="Most tokens of the conversation.")] = 32_768,
    reply_tokens: Annotated[int, typer.Option(help="Most tokens of one turn.")] = 1024,
    seconds: Annotated[float, typer.Option(help="Time limit of one tool call.")] = 30.0,
    state: Annotated[Path | None, typer.Option(help="Where logs are kept. Default: ~/.local/state/nautile/agent")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON instead of the run.")] = False,
) -> None:
    """Do a task on the files of a directory.

    Example: nautile agent "How many lines of notes.txt contain the word TODO?" --dir .
    """
    from nautile.agent.loop import Budget  # noqa: PLC0415
    from nautile.agent.trajectory import default_state  # noqa: PLC0415

    place = state or default_state()
    if kinds:
        _list_kinds(model)
    elif task == "undo":
        _undo(dir, place, sandbox, unconfined)
    else:
        budget = Budget(steps, tokens, reply_tokens, seconds)
        source = _Source(model, dialect, url, api_key, api_key_file, dtype)
        _work(_Order(task, dir, place, budget, yes, resume, unfinished, source, unconfined, sandbox, json_, emulate))


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where the model is: in this process, or with ``url`` behind a server."""

    model: str
    dialect: str | None
    url: str
    api_key: str
    api_key_file: Path | None
    dtype: str = "auto"

    def open(self) -> ChatClient:
        """A client. Raises what the loader or the server says."""
        if self.url:
            return open_remote(self.url, self.model, self.api_key, self.api_key_file)
        return open_client(self.model, dialect=self.dialect, dtype=self.dtype)


@dataclasses.dataclass(frozen=True)
class _Order:
    """The options of a run."""

    task: str
    directory: Path
    state: Path
    budget: Budget
    yes: bool
    resume: bool
    unfinished: Unfinished
    source: _Source
    unconfined: bool
    sandbox: str
    json: bool
    emulate: bool = False


def _work(order: _Order) -> None:
    from rich.console import Console  # noqa: PLC0415

    from nautile.agent.console import Terminal  # noqa: PLC0415
    from nautile.agent.loop import Agent, AgentError, last_run  # noqa: PLC0415
    from nautile.agent.tools import TOOLS  # noqa: PLC0415

    if not order.task.strip() and not order.resume:
        raise AgentError('the task is empty: say what to do, for example nautile agent "How many lines has notes.txt?"')
    if order.task.strip() and order.resume:
        raise AgentError("--resume goes on with the task of the last run: leave the task out")
    sandbox = _open(order.directory, order.sandbox, order.unconfined, order.emulate)
    console = Console(stderr=order.json)
    if order.unconfined:
        console.print("[yellow]--unconfined: tools run with your rights, on every file and with the network[/yellow]")
    path = last_run(order.state, sandbox.root) if order.resume else None
    if path is None and not order.source.url:
        _warn(order.task, order.source.model, console)
    client = order.source.open()
    if console.is_terminal and (dtype := computes_in(client)):
        console.print(f"[dim]{client.name} computes in {dtype}[/dim]", highlight=False)
    terminal = Terminal(console, yes=order.yes, unfinished=order.unfinished.value)
    worker = Agent(client, TOOLS, sandbox, budget=order.budget, front=terminal, state=order.state)
    outcome = worker.run(order.task) if path is None else worker.resume(path)
    terminal.line()
    _report(outcome, order.json)


def _report(outcome: Trajectory, as_json: bool) -> None:
    """The last word on a run, and the exit status: 0 answered, 1 stopped by the user, 2 the model failed."""
    if as_json:
        keys = ("status", "answer", "note", "task", "tokens")
        typer.echo(json.dumps({**{key: getattr(outcome, key) for key in keys}, "log": str(outcome.path)}, ensure_ascii=False))
    elif outcome.note:
        typer.echo(f"{outcome.note} (log: {outcome.path})", err=True)
    if outcome.status != "answered":
        raise typer.Exit(1 if outcome.status == "interrupted" else 2)


def _open(directory: Path, kind: str, unconfined: bool, emulate: bool = False) -> ToolSandbox:
    """Where tools run. Raises SandboxError."""
    from nautile.sandbox import InvalidRequest, open_sandbox  # noqa: PLC0415

    if kind == "bubblewrap":
        return open_sandbox(directory, unconfined=unconfined)
    if unconfined:
        raise InvalidRequest("--unconfined and --sandbox contradict each other: leave one out")
    from nautile.sandbox.tools import open_tools  # noqa: PLC0415

    return open_tools(directory, kind, emulate=emulate)


def _undo(directory: Path, state: Path, kind: str, unconfined: bool) -> None:
    from nautile.agent.undo import undo  # noqa: PLC0415

    paths = undo(state, _open(directory, kind, unconfined))
    for path in paths:
        typer.echo(f"restored {path}")
    if not paths:
        typer.echo("the files are already as they were before the run")


def _list_kinds(model: str) -> None:
    from nautile.evals.kinds import MASTERED, mastered  # noqa: PLC0415
    from nautile.evals.tools import measured_kinds  # noqa: PLC0415
    from nautile.train.tasks import HELD_OUT_START, KINDS  # noqa: PLC0415

    place = Path(model) if model else shipped_model()
    scores, good = measured_kinds(place), mastered(place)
    if not scores:
        typer.echo(f"{place} has no measurements (evals.json); these are the kinds it may have been trained on:")
    for name, kind in KINDS.items():
        score = scores.get(name)
        measured = f"{score.passed / score.total:6.1%} of {score.total}" if score and score.total else "not measured"
        example = kind.from_seed(HELD_OUT_START).prompt
        typer.echo(f"{'*' if name in good else ' '} {name:16} {measured:16} {example}")
    if scores:
        typer.echo(f"* mastered: at least {MASTERED:.0%} of held-out tasks right")


def _warn(task: str, model: str, console: Console) -> None:
    """A plain warning when the task is of no kind that the model has mastered; it still runs."""
    from nautile.evals.kinds import kind_of, mastered  # noqa: PLC0415

    place = Path(model) if model else shipped_model()
    kind, good = kind_of(task), mastered(place)
    if kind not in good and (not model or good):
        known = "has not mastered tasks like this one" if kind else "has not been measured on tasks worded like this one"
        text = f"{place.name} {known} (nautile agent --kinds lists those it has); it will try."
        console.print(text, style="yellow", highlight=False)


def shipped_model() -> Path:
    """The directory of the model that comes with the package; it may lack its weights."""
    return Path(str(importlib.resources.files("nautile") / "weights" / "nano"))


def open_client(
    model: str = "",
    *,
    thinking: bool = True,
    temperature: float = 0.0,
    seed: int = 0,
    dialect: str | None = None,
    dtype: str = "float32",
    config: EngineConfig | None = None,
) -> EngineClient:
    """Load a model and open it for conversations, with ``config`` or else in ``dtype`` (see ``choose_dtype``).

    Raises SetupError when the shipped model lacks its weights, SetupError for another dtype."""
    engine = open_engine(model, config) if config is not None else _open_in(model, dtype)
    from nautile.agent.client import EngineClient  # noqa: PLC0415
    from nautile.engine import SamplingParams  # noqa: PLC0415

    return EngineClient(engine, SamplingParams(temperature, seed=seed), model or "nano", thinking, dialect)


def _open_in(model: str, dtype: str) -> Engine:
    """The engine of a command that is told no more than a dtype; float32 where the native kernels cannot run the model."""
    from nautile.engine import Engine, EngineConfig  # noqa: PLC0415
    from nautile.engine.fast import choose_dtype, with_dtype  # noqa: PLC0415
    from nautile.engine.native import NativeRunner  # noqa: PLC0415

    try:
        options = with_dtype(EngineConfig(), choose_dtype(dtype))
    except ValueError as error:
        raise SetupError(str(error)) from None
    engine = open_engine(model, options)
    if dtype == "auto" and options.precision != "float32" and not isinstance(engine.runner, NativeRunner):
        engine.close()
        return Engine(engine.model, EngineConfig(), engine.tokenizer)
    return engine


def computes_in(client: ChatClient) -> str:
    """The number format of a model in this process; empty for one behind a server."""
    from nautile.engine import Engine  # noqa: PLC0415
    from nautile.engine.fast import computes_in as format_of  # noqa: PLC0415

    engine = getattr(client, "engine", None)
    return format_of(engine) if isinstance(engine, Engine) else ""


def open_remote(url: str, model: str, key: str, key_file: Path | None, **options: Any) -> HttpClient:
    """A client of a server; ``options`` are fields of ``HttpClient``. Raises ServerError, or ServiceError for the file."""
    from nautile.agent.http_client import connect  # noqa: PLC0415

    if not key and key_file is not None:
        from nautile.cli.serve import read_keys  # noqa: PLC0415

        key = read_keys(key_file)[0]
    return connect(url, model, key or None, **options)


def open_engine(model: str = "", config: EngineConfig | None = None) -> Engine:
    """Load a model (default: the shipped one). Raises SetupError when its weights are missing."""
    if not model:
        place = shipped_model()
        missing = [name for name in ("config.json", "tokenizer.json") if not (place / name).is_file()]
        missing += [] if list(place.glob("*.safetensors")) else ["*.safetensors"]
        if missing:
            raise SetupError(f"the shipped model is not complete: {place} lacks {', '.join(missing)}; pass --model DIRECTORY")
    from nautile.engine import Engine  # noqa: PLC0415  # torch is loaded here, after the cheap checks

    return Engine(model or shipped_model(), config)
