"""The parts of virtual machines that need none: hostile guests and emulators are played by these tests."""

import contextlib
import errno
import io
import os
import re
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nautile.sandbox import FileRefused, InvalidRequest, SandboxLost, SubstrateUnavailable
from nautile.sandbox.guest import accel, disk, kernel, places, transfer
from nautile.sandbox.guest import link as wire
from nautile.sandbox.guest.blocks import Disk, Export
from nautile.sandbox.guest.kernel import Kernel, KernelMissing
from nautile.sandbox.guest.link import Link
from nautile.sandbox.guest.output import Kept
from nautile.sandbox.guest.qmp import Monitor

AGENT = Path(wire.__file__).with_name("agent.c")


# -- the protocol


def test_both_sides_use_the_same_numbers():
    source = AGENT.read_text()
    for names in re.findall(r"enum \{([^}]*)\}", source)[:2]:
        number = -1
        for one in names.replace("\n", " ").split(","):
            name, _, value = (part.strip() for part in one.partition("="))
            number = int(value) if value else number + 1
            assert getattr(wire, name) == number
    for name in ("VERSION", "PIECE", "WINDOW"):
        value = re.search(rf"#define {name} (\(?[0-9 *]+\)?)", source)[1]
        assert getattr(wire, name) == eval(value)


