"""Containers on gVisor: another kernel inside, limits of ours around it, and processes that go on from a checkpoint."""

import os
import time
from pathlib import Path

import pytest

from agent.processes import gone
from nautile.sandbox import MIB, FileRefused, InvalidRequest, Limits, Sandbox, SubstrateUnavailable, Unsupported
from nautile.sandbox.gvisor import GvisorDriver
from sandbox import test_security as attacks
from sandbox.conftest import need

WRITES = ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/usr/bin/python3", "/etc/passwd", "/dev/mem", "/dev/kmsg")
WRITES += ("/dev/vda", "/dev/sda", "/dev/kvm", "/dev/loop0", "/sys/fs/cgroup/release_agent", "/proc/1/oom_score_adj")
READS = ("/proc/kallsyms", "/proc/kcore", "/proc/keys", "/proc/kpagecgroup", "/proc/1/root/etc/shadow")
READS += ("/etc/shadow", "/root/.bashrc", "/sys/class/dmi/id/product_name", "/proc/config.gz", "/proc/sched_debug")
EXHAUSTION = (
    "import os\nkept = []\nwhile True: kept.append(os.dup(0))",
    "with open('/tmp/f', 'wb') as f:\n while True: f.write(bytes(2**20))",
)
LIMITS = Limits(memory=256 * MIB, pids=64, disk=32 * MIB, output=64 * 1024)


@pytest.fixture(scope="module")
def gvisor():
    need("runsc")
    if os.geteuid() != 0:
        pytest.skip("runsc sandboxes are root's")
    with Sandbox.create("container", runtime="runsc", limits=LIMITS) as sandbox:
        yield sandbox


def test_the_kernel_inside_is_not_the_hosts(gvisor):
    result = gvisor.run("uname -r; id -u; cat; echo bad >&2; exit 3", stdin="given\n")
    assert result.stdout.splitlines()[1:] == ["1000", "given"] and result.stdout.split()[0] != os.uname().release
    assert (result.stderr, result.exit_code, result.infrastructure_error) == ("bad\n", 3, None)
    assert gvisor.info.runtime == "runsc" and {"memory", "pids"} <= set(gvisor.info.limits_enforced)
    assert gvisor.run(["/bin/echo", "a b", "$x"]).stdout == "a b $x\n"


def test_everything_of_a_command_ends_with_it(gvisor):
    assert gvisor.run("sleep 7331 & setsid sleep 7332 & echo started").stdout == "started\n"
    result = gvisor.run("trap '' TERM; sleep 7333 & while :; do :; done", timeout=1.0)
    assert result.timed_out and result.exit_code == 137 and result.infrastructure_error is None and result.seconds < 5
    assert gvisor.run("sleep 7334 & kill -9 $PPID; sleep 7335").exit_code == 137  # the shell that would have ended it
    listing = gvisor.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout
    assert "sleep 2147483647" in listing and "733" not in listing


def test_output_is_cut_where_it_is_produced_and_files_stay(gvisor):
    result = gvisor.run("seq 1000000; echo kept > /workspace/f")
    assert result.truncated and len(result.stdout) < 70_000 and result.ok
    assert gvisor.run("cat f; rm f; ls /home /root /etc/shadow 2>&1; touch /usr/x 2>&1").stdout.count("No such file") == 2


def test_memory_is_bounded_by_our_own_group(gvisor):
    with Sandbox.create("container", runtime="runsc", limits=LIMITS) as sandbox:
        result = sandbox.run("python3 -c 'x = bytearray(600 * 2**20); print(len(x))'", timeout=20)
        assert result.memory_killed and "629145600" not in result.stdout


def test_a_checkpoint_holds_processes_and_files(gvisor):
    sandbox = Sandbox.create("container", runtime="runsc", limits=LIMITS)
    try:
        sandbox.run("echo saved > f")
        image = sandbox.snapshot()
        sandbox.run("echo later > f")
        for _ in range(2):
            with Sandbox.create("container", runtime="runsc", image=image, limits=LIMITS) as again:
                assert again.run("cat f; echo mine > f").stdout == "saved\n"
        other = Limits(memory=200 * MIB, pids=64, disk=16 * MIB)
        with Sandbox.create("container", runtime="runsc", image=image, limits=other) as again:  # the one made ahead has others
            assert again.run("cat f").stdout == "saved\n" and again.info.id in str(again.driver._group.places)
        ahead = image.held[-1]._spare
        ahead._thread.join()
        place = ahead._made[1]._place
        assert place.is_dir()
        del image, again
        assert not place.exists()  # it has ended with the checkpoint
        assert sandbox.run("cat f").stdout == "later\n"  # it went on
        child = sandbox.fork()
        assert child.run("cat f").stdout == "later\n"
        with pytest.raises(InvalidRequest, match="only runtime='runsc'"):
            Sandbox.create("container", image=child.driver._image)
        child.close()
    finally:
        sandbox.close()


def test_a_pause_stops_and_closing_leaves_nothing(gvisor):
    sandbox = Sandbox.create("container", runtime="runsc", limits=LIMITS)
    place = sandbox.driver._place
    sandbox.write("f", "before")
    sandbox.pause()
    assert sandbox.read("f") == b"before"  # the next request continues it
    sandbox.pause()
    sandbox.resume()
    assert sandbox.run("echo on").stdout == "on\n"
    began = time.monotonic()
    sandbox.close()
    assert time.monotonic() - began < 2 and not place.exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"*/nautile/*/{sandbox.info.id}"))
    assert gone(f"runsc-sandbox {sandbox.info.id}")


