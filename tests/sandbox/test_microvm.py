"""A microVM behaves as every other sandbox does: the tests of the others, run on one machine that came from a snapshot.

The longer ones are in test_microvm_more.py.
"""

import contextlib
import http.server
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nautile.agent.toolbox import __file__ as toolbox
from nautile.sandbox import (
    MIB,
    FileRefused,
    InvalidRequest,
    Limits,
    OutcomeUnknown,
    Sandbox,
    SandboxLost,
    SubstrateUnavailable,
    Unsupported,
)
from nautile.sandbox.guest import accel
from nautile.sandbox.guest.hosted import hosts_directory
from nautile.sandbox.image import Image
from nautile.sandbox.log import load, verify
from nautile.sandbox.microvm import MicroVMDriver
from nautile.sandbox.qemu import guest_memory
from nautile.sandbox.tools import open_tools
from sandbox.conftest import client_code
from sandbox.machines import SMALL, create
from sandbox.test_container import (  # noqa: F401  # collected here with this module's fixtures
    test_a_pause_stops_everything_and_a_request_goes_on,
    test_a_session_over_pipes_gives_its_exit_code,
    test_a_tree_goes_out_and_in_again_without_links,
    test_a_watcher_that_gives_up_ends_the_command,
    test_files_go_in_and_out,
    test_output_comes_as_it_is_written,
    test_writing_never_goes_through_a_link,
)
from sandbox.test_sdk import (  # noqa: F401
    test_a_flood_is_cut_where_it_is_produced,
    test_a_stopped_child_and_zombies_are_no_obstacle,
    test_a_string_is_for_the_shell_and_a_list_is_argv,
    test_exit_codes_are_those_of_a_shell,
    test_memory_is_limited_and_told_apart,
    test_output_that_is_not_text_is_not_lost,
    test_python_runs_a_program_inside,
    test_requests_without_meaning_are_refused,
    test_stdin_environment_and_directory,
    test_the_disk_is_limited,
    test_the_time_limit_kills_the_whole_tree,
    test_what_a_command_leaves_running_ends_with_it,
)
from sandbox.test_security import (  # noqa: F401
    test_dangerous_calls_are_refused,
    test_device_nodes_and_setuid_files_do_not_work,
    test_environment_and_arguments_of_ours_are_not_there,
    test_nothing_that_matters_can_be_written,
    test_the_runtime_cannot_be_reached,
    test_there_is_no_right_to_anything,
    test_there_is_no_way_out_of_its_network,
)
from waiting import soon


@pytest.fixture(scope="module")
def machine():
    with create() as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(machine):
    return machine


@pytest.fixture
def container(machine):
    return machine


@pytest.fixture
def fresh():
    made = []

    def start(**options):
        made.append(create(**options))
        return made[-1]

    yield start
    for one in made:
        one.close()


def qemu_of(sandbox):
    """The host's number of the emulator's process."""
    group = next(iter(sandbox.driver._emulator.group.places))
    for number in (group / "cgroup.procs").read_text().split():
        if os.readlink(f"/proc/{number}/exe").endswith("qemu-system-x86_64"):
            return int(number)
    raise AssertionError("no QEMU in the group")


# -- what a machine is made of


def test_a_terminal_and_two_sessions_at_once(machine):
    one, two = machine.session(), machine.session(["cat"], pty=False)
    one.send("tty; echo $((40+2)); export A=kept\n")
    assert "/dev/pts/" in one.until("42", 60.0)
    two.send(b"x" * 100_000)
    one.send("echo x[$A]x; sleep 7322\n")
    one.until("x[kept]x", 60.0)
    assert machine.run("until ps -e -o args | grep -c '[s]leep 7322'; do sleep 0.1; done", timeout=60).stdout.endswith("1\n")
    got = 0
    while got < 100_000:
        data = two.read(60.0)
        assert data
        got += len(data)
    assert one.close() in (-1, 137) and two.close() == -1
    assert machine.run("ps -e -o args | grep -c '[s]leep 7322'").stdout == "0\n"


