"""A container keeps what was done in it, gives files out and takes them in safely, and ends without a trace."""

import contextlib
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from agent.processes import began, gone, nap
from nautile.sandbox import (
    FileRefused,
    InvalidRequest,
    Limits,
    Sandbox,
    SandboxClosed,
    SandboxError,
    SandboxLost,
    SandboxPool,
    SubstrateUnavailable,
)
from nautile.sandbox import keeper as keeper_module
from nautile.sandbox.container import KeeperClient
from sandbox.conftest import SMALL, arrives_while_it_runs, client_code
from waiting import soon


def kill_and_wait(process):
    pidfd = os.pidfd_open(process)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], 60)[0]
    finally:
        os.close(pidfd)


def keeper_pid():
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(str(KeeperClient().place / "keeper.sock"))
        return struct.unpack("iii", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


# -- state


def test_files_stay_between_commands_and_nothing_of_the_host_is_there(container):
    assert container.run("echo one > kept").ok
    assert container.run("cat kept; rm kept").stdout == "one\n"
    listing = container.run("ls /; ls /home /root /srv /mnt 2>&1; id -u; cat /etc/hostname; hostname").stdout
    assert "Permission denied" in listing and "No such file" in listing
    assert listing.endswith("1000\nsandbox\nsandbox\n")
    assert Path("/etc/machine-id").read_text().strip() not in container.run("cat /etc/machine-id; env").stdout.split()


def test_words_of_any_kind_arrive_as_they_are(container):
    words = ["", "a b", "new\nline", "*", "é", "--", "x" * 20_000]
    text = "import os, sys; print(ascii(sys.argv[1:]), ascii({n: v for n, v in os.environ.items() if n in 'EFG'}))"
    result = container.run(["python3", "-I", "-c", text, *words], env={"E": "", "F": "x=y\nz", "G": "é"})
    expected = {"E": "", "F": "x=y\nz", "G": "é"}
    assert result.stdout == f"{words!a} {expected!a}\n"
    assert container.run(["sort"], stdin="b\na\n", cwd="/tmp", env={"PATH": "/nowhere::/usr/bin"}).stdout == "a\nb\n"
    assert container.run(["true"], env={"PATH": "/nowhere"}).exit_code == 127
    assert container.run(["true"], cwd="/nowhere").exit_code == 125


def test_output_comes_as_it_is_written(container):
    arrives_while_it_runs(container)


def test_a_watcher_that_gives_up_ends_the_command(container):
    class GiveUpError(Exception):
        pass

    def watch(name, data):
        raise GiveUpError

    with pytest.raises(GiveUpError):
        container.run(f"echo a; {nap(7321)}", timeout=600, on_output=watch)
    assert gone(nap(7321))


# -- files


def test_files_go_in_and_out(container):
    data = os.urandom(300_000)
    container.write("deep/er/file", data, mode=0o600)
    assert container.read("/workspace/deep/er/file") == data
    found = container.run("sha256sum < deep/er/file; stat -c '%a %U' deep/er/file").stdout.split()
    assert found == [hashlib.sha256(data).hexdigest(), "-", "600", "agent"]
    container.write("empty", "")
    assert container.read("empty") == b""
    names = {entry.name: entry for entry in container.list()}
    assert names["empty"].kind == "file" and names["empty"].size == 0 and names["deep"].kind == "directory"
    container.run(["touch", "new\nline", "tab\tname"])
    assert {"new\nline", "tab\tname"} <= {entry.name for entry in container.list()}
    assert container.read("new\nline") == b""


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("link", "symbolic link"),
        ("linked/passwd", "symbolic link"),
        ("/proc/self/root/etc/passwd", "symbolic link|may not|does not exist"),
        ("/proc/1/root/etc/passwd", "symbolic link|may not"),
        ("fifo", "not a plain file"),
        ("/dev/null", "not a plain file"),
        ("socket", "not a plain file|No such device"),
        ("gone", "does not exist"),
        ("plain/below", "not a directory"),
        (".", "a directory"),
    ],
)
def test_only_plain_files_are_read_and_no_link_is_followed(container, path, why):
    container.run(
        "ln -sf /etc/passwd link; ln -sfn /etc linked; mkfifo fifo 2>/dev/null; echo x > plain; "
        "python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('socket')\" 2>/dev/null"
    )
    with pytest.raises(FileRefused, match=why):
        container.read(path)


