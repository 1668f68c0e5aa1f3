"""Commands in a container: the keeper's fork enters its namespaces, gives up every right, and becomes the command.

From the moment it is inside until it has become the command it cannot be traced or read by the tenant (it is not dumpable),
and it holds no descriptor but the command's three and one for its own use.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import resource
import secrets
import signal
import socket
import struct
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from nautile.sandbox import cgroup, kernel
from nautile.sandbox.function import ENVIRONMENT
from nautile.sandbox.inside import frames
from nautile.sandbox.inside.supervise import Capture, Job, Outcome, execute, supervise
from nautile.sandbox.proxy import ENVIRONMENT as PROXIED
from nautile.sandbox.state import State

__all__ = ["outcome", "run", "session"]

_INSIDE = (
    kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
) | kernel.CLONE_NEWCGROUP
_TIOCGPTPEER, _TIOCSPTLCK = 0x5441, 0x40045431


class Run:
    """The group that keeps track of what one command starts."""

    def __init__(self, state: State) -> None:
        tracker = state.group.tracker
        self.place = tracker / f"r{secrets.token_hex(6)}" if tracker is not None else None
        self.entrances = [place / "cgroup.procs" for place in state.group.places if place != tracker]
        if self.place is not None:
            self.place.mkdir()
            self.entrances.append(self.place / "cgroup.procs")

    def kill(self) -> None:
        """End everything that the command has started."""
        if self.place is not None:
            cgroup.kill_group(self.place)
            return
        # Nobody can keep track without cgroups, which the caller allowed: whatever runs in the container ends, sessions too.
        child = os.fork()  # into the container's process namespace, which was set before the command
        if child == 0:
            if os.getppid() == 0:  # our parent cannot be seen: this is the container's namespace and never our own
                with contextlib.suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)
            os._exit(0)
        os.waitpid(child, 0)

    def remove(self) -> None:
        """Kill and forget."""
        self.kill()
        if self.place is not None:
            cgroup.remove_group(self.place)


@contextlib.contextmanager
def _tracked(state: State) -> Iterator[Run]:
    tracked = Run(state)
    try:
        yield tracked
    finally:
        tracked.remove()


def step_inside(state: State, pidfd: int, entrances: list[Path]) -> None:
    """Enter the container's groups and namespaces and become its tenant, without a right left. Cannot be undone."""
    for entrance in entrances:
        cgroup.enter(entrance)
    kernel.set_namespaces(pidfd, _INSIDE)
    os.close(pidfd)
    kernel.become(state.tenant, state.tenant)
    kernel.forget_dump()


def _start(state: State, pidfd: int, tracked: Run, request: dict[str, Any], program: bytes) -> NoReturn:
    os.setsid()
    step_inside(state, pidfd, tracked.entrances)
    os.closerange(3, 2**20)
    _exec(state, request, program)


def _exec(state: State, request: dict[str, Any], program: bytes) -> NoReturn:
    limits = state.limits
    for number, value in (
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, limits.disk),
    ):
        hard = resource.getrlimit(number)[1]
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (allowed, allowed))
    os.umask(0o022)
    os.chdir(request.get("cwd") or "/workspace")
    kernel.load_seccomp(program)
    proxied = PROXIED if state.network else {}
    execute(request["argv"], {**ENVIRONMENT, **proxied, **request.get("environment", {})})


def run(state: State, request: dict[str, Any], channel: socket.socket, body: bytes) -> None:
    """Run one command and answer with its outcome; under an operation's name it runs at most once, and to its end."""
    program, stdin = body[: request["filter"]], body[request["filter"] :]
    name = request.get("operation")
    if name is not None and not _claim(state, name):
        return outcome(state, request, channel)
    capture = (Capture(state.limits.output), Capture(state.limits.output))
    pidfd = state.open()
    before = state.group.memory_kills()

    def watch(stream: str, data: memoryview) -> None:
        try:
            frames.send(channel, {"stream": stream}, data)
        except OSError:
            if name is None:  # a named operation ends even if nobody listens
                raise

    kernel.set_namespaces(pidfd, kernel.CLONE_NEWPID)  # for the children of this process
    with _tracked(state) as tracked:
        ended = supervise(
            Job(stdin, request["timeout"]),
            lambda: _start(state, pidfd, tracked, request, program),
            tracked.kill,
            capture,
            owner=channel.fileno() if name is None else None,
            watch=watch if request.get("watch") else None,
        )
    header = _answer(state, ended, before)
    out, err = (one.pieces() for one in capture)
    header["stdout"] = sum(map(len, out))
    if name is not None:
        _record(state, name, header, [*out, *err])
    frames.send(channel, header, *out, *err)


