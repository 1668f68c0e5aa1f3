"""What the keeper makes ahead when nobody asks for anything: processes for the next requests, seats, whole containers.

A clerk is a fork that waits for a request: the fork itself, and the first touch of every page, are then over. A crew makes and
ends containers, each of its members one after the other. A spare container has the layers and the size of disk of the one that
was made last; it gets the limits and the name of the next one like it. What differs is made when it is asked for. All of it
ends when it has not been needed for some seconds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nautile.sandbox import cgroup
from nautile.sandbox.inside import frames
from nautile.sandbox.inside.supervise import Capture
from nautile.sandbox.limits import Limits
from nautile.sandbox.operations import Task
from nautile.sandbox.seat import Seat

__all__ = ["SPARE_IDLE", "Clerk", "Crew", "Spare", "Spares", "kind_of", "receive_task", "rehearse", "send_task", "sockets_of"]

_LARGEST = 2**16  # bytes of a request that a clerk takes; larger ones get a fork of their own, which has read them already
_CLERKS, _SEATS, _CONTAINERS = 2, 8, 2
_MOST_CONTAINERS = 4  # of all kinds
SPARE_IDLE = 10.0  # seconds after which what nobody has needed ends


@dataclass
class Clerk:
    """A process that waits for one task."""

    process: int
    channel: socket.socket


@dataclass
class Spare:
    """A container that nobody has asked for yet; ``made`` when its maker has ended well."""

    key: str
    identity: str
    seat: Seat
    made: bool = False


@dataclass
class Spares:
    """What there is, and what is wanted."""

    clerks: list[Clerk] = field(default_factory=list)
    seats: list[Seat] = field(default_factory=list)
    containers: list[Spare] = field(default_factory=list)
    pattern: dict[str, Any] | None = None  # the last creation that a spare could have served
    used: float = field(default_factory=time.monotonic)  # when something was asked for
    created: float = field(default_factory=time.monotonic)  # when a container was

    def note(self, request: dict[str, Any]) -> None:
        """A creation has been asked for: more like it may follow."""
        self.created = time.monotonic()
        self.pattern = request if kind_of(request) else None

    def missing(self) -> str | None:
        """What to make next: a clerk, a seat, a container; None when there is enough for what was asked for lately."""
        now = time.monotonic()
        if len(self.clerks) < _CLERKS and now - self.used < SPARE_IDLE:
            return "clerk"
        if now - self.created > SPARE_IDLE:
            return None
        if self.seats_missing:
            return "seat"
        if self.pattern is not None and sum(one.key == kind_of(self.pattern) for one in self.containers) < _CONTAINERS:
            return "container"
        return None

    def surplus(self) -> list[Spare]:
        """Take out the oldest of other kinds than the last when there are too many: callers whose sizes change all the time."""
        last = kind_of(self.pattern) if self.pattern is not None else None
        others = [one for one in self.containers if one.made and one.key != last]
        found = others[: max(len(self.containers) - _MOST_CONTAINERS, 0)]
        for one in found:
            self.containers.remove(one)
        return found

    @property
    def seats_missing(self) -> bool:
        """Whether more are wanted. A new one waits for its groups, which costs nothing but time."""
        return len(self.seats) < _SEATS

    def take(self, request: dict[str, Any], usable: Callable[[Spare], bool]) -> Spare | None:
        """A spare container for this creation."""
        for spare in self.containers:
            if spare.made and spare.key == kind_of(request) and usable(spare):
                self.containers.remove(spare)
                return spare
        return None


class Crew:
    """Up to ``most`` processes that carry out tasks one after the other; further tasks wait. ``fork`` makes one.

    ``watch`` and ``forget`` are told which descriptors to look at; ``hear`` is to be called when one can be read.
    """

    def __init__(
        self, most: int, fork: Callable[[socket.socket], int], watch: Callable[[int], None], forget: Callable[[int], None]
    ) -> None:
        self.most, self.fork, self.watch, self.forget = most, fork, watch, forget
        self.members: dict[int, Clerk] = {}  # by their channels
        self.idle: list[int] = []
        self.tasks: dict[int, Spare | None] = {}  # under way: for whom
        self.waiting: deque[tuple[Task, Spare | None]] = deque()

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return bool(self.tasks or self.waiting)

    def give(self, task: Task, spare: Spare | None = None) -> bool:
        """Let a task be carried out, now or when somebody is free; False if it is too large. Its sockets stay the caller's."""
        while self.idle or len(self.members) < self.most:
            if not self.idle:
                self._hire()
            member = self.idle.pop()
            if send_task(self.members[member], task):
                self.tasks[member] = spare
                return True
            if not too_large(task):  # it has died
                self._dismiss(member)
                continue
            self.idle.append(member)
            return False
        if too_large(task):
            return False
        channel = None if task.channel is None else task.channel.dup()
        seat = None if task.seat is None else Seat(task.seat.name, task.seat.control.dup())
        self.waiting.append((Task(task.request, task.body, channel, seat), spare))
        return True

    def hear(self, member: int) -> list[Spare]:
        """A member has finished, or has died: the spare that it made, or tried to. Gives it the next task."""
        done = self.tasks.pop(member, None)
        if self.members[member].channel.recv(16):
            self.idle.append(member)
        else:
            self._dismiss(member)
        if self.waiting:
            task, spare = self.waiting.popleft()
            self.give(task, spare)
            for one in sockets_of(task):
                one.close()
        return [] if done is None else [done]

    def end(self) -> None:
        """Let the idle ones go."""
        for member in list(self.idle):
            self.idle.remove(member)
            self._dismiss(member)

    def _hire(self) -> None:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = self.fork(theirs)
        self.members[mine.fileno()] = Clerk(process, mine)
        self.idle.append(mine.fileno())
        self.watch(mine.fileno())

    def _dismiss(self, member: int) -> None:
        self.forget(member)
        self.members.pop(member).channel.close()