def test_writing_never_goes_through_a_link(container):
    container.run("ln -sf /tmp/outside l2; ln -sfn /tmp d2; echo old > hard1; ln -f hard1 hard2")
    container.write("l2", "new")  # the link is replaced, what it names is not touched
    assert container.run("cat l2; ls /tmp/outside 2>&1").stdout.startswith("new")
    assert "No such file" in container.run("ls /tmp/outside 2>&1").stdout
    with pytest.raises(FileRefused, match="symbolic link"):
        container.write("d2/file", "x")
    container.write("hard1", "new")
    assert container.run("cat hard2").stdout == "old\n"  # the other name keeps the old content
    for path in ("../x", "/workspace/../etc/x", "a\0b"):
        with pytest.raises(InvalidRequest):
            container.write(path, "x")
    for path in ("/usr/x", "/etc/passwd"):
        with pytest.raises(FileRefused, match=r"read-only|may not"):
            container.write(path, "x")


def test_a_path_that_is_swapped_while_it_is_opened_gives_nothing_of_the_target(container):
    """A race: directory and link change places all the time; every read gives the right file or an error."""
    container.run("mkdir -p real; echo right > real/f; mkdir -p evil; echo wrong > /tmp/f")
    swap = (
        "import os, time\nend = time.time() + 2.5\nos.symlink('/tmp', 'lnk')\n"
        "while time.time() < end:\n"
        "    os.rename('real', 'real.x'); os.rename('lnk', 'real')\n"
        "    os.rename('real', 'lnk'); os.rename('real.x', 'real')\n"
    )
    session = container.session(["python3", "-c", swap], pty=False)
    outcomes = set()
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        try:
            outcomes.add(container.read("real/f"))
        except FileRefused as error:
            outcomes.add(error.why.split()[0])
    session.close()
    assert b"wrong\n" not in outcomes and outcomes & {b"right\n", "its", "it"}
    container.run("rm -rf real real.x lnk evil /tmp/f")


def test_a_tree_goes_out_and_in_again_without_links(container, tmp_path):
    container.run("mkdir -p t/a/b; echo 1 > t/a/x; echo 2 > t/a/b/y; chmod 750 t/a/b/y; ln -s /etc/passwd t/a/l; mkfifo t/p")
    container.download("t", tmp_path / "out")
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == ["out", "out/a", "out/a/b", "out/a/b/y", "out/a/x"]
    assert (tmp_path / "out/a/b/y").stat().st_mode & 0o777 == 0o750
    container.upload(tmp_path / "out", "/workspace/again")
    assert container.run("find again -type f | sort | xargs cat").stdout == "2\n1\n"
    with pytest.raises(InvalidRequest, match="exists"):
        container.download("t", tmp_path / "out")
    (tmp_path / "out/link").symlink_to("/etc/passwd")
    with pytest.raises(FileRefused, match="not uploaded"):
        container.upload(tmp_path / "out", "/workspace/no")
    with pytest.raises(FileRefused, match="more than 1 bytes"):
        container.download("t", tmp_path / "small", limit=1)


# -- sessions


def test_a_session_is_a_terminal(container):
    session = container.session()
    session.send("tty; echo $((40+2)); export A=kept\n")
    assert "/dev/pts/" in session.until("42", 60.0)
    session.send(f"echo x[$A]x; {nap(7322)}\n")
    session.until("x[kept]x", 60.0)
    assert began(nap(7322))
    session.close()
    assert gone(nap(7322))


