"""What the keeper makes ahead when nobody asks for anything: processes for the next requests, seats, whole containers.

A clerk is a fork that waits for a request: the fork itself, and the first touch of every page, are then over. A spare container
has the layers and the size of disk of the one that was made last; it gets the limits and the name of the next one like it. What
differs is made when it is asked for. All of it ends when it has not been needed for some seconds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nautile.sandbox import cgroup
from nautile.sandbox.inside import frames
from nautile.sandbox.inside.supervise import Capture
from nautile.sandbox.limits import Limits
from nautile.sandbox.operations import Task
from nautile.sandbox.seat import Seat

__all__ = ["SPARE_IDLE", "Clerk", "Spare", "Spares", "kind_of", "receive_task", "rehearse", "send_task"]

_LARGEST = 2**16  # bytes of a request that a clerk takes; larger ones get a fork of their own, which has read them already
_CLERKS, _SEATS, _CONTAINERS = 2, 2, 2
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
        if len(self.seats) < _SEATS:
            return "seat"
        if self.pattern is not None and sum(one.key == kind_of(self.pattern) for one in self.containers) < _CONTAINERS:
            return "container"
        return None

    def take(self, request: dict[str, Any], usable: Callable[[Spare], bool]) -> Spare | None:
        """A spare container for this creation."""
        for spare in self.containers:
            if spare.made and spare.key == kind_of(request) and usable(spare):
                self.containers.remove(spare)
                return spare
        return None


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


def send_task(clerk: Clerk, task: Task) -> bool:
    """Give a clerk its task. False if it cannot take it."""
    header = {"request": task.request, "channel": task.channel is not None, "seat": task.seat and task.seat.name}
    text = json.dumps(header).encode()
    packet = len(text).to_bytes(4, "little") + text + task.body
    if len(packet) > _LARGEST:
        return False
    descriptors = [] if task.channel is None else [task.channel.fileno()]
    descriptors += [] if task.seat is None else [task.seat.control.fileno()]
    try:
        socket.send_fds(clerk.channel, [packet], descriptors)
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
    channel.close()
    length = int.from_bytes(packet[:4], "little")
    header = json.loads(packet[4 : 4 + length])
    sockets = [socket.socket(fileno=one) for one in descriptors]
    seat = None if header["seat"] is None else Seat(header["seat"], sockets[-1])
    return Task(header["request"], packet[4 + length :], sockets[0] if header["channel"] else None, seat)