@pytest.fixture
def guest():
    """(the link, the guest's end of it)."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(60)
    link = Link(ours)
    yield link, theirs
    link.close()
    theirs.close()


def frame(kind, stream, data=b""):
    return struct.pack("<IB3xI", len(data), kind, stream) + data


def end(code=0):
    return struct.pack("<iBB2xI", code, 0, 0, 1)


def test_a_guest_may_answer_before_its_host_has_counted():
    """Another thread receives what a guest says while this one is still sending."""

    class Fast:
        def send(self, kind, number, data=b""):
            if kind == wire.DATA:
                stream._arrived(wire.TAKEN, struct.pack("<I", len(data)))
            if kind == wire.CREDIT:
                for _ in range(struct.unpack("<IB", data)[0] // wire.PIECE):
                    stream._arrived(wire.OUT, bytes(wire.PIECE))

    stream = wire.Stream(Fast(), 1)
    assert stream.feed(memoryview(bytes(1000))) == 1000 and stream.room == wire.WINDOW
    for _ in range(wire.WINDOW // wire.PIECE):  # as much as it may
        stream._arrived(wire.OUT, bytes(wire.PIECE))
    for _ in range(8):
        assert stream.next(0.0) == (wire.OUT, bytes(wire.PIECE))


def test_output_comes_in_order_and_windows_are_given_back(guest):
    link, theirs = guest
    stream = link.spawn(wire.EXECUTE, ["x"])
    theirs.recv(1000)
    got = {wire.OUT: b"", wire.ERR: b""}
    for number in range(3):
        theirs.sendall(frame(wire.OUT, 1, bytes([number]) * 60_000) + frame(wire.ERR, 1, b"e"))
        for _ in range(2):
            kind, data = stream.next(time.monotonic() + 60)
            got[kind] += data
    theirs.sendall(frame(wire.EXIT, 1, end(7)))
    assert stream.next(time.monotonic() + 60)[0] == wire.EXIT
    assert got[wire.OUT] == b"".join(bytes([number]) * 60_000 for number in range(3)) and got[wire.ERR] == b"eee"
    assert stream.ended.code == 7 and not stream.ended.memory_killed
    size, kind, number = struct.unpack("<IB3xI", theirs.recv(12))
    assert (kind, number) == (wire.CREDIT, 1) and struct.unpack("<IB", theirs.recv(size)) == (180_000, 0)


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (frame(wire.OUT, 1, b"x" * 65_536) * 5, "more than it may"),
        (frame(wire.OUT, 1), "more than it may"),
        (struct.pack("<IB3xI", 2**31, wire.OUT, 1), "frame of kind"),
        (frame(99, 1), "frame of kind"),
        (frame(wire.DATA, 1), "frame of kind"),
        (frame(wire.HELLO, 1), "frame of kind"),
        (frame(wire.REFRESHED, 1), "frame of kind"),
        (frame(wire.EXIT, 1, b"abc"), "an end that is none"),
        (frame(wire.TAKEN, 1, struct.pack("<I", 1)), "took more"),
        (frame(wire.OPEN, 0x80000001), "may not"),
        (frame(wire.READY, 0) * 9, "was not asked"),
    ],
)
def test_a_guest_that_breaks_the_rules_is_lost(guest, sent, why):
    link, theirs = guest
    stream = link.spawn(wire.EXECUTE, ["x"])
    sender = threading.Thread(target=lambda: theirs.sendall(sent))
    sender.start()
    deadline = time.monotonic() + 60
    with pytest.raises(SandboxLost, match=why):
        while time.monotonic() < deadline:
            link.pump(deadline)
    with pytest.raises(SandboxLost, match=why):  # for good
        stream.kill()
    theirs.close()
    sender.join()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(st.binary(max_size=40), st.builds(frame, st.integers(0, 40), st.integers(0, 3), st.binary(max_size=20))))
)
def test_whatever_a_guest_sends_is_data_or_the_end_of_it(pieces):
    ours, theirs = socket.socketpair()
    link = Link(ours)
    stream = link.spawn(wire.EXECUTE, ["x"])
    theirs.sendall(b"".join(pieces))
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(SandboxLost):
        while True:
            event = stream.next(time.monotonic() + 60)
            if event is not None:
                assert event[0] in (wire.OUT, wire.ERR, wire.EXIT, wire.FAILED)
    link.close()
    theirs.close()


def test_a_guest_that_reads_nothing_does_not_hold_us_up(guest, monkeypatch):
    link, theirs = guest
    stream = link.spawn(wire.EXECUTE, ["x"])

    def drain():
        left = wire.WINDOW
        while left > 0:
            left -= len(theirs.recv(2**16))

    reader = threading.Thread(target=drain)
    reader.start()
    sent = 0
    while count := stream.feed(memoryview(bytes(100_000))):
        sent += count
    assert sent == wire.WINDOW  # no more than the guest has room for
    reader.join()
    monkeypatch.setattr("nautile.sandbox.guest.link._PATIENCE", 0.2)
    with pytest.raises(SandboxLost, match="reads nothing"):
        for _ in range(100):
            link.spawn(wire.EXECUTE, ["y" * 60_000])


@pytest.mark.parametrize("answer", [frame(wire.HELLO, 0, b"nautile agent 99"), frame(wire.READY, 0), b"SSH-2.0-x\r\n" * 9])
def test_another_agent_is_refused(guest, answer):
    link, theirs = guest
    theirs.sendall(answer)
    with pytest.raises(SandboxLost):
        link.greet(60)


@given(st.lists(st.binary(max_size=30), max_size=12), st.integers(2, 40))
def test_the_first_and_last_half_are_kept(pieces, keep):
    kept, everything = Kept(keep), b"".join(pieces)
    for piece in pieces:
        kept.add(piece)
    half = keep // 2
    if len(everything) <= 2 * half:
        assert kept.data() == everything and not kept.truncated
    else:
        missing = f"\n[... {len(everything) - 2 * half} bytes omitted ...]\n".encode()
        assert kept.data() == everything[:half] + missing + everything[-half:] and kept.truncated


# -- files that a hostile agent sends


def entry(kind, name, mode=0o644, size=0):
    return struct.pack("<cIQI", kind, mode, size, len(name)) + name


def download(sent, target, limit=1000):
    ours, theirs = socket.socketpair()
    link = Link(ours)
    try:
        theirs.sendall(frame(wire.OUT, 1, sent) + frame(wire.EXIT, 1, end()))
        return transfer.download(link, "x", target, limit)
    finally:
        link.close()
        theirs.close()


@pytest.mark.parametrize("name", [b"..", b"../x", b"/etc/x", b"a/../../x", b"a//b", b".", b"a/\0"])
def test_a_name_that_leads_elsewhere_makes_nothing(name, tmp_path):
    with pytest.raises(FileRefused, match="leads elsewhere"):
        download(entry(b"d", b"") + entry(b"f", name) + struct.pack("<I", 0) + b"z", tmp_path / "out")
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["out"]


def test_odd_trees_are_refused(tmp_path):
    twice = entry(b"d", b"") + entry(b"d", b"a") + entry(b"d", b"a")
    below = entry(b"d", b"") + entry(b"f", b"a") + struct.pack("<I", 0) + entry(b"d", b"a/b")
    for number, sent in enumerate((twice, below)):
        with pytest.raises(FileRefused, match="cannot be made"):
            download(sent + b"z", tmp_path / str(number))
    with pytest.raises(FileRefused, match="raise limit"):
        download(entry(b"f", b"") + struct.pack("<I", 2000) + bytes(2000), tmp_path / "big")
    with pytest.raises(SandboxLost, match="too long"):
        download(entry(b"f", b"") + struct.pack("<I", 2**31), tmp_path / "huge")
    with pytest.raises(SandboxLost, match="in the middle"):
        download(entry(b"d", b""), tmp_path / "short")


def change(name, mode, data=b"", *, size=None, target=b"", links=1, inode=1, extra=b""):
    length = len(data) if size is None else size
    head = struct.pack("<IIIIQQqIIII", mode, 1000, 70_000, 0, length, inode, 5, links, len(name), len(target), len(extra))
    content = struct.pack("<I", len(data)) + data if data else b""
    return b"c" + head + name + target + extra + (content + bytes(4) if stat.S_ISREG(mode) else b"")


def pack(sent):
    ours, theirs = socket.socketpair()
    link = Link(ours)
    out = io.BytesIO()
    try:
        theirs.sendall(frame(wire.OUT, 1, sent) + frame(wire.EXIT, 1, end()))
        transfer.pack(link, out, 100_000)
    finally:
        link.close()
        theirs.close()
    out.seek(0)
    return {member.name: member for member in tarfile.open(fileobj=out)}


def test_changes_become_a_layer():
    regular = stat.S_IFREG | 0o644
    opaque = b"trusted.overlay.opaque\0" + struct.pack("<I", 1) + b"y"
    sent = change(b"d", stat.S_IFDIR | 0o755, extra=opaque) + change(b"d/f", regular, b"abc", links=2, inode=7)
    sent += change(b"d/g", regular, b"abc", links=2, inode=7) + change(b"gone", stat.S_IFCHR)
    sent += change(b"l", stat.S_IFLNK | 0o777, target=b"/etc/passwd", size=0) + change(b"s", stat.S_IFSOCK)
    members = pack(sent + b"z")
    assert set(members) == {"d", "d/.wh..wh..opq", "d/f", "d/g", ".wh.gone", "l"}
    assert members["d/g"].islnk() and members["d/g"].linkname == "d/f"
    assert members["d/f"].size == 3 and (members["d/f"].uid, members["d/f"].gid) == (1000, 65_534)
    assert members["l"].linkname == "/etc/passwd"


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        (change(b"f", stat.S_IFREG, b"abc", size=4), SandboxLost),
        (change(b"f", stat.S_IFREG, b"abc", size=2), SandboxLost),
        (change(b"../f", stat.S_IFREG, b"abc"), FileRefused),
        (change(b".wh.x", stat.S_IFREG, b"abc"), FileRefused),
        (change(b"f", stat.S_IFREG, b"", size=2**50), SandboxLost),
        (change(b"f", stat.S_IFREG, b"abc", extra=b"user.x\0\xff\xff\xff\xff"), SandboxLost),
        (b"q", SandboxLost),
    ],
)
def test_changes_that_cannot_be_are_refused(sent, kind):
    with pytest.raises(kind):
        pack(sent + b"z")


# -- disks


def index_of(place, tmp_path):
    target = tmp_path / "x.index"
    disk.write_index(disk.scan(place), target, [place])
    return target


def test_a_disk_gives_a_file_as_it_was_or_an_error(tmp_path):
    place = tmp_path / "tree"
    place.mkdir()
    (place / "a").write_bytes(b"A" * 5000)
    (place / "b").write_bytes(b"B" * 10)
    target = index_of(place, tmp_path)
    served = Disk(str(target))
    whole = served.read(0, served.size)
    assert whole.count(b"A" * 5000) == 1 and whole.count(b"B" * 10) == 1
    assert all(served.read(at, 512) == whole[at : at + 512] for at in range(0, served.size, 512))
    assert disk.is_current(target)
    (place / "a").write_bytes(b"X" * 5000)
    with pytest.raises(OSError) as caught:
        Disk(str(target)).read(0, served.size)
    assert caught.value.errno == errno.EIO
    (place / "c").touch()
    assert not disk.is_current(target)
    (place / "b").unlink()
    (place / "b").symlink_to("/etc/passwd")  # what a path has become in the meantime is not followed
    start = whole.index(b"B" * 10)
    with pytest.raises(OSError):
        Disk(str(target)).read(start, 10)


def test_what_is_not_for_everybody_is_not_given_away(tmp_path):
    place = tmp_path / "tree"
    (place / "closed").mkdir(parents=True)
    for name, mode in (("open", 0o4755), ("secret", 0o600), ("closed/in", 0o644)):
        (place / name).write_text("x")
        (place / name).chmod(mode)
    (place / "closed").chmod(0o700)
    place.chmod(0o755)
    os.mkfifo(place / "fifo")
    root = disk.scan(place, public=True)
    assert set(root.names) == {b"open"}
    assert root.names[b"open"].mode == stat.S_IFREG | 0o755 and root.names[b"open"].owner == (0, 0)


def exchange(data, index):
    """What the server answers to an emulator that sends ``data``."""
    ours, theirs = socket.socketpair()
    export = Export(ours, Disk(str(index)))
    theirs.sendall(data)
    theirs.shutdown(socket.SHUT_WR)
    ours.settimeout(60)
    while export.serve():
        pass
    ours.close()
    out = b""
    with contextlib.suppress(ConnectionResetError):  # it hung up before it had read everything
        while piece := theirs.recv(2**16):
            out += piece
    theirs.close()
    return out


GO = struct.pack(">I", 3) + struct.pack(">QII", 0x49484156454F5054, 7, 6) + bytes(6)


def request(kind, offset, length, magic=0x25609513):
    return struct.pack(">IHHQQI", magic, 0, kind, 77, offset, length)


@pytest.fixture(scope="module")
def small_index(tmp_path_factory):
    place = tmp_path_factory.mktemp("tree")
    (place / "f").write_bytes(b"F" * 3000)
    return index_of(place, tmp_path_factory.mktemp("index"))


def test_requests_beyond_the_disk_and_writes_are_refused(small_index):
    size = Disk(str(small_index)).size
    for one, error in (
        (request(0, size, 1), errno.EINVAL),
        (request(0, 2**64 - 1, 1), errno.EINVAL),
        (request(0, 0, 2**32 - 1), errno.EINVAL),
        (request(1, 0, 4) + b"evil", errno.EPERM),
        (request(4, 0, 4096), errno.EPERM),
    ):
        answer = exchange(GO + one, small_index)[-16:]
        assert struct.unpack(">IIQ", answer) == (0x67446698, error, 77)
    assert exchange(GO + request(0, 0, 4096), small_index).endswith(Disk(str(small_index)).read(0, 4096))


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=100).map(lambda data: GO + data)))
def test_whatever_an_emulator_sends_is_answered_or_ends_the_connection(small_index, data):
    exchange(data, small_index)


# -- the machine


def test_an_emulator_that_misbehaves_is_lost():
    for sent, why in (
        (b"not json\n", "no answer"),
        (b"[]\n", "no answer"),
        (b'{"QMP": {}}\n{"id": 1, "error": {"desc": "no"}}\n', "refused qmp_capabilities: no"),
        (b'{"QMP": {}}\n', "hung up"),
    ):
        ours, theirs = socket.socketpair()
        theirs.sendall(sent)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(SandboxLost, match=why):
            Monitor(ours).ask("stop")
        ours.close()
        theirs.close()


def test_modules_come_after_what_they_need_and_the_newest_kernel_is_taken(tmp_path):
    with pytest.raises(KernelMissing, match="nautile sandbox kernel"):
        kernel.find(tmp_path)
    for version in ("6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64", "6.1.0-100-cloud-amd64"):
        (tmp_path / "kernels" / version / "modules").mkdir(parents=True)
        (tmp_path / "kernels" / version / "vmlinuz").touch()
    assert kernel.find(tmp_path).version == "6.1.0-100-cloud-amd64"
    for name, needs in (("a", b"b,c"), ("b", b"c"), ("c", b""), ("d-e", b"a")):
        (tmp_path / f"{name}.ko").write_bytes(b"\x7fELF\0depends=" + needs + b"\0name=x\0")
    assert Kernel("x", tmp_path, tmp_path).load_order(("d-e", "b")) == ["c", "b", "a", "d-e"]


def test_without_kvm_emulation_must_be_allowed(monkeypatch):
    monkeypatch.setattr(accel, "devices", lambda: iter(["there is no /dev/kvm"]))
    monkeypatch.setattr(accel, "program", lambda substrate: "/usr/bin/true")
    with pytest.raises(SubstrateUnavailable, match=r"no /dev/kvm; pass allow_emulation=True"):
        accel.choose("microvm", allow_emulation=False)
    assert accel.choose("microvm", allow_emulation=True) == "tcg"


def test_a_canary_is_remembered(monkeypatch, tmp_path):
    calls = []

    def canary(guest):
        calls.append(guest)
        return accel.Probe(len(calls) == 1, "said", 0.1)

    class Guest:
        key = "k"

    monkeypatch.setattr(accel, "devices", lambda: iter([]))
    monkeypatch.setattr(accel, "program", lambda substrate: "/usr/bin/true")
    monkeypatch.setattr(accel, "version", lambda path: "7")
    monkeypatch.setattr(accel, "_key", lambda qemu, guest: f"{qemu}{guest}")
    monkeypatch.setattr(accel.boot, "prepare", lambda *_: Guest)
    monkeypatch.setattr(accel, "_canary", canary)
    assert [accel.probe(tmp_path).works for _ in range(3)] == [True] * 3 and len(calls) == 1
    assert not accel.probe(tmp_path, again=True).works
    assert not accel.probe(tmp_path).works and len(calls) == 2
    Guest.key = "other"
    accel.probe(tmp_path)
    assert len(calls) == 3


def test_what_a_killed_client_left_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = places.temporary("disk")
    dead = subprocess.run(
        [sys.executable, "-c", "from nautile.sandbox.guest import places; print(places.temporary('layer'))"],
        env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    (Path(dead) / "file").touch()
    (tmp_path / "nautile-disk-1.1-link").symlink_to(mine)
    (tmp_path / "nautile-other-1.1-x").mkdir()
    assert places.sweep() == 1
    assert not os.path.exists(dead) and mine.is_dir() and len(os.listdir(tmp_path)) == 3


def test_what_another_one_sweeps_at_the_same_time_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = tmp_path / "nautile-disk-999999999.1-x"
    place.mkdir()

    def gone_meanwhile(owner):
        place.rmdir()
        return False

    monkeypatch.setattr(places.cgroup, "alive", gone_meanwhile)
    assert places.sweep() == 0


def test_images_of_odd_files_are_refused(tmp_path):
    place = tmp_path / "tree"
    place.mkdir()
    (place / "f").touch()
    for number in range(25):
        os.setxattr(place / "f", f"user.{number}", b"v" * 80)
    with pytest.raises(InvalidRequest, match="extended attributes"):
        index_of(place, tmp_path)
