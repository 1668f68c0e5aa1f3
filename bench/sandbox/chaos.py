"""Kill everything at random, again and again, and count what was lost, what ran twice, and what was left behind.

    python bench/sandbox/chaos.py kills  [--kills 1000] [--seed 1] [--out bench/results/sandbox_chaos.json]
    python bench/sandbox/chaos.py cycles [--cycles 10000] [--out bench/results/sandbox_cycles.json]

``kills``: clients work on recorded containers of a fleet (an edge, two gateways); each step appends its number to a file,
which must not happen twice, and prints what came back, which must be in the log. SIGKILL goes to clients, the edge, gateways,
agents (the process that sees a command to its end), seats (the process that starts a container's commands), and now and then a
container's first process, which is its end. Whatever was killed is started again; a client then issues its steps from the first
one on.

``cycles``: containers are created and closed through an edge that is killed now and then; in the end nothing may be left.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nautile.sandbox import MIB, Limits, OutcomeUnknown, Sandbox, SandboxClosed, SandboxError, SandboxLost, cgroup
from nautile.sandbox.container import ContainerDriver, KeeperClient
from nautile.sandbox.fleet.admission import Admission
from nautile.sandbox.fleet.client import Fleet
from nautile.sandbox.fleet.edge import EdgeConfig
from nautile.sandbox.fleet.gateway import GatewayConfig
from nautile.sandbox.fleet.quota import Quota, issue
from nautile.sandbox.fleet.serving import serve_edge, serve_gateway
from nautile.sandbox.fleet.watcher import Edges
from nautile.sandbox.log import expand, load, verify
from nautile.sandbox.recorded import Recorded

LIMITS = Limits(memory=48 * MIB, pids=24, disk=8 * MIB, inodes=1000)
STEPS = 40
COUNTED = (
    *("kills_in_all", "trajectories", "acknowledged_operations", "operations_checked_against_the_file"),
    *("acknowledged_and_lost", "run_twice", "contradictions", "cycles", "failures"),
)


class Child:
    """A function in a process of its own, forked from this one, which has one thread: it starts in milliseconds."""

    def __init__(self, kind, action):
        self.kind, self.action, self.kills = kind, action, 0
        self.start()

    def start(self):
        self.reader, writer = os.pipe()
        self.pending, self.status = b"", None
        self.process = os.fork()
        if self.process == 0:
            status = 1
            try:
                os.dup2(writer, 1)
                os.closerange(3, 4096)
                status = self.action() or 0
            except BaseException as error:
                os.write(2, f"{self.kind}: {type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(status)
        os.close(writer)
        os.set_blocking(self.reader, False)

    def lines(self):
        """Whole lines that have come."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.reader, 65536):
                self.pending += data
        *whole, self.pending = self.pending.split(b"\n")
        return [line.decode() for line in whole]

    def ended(self):
        """Its status once it has ended, else None."""
        if self.status is None and (found := os.waitpid(self.process, os.WNOHANG))[0]:
            self.status = os.waitstatus_to_exitcode(found[1])
        return self.status

    def kill(self):
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        rest = self.lines()
        os.close(self.reader)
        self.kills += 1
        return rest

    def end(self):
        if self.ended() is None:
            os.kill(self.process, signal.SIGTERM)
        deadline = time.monotonic() + 30
        while self.ended() is None:
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.kind} does not end")
            time.sleep(0.01)
        os.close(self.reader)


def careless_edge(*arguments):
    """The twin that shows that the counting bites: this edge carries out again whatever has no result."""
    run = ContainerDriver.run
    ContainerDriver.run = lambda self, order, watch: run(self, dataclasses.replace(order, operation=None), watch)
    Recorded._recover = lambda self, name: "never"
    serve_edge(*arguments)


def port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def work(urls, token, name):
    """A client: every step, from the first one on, each acknowledged by a line."""
    fleet = Fleet(urls, token, patience=120.0)
    for attempt in range(20):
        try:
            sandbox = Sandbox.create("container", limits=LIMITS, fleet=fleet, log=name)
            break
        except SandboxLost:  # what was to make it was killed
            if attempt == 19:
                raise
    for step in range(STEPS):
        try:
            result = sandbox.run(f"echo {step} >> trace; sleep 0.0{step % 10}; wc -l < trace", timeout=30.0)
        except OutcomeUnknown:
            print(f"{step} unknown", flush=True)
            continue
        except SandboxLost as error:
            print(f"lost: {error}".partition("; ")[0], flush=True)
            return 0
        if result.infrastructure_error is None:
            print(f"{step} ok {result.stdout.strip()}", flush=True)
        else:
            print(f"{step} broken {result.infrastructure_error}", flush=True)
    try:
        print("trace " + " ".join(sandbox.read("trace").decode().split()), flush=True)
    except SandboxError as error:
        print(f"lost: {error}".partition("; ")[0], flush=True)
    return 0


