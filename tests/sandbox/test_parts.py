"""The parts that need no sandbox: the filter's arithmetic, cgroups of both versions, policies, frames, layers, the view."""

import errno
import io
import itertools
import json
import os
import select
import shutil
import signal
import socket
import stat
import tarfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nautile.sandbox import MIB, FileRefused, InvalidRequest, Limits, LimitUnavailable, NetworkPolicy, Rule, SandboxLost
from nautile.sandbox import cgroup as cgroups
from nautile.sandbox import layers as layer_files
from nautile.sandbox import seccomp as filters
from nautile.sandbox.bundle import configuration, skeleton
from nautile.sandbox.enter import step_inside
from nautile.sandbox.inside import frames
from nautile.sandbox.inside.supervise import Capture
from nautile.sandbox.orders import Orders
from nautile.sandbox.seat import Seat
from nautile.sandbox.session import Session
from nautile.sandbox.spares import Spare, Spares, kind_of
from nautile.sandbox.state import Settings, State

# -- seccomp


@settings(max_examples=300)
@given(st.one_of(st.integers(0, 2**32 - 1), st.integers(0x5400, 0x5430), st.integers(0, 2**64 - 1)))
def test_ioctl_blocks_hold_every_request_but_two(request_number):
    inside = any(first <= request_number < first + size for first, size in filters._ioctl_blocks())
    small = request_number < 2**32
    negative = request_number >= 2**64 - 2**31
    assert inside == ((small or negative) and request_number not in (0x5412, 0x541C))


def test_ioctl_blocks_are_aligned_and_do_not_overlap():
    blocks = sorted(filters._ioctl_blocks())
    assert all(first % size == 0 and size & (size - 1) == 0 for first, size in blocks)
    assert all(first + size <= following for (first, size), (following, _) in itertools.pairwise(blocks))


def test_the_allowlist_has_none_of_what_leads_out():
    forbidden = {"mount", "umount2", "pivot_root", "unshare", "setns", "ptrace", "bpf", "keyctl", "io_uring_setup", "clone3"}
    forbidden |= {
        "userfaultfd",
        "perf_event_open",
        "open_by_handle_at",
        "process_vm_writev",
        "kexec_load",
        "init_module",
        "ioctl",
    }
    assert not forbidden & set(filters.ALLOWED) and len(set(filters.ALLOWED)) == len(filters.ALLOWED)
    assert len(filters.program(system_v=True)) > len(filters.program(system_v=False)) > 1000


# -- cgroups


def machine(tmp_path, kind):
    """A machine's cgroup files, as plain ones: what is written to them is what the kernel would get."""
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    mounts, groups = [], []
    if kind in ("v1", "hybrid"):
        for number, names in enumerate(["memory", "pids", "cpu,cpuacct", "freezer", "blkio", "name=systemd"]):
            place = tmp_path / "cg" / names
            place.mkdir(parents=True)
            (place / "cgroup.procs").touch()
            mounts.append(f"{number} 1 0:{number} / {place} rw - cgroup cgroup rw,{names}")
            groups.append(f"{number + 2}:{names}:/")
    if kind in ("v2", "hybrid"):
        place = tmp_path / "cg" / "unified"
        place.mkdir(parents=True)
        (place / "cgroup.procs").touch()
        (place / "cgroup.controllers").write_text("cpu memory pids io" if kind == "v2" else "hugetlb")
        (place / "cgroup.subtree_control").write_text("cpu memory pids" if kind == "v2" else "")
        mounts.append(f"9 1 0:9 / {place} rw - cgroup2 cgroup2 rw")
        groups.append("0::/")
    (proc / "self/mountinfo").write_text("\n".join(mounts))
    (proc / "self/cgroup").write_text("\n".join(groups))
    return proc


