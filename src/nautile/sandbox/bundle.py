"""What a container is told to be: its OCI configuration, the skeleton of a system without an image, and its first process."""

from __future__ import annotations

import os
import platform
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

from nautile.sandbox.errors import SubstrateUnavailable
from nautile.sandbox.function import MASKED, MASKED_DIRECTORIES

__all__ = ["TENANT", "configuration", "furnish", "init_program", "share", "skeleton"]

TENANT = 1000  # user and group id of commands inside
_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_BOUND = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/ssl/certs")
_DEVICES = ("full", "null", "random", "tty", "urandom", "zero")
_DEVICE_LINKS = {
    "core": "/proc/kcore",
    "fd": "/proc/self/fd",
    "ptmx": "pts/ptmx",
    "stderr": "/proc/self/fd/2",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
}
_PASSWD = (
    "root:x:0:0:root:/root:/bin/sh\nagent:x:1000:1000:agent:/workspace:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
)
_GROUP = "root:x:0:\ntty:x:5:\nagent:x:1000:\nnogroup:x:65534:\n"


def init_program() -> bytes:
    """An ELF program that ignores SIGCHLD, so that orphans need no collecting, and then sleeps for ever.

    It is process 1 of a container and needs nothing of an image. It gives its stack back, which it never uses, with the page
    tables that lead there: what stays is the page that it runs from. (Where the kernel seals the vDSO the call is refused, and
    it sleeps with them.) Its arguments go with the stack: it is known by its name, ``init``.
    """
    if platform.machine() != "x86_64":
        why = f"there is no first process for {platform.machine()} yet"
        raise SubstrateUnavailable("container", why, "use kind='function'")
    code = bytes.fromhex(
        "488d3539000000"  # lea rsi, [rip+57]   the action below
        "bf11000000"  # mov edi, 17             SIGCHLD
        "31d2"  # xor edx, edx
        "41ba08000000"  # mov r10d, 8
        "b80d000000"  # mov eax, 13             rt_sigaction
        "0f05"  # syscall
        "bf00000010"  # mov edi, 0x10000000     above this program
        "48be00f0ffefff7f0000"  # mov rsi, 0x7fffeffff000: up to the end of the address space
        "b80b000000"  # mov eax, 11             munmap
        "0f05"  # syscall
        "b822000000"  # mov eax, 34             pause
        "0f05"  # syscall
        "ebf7"  # jmp to the mov
        "660f1f440000"  # alignment
    )
    action = struct.pack("<QQQQ", 1, 0, 0, 0)  # SIG_IGN
    base, offset = 0x400000, 64 + 56
    size = offset + len(code) + len(action)
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + offset, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096)
    return identity + header + segment + code + action