class Fleetlet:
    """An edge and two gateways, as children."""

    def __init__(self, place, capacity=500, careless=False):
        self.place = place
        self.token = issue(place / "tokens.json", "chaos", Quota())
        socket_path = f"unix:{place}/edge.sock"
        config = EdgeConfig("n0", place / "edge", Admission(capacity, 0.05), orphan=120.0)
        self.config, self.address = config, socket_path
        serve = careless_edge if careless else serve_edge
        self.edge = Child("edge", lambda: serve(config, socket_path, None, False))
        self.ports = [port(), port()]
        gateways = GatewayConfig(place / "tokens.json")
        self.gateways = [
            Child("gateway", lambda at=at: serve_gateway(gateways, Edges((socket_path,)), f"127.0.0.1:{at}", None))
            for at in self.ports
        ]
        self.urls = [f"http://127.0.0.1:{at}" for at in self.ports]

    def end(self):
        for one in [*self.gateways, self.edge]:
            one.end()


def keeper_process():
    """The keeper's number, as its socket knows it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as channel:
        channel.connect(str(KeeperClient().place / "keeper.sock"))
        return struct.unpack("iii", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return None


def _parent(number):
    return int(Path(f"/proc/{number}/stat").read_bytes().rpartition(b")")[2].split()[1])


def supervisors():
    """The processes that see a command to its end, at this moment."""
    keeper, found = keeper_process(), []
    for begun in KeeperClient().place.glob("c-*/operations/*.begun"):
        if not begun.with_suffix(".ended").exists():
            with contextlib.suppress(OSError, ValueError):
                found.append(int(begun.read_text().split(".")[0]))
    return [number for number in found if _is_ours(number, keeper)]


def seats():
    """The processes that start a container's commands, used or not yet."""
    keeper, found = keeper_process(), []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (place / "comm").read_text() == "seat\n" and _is_ours(int(place.name), keeper):
                found.append(int(place.name))
    return found


def first_processes():
    """The first processes of containers. What a file names may have ended, and its number be another process's by now."""
    keeper, found = keeper_process(), []
    for file in KeeperClient().place.glob("c-*/pid"):
        with contextlib.suppress(OSError, ValueError):
            number = int(file.read_text())
            if Path(f"/proc/{number}/comm").read_text() == "init\n" and _is_ours(number, keeper):
                found.append(number)
    return found


def _is_ours(number, keeper):
    with contextlib.suppress(OSError):
        return _parent(number) == keeper
    return False


class Judge:
    """What clients were told, against the log and the file inside."""

    def __init__(self, place):
        self.place = place
        self.told = collections.defaultdict(dict)
        self.count, self.lost = collections.Counter(), collections.Counter()
        self.faults = []

    def hear(self, name, line):
        step, _, said = line.partition(" ")
        if not step.isdigit():
            return
        said = said if said.startswith("ok ") else said.partition(" ")[0]  # why it failed may be said in other words
        earlier = self.told[name].setdefault(int(step), said)
        if earlier != said:
            self.faults.append(f"{name} step {step}: told {earlier!r}, then {said!r}")

    def conclude(self, name, last, log):
        """The trajectory has come to its end."""
        told = self.told[name]
        operations = load(log).operations
        verify(log)
        for step, said in told.items():
            result = operations[step].result if step < len(operations) else None
            recorded = None if result is None else _text(log, result)
            if said.startswith("ok ") and said[3:] != recorded:
                self.count["lost"] += 1
                self.faults.append(f"{name} step {step}: acknowledged {said!r}, the log has {recorded!r}")
        self.count["acknowledged"] += sum(said.startswith("ok ") for said in told.values())
        self.count["told_unknown_or_broken"] += sum(not said.startswith("ok ") for said in told.values())
        if not last.startswith("trace"):
            self.count["sandboxes_lost"] += 1
            self.lost[re.sub(r"c-[0-9a-f]{16}", "ID", last)] += 1
            return
        times = collections.Counter(map(int, last.split()[1:]))
        self.count["checked_against_the_file"] += len(told)
        for step in range(STEPS):
            if times[step] > 1:
                self.count["twice"] += 1
                self.faults.append(f"{name} step {step} ran {times[step]} times")
            if times[step] == 0 and told.get(step, "").startswith("ok "):
                self.count["lost"] += 1
                self.faults.append(f"{name} step {step} was acknowledged and never ran")


def _text(log, result):
    return expand(log, load(log).head, result)["stdout"].decode().strip()


