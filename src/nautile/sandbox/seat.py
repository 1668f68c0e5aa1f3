"""A process that sits in a container's cgroups, so that what it starts is in them from the first instruction.

Moving a process into a version 1 cgroup waits for a grace period of the kernel, 10 ms and more; a fork inherits its groups for
nothing. The keeper therefore has seats made ahead: new groups without limits yet, and one process in each. A container takes
one; crun and every command are forks of it. It is outside of the container's namespaces, where no tenant can see it, and inside
its limits, so it only starts things, and ends them: who keeps their output is outside. The program is seat.c, or where there is
no compiler portable_seat.py, which does the same.

A request is one packet: a letter, and descriptors. ``w``: process 1 of the container, once. ``c``, ``r``, ``s`` (crun, a
command, a session): a channel, orders (a file in memory), and what the letter needs. The seat answers on the channel: ``p`` and
the name of the group that the new process is in; or ``e`` and why there is none, or ``d`` if the container has died; then, when
it has ended and everything that it left is dead, how. Whatever is sent to the channel, and its hang-up, ends it before.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nautile.sandbox import cgroup
from nautile.sandbox.errors import SandboxLost
from nautile.sandbox.orders import Orders
from nautile.sandbox.portable_seat import IDLE, REPORT, Entry, serve
from nautile.sandbox.state import Settings

__all__ = ["PROGRAM", "NotStarted", "Seat", "SeatGone", "Started", "know", "open_seat", "start"]

PROGRAM = Path(__file__).with_name("seat.c")
_ANSWER_LIMIT = 20.0  # seconds in which a seat must have begun something; it waits only for its own groups
_CONTROL = 3


@dataclass
class Seat:
    """The keeper's end: the name of its groups, and the socket."""

    name: str
    control: socket.socket


def open_seat(settings: Settings, name: str, entries: Mapping[str, Entry]) -> Seat:
    """Start a seat in the groups ``name``, which are made if they are not there. It ends when its control is closed.

    ``entries``: for the portable seat, what each letter becomes.
    """
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        if settings.seat is not None:
            argv = ["seat", str(os.getpid()), str(int(IDLE * 1000)), *_groups(settings.group(name))]
            actions = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), _CONTROL)]
            os.posix_spawn(f"/proc/self/fd/{settings.seat}", argv, {}, file_actions=actions)
        elif os.fork() == 0:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            serve(theirs, settings, name, entries)
    return Seat(name, mine)


def _groups(group: cgroup.Group) -> list[str]:
    """As seat.c wants them."""
    tracker, memory = group.tracker, True
    told = []
    for place, hierarchy in group.places.items():
        flags = "2" if hierarchy.version == 2 else "1"
        if place == tracker:
            flags += "t"
        if memory and "memory" in hierarchy.controllers:
            flags, memory = flags + "m", False
        told.append(f"{flags}:{place}")
    return told


class SeatGone(Exception):  # noqa: N818
    """The seat has ended: nobody needed it, or the kernel killed it. Nothing was begun: ask again, for another seat."""


class NotStarted(Exception):  # noqa: N818
    """The container has no room for a process: an outcome of the command, not a failure of ours."""


class Started:
    """What a seat has started, for who asked: as ``supervise`` needs it. ``pidfd``: readable when it has ended.

    ``lost``: the seat was killed, and what was started may still run in its group.
    """

    def __init__(self, channel: socket.socket, group: str) -> None:
        self.pidfd, self.group = channel.detach(), group
        self.over = self.asked = self.lost = self.memory_killed = self.stuck = self.died = False

    def kill(self) -> None:
        """End it, with everything that it has started. Not after ``collect``, nor after ``pidfd`` was closed."""
        with contextlib.suppress(OSError):
            if not self.asked:
                os.write(self.pidfd, b"k")
        self.asked = True

    def collect(self) -> int:
        """Its wait status, once its pidfd is readable; as if it had been killed when its seat was."""
        data = b""
        with contextlib.suppress(OSError):
            try:
                data = os.read(self.pidfd, REPORT.size)
            except ConnectionResetError:  # it had ended when it was to be killed: that was not read, and what it told is there
                data = os.read(self.pidfd, REPORT.size)
        self.over, self.lost = True, len(data) != REPORT.size
        if self.lost:
            return signal.SIGKILL
        status, *flags = REPORT.unpack(data)
        self.memory_killed, self.stuck, self.died = map(bool, flags)
        return int(status)

    def wait(self, seconds: float) -> int | None:
        """Its wait status; None if it had to be killed after so long. Closes what it holds."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        try:
            ended = poll.poll(seconds * 1000)
            if not ended:
                self.kill()
                poll.poll(_ANSWER_LIMIT * 1000)
            status = self.collect()
        finally:
            os.close(self.pidfd)
        return status if ended else None


def know(control: socket.socket, pidfd: int) -> None:
    """Tell a seat its container's process 1: before the first command."""
    with contextlib.suppress(OSError):
        _send(control, "w", [pidfd])


def _send(control: socket.socket, letter: str, descriptors: Sequence[int]) -> None:
    control.sendmsg([letter.encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])


def start(control: socket.socket, letter: str, orders: Orders, descriptors: Sequence[int]) -> Started:
    """Let a seat start something. Raises SeatGone, NotStarted, SandboxLost."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # the answer and the end may come at once
    file = orders.write()
    try:
        with theirs:
            _send(control, letter, [theirs.fileno(), file, *descriptors])
        mine.settimeout(_ANSWER_LIMIT)
        mark = mine.recv(256)
        mine.settimeout(None)
    except (BrokenPipeError, ConnectionResetError) as error:
        mine.close()
        raise SeatGone from error
    except OSError as error:
        mine.close()
        raise SandboxLost(f"the process that starts commands in the container does not answer ({error})") from None
    finally:
        os.close(file)
    if mark[:1] == b"p":
        return Started(mine, mark[1:].decode())
    mine.close()
    if mark[:1] == b"e":
        raise NotStarted(mark[1:].decode("utf-8", "replace"))
    if mark[:1] == b"d":
        raise SandboxLost("the container has died")
    raise SandboxLost("the process that starts commands in the container has ended before it answered")