def test_a_session_that_nobody_reads_holds_up_nothing(machine):
    flood = machine.session(["yes"], pty=False)
    time.sleep(0.3)
    assert machine.run("echo on", timeout=60).stdout == "on\n"
    flood.close()


def test_emulation_is_only_given_when_it_is_allowed():
    create().close()  # skips where there is no QEMU
    if accel.probe().works:
        pytest.skip("KVM boots guests here")
    began = time.monotonic()
    for kind in ("microvm", "vm"):
        with pytest.raises(SubstrateUnavailable, match="allow_emulation=True"):
            Sandbox.create(kind, limits=SMALL)
    assert time.monotonic() - began < 60  # the canary's end is remembered


def test_what_a_machine_cannot_do_says_so(machine, tmp_path):
    for options, error in (
        ({"runtime": "crun"}, SubstrateUnavailable),
        ({"image": tmp_path / "none"}, InvalidRequest),
    ):
        with pytest.raises(error):
            Sandbox.create("microvm", limits=SMALL, allow_emulation=True, **options)
    with pytest.raises(Unsupported, match="no network"):
        machine.set_policy(["example.org:443"])
    assert machine.run(["x" * 200, *["y" * 100_000] * 50]).exit_code == 126
    info = machine.info
    assert info.kind == "microvm" and info.accel in ("tcg", "kvm") and info.runtime.startswith("qemu ")
    assert {"memory", "pids"} <= set(info.limits_enforced)


# -- the emulator, which a guest may have taken over


