"""The trajectory log: nothing acknowledged is lost, nothing is run twice, nothing wrong is given, and tampering shows."""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nautile.sandbox import (
    FileRefused,
    InvalidRequest,
    LogCorrupt,
    LogFenced,
    OutcomeUnknown,
    Sandbox,
    SandboxLost,
    TrajectoryDiverged,
    Unsupported,
)
from nautile.sandbox.container import KeeperClient
from nautile.sandbox.inside import frames
from nautile.sandbox.log import TrajectoryLog, digest_of, load, verify
from nautile.sandbox.view import lines, page
from sandbox.conftest import client_code
from sandbox.machines import create as create_machine
from waiting import soon

HEAD = {"sandbox": "c-1", "kind": "container", "image": {"layers": [], "host_usr": True}, "limits": {}}


def never(name):
    raise AssertionError("the sandbox was asked")


def unknown(name):
    return "unknown"


def append(log, number, data=b""):
    return log.perform("run", {"n": number}, lambda name: {"n": number, "data": data}, unknown)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "log"


# -- the log alone


def test_recorded_results_are_given_again_without_asking(place):
    log = TrajectoryLog.open(place, HEAD)
    big = os.urandom(50_000)
    for number in range(5):
        append(log, number, big if number == 3 else b"x" * number)
    log.close()
    log = TrajectoryLog.open(place, HEAD)
    for number in range(5):
        result = log.perform("run", {"n": number}, never, never)
        assert result == {"n": number, "data": big if number == 3 else b"x" * number}
    assert not log.replaying
    assert append(log, 5)["n"] == 5
    log.close()
    assert verify(place) == (6, 0)


def test_another_request_is_a_divergence_and_gets_nothing(place):
    log = TrajectoryLog.open(place, HEAD)
    append(log, 0)
    append(log, 1)
    log.close()
    log = TrajectoryLog.open(place, HEAD)
    append(log, 0)
    with pytest.raises(TrajectoryDiverged) as caught:
        append(log, 7)
    assert caught.value.sequence == 1
    assert append(log, 1)["n"] == 1  # the right request still gets its result


def test_intent_is_on_the_disk_before_and_the_result_before_the_reply(place):
    log = TrajectoryLog.open(place, HEAD)
    seen = []

    def execute(name):
        (operation,) = load(place).operations
        seen.append((operation.name, operation.result))
        return {"a": 1}

    log.perform("run", {}, execute, never)
    assert seen == [(log.contents.operations[0].name, None)]
    assert load(place).operations[0].result == {"a": 1}


@pytest.mark.parametrize(("idempotent", "found"), [(False, "unknown"), (True, "unknown"), (False, "never"), (False, {"a": 2})])
def test_an_intent_without_a_result_is_one_of_three_things(place, idempotent, found):
    log = TrajectoryLog.open(place, HEAD)
    with pytest.raises(ZeroDivisionError):
        log.perform("run", {"argv": ["x"]}, lambda name: 1 / 0, never)
    name = log.contents.operations[0].name
    log.close()
    log = TrajectoryLog.open(place, HEAD)
    ran, asked = [], []

    def execute(name):
        ran.append(name)
        return {"a": 1}

    def recover(name):
        asked.append(name)
        return found

    def perform():
        return log.perform("run", {"argv": ["x"]}, execute, recover, idempotent=idempotent)

    if found == "unknown" and not idempotent:
        with pytest.raises(OutcomeUnknown, match="operation 0"):
            perform()
        assert ran == []
    else:
        assert perform() == ({"a": 2} if isinstance(found, dict) else {"a": 1})
        assert ran == ([] if isinstance(found, dict) else [name])
        assert load(place).operations[0].result is not None
    assert asked == [name]


