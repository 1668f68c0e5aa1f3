"""``nautile serve``: the APIs that agents speak, in front of one engine."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nautile.engine import EngineConfig
    from nautile.server.service import ServerOptions, Service

__all__ = ["read_keys", "serve"]


class Effort(enum.StrEnum):
    """Reasoning effort."""

    low = "low"
    high = "high"
    max = "max"


class Rows(enum.StrEnum):
    """Formats of the state."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    packed = "packed"


class LogFormat(enum.StrEnum):
    """How logs are written."""

    console = "console"
    json = "json"


def serve(  # noqa: PLR0913  # one parameter an option
    *,
    model: Annotated[str, typer.Option(help="Model directory or Hub id. Default: the shipped nano.")] = "",
    name: Annotated[str, typer.Option(help="What clients call the model. Default: the directory's name.")] = "",
    dialect: Annotated[str, typer.Option(help="0731 or preview, when the checkpoint does not say.")] = "",
    host: Annotated[str, typer.Option(help="Address to listen on; any but loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[list[str] | None, typer.Option(help="A key that clients must send; may be repeated.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File of keys, one a line; others cannot see it in ps.")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="A host name clients use, beside localhost.")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="A site whose pages may call, as https://NAME.")] = None,
    effort: Annotated[Effort | None, typer.Option(help="When a request names none. Default: high; nano: low.")] = None,
    temperature: Annotated[float | None, typer.Option(help="When a request names none. Default: 1; nano: 0.")] = None,
    strict_reasoning: Annotated[bool, typer.Option(help="Refuse turns whose reasoning was not sent back.")] = False,
    body_limit: Annotated[int, typer.Option(min=1, help="Most MiB of one request.")] = 32,
    concurrency: Annotated[int, typer.Option(min=1, help="Most requests of one key at a time.")] = 64,
    keep_alive: Annotated[float, typer.Option(min=0.1, help="Seconds of silence before a comment.")] = 10.0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds to finish what runs after SIGTERM.")] = 30.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.")] = None,
    running: Annotated[int, typer.Option(min=1, help="Most sequences in one step of the engine.")] = 16,
    memory: Annotated[int, typer.Option(min=1, help="MiB for the state of sequences and kept prefixes.")] = 256,
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16 where this CPU multiplies it), float32 for parity, bfloat16.")
    ] = "auto",
    rows: Annotated[Rows | None, typer.Option(help="Format of the state. Default: the dtype; with --sessions float32.")] = None,
    speculate: Annotated[bool, typer.Option(help="Draft with the checkpoint's MTP block; outputs stay the same.")] = False,
    cache_dir: Annotated[Path | None, typer.Option(help="Keep prefixes here between runs.")] = None,
    sessions: Annotated[Path | None, typer.Option(help="Keep named sessions here and serve /v1/sessions.")] = None,
    log_format: Annotated[LogFormat, typer.Option(help="console or json.")] = LogFormat.console,
    log_prompts: Annotated[bool, typer.Option(help="Log the text of prompts and answers.")] = False,
) -> None:
    """Serve the model over HTTP: OpenAI chat, completions and responses, Anthropic messages, metrics, a page to chat on.

    Example: nautile serve --port 8000
    """
    from nautile.engine import Engine, EngineConfig  # noqa: PLC0415
    from nautile.engine.fast import choose_dtype, computes_in  # noqa: PLC0415
    from nautile.server.service import ServerOptions  # noqa: PLC0415
    from nautile.server.serving import check_exposure, listen  # noqa: PLC0415
    from nautile.server.serving import serve as run  # noqa: PLC0415

    options = ServerOptions(
        api_keys=(*(api_key or ()), *(read_keys(api_key_file) if api_key_file else ())),
        allowed_hosts=tuple(allow_host or ()),
        allowed_origins=tuple(origin.rstrip("/") for origin in allow_origin or ()),
        body_limit=body_limit * 2**20,
        concurrency=concurrency,
        keep_alive=keep_alive,
        drain=drain,
        effort=effort.value if effort else ("high" if model else "low"),  # nano was trained without an effort's text
        temperature=temperature if temperature is not None else (1.0 if model else 0.0),
        strict_reasoning=strict_reasoning,
        log_prompts=log_prompts,
        log_format=log_format.value,
    )
    check_exposure(host, options)
    try:
        choice = choose_dtype(dtype)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    engine = EngineConfig(
        threads=threads,
        precision=choice.dtype,
        max_running=running,
        pool_bytes=memory * 2**20,
        rows=rows.value if rows is not None else "float32" if sessions is not None else choice.dtype,
        speculate=speculate,
        cache_dir=cache_dir,
    )
    listener = listen(host, port)  # before the model is loaded: a port in use is known at once
    service = _open(model, name, dialect, options, engine)
    assert isinstance(service.engine, Engine)
    if sessions is not None:
        _keep_sessions(service, sessions)
    address, number = listener.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    where = f"http://{shown}:{number}/ (APIs: http://{shown}:{number}/v1; computes in {computes_in(service.engine)})"
    typer.echo(f"{service.name} at {where}; Ctrl-C ends", err=True)
    run(service, listener)


def _open(model: str, name: str, dialect: str, options: ServerOptions, config: EngineConfig) -> Service:
    """Load the model. Raises ServiceError, or what the loader raises."""
    from nautile.cli.agent import open_engine  # noqa: PLC0415
    from nautile.server.service import Service  # noqa: PLC0415

    engine = open_engine(model, config)
    return Service(engine, name or (Path(model).name if model else "nano"), options, dialect)


def _keep_sessions(service: Service, directory: Path) -> None:
    """Raises StoreUnavailable when the directory cannot be used."""
    from nautile.engine import Engine  # noqa: PLC0415
    from nautile.engine.sessions import EngineSessions  # noqa: PLC0415

    assert isinstance(service.engine, Engine)
    service.sessions = EngineSessions(service.engine, directory)


def read_keys(path: Path) -> tuple[str, ...]:
    """Keys of a file, one a line; empty lines and those that begin with # are left out. Raises ServiceError."""
    from nautile.server.service import ServiceError  # noqa: PLC0415

    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ServiceError(f"the key file {path} cannot be read: {error}") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ServiceError(f"the key file {path} has no key in it: write one a line")
    return keys