@pytest.mark.parametrize(
    ("kind", "versions", "tracker"),
    [("v1", [1, 1, 1, 1], "freezer"), ("v2", [2], "unified"), ("hybrid", [1, 1, 1, 1, 2], "unified")],
)
def test_limits_are_written_to_either_version(tmp_path, kind, versions, tracker):
    found = cgroups.hierarchies(machine(tmp_path, kind))
    assert [one.version for one in found] == versions
    group = cgroups.Group.create("one", Limits(memory=64 * MIB, pids=20, cpus=0.5), owner="1.2", found=found)
    written = {path.name: path.read_text() for place in group.places for path in place.iterdir()}
    if kind == "v2":
        assert written["memory.max"] == str(64 * MIB) and written["cpu.max"] == "50000 100000"
    else:
        assert written["memory.limit_in_bytes"] == str(64 * MIB) and written["cpu.cfs_quota_us"] == "50000"
    assert written["pids.max"] == "20" and set(group.enforced) == {"memory", "pids", "cpu"}
    assert tracker in str(group.tracker)


def test_a_limit_that_cannot_be_set_is_an_error_unless_allowed(tmp_path):
    proc = machine(tmp_path, "hybrid")
    without = [one for one in cgroups.hierarchies(proc) if "memory" not in one.controllers]
    with pytest.raises(LimitUnavailable, match=r"memory.*Delegate=yes.*allow_unenforced"):
        cgroups.Group.create("one", Limits(), owner="1.2", found=without)
    assert "memory" not in cgroups.Group.create("two", Limits(allow_unenforced=True), owner="1.2", found=without).enforced
    with pytest.raises(LimitUnavailable, match="memory"):
        cgroups.Group.create("one", Limits(), owner="1.2", found=[])


def test_a_group_is_made_while_another_process_removes_the_last_one(tmp_path):
    """The directory of their owner goes with the last group; it may go between two steps of making the next."""
    gone = []

    class Place(type(tmp_path)):
        def mkdir(self, *arguments, **options):
            if self.name == "one" and len(gone) < 3:
                gone.append(self)
                os.rmdir(self.parent)  # what ``remove`` does in another process
            super().mkdir(*arguments, **options)

    for version in (1, 2):
        gone.clear()
        found = [cgroups.Hierarchy(Place(tmp_path / f"v{version}"), version, frozenset())]
        (tmp_path / f"v{version}").mkdir()
        group = cgroups.Group.make("one", owner="1.2", found=found)
        assert len(gone) == 3 and all(place.is_dir() for place in group.places)


def test_a_group_that_vanishes_while_it_is_made_is_made_again(tmp_path):
    """Between the opening of a file of its owner's directory and the writing, which the kernel then refuses with ENODEV."""
    asked = []

    class Place(type(tmp_path)):
        def write_text(self, *arguments, **options):
            asked.append(self.name)
            if len(asked) == 1:
                raise OSError(errno.ENODEV, "No such device")
            return super().write_text(*arguments, **options)

    found = [cgroups.Hierarchy(Place(tmp_path), 2, frozenset({"pids"}))]
    group = cgroups.Group.make("one", owner="1.2", found=found)
    assert len(asked) > 1 and all(place.is_dir() for place in group.places)


@pytest.mark.parametrize("moment", ["listed", "killed"])
def test_two_may_sweep_at_once(tmp_path, moment):
    """The other one has removed what is left just before this one lists it, or as it ends what is inside."""

    class Place(type(tmp_path)):
        def is_dir(self):
            found = super().is_dir()
            if moment == "listed" and self.name == "nautile":
                shutil.rmtree(self)
            return found

        def iterdir(self):
            if moment == "listed":
                shutil.rmtree(self, ignore_errors=True)
            return super().iterdir()

        def exists(self):
            found = super().exists()
            if moment == "killed" and self.name == "freezer.state":
                shutil.rmtree(self.parent)
            return found

    dead = tmp_path / "nautile/999999999.1"
    dead.mkdir(parents=True)
    (dead / "cgroup.procs").write_text("999999999\n")
    (dead / "freezer.state").touch()
    cgroups.sweep([cgroups.Hierarchy(Place(tmp_path), 1, frozenset({"freezer"}))])
    assert not dead.exists()


def test_an_owner_is_alive_only_as_itself():
    mine = cgroups.owner_name()
    assert cgroups.alive(mine)
    child = os.fork()
    if child == 0:
        os._exit(0)
    while (stat_line := Path(f"/proc/{child}/stat").read_bytes().rpartition(b")")[2].split())[0] != b"Z":
        pass
    assert not cgroups.alive(f"{child}.{stat_line[19].decode()}")  # dead, though nobody has collected it
    os.waitpid(child, 0)
    assert not cgroups.alive(mine + "0") and not cgroups.alive("999999999.1") and not cgroups.alive("x.1")