def test_a_new_writer_fences_the_old_one(place):
    old = TrajectoryLog.open(place, HEAD)
    append(old, 0)
    new = TrajectoryLog.open(place, HEAD)
    with pytest.raises(LogFenced, match="epoch 1 is past"):
        append(old, 1)
    append(new, 0)
    assert append(new, 1)["n"] == 1
    assert [operation.request["n"] for operation in load(place).operations] == [0, 1]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The bytes of a log of four operations, and where each result ends."""
    place = tmp_path_factory.mktemp("written") / "log"
    log = TrajectoryLog.open(place, HEAD)
    ends = []
    for number in range(4):
        append(log, number, b"y" * 10)
        ends.append(log.contents.size)
    log.close()
    return (place / "log").read_bytes(), ends


@settings(max_examples=25)
@given(cut=st.integers(0, 10**6))
def test_a_log_cut_anywhere_keeps_every_whole_frame(written, tmp_path_factory, cut):
    data, ends = written
    place = tmp_path_factory.mktemp("cut")
    first = len(b"nautile trajectory 1\n")
    head = first + 8 + struct.unpack_from("<I", data, first)[0]
    cut = head + cut % (len(data) - head + 1)
    (place / "log").write_bytes(data[:cut])
    again = TrajectoryLog.open(place, HEAD)
    done = [one for one in again.contents.operations if one.result is not None]
    assert len(done) == sum(end <= cut for end in ends)
    for number in range(4):  # and it goes on from there
        again.perform("run", {"n": number}, lambda name: {"data": b""}, lambda name: "never")
    again.close()
    assert verify(place) == (4, 0)


@settings(max_examples=200)
@given(at=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_a_changed_byte_is_never_taken_for_truth(written, tmp_path_factory, at, flip):
    data = bytearray(written[0])
    place = tmp_path_factory.getbasetemp()
    at %= len(data)
    data[at] ^= flip
    (place / "log").write_bytes(data)
    try:
        contents = load(place)
    except LogCorrupt:
        return
    # What is not refused was cut off: a prefix of what was written, and unchanged.
    assert [one.request["n"] for one in contents.operations] == list(range(len(contents.operations)))
    assert len(contents.operations) < 4 or contents.operations[-1].result is None


def test_a_frame_that_was_replaced_breaks_the_chain(place):
    log = TrajectoryLog.open(place, HEAD)
    for number in range(3):
        append(log, number)
    log.close()
    data = (place / "log").read_bytes()
    offset = len(b"nautile trajectory 1\n")
    frames = []
    while offset < len(data):
        length = struct.unpack_from("<I", data, offset)[0]
        frames.append(data[offset + 8 : offset + 8 + length])
        offset += 8 + length
    record = json.loads(frames[3])
    record["result"] = {"n": 99}
    frames[3] = json.dumps(record, separators=(",", ":")).encode()
    forged = b"".join(struct.pack("<II", len(one), zlib.crc32(one)) + one for one in frames)
    (place / "log").write_bytes(b"nautile trajectory 1\n" + forged)
    with pytest.raises(LogCorrupt, match="hash chain"):
        load(place)


def test_blobs_are_checked(place):
    log = TrajectoryLog.open(place, HEAD)
    append(log, 0, b"z" * 10_000)
    log.close()
    (blob,) = (place / "blobs").iterdir()
    blob.write_bytes(b"q" * 10_000)
    with pytest.raises(LogCorrupt, match="was changed"):
        verify(place)
    blob.unlink()
    with pytest.raises(LogCorrupt, match="is missing"):
        verify(place)


def test_a_fork_points_to_its_parent(tmp_path):
    parent = TrajectoryLog.open(tmp_path / "p", HEAD)
    for number in range(3):
        append(parent, number, bytes(6000))
    parent.fork(tmp_path / "c", {**HEAD, "sandbox": "c-2"})
    append(parent, 3)
    child = TrajectoryLog.open(tmp_path / "c", HEAD)
    assert child.contents.head["sandbox"] == "c-2"
    for number in range(3):
        assert child.perform("run", {"n": number}, never, never)["data"] == bytes(6000)
    append(child, 30)
    child.fork(tmp_path / "g", HEAD)
    grandchild = TrajectoryLog.open(tmp_path / "g", HEAD)
    assert [one.request["n"] for one in grandchild.contents.operations] == [0, 1, 2, 30]
    assert (tmp_path / "c" / "log").stat().st_size < 2000  # a pointer, no copy
    shutil.rmtree(tmp_path / "p")
    (tmp_path / "p").mkdir()
    other = TrajectoryLog.open(tmp_path / "p", HEAD)
    for number in range(3):
        append(other, number)
    with pytest.raises(LogCorrupt, match="is not what it was"):
        load(tmp_path / "c")


def test_what_is_no_log_says_so(tmp_path):
    with pytest.raises(InvalidRequest, match="holds no trajectory log"):
        load(tmp_path)
    (tmp_path / "log").write_bytes(b"something else")
    with pytest.raises(LogCorrupt, match="not a trajectory log"):
        load(tmp_path)


def test_the_digest_depends_on_kind_and_every_field():
    assert digest_of("run", {"a": 1, "b": 2}) == digest_of("run", {"b": 2, "a": 1})
    assert (
        len({digest_of("run", {"a": 1}), digest_of("read", {"a": 1}), digest_of("run", {"a": "1"}), digest_of("run", {})}) == 4
    )


def test_the_page_escapes_what_came_out(place):
    log = TrajectoryLog.open(place, HEAD)
    hostile = b"<script>alert(1)</script>\x00\xff"
    record = {"exit_code": 1, "stdout": hostile, "stderr": b"", "timed_out": False, "infrastructure_error": None}
    log.perform("run", {"argv": ["/bin/sh", "-c", "cat <x>"]}, lambda name: record, never)
    text = page(place, load(place))
    assert "<script>" not in text and "&lt;script&gt;" in text and "cat &lt;x&gt;" in text
    assert "exit 1" in lines(load(place))[1]


# -- with sandboxes


def count(sandbox):
    return sandbox.run("echo x >> counter; wc -l < counter").stdout


@pytest.mark.usefixtures("crun")
def test_a_container_outlives_its_client_and_nothing_runs_twice(place):
    first = Sandbox.create("container", log=place)
    assert [count(first), count(first)] == ["1\n", "2\n"]
    first.write("f", b"data" * 3000)
    with pytest.raises(FileRefused, match="does not exist"):
        first.read("none")
    second = Sandbox.create("container", log=place)
    assert second.info.id == first.info.id
    assert [count(second), count(second)] == ["1\n", "2\n"]  # from the log
    second.write("f", b"data" * 3000)
    with pytest.raises(FileRefused, match="does not exist"):
        second.read("none")
    assert count(second) == "3\n"  # live, in the same container
    with pytest.raises(LogFenced):
        count(first)
    second.close()
    assert verify(place) == (5, 0)
    third = Sandbox.create("container", log=place)
    assert [count(third), count(third)] == ["1\n", "2\n"]
    third.write("f", b"data" * 3000)
    with pytest.raises(FileRefused):
        third.read("none")
    assert count(third) == "3\n"
    with pytest.raises(SandboxLost, match="replay='reexecute'"):
        count(third)
    third.close()


@pytest.mark.usefixtures("crun")
def test_a_lost_sandbox_is_built_anew_only_when_asked_and_is_compared(place, tmp_path):
    with Sandbox.create("container", log=place) as first:
        count(first)
        first.write("f", "x")
        assert first.python("print(open('f').read())").ok
    with Sandbox.create("container", log=place, replay="reexecute") as again:
        assert again.info.id != first.info.id
        assert count(again) == "1\n"
        again.write("f", "x")
        assert again.python("print(open('f').read())").stdout == "x\n"
        assert count(again) == "2\n"
    with Sandbox.create("container", log=tmp_path / "other") as first:
        first.run("cat /proc/sys/kernel/random/uuid")
    with pytest.raises(TrajectoryDiverged, match="when run again"):
        Sandbox.create("container", log=tmp_path / "other", replay="reexecute")


@pytest.mark.usefixtures("crun")
def test_a_recorded_function_fast_forwards(place):
    with Sandbox.create("function", log=place) as sandbox:
        first = sandbox.run("cat /proc/sys/kernel/random/uuid").stdout
    with Sandbox.create("function", log=place) as sandbox:
        assert sandbox.run("cat /proc/sys/kernel/random/uuid").stdout == first
        assert sandbox.run("cat /proc/sys/kernel/random/uuid").stdout != first
        with pytest.raises(Unsupported):
            sandbox.session()
    with pytest.raises(InvalidRequest, match="kind='function'"):
        Sandbox.create("container", log=place)


@pytest.mark.usefixtures("crun", "own_keeper")
def test_a_client_that_is_killed_before_it_is_answered_does_not_end_the_keeper(place):
    with Sandbox.create("container", log=place) as sandbox:
        keeper = KeeperClient()
        for op in ("keep", "lease", "describe", "outcome", "create"):
            with keeper.connect() as channel:  # says what it wants, and is gone
                version = keeper.version if op != "create" else "another"
                frames.send(
                    channel, {"op": op, "id": sandbox.info.id, "seconds": 60.0, "version": version, "operation": "none"}
                )
        assert sandbox.run("echo on").stdout == "on\n"


CLIENT = """
import sys
from nautile.sandbox import Sandbox
sandbox = Sandbox.create(sys.argv[3], log=sys.argv[1], allow_emulation=True)
for step in range(int(sys.argv[2])):
    result = sandbox.run(f"echo {step} >> done; sleep 0.01; wc -l < done")
    print(step, result.stdout.strip(), flush=True)
