"""Many idle containers at once: failures, memory of each, the rate of creation and of closing, and what is left afterwards.

    python bench/sandbox/density.py [--count 300] [--out bench/results/sandbox_density.json]

Memory is what MemAvailable loses between none and all, so it holds everything: processes, kernel, mounts, cgroups, the keeper.
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nautile.sandbox import MIB, Limits, Sandbox, SandboxError

LIMITS = Limits(memory=32 * MIB, pids=16, disk=8 * MIB, inodes=1000)


def available():
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def left():
    """Mounts, cgroups and processes of ours."""
    mounts = Path("/proc/self/mountinfo").read_text().count("nautile")
    groups = len(list(Path("/sys/fs/cgroup").glob("*/nautile/*/c-*")))
    inits = sum(_name(place) == "init\n" and place.name != "1" for place in Path("/proc").glob("[0-9]*"))
    return {"mounts": mounts, "cgroups": groups, "processes": inits}


def _name(place):
    """A container's first process has no command line any more: it has unmapped its stack."""
    try:
        return (place / "comm").read_text()
    except OSError:
        return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    load, failures, made, times = os.getloadavg()[0], [], [], []

    def create(_):
        try:
            made.append(Sandbox.create("container", limits=LIMITS))
            times.append(time.perf_counter())
        except SandboxError as error:
            failures.append(str(error))

    with Sandbox.create("container", limits=LIMITS) as keeper, ThreadPoolExecutor(arguments.threads) as pool:
        before, began = available(), time.perf_counter()
        began_at = began
        list(pool.map(create, range(arguments.count)))
        creating = time.perf_counter() - began
        time.sleep(12.0)  # idle is what has not been used for ten seconds: its seat has ended
        memory = before - available()
        answered = sum(pool.map(lambda one: one.run(["/bin/true"]).ok, made[:: max(len(made) // 50, 1)]))
        began = time.perf_counter()
        list(pool.map(Sandbox.close, made))
        closing = time.perf_counter() - began
        assert keeper.run(["/bin/true"]).ok
    time.sleep(1.0)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "device": f"{platform.machine()}, {os.cpu_count()} processors",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "load_average": {"before": load, "after": os.getloadavg()[0]},
        "containers": len(made),
        "failures": len(failures),
        "first_failure": failures[0] if failures else None,
        "answered_of_a_sample": f"{answered}/{len(made[:: max(len(made) // 50, 1)])}",
        "mib_each": round(memory / max(len(made), 1) / MIB, 2),
        "created_per_second": round(len(made) / creating, 1),
        "created_per_second_by_hundreds": [round(100 / (b - a), 1) for a, b in itertools.pairwise([began_at, *times[99::100]])],
        "closed_per_second": round(len(made) / closing, 1),
        "left": left(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