def logs_by_name(place, names):
    return {name: place / "edge/logs" / hashlib.sha256(f"chaos\0{name}".encode()).hexdigest()[:32] for name in names}


def kills(arguments):
    chance, judge = random.Random(arguments.seed), None
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        fleet, judge = Fleetlet(Path(name), careless=arguments.careless), Judge(Path(name))
        clients, number, counts = {}, 0, collections.Counter()
        began = time.monotonic()
        try:
            while striking(counts, began, arguments) or clients:
                while len(clients) < arguments.clients and striking(counts, began, arguments):
                    number += 1
                    clients[f"t{number}"] = Child("client", lambda at=f"t{number}": work(fleet.urls, fleet.token, at))
                time.sleep(chance.uniform(0.0, arguments.pause))
                for one in [fleet.edge, *fleet.gateways]:
                    if one.ended() is not None:
                        raise SystemExit(f"{one.kind} has ended by itself")
                for at, client in list(clients.items()):
                    settle(judge, at, client, clients, fleet)
                note_owner()
                if striking(counts, began, arguments):
                    counts[strike(chance, fleet, clients, judge)] += 1
                    counts.pop(None, None)
        finally:
            for client in clients.values():
                with contextlib.suppress(ProcessLookupError):
                    client.kill()
            fleet.end()
        seconds = time.monotonic() - began
    KeeperClient().stop()
    time.sleep(1.0)
    if judge.count["sandboxes_lost"] > counts["first process"]:
        judge.faults.append(f"{judge.count['sandboxes_lost']} sandboxes were lost: {dict(judge.lost)}")
    return {
        "twin_without_protection": arguments.careless,
        "kills": dict(counts),
        "kills_in_all": sum(counts.values()),
        "seconds": round(seconds, 1),
        "trajectories": len(judge.told),
        "acknowledged_operations": judge.count["acknowledged"],
        "operations_checked_against_the_file": judge.count["checked_against_the_file"],
        "told_to_be_unknown_or_broken": judge.count["told_unknown_or_broken"],
        "sandboxes_lost": judge.count["sandboxes_lost"],
        "lost_because": judge.lost,
        "acknowledged_and_lost": judge.count["lost"],
        "run_twice": judge.count["twice"],
        "contradictions": len(judge.faults) - judge.count["lost"] - judge.count["twice"],
        "faults": judge.faults[:20],
        "left": left(),
    }


def striking(counts, began, arguments):
    """Whether there is still something to be killed, and time for it."""
    return sum(counts.values()) < arguments.kills and time.monotonic() - began < arguments.seconds


def settle(judge, name, client, clients, fleet):
    """Hear a client; when it has come to its end, judge it."""
    said = client.lines()
    for line in said:
        judge.hear(name, line)
    status = client.ended()
    if status is None:
        client.last = next((line for line in reversed(said) if line.startswith(("trace", "lost"))), getattr(client, "last", ""))
        return
    said += client.lines()
    for line in said:
        judge.hear(name, line)
    os.close(client.reader)
    last = next((line for line in reversed(said) if line.startswith(("trace", "lost"))), getattr(client, "last", ""))
    if status != 0 or not last:
        judge.faults.append(f"{name}: its client ended with {status} and said {said[-1:]!r}")
    del clients[name]
    judge.conclude(name, last, logs_by_name(fleet.place, [name])[name])
    with contextlib.suppress(SandboxError):
        fleet_asked = Fleet(fleet.urls, fleet.token, patience=30.0)
        for one in fleet_asked.ask("GET", "/v1/sandboxes")["sandboxes"]:
            if one["log"] == name:
                fleet_asked.ask("DELETE", f"/v1/sandboxes/{one['id']}")
        fleet_asked.close()


def strike(chance, fleet, clients, judge):
    """Kill something; what was killed, or None."""
    target = chance.choice(["client", "edge", "gateway", "agent"])
    if target == "agent":
        deadline, drawn = time.monotonic() + 1.0, chance.random()
        find = first_processes if drawn < 0.04 else seats if drawn < 0.34 else supervisors
        while not (victims := find()) and time.monotonic() < deadline:
            time.sleep(0.002)
        if not victims:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(victims), signal.SIGKILL)
            return {first_processes: "first process", seats: "seat"}.get(find, "agent")
        return None
    if target == "client":
        if not clients:
            return None
        name = chance.choice(sorted(clients))
        child = clients[name]
        for line in child.kill():
            judge.hear(name, line)
        child.start()
        return target
    child = fleet.edge if target == "edge" else chance.choice(fleet.gateways)
    child.kill()
    child.start()
    return target


# -- nothing is left


