"""Commands in a container: its seat's fork enters its namespaces, gives up every right, and becomes the command.

Two processes see to a command. One is outside: it keeps the output, the time and the outcome (``run``, ``session``). The other
is started by the seat, inside the container's groups (``become_command``, ``become_session``). From the moment it is inside
until it has become the command it cannot be traced or read by the tenant (it is not dumpable), and it holds no descriptor but
the command's three and one for its own use.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import struct
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from nautile.sandbox import cgroup, kernel
from nautile.sandbox.errors import SandboxError, SandboxLost
from nautile.sandbox.function import ENVIRONMENT
from nautile.sandbox.inside import frames
from nautile.sandbox.inside.supervise import Capture, Job, Outcome, execute, supervise
from nautile.sandbox.proxy import ENVIRONMENT as PROXIED
from nautile.sandbox.seat import NotStarted, SeatGone, Started, start
from nautile.sandbox.state import State

__all__ = ["become_command", "become_session", "outcome", "run", "session"]

_INSIDE = (
    kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
) | kernel.CLONE_NEWCGROUP
_TIOCGPTPEER, _TIOCSPTLCK = 0x5441, 0x40045431


class Run:
    """The group that keeps track of what one command starts."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.place: Path | None = None

    def start(self, letter: str, descriptors: list[int], orders: dict[str, Any], program: bytes) -> Started:
        """Let the container's seat start what ``orders`` say."""
        state = self.state
        orders |= {"tenant": state.tenant, "network": state.network}
        orders["limits"] = {"open_files": state.limits.open_files, "disk": state.limits.disk}
        pidfd = state.open()
        try:
            started = start(state.control, letter, [pidfd, *descriptors], lambda channel: frames.send(channel, orders, program))
        finally:
            os.close(pidfd)
        if started.group and state.group.tracker is not None:
            self.place = state.group.tracker / started.group
        return started

    def kill(self) -> None:
        """End everything that the command has started."""
        if self.place is not None:
            cgroup.kill_group(self.place)
            return
        if self.state.group.tracker is not None:  # nothing was started
            return
        # Nobody can keep track without cgroups, which the caller allowed: whatever runs in the container ends, sessions too.
        with contextlib.suppress(SandboxLost):
            pidfd = self.state.open()
            kernel.set_namespaces(pidfd, kernel.CLONE_NEWPID)
            os.close(pidfd)
            _kill_namespace()

    def remove(self) -> None:
        """Kill and forget."""
        self.kill()
        if self.place is not None:
            cgroup.remove_group(self.place)


def _kill_namespace() -> None:
    """Kill every process but the first of the process namespace that our children are in."""
    child = os.fork()
    if child == 0:
        if os.getppid() == 0:  # our parent cannot be seen: this is the container's namespace and never our own
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        os._exit(0)
    os.waitpid(child, 0)


@contextlib.contextmanager
def _tracked(state: State) -> Iterator[Run]:
    tracked = Run(state)
    try:
        yield tracked
    finally:
        tracked.remove()


def step_inside(pidfd: int, tenant: int) -> None:
    """Enter a container's namespaces and become its tenant, without a right left. Cannot be undone. Raises SandboxLost."""
    try:
        kernel.set_namespaces(pidfd, _INSIDE)
    except ProcessLookupError:
        raise SandboxLost("the container has died") from None
    os.close(pidfd)
    kernel.become(tenant, tenant)
    kernel.forget_dump()


def become_command(channel: socket.socket, descriptors: list[int]) -> NoReturn:
    """In a seat's fork: become the command whose orders come on ``channel``. Descriptors: process 1, stdin, stdout, stderr."""
    for source, target in zip(descriptors[1:], (0, 1, 2), strict=True):
        os.dup2(source, target)
    with _said_on_stderr():
        message = frames.receive(channel)
        assert message is not None
        orders, program = message
        os.setsid()
        step_inside(descriptors[0], orders["tenant"])
        os.closerange(3, 2**20)
        _exec(orders, program)


@contextlib.contextmanager
def _said_on_stderr() -> Iterator[None]:
    """What prevents a command from being started is said where its caller looks."""
    try:
        yield
    except BaseException as error:
        os.write(2, f"sandbox: the command could not be started: {error}\n".encode("utf-8", "replace"))
    finally:
        os._exit(125)


