"""What is wrong with a model's failures on BFCL's single-turn tasks: the first thing that is, for a fair part of them.

    python bench/bfcl_failures.py bench/results/bfcl.json [...] --out bench/results/bfcl_failures.json

Takes failures of categories where a call is due, one of each category in turn, and compares the calls that the result file
keeps with the functions on offer and the package's answers. ``bfcl-eval`` must be installed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from nautile.agent.tools import TOOLS
from nautile.evals.bfcl import Bfcl, BfclTask
from nautile.evals.tools import commit

OWN = {key for tool in TOOLS for key in tool["function"]["parameters"]["properties"]}
_CALL = re.compile(r"(\S+) (\{.*)", re.DOTALL)


def calls(reply: str) -> list[tuple[str, dict[str, Any] | None]]:
    """Names and arguments of a kept reply; None for arguments that were cut off."""
    found: list[tuple[str, dict[str, Any] | None]] = []
    for part in reply.split("; "):
        if match := _CALL.match(part):
            try:
                found.append((match[1], json.loads(match[2])))
            except ValueError:
                found.append((match[1], None))
    return found


def mistake(task: BfclTask, reply: str, why: str) -> str:
    """The first thing that is wrong."""
    made = calls(reply)
    offer = {function["name"].replace(".", "_"): function["parameters"] for function in task.functions}
    wanted = [next(iter(call)).replace(".", "_") for call in task.answer]
    one_of_several = "multiple" in task.category and "parallel" not in task.category
    whole = [(offer[name], arguments) for name, arguments in made if arguments is not None and name in offer]
    foreign = set[str]().union(*(set(arguments) - set(function["properties"]) for function, arguments in whole))
    missing = any(set(function.get("required", ())) - set(arguments) for function, arguments in whole)
    signs = (
        ("the thought runs on", why == "cut off"),
        ("an answer in words", not made),
        ("a name that is not on offer", any(name not in offer for name, _ in made)),
        ("another function of the offer", one_of_several and bool(made) and made[0][0] != wanted[0]),
        ("parameters of its own six tools", bool(foreign & OWN)),
        ("a parameter that the function does not have", bool(foreign)),
        ("a required parameter is missing", missing),
        ("too few calls or too many", len(made) != len(wanted)),
        ("a value of the wrong type", "type" in why),
    )
    return next((name for name, sign in signs if sign), "a wrong value")


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--most", type=int, default=60)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    package, out = Bfcl(), dict[str, Any]()
    for path in options.results:
        result = json.loads(path.read_text(encoding="utf-8"))
        tasks = {task.id: task for category in result["categories"] for task in package.tasks(category)}
        by_category: dict[str, list[dict[str, str]]] = {}
        for failure in result["failures"]:
            if tasks[failure["id"]].wants_call:
                by_category.setdefault(tasks[failure["id"]].category, []).append(failure)
        turns = itertools.zip_longest(*by_category.values())
        chosen = [one for turn in turns for one in turn if one is not None][: options.most]
        found = [mistake(tasks[one["id"]], one["reply"], one["why"]) for one in chosen]
        fewer = sum(len(calls(one["reply"])) < len(tasks[one["id"]].answer) for one in chosen)
        out[path.stem] = {"failures": len(chosen), "mistakes": dict(Counter(found).most_common()), "with_too_few_calls": fewer}
    text = json.dumps({**out, "package": f"bfcl-eval {package.version}", "commit": commit()}, indent=1) + "\n"
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