def test_a_session_over_pipes_gives_its_exit_code(container):
    session = container.session("read line; echo got $line; exit 5", pty=False)
    session.send("it\n")
    assert session.until("got it", 60.0).startswith("got it")
    while session.read(60.0):  # to its end: before that it has no exit code
        pass
    assert session.close() == 5
    with pytest.raises(SandboxError, match="did not write"):
        container.session(["true"]).until("never", timeout=0.5)


# -- pausing


def test_a_pause_stops_everything_and_a_request_goes_on(container):
    session = container.session(["sh", "-c", "while :; do date +%s%N; sleep 0.05; done"], pty=False)
    session.until("\n", 60.0)
    container.pause()
    deadline = time.monotonic() + 60
    while session.read(1.0):  # what was on its way; one that runs is silent for a second only on a machine that stands still
        assert time.monotonic() < deadline
    assert container.run("echo on").stdout == "on\n"
    assert session.read(60.0) != b""
    session.close()
    container.pause()
    container.resume()
    assert container.run("true").ok


# -- snapshots


def tree(sandbox):
    listing = (
        "find . -mindepth 1 | sort | while read f; do stat -c '%F %a %U %n' \"$f\"; done; find . -type f | sort | xargs cat"
    )
    return sandbox.run(listing).stdout


def test_a_fork_has_the_files_and_goes_its_own_way(fresh, tmp_path):
    parent = fresh()
    parent.run(
        "mkdir -p d/keep d/gone; echo 1 > d/keep/a; echo 2 > d/gone/b; chmod 711 d/keep; ln -s a d/keep/l; ln d/keep/a hard"
    )
    child = parent.fork()
    try:
        assert tree(child) == tree(parent)
        child.run("echo changed > d/keep/a; rm -rf d/gone; mkdir d/gone; echo 3 > d/gone/c; rm hard")
        assert parent.run("cat d/keep/a d/gone/b hard").stdout == "1\n2\n1\n"
        grandchild = child.fork()
        try:
            child.close()  # its layers stay for those who use them
            assert grandchild.run("cat d/keep/a; ls d/gone; ls hard 2>&1 | grep -c 'No such'").stdout == "changed\nc\n1\n"
        finally:
            grandchild.close()
    finally:
        child.close()


def test_a_snapshot_is_an_image(fresh):
    sandbox = fresh()
    sandbox.run("echo base > f; mkdir x; touch x/y")
    image = sandbox.snapshot()
    place = image.layers[-1]
    sandbox.run("rm -r x; echo later > f")
    again = fresh(image=image)
    assert again.run("cat f; ls x").stdout == "base\ny\n"
    assert place.is_dir()


def test_what_changed_is_an_oci_layer(fresh, tmp_path):
    first = fresh()
    first.run("mkdir d o; touch d/x d/y o/z")
    second = fresh(image=first.snapshot())
    second.run("rm d/x; rm -r o; mkdir o; touch o/new; echo s > f; ln -s f l; ln f h; mkfifo p; chmod 4755 f")
    digest = second.pack_diff(tmp_path / "diff.tar")
    data = (tmp_path / "diff.tar").read_bytes()
    assert digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert second.pack_diff(tmp_path / "again.tar") == digest
    with tarfile.open(tmp_path / "diff.tar") as archive:
        members = {member.name: member for member in archive}
    assert {"workspace/d/.wh.x", "workspace/o/.wh..wh..opq", "workspace/o/new", "workspace/p"} <= set(members)
    assert "workspace/d/y" not in members and members["workspace/l"].linkname == "f"
    assert {members["workspace/f"].type, members["workspace/h"].type} == {tarfile.REGTYPE, tarfile.LNKTYPE}
    assert all(member.uid in (0, 1000, 65534) for member in members.values())


