"""``nautile chat``: talk to a model, streaming. Ctrl-C stops an answer, Ctrl-D leaves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["chat"]


def chat(  # noqa: PLR0913  # one parameter an option
    *,
    model: Annotated[
        str, typer.Option(help="Model directory or Hub id (with --url: its name). Default: the shipped nano.")
    ] = "",
    url: Annotated[str, typer.Option(help="Talk to this OpenAI-compatible server, as http://127.0.0.1:8000")] = "",
    api_key: Annotated[str, typer.Option(help="The server's key.")] = "",
    api_key_file: Annotated[Path | None, typer.Option(help="A file whose first line is the server's key.")] = None,
    dialect: Annotated[str | None, typer.Option(help="0731 or preview, when the checkpoint does not say.")] = None,
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16 where this CPU multiplies it), float32 for parity, bfloat16.")
    ] = "auto",
    thinking: Annotated[bool, typer.Option(help="Let the model reason before it answers.")] = True,
    temperature: Annotated[float | None, typer.Option(help="0, the default, is greedy; with --url the server's.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of one answer.")] = 1024,
    seed: Annotated[int | None, typer.Option(help="Default: 0; with --url the server's choice.")] = None,
) -> None:
    """Talk to the model. Ctrl-C stops an answer, Ctrl-D leaves.

    Example: nautile chat --temperature 0.7, or nautile chat --url http://127.0.0.1:8000
    """
    from rich.console import Console  # noqa: PLC0415

    from nautile.agent.client import ChatClient  # noqa: PLC0415
    from nautile.agent.console import Terminal  # noqa: PLC0415
    from nautile.agent.http_client import ServerError  # noqa: PLC0415
    from nautile.cli.agent import computes_in, open_client, open_remote  # noqa: PLC0415

    client: ChatClient
    if url:
        wanted = None if thinking else False  # thinking is what servers of V4 do by themselves; others do not know the field
        client = open_remote(url, model, api_key, api_key_file, thinking=wanted, temperature=temperature, seed=seed)
    else:
        client = open_client(
            model, thinking=thinking, temperature=temperature or 0.0, seed=seed or 0, dialect=dialect, dtype=dtype
        )
    console = Console()
    terminal = Terminal(console)
    talk = client.open([{"role": "system", "content": system}] if system else [], ())
    if sys.stdin.isatty():
        local = "" if url else f"{client.name} computes in {computes_in(client)}. "
        console.print(f"[dim]{local}Ctrl-C stops an answer, Ctrl-D leaves.[/dim]", highlight=False)
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
        except ServerError as error:
            terminal.line()
            console.print(str(error), style="red", markup=False)


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