def test_the_emulator_owns_nothing_and_is_limited(machine):
    number = qemu_of(machine)
    status = dict(line.split(":", 1) for line in Path(f"/proc/{number}/status").read_text().splitlines())
    assert {status[f"Cap{name}"].strip() for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert status["NoNewPrivs"].strip() == "1" and status["Seccomp"].strip() == "2" and int(status["Seccomp_filters"]) >= 2
    if os.geteuid() == 0 and machine.info.accel == "tcg":
        assert all(int(user) >= 524_288 for user in status["Uid"].split()) and status["Groups"].strip() == ""
    for name in ("user", "mnt", "net", "pid", "ipc", "uts"):
        assert os.readlink(f"/proc/{number}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")
    root = Path(f"/proc/{number}/root")
    assert not (root / "root").exists() and not (root / "home").exists() and not (root / "sys").exists()
    assert all(
        "rw," not in line.split()[5]
        for line in Path(f"/proc/{number}/mountinfo").read_text().splitlines()
        if line.split()[4] in ("/", "/usr", "/proc")
    )
    most = guest_memory(SMALL) + 192 * MIB
    found = [place for place in machine.driver._emulator.group.places if (place / "memory.limit_in_bytes").exists()]
    if found:
        assert int((found[0] / "memory.limit_in_bytes").read_text()) <= most


def test_a_tenant_does_not_see_the_agent_its_port_or_its_disks(machine):
    assert machine.run("ls /dev; ls /sys /layers /upper /modules /init 2>/dev/null").stdout.split() == sorted(
        ["fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom", "zero"]
    )
    assert machine.run("cat /proc/1/environ /proc/1/maps; ls /proc/1/fd /proc/1/cwd/ 2>/dev/null").stdout == ""
    result = machine.run("kill -9 1; kill -9 -1; echo no", timeout=60)
    assert result.infrastructure_error is None
    assert machine.run("echo alive").stdout == "alive\n"


# -- starting, ending


def traces(identity):
    found = list(Path("/sys/fs/cgroup").glob(f"*/nautile/*/{identity}"))
    return found + [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if identity in line]


def test_closing_leaves_nothing():
    create().close()
    descriptors = len(os.listdir("/proc/self/fd"))
    sandbox = create()
    number, identity = qemu_of(sandbox), sandbox.info.id
    assert traces(identity)
    sandbox.close()
    assert not os.path.exists(f"/proc/{number}") and traces(identity) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_killed_client_leaves_nothing():
    create().close()
    script = (
        "from nautile.sandbox import *\n"
        "s = Sandbox.create('microvm', limits=Limits(memory=96 * MIB), allow_emulation=True)\n"
        "print(s.info.id, flush=True)\ns.run('sleep 60', timeout=60)"
    )
    client = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    identity = client.stdout.readline().strip()
    assert traces(identity)
    client.kill()
    client.communicate()
    soon(lambda: traces(identity) == [])


def test_a_machine_that_died_is_lost_not_hung():
    sandbox = create()
    result = sandbox.run("echo on; sleep 600", 600, on_output=lambda *_: os.kill(qemu_of(sandbox), signal.SIGKILL))
    assert result.infrastructure_error is not None and result.exit_code == -1 and not result.timed_out
    with pytest.raises(SandboxLost):
        sandbox.read("x")
    sandbox.close()


def test_two_machines_from_one_snapshot_differ(machine):
    script = "cat /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | sha256sum; date +%s"
    other = create()
    try:
        here, there = machine.run(script).stdout.split(), other.run(script).stdout.split()
        assert here[0] != there[0] and here[1] != there[1]
        assert abs(int(there[-1]) - time.time()) < 60
    finally:
        other.close()


@pytest.mark.slow
def test_a_copy_differs_in_randomness_and_has_no_process_of_the_first():
    first = create()
    session = first.session(["sleep", "7333"], pty=False)
    first.run("echo before > f")
    copy = first.fork()
    try:
        assert copy.run("ps -e -o args | grep -c '[s]leep 7333'; cat f").stdout == "0\nbefore\n"
        assert first.run("ps -e -o args | grep -c '[s]leep 7333'").stdout == "1\n"
        words = "head -c 16 /dev/urandom | sha256sum"
        assert first.run(words).stdout != copy.run(words).stdout
    finally:
        copy.close()
        session.close()
        first.close()


@pytest.mark.slow
def test_snapshots_are_not_needed():
    began = time.monotonic()
    create().close()
    driver = MicroVMDriver.create("m-cold", Image(), SMALL, allow_emulation=True, snapshots=False)
    driver.close()
    assert time.monotonic() - began < 60


# -- with a log

CLIENT = """
import sys
from nautile.sandbox import MIB, Limits, Sandbox
limits = Limits(memory=96 * MIB, pids=48, disk=16 * MIB, inodes=2000, output=64 * 1024, seconds=60.0)
sandbox = Sandbox.create(sys.argv[1], limits=limits, allow_emulation=True, log=sys.argv[2], keep=300.0)
for _ in range(2):
    sandbox.run("echo x >> done; wc -l < done")
sandbox.run("echo x >> done; sleep 1; wc -l < done")
"""


def recorded(kind, place):
    return create(kind, log=place, keep=300.0)


def kill_emulator(identity):
    for place in Path("/sys/fs/cgroup").glob(f"*/nautile/*/{identity}"):
        for number in (place / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                os.kill(int(number), signal.SIGKILL)


def wait_for_no_host(identity="*"):
    """A host looks twice a second whether its machine has died."""
    soon(lambda: not list(hosts_directory().glob(identity)))


@pytest.mark.usefixtures("machine")  # which skips where machines cannot be had
@pytest.mark.parametrize("kind", ["microvm", pytest.param("vm", marks=pytest.mark.slow)])
def test_a_machine_with_a_log_outlives_its_client_and_nothing_runs_twice(kind, tmp_path):
    place = tmp_path / "log"
    client = subprocess.Popen([sys.executable, "-c", client_code(CLIENT), kind, str(place)])
    deadline = time.monotonic() + 120
    while not (place / "log").exists() or len(load(place).operations) < 3:  # the third is under way
        assert time.monotonic() < deadline and client.poll() is None
        time.sleep(0.01)
    client.kill()
    client.wait()
    sandbox = recorded(kind, place)
    assert sandbox.info.id == load(place).head["sandbox"] and traces(sandbox.info.id)
    for step in (1, 2):
        assert sandbox.run("echo x >> done; wc -l < done").stdout == f"{step}\n"
    assert sandbox.run("echo x >> done; sleep 1; wc -l < done").stdout == "3\n"  # waited for, not run again
    assert sandbox.run("cat done").stdout == "x\n" * 3

    class GaveUpError(Exception):
        pass

    def give_up(*_):
        raise GaveUpError

    with pytest.raises(GaveUpError):
        sandbox.run("echo begun; sleep 60", timeout=60, on_output=give_up)
    kill_emulator(sandbox.info.id)
    wait_for_no_host()  # until it has noticed, a client would find the machine and be told of its death by each command
    again = recorded(kind, place)
    for command in ("echo x >> done; wc -l < done",) * 2 + ("echo x >> done; sleep 1; wc -l < done", "cat done"):
        assert again.run(command).ok
    with pytest.raises(OutcomeUnknown, match="operation 4"):
        again.run("echo begun; sleep 60", timeout=60)
    with pytest.raises(SandboxLost, match="replay='reexecute'"):
        again.run("true")
    again.close()
    assert verify(place) == (5, 1)
    wait_for_no_host()
    assert traces(sandbox.info.id) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["microvm", "vm"])
def test_a_recorded_machine_forks_and_is_built_anew(kind, tmp_path):
    place = tmp_path / "log"
    with recorded(kind, place) as first:
        first.run("echo before > f; mkdir d")
        session = first.session()
        session.send("echo $((40+2)); exit 3\n")
        assert "42" in session.until("42", 20.0)
        assert session.close() in (3, -1)
        child = first.fork()
        assert child.run("cat f").stdout == "before\n"
        first.run("echo after > f")
        other = recorded(kind, place)  # another client: the same child, found again
        other.run("echo before > f; mkdir d")
        session = other.session()
        session.send("echo $((40+2)); exit 3\n")
        session.until("42", 20.0)
        session.close()
        same = other.fork()
        assert same.info.id == child.info.id and same.run("cat f").stdout == "before\n"
        assert same.run("echo child >> f; cat f").stdout == "before\nchild\n"
        same.close()
        other.run("echo after > f")
        assert other.run("cat f").stdout == "after\n"
        kill_emulator(other.info.id)
        wait_for_no_host(other.info.id)
    with create(kind, log=place, keep=300.0, replay="reexecute") as anew:  # from the fork's snapshot on
        anew.run("echo before > f; mkdir d")
        assert anew.info.id != first.info.id
    wait_for_no_host()


# -- network


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["microvm", "vm"])
def test_a_machine_reaches_what_is_on_its_list_and_nothing_else(kind):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"answer" * 50_000)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        fetch = "import urllib.request as u\nfor port in (%d, %d):\n try: print(len(u.urlopen(f'http://127.0.0.1:{port}/').read()))\n"
        fetch = (fetch + " except OSError as e: print(e)") % (port, port + 1)
        fetch = fetch.replace(
            "import urllib", "import os; os.environ.pop('no_proxy', 0); os.environ.pop('NO_PROXY', 0)\nimport urllib"
        )
        sandbox = create(kind, network=[f"127.0.0.1:{port}"])
        try:
            assert sandbox.python(fetch, timeout=60).stdout == "300000\nHTTP Error 403: Forbidden\n"
            copy = sandbox.fork()
            try:
                assert copy.python(fetch, timeout=60).stdout == "300000\nHTTP Error 403: Forbidden\n"
            finally:
                copy.close()
            sandbox.set_policy(None)
            assert sandbox.python(fetch, timeout=60).stdout == "HTTP Error 403: Forbidden\n" * 2
        finally:
            sandbox.close()
            server.shutdown()