print("end", flush=True)
"""


def acknowledged_in(said):
    """(step, value) of every whole line: what comes after the last newline, a killed client has not finished saying."""
    lines = said[: said.rfind("\n") + 1].splitlines()
    return [tuple(line.split(" ")) for line in lines if line != "end"]


@given(cut=st.integers(0, 60))
def test_half_a_line_is_no_acknowledgement(cut):
    said = "0 1\n1 2\n" + "".join(f"{step} {step + 1}\n" for step in range(2, 12)) + "end\n"
    assert acknowledged_in(said) == [(str(step), str(step + 1)) for step in range(12)]
    assert acknowledged_in(said[:cut]) == acknowledged_in(said)[: said[:cut].count("\n")]


def killed_at_random(place, steps, kills, seed, kind="container"):
    """Run a client that is killed again and again until it gets to its end; (kills that hit, what was acknowledged).

    It speaks into a file: of a pipe that is read by lines first and then to its end, what lies between would be lost.
    """
    chance, said = random.Random(seed), place.with_suffix(".said")
    acknowledged, hits = {}, 0
    for attempt in range(kills + 1):
        argv = [sys.executable, "-c", client_code(CLIENT), str(place), str(steps), kind]
        with open(said, "w", encoding="ascii") as file:
            client = subprocess.Popen(argv, stdout=file)
        if attempt < kills:
            while "\n" not in said.read_text() and client.poll() is None:
                time.sleep(0.005)
            time.sleep(chance.uniform(0.0, 0.4))
            client.send_signal(signal.SIGKILL)
        client.wait(timeout=240)
        hits += client.returncode == -signal.SIGKILL
        for step, value in acknowledged_in(said.read_text()):
            assert acknowledged.setdefault(step, value) == value  # the same answer each time
    return hits, acknowledged


@pytest.mark.usefixtures("crun")
@pytest.mark.parametrize("seed", [1])
def test_a_client_killed_at_any_moment_goes_on_and_nothing_runs_twice(place, seed):
    steps = 25
    hits, acknowledged = killed_at_random(place, steps, 4, seed)
    assert hits >= 1
    with Sandbox.create("container", log=place) as sandbox:
        for step in range(steps):
            assert sandbox.run(f"echo {step} >> done; sleep 0.01; wc -l < done").stdout == f"{step + 1}\n"
        assert sandbox.run("cat done").stdout.split() == [str(step) for step in range(steps)]
    assert all(int(value) == int(step) + 1 for step, value in acknowledged.items())
    assert verify(place) == (steps + 1, 0)


@pytest.mark.usefixtures("crun")
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_kills(place, seed):
    hits, acknowledged = killed_at_random(place, 200, 10, seed)
    assert hits >= 5 and len(acknowledged) == 200
    with Sandbox.create("container", log=place) as sandbox:
        for step in range(200):
            sandbox.run(f"echo {step} >> done; sleep 0.01; wc -l < done")
        assert sandbox.run("cat done").stdout.split() == [str(step) for step in range(200)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["microvm", "vm"])
def test_a_machine_whose_client_is_killed_at_any_moment(place, kind):
    create_machine(kind).close()  # skips where there is no QEMU
    steps = 60
    hits, acknowledged = killed_at_random(place, steps, 8, 1, kind)
    assert hits >= 4 and len(acknowledged) == steps
    with Sandbox.create(kind, log=place, allow_emulation=True) as sandbox:
        for step in range(steps):
            assert sandbox.run(f"echo {step} >> done; sleep 0.01; wc -l < done").stdout == f"{step + 1}\n"
        assert sandbox.run("cat done").stdout.split() == [str(step) for step in range(steps)]


@pytest.mark.usefixtures("crun")
def test_a_sandbox_that_is_not_fetched_ends_at_its_time(place):
    script = (
        f"from nautile.sandbox import Sandbox; s = Sandbox.create('container', log={str(place)!r}, keep=0.5); print(s.info.id)"
    )
    argv = [sys.executable, "-c", client_code(script)]
    identity = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    assert identity.startswith("c-")
    soon(lambda: not (KeeperClient().place / identity).exists())
    assert not list(Path("/sys/fs/cgroup").glob(f"*/nautile/*/{identity}"))
