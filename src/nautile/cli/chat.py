"""``nautile chat``: talk to a model, streaming. Ctrl-C stops an answer, Ctrl-D leaves."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

__all__ = ["chat"]


def chat(
    *,
    model: Annotated[str, typer.Option(help="Model directory or Hub id. Default: the shipped nano.")] = "",
    dialect: Annotated[str | None, typer.Option(help="0731 or preview, when the checkpoint does not say.")] = None,
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    thinking: Annotated[bool, typer.Option(help="Let the model reason before it answers.")] = True,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of one answer.")] = 1024,
    seed: int = 0,
) -> None:
    """Talk to the model. Ctrl-C stops an answer, Ctrl-D leaves.

    Example: nautile chat --temperature 0.7
    """
    from rich.console import Console  # noqa: PLC0415

    from nautile.agent.console import Terminal  # noqa: PLC0415
    from nautile.cli.agent import open_client  # noqa: PLC0415

    client = open_client(model, thinking=thinking, temperature=temperature, seed=seed, dialect=dialect)
    console = Console()
    terminal = Terminal(console)
    talk = client.open([{"role": "system", "content": system}] if system else [], ())
    if sys.stdin.isatty():
        console.print("[dim]Ctrl-C stops an answer, Ctrl-D leaves.[/dim]")
    while (text := _asked()) is not None:
        if not text.strip():
            continue
        talk.say([{"role": "user", "content": text}])
        try:
            reply = talk.reply(max_tokens, terminal.event)
            terminal.line()
            if not reply.ended:
                console.print(f"[yellow](cut at {max_tokens} tokens; --max-tokens raises the limit)[/yellow]")
        except KeyboardInterrupt:
            terminal.line()
            console.print("[yellow](stopped; the unfinished answer is forgotten)[/yellow]")


def _asked() -> str | None:
    """The next line of the user, None when there will be no more."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            return input(prompt)
        except EOFError:
            return None
        except KeyboardInterrupt:
            typer.echo("\n(Ctrl-D leaves)")
