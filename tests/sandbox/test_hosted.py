"""Hosts of machines: what outlives its client, is run once, and is found again; with a machine that is played."""

import os
import signal
import socket
import threading
import time

import pytest

from nautile.sandbox import (
    Capabilities,
    FileRefused,
    Image,
    Info,
    InvalidRequest,
    Limits,
    NetworkPolicy,
    RunResult,
    SandboxLost,
)
from nautile.sandbox import container as container_module
from nautile.sandbox.driver import Order
from nautile.sandbox.guest import hosted
from nautile.sandbox.guest.host import Host, Outcomes
from nautile.sandbox.guest.hosted import HostedDriver, hosts_directory
from nautile.sandbox.guest.wish import MachineWish
from nautile.sandbox.inside import frames
from waiting import soon

ABLE = Capabilities(files=True, session=True, pause=True, snapshot=True, fork=True, pack_diff=True, network=False)
WISH = MachineWish("microvm", Image(), Limits(), NetworkPolicy())


class Played:
    """A machine that does as it is told: ``gate`` holds commands up, ``ended`` is its death."""

    def __init__(self, identity):
        self.info, self.capabilities, self.image = Info(identity, "microvm", "played", "kvm", ("memory",)), ABLE, Image()
        self.ended = self.closed = False
        self.gate, self.ran, self.files = threading.Event(), [], {}
        self.gate.set()

    def run(self, order, watch):
        self.ran.append(order.argv)
        if watch is not None:
            for _ in range(int(order.argv[1]) if len(order.argv) > 1 else 1):
                watch("stdout", b"x" * 60_000)
        assert self.gate.wait(60)
        failure = "microvm: the machine has ended" if self.ended else None
        out = f"{len(self.ran)}".encode()
        return RunResult(7, out.decode(), "e", False, False, failure, seconds=0.5, stdout_bytes=out, stderr_bytes=b"e")

    def read(self, path, limit):
        if path not in self.files:
            raise FileRefused(path, "it does not exist")
        return self.files[path]

    def write(self, path, data, mode):
        self.files[path] = data

    def fork(self):
        copy = Played(f"{self.info.id}-copy")
        copy.files = dict(self.files)
        return copy

    def close(self):
        self.closed = True


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    """Start hosts in threads: ``hosts(identity)`` gives the driver of a client, and the machine behind it."""
    monkeypatch.setattr(container_module, "_runtime_directory", lambda: tmp_path / "k")
    monkeypatch.setattr("nautile.sandbox.guest.host._TICK", 0.01)
    running = []

    def start(identity="m-1", keep=60.0, make=Played):
        made, place = [], hosts_directory() / identity
        place.mkdir(parents=True, mode=0o700)
        host = Host(place, lambda name, record: made.append(make(name)) or made[-1])
        thread = threading.Thread(target=host.serve)
        thread.start()
        running.append((host, thread))
        start.first = running[0][0]
        monkeypatch.setattr(hosted, "_start", lambda kind, place: None)
        return HostedDriver.create(identity, WISH, keep), made[0], thread

    hosts_directory().mkdir(parents=True, mode=0o700)
    yield start
    for host, thread in running:
        host.stop()
        thread.join(60)
        assert not thread.is_alive()
    assert list(hosts_directory().iterdir()) == []


def order(*argv, operation=None, timeout=60.0):
    return Order(argv, b"", timeout, None, {}, operation=operation)


def sent(identity, **request):
    """A client that says something and dies."""
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(str(hosts_directory() / identity / "host.sock"))
        frames.send(channel, {"id": identity, "version": 1, **request})


def test_a_command_whose_client_died_is_run_once_and_its_outcome_waits(hosts):
    _, machine, _ = hosts()
    machine.gate.clear()
    run = {"op": "run", "operation": "a", "argv": ["x", "40"], "timeout": 60.0, "cwd": None, "environment": {}, "watch": True}
    sent("m-1", **run)  # it reads nothing of 2 MB of output
    soon(lambda: machine.ran)
    again = HostedDriver.attach("m-1", 60.0)
    threading.Timer(0.05, machine.gate.set).start()
    found = again.outcome("a", 60.0)
    assert (found.exit_code, found.stdout, found.stderr, found.seconds) == (7, "1", "e", 0.5)
    assert again.run(order("x", operation="a"), None) == found  # asked for again: given, not run
    assert again.outcome("b", 10.0) == "never"
    assert again.run(order("y"), None).stdout == "2" and len(machine.ran) == 2


def test_output_comes_to_a_client_that_reads(hosts):
    driver, _, _ = hosts()
    seen = []
    driver.run(order("x", "3"), lambda stream, data: seen.append((stream, len(data))))
    assert seen == [("stdout", 60_000)] * 3


def test_under_a_machine_that_dies_nothing_is_known(hosts):
    driver, machine, thread = hosts()
    machine.gate.clear()
    results = []
    client = threading.Thread(target=lambda: results.append(driver.run(order("x", operation="a"), None)))
    client.start()
    soon(lambda: machine.ran)
    machine.ended = True
    machine.gate.set()
    client.join(60)
    assert results[0].infrastructure_error == "microvm: the machine has ended"
    thread.join(60)  # its host does not wait for ``keep`` to be over
    assert machine.closed
    for action in (lambda: HostedDriver.attach("m-1", 60.0), lambda: driver.outcome("a", 1.0), lambda: driver.read("f", 9)):
        with pytest.raises(SandboxLost, match="gone"):
            action()
    assert driver.run(order("x"), None).infrastructure_error.startswith("microvm: the machine m-1 is gone")


