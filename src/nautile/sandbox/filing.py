"""Files in a container: the keeper's fork enters it, becomes its tenant, and opens every path beneath the container's root.

What it can reach is therefore what the tenant can reach, and a path that leads through a symbolic link is refused, also one
that is swapped in while it is being opened. Only plain files and directories are read or made.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import stat
from collections.abc import Callable, Iterator
from typing import Any

from nautile.sandbox import cgroup, kernel
from nautile.sandbox.enter import step_inside
from nautile.sandbox.errors import FileRefused
from nautile.sandbox.inside import frames
from nautile.sandbox.state import State

__all__ = ["WHY", "serve"]

_CHUNK = 2**20
_MOST = 100_000  # entries of one directory, or of one tree
_DEEPEST = 64
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW
WHY = {
    errno.ELOOP: "its path leads through a symbolic link, which is not followed",
    errno.EXDEV: "its path leads out of the sandbox",
    errno.ENOENT: "it does not exist",
    errno.ENOTDIR: "a part of its path is not a directory",
    errno.EISDIR: "it is a directory",
    errno.EACCES: "the sandbox's user may not",
    errno.ENOSPC: "the sandbox's file system is full",
    errno.EROFS: "it is on a read-only file system",
}


def serve(state: State, request: dict[str, Any], channel: socket.socket, body: bytes) -> None:
    """Carry out one of read, write, list, upload, download. Raises FileRefused."""
    channel.settimeout(60.0)  # a client that does not read, or does not write, holds nothing
    for entrance in state.group.entrances:
        cgroup.enter(entrance)
    step_inside(state.open(), state.tenant)
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    os.umask(0)
    path = request["path"]
    operations: dict[str, Callable[[], None]] = {
        "read": lambda: _read(root, path, request["limit"], channel),
        "write": lambda: _write_one(root, path, request["mode"], body, channel),
        "list": lambda: _list(root, path, channel),
        "upload": lambda: _upload(root, path, channel),
        "download": lambda: _download(root, path, request["limit"], channel),
    }
    try:
        operations[request["op"]]()
    except OSError as error:
        if isinstance(error, TimeoutError | BrokenPipeError | ConnectionError):
            raise
        raise FileRefused("/" + path, WHY.get(error.errno or 0, os.strerror(error.errno or 0))) from None


@contextlib.contextmanager
def _opened(directory: int, path: str, flags: int) -> Iterator[int]:
    descriptor = kernel.open_beneath(directory, path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _plain(descriptor: int, path: str) -> os.stat_result:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise FileRefused("/" + path, "it is a directory" if stat.S_ISDIR(found.st_mode) else "it is not a plain file")
    return found


def _send_file(descriptor: int, channel: socket.socket, limit: int, path: str) -> int:
    total = 0
    while data := os.read(descriptor, _CHUNK):
        total += len(data)
        if total > limit:
            raise FileRefused("/" + path, f"it has more than {limit:,} bytes: raise limit=")
        frames.send(channel, {"data": True}, data)
    return total


def _read(root: int, path: str, limit: int, channel: socket.socket) -> None:
    with _opened(root, path, _READ) as descriptor:
        _plain(descriptor, path)
        _send_file(descriptor, channel, limit, path)
    frames.send(channel, {"done": True})


def _list(root: int, path: str, channel: socket.socket) -> None:
    entries = []
    with _opened(root, path, _READ | os.O_DIRECTORY) as descriptor, os.scandir(descriptor) as names:
        for entry in names:
            found = entry.stat(follow_symlinks=False)
            entries.append([os.fsencode(entry.name).decode("utf-8", "surrogateescape"), found.st_mode, found.st_size])
            if len(entries) > _MOST:
                raise FileRefused("/" + path, f"it has more than {_MOST:,} entries")
    frames.send(channel, {"entries": sorted(entries)})


def _parent(root: int, path: str) -> tuple[int, str]:
    """A descriptor of the directory above ``path``, made if need be, and the last name."""
    above, _, name = path.rpartition("/")
    if name in ("", "."):
        raise FileRefused("/" + path, "it is the root directory")
    current = os.dup(root)
    for step in above.split("/") if above else ():
        with contextlib.suppress(FileExistsError), contextlib.suppress(OSError):
            os.mkdir(step, 0o755, dir_fd=current)
        following = kernel.open_beneath(current, step, os.O_PATH | os.O_DIRECTORY)
        os.close(current)
        current = following
    return current, name


def _write_one(root: int, path: str, mode: int, body: bytes, channel: socket.socket) -> None:
    _store(root, path, mode, iter([body]))
    frames.send(channel, {"done": True})


def _store(root: int, path: str, mode: int, pieces: Iterator[bytes]) -> None:
    """Write a temporary file beside ``path`` and rename it: a reader sees the old file or the new one."""
    directory, name = _parent(root, path)
    temporary = f".nautile-{secrets.token_hex(8)}"
    made = False
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, mode, dir_fd=directory)
        made = True
        try:
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    view = view[os.write(descriptor, view) :]
        finally:
            os.close(descriptor)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        made = False
    finally:
        if made:
            os.unlink(temporary, dir_fd=directory)
        os.close(directory)


def _upload(root: int, path: str, channel: socket.socket) -> None:
    """Entries follow: {path, mode, directory}, then data, then {end}."""
    frames.send(channel, {"go": True})

    def pieces() -> Iterator[bytes]:
        while (message := frames.receive(channel)) is not None and "data" in message[0]:
            yield message[1]

    while (message := frames.receive(channel)) is not None and "entry" in message[0]:
        header = message[0]
        target = f"{path}/{header['entry']}".rstrip("/")
        if header["directory"]:
            above, name = _parent(root, target)
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, header["mode"], dir_fd=above)
            os.close(above)
        else:
            _store(root, target, header["mode"], pieces())
    frames.send(channel, {"done": True})


def _download(root: int, path: str, limit: int, channel: socket.socket) -> None:
    """Send {entry, mode, directory} and data for each plain file and directory; count what was left out."""
    counts = {"left_out": 0, "entries": 0, "bytes": 0}

    def one(directory: int, name: str, relative: str, depth: int) -> None:
        counts["entries"] += 1
        if counts["entries"] > _MOST or depth > _DEEPEST:
            raise FileRefused("/" + path, f"it has more than {_MOST:,} entries or {_DEEPEST} levels")
        try:
            descriptor = kernel.open_beneath(directory, name, _READ)
        except OSError as error:
            if not relative or error.errno not in (errno.ELOOP, errno.ENXIO, errno.EACCES, errno.ENOENT):
                raise
            counts["left_out"] += 1
            return
        try:
            found = os.fstat(descriptor)
            header = {"entry": relative, "mode": found.st_mode & 0o777, "directory": stat.S_ISDIR(found.st_mode)}
            if stat.S_ISDIR(found.st_mode):
                frames.send(channel, header)
                for below in sorted(os.listdir(descriptor)):
                    one(descriptor, below, f"{relative}/{below}" if relative else below, depth + 1)
            elif stat.S_ISREG(found.st_mode):
                frames.send(channel, header)
                counts["bytes"] += _send_file(descriptor, channel, limit - counts["bytes"], path)
            elif relative:
                counts["left_out"] += 1
            else:
                raise FileRefused("/" + path, "it is not a plain file")
        finally:
            os.close(descriptor)

    one(root, path, "", 0)
    frames.send(channel, {"done": True, "left_out": counts["left_out"]})