def test_an_image_of_ones_own(fresh, tmp_path):
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    hello = bytes.fromhex("b801000000bf01000000488d351000000" + "0ba06000000" + "0f05" + "b83c00000031ff" + "0f05") + b"hello\n"
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0x400078, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    header += struct.pack("<IIQQQQQQ", 1, 5, 0, 0x400000, 0x400000, 120 + len(hello), 120 + len(hello), 4096)
    (root / "bin/hello").write_bytes(header + hello)
    (root / "bin/hello").chmod(0o755)
    (root / "workspace").mkdir()
    sandbox = fresh(image=root)
    assert sandbox.run(["/bin/hello"]).stdout == "hello\n"
    assert sandbox.run("true").exit_code == 127  # there is no shell: nothing of the host's /usr is there
    assert sorted(entry.name for entry in sandbox.list("/")) >= ["bin", "dev", "proc", "workspace"]
    with pytest.raises(InvalidRequest, match="not a directory"):
        Sandbox.create("container", image=tmp_path / "none")
    odd = tmp_path / "a:b"
    odd.mkdir()
    with pytest.raises(InvalidRequest, match="colon"):
        Sandbox.create("container", image=odd)


# -- a directory of the caller's


def test_a_workspace_belongs_to_the_tenant_and_survives(fresh, tmp_path):
    (tmp_path / "in").write_text("given")
    (tmp_path / "sub").mkdir()
    sandbox = fresh(workspace=tmp_path)
    assert sandbox.run("cat in; echo made > out; mkdir sub/deep; id -un; stat -c %U in").stdout == "givenagent\nagent\n"
    sandbox.close()
    assert (tmp_path / "out").read_text() == "made\n"
    assert (tmp_path / "out").stat().st_uid == tmp_path.stat().st_uid
    assert (tmp_path / "in").read_text() == "given" and (tmp_path / "sub/deep").is_dir()


# -- what is made ahead


def made_ahead(fresh, **limits):
    """A container that was there before it was asked for, sooner or later: the keeper must have heard that one is ready."""
    place, limits = KeeperClient().place, Limits(**{"disk": SMALL.disk, "inodes": SMALL.inodes, **limits})
    deadline = time.monotonic() + 60
    while True:
        ready = set()
        for state in place.glob("c-*/state.json"):
            with contextlib.suppress(OSError):
                ready.add((state.parent / "group").read_text())
        sandbox = fresh(limits=limits)
        if group_of(sandbox.info.id) in ready:
            return sandbox
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.usefixtures("own_keeper")
def test_a_container_made_ahead_has_the_limits_of_the_one_that_is_asked_for(fresh):
    fresh()
    group = "/sys/fs/cgroup/memory/nautile/*/{}/memory.limit_in_bytes"
    assert made_ahead(fresh, memory=400 * 2**20).run("true").ok  # more than the spare one had
    sandbox = made_ahead(fresh, memory=33 * 2**20, pids=9, open_files=77, output=600)
    (limit,) = Path("/").glob(group.format(group_of(sandbox.info.id))[1:])
    assert int(limit.read_text()) == 33 * 2**20
    result = sandbox.run("ulimit -n; seq 1000; for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 300 & done")
    assert result.stdout.startswith("77\n") and "fork" in result.stderr and result.truncated and result.exit_code == 2
    assert sandbox.run("ls -A").stdout == "" and sandbox.run("df --output=size -B1 . | tail -1").stdout.strip() == str(
        SMALL.disk
    )


def test_the_kernel_may_kill_the_seat_and_the_next_command_has_another(fresh):
    """At the memory limit its choice is the kernel's; here a test kills the process itself, from outside."""
    sandbox = fresh()
    sandbox.run("true")
    session = sandbox.session(nap(7326).split())
    assert began(nap(7326))
    (seat,) = seats_of(sandbox)
    kill_and_wait(seat)
    assert sandbox.run("echo again").stdout == "again\n"
    session.close()
    assert gone(nap(7326))


