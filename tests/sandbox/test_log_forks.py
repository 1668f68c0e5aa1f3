"""Sessions, snapshots, forks and transfers behind a trajectory log: given again from it, never done twice, and checked."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nautile.sandbox import (
    FileRefused,
    InvalidRequest,
    LogFenced,
    OutcomeUnknown,
    Sandbox,
    SandboxError,
    SandboxLost,
    Unsupported,
)
from nautile.sandbox.archive import pack_tree, unpack_tree
from nautile.sandbox.container import KeeperClient
from nautile.sandbox.log import TrajectoryLog, load, verify
from nautile.sandbox.recorded import reexecute, repeat
from nautile.sandbox.view import lines, page
from sandbox.conftest import client_code
from waiting import soon

HEAD = {"sandbox": "c-1", "kind": "container", "image": {"layers": [], "host_usr": True}, "limits": {}}


@pytest.fixture
def place(tmp_path):
    return tmp_path / "log"


# -- the log alone


def do(log, text, result=None):
    return log.perform("run", {"t": text}, lambda name: result or {"t": text}, lambda name: "unknown")


def test_a_fork_is_what_its_parent_was_even_when_an_open_operation_ends_later(tmp_path):
    parent = TrajectoryLog.open(tmp_path / "p", HEAD)
    do(parent, "a")
    with pytest.raises(ZeroDivisionError):
        parent.perform("run", {"t": "b"}, lambda name: 1 / 0, lambda name: "never")
    parent.fork(tmp_path / "c", HEAD)
    again = TrajectoryLog.open(tmp_path / "p", HEAD)
    do(again, "a")
    again.perform("run", {"t": "b"}, lambda name: {"late": 1}, lambda name: "never")
    child = load(tmp_path / "c")
    assert [(one.request["t"], one.result) for one in child.operations] == [("a", {"t": "a"}), ("b", None)]
    assert verify(tmp_path / "c") == (2, 1)


def test_blobs_of_ancestors_are_found_from_a_grandchild(tmp_path):
    log = TrajectoryLog.open(tmp_path / "0", HEAD)
    big = os.urandom(9000)
    do(log, "big", {"data": big})
    for number in (1, 2, 3):
        log.fork(tmp_path / str(number), HEAD)
        log = TrajectoryLog.open(tmp_path / str(number), HEAD)
        assert log.perform("run", {"t": "big"}, None, None) == {"data": big}
    assert verify(tmp_path / "3") == (1, 0)


def test_a_client_takes_over_from_another_and_may_not_leave_gaps(place):
    log = TrajectoryLog.open(place, HEAD)
    first = log.attach()
    log.seek(0, first)
    do(log, "a")
    second = log.attach()
    with pytest.raises(LogFenced, match="another client"):
        log.seek(1, first)
    with pytest.raises(InvalidRequest, match="gap"):
        log.seek(3, second)
    log.seek(0, second)
    assert log.perform("run", {"t": "a"}, None, None) == {"t": "a"}
    log.close()
    assert TrajectoryLog.open(place, HEAD).attach() == second + 1


def test_a_retry_after_a_failure_asks_the_sandbox_first(place):
    log = TrajectoryLog.open(place, HEAD)
    with pytest.raises(ZeroDivisionError):
        log.perform("run", {"t": "a"}, lambda name: 1 / 0, lambda name: "never")
    log.seek(0, 0)
    asked = []
    result = log.perform("run", {"t": "a"}, None, lambda name: asked.append(name) or {"late": 1})
    assert result == {"late": 1} and len(asked) == 1


# -- files as bytes


NAMES = st.text("ab.é\n", min_size=1, max_size=3).filter(lambda name: name not in (".", ".."))
TREES = st.recursive(st.binary(max_size=50), lambda inner: st.dictionaries(NAMES, inner, max_size=4), max_leaves=8)


def build(place, tree):
    if isinstance(tree, bytes):
        place.write_bytes(tree)
        return
    place.mkdir()
    for name, inner in tree.items():
        build(place / name, inner)


def found(place):
    return place.read_bytes() if place.is_file() else {one.name: found(one) for one in place.iterdir()}


@settings(max_examples=50)
@given(tree=TREES)
def test_what_is_packed_comes_out_again(tmp_path_factory, tree):
    place = tmp_path_factory.mktemp("tree")
    build(place / "in", tree)
    data = pack_tree(place / "in", 10**6)
    unpack_tree(data, place / "out")
    assert found(place / "out") == tree
    assert pack_tree(place / "out", 10**6) == data


def test_what_is_too_big_or_hostile_is_not_packed_or_unpacked(tmp_path):
    (tmp_path / "f").write_bytes(bytes(5000))
    assert pack_tree(tmp_path / "f", 5000) is None
    (tmp_path / "d").mkdir()
    (tmp_path / "d/link").symlink_to("/etc/passwd")
    with pytest.raises(FileRefused, match="not a plain file"):
        pack_tree(tmp_path / "d", 10**6)
    with pytest.raises(FileRefused, match="does not exist"):
        pack_tree(tmp_path / "none", 10**6)
    for name, kind in (
        ("./../x", tarfile.REGTYPE),
        ("/x", tarfile.REGTYPE),
        ("./l", tarfile.SYMTYPE),
        ("./h", tarfile.LNKTYPE),
    ):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            root = tarfile.TarInfo(".")
            root.type = tarfile.DIRTYPE
            archive.addfile(root)
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        with pytest.raises(FileRefused):
            unpack_tree(file.getvalue(), tmp_path / f"out{name.count('/')}{kind!r}"[:12].replace("/", "_"))
    with pytest.raises((InvalidRequest, FileRefused)):
        unpack_tree(b"x" * 3000, tmp_path / "no")


# -- with sandboxes


@pytest.mark.usefixtures("crun")
def test_a_recorded_session_is_given_again_and_ends_with_its_process(place):
    def talk(sandbox):
        session = sandbox.session(pty=False)
        session.send("cat /proc/sys/kernel/random/uuid; echo do''ne\n")
        text = session.until("done", 60.0)
        with pytest.raises(SandboxError, match="did not write 'never'"):
            session.until("never", 0.1)
        return session, text

    with Sandbox.create("container", log=place) as sandbox:
        session, text = talk(sandbox)
        sandbox._driver.detach()
        again = Sandbox.create("container", log=place)
        session, repeated = talk(again)
        assert repeated == text
        with pytest.raises(SandboxLost, match="Open another"):
            session.send("echo\n")
        fresh = again.session()
        fresh.send("exit 3\n")
        while fresh.read(30.0):  # to its end: before that it has no exit code
            pass
        assert fresh.close() == 3
        again.close()
    kinds = [one.kind for one in load(place).operations]
    assert kinds[:4] == ["session", "session_send", "session_until", "session_until"] and kinds[-1] == "session_close"
    assert "uuid" in page(place, load(place)) and any("uuid" in line for line in lines(load(place)))


@pytest.mark.usefixtures("crun")
def test_typing_whose_outcome_nobody_saw_is_not_repeated(place):
    with Sandbox.create("container", log=place) as sandbox:
        session = sandbox.session(pty=False)
        recorded = sandbox.driver
        recorded._terminals[session.number].close()
        with pytest.raises((SandboxError, OSError)):
            session.send("x\n")
        recorded.detach()
        again = Sandbox.create("container", log=place)
        session = again.session(pty=False)
        with pytest.raises(OutcomeUnknown, match="session_send"):
            session.send("x\n")
        again.close()


def grow(sandbox, text):
    return sandbox.run(f"echo {text} >> f; cat f").stdout.split()


@pytest.mark.usefixtures("crun")
def test_forks_go_on_by_themselves_and_are_found_again(place, tmp_path):
    def first(sandbox):
        assert grow(sandbox, "a") == ["a"]
        child = sandbox.fork()
        assert grow(child, "b") == ["a", "b"]
        assert grow(sandbox, "c") == ["a", "c"]
        grandchild = child.fork()
        assert grow(grandchild, "d") == ["a", "b", "d"]
        return child, grandchild

    sandbox = Sandbox.create("container", log=place)
    child, grandchild = first(sandbox)
    identities = [one.info.id for one in (sandbox, child, grandchild)]
    for one in (grandchild, child, sandbox):
        one._driver.detach()
    again = Sandbox.create("container", log=place)
    child, grandchild = first(again)
    assert [one.info.id for one in (again, child, grandchild)] == identities
    assert grow(grandchild, "e") == ["a", "b", "d", "e"]  # live
    log = grandchild.driver.log.place
    for one in (again, child, grandchild):
        one.close()
    assert verify(log) == (4, 0)  # its own two, and what it has of its ancestors: a and b
    assert [one.request["argv"][2].split()[1] for one in load(log).operations] == ["a", "b", "d", "e"]
    assert len((log / "log").read_bytes()) < 5000
    repeat(log)  # from the fork's image, not from the beginning
    walked = Sandbox.create("container", log=log)  # opened by itself, it walks its parents
    assert [grow(walked, "a"), grow(walked, "b")] == [["a"], ["a", "b"]]
    walked.close()
    assert not [one for one in KeeperClient().place.glob("c-*") if one.name in identities]


@pytest.mark.usefixtures("crun")
def test_a_lost_sandbox_is_rebuilt_from_its_newest_snapshot(place):
    with Sandbox.create("container", log=place) as sandbox:
        sandbox.run("cat /proc/sys/kernel/random/uuid > id")  # cannot be repeated
        identity = sandbox.run("cat id").stdout
        image = sandbox.snapshot()
        assert grow(sandbox, "x") == ["x"]
        with Sandbox.create("container", image=image) as other:
            assert other.run("cat id").stdout == identity
    with Sandbox.create("container", log=place, replay="reexecute") as again:
        again.run("cat /proc/sys/kernel/random/uuid > id")
        assert again.run("cat id").stdout == identity
        assert again.snapshot() == image
        assert grow(again, "x") == ["x"]
        assert again.run("cat id; cat f").stdout == identity + "x\n"


@pytest.mark.usefixtures("crun")
def test_transfers_are_given_again_and_rebuild_a_sandbox(place, tmp_path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/a").write_bytes(b"a" * 5000)

    def work(sandbox, name):
        sandbox.upload(tmp_path / "tree", "/workspace/t")
        sandbox.download("/workspace/t", tmp_path / name)
        return sandbox.pack_diff(tmp_path / f"{name}.tar")

    with Sandbox.create("container", log=place) as sandbox:
        digest = work(sandbox, "one")
    with Sandbox.create("container", log=place) as again:
        assert work(again, "two") == digest
        assert (tmp_path / "two/a").read_bytes() == b"a" * 5000
        assert (tmp_path / "two.tar").read_bytes() == (tmp_path / "one.tar").read_bytes()
    (tmp_path / "two/a").write_bytes(b"changed")
    with Sandbox.create("container", log=place) as again, pytest.raises(SandboxError, match="is not what was downloaded"):
        work(again, "two")
    with Sandbox.create("container", log=place, replay="reexecute") as rebuilt:
        work(rebuilt, "one")
        assert rebuilt.run("wc -c < t/a").stdout == "5000\n"


@pytest.mark.usefixtures("crun")
def test_a_session_cannot_be_executed_again(place):
    with Sandbox.create("container", log=place) as sandbox:
        sandbox.session().close()
    with Sandbox.create("container") as fresh, pytest.raises(Unsupported, match="start from a snapshot"):
        reexecute(fresh.driver, place, load(place))


@pytest.mark.usefixtures("crun")
def test_a_command_whose_supervisor_is_killed_is_unknown_at_once_and_only_an_idempotent_one_runs_again(place):
    sandbox = Sandbox.create("container", log=place)
    keeper = KeeperClient()
    results = []
    worker = threading.Thread(target=lambda: results.append(sandbox.run("echo x >> n; sleep 600", timeout=600)))
    worker.start()
    soon(lambda: _there(sandbox))
    (begun,) = (keeper.place / sandbox.info.id / "operations").glob("*.begun")
    os.kill(int(begun.read_text().split(".")[0]), signal.SIGKILL)
    worker.join(60)
    assert "hung up" in results[0].infrastructure_error
    sandbox.close()


def _there(sandbox):
    try:
        return sandbox.driver._driver.read("workspace/n", 10) == b"x\n"
    except FileRefused:
        return False


@pytest.mark.usefixtures("crun")
def test_a_fork_that_nobody_saw_the_end_of_is_made_once(place):
    script = f"""