def skeleton(place: Path) -> None:
    """Make the directories and files that a system on the host's /usr needs, owned by root, /workspace by the tenant."""
    for name in ("etc", "usr", "dev", "proc", "root", "run", "var/tmp", "tmp", "workspace"):
        (place / name).mkdir(parents=True, exist_ok=True)
    for name in _LINKS:
        link = Path("/", name)
        if link.is_symlink():
            (place / name).symlink_to(os.readlink(link))
        elif link.is_dir():
            (place / name).mkdir()
    for path in _BOUND:
        target = place / path[1:]
        if Path(path).is_dir():
            target.mkdir(parents=True)
        elif Path(path).exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
    texts = {"passwd": _PASSWD, "group": _GROUP, "hostname": "sandbox\n", "resolv.conf": "", "machine-id": ""}
    texts |= {
        "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    }
    for name, text in texts.items():
        (place / "etc" / name).write_text(text)
    for name in ("tmp", "var/tmp"):
        (place / name).chmod(0o1777)
    (place / "root").chmod(0o700)


@lru_cache(maxsize=1)
def _masked() -> list[str]:
    """What of /proc to hide: what others than its owner may read. Its owner is the host's root, whom no container maps."""
    paths = [f"/proc/{name}" for name in (*MASKED, *MASKED_DIRECTORIES)]
    return [path for path in paths if os.path.exists(path) and os.stat(path).st_mode & 0o004]


def configuration(
    root: Path, init: Path, host_usr: bool, users: list[dict[str, int]], shm: int, workspace: str | None
) -> dict[str, Any]:
    """The OCI configuration (runtime-spec 1.0).

    ``users``: the id mappings of its user namespace; ``shm``: bytes of /dev/shm; ``workspace``: a directory for /workspace.
    """
    safe = ["nosuid", "nodev"]
    mounts: list[dict[str, Any]] = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": [*safe, "noexec"]},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536"],
        },
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
        },
        {
            "destination": "/dev/shm",
            "type": "tmpfs",
            "source": "shm",
            "options": [*safe, "noexec", "mode=1777", f"size={shm}", "nr_inodes=4096"],
        },
        {"destination": "/dev/init", "type": "bind", "source": str(init), "options": ["bind", "ro", *safe]},
    ]
    if host_usr:
        links = [f"/{name}" for name in _LINKS if not Path("/", name).is_symlink()]
        for path in ("/usr", *links, *_BOUND):
            if os.path.exists(path):
                mounts.append({"destination": path, "type": "bind", "source": path, "options": ["rbind", "ro", *safe]})
    if workspace is not None:
        mounts.append({"destination": "/workspace", "type": "bind", "source": workspace, "options": ["bind", "rw", *safe]})
    nothing: dict[str, list[str]] = {name: [] for name in ("bounding", "effective", "inheritable", "permitted", "ambient")}
    return {
        "ociVersion": "1.0.0",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": ["/dev/init"],
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "capabilities": nothing,
            "noNewPrivileges": True,
        },
        "root": {"path": str(root), "readonly": False},
        "hostname": "sandbox",
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": name} for name in ("pid", "network", "ipc", "uts", "mount", "user", "cgroup")],
            "uidMappings": users,
            "gidMappings": users,
            "maskedPaths": _masked(),
            "readonlyPaths": ["/proc/sys"],
        },
    }


def furnish(place: Path) -> None:
    """Make what every container of a keeper sees and none can change: process 1 and /dev in ``place``, an empty directory."""
    devices = place / "dev"
    for directory in (place, devices, devices / "pts", devices / "shm", place / "nothing"):
        directory.mkdir()
        directory.chmod(0o755)
    for name in _DEVICES:  # the places at which the host's devices are mounted
        (devices / name).touch()
    for name, target in _DEVICE_LINKS.items():
        (devices / name).symlink_to(target)
    (devices / "init").write_bytes(init_program())
    (devices / "init").chmod(0o755)


def share(told: dict[str, Any], place: Path, shm: Path) -> dict[str, Any]:
    """The same configuration with fewer file systems of its own.

    /dev and the directories that hide others are those of ``furnish`` in ``place``, read-only; /dev/shm is the directory
    ``shm``. For each file system that is mounted anywhere the kernel keeps a word in every memory group, so what n containers
    need grows with n times the file systems of each.
    """
    read_only = ["bind", "ro", "nosuid", "nodev"]

    def bind(source: str | Path, target: str, options: list[str]) -> dict[str, Any]:
        return {"destination": target, "type": "bind", "source": str(source), "options": options}

    replaced = {
        "/dev": [
            bind(place / "dev", "/dev", read_only),
            *(bind(f"/dev/{name}", f"/dev/{name}", ["bind", "ro", "nosuid", "noexec"]) for name in _DEVICES),
        ],
        "/dev/shm": [bind(shm, "/dev/shm", ["bind", "rw", "nosuid", "nodev", "noexec"])],
        "/dev/init": [],  # it is in /dev
    }
    mounts = [new for old in told["mounts"] for new in replaced.get(old["destination"], [old])]
    masked = told["linux"]["maskedPaths"]
    hidden = [path for path in masked if os.path.isdir(path)]
    mounts += [bind(place / "nothing", path, [*read_only, "noexec"]) for path in hidden]
    return {**told, "mounts": mounts, "linux": {**told["linux"], "maskedPaths": [one for one in masked if one not in hidden]}}
