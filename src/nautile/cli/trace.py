"""``nautile trace``: see inside: what the indexer picked, which experts ran, how streams mixed, which drafts were right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nautile.engine import Engine

__all__ = ["trace"]

_MOST = 4096  # tokens: the record holds every decision of every layer for each of them


def trace(  # noqa: PLR0913  # one parameter an option
    prompt: Annotated[str, typer.Argument(help="The text; a user's message unless --raw.")],
    *,
    model: Annotated[str, typer.Option(help="Model directory or Hub id. Default: the shipped nano.")] = "",
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("trace.html"),
    json_out: Annotated[Path | None, typer.Option(help="Also write the record as JSON here.")] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="Tokens to generate (greedily) and trace too.")] = 32,
    raw: Annotated[bool, typer.Option(help="The text as it is, without a chat template.")] = False,
    indexer: Annotated[bool, typer.Option(help="Which compressed entries the indexer picked.")] = True,
    experts: Annotated[bool, typer.Option(help="Which experts ran.")] = True,
    mhc: Annotated[bool, typer.Option(help="How the residual streams were read, written and mixed.")] = True,
) -> None:
    """Run a prompt and write one self-contained page that shows every decision the network took.

    Example: nautile trace "def add(a, b):" --raw --out trace.html
    """
    from nautile.cli.agent import shipped_model  # noqa: PLC0415
    from nautile.engine import Engine, SamplingParams  # noqa: PLC0415
    from nautile.engine.tracing import page, record  # noqa: PLC0415
    from nautile.model.transformer import Trace  # noqa: PLC0415

    engine = Engine(model or shipped_model())
    try:
        ids = _prompt_ids(engine, prompt, raw)
        if len(ids) + max_tokens > _MOST:
            raise typer.BadParameter(
                f"{len(ids)} tokens and {max_tokens} to generate are more than {_MOST}: shorten the prompt"
            )
        answer = engine.generate([ids], SamplingParams(max_tokens=max_tokens))[0].ids if max_tokens else []
    finally:
        engine.close()
    found = record(engine.model, [*ids, *answer], len(ids), Trace(indexer, experts, mhc), engine.tokenizer)
    out.write_text(page(found), encoding="utf-8")
    if json_out is not None:
        json_out.write_text(json.dumps(found), encoding="utf-8")
    typer.echo(f"{len(ids)} tokens and {len(answer)} generated: {out}")


def _prompt_ids(engine: Engine, prompt: str, raw: bool) -> list[int]:
    from nautile.protocol import encode  # noqa: PLC0415

    assert engine.tokenizer is not None
    if raw or engine.config.dialect is None:
        ids = engine.tokenizer.encode(prompt)
    else:
        message = [{"role": "user", "content": prompt}]
        ids = encode(message, tokenizer=engine.tokenizer, dialect=engine.config.dialect).ids
    if not ids:
        raise typer.BadParameter("the prompt is empty")
    return list(ids)