def test_a_runsc_that_is_faster_than_the_kernel_is_started_once_more(gvisor, monkeypatch):
    """It is moved into its cgroups while it prepares. Where that comes too late, nothing of the first attempt is left."""
    confined, asked = GvisorDriver._confined, []

    def late(driver):
        asked.append(driver)
        return confined(driver) and len(asked) > 1

    monkeypatch.setattr(GvisorDriver, "_confined", late)
    with Sandbox.create("container", runtime="runsc", limits=LIMITS) as sandbox:
        assert len(asked) == 2 and confined(sandbox.driver) and sandbox.run("echo in").stdout == "in\n"


def test_files_go_in_and_out(gvisor, tmp_path):
    name = "a dir/new\nline 'quoted' $x"
    gvisor.write(name, b"\0\xff", mode=0o640)
    assert gvisor.read(f"/workspace/{name}") == b"\0\xff"
    assert [(one.name, one.kind, one.size, one.mode) for one in gvisor.list("a dir")] == [(name[6:], "file", 2, 0o640)]
    gvisor.write(name, "")
    assert gvisor.read(name) == b""
    gvisor.download("a dir", tmp_path / "out")
    assert [one.name for one in (tmp_path / "out").iterdir()] == [name[6:]]
    (tmp_path / "out/deep/er").mkdir(parents=True)
    (tmp_path / "out/deep/er/run").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "out/deep/er/run").chmod(0o755)
    gvisor.upload(tmp_path / "out", "/tmp/given")
    gvisor.upload(tmp_path / "out/deep/er/run", "one")
    assert gvisor.run("/tmp/given/deep/er/run; ./one; stat -c %U /tmp/given one").stdout == "ran\nran\nagent\nagent\n"
    gvisor.download("one", tmp_path / "one")
    assert (tmp_path / "one").read_text() == "#!/bin/sh\necho ran\n" and (tmp_path / "one").stat().st_mode & 0o777 == 0o755
    gvisor.run("rm -rf /workspace/* /tmp/*")


def test_files_that_lead_elsewhere_or_do_not_fit_are_refused(gvisor, tmp_path):
    gvisor.run("ln -s /etc/passwd link; mkdir d; ln -s d way; mkfifo pipe; echo 12345 > d/f")
    refused = [
        (lambda: gvisor.read("link"), "symbolic link"),
        (lambda: gvisor.read("way/f"), "symbolic link"),
        (lambda: gvisor.write("link", "x"), "symbolic link"),
        (lambda: gvisor.upload(tmp_path, "way/x"), "symbolic link"),
        (lambda: gvisor.read("pipe"), "not a plain file"),
        (lambda: gvisor.read("none"), "does not exist"),
        (lambda: gvisor.read("d"), "is a directory"),
        (lambda: gvisor.write("d", "x"), "is a directory"),
        (lambda: gvisor.list("d/f"), "not a directory"),
        (lambda: gvisor.write("/etc/new", "x"), "may not|read-only"),
        (lambda: gvisor.read("d/f", limit=3), "more than 3 bytes"),
        (lambda: gvisor.download("d", tmp_path / "d", limit=3), "more than 3 bytes"),
        (lambda: gvisor.write("big", bytes(LIMITS.disk + 1)), "full"),
    ]
    for ask, why in refused:
        with pytest.raises(FileRefused, match=why):
            ask()
    assert [one.name for one in gvisor.list()] == ["d", "link", "pipe", "way"]  # nothing of what was refused
    gvisor.run("rm -rf /workspace/*")


def test_attacks_stay_inside(gvisor, monkeypatch):
    """The matrix of test_security.py, where gVisor's kernel answers as ours does; what it allows instead touches no host."""
    attacks.test_there_is_no_way_out_of_its_network(gvisor)
    status = gvisor.run("cat /proc/self/status").stdout
    fields = dict(line.split(":", 1) for line in status.splitlines())
    assert {fields[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapBnd")} == {"0" * 16}
    assert set(fields["Uid"].split()) == {"1000"}
    monkeypatch.setenv("NAUTILE_TEST_SECRET", "leaked")
    found = gvisor.run("env; cat /proc/*/environ /proc/*/cmdline 2>/dev/null | tr '\\0' '\\n'").stdout
    assert "leaked" not in found and os.getcwd() not in found and "runsc" not in found
    source = f"""
import os
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
"""
    assert gvisor.python(source).stdout == ""
    for script in EXHAUSTION:
        result = gvisor.python(script, timeout=6)
        assert result.exit_code != 0 and result.infrastructure_error is None, script
    assert gvisor.python(attacks.THREADS, timeout=6).infrastructure_error is None  # they are in its kernel's memory, not ours
    assert gvisor.run("rm -rf /tmp/*; echo alive").stdout == "alive\n"


def test_what_it_cannot_do_it_says(gvisor, tmp_path, monkeypatch):
    for ask, why in ((gvisor.session, "kills every process"), (lambda: gvisor.pack_diff(tmp_path / "d"), "use snapshot")):
        with pytest.raises(Unsupported, match=why):
            ask()
    with pytest.raises(Unsupported, match="the proxy cannot listen"):
        gvisor.set_policy(["example.org:443"])
    for options in ({"network": ["example.org:443"]}, {"workspace": tmp_path}, {"log": tmp_path / "log"}):
        with pytest.raises(Unsupported, match="runtime='runsc' has none"):
            Sandbox.create("container", runtime="runsc", **options)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SubstrateUnavailable, match=r"runsc is missing; apt-get install runsc"):
        Sandbox.create("container", runtime="runsc")