# -- disks: the guest's kernel is the oracle of our EROFS


@pytest.mark.slow
def test_an_image_directory_arrives_as_it_is(tmp_path, fresh):
    """Odd names, sizes around a block, a directory of many blocks, hard links, links, modes and times."""
    place, draw = tmp_path / "image/tree", random.Random(7)
    (place / "many").mkdir(parents=True)
    for number in range(300):
        (place / "many" / f"{'n' * draw.randrange(1, 200)}-{number}").write_bytes(draw.randbytes(draw.randrange(50)))
    for size in (0, 1, 4095, 4096, 4097, 8192, 1_000_003):
        (place / f"size-{size}").write_bytes(draw.randbytes(size))
    deep = place
    for _ in range(30):
        deep /= "d"
    deep.mkdir(parents=True)
    (deep / os.fsdecode(b"new\nline \xff")).write_text("odd")
    os.link(place / "size-4097", place / "hard")
    (place / "link").symlink_to("size-4096")
    (place / "long").symlink_to("x" * 3000)
    (place / "size-1").chmod(0o755)
    os.utime(place / "size-0", (1, 1))
    script = """
import hashlib, os, sys
root = os.fsencode(sys.argv[1])
for above, names, files in sorted(os.walk(root)):
    for name in sorted(names + files):
        path = os.path.join(above, name)
        s = os.lstat(path)
        link = os.readlink(path) if os.path.islink(path) else b""
        data = b"" if link or os.path.isdir(path) else open(path, "rb").read()
        size = 0 if os.path.isdir(path) else s.st_size
        print(path[len(root):], oct(s.st_mode), size, int(s.st_mtime), s.st_nlink, link, hashlib.sha256(data).hexdigest())
"""
    sandbox = fresh(image=Image((tmp_path / "image",)), limits=Limits(memory=96 * MIB, output=4 * MIB))
    inside = sandbox.run(["python3", "-I", "-c", script, "/tree"], timeout=120)
    assert inside.exit_code == 0, inside.stderr
    command = [sys.executable, "-I", "-c", script, str(place)]
    outside = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(outside.splitlines()) > 300
    assert inside.stdout.splitlines() == outside.splitlines()


