"""Latency and throughput of function calls and containers, with podman, runc and plain subprocesses in the same run.

    python bench/sandbox/latency.py [--rounds 100] [--only container] [--out bench/results/sandbox_latency.json]

container_create_run is the second and further containers of a kind, as the SDK makes them: the keeper has one ready if there
was time to make it, and container_found_ready says how often that was. container_cold_create_run has a size that was never
asked for, so nothing is ready but a seat. container_paced_create_run waits 50 ms before each, as a caller that does something
in between: what is made ahead is then there. container_named_run is a command that outlives its client, seen to by the keeper.

runsc_restore is the first sandbox that goes on from a checkpoint, asked for in the moment in which runsc_snapshot has given it;
runsc_restore_again is the next one, 300 ms later, for which runsc has been started ahead by then.

``--only``: the lines whose names begin with it, and the peers. Parts that are left out are not run.

One operation after the other, the paths taking turns, so that all meet the same machine. The load average before and after is
in the result: figures of a busy machine say so. podman needs an image: it runs the host's root file system (--rootfs), which
spares it the image store; runc gets the bundle that crun gets.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from nautile.sandbox import MIB, Limits, Sandbox, SandboxPool, bundle
from nautile.sandbox.driver import Order

READY = 8.0  # milliseconds in which only a container that was made ahead can be had

LIMITS = Limits(memory=256 * MIB, pids=64, disk=64 * MIB)


def timed(action):
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) * 1000


def summary(samples):
    ordered = sorted(samples)
    at = lambda share: round(ordered[min(int(len(ordered) * share), len(ordered) - 1)], 2)  # noqa: E731
    return {"n": len(ordered), "min_ms": at(0), "p50_ms": at(0.5), "p90_ms": at(0.9), "p99_ms": at(0.99)}


def checked(result):
    assert result.ok, result


def create_and_run(samples, creates, closes):
    began = time.perf_counter()
    sandbox = Sandbox.create("container", limits=LIMITS)
    creates.append((time.perf_counter() - began) * 1000)
    checked(sandbox.run(["/bin/true"]))
    samples.append((time.perf_counter() - began) * 1000)
    closes.append(timed(sandbox.close))


def create_cold(index, samples):
    """As create_and_run, of a size of disk that no container made ahead has."""
    began = time.perf_counter()
    sandbox = Sandbox.create("container", limits=Limits(memory=256 * MIB, pids=64, disk=64 * MIB + 4096 * (index + 1)))
    checked(sandbox.run(["/bin/true"]))
    samples.append((time.perf_counter() - began) * 1000)
    sandbox.close()


def gvisor(samples):
    """Create a runsc container; go on from its checkpoint; and once more, as the next of several rollouts from one state."""

    def made(name, **options):
        began = time.perf_counter()
        sandbox = Sandbox.create("container", runtime="runsc", limits=LIMITS, **options)
        samples[name].append((time.perf_counter() - began) * 1000)
        checked(sandbox.run(["/bin/true"]))
        return sandbox

    with made("runsc_create") as first:
        for _ in range(5):
            samples["runsc_run"].append(timed(lambda: checked(first.run(["/bin/true"]))))
        began = time.perf_counter()
        image = first.snapshot()
        samples["runsc_snapshot"].append((time.perf_counter() - began) * 1000)
        made("runsc_restore", image=image).close()
        time.sleep(0.3)
        made("runsc_restore_again", image=image).close()


def pooled(pool, samples):
    while not pool.ready:
        time.sleep(0.001)
    began = time.perf_counter()
    sandbox = pool.take()
    checked(sandbox.run(["/bin/true"]))
    samples.append((time.perf_counter() - began) * 1000)
    sandbox.close()


def throughput(seconds):
    with Sandbox.create("function", limits=LIMITS, workers=2) as sandbox:
        counts, end = [0, 0], time.monotonic() + seconds

        def call(index):
            while time.monotonic() < end:
                checked(sandbox.python("pass"))
                counts[index] += 1

        threads = [threading.Thread(target=call, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return round(sum(counts) / seconds)


class Peers:
    """Other ways to run /bin/true; those that are not installed, or do not work here, are named as such."""

    def __init__(self, place):
        self.place, self.ways, self.absent, self.count = place, {"subprocess": self.plain}, {}, 0
        self._runc_bundle()
        for name, way in (("podman", self.podman), ("runc", self.runc)):
            if shutil.which(name) is None:
                self.absent[name] = "not installed"
                continue
            try:
                way()
                self.ways[name] = way
            except subprocess.CalledProcessError as error:
                said = (error.stderr or b"").decode("utf-8", "replace").strip().splitlines()
                self.absent[name] = said[-1] if said else f"exit {error.returncode}"

    def plain(self):
        subprocess.run(["/bin/true"], check=True)

    def podman(self):
        argv = ["podman", "--root", f"{self.place}/store", "--runroot", f"{self.place}/run", "--cgroup-manager", "cgroupfs"]
        argv += ["--storage-driver", "vfs"]
        argv += [
            "--runtime",
            "runc",
            "run",
            "--rm",
            "--network",
            "none",
            "--ulimit",
            "nofile=1024:1024",
            "--ulimit",
            "nproc=1000:1000",
            "--volume",
            "/usr:/usr:ro",
        ]
        argv += ["--rootfs", f"{self.place}/rootfs", "/bin/true"]
        subprocess.run(argv, check=True, capture_output=True)

    def _runc_bundle(self):
        root = self.place / "rootfs"
        root.mkdir()
        bundle.skeleton(root)
        (self.place / "init").write_bytes(bundle.init_program())
        told = bundle.configuration(root, self.place / "init", True, [], MIB, None)
        told["process"] |= {"args": ["/bin/true"], "user": {"uid": 0, "gid": 0}}
        told["root"]["readonly"] = True
        told["mounts"] = [one for one in told["mounts"] if one["destination"] != "/dev/init"]
        told["linux"]["namespaces"] = [one for one in told["linux"]["namespaces"] if one["type"] not in ("user", "cgroup")]
        for key in ("uidMappings", "gidMappings"):
            del told["linux"][key]
        (self.place / "config.json").write_text(json.dumps(told))

    def close(self):
        """podman leaves its parent cgroups: remove them where they are empty."""
        for place in Path("/sys/fs/cgroup").glob("*/libpod_parent"):
            for directory, _, _ in os.walk(place, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)

    def runc(self):
        self.count += 1
        argv = ["runc", "--root", f"{self.place}/runc", "run", "--bundle", str(self.place), f"bench-{os.getpid()}-{self.count}"]
        subprocess.run(argv, check=True, capture_output=True, stdin=subprocess.DEVNULL)


def named_run(container, count):
    """A command under a name, as a trajectory log gives one."""
    driver = container.driver
    order = Order(("/bin/true",), b"", 10.0, None, {}, operation=f"bench{count}")
    checked(driver.run(order, None))


def measure(rounds, place, only):
    names = ("function_python", "function_true", "container_run", "container_named_run", "container_create_run")
    names += ("container_create", "container_close", "container_paced_create_run", "container_pooled_run")
    names += ("container_cold_create_run", "runsc_create", "runsc_run", "runsc_snapshot")
    names += ("runsc_restore", "runsc_restore_again")
    samples = {name: [] for name in names}
    peers = Peers(place)
    samples |= {name: [] for name in peers.ways}
    wanted = {part: part.startswith(only) or only.startswith(part) for part in ("function", "container", "runsc")}
    with contextlib.ExitStack() as stack:
        if wanted["function"]:
            function = stack.enter_context(Sandbox.create("function", limits=LIMITS))
        if wanted["container"]:
            container = stack.enter_context(Sandbox.create("container", limits=LIMITS))
            pool = stack.enter_context(SandboxPool(2, lambda: Sandbox.create("container", limits=LIMITS)))
        for index in range(rounds):
            for _ in range(5 if wanted["function"] else 0):
                samples["function_python"].append(timed(lambda: checked(function.python("print(6*7)"))))
                samples["function_true"].append(timed(lambda: checked(function.run(["/bin/true"]))))
            if wanted["container"]:
                containers(index, samples, container, pool)
            if wanted["runsc"] and index % 5 == 0 and shutil.which("runsc") and os.geteuid() == 0:
                gvisor(samples)
            for name, way in peers.ways.items():
                if name == "subprocess" or index % 5 == 0:  # the slow peers have fewer turns
                    samples[name].append(timed(way))
    peers.close()
    ready = sum(value < READY for value in samples["container_create"])
    found = {name: summary(values) for name, values in samples.items() if values}
    if wanted["container"]:
        found["container_found_ready"] = f"{ready}/{rounds}: created within {READY:g} ms"
    return found, peers.absent


def containers(index, samples, container, pool):
    """One turn of everything that is measured of containers."""
    samples["container_run"].append(timed(lambda: checked(container.run(["/bin/true"]))))
    samples["container_named_run"].append(timed(lambda: named_run(container, index)))
    create_and_run(samples["container_create_run"], samples["container_create"], samples["container_close"])
    pooled(pool, samples["container_pooled_run"])
    time.sleep(0.05)
    create_and_run(samples["container_paced_create_run"], [], [])
    create_cold(index, samples["container_cold_create_run"])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--only", default="", help="function, container or runsc")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=False) as place:
        figures, absent = measure(arguments.rounds, Path(place), arguments.only)
    rate = None if arguments.only not in ("", "function") else statistics.median(throughput(2.0) for _ in range(3))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "device": f"{platform.machine()}, {os.cpu_count()} processors",
        "kernel": platform.release(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "load_average": {"before": before, "after": os.getloadavg()[0]},
        "milliseconds": figures,
        "function_calls_per_second_two_workers": rate,
        "absent": absent,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
