"""A process that sits in a container's cgroups, so that what it starts is in them from the first instruction.

Moving a process into a version 1 cgroup waits for a grace period of the kernel, 10 ms and more; a fork inherits its groups for
nothing. The keeper therefore has seats made ahead: new groups without limits yet, and one process in each. A container takes
one; crun and every command are forks of it. It is outside of the container's namespaces, where no tenant can see it, and inside
its limits, so it only starts things: who waits for them and counts is outside. One that the kernel kills is replaced.

A request is one packet: the letter of what to start, and descriptors: a channel first, then what the letter needs. The new
process reads its orders from the channel itself, the seat never sees them. The seat answers there with a pidfd and the name of
the group that the process is in, then with its wait status. It forks the next one ahead: a stand-in, in a group of its own.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import os
import secrets
import select
import signal
import socket
import struct
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from nautile.sandbox import cgroup, kernel
from nautile.sandbox.errors import SandboxLost
from nautile.sandbox.state import Settings

__all__ = ["NotStarted", "Seat", "SeatGone", "Started", "open_seat", "start", "warm"]

Entry = Callable[[socket.socket, list[int]], NoReturn]
_STATUS = struct.Struct("<i")
_CALM = 0.003  # seconds without an event after which the next stand-in is made
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
        _forget_arguments()
        group = cgroup.Group.make(name, owner=settings.owner, found=settings.hierarchies)
        for entrance in group.entrances:
            cgroup.enter(entrance)
        _Server(socket.socket(fileno=3), group, entries).serve()
    except BaseException:
        traceback.print_exc()  # into the keeper's log; who asks sees a hang-up
    finally:
        os._exit(0)


def _forget_arguments() -> None:
    """Wipe the command line and the environment that we were started with: a tenant sees stand-ins in its /proc."""
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    for begin, end in ((fields[45], fields[46]), (fields[47], fields[48])):  # arg_start and arg_end, env_start and env_end
        if int(begin):
            ctypes.memset(int(begin), 0, int(end) - int(begin))


@dataclass(frozen=True)
class _Standin:
    """A process that waits to become something, and its group."""

    process: int
    pidfd: int
    channel: socket.socket
    group: str


class _Server:
    """The process itself."""

    def __init__(self, control: socket.socket, group: cgroup.Group, entries: Mapping[str, Entry]) -> None:
        self.control, self.group, self.entries = control, group, entries
        self.started: dict[int, tuple[int, socket.socket]] = {}  # pidfd: its process, and who waits for it
        self.standin: _Standin | None = None
        self.poll = select.poll()
        self.poll.register(control.fileno(), select.POLLIN)
        self.inside = False

    def serve(self) -> None:
        """Until nobody can ask any more and everything has ended."""
        asked, pause = True, _CALM
        while asked or self.started:
            short = asked and self.inside and self.standin is None
            ready = self.poll.poll(pause * 1000 if short else None)
            if short and not ready:
                with contextlib.suppress(OSError):  # the container is full of processes
                    self.standin = self._ahead()
                pause = _CALM if self.standin is not None else min(2 * pause, 1.0)
            for descriptor, _ in ready:
                if descriptor in self.started:
                    self._report(descriptor)
                elif not self._begin():
                    self.poll.unregister(self.control.fileno())
                    self.standin = None  # whose end of its channel is closed with that
                    asked = False

    def _begin(self) -> bool:
        """Start what the next packet asks for. False when there will be none."""
        data, descriptors, _, _ = socket.recv_fds(self.control, 16, 8, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return False
        with socket.socket(fileno=descriptors[0]) as channel:
            try:
                self._answer(data.decode(), channel, descriptors)
            except OSError as error:  # the container is full of processes, or has died
                with contextlib.suppress(OSError):
                    channel.send(b"e" + (error.strerror or str(error)).encode()[:200])
            finally:
                for descriptor in descriptors[1:]:
                    os.close(descriptor)
        return True

    def _answer(self, letter: str, channel: socket.socket, descriptors: list[int]) -> None:
        if letter == "c":  # crun makes the namespaces; everything else begins in them
            new: _Standin | None = self._fork(None)
        else:
            if not self.inside:
                kernel.set_namespaces(descriptors[1], kernel.CLONE_NEWPID)
                self.inside = True
            new = None  # for "w" the stand-in follows when it is calm
            if letter != "w":
                new, self.standin = self._waiting() or self._ahead(), None
        if new is not None:
            self._hand_over(new, letter, channel, descriptors)

    def _hand_over(self, new: _Standin, letter: str, channel: socket.socket, descriptors: list[int]) -> None:
        socket.send_fds(new.channel, [letter.encode()], descriptors)
        new.channel.close()
        self.started[new.pidfd] = (new.process, channel.dup())
        self.poll.register(new.pidfd, select.POLLIN)
        with contextlib.suppress(OSError):  # who asked has gone; what was started reads no orders and ends
            socket.send_fds(channel, [b"p" + new.group.encode()], [new.pidfd])

    def _waiting(self) -> _Standin | None:
        """The stand-in, unless the kernel has killed it at the memory limit."""
        if self.standin is not None and select.select([self.standin.pidfd], [], [], 0)[0]:
            os.waitpid(self.standin.process, 0)
            os.close(self.standin.pidfd)
            self.standin = None
        return self.standin

    def _ahead(self) -> _Standin:
        """A stand-in in a group of its own, for whatever is asked for next."""
        tracker = self.group.tracker
        if tracker is None:
            return self._fork(None)
        place = tracker / f"r{secrets.token_hex(6)}"
        place.mkdir()
        try:
            return self._fork(place)
        except OSError:
            place.rmdir()
            raise

    def _fork(self, place: Path | None) -> _Standin:
        direct = place is not None and self.group.places[place.parent].version == 2
        descriptor = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) if direct and place is not None else None
        with _channel() as (mine, theirs):
            try:
                process, pidfd = kernel.fork_into(descriptor)
            finally:
                if descriptor is not None:
                    os.close(descriptor)
            if process == 0:
                self._wait(theirs, None if direct else place)
        return _Standin(process, pidfd, mine, "" if place is None else place.name)

    def _wait(self, channel: socket.socket, place: Path | None) -> NoReturn:
        """In the fork: become what the seat says."""
        try:
            os.dup2(channel.fileno(), 3, inheritable=False)
            os.closerange(4, 2**20)
            if place is not None:
                cgroup.enter(place / "cgroup.procs")
            letter, descriptors, _, _ = socket.recv_fds(socket.socket(fileno=3), 16, 8, socket.MSG_CMSG_CLOEXEC)
            if letter:
                self.entries[letter.decode()](socket.socket(fileno=descriptors[0]), descriptors[1:])
        finally:
            os._exit(125)

    def _report(self, pidfd: int) -> None:
        process, channel = self.started.pop(pidfd)
        self.poll.unregister(pidfd)
        os.close(pidfd)
        with contextlib.suppress(OSError):
            channel.send(_STATUS.pack(os.waitpid(process, 0)[1]))
        channel.close()


class SeatGone(Exception):  # noqa: N818
    """The kernel has killed the seat, at the container's memory limit. Nothing was begun: ask again, for another seat."""