# -- a directory of the caller's


def test_a_workspace_is_copied_in_and_changes_come_back(fresh, tmp_path):
    place = tmp_path / "work"
    (place / "sub").mkdir(parents=True)
    (place / "in").write_text("given")
    (place / "sub/old").write_text("old")
    (place / "outside").symlink_to(tmp_path)
    sandbox = fresh(workspace=place)
    result = sandbox.run(
        "cat in; rm sub/old; mkdir new; echo made > new/out; ln -s /etc/passwd l; chmod 600 in; echo -n more >> in"
    )
    assert result.stdout == "given"
    assert (place / "in").read_text() == "givenmore" and (place / "in").stat().st_mode & 0o777 == 0o600
    assert (place / "new/out").read_text() == "made\n" and not (place / "sub/old").exists()
    assert not (place / "l").exists() and (place / "outside").is_symlink()
    (place / "in").write_text("changed here")
    (place / "new/out").unlink()
    assert sandbox.run("cat in; ls new").stdout == "changed here"
    with pytest.raises(FileRefused, match="cannot be copied"):  # through a link of the host's nothing is written
        sandbox.run("mkdir outside; echo evil > outside/evil")
    assert not (tmp_path / "evil").exists()
    with contextlib.suppress(FileRefused):
        sandbox.close()


@pytest.mark.slow
def test_the_agents_tools_work_in_a_machine(tmp_path):
    create().close()
    (tmp_path / "notes").write_text("one\ntwo\n")
    tools = open_tools(tmp_path, "microvm", emulate=True)
    try:
        request = {"tool": "edit", "arguments": {"path": "notes", "old": "two", "new": "three"}}
        assert tools.call(Path(toolbox), request, time_limit=60) == {"ok": True, "output": "edited notes line 2"}
        assert (tmp_path / "notes").read_text() == "one\nthree\n"
    finally:
        tools.close()


def test_a_workspace_that_does_not_fit_is_refused(tmp_path):
    create().close()
    (tmp_path / "big").write_bytes(bytes(20 * MIB))
    with pytest.raises(InvalidRequest, match="does not go into the sandbox"):
        create(workspace=tmp_path, limits=Limits(memory=96 * MIB, disk=16 * MIB))
