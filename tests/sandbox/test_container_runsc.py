"""Containers on gVisor: the tests of the others, another kernel inside, and processes that go on from a checkpoint."""

import contextlib
import hashlib
import os
import shutil
import tarfile
import time
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nautile.sandbox import MIB, FileRefused, InvalidRequest, Limits, Sandbox, SandboxError, SubstrateUnavailable, Unsupported
from nautile.sandbox.runsc import Runsc
from sandbox import test_security as attacks
from sandbox.conftest import need
from sandbox.test_container import (  # noqa: F401  # collected here with this module's fixtures
    test_a_pause_stops_everything_and_a_request_goes_on,
    test_a_session_over_pipes_gives_its_exit_code,
    test_a_tree_goes_out_and_in_again_without_links,
    test_files_go_in_and_out,
    test_output_comes_as_it_is_written,
    test_writing_never_goes_through_a_link,
)
from sandbox.test_network import (  # noqa: F401
    REQUESTS,
    get,
    servers,
    test_a_host_on_the_list_can_be_reached,
    test_a_host_that_is_not_on_the_list_cannot,
    test_a_second_request_on_one_connection_is_not_forwarded,
    test_a_server_name_that_is_not_allowed_is_cut,
    test_a_tunnel_carries_bytes_and_a_change_of_policy_cuts_it,
    test_the_proxy_cannot_be_passed_by,
)
from sandbox.test_sdk import (  # noqa: F401
    test_a_flood_is_cut_where_it_is_produced,
    test_a_stopped_child_and_zombies_are_no_obstacle,
    test_exit_codes_are_those_of_a_shell,
    test_stdin_environment_and_directory,
)
from sandbox.test_security import (  # noqa: F401
    test_dangerous_calls_are_refused,
    test_environment_and_arguments_of_ours_are_not_there,
    test_the_runtime_cannot_be_reached,
    test_there_is_no_way_out_of_its_network,
)
from waiting import soon

LIMITS = Limits(memory=256 * MIB, pids=64, disk=16 * MIB, output=64 * 1024)


def create(**options):
    need("runsc")
    if os.geteuid() != 0:
        pytest.skip("runsc sandboxes are root's")
    return Sandbox.create("container", runtime="runsc", **{"limits": LIMITS, **options})


@pytest.fixture(scope="module")
def gvisor():
    with create() as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(gvisor):
    return gvisor


@pytest.fixture
def container(gvisor):
    return gvisor


@pytest.fixture
def fresh():
    made = []

    def start(**options):
        made.append(create(**options))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def online(servers):  # noqa: F811
    allowed, _, repeat = servers
    with create(network=[f"127.0.0.1:{allowed}", f"127.0.0.1:{repeat}"]) as one:
        yield one


@pytest.fixture
def reaching(online):
    """The same sandbox, of which one test changes the list, and the list as it was after it."""
    rules = online.driver._network.policy

    @contextlib.contextmanager
    def start(network):
        online.set_policy(network)
        try:
            yield online
        finally:
            online.set_policy(rules)

    return start


def test_the_kernel_inside_is_not_the_hosts(gvisor):
    result = gvisor.run("uname -r; id -u; cat; echo bad >&2; exit 3", stdin="given\n")
    assert result.stdout.splitlines()[1:] == ["1000", "given"] and result.stdout.split()[0] != os.uname().release
    assert (result.stderr, result.exit_code, result.infrastructure_error) == ("bad\n", 3, None)
    assert gvisor.info.runtime == "runsc" and {"memory", "pids"} <= set(gvisor.info.limits_enforced)
    assert gvisor.run(["/bin/echo", "a b", "$x"]).stdout == "a b $x\n"


