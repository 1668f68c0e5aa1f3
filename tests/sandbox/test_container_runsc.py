"""Containers on gVisor: another kernel inside, limits of ours around it, and processes that go on from a checkpoint."""

import os
import time
from pathlib import Path

import pytest

from agent.processes import gone
from nautile.sandbox import MIB, InvalidRequest, Limits, Sandbox, SubstrateUnavailable, Unsupported
from sandbox.conftest import need

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
        assert sandbox.run("cat f").stdout == "later\n"  # it went on
        child = sandbox.fork()
        assert child.run("cat f").stdout == "later\n"
        child.close()
        with pytest.raises(InvalidRequest, match="only runtime='runsc'"):
            Sandbox.create("container", image=image)
    finally:
        sandbox.close()


def test_a_pause_stops_and_closing_leaves_nothing(gvisor):
    sandbox = Sandbox.create("container", runtime="runsc", limits=LIMITS)
    place = sandbox.driver._place
    sandbox.pause()
    sandbox.resume()
    assert sandbox.run("echo on").stdout == "on\n"
    began = time.monotonic()
    sandbox.close()
    assert time.monotonic() - began < 2 and not place.exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"*/nautile/*/{sandbox.info.id}"))
    assert gone(f"runsc-sandbox {sandbox.info.id}")


def test_what_it_cannot_do_it_says(gvisor, tmp_path, monkeypatch):
    with pytest.raises(Unsupported, match="run commands only"):
        gvisor.read("x")
    for options in ({"network": ["example.org:443"]}, {"workspace": tmp_path}, {"log": tmp_path / "log"}):
        with pytest.raises(Unsupported, match="runtime='runsc' has none"):
            Sandbox.create("container", runtime="runsc", **options)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SubstrateUnavailable, match=r"runsc is missing; apt-get install runsc"):
        Sandbox.create("container", runtime="runsc")