def _exec(orders: dict[str, Any], program: bytes) -> NoReturn:
    for number, value in (
        (resource.RLIMIT_NOFILE, orders["limits"]["open_files"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, orders["limits"]["disk"]),
    ):
        hard = resource.getrlimit(number)[1]
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (allowed, allowed))
    os.umask(0o022)
    os.chdir(orders.get("cwd") or "/workspace")
    kernel.load_seccomp(program)
    proxied = PROXIED if orders["network"] else {}
    execute(orders["argv"], {**ENVIRONMENT, **proxied, **orders.get("environment", {})})


def run(state: State, request: dict[str, Any], channel: socket.socket, body: bytes) -> None:
    """Run one command and answer with its outcome; under an operation's name it runs at most once, and to its end."""
    program, stdin = body[: request["filter"]], body[request["filter"] :]
    name = request.get("operation")
    if name is not None and not _claim(state, name):
        return outcome(state, request, channel)
    capture = (Capture(state.limits.output), Capture(state.limits.output))
    before = state.group.memory_kills()
    orders = {key: request.get(key) for key in ("argv", "cwd")} | {"environment": request.get("environment") or {}}

    def watch(stream: str, data: memoryview) -> None:
        try:
            frames.send(channel, {"stream": stream}, data)
        except OSError:
            if name is None:  # a named operation ends even if nobody listens
                raise

    try:
        with _tracked(state) as tracked:
            ended = supervise(
                Job(stdin, request["timeout"]),
                lambda *descriptors: tracked.start("r", list(descriptors), orders, program),
                tracked.kill,
                capture,
                owner=channel.fileno() if name is None else None,
                watch=watch if request.get("watch") else None,
            )
        out, err = (one.pieces() for one in capture)
    except SeatGone:
        if name is not None:
            os.unlink(state.place / "operations" / f"{name}.begun")
        return frames.send(channel, {"again": True})
    except NotStarted as error:
        ended, out = Outcome(), []
        ended.exit_code = 125
        err = [memoryview(f"sandbox: the command could not be started: {error}\n".encode())]
    header = _answer(state, ended, before)
    header["stdout"] = sum(map(len, out))
    if name is not None:
        _record(state, name, header, [*out, *err])
    frames.send(channel, header, *out, *err)


def _answer(state: State, ended: Outcome, before: int) -> dict[str, Any]:
    killed = state.group.memory_kills() > before
    failure = "a process could not be killed within 5 s" if ended.stuck else None
    # At the memory limit the kernel may choose the seat: the tenant's doing, therefore its result.
    if ended.lost and not killed and not ended.timed_out:
        failure = "the process that starts commands in the container died"
    if not state.alive():
        failure = "the container died during the command"
    return {
        "exit_code": ended.exit_code if failure is None else -1,
        "truncated": ended.truncated,
        "timed_out": ended.timed_out,
        "seconds": ended.seconds,
        "infrastructure_error": failure,
        "memory_killed": killed,
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
    captures = (Capture(2), Capture(2))
    environment = {"TERM": "xterm", **(request.get("environment") or {})}
    orders = {"argv": request["argv"], "cwd": request.get("cwd"), "environment": environment, "pty": request["pty"]}
    with _tracked(state) as tracked:

        def spawn(*_: int) -> Started:
            return tracked.start("s", [channel.fileno()], orders, body)

        try:
            ended = supervise(Job(None, request["timeout"]), spawn, tracked.kill, captures, owner=channel.fileno())
        except (NotStarted, SeatGone) as error:
            raise SandboxError(f"the session could not be started: {error}; end some of the container's processes") from None
    if not ended.abandoned:
        frames.send(channel, {"exit_code": ended.exit_code, "timed_out": ended.timed_out})


def become_session(channel: socket.socket, descriptors: list[int]) -> NoReturn:
    """In a seat's fork: become a program behind a terminal or pipes, whose other side goes to the client (the last one)."""
    with _said_on_stderr():
        message = frames.receive(channel)
        assert message is not None
        orders, program = message
        client = socket.socket(fileno=descriptors[1])
        os.setsid()
        step_inside(descriptors[0], orders["tenant"])
        if orders["pty"]:
            _terminal(client)
        else:
            mine, theirs = socket.socketpair()
            _hand_over(client, mine.fileno())
            for target in (0, 1, 2):
                os.dup2(theirs.fileno(), target)
        os.closerange(3, 2**20)
        _exec(orders, program)


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
