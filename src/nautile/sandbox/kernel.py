"""System calls that Python does not offer, by number, for 64-bit x86 and ARM. Every one raises OSError when it fails."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct

__all__ = [
    "adopt_orphans",
    "become",
    "forget_dump",
    "fork_into",
    "idmap",
    "load_seccomp",
    "mount",
    "move_mount",
    "open_beneath",
    "open_tree",
    "set_namespaces",
    "unmount",
    "unshare",
    "without_programs",
]

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_SLAVE, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 19, 1 << 18
MNT_DETACH = 2

RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_MAGICLINKS = 0x08, 0x04, 0x02

# The same numbers on both machines: calls newer than 2019 are numbered alike everywhere.
_OPEN_TREE, _MOVE_MOUNT, _CLONE3, _OPENAT2, _MOUNT_SETATTR = 428, 429, 435, 437, 442
_CLONE_PIDFD, _CLONE_INTO_CGROUP, _SIGCHLD = 0x1000, 0x2_0000_0000, 17
_CAPSET = {"x86_64": 126, "aarch64": 91}
_AT_EMPTY_PATH, _AT_RECURSIVE, _OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 0x1000, 0x8000, 1, 4
_MOUNT_ATTR_IDMAP, _MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOEXEC = 0x00100000, 0x1, 0x8
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP, _PR_SET_SECCOMP, _PR_CAP_AMBIENT = 4, 38, 24, 22, 47
_PR_SET_CHILD_SUBREAPER = 36
_LAST_CAPABILITY = 63

_libc = ctypes.CDLL(None, use_errno=True)
_held = ctypes.PyDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(what: str, number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    given = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return _check(int(_libc.syscall(ctypes.c_long(number), *given)), what)


def unshare(flags: int) -> None:
    """New namespaces for this process."""
    _check(_libc.unshare(flags), "unshare")


def fork_into(group: int | None) -> tuple[int, int]:
    """Fork, into the version 2 cgroup behind ``group`` if it is given. (0, -1) in the child, (process, pidfd) in the parent.

    clone3(2) as fork(2) uses it. The child must exec or leave with ``os._exit``: threads would be confused.
    """
    pidfd = ctypes.c_int(-1)
    flags = _CLONE_PIDFD | (0 if group is None else _CLONE_INTO_CGROUP)
    arguments = struct.pack("<11Q", flags, ctypes.addressof(pidfd), 0, 0, _SIGCHLD, 0, 0, 0, 0, 0, group or 0)
    buffer = ctypes.create_string_buffer(arguments, len(arguments))
    python = ctypes.pythonapi
    python.PyOS_BeforeFork()
    # With the interpreter's lock held, which a call through _libc would give up.
    process = int(_held.syscall(ctypes.c_long(_CLONE3), buffer, ctypes.c_long(len(arguments))))
    if process == 0:
        python.PyOS_AfterFork_Child()
        return 0, -1
    python.PyOS_AfterFork_Parent()
    return _check(process, "clone3"), pidfd.value


def set_namespaces(descriptor: int, flags: int) -> None:
    """Enter namespaces of the process behind a pidfd, several at once, or the one behind a namespace file."""
    _check(_libc.setns(descriptor, flags), "setns")


def mount(source: str, target: str, kind: str | None, flags: int = 0, options: str = "") -> None:
    """mount(2)."""
    encode = os.fsencode
    _check(
        _libc.mount(encode(source), encode(target), encode(kind) if kind else None, ctypes.c_ulong(flags), encode(options)),
        f"mount {kind or 'change'} on {target}",
    )


def unmount(target: str, flags: int = MNT_DETACH) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), f"unmount {target}")


def idmap(source: str, target: str, users: int, *, writable: bool = False) -> None:
    """Bind ``source`` at ``target``, its owners shifted by the map of the user namespace behind ``users``."""
    tree = open_tree(source)
    try:
        wanted = _MOUNT_ATTR_IDMAP | (0 if writable else _MOUNT_ATTR_RDONLY)
        attributes = struct.pack("<QQQQ", wanted, 0, 0, users)
        buffer = ctypes.create_string_buffer(attributes, len(attributes))
        _syscall("mount_setattr", _MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, buffer, len(attributes))
        move_mount(tree, target)
    finally:
        os.close(tree)


def open_tree(source: str) -> int:
    """A descriptor of a copy of the mount at ``source``, which is nowhere yet."""
    return _syscall("open_tree", _OPEN_TREE, -100, os.fsencode(source), _OPEN_TREE_CLONE | os.O_CLOEXEC)


def without_programs(tree: int) -> None:
    """Nothing in what ``open_tree`` gave can be executed, wherever it is put."""
    attributes = struct.pack("<QQQQ", _MOUNT_ATTR_NOEXEC, 0, 0, 0)
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    _syscall("mount_setattr", _MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, buffer, len(attributes))


def move_mount(tree: int, target: str) -> None:
    """Put what ``open_tree`` gave at a place of this process's mount namespace."""
    _syscall("move_mount", _MOVE_MOUNT, tree, b"", -100, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)


def open_beneath(directory: int, path: str, flags: int, mode: int = 0) -> int:
    """Open ``path`` below a directory; it can neither leave it nor lead through a symbolic link, whatever changes meanwhile."""
    how = struct.pack("<QQQ", flags | os.O_CLOEXEC, mode, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS)
    buffer = ctypes.create_string_buffer(how, len(how))
    return _syscall("openat2", _OPENAT2, directory, os.fsencode(path), buffer, len(how))


def forget_dump() -> None:
    """No other process of the same user may read this one's memory or descriptors; children inherit that until they exec."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")


def adopt_orphans() -> None:
    """Descendants whose parents end become children of this process."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def become(user: int, group: int) -> None:
    """Be ``user`` with no capability now or after any exec. Needs the right to do so in the current user namespace."""
    for capability in range(_LAST_CAPABILITY + 1):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # past the last that the kernel has
    _libc.prctl(_PR_CAP_AMBIENT, 4, 0, 0, 0)
    with contextlib.suppress(PermissionError):
        os.setgroups([])  # an ordinary user's namespace forbids it to everybody; that user's groups then stay
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)
    header = ctypes.create_string_buffer(struct.pack("<Ii", 0x20080522, 0), 8)
    nothing = ctypes.create_string_buffer(24)
    _syscall("capset", _CAPSET[platform.machine()], header, nothing)
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


def load_seccomp(program: bytes) -> None:
    """Bind this process and its children to a filter for ever."""
    buffer = ctypes.create_string_buffer(program, len(program))
    filled = _Program(len(program) // 8, ctypes.addressof(buffer))
    _check(_libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(filled), 0, 0), "seccomp")