import os, signal
from nautile.sandbox import Sandbox
from nautile.sandbox.log import TrajectoryLog
sandbox = Sandbox.create("container", log={str(place)!r})
sandbox.run("echo a > f")
TrajectoryLog._conclude = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sandbox.fork()
"""
    assert subprocess.run([sys.executable, "-c", client_code(script)], check=False).returncode == -signal.SIGKILL
    (only,) = (place / "forks").iterdir()
    orphan = load(only).head["sandbox"]
    assert (KeeperClient().place / orphan).exists()
    with Sandbox.create("container", log=place) as sandbox:
        sandbox.run("echo a > f")
        child = sandbox.fork()
        assert child.run("cat f").stdout == "a\n"
        (only,) = (place / "forks").iterdir()
        assert child.info.id == load(only).head["sandbox"]
        ours = {sandbox.info.id, child.info.id}
        kept = KeeperClient().place
        soon(lambda: not {one.name for one in kept.glob("c-*") if (one / "operations").exists()} & {orphan} - ours)
        child.close()


@pytest.mark.usefixtures("crun")
def test_what_is_asked_of_a_lost_sandbox_is_not_begun(place):
    Sandbox.create("container", log=place).close()
    with Sandbox.create("container", log=place) as first:
        first.run("echo 1")
    lost = Sandbox.create("container", log=place)
    for _ in range(2):  # the same answer each time, and to the next client
        assert lost.run("echo 1").stdout == "1\n" if not lost.driver.log.position else True
        with pytest.raises(SandboxLost, match="reexecute"):
            lost.run("echo 2")
    lost.close()
    assert verify(place) == (1, 0)