class NotStarted(Exception):  # noqa: N818
    """The container has no room for a process, or has died: an outcome of the command, not a failure of ours."""


class Started:
    """What a seat has started, for who asked: as ``supervise`` needs it."""

    def __init__(self, channel: socket.socket, pidfd: int, group: str) -> None:
        self.channel, self.pidfd, self.group = channel, pidfd, group
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


def warm(control: socket.socket, pidfd: int) -> None:
    """Let a seat make its stand-in for the container with this process 1, before anything is asked of it."""
    mine, theirs = socket.socketpair()
    with mine, theirs, contextlib.suppress(OSError):
        socket.send_fds(control, [b"w"], [theirs.fileno(), pidfd])


def start(control: socket.socket, letter: str, descriptors: Sequence[int], orders: Callable[[socket.socket], None]) -> Started:
    """Let a seat start something; ``orders`` writes to the channel what the new process reads. Raises SandboxLost."""
    try:
        with _channel() as (mine, theirs):
            passed = array.array("i", [theirs.fileno(), *descriptors])
            try:
                control.sendmsg([letter.encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)])
            except BrokenPipeError:
                raise SeatGone from None
            theirs.close()
            mine.settimeout(_ANSWER_LIMIT)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the answer says why nobody reads them
                orders(mine)
            mark, received, _, _ = socket.recv_fds(mine, 256, 1, socket.MSG_CMSG_CLOEXEC)
            if mark[:1] == b"e":
                raise NotStarted(mark[1:].decode("utf-8", "replace"))
            if mark[:1] != b"p" or len(received) != 1:
                raise ConnectionError("it hung up")
            return Started(mine, received[0], mark[1:].decode())
    except OSError as error:
        raise SandboxLost(f"the process that starts commands in the container has ended ({error})") from None
