"""What training on invented functions holds: how diverse it is, how its schemas look, what it shares with a benchmark.

    python bench/function_data.py [--talks 20000] --out bench/results/function_data.json

Diversity counts distinct names, tasks, whole schemas and requests. Beside it the same shares of types and sizes for BFCL's
single-turn categories, where ``bfcl-eval`` is installed (its tasks are read here and nowhere in training), with the function
names, whole parameter lists and runs of words in requests that both hold.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nautile.evals.bfcl import SINGLE_TURN, Bfcl, BfclError, openai_tools
from nautile.evals.tools import commit
from nautile.train.functions import talk_of
from nautile.train.tasks.wording import grams

_RUNS = (3, 4, 5, 6, 8)

Tool = Mapping[str, Any]


def shape(offers: Sequence[Sequence[Tool]]) -> dict[str, Any]:
    """Shares of types, choices and defaults among parameters; sizes of offers and functions."""
    functions = [tool["function"]["parameters"] for offer in offers for tool in offer]
    parameters = [one for function in functions for one in function.get("properties", {}).values()]
    kinds = Counter(one.get("type") for one in parameters)
    return {
        "types": {kind: round(count / len(parameters), 4) for kind, count in kinds.most_common()},
        "with_choices": round(sum("enum" in one for one in parameters) / len(parameters), 4),
        "with_default": round(sum("default" in one for one in parameters) / len(parameters), 4),
        "functions_on_offer": _sizes(map(len, offers)),
        "parameters_of_a_function": _sizes(len(function.get("properties", {})) for function in functions),
        "required_of_a_function": _sizes(len(function.get("required", ())) for function in functions),
    }


def _sizes(values: Iterable[int]) -> dict[str, float]:
    counted = Counter(min(value, 9) for value in values)
    total = sum(counted.values())
    return {str(size) if size < 9 else "9+": round(counted[size] / total, 4) for size in sorted(counted)}


def distinct(offers: Sequence[Sequence[Tool]], requests: Sequence[str]) -> dict[str, int]:
    """How many there are of each, and how many different ones."""
    functions = [tool["function"] for offer in offers for tool in offer]
    names = [key for function in functions for key in function["parameters"]["properties"]]
    return {
        "functions": len(functions),
        "function_names": len({function["name"] for function in functions}),
        "schemas": len({json.dumps(function, sort_keys=True) for function in functions}),
        "parameters": len(names),
        "parameter_names": len(set(names)),
        "requests": len(requests),
        "distinct_requests": len(set(requests)),
    }


def _signature(tool: Tool) -> tuple[str, ...]:
    return tuple(sorted(tool["function"]["parameters"].get("properties", {})))


def shared(
    offers: Sequence[Sequence[Tool]], requests: Sequence[str], theirs: Sequence[Sequence[Tool]], asked: Sequence[str]
) -> dict[str, Any]:
    """What a benchmark's offers and requests have in common with ours."""
    mine = {tool["function"]["name"].lower() for offer in offers for tool in offer}
    names = {tool["function"]["name"].lower() for offer in theirs for tool in offer}
    lists = {_signature(tool) for offer in offers for tool in offer}
    wanted = {_signature(tool) for offer in theirs for tool in offer if len(_signature(tool)) > 1}
    runs = {}
    for length in _RUNS:
        ours = {run for text in requests for run in grams(text, length)}
        known = {run for text in asked for run in grams(text, length)}
        both = sorted(" ".join(run) for run in ours & known)
        runs[str(length)] = {"of_benchmark": len(known), "shared": len(both), "examples": both[:12]}
    return {
        "function_names": {"of_benchmark": len(names), "shared": len(mine & names), "examples": sorted(mine & names)[:20]},
        "parameter_lists_of_two_or_more": {"of_benchmark": len(wanted), "shared": len(lists & wanted)},
        "whole_requests": len(set(requests) & set(asked)),
        "runs_of_words": runs,
    }


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--talks", type=int, default=20_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    talks = [talk_of(f"count:{number}") for number in range(options.talks)]
    offers = [talk.tools for talk in talks]
    requests = [message["content"] for talk in talks for message in talk.messages if message["role"] == "user"]
    result: dict[str, Any] = {
        "talks": len(talks),
        "kinds": dict(Counter(talk.kind for talk in talks).most_common()),
        "distinct": distinct(offers, requests),
        "shape": shape(offers),
    }
    try:
        package = Bfcl()
        tasks = [task for category in SINGLE_TURN for task in package.tasks(category)]
        theirs = [openai_tools(task.functions) for task in tasks]
        asked = [message["content"] for task in tasks for turn in task.turns for message in turn if message["role"] == "user"]
        result["benchmark"] = {"package": f"bfcl-eval {package.version}", "tasks": len(tasks), "shape": shape(theirs)}
        result["shared_with_benchmark"] = shared(offers, requests, theirs, asked)
    except BfclError as error:
        result["benchmark"] = str(error)
    result |= {"date": time.strftime("%Y-%m-%d"), "commit": commit()}
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
