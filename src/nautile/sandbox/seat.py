"""A process that sits in a container's cgroups, so that what it starts is in them from the first instruction.

Moving a process into a version 1 cgroup waits for a grace period of the kernel, 10 ms and more; a fork inherits its groups for
nothing. The keeper therefore has seats made ahead: new groups without limits yet, and one process in each. A container takes
one; crun and every command are forks of it. It is outside of the container's namespaces, where no tenant can see it, and inside
its limits, so it only starts things: who waits for them and counts is outside. One that the kernel kills is replaced.

A request is one packet: the letter of what to start, and descriptors: a channel first, then what the letter needs. The fork
reads its orders from the channel itself, the seat never sees them. The seat answers there with a pidfd, then with the status.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import signal
import socket
import struct
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from nautile.sandbox import cgroup, kernel
from nautile.sandbox.errors import SandboxLost
from nautile.sandbox.state import Settings

__all__ = ["Seat", "Started", "open_seat", "start"]

Entry = Callable[[socket.socket, list[int]], NoReturn]
_STATUS = struct.Struct("<i")
_ANSWER_LIMIT = 20.0  # seconds in which a seat must have begun something; it waits only for its own groups


@dataclass
class Seat:
    """The keeper's end: the name of its groups, the socket, and when it was last used."""

    name: str
    control: socket.socket
    used: float = field(default_factory=time.monotonic)


def open_seat(settings: Settings, name: str, entries: Mapping[str, Entry]) -> Seat:
    """Fork a seat in the groups ``name``, which are made if they are not there. It ends when its control is closed."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        return Seat(name, mine)
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(theirs.fileno(), 3)
        os.closerange(4, 2**20)
        group = cgroup.Group.make(name, owner=settings.owner, found=settings.hierarchies)
        for entrance in group.entrances:
            cgroup.enter(entrance)
        _Server(socket.socket(fileno=3), entries).serve()
    except BaseException:
        traceback.print_exc()  # into the keeper's log; who asks sees a hang-up
    finally:
        os._exit(0)


class _Server:
    """The process itself."""

    def __init__(self, control: socket.socket, entries: Mapping[str, Entry]) -> None:
        self.control, self.entries = control, entries
        self.started: dict[int, tuple[int, socket.socket]] = {}  # pidfd: its process, and who waits for it
        self.poll = select.poll()
        self.poll.register(control.fileno(), select.POLLIN)
        self.inside = False

    def serve(self) -> None:
        """Until nobody can ask any more and everything has ended."""
        asked = True
        while asked or self.started:
            for descriptor, _ in self.poll.poll():
                if descriptor in self.started:
                    self._report(descriptor)
                elif not self._begin():
                    self.poll.unregister(self.control.fileno())
                    asked = False

    def _begin(self) -> bool:
        """Start what the next packet asks for. False when there will be none."""
        data, descriptors, _, _ = socket.recv_fds(self.control, 16, 8, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return False
        letter, channel = data.decode(), socket.socket(fileno=descriptors[0])
        group = None
        if letter[0] != "c":  # crun makes the namespaces; everything else begins in them
            if not self.inside:
                kernel.set_namespaces(descriptors[1], kernel.CLONE_NEWPID)
                self.inside = True
            group = descriptors[2] if letter.endswith("+") else None
        process, pidfd = kernel.fork_into(group)
        if process == 0:
            self.control.close()
            self.entries[letter[0]](channel, descriptors[1:])
        for descriptor in descriptors[1:]:
            os.close(descriptor)
        self.started[pidfd] = (process, channel)
        self.poll.register(pidfd, select.POLLIN)
        with contextlib.suppress(OSError):  # who asked has gone; what was started reads no orders and ends
            socket.send_fds(channel, [b"p"], [pidfd])
        return True

    def _report(self, pidfd: int) -> None:
        process, channel = self.started.pop(pidfd)
        self.poll.unregister(pidfd)
        os.close(pidfd)
        with contextlib.suppress(OSError):
            channel.send(_STATUS.pack(os.waitpid(process, 0)[1]))
        channel.close()


class Started:
    """What a seat has started, for who asked: as ``supervise`` needs it."""

    def __init__(self, channel: socket.socket, pidfd: int) -> None:
        self.channel, self.pidfd = channel, pidfd
        self.lost = False

    def kill(self) -> None:
        """SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def collect(self) -> int:
        """Its wait status, once its pidfd says that it has ended; as if it had been killed when its seat was."""
        self.channel.settimeout(_ANSWER_LIMIT)
        data = b""
        with contextlib.suppress(OSError):
            data = self.channel.recv(_STATUS.size)
        self.channel.close()
        self.lost = len(data) != _STATUS.size
        return signal.SIGKILL if self.lost else int(_STATUS.unpack(data)[0])


@contextlib.contextmanager
def _channel() -> Iterator[tuple[socket.socket, socket.socket]]:
    mine, theirs = socket.socketpair()
    try:
        yield mine, theirs
    except BaseException:
        mine.close()
        raise
    finally:
        theirs.close()


def start(control: socket.socket, letter: str, descriptors: Sequence[int], orders: Callable[[socket.socket], None]) -> Started:
    """Let a seat start something; ``orders`` writes to the channel what the new process reads. Raises SandboxLost."""
    try:
        with _channel() as (mine, theirs):
            passed = array.array("i", [theirs.fileno(), *descriptors])
            control.sendmsg([letter.encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)])
            theirs.close()
            mine.settimeout(_ANSWER_LIMIT)
            orders(mine)
            mark, received, _, _ = socket.recv_fds(mine, 1, 1, socket.MSG_CMSG_CLOEXEC)
            if mark != b"p" or len(received) != 1:
                raise ConnectionError("it hung up")
            return Started(mine, received[0])
    except OSError as error:
        raise SandboxLost(f"the process that starts commands in the container has ended ({error})") from None
