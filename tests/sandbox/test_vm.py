"""A VM: the same behaviour and the same attacks on another machine with a disk of its own, copies by backing files, and images
that are disks."""

import shutil
import struct
import subprocess

import pytest

from nautile.sandbox import MIB, InvalidRequest, Limits, Sandbox, Unsupported
from sandbox.machines import SMALL, create
from sandbox.test_container import (  # noqa: F401  # collected here with this module's fixtures
    test_a_pause_stops_everything_and_a_request_goes_on,
    test_a_session_over_pipes_gives_its_exit_code,
    test_a_tree_goes_out_and_in_again_without_links,
    test_files_go_in_and_out,
    test_output_comes_as_it_is_written,
    test_what_changed_is_an_oci_layer,
    test_writing_never_goes_through_a_link,
)
from sandbox.test_microvm import (  # noqa: F401
    test_a_tenant_does_not_see_the_agent_its_port_or_its_disks,
    test_the_emulator_owns_nothing_and_is_limited,
)
from sandbox.test_sdk import (  # noqa: F401
    test_a_flood_is_cut_where_it_is_produced,
    test_exit_codes_are_those_of_a_shell,
    test_memory_is_limited_and_told_apart,
    test_processes_are_limited,
    test_python_runs_a_program_inside,
    test_stdin_environment_and_directory,
    test_the_disk_is_limited,
    test_the_time_limit_kills_the_whole_tree,
)
from sandbox.test_security import (  # noqa: F401
    test_clone3_is_absent_and_threads_work,
    test_dangerous_calls_are_refused,
    test_device_nodes_and_setuid_files_do_not_work,
    test_environment_and_arguments_of_ours_are_not_there,
    test_exhaustion_stays_inside,
    test_nothing_of_the_host_can_be_read,
    test_nothing_that_matters_can_be_written,
    test_the_filter_lets_ordinary_programs_work,
    test_the_runtime_cannot_be_reached,
    test_there_is_no_right_to_anything,
    test_there_is_no_way_out_of_its_network,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def machine():
    with create("vm") as sandbox:
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
        made.append(create("vm", **options))
        return made[-1]

    yield start
    for one in made:
        one.close()


def test_copies_share_the_past_and_nothing_after(fresh):
    parent = fresh()
    parent.run("mkdir d; echo 1 > d/a; head -c 3000000 /dev/urandom > big; sha256sum big > sum")
    child = parent.fork()
    try:
        assert child.run("cat d/a; sha256sum -c sum").stdout == "1\nbig: OK\n"
        child.run("echo child > d/a; rm big")
        parent.run("echo parent > d/a")
        grandchild = child.fork()
        try:
            parent.close()  # the files it shared stay for those who use them
            assert grandchild.run("cat d/a; ls").stdout == "child\nd\nsum\n"
            assert child.run("cat d/a").stdout == "child\n"
        finally:
            grandchild.close()
    finally:
        child.close()


def hello_system(tmp_path):
    """A system with one program: it prints a file of its root directory's name."""
    root = tmp_path / "system"
    (root / "bin").mkdir(parents=True)
    source = tmp_path / "cat.c"
    source.write_text(
        "#include <unistd.h>\n#include <fcntl.h>\nint main(int c, char **v) { char b[100]; if (c > 2) { int w = open(v[1], "
        "O_WRONLY | O_CREAT, 0644); return write(w, v[2], 3) != 3; } int f = open(v[1], 0); "
        "long n = read(f, b, 100); return n < 0 || write(1, b, n) != n; }"
    )
    subprocess.run(["gcc", "-static", "-Os", "-o", root / "bin/cat", source], check=True)
    (root / "name").write_text("mine\n")
    (root / "workspace").mkdir()
    (root / "workspace").chmod(0o777)
    disk = tmp_path / "system.raw"
    with open(disk, "wb") as file:
        file.truncate(32 * MIB)
    mkfs = shutil.which("mkfs.ext4", path="/usr/sbin:/sbin:/usr/bin")
    subprocess.run([mkfs, "-q", "-F", "-d", root, disk], check=True)
    return disk


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_an_image_that_is_a_disk_is_the_whole_system_and_is_never_written(kind, fresh, tmp_path):
    disk = hello_system(tmp_path)
    if kind == "qcow2":
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", disk, tmp_path / "system.qcow2"], check=True)
        disk = tmp_path / "system.qcow2"
    before = disk.read_bytes()
    sandbox = fresh(image=disk)
    assert sandbox.run(["/bin/cat", "/name"]).stdout == "mine\n"
    assert sandbox.run("true").exit_code == 127  # no shell: nothing of the host's /usr is there
    assert sandbox.run(["/bin/cat", "/workspace/x", "new"]).ok
    child = sandbox.fork()
    try:
        assert child.run(["/bin/cat", "/workspace/x"]).stdout == "new"
    finally:
        child.close()
    with pytest.raises(Unsupported, match="use fork"):
        sandbox.snapshot()
    sandbox.close()
    assert disk.read_bytes() == before


def test_disk_images_that_are_none_are_refused(tmp_path):
    create("vm").close()  # skips where there is no QEMU
    small = tmp_path / "small"
    small.write_bytes(b"x")
    for path, why in ((tmp_path / "none", "neither a directory nor"), (small, "no disk image")):
        with pytest.raises(InvalidRequest, match=why):
            Sandbox.create("vm", image=path, limits=SMALL, allow_emulation=True)
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(bytes(MIB))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, top], check=True)
    with pytest.raises(InvalidRequest, match="names another file"):
        Sandbox.create("vm", image=top, limits=SMALL, allow_emulation=True)
    broken = tmp_path / "broken.qcow2"
    broken.write_bytes(b"QFI\xfb" + struct.pack(">I", 99) + bytes(4096))
    with pytest.raises(InvalidRequest, match="qemu-img refused"):
        Sandbox.create("vm", image=broken, limits=SMALL, allow_emulation=True)


def test_two_processors(fresh):
    sandbox = fresh(limits=Limits(memory=96 * MIB, cpus=1.5, seconds=60.0))
    assert sandbox.run("nproc").stdout == "2\n"
