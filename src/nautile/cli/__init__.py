"""The ``nautile`` command: builds the verbs, turns every error into one line and an exit status.

0: it worked. 1: the set-up, the input or the usage is wrong. 2: the model was wrong (demo, agent).
Verbs import what is heavy inside their functions, so that --help answers at once.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from nautile import __version__
from nautile.cli import agent, bench, chat, demo, doctor, evaluate, sandbox, serve, session, trace, train

__all__ = ["app", "main"]

app = typer.Typer(
    name="nautile",
    help="DeepSeek-V4 end to end. Start with: nautile demo",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("agent")(agent.agent)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("doctor")(doctor.doctor)
app.command("trace")(trace.trace)
app.add_typer(evaluate.app, name="eval")
app.add_typer(bench.app, name="bench")
app.add_typer(train.app, name="train")
app.add_typer(sandbox.app, name="sandbox")
app.add_typer(session.app, name="session")
for _verb in ("plan", "convert"):
    if importlib.util.find_spec(f"nautile.cli.{_verb}"):
        app.command(_verb)(getattr(importlib.import_module(f"nautile.cli.{_verb}"), _verb))

_UsageError = typer.BadParameter.__bases__[0]  # typer brings its own copy of click, or uses click: the class is the same


def _version(value: bool) -> None:
    if not value:
        return
    for name in ("nautile", "torch", "triton"):
        typer.echo(f"{name} {__version__ if name == 'nautile' else _installed(name)}")
    typer.echo("checkpoint layouts: official V4 (read, write), transformers 5 (read, write); agent log: 1")
    raise typer.Exit


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")] = False,
) -> None:
    """DeepSeek-V4 end to end. Start with: nautile demo"""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = given[:1] == ["--debug"]
    try:
        status = typer.main.get_command(app).main(given, prog_name="nautile", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except typer.Exit as leave:
        return leave.exit_code
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("stopped", err=True)
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone (| head): nothing is left to say, and nobody to hear it
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        typer.echo(_line(error, debug), err=True)
        return 1


def _line(error: Exception, debug: bool) -> str:
    """One line for any error: Nautile's own and the system's speak for themselves, others name their kind."""
    if isinstance(error, _UsageError) and hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "nautile"
        if type(error).__name__ == "NoArgsIsHelpError":
            return str(error.format_message())
        return f"nautile: {error.format_message()} (see {command} --help)"
    text = " ".join(str(error).split())
    if isinstance(error, OSError) or type(error).__module__.startswith("nautile.") or isinstance(error, typer.BadParameter):
        return f"nautile: {text}"
    hint = "" if debug else "; nautile --debug VERB ... shows where"
    return f"nautile: {type(error).__name__}: {text}{hint}"