# -- policies

HOSTS = st.sampled_from(
    ["example.org", "EXAMPLE.org", "example.org.", "a.example.org", "notexample.org", "example.org.evil.com"]
)


@given(HOSTS, st.sampled_from([443, 80]))
def test_a_rule_allows_its_host_in_any_spelling_and_no_other(host, port):
    policy = NetworkPolicy.of(["example.org:443"])
    assert policy.allows(host, port) == (host.lower().rstrip(".") == "example.org" and port == 443)


@pytest.mark.parametrize(
    ("rule", "host", "allowed"),
    [
        ("*.example.org", "a.example.org", True),
        ("*.example.org", "a.b.example.org", True),
        ("*.example.org", "example.org", False),
        ("*.example.org", "badexample.org", False),
        ("example.org", "example.org\0.evil.com", False),
        ("example.org", "example.org%00.evil.com", False),
        ("example.org", "exämple.org", False),
        ("example.org", "example.org..", False),
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "127.1", False),
        ("[::1]", "[::1]", True),
        ("[::1]", "::1", True),
    ],
)
def test_odd_spellings(rule, host, allowed):
    assert NetworkPolicy.of([f"{rule}:443"]).allows(host, 443) is allowed


@pytest.mark.parametrize(
    "rule", ["", ":443", "a b:1", "example.org:0", "example.org:70000", "exämple.org", "http://a", "a/b:1", "*:1"]
)
def test_rules_without_meaning_are_refused(rule):
    with pytest.raises(InvalidRequest, match="network rule"):
        Rule.parse(rule)
    with pytest.raises(InvalidRequest):
        NetworkPolicy.of("public")


# -- frames


@settings(max_examples=60)
@given(
    st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=20), st.none()), max_size=4),
    st.lists(st.binary(max_size=70_000), max_size=3),
)
def test_a_frame_comes_out_as_it_went_in(header, pieces):
    one, other = socket.socketpair()
    with one, other:
        sender = threading.Thread(target=frames.send, args=(one, header, *pieces))
        sender.start()
        assert frames.receive(other) == (header, b"".join(pieces))
        sender.join()
        one.close()
        assert frames.receive(other) is None


@settings(max_examples=100)
@given(st.binary(min_size=1, max_size=60))
def test_garbage_is_refused_and_nothing_is_allocated_for_it(data):
    one, other = socket.socketpair()
    with one, other:
        one.sendall(data)
        one.close()
        try:
            message = frames.receive(other)
        except frames.BrokenFrameError:
            return
        assert message is not None and isinstance(message[0], dict)


def test_a_frame_that_announces_too_much_is_refused_at_once():
    one, other = socket.socketpair()
    with one, other:
        one.sendall(b"\xff\xff\xff\xff\xff\xff\xff\xff")
        with pytest.raises(frames.BrokenFrameError, match="was announced"):
            frames.receive(other)


@settings(max_examples=60)
@given(st.integers(2, 400), st.lists(st.binary(min_size=1, max_size=300), max_size=12))
def test_a_capture_keeps_head_and_tail(keep, pieces):
    """Against the plain meaning: the whole stream, cut afterwards."""
    capture = Capture(keep)
    for _ in range(2):  # and again after a reset
        for piece in pieces:
            reader, writer = os.pipe()
            os.write(writer, piece)
            os.close(writer)
            while capture.fill(reader):
                pass
            os.close(reader)
        whole, half = b"".join(pieces), keep // 2
        got = b"".join(capture.pieces())
        if len(whole) <= 2 * half:
            assert got == whole and not capture.truncated
        else:
            missing = len(whole) - 2 * half
            assert got == whole[:half] + b"\n[... %d bytes omitted ...]\n" % missing + whole[-half:] and capture.truncated
        capture.reset()


# -- what is made ahead


