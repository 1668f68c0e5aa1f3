"""``nautile doctor``: is this engine or server as exact and as frugal as it says?"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import httpx

    from nautile.engine.doctor import Finding

__all__ = ["doctor"]

_MARKS = {"ok": "ok  ", "warn": "WARN", "bad": "BAD ", "n/a": "n/a "}


def doctor(
    url: Annotated[str, typer.Argument(help="A running server, as http://127.0.0.1:8000. Without it, a model is loaded.")] = "",
    model: Annotated[str, typer.Option(help="Model directory or Hub id. Default: the shipped nano.")] = "",
    api_key: Annotated[str, typer.Option(help="The server's key.")] = "",
    json_: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check a model here, or a running server: prefix hits, drafts, needle at every length mod 4, state bytes, growth.

    Exit status 1 when something is bad. Example: nautile doctor --model ./my-model
    """
    if url and model:
        raise typer.BadParameter("give a URL or --model, not both")
    began, findings = time.monotonic(), []
    for finding in _examine_server(url, api_key) if url else _examine_model(model):
        findings.append(finding)
        if not json_:
            typer.echo(f"{_MARKS[finding.verdict]} {finding.name}: {finding.measured}")
            if finding.fix:
                typer.echo(f"     -> {finding.fix}")
    seconds = time.monotonic() - began
    bad = any(finding.verdict == "bad" for finding in findings)
    if json_:
        report = {"ok": not bad, "seconds": round(seconds, 1), "findings": [asdict(finding) for finding in findings]}
        typer.echo(json.dumps(report))
    else:
        typer.echo(f"{'Something is bad.' if bad else 'Nothing is bad.'} ({seconds:.0f} s)")
    if bad:
        raise typer.Exit(1)


def _examine_model(model: str) -> Iterator[Finding]:
    from nautile.checkpoint import load_model, resolve_model  # noqa: PLC0415
    from nautile.cli.agent import shipped_model  # noqa: PLC0415
    from nautile.engine import EngineConfig  # noqa: PLC0415
    from nautile.engine.doctor import examine  # noqa: PLC0415
    from nautile.protocol import Tokenizer  # noqa: PLC0415

    path = resolve_model(model or shipped_model())
    yield from examine(load_model(path), Tokenizer.load(path), EngineConfig())


# A server -------------------------------------------------------------------------------------------------------------


def _examine_server(url: str, api_key: str) -> Iterator[Finding]:
    import httpx  # noqa: PLC0415

    from nautile.engine.doctor import Finding  # noqa: PLC0415

    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=120) as client:
        try:
            names = client.get("/v1/models").raise_for_status().json()["data"]
        except (httpx.HTTPError, KeyError, ValueError) as error:
            raise typer.BadParameter(f"{url} does not answer /v1/models as a server would: {error}") from None
        name = names[0]["id"]
        yield Finding("server", "ok", f"{name} answers")
        yield _server_hits(client, name)
        yield _server_needle(client, name)
        yield from _server_metrics(client)


def _ask(client: httpx.Client, model: str, text: str, tokens: int = 12) -> tuple[str, int, int, float]:
    """(answer, prompt tokens, cached tokens, seconds) of one greedy completion."""
    body = {"model": model, "prompt": text, "max_tokens": tokens, "temperature": 0}
    began = time.perf_counter()
    answer = client.post("/v1/completions", json=body)
    if answer.status_code != 200:
        raise typer.BadParameter(f"/v1/completions answers {answer.status_code}: {answer.text[:200]}")
    data = answer.json()
    usage = data["usage"]
    cached = usage.get("prompt_cache_hit_tokens")
    if cached is None:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return data["choices"][0]["text"], usage["prompt_tokens"], cached, time.perf_counter() - began


def _server_hits(client: httpx.Client, model: str) -> Finding:
    from nautile.engine.doctor import Finding, needle_text  # noqa: PLC0415

    text = f"# doctor {time.time_ns()}\n" + needle_text(80, 1)  # new to the cache
    (first, length, _, cold), (again, _, cached, warm) = (_ask(client, model, text) for _ in range(2))
    figures = {"prompt": length, "cached": cached, "cold_seconds": round(cold, 3), "warm_seconds": round(warm, 3)}
    measured = f"{cached / length:.1%} of a repeated {length}-token prompt; {cold:.2f} s, then {warm:.2f} s"
    if first != again:
        return Finding(
            "prefix cache", "bad", "a hit changes a greedy answer", "cached state is not exact: report this", figures
        )
    if cached < length // 2:
        return Finding("prefix cache", "bad", measured, "the server computes repeated prompts again: check its cache", figures)
    return Finding("prefix cache", "ok", measured, "", figures)


def _server_needle(client: httpx.Client, model: str) -> Finding:
    """One needle at prompt lengths of every residue mod 4, found by lengthening the text."""
    from nautile.engine.doctor import Finding, needle_text  # noqa: PLC0415

    number, right = 48213, dict[int, bool]()
    for extra in range(40):
        answer, length, _, _ = _ask(client, model, "#" + " x" * extra + "\n" + needle_text(30, number))
        right[length % 4] = answer.strip().startswith(str(number))
        if len(right) == 4:
            break
    figures = {"right_by_residue": {str(residue): good for residue, good in sorted(right.items())}}
    found = sorted(residue for residue, good in right.items() if good)
    text = f"found at prompt lengths of residue {found} mod 4, of {sorted(right)} tried"
    if len(right) < 4:
        return Finding("needle", "warn", text, "not every residue could be met with this tokenizer", figures)
    if found and len(found) < 4:
        fix = "run `nautile doctor --model` on the weights: it tells the engine's fault from the model's"
        return Finding("needle", "warn", text, fix, figures)
    return Finding("needle", "ok", text if found else "this model does not find the needle at any residue", "", figures)


def _server_metrics(client: httpx.Client) -> Iterator[Finding]:
    from nautile.engine.doctor import Finding  # noqa: PLC0415

    answer = client.get("/metrics")
    if answer.status_code != 200:
        yield Finding("metrics", "warn", f"/metrics answers {answer.status_code}", "drafts and bytes cannot be checked")
        return
    figures = {
        parts[0]: float(parts[1])
        for line in answer.text.splitlines()
        if not line.startswith("#") and len(parts := line.rsplit(" ", 1)) == 2
    }
    drafted = figures.get("nautile_engine_drafted_tokens_total", 0)
    accepted = figures.get("nautile_engine_accepted_tokens_total", 0)
    if not drafted:
        yield Finding("drafts", "n/a", "the server does not speculate")
    else:
        fix = "" if accepted else "leave speculation off: no draft was ever accepted"
        yield Finding("drafts", "ok" if accepted else "bad", f"{accepted:.0f} of {drafted:.0f} accepted", fix)
    total, limit = figures.get("nautile_state_bytes_total", 0), figures.get("nautile_state_bytes_limit", 0)
    yield Finding("state bytes", "ok" if total <= limit else "bad", f"{total / 2**20:,.1f} MiB of {limit / 2**20:,.1f} MiB")
