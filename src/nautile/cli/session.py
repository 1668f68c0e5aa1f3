"""``nautile session``: named timelines of a model that fork, rewind, move between machines and survive a restart."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nautile.engine import Engine
    from nautile.state import SessionInfo, SessionStore

__all__ = ["app", "default_sessions"]

app = typer.Typer(
    help="Named timelines that fork, rewind and survive a restart. Example: nautile session save story --text 'def add(a, b):'",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(help="The session.")]
Place = Annotated[Path | None, typer.Option("--sessions", help="Directory. Default: ~/.local/state/nautile/sessions")]
Model = Annotated[str, typer.Option(help="Model directory or Hub id. Default: the shipped nano.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def default_sessions() -> Path:
    """Where sessions are kept unless the caller says otherwise."""
    return Path.home() / ".local" / "state" / "nautile" / "sessions"


@app.command("list")
def list_(place: Place = None, json_: Json = False) -> None:
    """List the sessions.

    Example: nautile session list
    """
    infos = _store(place).list()
    if json_:
        typer.echo(json.dumps([dataclasses.asdict(info) for info in infos], indent=1))
        return
    for info in infos:
        typer.echo(_line(info))
    if not infos:
        typer.echo(f"no sessions in {place or default_sessions()}; nautile session save NAME --text TEXT makes one")


@app.command()
def info(name: Name, place: Place = None, json_: Json = False) -> None:
    """Show one session: its length, snapshots, origin.

    Example: nautile session info story
    """
    _show(_store(place).info(name), json_)


@app.command()
def save(  # noqa: PLR0913  # one parameter an option
    name: Name,
    *,
    text: Annotated[str | None, typer.Option(help="What the timeline begins with, as plain text.")] = None,
    file: Annotated[Path | None, typer.Option(help="The same from a file; - reads standard input.")] = None,
    message: Annotated[str | None, typer.Option(help="Or: a user's message, ready for the model's answer.")] = None,
    note: Annotated[str, typer.Option(help="A note to find it again.")] = "",
    model: Model = "",
    place: Place = None,
    json_: Json = False,
) -> None:
    """Let the model take in a text and save where that leaves it. A session of that name is replaced.

    Example: nautile session save story --text "def add(a, b):"
    """
    from nautile.engine.sessions import Live  # noqa: PLC0415

    store = _store(place)
    store.check_name(name)  # before the model is loaded and has taken in the text
    engine = _engine(model)
    live = Live.begin(engine, _ids(engine, text, file, message))
    _show(store.save(name, engine.pool, live.sequence, live.logits, note=note), json_)


@app.command()
def resume(  # noqa: PLR0913  # one parameter an option
    name: Name,
    *,
    text: Annotated[str | None, typer.Option(help="Goes on with this text first.")] = None,
    file: Annotated[Path | None, typer.Option(help="The same from a file; - reads standard input.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most new tokens; 0: only take in the text.", min=0)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws, with a temperature.")] = 0,
    keep: Annotated[bool, typer.Option("--keep/--discard", help="Save where it leads, or leave the session as it was.")] = True,
    model: Model = "",
    place: Place = None,
    json_: Json = False,
) -> None:
    """Go on where a session is: new text, then the model's continuation.

    Example: nautile session resume story --max-tokens 32
    """
    from nautile.engine import SamplingParams  # noqa: PLC0415
    from nautile.engine.sessions import Live  # noqa: PLC0415

    engine, store = _engine(model), _store(place)
    resumed = store.resume(name, engine.pool)
    live, result = Live.resume(engine, resumed), resumed.info
    if text is not None or file is not None:
        live.feed(_ids(engine, text, file, None, first=False))
    new = []
    decoder = _Printer(engine, quiet=json_)
    for token in live.generate(SamplingParams(temperature, seed=seed, max_tokens=max(1, max_tokens))) if max_tokens else ():
        new.append(token)
        decoder.show(new)
    decoder.end(ended=len(new) < max_tokens)
    if keep:
        result = store.save(name, engine.pool, live.sequence, live.logits, revision=result.revision)
    if json_:
        text = engine.tokenizer.decode(new) if engine.tokenizer else ""
        typer.echo(json.dumps({"text": text, "ids": new, "recomputed": live.recomputed, **dataclasses.asdict(result)}))


@app.command()
def fork(
    name: Name, new: Annotated[str, typer.Argument(help="The new session.")], place: Place = None, json_: Json = False
) -> None:
    """Make a second session that is where this one is.

    Example: nautile session fork story other-ending
    """
    _show(_store(place).fork(name, new), json_)


@app.command()
def rewind(
    name: Name,
    length: Annotated[int, typer.Argument(help="How many tokens stay.")],
    into: Annotated[str | None, typer.Option("--as", help="Make a new session and leave this one.")] = None,
    place: Place = None,
    json_: Json = False,
) -> None:
    """Go back to the first LENGTH tokens.

    Example: nautile session rewind story 120 --as earlier
    """
    _show(_store(place).rewind(name, length, into), json_)


@app.command()
def export(name: Name, target: Annotated[Path, typer.Argument(help="The file.")], place: Place = None) -> None:
    """Write all of a session into one file that can be imported anywhere.

    Example: nautile session export story story.nautile
    """
    size = _store(place).export(name, target)
    typer.echo(f"{target}: {size:,} bytes")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="The file.")],
    into: Annotated[str | None, typer.Option("--as", help="Another name than it was exported under.")] = None,
    place: Place = None,
    json_: Json = False,
) -> None:
    """Take up an exported session.

    Example: nautile session import story.nautile
    """
    _show(_store(place).import_(source, into), json_)


@app.command()
def delete(name: Name, place: Place = None) -> None:
    """Remove a session.

    Example: nautile session delete story
    """
    _store(place).delete(name)
    typer.echo(f"{name} is deleted")


class _Printer:
    """Text as it comes, whole characters only."""

    def __init__(self, engine: Engine, quiet: bool) -> None:
        self.tokenizer, self.quiet, self.shown = engine.tokenizer, quiet, ""

    def show(self, ids: list[int]) -> None:
        """Print what the newest of ``ids`` adds."""
        if self.quiet or self.tokenizer is None:
            return
        text = self.tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            typer.echo(text[len(self.shown) :], nl=False)
            self.shown = text

    def end(self, ended: bool) -> None:
        """Finish the line; say so when the model had no more to say."""
        if not self.quiet:
            typer.echo("\n(the model ends here)" if ended else "")


def _store(place: Path | None) -> SessionStore:
    from nautile.state import SessionStore  # noqa: PLC0415

    return SessionStore(place or default_sessions(), lambda text: typer.echo(f"nautile: {text}", err=True))


def _engine(model: str) -> Engine:
    from nautile.cli.agent import open_engine  # noqa: PLC0415
    from nautile.engine.sessions import know_model  # noqa: PLC0415

    engine = open_engine(model)
    know_model(engine)
    return engine


def _ids(engine: Engine, text: str | None, file: Path | None, message: str | None, first: bool = True) -> list[int]:
    """The tokens of whichever was given; a timeline begins with the beginning of sentence. Raises BadParameter."""
    if sum(source is not None for source in (text, file, message)) != 1:
        raise typer.BadParameter("give one of --text, --file" + (", --message" if first else ""))
    if engine.tokenizer is None:
        raise typer.BadParameter("this model has no tokenizer")
    if message is not None:
        from nautile.protocol import encode  # noqa: PLC0415

        dialect = engine.config.dialect or "0731"
        return encode([{"role": "user", "content": message}], tokenizer=engine.tokenizer, dialect=dialect).ids
    if file is not None:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    assert text is not None
    ids = engine.tokenizer.encode(text)
    return [engine.config.bos_token_id, *ids] if first else ids


def _show(info: SessionInfo, json_: bool) -> None:
    if json_:
        typer.echo(json.dumps(dataclasses.asdict(info)))
        return
    fields: dict[str, Any] = {
        "tokens": f"{info.length:,}"
        + (f" ({info.length - info.state_length} to be computed)" if info.state_length < info.length else ""),
        "saved": f"{info.updated}, revision {info.revision}",
        "forked from": info.forked_from,
        "rewinds to": ", ".join(map(str, info.snapshots[-8:])) or None,
        "model": info.model,
        "note": info.note,
    }
    typer.echo(info.name)
    for key, value in fields.items():
        if value:
            typer.echo(f"  {key:12} {value}")


def _line(info: SessionInfo) -> str:
    if info.problem:
        return f"{info.name:24} cannot be used: {info.problem}"
    origin = f"  from {info.forked_from}" if info.forked_from else ""
    return f"{info.name:24} {info.length:>9,} tokens  {info.updated}{origin}{'  ' + info.note if info.note else ''}"