@given(st.lists(st.sampled_from("abc"), max_size=12), st.sampled_from("abc"), st.sets(st.integers(0, 11)))
def test_spares_of_other_kinds_are_few_and_those_of_the_last_kind_stay(sizes, last, unmade):
    def request(size):
        limits = {"disk": size, "inodes": 1, "allow_unenforced": False}
        return {"rules": None, "workspace": None, "layers": [], "host_usr": True, "limits": limits}

    spares = Spares(pattern=request(last))
    mine, theirs = socket.socketpair()
    with mine, theirs:
        for at, size in enumerate(sizes):
            spares.containers.append(Spare(kind_of(request(size)), str(at), Seat("g", mine), made=at not in unmade))
        gone = spares.surplus()
    assert all(one.made and one.key != kind_of(request(last)) for one in gone)
    assert len(spares.containers) + len(gone) == len(sizes)
    kept = [one for one in spares.containers if one.made and one.key != kind_of(request(last))]
    assert len(spares.containers) <= 4 or not kept  # no more could go
    assert [int(one.identity) for one in gone] == sorted(int(one.identity) for one in gone)  # the oldest first
    assert not kept or not gone or int(gone[-1].identity) < int(kept[0].identity)


# -- orders

WORD = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)
NAME = st.text(st.characters(exclude_characters="\0=", exclude_categories=("Cs",)), min_size=1, max_size=5)


@settings(max_examples=100)
@given(st.lists(WORD, max_size=5), st.lists(WORD, min_size=1, max_size=3), st.dictionaries(NAME, WORD), st.binary(max_size=40))
def test_orders_come_out_as_they_went_in_and_cut_off_ones_are_refused(argv, places, environment, program):
    orders = Orders(tuple(argv), tuple(places), environment, 1000, 77, 2**40, pty=bool(argv), filter=program)
    data = orders.pack()
    assert Orders.unpack(data) == orders
    for cut in {0, 10, 40, len(data) - 1} - {len(data)}:
        if cut < len(data):
            with pytest.raises(ValueError, match="cut off"):
                Orders.unpack(data[:cut])


# -- layers


def archive(*members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind, link in members:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, link
            tar.addfile(entry)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([("../x", tarfile.REGTYPE, "")], "leads out"),
        ([("a/../../x", tarfile.REGTYPE, "")], "leads out"),
        ([("d", tarfile.SYMTYPE, "/tmp"), ("d/x", tarfile.REGTYPE, "")], "through a link"),
        ([("f", tarfile.REGTYPE, ""), ("f/x", tarfile.REGTYPE, "")], "below a file"),
        ([("h", tarfile.LNKTYPE, "../../etc/passwd")], "outside"),
        ([("h", tarfile.LNKTYPE, "/etc/passwd")], "outside"),
        ([("l", tarfile.SYMTYPE, "/etc"), ("h", tarfile.LNKTYPE, "l/passwd")], "outside"),
        ([("l", tarfile.SYMTYPE, "/etc/passwd"), ("h", tarfile.LNKTYPE, "l")], "outside"),
        ([("b", tarfile.BLKTYPE, "")], "a device"),
        ([("c", tarfile.CHRTYPE, "")], "a device"),
        ([("f", tarfile.REGTYPE, ""), ("f", tarfile.SYMTYPE, "/etc/passwd")], "twice"),
    ],
)
def test_hostile_layers_are_refused(tmp_path, members, why):
    with pytest.raises(FileRefused, match=why):
        layer_files.unpack(archive(*members), tmp_path / "layer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layer"]


def test_an_absolute_name_stays_inside_and_setuid_is_dropped(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        entry = tarfile.TarInfo("/etc/tool")
        entry.mode, entry.size = 0o4755, 1
        tar.addfile(entry, io.BytesIO(b"x"))
    file.seek(0)
    layer_files.unpack(file, tmp_path / "layer")
    assert stat.S_IMODE((tmp_path / "layer/etc/tool").stat().st_mode) == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="makes the device nodes of overlayfs: root only")
