"""Ten agent turns over a conversation that grows to 32K tokens: what every turn computes, and how long it takes.

    python bench/agent_turns.py [--tokens 32768] [--turns 10] [--threads 2] [--out bench/results/agent_turns.json]

Every turn adds tool output and asks for an answer; the prompt of a turn is the whole conversation so far, as a client without
a memory of its own sends it. Each turn's prompt is also sent to an engine without a prefix cache, in the same run. The claim:
every turn after the first computes its new tokens plus less than one block. Exit status 1 when it does not hold.
"""

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from nautile.cli.agent import shipped_model
from nautile.engine import Engine, EngineConfig, Finished, Request, SamplingParams, TokenSampled

ANSWER = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="length of the conversation at the end")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cold", type=int, default=3, help="how many of the turns are also computed without a cache")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    config = EngineConfig(threads=options.threads, max_running=2)
    engine = Engine(shipped_model(), config)
    cold = Engine(engine.model, dataclasses.replace(config, prefix_cache=False))
    turns, ok = run(engine, cold, options)
    result = {
        "device": f"{platform.processor() or platform.machine()}, {options.threads} threads",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "runner": engine.runner_name,
        "precision": config.precision,
        "block_tokens": config.block_tokens,
        "turns": turns,
        "recomputed_less_than_a_block": ok,
    }
    engine.close()
    cold.close()
    print(json.dumps({key: value for key, value in result.items() if key != "turns"}))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(not ok)


def run(engine: Engine, cold: Engine, options: argparse.Namespace) -> tuple[list[dict[str, float | int | None]], bool]:
    """Every turn's counters and times, and whether the claim holds."""
    whole = torch.randint(2, engine.config.vocab_size, (options.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    first = options.tokens // 2  # an agent begins with instructions, tools and files; then each turn adds a little
    each = (options.tokens - first) // max(1, options.turns - 1) - ANSWER
    conversation, known, ok, turns = whole[:first], 0, True, []
    measured_cold = {round(index * (options.turns - 1) / max(1, options.cold - 1)) for index in range(options.cold)}
    for turn in range(options.turns):
        new = len(conversation) - known
        warm = ask(engine, conversation)
        without = ask(cold, conversation) if turn in measured_cold else None
        computed = warm["prompt"] - warm["cached"]
        if turn:
            ok = ok and computed < new + engine.options.block_tokens
        if without is not None:
            ok = ok and without["ids"] == warm["ids"]
        turns.append(
            {
                "turn": turn + 1,
                "prompt_tokens": warm["prompt"],
                "new_tokens": new,
                "computed_tokens": computed,
                "first_token_seconds": round(warm["first"], 4),
                "first_token_seconds_without_cache": round(without["first"], 4) if without is not None else None,
            }
        )
        print(turns[-1], flush=True)
        known = len(conversation) + len(warm["ids"])
        conversation = [*conversation, *warm["ids"], *whole[first + turn * each : first + (turn + 1) * each]]
    return turns, ok


def ask(engine: Engine, conversation: list[int]) -> dict[str, object]:
    """One turn: ids of the answer, seconds to its first token, tokens of the prompt and how many were cached."""
    began, first, ids = time.perf_counter(), None, []
    request = Request(tuple(conversation), SamplingParams(max_tokens=ANSWER, ignore_eos=True))
    for event in engine.submit_sync(request):
        if isinstance(event, TokenSampled):
            first = first or time.perf_counter() - began
            ids.append(event.token)
        elif isinstance(event, Finished):
            usage = event.usage
    return {"ids": ids, "first": first, "prompt": usage.prompt_tokens, "cached": usage.cached_tokens}


if __name__ == "__main__":
    main()