def processes_of(place):
    """The host's numbers of runsc's processes that name this directory."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(place).encode() in (process / "cmdline").read_bytes():
                found.add(process.name)
    return found


def inside(sandbox):
    """What runs in it, as it sees it itself."""
    return sandbox.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout


# -- commands and sessions


def test_everything_of_a_command_ends_with_it_and_sessions_stay(gvisor):
    session = gvisor.session(["sh", "-c", "sleep 7330; echo never"], pty=False)
    soon(lambda: inside(gvisor).count("sleep 733") == 2)  # its shell's words, and its own
    assert gvisor.run("sleep 7331 & setsid sleep 7332 & (setsid sh -c 'sleep 7333 & sleep 7334' &) & echo started").ok
    result = gvisor.run("trap '' TERM; sleep 7335 & while :; do :; done", timeout=0.5)
    assert result.timed_out and result.exit_code == 137 and result.infrastructure_error is None
    assert gvisor.run("sleep 7336 & kill -9 $$; sleep 7337").exit_code == 137
    assert inside(gvisor).count("sleep 733") == 2
    assert session.close() == -1
    assert "sleep 733" not in inside(gvisor)


def test_a_session_is_a_terminal_and_ends_with_what_it_has_started(gvisor):
    session = gvisor.session()
    session.send("tty; echo $((40+2)); export A=kept\n")
    assert "/dev/pts/" in session.until("42", 60.0)
    assert gvisor.run("echo meanwhile").stdout == "meanwhile\n"
    session.resize(50, 132)
    session.send("echo x[$A]x; stty size; setsid sleep 7338 &\n")
    assert "x[kept]x" in session.until("50 132", 60.0)
    session.send("sleep 7339\n")
    soon(lambda: "sleep 7339" in inside(gvisor))
    session.send("\x03\n")  # it is interrupted, and this gVisor leaves the character to the shell as well
    session.send("echo i''nterrupted\n")
    session.until("interrupted", 60.0)
    assert session.close() == -1
    assert "sleep 733" not in inside(gvisor)


def test_a_command_that_forks_for_its_life_ends_all_the_same(gvisor):
    """Each process has a successor before it is killed: what ends them is faster, and they cannot leave their group."""
    source = """
import os
for _ in range(3):
    os.fork()
while True:
    if os.fork():
        os._exit(0)
    os.setsid()