def test_packing_what_was_unpacked_gives_the_same_bytes(tmp_path):
    upper = tmp_path / "upper"
    (upper / "d/e").mkdir(parents=True)
    (upper / "d/f").write_bytes(os.urandom(5000))
    os.link(upper / "d/f", upper / "d/g")
    (upper / "d/l").symlink_to("../nowhere")
    os.mkfifo(upper / "p")
    os.mknod(upper / "gone", stat.S_IFCHR, 0)
    os.setxattr(upper / "d/e", "trusted.overlay.opaque", b"y")
    os.setxattr(upper / "d/f", "user.note", b"kept")
    os.chown(upper / "d/f", 1000 + 524288, 1000 + 524288)
    for path in [upper, *upper.rglob("*")]:
        os.utime(path, (1_600_000_000, 1_600_000_000), follow_symlinks=False)
    first, second = io.BytesIO(), io.BytesIO()
    digest = layer_files.pack(upper, first, 524288)
    first.seek(0)
    layer_files.unpack(first, tmp_path / "layer")
    assert stat.S_ISCHR((tmp_path / "layer/gone").lstat().st_mode)
    assert os.getxattr(tmp_path / "layer/d/e", "trusted.overlay.opaque") == b"y"
    assert (tmp_path / "layer/d/f").stat().st_uid == 1000
    names = {one[0] for one in described(first)}
    assert {".wh.gone", "d/e/.wh..wh..opq", "d/l", "p"} <= names
    os.chown(tmp_path / "layer/d/f", 1000 + 524288, 1000 + 524288)
    layer_files.pack(tmp_path / "layer", second, 524288)
    assert described(second) == described(first) and digest.startswith("sha256:")


def described(file):
    """Everything that a layer says of its members, but times."""
    with tarfile.open(fileobj=io.BytesIO(file.getvalue())) as tar:
        fields = ("name", "type", "linkname", "mode", "uid", "size")
        note = "SCHILY.xattr.user.note"
        return [(*(getattr(one, field) for field in fields), one.pax_headers.get(note)) for one in tar]


# -- the bundle


def test_a_container_is_told_to_have_nothing(tmp_path):
    told = configuration(tmp_path, tmp_path / "init", True, [{"containerID": 0, "hostID": 524288, "size": 65536}], MIB, None)
    assert all(names == [] for names in told["process"]["capabilities"].values()) and told["process"]["noNewPrivileges"]
    assert {one["type"] for one in told["linux"]["namespaces"]} == {"pid", "network", "ipc", "uts", "mount", "user", "cgroup"}
    for mount in told["mounts"]:
        assert "nosuid" in mount["options"]
        if mount["type"] == "bind":
            assert "ro" in mount["options"], mount
    assert not any(mount["destination"].startswith("/sys") for mount in told["mounts"])


def test_a_skeleton_has_no_user_data(tmp_path):
    skeleton(tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert path.stat().st_size < 300
    assert (tmp_path / "etc/machine-id").read_text() == ""
    assert (
        not (tmp_path / "etc/shadow").exists() and Path("/etc/hostname").read_text() not in (tmp_path / "etc/hosts").read_text()
    )


# -- sessions


@pytest.mark.parametrize("ended", [True, False])
def test_the_exit_code_of_a_program_that_has_closed_its_side_is_waited_for(ended):
    """What it has left is killed before its exit code is told, which takes as long as it takes."""
    (mine, keeper), (terminal, program) = socket.socketpair(), socket.socketpair()
    session = Session(mine, terminal.detach())
    with keeper, program:
        if ended:
            program.close()
            threading.Timer(0.5, frames.send, [keeper, {"exit_code": 5}]).start()
        assert session.close() == (5 if ended else -1)


# -- a container's process 1


def test_a_process_that_ends_is_not_alive_before_it_is_collected():
    child = os.fork()
    if child == 0:
        signal.pause()
    name = cgroups.owner_name(child)
    pidfd = os.pidfd_open(child)
    try:
        assert cgroups.alive(name)
        assert not cgroups.alive(f"{child}.1") and not cgroups.alive("x") and not cgroups.alive("")
        os.kill(child, signal.SIGKILL)
        assert select.select([pidfd], [], [], 60)[0]  # it has ended; nobody has collected it
        assert os.path.exists(f"/proc/{child}") and not cgroups.alive(name)
        with pytest.raises(SandboxLost, match="has died"):
            step_inside(pidfd, 1000)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not cgroups.alive(name)


def test_a_container_whose_process_is_still_to_be_collected_is_lost(tmp_path):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "state.json").write_text(json.dumps({"process": child, "started": cgroups.owner_name(child)}))
    mine, theirs = socket.socketpair()
    with mine, theirs, pytest.raises(SandboxLost, match="has died"):
        State.load(tmp_path, Settings("x", None, []), "one", mine)
    os.waitpid(child, 0)