def kind_of(request: dict[str, Any]) -> str | None:
    """What a spare must have in common with a creation; None: this one is too special."""
    if request["rules"] is not None or request["workspace"] is not None:
        return None
    try:
        layers = [_identity(layer) for layer in request["layers"]]
    except OSError:  # the creation itself will say what is wrong
        return None
    limits = request["limits"]
    return json.dumps([layers, request["host_usr"], limits["disk"], limits["inodes"], limits["allow_unenforced"]])


def _identity(layer: str) -> list[str | int]:
    """A layer as it is now: a directory that was made again at the same path is another one, and a spare has the old one."""
    found = os.stat(layer)
    return [layer, found.st_dev, found.st_ino, found.st_mtime_ns]


def sockets_of(task: Task) -> list[socket.socket]:
    """What a task holds open: its channel, its seat."""
    found = [] if task.channel is None else [task.channel]
    return found if task.seat is None else [*found, task.seat.control]


def _packed(task: Task) -> bytes:
    header = {"request": task.request, "channel": task.channel is not None, "seat": task.seat and task.seat.name}
    text = json.dumps(header).encode()
    return len(text).to_bytes(4, "little") + text + task.body


def too_large(task: Task) -> bool:
    """Whether only a fork of its own can take it."""
    return len(_packed(task)) > _LARGEST


def send_task(clerk: Clerk, task: Task) -> bool:
    """Give a clerk its task. False if it cannot take it."""
    packet = _packed(task)
    if len(packet) > _LARGEST:
        return False
    try:
        socket.send_fds(clerk.channel, [packet], [one.fileno() for one in sockets_of(task)])
    except OSError:
        return False
    return True


def rehearse() -> None:
    """Touch what a request needs: the first touch of a page after a fork copies it, a millisecond in all."""
    limits = Limits()
    json.loads(json.dumps(dataclasses.asdict(limits)))
    cgroup.alive(cgroup.owner_name())
    Capture(limits.output)
    mine, theirs = socket.socketpair()
    with mine, theirs:
        frames.send(mine, {"argv": ["true"]}, b"x")
        frames.receive(theirs)


def receive_task(channel: socket.socket) -> Task | None:
    """A clerk's side; None when the keeper needs it no more."""
    packet, descriptors, _, _ = socket.recv_fds(channel, 2 * _LARGEST, 2, socket.MSG_CMSG_CLOEXEC)
    if not packet:
        return None
    length = int.from_bytes(packet[:4], "little")
    header = json.loads(packet[4 : 4 + length])
    sockets = [socket.socket(fileno=one) for one in descriptors]
    seat = None if header["seat"] is None else Seat(header["seat"], sockets[-1])
    return Task(header["request"], packet[4 + length :], sockets[0] if header["channel"] else None, seat)
