"""Attacks from inside, each on each substrate. Where it is harmless it is also made unprotected, to show that it bites.

Nothing here is tried unprotected that could hurt the machine: those attempts ask (access, errno) instead of doing, or have no
twin. docs/security.md lists what is promised.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agent.processes import nap

# Numbers of calls on x86-64, made directly so that no library stands between. Arguments are invalid on purpose: a call that is
# let through fails with another error than EPERM, and does nothing.
CALLS = {
    "mount": (165, (0, 0, 0, 0, 0)),
    "umount2": (166, (0, 0)),
    "pivot_root": (155, (0, 0)),
    "fsopen": (430, (0, 0)),
    "open_tree": (428, (-1, 0, 0)),
    "move_mount": (429, (-1, 0, -1, 0, 0)),
    "unshare": (272, (0x10000000,)),
    "setns": (308, (-1, 0)),
    "ptrace": (101, (16, 1, 0, 0)),
    "process_vm_readv": (310, (1, 0, 0, 0, 0, 0)),
    "pidfd_getfd": (438, (-1, 0, 0)),
    "kcmp": (312, (1, 1, 0, 0, 0)),
    "bpf": (321, (0, 0, 0)),
    "perf_event_open": (298, (0, 0, -1, -1, 0)),
    "io_uring_setup": (425, (1, 0)),
    "userfaultfd": (323, (1,)),
    "add_key": (248, (0, 0, 0, 0, 0)),
    "keyctl": (250, (0, 0, 0, 0, 0)),
    "request_key": (249, (0, 0, 0, 0)),
    "open_by_handle_at": (304, (-1, 0, 0)),
    "name_to_handle_at": (303, (-1, 0, 0, 0, 0)),
    "kexec_load": (246, (0, 0, 0, 0)),
    "init_module": (175, (0, 0, 0)),
    "reboot": (169, (0, 0, 0, 0)),
    "swapon": (167, (0, 0)),
    "settimeofday": (164, (0, 0)),
    "clock_settime": (227, (0, 0)),
    "acct": (163, (0,)),
    "quotactl": (179, (0, 0, 0, 0)),
    "chroot": (161, (0,)),
    "syslog": (103, (10, 0, 0)),
    "vhangup": (153, ()),
    "iopl": (172, (3,)),
    "socket_netlink": (41, (16, 3, 0)),
    "socket_packet": (41, (17, 3, 0)),
    "socket_vsock": (41, (40, 1, 0)),
    "socket_alg": (41, (38, 5, 0)),
    "personality_no_randomize": (135, (0x0040000,)),
    "clone_newuser": (56, (0x10000000 | 17, 0, 0, 0, 0)),
    "ioctl_tiocsti": (16, (0, 0x5412, 0)),
    "ioctl_tiocsti_high_bit": (16, (0, 0x5412 | 1 << 40, 0)),
    "ioctl_tioclinux": (16, (0, 0x541C, 0)),
}
THREADS = """
import threading, time
for _ in range(500):
    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
"""
PROBE = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
for name, (number, arguments) in {calls!r}.items():
    ctypes.set_errno(0)
    given = [ctypes.c_long(one) for one in arguments]
    result = libc.syscall(ctypes.c_long(number), *given)
    print(name, 'done' if result >= 0 else ctypes.get_errno())
"""


def test_dangerous_calls_are_refused(sandbox):
    result = sandbox.python(PROBE.format(calls=CALLS))
    answers = dict(line.split() for line in result.stdout.splitlines())
    assert set(answers) == set(CALLS), result.stderr
    assert {name: answer for name, answer in answers.items() if answer != "1"} == {}


def test_the_same_calls_give_other_errors_outside():
    """The twin: without the filter none of them answers EPERM. Only those that do nothing when they are let through."""
    harmless = ("fsopen", "open_tree", "process_vm_readv", "io_uring_setup", "add_key", "keyctl", "request_key")
    harmless += ("socket_netlink", "ioctl_tiocsti_high_bit")
    probe = PROBE.format(calls={name: CALLS[name] for name in harmless})
    done = subprocess.run(
        [sys.executable, "-I", "-c", probe], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    )
    answers = dict(line.split() for line in done.stdout.splitlines())
    assert len(answers) == len(harmless) and "1" not in answers.values()


def test_clone3_is_absent_and_threads_work(sandbox):
    source = """
import ctypes, threading, multiprocessing
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall(435, 0, 0), ctypes.get_errno())
done = []
thread = threading.Thread(target=lambda: done.append(1)); thread.start(); thread.join()
print(done)
"""
    assert sandbox.python(source).stdout == "-1 38\n[1]\n"


