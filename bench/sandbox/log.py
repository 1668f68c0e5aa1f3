"""Speed of the trajectory log: operations appended (synced twice each) and fast-forwarded a second, beside a bare fdatasync.

python bench/sandbox/log.py [--operations 20000] [--out bench/results/sandbox_log.json]
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

from nautile.sandbox.log import TrajectoryLog, load, verify

HEAD = {"sandbox": "c-bench", "kind": "container", "image": {"layers": [], "host_usr": True}, "limits": {}}
RESULT = {"exit_code": 0, "stdout": b"x" * 200, "stderr": b"", "truncated": False, "timed_out": False}


def synced(place, count):
    """Bare appends of 300 bytes, each with fdatasync."""
    descriptor = os.open(place / "bare", os.O_CREAT | os.O_WRONLY)
    began = time.perf_counter()
    for _ in range(count):
        os.write(descriptor, bytes(300))
        os.fdatasync(descriptor)
    os.close(descriptor)
    return count / (time.perf_counter() - began)


def issue(log, count, execute):
    began = time.perf_counter()
    for number in range(count):
        log.perform("run", {"argv": ["/bin/sh", "-c", f"echo {number}"], "timeout": 60.0}, execute, lambda name: "unknown")
    return count / (time.perf_counter() - began)


def refuse(name):
    raise AssertionError("an operation was run again")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=20_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        bare = synced(place, 1000)
        log = TrajectoryLog.open(place / "log", HEAD)
        appended = issue(log, arguments.operations, lambda name: RESULT)
        log.close()
        began = time.perf_counter()
        load(place / "log")
        loading = time.perf_counter() - began
        log = TrajectoryLog.open(place / "log", HEAD)
        forwarded = issue(log, arguments.operations, refuse)
        log.close()
        assert verify(place / "log") == (arguments.operations, 0)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "device": f"{platform.machine()}, {os.cpu_count()} processors",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "load_average": {"before": before, "after": os.getloadavg()[0]},
        "operations": arguments.operations,
        "bare_fdatasync_per_second": round(bare),
        "appended_per_second": round(appended),
        "fast_forward_per_second": round(forwarded),
        "load_seconds": round(loading, 3),
        "fast_forward_per_second_with_load": round(arguments.operations / (loading + arguments.operations / forwarded)),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
