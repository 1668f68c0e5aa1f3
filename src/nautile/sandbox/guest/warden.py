"""The process beside a virtual machine: starts its emulator, serves its disks, and ends everything when its client is gone.

It is started with its request on descriptor 0, a socket whose other end the client holds for as long as the machine shall
live. Standard library only, and few modules, since every machine waits for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket

from nautile.sandbox.guest.blocks import Disk, Export
from nautile.sandbox.inside import frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

__all__ = ["copy_sparse", "main"]

_SAID = 4000  # bytes of the emulator's last words that are kept
_PIECE = 2**20


def main() -> None:
    """Serve one machine to its end."""
    lease = socket.socket(fileno=os.dup(0))
    lease.set_inheritable(False)
    message = frames.receive(lease)
    if message is None:
        return
    request = message[0]
    exports = {}
    for one in request["exports"]:
        channel = socket.socket(fileno=one["descriptor"])
        channel.set_inheritable(False)
        exports[one["descriptor"]] = Export(channel, Disk(one["index"]))
    said, say = os.pipe()
    child = os.fork()
    if child == 0:
        _become(request, say)
    os.close(say)
    for descriptor in request["emulator"]:
        os.close(descriptor)
    status, words = _watch(lease, exports, child, said)
    _report(lease, status, words)
    if status is None:
        _tidy(request["groups"])


def _become(request: dict[str, Any], say: int) -> NoReturn:
    """Enter the group, copy the memory there so that it counts as the machine's, and become the emulator."""
    try:
        for entrance in request["entrances"]:
            descriptor = os.open(entrance, os.O_WRONLY)
            os.write(descriptor, b"0")
            os.close(descriptor)
        if request["memory"] is not None:
            copy_sparse(*request["memory"])
        null = os.open("/dev/null", os.O_RDWR)
        for source, target in ((null, 0), (null, 1), (say, 2)):
            os.dup2(source, target)
        for descriptor in request["emulator"]:
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFD)
            fcntl.fcntl(descriptor, fcntl.F_SETFD, flags & ~fcntl.FD_CLOEXEC)
        os.execve(request["argv"][0], request["argv"], {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    except BaseException as error:
        os.write(2, str(error).encode())
    finally:
        os._exit(125)


def copy_sparse(source: int, target: int) -> None:
    """Copy a sparse file into an empty one, holes left out."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError:  # nothing but a hole is left
            return
        end = os.lseek(source, at, os.SEEK_HOLE)
        os.lseek(target, at, os.SEEK_SET)
        while at < end:
            at += os.sendfile(target, source, at, min(end - at, 16 * _PIECE))


def _watch(lease: socket.socket, exports: dict[int, Export], child: int, said: int) -> tuple[int | None, bytes]:
    """Serve until the emulator ends (its status, its last words) or the client hangs up (None)."""
    pidfd = os.pidfd_open(child)
    poll = select.poll()
    for descriptor in (lease.fileno(), pidfd, said, *exports):
        poll.register(descriptor, select.POLLIN)
    words = b""
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if said in ready:
            data = os.read(said, 4096)
            words = (words + data)[-_SAID:]
            if not data:
                poll.unregister(said)
        if lease.fileno() in ready:
            _kill(child)
            return None, words
        if pidfd in ready:
            while select.select([said], [], [], 0)[0] and (data := os.read(said, 4096)):
                words = (words + data)[-_SAID:]
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), words
        for descriptor in ready & exports.keys():
            if not _served(exports[descriptor]):
                poll.unregister(descriptor)
                exports.pop(descriptor).channel.close()


def _kill(child: int) -> None:
    """Kill bubblewrap and collect QEMU, which becomes our child then."""
    from nautile.sandbox import kernel  # noqa: PLC0415  # only at the end: a start must not wait for it

    kernel.adopt_orphans()
    os.kill(child, signal.SIGKILL)
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        return


def _served(export: Export) -> bool:
    try:
        return export.serve()
    except OSError:
        return False


def _report(lease: socket.socket, status: int | None, words: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody may be there any more
        frames.send(lease, {"ended": status}, words)


def _tidy(groups: list[str]) -> None:
    """Kill and remove the machine's groups: its client may have been killed and cannot."""
    from pathlib import Path  # noqa: PLC0415

    from nautile.sandbox import cgroup  # noqa: PLC0415  # only at the end: a start must not wait for it

    for group in groups:
        cgroup.kill_group(Path(group))
        cgroup.remove_group(Path(group))
        for above in (Path(group).parent, Path(group).parent.parent):
            try:
                above.rmdir()
            except OSError:
                break


if __name__ == "__main__":
    main()