def left():
    """Processes, cgroups and directories of ours that are still there; mounts end with the keeper's namespace."""
    assert OWNERS, "no keeper was noted, so nothing of it could be found"
    inits = 0
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            inits += (place / "comm").read_text() == "init\n" and place.name != "1" and _in_keeper(place)
    place = KeeperClient().place
    mine = list(place.glob("c-*")) if place.exists() else []
    mounts = sum(str(place) in line for line in Path("/proc/self/mountinfo").read_text().splitlines()) - os.path.ismount(place)
    return {
        "processes": inits,
        "directories": len(mine),
        "cgroups": len(groups()),
        "mounts": mounts,
        "keeper": keeper_process(),
    }


def _in_keeper(place):
    """Whether a container is of this run: its group is."""
    text = (place / "cgroup").read_text()
    return any(str(name) in text for name in OWNERS)


OWNERS = set()


def groups():
    return [one for owner in OWNERS for one in Path("/sys/fs/cgroup").glob(f"*/nautile/{owner}/c-*")]


def note_owner():
    if (keeper := keeper_process()) is not None:
        OWNERS.add(cgroup.owner_name(keeper))


def namespaces():
    """Distinct namespaces of the whole machine."""
    found = set()
    for place in Path("/proc").glob("[0-9]*/ns"):
        with contextlib.suppress(OSError):
            found |= {os.readlink(place / name) for name in ("net", "mnt", "pid", "user", "ipc", "uts")}
    return len(found)


def descriptors(process):
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{process}/fd"))
    return 0


def cycles(arguments):
    """Create, run and close, through the edge; it is killed every ``--every`` cycles with containers alive."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        fleet = Fleetlet(Path(name))
        asked = Fleet(fleet.urls, fleet.token, patience=60.0)
        failures, before, began = [], None, time.monotonic()
        lost = adopted = done = 0
        try:
            while done < arguments.cycles and time.monotonic() - began < arguments.seconds:
                done += batch(asked, failures, min(arguments.batch, arguments.cycles - done))
                note_owner()
                if before is None:
                    before = (descriptors(fleet.edge.process), descriptors(keeper_process()), namespaces())
                if done % arguments.every < arguments.batch:
                    kept = [Sandbox.create("container", limits=LIMITS, fleet=asked) for _ in range(5)]
                    fleet.edge.kill()
                    fleet.edge.start()
                    for one in kept:
                        try:
                            adopted += one.run("true", idempotent=True).ok
                        finally:
                            one.close()
                    lost += 5
                print(f"{done} cycles, {time.monotonic() - began:.0f} s", file=sys.stderr)
            seconds = time.monotonic() - began
            time.sleep(1.0)
            batch(asked, failures, 1)
            after = (descriptors(fleet.edge.process), descriptors(keeper_process()), namespaces())
            during = left()
        finally:
            fleet.end()
    KeeperClient().stop()
    time.sleep(1.0)
    return {
        "cycles": done,
        "seconds": round(seconds, 1),
        "failures": len(failures),
        "first_failure": failures[0] if failures else None,
        "edge_killed_with_5_containers": lost // 5,
        "containers_found_again": f"{adopted}/{lost}",
        "descriptors_of_edge_keeper_and_namespaces_before": before,
        "descriptors_of_edge_keeper_and_namespaces_after": after,
        "left_while_the_keeper_runs": during,
        "left_at_the_end": left(),
    }


def batch(asked, failures, count):
    for _ in range(count):
        try:
            with Sandbox.create("container", limits=LIMITS, fleet=asked) as sandbox:
                if not sandbox.run(["/bin/true"]).ok:
                    failures.append("run failed")
        except (SandboxError, SandboxClosed) as error:
            failures.append(f"{type(error).__name__}: {error}")
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["kills", "cycles"])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cycles", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin nothing further after so long")
    parser.add_argument("--add", action="store_true", help="add this run to those that --out has")
    parser.add_argument("--careless", action="store_true", help="kills: the twin without protection, which must be caught")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    before = os.getloadavg()[0]
    found = (kills if arguments.part == "kills" else cycles)(arguments)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    head = {"device": f"{platform.machine()}, {os.cpu_count()} processors", "date": time.strftime("%Y-%m-%d"), "commit": commit}
    result = {**head, "load_average": {"before": before, "after": os.getloadavg()[0]}, "seed": arguments.seed, **found}
    print(json.dumps(result, indent=1))
    if arguments.out:
        runs = json.loads(arguments.out.read_text())["runs"] if arguments.add and arguments.out.exists() else []
        runs.append(result)
        whole = {**head, "total": {name: sum(run[name] for run in runs) for name in COUNTED if name in result}, "runs": runs}
        arguments.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