"""
    result = gvisor.python(source, timeout=0.7)
    assert result.infrastructure_error is None
    assert gvisor.run("echo alive").stdout == "alive\n"
    assert inside(gvisor).count("fork") == 0


def test_memory_is_bounded_by_our_own_group():
    with create() as sandbox:
        result = sandbox.run("python3 -c 'x = bytearray(600 * 2**20); print(len(x))'", timeout=60)
        assert result.memory_killed and "629145600" not in result.stdout


# -- checkpoints


def test_a_checkpoint_holds_processes_and_files(fresh):
    sandbox = fresh()
    session = sandbox.session("while :; do echo tick; echo . >> /tmp/ticks; sleep 0.02; done", pty=False)
    session.until("tick", 60.0)
    sandbox.run("echo saved > f")
    image = sandbox.snapshot()
    sandbox.run("echo later > f")
    with create(image=image) as again:
        assert again.run("cat f; echo mine > f").stdout == "saved\n"
        before = again.run("wc -l < /tmp/ticks").stdout  # what ran goes on, and nobody hears it
        soon(lambda: again.run("wc -l < /tmp/ticks").stdout != before)
        assert again.session("echo a''nother", pty=False).until("another", 60.0)
    other = Limits(memory=200 * MIB, pids=64, disk=16 * MIB)
    with create(image=image, limits=other) as again:  # the one made ahead has others
        assert again.run("cat f").stdout == "saved\n" and again.info.id in str(again.driver._emulator.group.places)
    assert sandbox.run("cat f").stdout == "later\n" and "tick" in session.read(60.0).decode()  # it went on
    child = sandbox.fork()
    try:
        assert child.run("cat f; echo other > f").stdout == "later\n" and sandbox.run("cat f").stdout == "later\n"
        with pytest.raises(InvalidRequest, match="only runtime='runsc'"):
            Sandbox.create("container", image=child.driver._image)
    finally:
        child.close()


def test_what_is_made_ahead_ends_with_those_for_whom_it_was_made():
    sandbox = create()
    image = sandbox.snapshot()
    spare = image.held[-1].ahead._spare
    spare._thread.join()  # it was begun with the snapshot
    first = spare._made[1]
    with create(image=image) as again:
        assert again.driver._emulator is first
        spare._thread.join()
        place = spare._made[1]._place
        assert place.is_dir()
    sandbox.close()
    assert place.is_dir()  # for the image
    del image, again
    assert not place.exists()


def test_a_pause_stops_and_closing_leaves_nothing():
    sandbox = create()
    place = sandbox.driver._emulator._place
    sandbox.write("f", "before")
    sandbox.pause()
    assert sandbox.read("f") == b"before"  # the next request continues it
    sandbox.close()
    assert not place.exists() and not list(Path("/sys/fs/cgroup").glob(f"*/nautile/*/{sandbox.info.id}"))
    soon(lambda: not processes_of(place))


def test_a_runsc_that_is_faster_than_the_kernel_is_started_once_more(monkeypatch):
    """It is moved into its cgroups while it prepares. Where that comes too late, nothing of the first attempt is left."""
    confined, asked = Runsc._confined, []

    def late(runsc):
        asked.append(runsc)
        return confined(runsc) and len(asked) > 1

    monkeypatch.setattr(Runsc, "_confined", late)
    with create() as sandbox:
        place = sandbox.driver._emulator._place
        assert len(asked) == 2 and confined(asked[1]) and sandbox.run("echo in").stdout == "in\n"
        inside = {process for group in asked[1].group.places for process in (group / "cgroup.procs").read_text().split()}
        assert processes_of(place) <= inside  # and none is left of the first
    soon(lambda: not processes_of(place))


def test_an_agent_that_dies_is_a_lost_sandbox():
    with create() as sandbox:
        for place in sandbox.driver._emulator.group.places:
            for number in (place / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(number), 9)
        assert "has ended" in sandbox.run("true").infrastructure_error
        with pytest.raises(SandboxError):
            sandbox.read("f")


# -- files


def test_files_that_lead_elsewhere_or_do_not_fit_are_refused(gvisor, tmp_path):
    gvisor.run(
        "rm -rf /workspace/*; ln -s /etc/passwd link; mkdir d; ln -s d way; mkfifo pipe; echo 12345 > d/f; mkdir -m 0 no"
    )
    refused = [
        (lambda: gvisor.read("link"), "symbolic link"),
        (lambda: gvisor.read("way/f"), "symbolic link"),
        (lambda: gvisor.write("way/f", "x"), "symbolic link"),
        (lambda: gvisor.upload(tmp_path, "way/x"), "symbolic link"),
        (lambda: gvisor.download("link", tmp_path / "l"), "symbolic link"),
        (lambda: gvisor.read("pipe"), "not a plain file"),
        (lambda: gvisor.read("none"), "does not exist"),
        (lambda: gvisor.read("no/f"), "may not"),
        (lambda: gvisor.read("d"), "is a directory"),
        (lambda: gvisor.write("d", "x"), "directory"),
        (lambda: gvisor.list("d/f"), "not a directory"),
        (lambda: gvisor.read("d/f/g"), "not a directory"),
        (lambda: gvisor.write("/etc/new", "x"), "may not"),
        (lambda: gvisor.write("/usr/new", "x"), "read-only|may not"),
        (lambda: gvisor.read("/proc/1/root/etc/passwd"), "symbolic link|may not"),
        (lambda: gvisor.read("/dev/.nautile/upper/workspace/d/f"), "may not|does not exist"),
        (lambda: gvisor.read("d/f", limit=3), "more than 3 bytes"),
        (lambda: gvisor.download("d", tmp_path / "d", limit=3), "more than 3 bytes"),
        (lambda: gvisor.write("big", bytes(LIMITS.disk + 1)), "full"),
    ]
    for ask, why in refused:
        with pytest.raises(FileRefused, match=why):
            ask()
    assert [one.name for one in gvisor.list()] == ["d", "link", "no", "pipe", "way"]  # nothing of what was refused
    gvisor.run("rm -rf /workspace/*")


# -- what has changed

NAMES = ("f", "d", "d/x", "d/y", "d/e", "d/e/z", "l", "n", "n/x", "d/e/n")
STEPS = st.one_of(
    st.tuples(
        st.sampled_from(["echo 1 >", "mkdir", "rm -rf", "rmdir", "mkfifo", "chmod 750", "touch"]), st.sampled_from(NAMES)
    ),
    st.tuples(st.sampled_from(["mv -f", "ln", "ln -sf", "cp -r"]), st.sampled_from(NAMES), st.sampled_from(NAMES)),
)
PLACES = 32


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A gVisor sandbox and a container of one image, in which the tenant has files, and the places not used yet."""
    need("busybox"), need("crun")
    root = tmp_path_factory.mktemp("image") / "root"
    for name in ("bin", "dev", "proc", "sys", "tmp"):
        (root / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox"), root / "bin/busybox")
    for name in ("sh", "mkdir", "rm", "rmdir", "mkfifo", "chmod", "touch", "mv", "ln", "cp"):
        (root / "bin" / name).symlink_to("busybox")
    for place in (root / f"workspace/{number}" for number in range(PLACES)):
        (place / "d/e").mkdir(parents=True)
        for name in ("f", "d/x", "d/y", "d/e/z"):
            (place / name).write_text(name)
        (place / "l").symlink_to("f")
    for path in (root / "workspace", *(root / "workspace").rglob("*")):
        os.chown(path, 1000, 1000, follow_symlinks=False)
    with create(image=root) as one, Sandbox.create("container", image=root, limits=LIMITS) as other:
        yield one, other, root, iter(range(PLACES))


def changes(sandbox, target):
    """The members of its difference, each with all that a layer keeps but times and a whiteout's owner."""
    digest = sandbox.pack_diff(target)
    assert digest == f"sha256:{hashlib.sha256(target.read_bytes()).hexdigest()}"
    found = {}
    with tarfile.open(target) as archive:
        for one in archive:
            content = archive.extractfile(one).read() if one.isreg() else None
            mark = one.name.rpartition("/")[2].startswith(".wh.")
            found[one.name] = () if mark else (one.type, one.mode, one.uid, one.gid, one.linkname, one.size, content)
    return found


def meaning(found, root):
    """Without marks where there is nothing to hide, and directories that are as they were and hold no change."""
    for name in sorted(found, reverse=True):  # what is below comes first
        place = root / name
        was = place.is_dir() and not place.is_symlink()
        if name.endswith("/.wh..wh..opq"):
            nothing = not place.parent.is_dir() or place.parent.is_symlink()
        elif was and found[name] and found[name][0] == tarfile.DIRTYPE:
            state = place.stat()
            same = found[name][1:4] == (state.st_mode & 0o7777, state.st_uid, state.st_gid)
            nothing = same and not any(other.startswith(f"{name}/") for other in found)
        else:
            nothing = False
        if nothing:
            del found[name]
    return found


@settings(max_examples=4, deadline=None)
@given(scripts=st.lists(st.lists(STEPS, min_size=1, max_size=8), min_size=6, max_size=6))
def test_a_difference_is_that_of_a_container(twins, tmp_path_factory, scripts):
    """In what it means: which directories are copied up without a change, or marked over nothing, is the kernel's affair."""
    gvisor, container, root, free = twins
    lines = []
    for steps in scripts:
        place = next(free, None)
        hypothesis.assume(place is not None)
        lines += [f"cd /workspace/{place}", *(" ".join(step) + " < /dev/null" for step in steps)]
    target = tmp_path_factory.mktemp("packed")
    for one in (gvisor, container):
        one.run("\n".join(lines))
    assert meaning(changes(gvisor, target / "one"), root) == meaning(changes(container, target / "other"), root)


def test_a_difference_is_packed_while_everything_stands_still(gvisor, tmp_path):
    """What writes all the time is stopped for the moment and goes on; a snapshot's difference is still that from the image."""
    session = gvisor.session("i=0; while :; do i=$((i+1)); echo $i > a; echo $i > b; echo said; done", pty=False)
    session.until("said", 60.0)
    members = changes(gvisor, tmp_path / "one")
    first, second = (int(members[f"workspace/{name}"][-1] or -1) for name in "ab")
    assert first - 1 <= second <= first or -1 in (first, second)  # between two lines, or in the middle of one
    deadline = time.monotonic() + 60
    while b"said" not in session.read(1.0) and time.monotonic() < deadline:
        pass
    assert time.monotonic() < deadline
    session.close()
    gvisor.run("rm a b")


# -- attacks

WRITES = ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/usr/bin/python3", "/etc/passwd", "/dev/mem", "/dev/kmsg")
WRITES += (
    "/dev/vda",
    "/dev/sda",
    "/dev/kvm",
    "/dev/loop0",
    "/sys/fs/cgroup/release_agent",
    "/proc/1/oom_score_adj",
    "/dev/init",
)
WRITES += ("/dev/.nautile/jobs/cgroup.procs",)
READS = (
    "/proc/kallsyms",
    "/proc/kcore",
    "/proc/keys",
    "/proc/kpagecgroup",
    "/proc/1/root/etc/shadow",
    "/proc/1/mem",
)
READS += ("/etc/shadow", "/root/.bashrc", "/sys/class/dmi/id/product_name", "/proc/config.gz", "/proc/sched_debug")
EXHAUSTION = (
    "import os\nkept = []\nwhile True: kept.append(os.dup(0))",
    "with open('/tmp/f', 'wb') as f:\n while True: f.write(bytes(2**20))",
)


def test_attacks_stay_inside(gvisor):
    """What of the matrix of test_security.py has other words here: its /proc says less, and device nodes can be made."""
    fields = dict(line.split(":", 1) for line in gvisor.run("cat /proc/self/status").stdout.splitlines())
    assert {fields[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapBnd")} == {"0" * 16}
    assert set(fields["Uid"].split()) == {"1000"} and fields["Seccomp"].strip() == "2"
    source = f"""
import os, signal, subprocess, shutil
for path in {WRITES!r}:
    try:
        os.close(os.open(path, os.O_WRONLY)); print('opened', path)
    except OSError:
        pass
for path in {READS!r}:
    try:
        print('read', path) if open(path, 'rb').read(1) else None
    except OSError:
        pass
for kind, device in ((0o60600, os.makedev(254, 0)), (0o20600, os.makedev(1, 1)), (0o20600, 0)):
    try:
        os.mknod('/tmp/disk', kind, device)
        os.open('/tmp/disk', os.O_RDONLY); print('opened', device)
    except OSError:
        pass
    if os.path.lexists('/tmp/disk'):
        os.unlink('/tmp/disk')
shutil.copy('/usr/bin/id', '/tmp/id')
os.chmod('/tmp/id', 0o6755)
if subprocess.run(['/tmp/id', '-u'], capture_output=True, text=True).stdout.strip() != '1000':
    print('another user')
for number in (signal.SIGKILL, signal.SIGSTOP):
    try:
        os.kill(1, number); print('killed process 1')
    except OSError:
        pass
try:
    print(os.listdir('/proc/1/fd')) if os.listdir('/proc/1/fd') else None
except OSError:
    pass
names = [one.partition('=')[0] for one in open('/proc/1/environ').read().split('\\0')]
print(names) if set(names) - {{'PATH', 'HOME', ''}} else None
"""
    assert gvisor.python(source).stdout == ""
    for script in EXHAUSTION:
        result = gvisor.python(script, timeout=6)
        assert result.exit_code != 0 and result.infrastructure_error is None, script
    assert gvisor.python(attacks.THREADS, timeout=6).infrastructure_error is None  # they are in its kernel's memory, not ours
    assert gvisor.run("rm -rf /tmp/*; echo alive").stdout == "alive\n"


def test_odd_requests_are_refused(online, servers):  # noqa: F811
    """Those of test_network.py, all by one program: to start one takes long here."""
    allowed, forbidden, _ = servers
    source = """
import socket, sys
for text in sys.argv[1:]:
    with socket.create_connection(('127.0.0.1', 3128), 10) as client:
        data = b''
        try:
            client.sendall(eval(text))
            client.settimeout(60)
            while piece := client.recv(4096):
                data += piece
        except OSError as error:
            data = data or repr(error).encode()
        print(data.split(b'\\r\\n')[0].decode('latin-1'))
"""
    texts = [one.format(allowed=allowed, forbidden=forbidden) for one in REQUESTS]
    answers = online.python(source, texts).stdout.splitlines()
    assert len(answers) == len(texts) and all(one.startswith("HTTP/1.1 4") for one in answers), answers


def test_a_copy_has_a_network_of_its_own(online, servers):  # noqa: F811
    allowed, forbidden, _ = servers
    with online.fork() as child:
        child.set_policy([f"127.0.0.1:{forbidden}"])
        assert get(child, f"http://127.0.0.1:{forbidden}/x").stdout.startswith("/x ")
        assert get(child, f"http://127.0.0.1:{allowed}/x").stdout.startswith("403 ")
        image = child.snapshot()
    assert get(online, f"http://127.0.0.1:{allowed}/y").stdout.startswith("/y ")
    with create(image=image) as without:
        assert "failed" in get(without, f"http://127.0.0.1:{forbidden}/x").stdout
        with pytest.raises(Unsupported, match="made without one"):
            without.set_policy([f"127.0.0.1:{forbidden}"])


def test_what_it_cannot_do_it_says(tmp_path, monkeypatch):
    for options in ({"workspace": tmp_path}, {"log": tmp_path / "log"}):
        with pytest.raises(Unsupported, match="runtime='runsc' has none"):
            create(**options)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SubstrateUnavailable, match=r"runsc is missing; apt-get install runsc"):
        Sandbox.create("container", runtime="runsc")
    (tmp_path / "runsc").touch(mode=0o755)
    with pytest.raises(SubstrateUnavailable, match=r"no C compiler.*; apt-get install gcc"):
        Sandbox.create("container", runtime="runsc")
