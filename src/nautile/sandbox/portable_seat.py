"""What seat.c does, in Python, for machines without a C compiler: a fork of the keeper that forks whatever is asked for."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import secrets
import select
import signal
import socket
import struct
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from nautile.sandbox import cgroup, kernel
from nautile.sandbox.orders import Orders
from nautile.sandbox.state import Settings

__all__ = ["IDLE", "REPORT", "Entry", "serve"]

Entry = Callable[[Orders, list[int]], NoReturn]  # descriptors: the container's process 1, then what the letter needs
REPORT = struct.Struct("<i???x")  # seat.c: struct report
IDLE = 10.0  # seconds without a request after which the seat of a container ends; the next request makes another
_GRACE = 4.5  # seconds that killed processes may take to be gone


def serve(control: socket.socket, settings: Settings, name: str, entries: Mapping[str, Entry]) -> NoReturn:
    """In a fork of the keeper: be the seat of the groups ``name``, until nobody can ask any more and everything has ended."""
    try:
        os.dup2(control.fileno(), 3, inheritable=False)
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
    """Wipe the command line and the environment that we were started with: a tenant sees our forks in its /proc."""
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    for begin, end in ((fields[45], fields[46]), (fields[47], fields[48])):  # arg_start and arg_end, env_start and env_end
        if int(begin):
            ctypes.memset(int(begin), 0, int(end) - int(begin))


@dataclass
class _Job:
    """A process that was started, who waits for it, and its group."""

    letter: str
    process: int
    pidfd: int
    channel: socket.socket
    place: Path | None
    kills: int
    killed: bool = False


class _Server:
    """The process itself."""

    def __init__(self, control: socket.socket, group: cgroup.Group, entries: Mapping[str, Entry]) -> None:
        self.control, self.group, self.entries = control, group, entries
        self.jobs: dict[int, _Job] = {}  # by its pidfd, and by its channel until that has asked for its end
        self.container = -1
        self.poll = select.poll()
        self.poll.register(control.fileno(), select.POLLIN)

    def serve(self) -> None:
        asked = True
        while asked or self.jobs:
            ready = self.poll.poll(None if self.jobs or self.container < 0 else IDLE * 1000)
            if not ready:  # nobody's request is lost: the next is refused
                self.control.shutdown(socket.SHUT_RD)
            for descriptor, _ in ready:
                job = self.jobs.get(descriptor)
                if job is not None and descriptor == job.pidfd:
                    self._finish(job)
                elif job is not None:
                    del self.jobs[descriptor]
                    self.poll.unregister(descriptor)
                    self._kill(job)
                elif descriptor == self.control.fileno() and not self._begin():
                    self.poll.unregister(descriptor)
                    asked = False

    def _begin(self) -> bool:
        """Start what the next packet asks for. False when there will be none."""
        data, descriptors, _, _ = socket.recv_fds(self.control, 16, 8, socket.MSG_CMSG_CLOEXEC)
        letter = data.decode()
        if letter == "w":
            self.container = descriptors.pop(0)
            with contextlib.suppress(OSError):  # it has died: the next request is told so
                kernel.set_namespaces(self.container, kernel.CLONE_NEWPID)
        elif letter:
            channel = socket.socket(fileno=descriptors.pop(0))
            try:
                if letter != "c" and self._died():
                    channel.send(b"d")
                else:
                    self._start(letter, channel, descriptors)
            except OSError as error:  # the container is full of processes, or is ending
                with contextlib.suppress(OSError):
                    channel.send(b"d" if self._died() else b"e" + (error.strerror or str(error)).encode()[:200])
        for descriptor in descriptors:
            os.close(descriptor)
        return bool(letter)

    def _died(self) -> bool:
        """Whether process 1 has ended, or has begun to: it then has a number, but no namespaces that could be entered."""
        if self.container < 0:
            return False
        told = dict(line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{self.container}").read_text().splitlines())
        try:
            return not cgroup.alive(cgroup.owner_name(int(told["Pid"])))
        except (OSError, KeyError):
            return True

    def _start(self, letter: str, channel: socket.socket, descriptors: list[int]) -> None:
        place, tracker, kills = None, self.group.tracker, self.group.memory_kills()
        if letter != "c" and tracker is not None:
            place = tracker / f"r{secrets.token_hex(6)}"
            place.mkdir()
        direct = place is not None and self.group.places[place.parent].version == 2
        try:
            process, pidfd = _fork(place if direct else None)
        except OSError:
            if place is not None:
                place.rmdir()
            raise
        if process == 0:
            self._become(letter, descriptors, None if direct else place)
        job = _Job(letter, process, pidfd, channel, place, kills)
        for descriptor in (pidfd, channel.fileno()):
            self.jobs[descriptor] = job
            self.poll.register(descriptor, select.POLLIN | select.POLLRDHUP)
        with contextlib.suppress(OSError):  # who asked has gone: its hang-up ends what was started
            channel.send(b"p" + (place.name if place is not None else "").encode())

    def _become(self, letter: str, descriptors: list[int], place: Path | None) -> NoReturn:
        """In the fork: only the descriptors that it needs, numbered 3 and up, and then what the letter says."""
        try:
            if place is not None:
                cgroup.enter(place / "cgroup.procs")
            orders = Orders.read(descriptors[0])
            kept = [*([] if letter == "c" else [self.container]), *descriptors[1:]]
            moved = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 200) for one in kept]
            for target, one in enumerate(moved, 3):
                os.dup2(one, target)
            os.closerange(3 + len(moved), 2**20)
            self.entries[letter](orders, list(range(3, 3 + len(moved))))
        except BaseException as error:
            os.write(2, f"sandbox: {error}\n".encode("utf-8", "replace"))
        finally:
            os._exit(125)

    def _kill(self, job: _Job) -> None:
        job.killed = True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(job.pidfd, signal.SIGKILL)
        if job.place is not None:
            cgroup.kill_group(job.place)

    def _finish(self, job: _Job) -> None:
        """It has ended: end what it has left, and tell."""
        for descriptor in (job.pidfd, job.channel.fileno()):
            if self.jobs.pop(descriptor, None) is not None:
                self.poll.unregister(descriptor)
        status = os.waitpid(job.process, 0)[1]
        os.close(job.pidfd)
        began = time.monotonic()
        if job.place is not None:
            cgroup.kill_group(job.place)
            cgroup.remove_group(job.place)
        elif job.letter != "c":
            self._kill_namespace()
        stuck = job.place is not None and job.place.exists() and time.monotonic() - began > _GRACE
        died = job.letter != "c" and self._died()
        with contextlib.suppress(OSError):
            job.channel.send(REPORT.pack(status, self.group.memory_kills() > job.kills, stuck, died))
        job.channel.close()

    def _kill_namespace(self) -> None:
        """Without groups nobody keeps track: whatever runs in the container but its process 1 ends, sessions too."""
        if self.container < 0:
            return
        child = os.fork()
        if child == 0:
            if os.getppid() == 0:  # our parent cannot be seen: this is the container's namespace and never our own
                with contextlib.suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)
            os._exit(0)
        os.waitpid(child, 0)


def _fork(place: Path | None) -> tuple[int, int]:
    """Fork, into a version 2 group if it is given."""
    if place is None:
        return kernel.fork_into(None)
    directory = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return kernel.fork_into(directory)
    finally:
        os.close(directory)
