"""64 concurrent streaming clients on `nautile serve` for a minute: errors, memory, and whether every stream says what its
non-streamed twin says.

    python bench/serve_load.py [--clients 64] [--seconds 60] [--out bench/results/serve_load.json]

The server runs in a process of its own with the shipped model. First every prompt is answered once without streaming; then the
clients stream the same prompts, seeded, in random order until the time is over. Memory is the server's resident set, sampled
every half second; warm-up is the first quarter. Exit status 1 on an error, a different text, or growth above 5 %.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

WORDS = (
    "file",
    "line",
    "value",
    "name",
    "class",
    "print",
    "import",
    "return",
    "list",
    "text",
    "count",
    "number",
    "path",
    "sum",
)
GROWTH = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    arguments = [sys.executable, "-m", "nautile.cli", "serve", "--port", "0", "--log-format", "json", "--concurrency", "256"]
    server = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        url = address(server)
        result = asyncio.run(measure(url, server, options))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    about = {"device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores (clients included)"}
    result = {**about, "date": time.strftime("%Y-%m-%d"), "commit": commit, **result}
    print(json.dumps({key: value for key, value in result.items() if key != "resident_mib"}, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(not result["ok"])


def address(server: subprocess.Popen) -> str:
    """Where it listens: it says so on its first lines. What it says later is thrown away."""
    for line in server.stderr:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
            return found.group()
    raise SystemExit("the server did not start")


def bodies(options: argparse.Namespace) -> list[dict]:
    """The requests: short and long prompts, some with a common beginning, each with a seed."""
    rng, made = random.Random(0), []
    common = " ".join(rng.choice(WORDS) for _ in range(300))
    for number in range(options.prompts):
        own = " ".join(rng.choice(WORDS) for _ in range(rng.choice([5, 40, 200])))
        text = f"{common} {own}" if number % 2 else own
        made.append(
            {
                "messages": [{"role": "user", "content": text}],
                "temperature": 0.8,
                "seed": number,
                "max_tokens": options.tokens,
                "thinking": {"type": "disabled"},
            }
        )
    return made


async def measure(url: str, server: subprocess.Popen, options: argparse.Namespace) -> dict:
    """Twins first, then the load."""
    limits = httpx.Limits(max_connections=options.clients + 4)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        requests = [{**body, "model": model} for body in bodies(options)]
        twins = await asyncio.gather(*(whole(client, body) for body in requests))
        seen = {"errors": [], "different": 0, "first": [], "tokens": 0, "streams": 0, "characters": 0}
        memory: list[tuple[float, float]] = []
        end = time.monotonic() + options.seconds
        watcher = asyncio.create_task(watch(server.pid, end, memory))
        began = time.monotonic()
        await asyncio.gather(*(one_client(client, number, requests, twins, end, seen) for number in range(options.clients)))
        seconds = time.monotonic() - began
        await watcher
        metrics = (await client.get("/metrics")).text
    return summary(options, seen, memory, seconds, metrics)


async def whole(client: httpx.AsyncClient, body: dict) -> str:
    answer = (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()
    return answer["choices"][0]["message"]["content"] or ""


async def one_client(client: httpx.AsyncClient, number: int, requests: list, twins: list, end: float, seen: dict) -> None:
    """Stream prompts until the time is over."""
    rng = random.Random(number)
    while time.monotonic() < end:
        index = rng.randrange(len(requests))
        try:
            text, first, tokens = await streamed(client, requests[index])
        except Exception as error:
            seen["errors"].append(f"{type(error).__name__}: {error}")
            continue
        seen["streams"] += 1
        seen["tokens"] += tokens
        seen["characters"] += len(text)
        seen["different"] += text != twins[index]
        if first is not None:
            seen["first"].append(first)


async def streamed(client: httpx.AsyncClient, body: dict) -> tuple[str, float | None, int]:
    """(text, seconds to the first piece of it, tokens) of one streamed answer."""
    began, first, parts, tokens, finished = time.monotonic(), None, [], 0, False
    request = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/chat/completions", json=request) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                finished = True
            elif line.startswith("data: "):
                data = json.loads(line[6:])
                if "error" in data:
                    raise RuntimeError(str(data["error"]))
                tokens = (data.get("usage") or {}).get("completion_tokens", tokens)
                for choice in data["choices"]:
                    if piece := choice["delta"].get("content"):
                        first = first or time.monotonic() - began
                        parts.append(piece)
    if not finished:
        raise RuntimeError("the stream ended without [DONE]")
    return "".join(parts), first, tokens


async def watch(pid: int, end: float, memory: list[tuple[float, float]]) -> None:
    began = time.monotonic()
    while time.monotonic() < end:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        memory.append((round(time.monotonic() - began, 1), pages * os.sysconf("SC_PAGE_SIZE") / 2**20))
        await asyncio.sleep(0.5)


def summary(options: argparse.Namespace, seen: dict, memory: list, seconds: float, metrics: str) -> dict:
    """What was measured, and whether the claim holds."""
    warm = [size for moment, size in memory if moment >= options.seconds / 4]
    growth = max(warm) / warm[0]
    first = sorted(seen["first"])
    steps = re.search(r"^nautile_engine_steps_total ([\d.]+)", metrics, re.MULTILINE)
    hits = re.search(r"^nautile_cache_hit_rate ([\d.]+)", metrics, re.MULTILINE)
    return {
        "ok": not seen["errors"] and not seen["different"] and growth <= GROWTH and seen["streams"] > 0,
        "clients": options.clients,
        "seconds": round(seconds, 1),
        "streams": seen["streams"],
        "errors": len(seen["errors"]),
        "first_errors": seen["errors"][:3],
        "different_from_twin": seen["different"],
        "output_tokens_per_second": round(seen["tokens"] / seconds, 1),
        "ttft_seconds": {"p50": round(statistics.median(first), 3), "p99": round(first[int(0.99 * len(first))], 3)},
        "memory_after_warm_up_mib": round(warm[0], 1),
        "memory_growth": round(growth, 4),
        "engine_steps": float(steps.group(1)) if steps else None,
        "hit_rate": float(hits.group(1)) if hits else None,
        "resident_mib": [(moment, round(size, 1)) for moment, size in memory],
    }


if __name__ == "__main__":
    main()
