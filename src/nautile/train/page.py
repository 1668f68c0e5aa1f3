"""One page of a run: everything its directory says, in one file that needs nothing else.

Read are ``log.jsonl`` (any stage), ``probe.jsonl``, ``trajectories.jsonl``, ``evals.json`` (pass@1 by kind as ``nautile eval
tools --out`` writes it) and ``sample.txt``, as far as they are there.
"""

from __future__ import annotations

import base64
import json
import time
from collections import defaultdict
from importlib import resources
from pathlib import Path
from typing import Any

from nautile.train.run_state import RunError

__all__ = ["gather", "page"]

_MOST_ROWS = 2000  # points of a curve
_MOST_TRAJECTORIES = 400  # in the viewer, the latest


def gather(run: Path) -> dict[str, Any]:
    """What the page shows. Raises RunError when the directory holds no log of a run."""
    if not (run / "log.jsonl").is_file():
        raise RunError(f"{run} holds no log.jsonl: give the directory of a run")
    rows = _lines(run / "log.jsonl")
    trajectories = _lines(run / "trajectories.jsonl")
    measured = _measured(run / "evals.json")
    sample = run / "sample.txt"
    steps, now = rows[-1].get("step", 0) if rows else 0, time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return {
        "title": f"Run {run.resolve().name}",
        "note": f"{steps} steps, {len(trajectories)} trajectories; written {now}",
        "rows": rows[:: max(1, len(rows) // _MOST_ROWS)],
        "probes": _lines(run / "probe.jsonl"),
        "kinds": measured or _solved(trajectories),
        "evaluated": bool(measured),
        "trajectories": trajectories[-_MOST_TRAJECTORIES:],
        "sample": sample.read_text(encoding="utf-8") if sample.is_file() else "",
    }


def page(run: Path) -> str:
    """One HTML page. Raises RunError."""
    template = resources.files("nautile.train").joinpath("page.html").read_text(encoding="utf-8")
    data = base64.b64encode(json.dumps(gather(run)).encode()).decode()  # no text of a trajectory can end the script element
    return template.replace("@DATA@", data)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line that is not whole is left out. Raises RunError for a damaged one."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise RunError(f"{path}, line {number}, is not JSON: the log is damaged") from None
    return rows


def _measured(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["kinds"])
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path} is not what nautile eval tools --out writes") from None


def _solved(trajectories: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of solved samples by kind, of the later half of the steps."""
    if not trajectories:
        return {}
    last = max(row["step"] for row in trajectories)
    found: dict[str, list[bool]] = defaultdict(list)
    for row in trajectories:
        if 2 * row["step"] > last:
            found[row["kind"]].append(row["reward"] >= 1)
    return {kind: {"passed": sum(done), "total": len(done), "low": None, "high": None} for kind, done in sorted(found.items())}