def test_an_outcome_that_nobody_knows_is_never_taken_for_one_that_never_began(monkeypatch):
    monkeypatch.setattr("nautile.sandbox.guest.host._KEPT", 10)
    outcomes = Outcomes()
    for name in "abc":
        assert outcomes.begin(name) and not outcomes.begin(name)
    outcomes.end("a", {"n": 1}, b"12345678")
    outcomes.end("b", None)
    outcomes.end("c", {"n": 3}, b"12345678")
    found = [outcomes.ask(name, 0.0) for name in "abcd"]
    assert found == ["unknown", "unknown", ({"n": 3}, b"12345678"), "never"]


def test_a_machine_lives_for_its_time_after_the_last_request(hosts):
    driver, machine, thread = hosts(keep=60.0)
    driver.keep_alive(0.05)
    thread.join(60)
    assert machine.closed and not (hosts_directory() / "m-1").exists()


def test_a_command_keeps_its_machine_alive(hosts):
    driver, machine, thread = hosts(keep=60.0)
    machine.gate.clear()
    client = threading.Thread(target=lambda: driver.run(order("x"), None))
    client.start()
    soon(lambda: machine.ran)
    machine_host = HostedDriver.attach("m-1", 0.01)
    time.sleep(0.1)  # ten times as long as it may be left alone
    assert thread.is_alive() and machine_host.outcome("none", 1.0) == "never"
    machine.gate.set()
    client.join(60)
    thread.join(60)
    assert machine.closed


def test_files_and_errors_come_over(hosts, monkeypatch):
    monkeypatch.setattr("nautile.sandbox.guest.host.PIECE", 1000)
    driver, machine, _ = hosts()
    data = os.urandom(3500)
    driver.write("f", data, 0o644)
    assert machine.files == {"f": data} and driver.read("f", 10**6) == data
    with pytest.raises(FileRefused) as caught:
        driver.read("g", 1)
    assert (caught.value.path, caught.value.why) == ("g", "it does not exist")
    with pytest.raises(InvalidRequest, match="another version"):
        driver._do("nothing")
    with pytest.raises(InvalidRequest, match="has its machine"):
        HostedDriver.create("m-1", WISH, 60.0)


def test_a_fork_is_found_by_its_own_name_and_lives_on_without_the_first(hosts):
    driver, machine, thread = hosts()
    driver.write("f", b"1", 0o644)
    copy = driver.fork()
    assert copy.info.id == "m-1-copy"
    driver.write("f", b"2", 0o644)
    driver.close()
    assert machine.closed and thread.is_alive()
    again = HostedDriver.attach("m-1-copy", 60.0)
    assert again.read("f", 9) == b"1"
    with pytest.raises(SandboxLost, match="m-1 is gone"):
        driver.read("f", 9)
    again.close()
    thread.join(60)
    assert not thread.is_alive()


def test_a_machine_that_cannot_be_made_says_why_and_leaves_nothing(hosts):
    def refuse(identity):
        raise InvalidRequest("no such image")

    with pytest.raises(InvalidRequest, match="no such image"):
        hosts(make=refuse)


def test_what_is_no_request_harms_nobody(hosts):
    driver, _, _ = hosts()
    for junk in (b"", b"\xff" * 64, b"\x04\0\0\0\0\0\0\0nope", b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{}"):
        with socket.socket(socket.AF_UNIX) as channel:
            channel.connect(str(hosts_directory() / "m-1/host.sock"))
            channel.sendall(junk)
    sent("m-1", op="run")  # without what a run needs
    assert driver.run(order("x"), None).exit_code == 7


def test_all_hosts_can_be_ended(hosts, monkeypatch):
    _, machine, thread = hosts()
    told = []
    (hosts_directory() / "m-1/owner").write_text(hosted.cgroup.owner_name())
    monkeypatch.setattr(os, "kill", lambda process, number: told.append((process, number)) or hosts.first.stop())
    assert hosted.stop_hosts() == 1 and told == [(os.getpid(), signal.SIGTERM)]
    thread.join(60)
    assert machine.closed


def test_what_killed_hosts_left_is_swept_and_what_others_own_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(container_module, "_runtime_directory", lambda: tmp_path / "k")
    root = hosted._root("microvm")
    for name, owner in (("m-dead", "1.1"), ("m-live", hosted.cgroup.owner_name()), ("m-new", None)):
        (root / name).mkdir()
        if owner is not None:
            (root / name / "owner").write_text(owner)
    (root / "m-copy").symlink_to("m-dead")
    hosted._sweep(root)
    hosted._sweep(root)
    assert sorted(one.name for one in root.iterdir()) == ["m-live", "m-new"]
    root.chmod(0o755)
    with pytest.raises(hosted.SubstrateUnavailable, match="not ours alone"):
        hosted._root("microvm")