def _answer(state: State, ended: Outcome, before: int) -> dict[str, Any]:
    failure = "a process could not be killed within 5 s" if ended.stuck else None
    if not os.path.exists(f"/proc/{state.process}"):
        failure = "the container died during the command"
    return {
        "exit_code": ended.exit_code if failure is None else -1,
        "truncated": ended.truncated,
        "timed_out": ended.timed_out,
        "seconds": ended.seconds,
        "infrastructure_error": failure,
        "memory_killed": state.group.memory_kills() > before,
    }


# -- operations with a name: their outcome outlives the client


def _claim(state: State, name: str) -> bool:
    """Whether this is the first time that an operation of this name is to run."""
    try:
        descriptor = os.open(state.place / "operations" / f"{name}.begun", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return False
    os.write(descriptor, cgroup.owner_name().encode())  # who sees it to its end
    os.close(descriptor)
    return True


def _record(state: State, name: str, header: dict[str, Any], pieces: list[memoryview]) -> None:
    target = state.place / "operations" / f"{name}.ended"
    with open(f"{target}.new", "wb") as file:
        text = json.dumps(header).encode()
        file.write(struct.pack("<I", len(text)) + text)
        for piece in pieces:
            file.write(piece)
    os.rename(f"{target}.new", target)


def outcome(state: State, request: dict[str, Any], channel: socket.socket) -> None:
    """The outcome of a named operation: ``never`` begun, its result (waiting for it if it still runs), or ``unknown``."""
    place, name = state.place / "operations", request["operation"]
    if not (place / f"{name}.begun").exists():
        return frames.send(channel, {"never": True})
    deadline = time.monotonic() + float(request.get("timeout", 60.0)) + 15.0
    while not (place / f"{name}.ended").exists():
        running = cgroup.alive((place / f"{name}.begun").read_text() or cgroup.owner_name())  # not written yet: it is alive
        if time.monotonic() > deadline or (not running and not (place / f"{name}.ended").exists()):
            return frames.send(channel, {"unknown": True})
        time.sleep(0.01)
    data = (place / f"{name}.ended").read_bytes()
    length = struct.unpack_from("<I", data)[0]
    frames.send(channel, json.loads(data[4 : 4 + length]), data[4 + length :])


# -- interactive


def session(state: State, request: dict[str, Any], channel: socket.socket, body: bytes) -> None:
    """Start a program and hand its terminal (or its pipes) to the client; kill it when the client hangs up."""
    pidfd = state.open()
    captures = (Capture(2), Capture(2))
    kernel.set_namespaces(pidfd, kernel.CLONE_NEWPID)
    with _tracked(state) as tracked:

        def start() -> NoReturn:
            os.setsid()
            step_inside(state, pidfd, tracked.entrances)
            if request["pty"]:
                _terminal(channel)
            else:
                mine, theirs = socket.socketpair()
                _hand_over(channel, mine.fileno())
                for target in (0, 1, 2):
                    os.dup2(theirs.fileno(), target)
            os.closerange(3, 2**20)
            _exec(state, {**request, "environment": {"TERM": "xterm", **request.get("environment", {})}}, body)

        ended = supervise(Job(None, request["timeout"]), start, tracked.kill, captures, owner=channel.fileno())
    if not ended.abandoned:
        frames.send(channel, {"exit_code": ended.exit_code, "timed_out": ended.timed_out})


def _terminal(channel: socket.socket) -> None:
    """A pseudo-terminal of the container's own, its slave for us, its master for the client."""
    master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
    slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY)
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    _hand_over(channel, master)
    for target in (0, 1, 2):
        os.dup2(slave, target)


def _hand_over(channel: socket.socket, descriptor: int) -> None:
    channel.sendmsg([b"t"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))])
