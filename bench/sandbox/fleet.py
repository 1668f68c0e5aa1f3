"""A fleet on one machine: what the way through gateway and edge costs, and how many idle containers an edge holds.

    python bench/sandbox/fleet.py calls   [--out bench/results/sandbox_fleet_calls.json]
    python bench/sandbox/fleet.py density [--count 3000] [--step 500] [--out bench/results/sandbox_fleet_density.json]

``density`` makes containers in steps through the edge, with the rate of each step (so also the rate at 1,000 live), and stops
by itself when less than a fifth of the memory is left. Memory is what MemAvailable loses, so it holds everything: processes,
kernel, mounts, cgroups, keeper and edge. ``mib_each`` is taken when all are idle, that of the steps is not.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from chaos import LIMITS, Fleetlet, left, note_owner

from nautile.sandbox import MIB, Limits, Sandbox, SandboxError
from nautile.sandbox.cgroup import hierarchies
from nautile.sandbox.container import KeeperClient
from nautile.sandbox.fleet.client import Fleet


def memory():
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal")}


def empty_group(count=50):
    """KiB of unreclaimable kernel memory that a memory group without processes costs; None where none can be made here.

    It grows with the file systems that were mounted at once at any time since the machine was started, and never shrinks.
    """
    base = next((one.base for one in hierarchies() if "memory" in one.controllers), None)
    if base is None:
        return None
    places = [base / f"nautile-empty-{os.getpid()}-{number}" for number in range(count)]

    def unreclaimable():
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["SUnreclaim"].split()[0])

    before = unreclaimable()
    try:
        for place in places:
            place.mkdir()
        return round((unreclaimable() - before) / count)
    finally:
        for place in places:
            with contextlib.suppress(FileNotFoundError):
                place.rmdir()


def quantiles(seconds):
    found = sorted(seconds)
    return {"p50_ms": round(statistics.median(found) * 1e3, 2), "p99_ms": round(found[int(len(found) * 0.99)] * 1e3, 2)}


def timed(action, count):
    found = []
    for _ in range(count):
        began = time.perf_counter()
        action()
        found.append(time.perf_counter() - began)
    return quantiles(found)


def calls(_, fleet):
    """The same operations in this process, and through the fleet."""
    asked, result = Fleet(fleet.urls[:1], fleet.token), {}
    for where, options in (("in_one_process", {}), ("fleet", {"fleet": asked})):
        with Sandbox.create("function", limits=LIMITS, **options) as sandbox:
            sandbox.run(["/bin/true"])
            result[f"function_run_{where}"] = timed(lambda one=sandbox: one.run(["/bin/true"]), 300)
        with Sandbox.create("container", limits=LIMITS, **options) as sandbox:
            sandbox.run(["/bin/true"])
            result[f"container_run_{where}"] = timed(lambda one=sandbox: one.run(["/bin/true"]), 200)

        def whole(more=options):
            with Sandbox.create("container", limits=LIMITS, **more) as one:
                assert one.run(["/bin/true"]).ok

        result[f"container_create_run_close_{where}"] = timed(whole, 40)
    with Sandbox.create("container", limits=LIMITS, fleet=asked, log="bench") as sandbox:
        result["container_run_recorded_fleet"] = timed(lambda: sandbox.run(["/bin/true"]), 200)
    again = Sandbox.create("container", limits=LIMITS, fleet=asked, log="bench")
    result["fast_forward_fleet"] = timed(lambda: again.run(["/bin/true"]), 200)
    again.close()
    return result


def density(arguments, fleet):
    """Idle containers, in steps."""
    asked, failures, made, steps = Fleet(fleet.urls, fleet.token), [], [], []

    def create(_):
        try:
            made.append(Sandbox.create("container", limits=Limits(memory=32 * MIB, pids=16, disk=8 * MIB), fleet=asked))
        except SandboxError as error:
            failures.append(f"{type(error).__name__}: {error}")

    stopped, empty_before = None, empty_group()
    with ThreadPoolExecutor(arguments.threads) as pool, Sandbox.create("container", limits=LIMITS, fleet=asked):
        before = memory()
        while len(made) < arguments.count and not failures and stopped is None:
            count, began = min(arguments.step, arguments.count - len(made)), time.perf_counter()
            list(pool.map(create, range(count)))
            seconds, now = time.perf_counter() - began, memory()
            each = (before["MemAvailable"] - now["MemAvailable"]) / max(len(made), 1) / MIB
            steps.append({"live": len(made), "created_per_second": round(count / seconds, 1), "mib_each": round(each, 3)})
            print(json.dumps(steps[-1]), flush=True)
            if now["MemAvailable"] < 0.2 * now["MemTotal"]:
                stopped = "less than a fifth of the memory is left"
            elif time.perf_counter() - arguments.began > arguments.seconds:
                stopped = f"the time allowed, {arguments.seconds:g} s, was over"
        time.sleep(12.0)  # idle is what has not been used for ten seconds: its seat has ended
        settled = (before["MemAvailable"] - memory()["MemAvailable"]) / max(len(made), 1) / MIB
        sample = made[:: max(len(made) // 50, 1)]
        answered = sum(pool.map(lambda one: one.run(["/bin/true"]).ok, sample))
        note_owner()
        began = time.perf_counter()
        list(pool.map(Sandbox.close, made))
        closing = time.perf_counter() - began
    return {
        "asked_for": arguments.count,
        "live_at_once": len(made),
        "failures": len(failures),
        "first_failure": failures[0] if failures else None,
        "stopped_because": stopped,
        "answered_of_a_sample": f"{answered}/{len(sample)}",
        "mib_each": round(settled, 3),
        "kib_of_an_empty_memory_group": {"before": empty_before, "after": empty_group()},
        "steps": steps,
        "closed_per_second": round(len(made) / closing, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["calls", "density"])
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--step", type=int, default=500)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1800.0, help="density: begin no further step after so long")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.began, load = time.perf_counter(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="fleet-") as name:
        fleet = Fleetlet(Path(name), capacity=arguments.count + 10)
        try:
            found = (calls if arguments.part == "calls" else density)(arguments, fleet)
        finally:
            fleet.end()
    note_owner()
    KeeperClient().stop()
    time.sleep(1.0)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    head = {"device": f"{platform.machine()}, {os.cpu_count()} processors", "date": time.strftime("%Y-%m-%d"), "commit": commit}
    text = json.dumps(
        {**head, "load_average": {"before": load, "after": os.getloadavg()[0]}, **found, "left": left()}, indent=1
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