def test_a_full_container_is_its_tenants_doing(fresh):
    """The limit on processes is the tenant's, and nothing of ours counts against it."""
    sandbox = fresh(limits=Limits(memory=64 * 2**20, pids=12))
    full = (
        "import os, time\n"
        "while True:\n"
        "    try:\n        os.fork() or time.sleep(60)\n"
        "    except OSError:\n        print('full', flush=True)\n        time.sleep(0.01)\n"
    )
    session = sandbox.session(["python3", "-c", full], pty=False)
    session.until("full", 60.0)
    outcomes: set[int] = set()
    deadline = time.monotonic() + 60
    while 125 not in outcomes and time.monotonic() < deadline:  # what was made ahead runs, and its place may be had again
        refused = sandbox.run("true")
        assert refused.infrastructure_error is None
        outcomes.add(refused.exit_code)
    assert outcomes <= {0, 125} and "could not be started" in refused.stderr
    session.close()
    deadline = time.monotonic() + 60
    while not (room := sandbox.run("echo room")).ok and time.monotonic() < deadline:  # they end when the hang-up is seen
        assert room.exit_code == 125
    assert room.stdout == "room\n"


def test_without_a_compiler_a_seat_in_python_does_the_same(fresh, own_keeper, monkeypatch, tmp_path):
    (tmp_path / "crun").symlink_to(shutil.which("crun"))
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox = fresh()
    identity, group = sandbox.info.id, group_of(sandbox.info.id)
    assert seats_of(sandbox) == []
    assert "no C compiler" in (own_keeper / "keeper.log").read_text()
    result = sandbox.run(f"setsid {nap(7327)} & echo $$; cat; echo err >&2; exit 3", stdin=b"given")
    assert result.stdout.endswith("given") and (result.stderr, result.exit_code) == ("err\n", 3) and gone(nap(7327))
    assert int(result.stdout.split()[0]) < 10  # in its own process namespace
    assert sandbox.run(f"{nap(7328)} & {nap(7328)}", timeout=0.2).timed_out and gone(nap(7328))
    session = sandbox.session()
    session.send("tty\n")
    assert "/dev/pts/" in session.until("pts/", 60.0)
    session.close()
    assert sandbox.run(["nothing"]).exit_code == 127 and sandbox.run(["/etc/passwd"]).exit_code == 126
    sandbox.close()
    assert leftovers(identity, group) == []


def test_a_seat_that_nobody_needs_ends_and_the_next_command_has_another(fresh):
    sandbox = fresh()
    assert sandbox.run("echo 1 > kept").ok
    (seat,) = seats_of(sandbox)
    pidfd = os.pidfd_open(seat)
    sandbox.driver._seat.shutdown(socket.SHUT_WR)  # as if nobody could ask any more
    assert select.select([pidfd], [], [], 60)[0]
    os.close(pidfd)
    assert sandbox.run("cat kept").stdout == "1\n"


def test_layers_are_mounted_once_for_all_containers(fresh, own_keeper):
    sandboxes = [fresh() for _ in range(3)]
    assert all(one.run(["true"]).ok for one in sandboxes)
    text = Path(f"/proc/{keeper_pid()}/mountinfo").read_text()
    places = [line.split()[4] for line in text.splitlines()]
    layers = [place for place in places if place.startswith(f"{own_keeper}/layers/")]
    assert len(layers) == (os.geteuid() == 0)  # an ordinary user's are stacked as they are


def test_the_hosts_devices_stay_the_hosts(fresh):
    """crun gives its standard streams to the container's root: they must not be files of the host."""
    before = os.stat("/dev/null")
    assert fresh(limits=Limits(memory=64 * 2**20, pids=37)).run("true").ok  # no spare has this size: it is made now
    after = os.stat("/dev/null")
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)


def test_process_one_has_a_filter_of_its_own(fresh):
    state = json.loads((KeeperClient().place / fresh().info.id / "state.json").read_text())
    assert "Seccomp:\t2\n" in Path(f"/proc/{state['process']}/status").read_text()


# -- the end


def group_of(identity):
    return (KeeperClient().place / identity / "group").read_text()


