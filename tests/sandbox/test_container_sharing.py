"""What containers have in common, and what each has alone: file systems, /dev, /dev/shm, the memory of process 1."""

import os
import signal
import stat
import time
from pathlib import Path

import pytest

from nautile.sandbox import MIB, Sandbox, bundle
from sandbox.conftest import SMALL, need


@pytest.fixture(scope="module")
def two():
    need("crun")
    with Sandbox.create("container", limits=SMALL) as one, Sandbox.create("container", limits=SMALL) as other:
        yield one, other


def devices(sandbox):
    """The file systems that it sees: device numbers, by mount point."""
    lines = sandbox.run(["cat", "/proc/self/mountinfo"]).stdout.splitlines()
    return {line.split()[4]: line.split()[2] for line in lines}


def test_a_container_has_four_file_systems_of_its_own(two):
    """The kernel keeps a word for each file system in each memory group: a fifth is felt with thousands of containers."""
    first, second = map(devices, two)
    alone = set(first.values()) - set(second.values())
    assert alone == {first[place] for place in ("/", "/proc", "/dev/pts", "/dev/shm")}


def test_shared_memory_is_a_containers_own_and_part_of_its_disk(two):
    one, other = two
    half = SMALL.disk // MIB // 2
    filled = one.run(f"for f in /dev/shm/a /tmp/b; do head -c {half + 1}M /dev/zero > $f && du -m $f; done; rm /tmp/b")
    assert "No space left" in filled.stderr and filled.stdout.split() == [str(half + 1), "/dev/shm/a"]
    assert one.run("rm /dev/shm/a; cp /bin/true /dev/shm/t; /dev/shm/t").exit_code == 126  # nothing there is executed
    assert other.run("ls -A /dev/shm").stdout == ""
    assert one.run("rm /dev/shm/t; python3 -c 'import multiprocessing; multiprocessing.Semaphore(1)'").ok


def test_nobody_can_change_what_containers_share(two):
    script = (
        "for f in /dev/x /proc/acpi/x /proc/tty/x; do echo x > $f && echo written; done;"
        "rm -f /dev/null || echo kept; mv /dev/pts /dev/p || echo kept; chmod 777 /dev /dev/init || echo kept;"
        "head -c 4 /dev/zero | wc -c; echo x > /dev/null && echo $?; head -c 3 /dev/urandom | wc -c; readlink /dev/ptmx"
    )
    for sandbox in two:
        found = sandbox.run(script)
        assert found.stdout.split() == ["kept", "kept", "kept", "4", "0", "3", "pts/ptmx"], found
    assert two[0].run("ls -A /proc/bus /proc/driver /proc/fs /proc/irq /proc/tty | grep -v :").stdout.strip() == ""


def test_what_is_shared_belongs_to_no_tenant(tmp_path):
    bundle.furnish(tmp_path / "shared")
    for path in (tmp_path / "shared").rglob("*"):
        found = path.lstat()
        assert found.st_uid == os.geteuid() and (stat.S_ISLNK(found.st_mode) or not found.st_mode & 0o022)


def test_the_first_process_keeps_one_page(tmp_path):
    program = tmp_path / "init"
    program.write_bytes(bundle.init_program())
    program.chmod(0o755)
    child = os.posix_spawn(program, [str(program)], {})
    try:
        deadline = time.monotonic() + 60
        while Path(f"/proc/{child}/syscall").read_text().split()[0] != "34":  # pause
            assert time.monotonic() < deadline
            time.sleep(0.002)
        lines = Path(f"/proc/{child}/maps").read_text().splitlines()
        names = [line.split()[-1] for line in lines if not line.endswith("[vsyscall]")]  # which has no memory
        if "[vdso]" in names:
            pytest.skip("this kernel seals the vDSO: the program keeps its stack with it")
        assert names == [str(program)]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
