"""How long virtual machines take: cold, from a snapshot, a copy of a running one, a command, and what one weighs.

    python bench/sandbox/vms.py [--rounds 10] [--out bench/results/sandbox_vms.json]

One after the other, the paths taking turns, with a plain subprocess in the same run. "Cold" boots the kernel whatever is in
the cache; "first run done" is creation through the SDK's driver up to the end of ["/bin/true"]. The load average before and
after is in the result: figures of a busy machine say so.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from functools import partial
from pathlib import Path

from nautile.sandbox import MIB, Limits, Sandbox
from nautile.sandbox.guest import accel
from nautile.sandbox.image import Image
from nautile.sandbox.microvm import MicroVMDriver
from nautile.sandbox.qemu import program, version

LIMITS = Limits(memory=96 * MIB, pids=64, disk=16 * MIB, seconds=60.0)
AIMS = {"microvm_cold": 3000, "microvm_from_snapshot": 500, "vm_cold": 5000}


def timed(samples, action):
    began = time.perf_counter()
    result = action()
    samples.append((time.perf_counter() - began) * 1000)
    return result


def summary(samples):
    ordered = sorted(samples)
    return {
        "n": len(ordered),
        "min_ms": round(ordered[0]),
        "p50_ms": round(statistics.median(ordered)),
        "max_ms": round(ordered[-1]),
    }


def checked(sandbox):
    assert sandbox.run(["/bin/true"]).ok
    return sandbox


def cold():
    driver = MicroVMDriver.create("m-bench", Image(), LIMITS, allow_emulation=True, snapshots=False)
    return checked(Sandbox(driver, LIMITS))


def create(kind):
    return checked(Sandbox.create(kind, limits=LIMITS, allow_emulation=True))


def copy(sandbox):
    return checked(sandbox.fork())


def weight(sandbox):
    """Proportional set size of everything in the machine's group, in MiB."""
    group = next(iter(sandbox.driver._emulator.group.places))
    total = 0
    for number in (group / "cgroup.procs").read_text().split():
        text = Path(f"/proc/{number}/smaps_rollup").read_text()
        total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return round(total / 1024, 1)


def measure(rounds):
    create("microvm").close()  # the snapshot and the index of /usr are made here
    names = (
        "microvm_cold",
        "microvm_from_snapshot",
        "vm_cold",
        "microvm_fork",
        "vm_fork",
        "run",
        "run_python",
        "close",
        "subprocess",
    )
    samples = {name: [] for name in names}
    weights = []
    for _ in range(rounds):
        timed(samples["microvm_cold"], cold).close()
        machine = timed(samples["microvm_from_snapshot"], lambda: create("microvm"))
        timed(samples["run"], partial(checked, machine))
        timed(samples["run_python"], partial(machine.run, ["python3", "-I", "-c", ""]))
        weights.append(weight(machine))
        timed(samples["microvm_fork"], partial(copy, machine)).close()
        timed(samples["close"], machine.close)
        machine = timed(samples["vm_cold"], lambda: create("vm"))
        timed(samples["vm_fork"], partial(copy, machine)).close()
        machine.close()
        timed(samples["subprocess"], lambda: subprocess.run(["/bin/true"], check=True))
    return {name: summary(one) for name, one in samples.items()}, statistics.median(weights)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("bench/results/sandbox_vms.json"))
    options = parser.parse_args()
    before = os.getloadavg()[0]
    found = accel.probe()
    figures, pss = measure(options.rounds)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "device": f"{platform.machine()}, {os.cpu_count()} cores, {'KVM' if found.works else 'emulated: ' + found.why}",
        "qemu": version(program("microvm")),
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "load": {"before": round(before, 2), "after": round(os.getloadavg()[0], 2)},
        "guest_memory_limit_mib": LIMITS.memory // MIB,
        "pss_mib": pss,
        "first_run_done": figures,
        "aims_ms": AIMS,
        "met": {name: figures[name]["p50_ms"] <= aim for name, aim in AIMS.items()},
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