def test_there_is_no_right_to_anything(sandbox):
    status = sandbox.run("cat /proc/self/status").stdout
    fields = dict(line.split(":", 1) for line in status.splitlines())
    assert {fields[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert fields["NoNewPrivs"].strip() == "1" and fields["Seccomp"].strip() == "2"
    assert set(fields["Uid"].split()) == {"1000"} and set(fields["Groups"].split()) <= {"1000"}
    assert sandbox.run("echo '0 0 1' > /proc/self/uid_map").exit_code != 0


def test_its_user_owns_nothing_on_the_host(sandbox):
    """As root's sandbox: whoever gets out is nobody. The host's id is read from the outside."""
    if os.geteuid() != 0:
        pytest.skip("an ordinary user's sandbox has that user's id on the host")
    command = nap(7331).split()
    thread = threading.Thread(target=lambda: sandbox.run(command, timeout=120))
    thread.start()
    users = set()
    while thread.is_alive() and not users:
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (place / "cmdline").read_bytes() == "".join(f"{word}\0" for word in command).encode():
                    users |= set((place / "status").read_text().partition("Uid:")[2].splitlines()[0].split())
                    os.kill(int(place.name), signal.SIGKILL)  # it has been seen
    thread.join()
    assert len(users) == 1 and int(users.pop()) >= 524_288


@pytest.mark.parametrize(
    "path",
    [
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/modprobe",
        "/proc/sysrq-trigger",
        "/proc/sys/vm/drop_caches",
        "/proc/1/oom_score_adj",
        "/usr/bin/python3",
        "/etc/passwd",
        "/sys/fs/cgroup/release_agent",
        "/dev/mem",
        "/dev/kmsg",
        "/dev/vda",
        "/dev/sda",
        "/dev/kvm",
        "/dev/fuse",
        "/dev/loop0",
        "/dev/loop-control",
        "/dev/init",
    ],
)
def test_nothing_that_matters_can_be_written(sandbox, path):
    """Asked with access(2) and by opening without truncation: no byte is written even where it would work."""
    source = f"""
import os
try:
    os.close(os.open({path!r}, os.O_WRONLY))
    print('opened')
except OSError:
    print('refused')
"""
    assert sandbox.python(source).stdout == "refused\n"


@pytest.mark.parametrize(
    "path",
    [
        *(
            f"/proc/{name}"
            for name in ("cmdline", "kallsyms", "kcore", "kpagecgroup", "keys", "timer_list", "modules", "iomem")
        ),
        *(f"/proc/{name}" for name in ("slabinfo", "partitions", "vmallocinfo", "sched_debug", "config.gz", "diskstats")),
        *("/proc/1/environ", "/proc/1/maps", "/proc/1/root/etc/shadow", "/sys/class/dmi/id/product_name"),
        *("/etc/shadow", "/root/.bashrc"),
    ],
)
def test_nothing_of_the_host_can_be_read(sandbox, path):
    assert sandbox.run(f"cat {path}").stdout == ""


def test_the_runtime_cannot_be_reached(sandbox):
    """CVE-2019-5736 and CVE-2024-21626: no process of the runtime to open, no descriptor to walk out through."""
    source = """
import os
for process in [name for name in os.listdir('/proc') if name.isdigit()]:
    for what in ('exe', 'cwd', 'root'):
        try:
            target = os.readlink(f'/proc/{process}/{what}')
        except OSError:
            continue
        if what != 'exe' and not target.startswith(('/', '/workspace')):
            print('odd', process, what, target)
for number in os.listdir('/proc/self/fd'):
    try:
        target = os.readlink(f'/proc/self/fd/{number}')
    except OSError:
        continue
    if not target.startswith(('pipe:', '/dev/null', '/memfd', '/proc/')):
        print('descriptor', number, target)
    if os.path.isdir(f'/proc/self/fd/{number}') and not target.startswith('/proc/'):
        print('directory', number, target)
"""
    result = sandbox.python(source)
    assert result.stdout == "" and result.exit_code == 0


def test_there_is_no_way_out_of_its_network(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        port = server.getsockname()[1]
        local.bind(f"\0nautile-test-{os.getpid()}")
        local.listen()
        socket.create_connection(("127.0.0.1", port), 60).close()  # from here it works
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"\0nautile-test-{os.getpid()}")
        source = f"""
import socket
for family, address in (
    (socket.AF_INET, ('127.0.0.1', {port})), (socket.AF_INET, ('169.254.169.254', 80)), (socket.AF_INET, ('10.0.0.1', 80)),
    (socket.AF_INET, ('8.8.8.8', 53)), (socket.AF_INET6, ('::1', {port})), (socket.AF_INET6, ('2001:4860:4860::8888', 53)),
    (socket.AF_UNIX, '\\0nautile-test-{os.getpid()}'),
):
    try:
        with socket.socket(family) as client:
            client.settimeout(2)
            client.connect(address)
            print('connected', address)
    except OSError:
        pass
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
    try:
        udp.sendto(b'x', ('8.8.8.8', 53))
        print('sent')
    except OSError:
        pass
try:
    socket.getaddrinfo('example.org', 80)
    print('resolved')
except OSError:
    pass
"""
        result = sandbox.python(source, timeout=60)
        assert (result.stdout, result.exit_code) == ("", 0), result.stderr


def test_device_nodes_and_setuid_files_do_not_work(sandbox):
    source = """
import ctypes, os
try:
    os.mknod('/tmp/disk', 0o60600, os.makedev(254, 0))
    print('made')
except PermissionError:
    print('refused')
import shutil
shutil.copy('/usr/bin/id', '/tmp/id')
os.chmod('/tmp/id', 0o6755)
print(os.popen('/tmp/id -u').read().strip())
os.unlink('/tmp/id')
"""
    assert sandbox.python(source).stdout == "refused\n1000\n"


def test_environment_and_arguments_of_ours_are_not_there(sandbox, monkeypatch):
    monkeypatch.setenv("NAUTILE_TEST_SECRET", "leaked")
    result = sandbox.run("env; cat /proc/*/environ /proc/*/cmdline 2>/dev/null | tr '\\0' '\\n'")
    assert "leaked" not in result.stdout and os.getcwd() not in result.stdout
    names = {line.partition("=")[0] for line in sandbox.run(["env"]).stdout.splitlines()}
    assert names == {"PATH", "HOME", "LANG", "TMPDIR"}


@pytest.mark.parametrize(
    ("name", "script"),
    [
        (
            "threads",
            THREADS,
        ),
        ("descriptors", "import os\nkept = []\nwhile True: kept.append(os.dup(0))"),
        ("file size", "with open('/tmp/f', 'wb') as f: f.truncate(2**40)"),
        ("inodes", "import os\nfor i in range(10**6): os.close(os.open(f'/tmp/{i}', os.O_CREAT))"),
    ],
)
def test_exhaustion_stays_inside(sandbox, name, script):
    result = sandbox.python(script, timeout=6)
    assert result.exit_code != 0 and result.infrastructure_error is None
    sandbox.run("find /tmp -mindepth 1 -delete", timeout=120)
    assert sandbox.run("echo alive").stdout == "alive\n"
    if name == "inodes" and sandbox.info.kind == "function":
        assert result.memory_killed or result.timed_out  # bubblewrap's tmpfs counts no inodes: memory bounds them


def test_two_sandboxes_do_not_see_each_other(function, container):
    container.write("/workspace/mine", "secret")
    assert "mine" not in function.run("ls -R /workspace /tmp").stdout
    assert (
        function.run("cat /proc/sys/kernel/random/boot_id >/dev/null; ls /proc | grep -c '^[0-9]'").stdout.strip() in "1234567"
    )
    namespaces = "for n in user pid mnt net ipc uts cgroup; do readlink /proc/self/ns/$n; done"
    one, two = (set(sandbox.run(namespaces).stdout.split()) for sandbox in (function, container))
    ours = {os.readlink(f"/proc/self/ns/{name}") for name in ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup")}
    assert len(one) == len(two) == 7 and not one & two and not (one | two) & ours


def test_the_filter_lets_ordinary_programs_work(sandbox):
    programs = (
        "awk 'BEGIN{print 6*7}'; echo b a | tr ' ' '\\n' | sort; date +%Y >/dev/null; seq 3 | xargs -n1 echo; tar --version"
    )
    result = sandbox.run(programs)
    assert result.stdout.startswith("42\na\nb\n1\n2\n3\n") and result.stderr == ""
    source = """
import asyncio, concurrent.futures, hashlib, multiprocessing, sqlite3, subprocess, tempfile, ssl
print(sqlite3.connect('/workspace/x.db').execute('select 6*7').fetchone()[0])
print(subprocess.run(['echo', 'sub'], capture_output=True, text=True).stdout.strip())
async def main():
    process = await asyncio.create_subprocess_exec('echo', 'async', stdout=subprocess.PIPE)
    return (await process.communicate())[0].decode().strip()
print(asyncio.run(main()))
with multiprocessing.get_context('fork').Pool(2) as pool:
    print(pool.map(abs, [-1, -2]))
"""
    result = sandbox.python(source)
    assert result.stdout == "42\nsub\nasync\n[1, 2]\n", result.stderr
    sandbox.run("rm -f /workspace/x.db")
