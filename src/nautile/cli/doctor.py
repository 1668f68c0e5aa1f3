"""``nautile doctor``: is this engine or server as exact and as frugal as it says?"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
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
        yield from _server_metrics(client, name)


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


def _server_metrics(client: httpx.Client, model: str) -> Iterator[Finding]:
    """What the server counts: drafts, bytes of the state, and what repeated work does to its memory and times."""
    from nautile.engine.doctor import Finding  # noqa: PLC0415

    figures = _figures(client)
    if "nautile_engine_prompt_tokens_total" not in figures:
        fix = "drafts, bytes and memory cannot be checked: is it a Nautile server, and does nothing stand before it?"
        yield Finding("metrics", "warn", "/metrics does not give the engine's figures", fix)
        return
    drafted, accepted = (figures.get(f"nautile_engine_{kind}_tokens_total", 0) for kind in ("drafted", "accepted"))
    if not drafted:
        yield Finding("drafts", "n/a", "the server does not speculate")
    else:
        fix = "" if accepted else "leave speculation off: no draft was ever accepted"
        yield Finding("drafts", "ok" if accepted else "bad", f"{accepted:.0f} of {drafted:.0f} accepted", fix)
    yield _server_bytes(client, model)
    yield _server_steady(client, model)


def _figures(client: httpx.Client) -> dict[str, float]:
    answer = client.get("/metrics")
    lines = answer.text.splitlines() if answer.status_code == 200 else []
    parts = [line.rsplit(" ", 1) for line in lines if not line.startswith("#") and " " in line]
    return {name: float(value) for name, value in parts}


def _taken_in(figures: Mapping[str, float]) -> float:
    """Prompt tokens so far: tells whether somebody else used the server meanwhile."""
    return figures["nautile_engine_prompt_tokens_total"]


def _server_bytes(client: httpx.Client, model: str) -> Finding:
    """What a new prompt adds to the blocks in use, against the planner's formula."""
    from nautile.engine.doctor import Finding, needle_text  # noqa: PLC0415

    before = _figures(client)
    _, prompt, cached, _ = _ask(client, model, f"# doctor {time.time_ns()}\n" + needle_text(90, 2))
    after = _figures(client)
    block = after.get("nautile_state_block_tokens", 0)
    planned = after.get("nautile_state_plan_bytes_per_token", 0) * block
    kinds = [f'nautile_state_bytes{{kind="{kind}"}}' for kind in ("csa", "index", "hca")]
    grown = sum(after.get(kind, 0) - before.get(kind, 0) for kind in kinds)
    total, limit = after.get("nautile_state_bytes_total", 0), after.get("nautile_state_bytes_limit", 0)
    figures = {"prompt": prompt, "bytes": grown, "formula_of_a_block": planned, "total": total, "limit": limit}
    if total > limit:
        text = f"{total / 2**20:,.1f} MiB of state where {limit / 2**20:,.1f} are allowed"
        return Finding("state bytes", "bad", text, "report this: the pool is larger than its limit", figures)
    if not planned or cached or _taken_in(after) - _taken_in(before) != prompt:
        return Finding("state bytes", "warn", "others use the server: not measured", "run again when it is idle", figures)
    least, most = (-(-tokens // block) * planned for tokens in (prompt, prompt + 12))
    text = f"{grown:,.0f} bytes for {prompt} tokens in blocks of {block:.0f}, formula {least:,.0f}"
    if grown < least:
        fix = "the cache is full, or off: restart the server, or give it more --memory"
        return Finding("state bytes", "warn", f"{text}: something else was forgotten meanwhile", fix, figures)
    if grown > most + 1:
        return Finding("state bytes", "bad", text, "report this: the pool and `nautile plan` disagree", figures)
    return Finding("state bytes", "ok", text, "", figures)


def _server_steady(client: httpx.Client, model: str) -> Finding:
    """The same work again and again: the server's memory must stay, and no answer may suddenly take long."""
    from nautile.engine.doctor import GROWTH, Finding, needle_text  # noqa: PLC0415

    texts = [f"# steady {number}\n" + needle_text(20, number) for number in range(2)]

    def work() -> float:
        began = time.perf_counter()
        for text in texts:
            _ask(client, model, text)
        return time.perf_counter() - began

    for _ in range(3):
        work()
    before, seconds, after = _figures(client), [work() for _ in range(6)], _figures(client)
    resident = "process_resident_memory_bytes"
    growth, slowest = after.get(resident, 0) - before.get(resident, 0), max(seconds) / sorted(seconds)[len(seconds) // 2]
    figures = {"growth_bytes": growth, "slowest_over_median": round(slowest, 2)}
    text = f"{growth / 2**20:+.1f} MiB after warm-up; slowest round {slowest:.1f} times the median"
    if resident not in after:
        fix = "the system does not say how much memory the server takes: look yourself"
        return Finding("after warm-up", "warn", f"slowest round {slowest:.1f} times the median", fix, figures)
    if growth > GROWTH:
        fix = "run again when the server is idle; if it grows again, report this with the model"
        return Finding("after warm-up", "bad", text, fix, figures)
    if slowest > 5:
        return Finding("after warm-up", "warn", text, "something compiles or the machine is busy: run again", figures)
    return Finding("after warm-up", "ok", text, "", figures)
