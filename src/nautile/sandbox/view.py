"""A trajectory log for people: lines for a terminal, one self-contained HTML page for a browser."""

from __future__ import annotations

import base64
import html
import time
from pathlib import Path
from typing import Any

from nautile.sandbox.log import Contents, Operation, expand

__all__ = ["lines", "page"]

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #1a1c20; }
h1 { font-size: 1.3rem; } .meta { color: #5b626d; }
article { border-left: 3px solid #c9ced6; margin: 1rem 0; padding: .1rem .9rem; }
article.failed { border-color: #c0392b; } article.unknown { border-color: #d68910; }
pre { background: #f4f5f7; padding: .5rem .7rem; overflow: auto; max-height: 24rem; white-space: pre-wrap; }
.err { background: #fdf1ef; }
@media (prefers-color-scheme: dark) {
  body { background: #14161a; color: #e4e6ea; } pre { background: #1f2228; }
  .err { background: #2b1d1b; } .meta { color: #9aa1ac; }
}
"""
_MOST = 20_000  # characters of one output on the page


def summary(operation: Operation) -> str:
    """What an operation was, in one line."""
    request = operation.request
    argv = request.get("argv")
    if operation.kind == "run" and isinstance(argv, list):
        if "python" in request:
            return f"python {request['python'].strip().splitlines()[0] if request['python'].strip() else ''}"
        return str(argv[2]) if argv[:2] == ["/bin/sh", "-c"] and len(argv) == 3 else " ".join(argv)
    if operation.kind.startswith("session"):
        given = argv or request.get("text") or _short(request.get("data")) or ""
        return f"{operation.kind} #{request.get('session', operation.sequence)} {given}".strip()
    place = request.get("path") or request.get("target") or request.get("rules") or ""
    return f"{operation.kind} {place}".strip()


def _short(value: Any) -> str:
    """What was typed, if it stayed in its frame."""
    inline = value.get("bytes") if isinstance(value, dict) else None
    return base64.b64decode(inline).decode("utf-8", "replace") if inline else ""


def outcome(operation: Operation) -> str:
    """How it ended, in a word or two."""
    result = operation.result
    if result is None:
        return "unknown"
    if "refused" in result or "missed" in result:
        return "refused" if "refused" in result else "did not come"
    if result.get("infrastructure_error"):
        return "sandbox failed"
    if result.get("timed_out"):
        return "timed out"
    return f"exit {result['exit_code']}" if "exit_code" in result else "done"


def lines(contents: Contents) -> list[str]:
    """One line an operation."""
    shown = [
        f"{contents.head['kind']} {contents.head['sandbox']}, epoch {contents.epoch}, {len(contents.operations)} operations"
    ]
    for one in contents.operations:
        text = " ".join(summary(one).split())
        text = text if len(text) <= 100 else text[:97] + "..."
        shown.append(f"{one.sequence:6} {one.seconds * 1000:9.1f} ms  {outcome(one):14} {text}")
    if contents.closed:
        shown.append("the sandbox was closed by its owner")
    if contents.torn:
        shown.append(f"{contents.torn} bytes at the end were cut off by a crash and are passed over")
    return shown


def page(place: Path, contents: Contents) -> str:
    """The whole trajectory as HTML. Everything that came out of the sandbox is escaped; no script, nothing loaded."""
    head = contents.head
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(head["wall"]))
    body = "".join(_article(place, contents, one) for one in contents.operations)
    title = html.escape(f"Trajectory {head['sandbox']}")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style><h1>{title}</h1>'
        f'<p class="meta">{html.escape(head["kind"])}, begun {began}, {len(contents.operations)} operations, '
        f"epoch {contents.epoch}{', closed' if contents.closed else ''}</p>{body}</html>\n"
    )


def _article(place: Path, contents: Contents, operation: Operation) -> str:
    how = outcome(operation)
    state = {"unknown": "unknown", "done": "", "exit 0": ""}.get(how, "failed")
    result = {} if operation.result is None else expand(place, contents.head, operation.result)
    parts = [f"<pre>{html.escape(_source(operation))}</pre>"]
    for key, style in (("stdout", ""), ("stderr", "err"), ("data", ""), ("refused", "err"), ("missed", "err")):
        text = _text(result.get(key))
        if text:
            parts.append(f'<pre class="{style}">{html.escape(text)}</pre>')
    meta = f"#{operation.sequence} {html.escape(operation.kind)}: {html.escape(how)}, {operation.seconds * 1000:.1f} ms"
    return f'<article class="{state}"><p class="meta">{meta}</p>{"".join(parts)}</article>'


def _source(operation: Operation) -> str:
    return str(operation.request.get("python") or summary(operation))


def _text(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")
    return text if len(text) <= _MOST else f"{text[:_MOST]}\n[{len(text) - _MOST:,} characters more]"