def seats_of(sandbox):
    """The numbers of the seats in a container's groups; what is just ending there is none."""
    (procs,) = Path("/sys/fs/cgroup/memory/nautile").glob(f"*/{group_of(sandbox.info.id)}/cgroup.procs")
    found = []
    for process in procs.read_text().split():
        with contextlib.suppress(OSError):
            found += [int(process)] if Path(f"/proc/{process}/comm").read_text() == "seat\n" else []
    return found


def leftovers(identity, group="none"):
    found = [place for place in KeeperClient().place.glob(f"*{identity}*")]
    found += [place for place in Path("/sys/fs/cgroup").glob(f"*/nautile/*/{group}")]
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if identity in line]
    return found


def test_closing_leaves_nothing(fresh):
    sandbox = fresh()
    identity = sandbox.info.id
    session, group = sandbox.session(nap(7323).split()), group_of(identity)
    assert began(nap(7323)) and len(leftovers(identity, group)) > len(leftovers(identity))
    sandbox.close()
    assert gone(nap(7323))
    assert leftovers(identity, group) == []
    assert session.close() in (-1, 137)


@pytest.mark.usefixtures("crun")
def test_a_killed_client_leaves_nothing():
    script = (
        "from nautile.sandbox import Sandbox\n"
        f"s = Sandbox.create('container')\nprint(s.info.id, flush=True)\ns.run({nap(7324)!r}, timeout=600)"
    )
    other = subprocess.Popen([sys.executable, "-c", client_code(script)], stdout=subprocess.PIPE, text=True)
    identity = other.stdout.readline().strip()
    assert began(nap(7324))
    group = group_of(identity)
    other.kill()
    other.communicate()
    assert gone(nap(7324))
    soon(lambda: leftovers(identity, group) == [])


def test_a_container_that_died_is_lost_not_hung(fresh):
    sandbox = fresh()
    state = (KeeperClient().place / sandbox.info.id / "state.json").read_text()
    kill_and_wait(json.loads(state)["process"])
    result = sandbox.run("true")
    assert result.infrastructure_error is not None and result.exit_code == -1
    with pytest.raises(SandboxLost):
        sandbox.read("x")


@pytest.mark.usefixtures("crun", "own_keeper")
def test_a_killed_keeper_is_an_error_and_the_next_one_sweeps(tmp_path):
    sandbox = Sandbox.create("container", workspace=tmp_path)
    (tmp_path / "precious").write_text("mine")
    identity = sandbox.info.id
    session = sandbox.session(nap(7325).split())
    assert began(nap(7325)) and session is not None
    kill_and_wait(keeper_pid())
    assert sandbox.run("true").infrastructure_error is not None
    with Sandbox.create("container") as another:
        assert another.run("echo up").stdout == "up\n"
        assert gone(nap(7325))
        assert leftovers(identity) == []
    assert (tmp_path / "precious").read_text() == "mine"
    sandbox.close()


def test_a_socket_that_outlives_its_keeper_is_no_keeper(own_keeper):
    """A fork that a keeper has just made holds its socket, until it has closed what it does not need or has been killed too."""
    place = KeeperClient().place
    place.mkdir(parents=True, exist_ok=True)
    code = (
        "import os, socket, sys, time\n"
        "one = socket.socket(socket.AF_UNIX); one.bind(sys.argv[1]); one.listen()\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True); os._exit(0)\n"
        "os.close(1); os.close(2); time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(place / "keeper.sock")], stdout=subprocess.PIPE, text=True, check=True
    )
    try:
        assert not KeeperClient().running
        with pytest.raises(SandboxLost, match="has ended"):
            KeeperClient().connect(begin=False)
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)
        (place / "keeper.sock").unlink()


def test_a_keeper_that_is_about_to_leave_stays_for_who_connects_just_then(tmp_path, monkeypatch):
    """After it has looked whether anybody is there: who has connected would be hung up on."""
    keeper, late, looks = object.__new__(keeper_module.Keeper), socket.socket(socket.AF_UNIX), []
    keeper.place = tmp_path
    with socket.socket(socket.AF_UNIX) as keeper.listener, late:
        keeper.listener.bind(str(tmp_path / "keeper.sock"))
        keeper.listener.listen()
        look = keeper_module._speaks

        def speaks(channel):
            found = look(channel)
            if not looks:
                late.connect(str(tmp_path / "keeper.sock"))
            looks.append(found)
            return found

        monkeypatch.setattr(keeper_module, "_speaks", speaks)
        assert not keeper._leave() and looks == [False, True]
        assert [one.name for one in tmp_path.iterdir()] == ["keeper.sock"]  # and it can be found again


def test_a_second_keeper_is_none(container):
    """Who has looked for a keeper while it was hidden starts another one."""
    code = "from nautile.sandbox.keeper import main; main()"
    argv = [sys.executable, "-I", "-c", code, str(KeeperClient().place)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "ready\n"), done.stderr
    assert container.run("true").ok


@pytest.mark.usefixtures("crun")
@pytest.mark.slow
def test_the_keeper_leaves_when_it_is_idle(own_keeper):
    with Sandbox.create("container") as sandbox:  # and what is made ahead
        owner = next(Path("/sys/fs/cgroup").glob(f"*/nautile/*/{group_of(sandbox.info.id)}")).parent.name
        soon(lambda: len(list(Path("/sys/fs/cgroup").glob(f"*/nautile/{owner}/*"))) > 10)
    soon(lambda: sorted(os.listdir(own_keeper)) == ["keeper.lock", "start.lock"])  # to ask it would keep it up
    assert not KeeperClient().running and list(Path("/sys/fs/cgroup").glob(f"*/nautile/{owner}")) == []


@pytest.mark.usefixtures("crun")
@pytest.mark.slow
def test_hundreds_of_lives_leave_nothing():
    mounts = len(Path("/proc/self/mountinfo").read_text().splitlines())
    descriptors = len(os.listdir("/proc/self/fd"))
    identities = []
    for _ in range(200):
        with Sandbox.create("container", limits=Limits(memory=32 * 2**20)) as sandbox:
            assert sandbox.run(["true"]).ok
            identities.append(sandbox.info.id)
    assert [one for identity in identities for one in leftovers(identity)] == []
    assert len(Path("/proc/self/mountinfo").read_text().splitlines()) == mounts
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_a_pool_gives_each_sandbox_once_and_fills_up_again(crun):
    with SandboxPool(2, lambda: Sandbox.create("container", limits=SMALL)) as pool:
        taken = [pool.take() for _ in range(3)]
        assert len({one.info.id for one in taken}) == 3
        assert [one.run("echo x; ls").stdout for one in taken] == ["x\n"] * 3
        for one in taken:
            one.close()
        soon(lambda: pool.ready == 2)
    assert [one for sandbox in taken for one in leftovers(sandbox.info.id)] == []
    with pytest.raises(SandboxClosed):
        pool.take()
    with SandboxPool(1, lambda: Sandbox.create("container", runtime="kata")) as broken, pytest.raises(SubstrateUnavailable):
        broken.take()


@pytest.mark.slow
@pytest.mark.usefixtures("own_keeper")
def test_clients_that_start_while_a_keeper_ends_all_get_one(crun):
    """Again and again in the moment after it was told to stop."""
    for _ in range(5):
        with Sandbox.create("container") as sandbox:
            assert sandbox.run(["true"]).ok
        KeeperClient().stop()
        script = (
            "from nautile.sandbox import Sandbox\nwith Sandbox.create('container') as s: print(s.run('echo up').stdout, end='')"
        )
        clients = [
            subprocess.Popen([sys.executable, "-c", client_code(script)], stdout=subprocess.PIPE, text=True) for _ in range(3)
        ]
        assert [client.communicate(timeout=60)[0] for client in clients] == ["up\n"] * 3
