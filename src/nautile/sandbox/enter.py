"""Commands in a container: its seat's fork enters its namespaces, gives up every right, and becomes the command.

Two processes see to a command. One is outside and keeps the output, the time and the outcome: a process of the keeper (``run``,
``session``), or the client itself (``run_directly``). The other is started by the seat, inside the container's groups; what it
leaves is ended by the seat. From the moment it is inside until it has become the command it cannot be traced or read by the
tenant (it is not dumpable), and it holds no descriptor but the command's three and one for its own use.
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
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from nautile.sandbox import cgroup, kernel
from nautile.sandbox.driver import Order, Watch
from nautile.sandbox.errors import SandboxError, SandboxLost
from nautile.sandbox.function import ENVIRONMENT
from nautile.sandbox.inside import frames
from nautile.sandbox.inside.supervise import Capture, Job, Outcome, execute, supervise
from nautile.sandbox.limits import Limits
from nautile.sandbox.orders import Orders
from nautile.sandbox.proxy import ENVIRONMENT as PROXIED
from nautile.sandbox.result import RunResult
from nautile.sandbox.seat import NotStarted, SeatGone, Started, start
from nautile.sandbox.state import State

__all__ = ["Inside", "become_command", "become_session", "end_group", "outcome", "run", "run_directly", "session"]

_INSIDE = (
    kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
) | kernel.CLONE_NEWCGROUP
_TIOCGPTPEER, _TIOCSPTLCK = 0x5441, 0x40045431
_NOT_STARTED = "sandbox: the command could not be started: {}\n"


class Inside:
    """What commands of one container have in common: ``control`` reaches its seat."""

    def __init__(self, control: socket.socket, tenant: int, limits: Limits, network: bool) -> None:
        self.control, self.tenant, self.limits, self.network = control, tenant, limits, network

    @classmethod
    def of(cls, state: State) -> Inside:
        """As the keeper has it."""
        return cls(state.control, state.tenant, state.limits, state.network)

    def orders(
        self, argv: tuple[str, ...], cwd: str | None, environment: Mapping[str, str], program: bytes, pty: bool = False
    ) -> Orders:
        """For a command in it."""
        return Orders(
            argv,
            (cwd or "/workspace",),
            {**ENVIRONMENT, **(PROXIED if self.network else {}), **environment},
            self.tenant,
            self.limits.open_files,
            self.limits.disk,
            pty,
            filter=program,
        )


class Run:
    """One command, from its start to the end of everything that it has started. ``rescue`` ends the group of a lost one."""

    def __init__(self, control: socket.socket, rescue: Callable[[str], None]) -> None:
        self.control, self.rescue = control, rescue
        self.started: Started | None = None

    def start(self, letter: str, orders: Orders, descriptors: list[int]) -> Started:
        """Let the container's seat start it. Raises SeatGone, NotStarted, SandboxLost."""
        self.started = start(self.control, letter, orders, descriptors)
        return self.started

    def kill(self) -> None:
        """End everything that the command has started; the seat has done so when it told that the command has ended."""
        started = self.started
        if started is not None and not started.over:
            started.kill()
        elif started is not None and started.lost:
            self.rescue(started.group)

    def failure(self, ended: Outcome, alive: bool = True) -> str | None:
        """What of ours failed, if anything did."""
        started = self.started
        if (started is not None and started.died) or not alive:
            return "the container died during the command"
        # At the memory limit the kernel may choose the seat: the tenant's doing, therefore its result.
        if started is not None and started.lost and not ended.timed_out:
            return "the process that starts commands in the container died"
        return "a process could not be killed within 5 s" if ended.stuck or (started is not None and started.stuck) else None


def end_group(state: State, name: str) -> None:
    """End what a command whose seat has been killed has left in its group."""
    if state.group.tracker is not None:
        place = state.group.tracker / os.path.basename(name)
        cgroup.kill_group(place)
        cgroup.remove_group(place)
        return
    # Nobody can keep track without cgroups, which the caller allowed: whatever runs in the container ends, sessions too.
    with contextlib.suppress(SandboxLost):
        pidfd = state.open()
        kernel.set_namespaces(pidfd, kernel.CLONE_NEWPID)
        os.close(pidfd)
        _kill_namespace()


def _kill_namespace() -> None:
    """Kill every process but the first of the process namespace that our children are in."""
    child = os.fork()
    if child == 0:
        if os.getppid() == 0:  # our parent cannot be seen: this is the container's namespace and never our own
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        os._exit(0)
    os.waitpid(child, 0)


def step_inside(pidfd: int, tenant: int) -> None:
    """Enter a container's namespaces and become its tenant, without a right left. Cannot be undone. Raises SandboxLost."""
    try:
        kernel.set_namespaces(pidfd, _INSIDE)
    except ProcessLookupError:
        raise SandboxLost("the container has died") from None
    os.close(pidfd)
    kernel.become(tenant, tenant)
    kernel.forget_dump()


def become_command(orders: Orders, descriptors: list[int]) -> NoReturn:
    """In a seat's fork: become the command. Descriptors: process 1, stdin, stdout, stderr."""
    for source, target in zip(descriptors[1:], (0, 1, 2), strict=True):
        os.dup2(source, target)
    with _said_on_stderr():
        os.setsid()
        step_inside(descriptors[0], orders.tenant)
        os.closerange(3, 2**20)
        _exec(orders)


@contextlib.contextmanager
def _said_on_stderr() -> Iterator[None]:
    """What prevents a command from being started is said where its caller looks."""
    try:
        yield
    except BaseException as error:
        os.write(2, _NOT_STARTED.format(error).encode("utf-8", "replace"))
    finally:
        os._exit(125)


def _exec(orders: Orders) -> NoReturn:
    for number, value in (
        (resource.RLIMIT_NOFILE, orders.open_files),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, orders.file_size),
    ):
        hard = resource.getrlimit(number)[1]
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (allowed, allowed))
    os.umask(0o022)
    os.chdir(orders.places[0])
    kernel.load_seccomp(orders.filter)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which an interpreter ignores
        signal.signal(number, signal.SIG_DFL)
    execute(orders.argv, orders.environment)


def run(state: State, request: dict[str, Any], channel: socket.socket, body: bytes) -> None:
    """Run one command and answer with its outcome; under an operation's name it runs at most once, and to its end."""
    program, stdin = body[: request["filter"]], body[request["filter"] :]
    name = request.get("operation")
    if name is not None and not _claim(state, name):
        return outcome(state, request, channel)
    inside = Inside.of(state)
    orders = inside.orders(tuple(request["argv"]), request.get("cwd"), request.get("environment") or {}, program)

    def watch(stream: str, data: memoryview) -> None:
        try:
            frames.send(channel, {"stream": stream}, data)
        except OSError:
            if name is None:  # a named operation ends even if nobody listens
                raise

    owner = channel.fileno() if name is None else None
    tracked = Run(state.control, lambda group: end_group(state, group))
    job = Job(stdin, request["timeout"])
    try:
        ended, out, err = _see_to(tracked, orders, job, state.limits.output, watch if request.get("watch") else None, owner)
    except SeatGone:
        if name is not None:
            os.unlink(state.place / "operations" / f"{name}.begun")
        return frames.send(channel, {"again": True})
    header = _header(tracked, ended, tracked.failure(ended, state.alive()))
    header["stdout"] = sum(map(len, out))
    if name is not None:
        _record(state, name, header, [*out, *err])
    frames.send(channel, header, *out, *err)


def run_directly(inside: Inside, order: Order, program: bytes, watch: Watch | None, rescue: Callable[[str], None]) -> RunResult:
    """The same with nobody between the caller and the seat: the caller sees to the command.

    Raises SeatGone, when nothing was begun, and SandboxLost.
    """
    orders = inside.orders(tuple(order.argv), order.cwd, order.environment, program)
    tracked = Run(inside.control, rescue)
    ended, out, err = _see_to(tracked, orders, Job(order.stdin, order.timeout), inside.limits.output, watch)
    header = _header(tracked, ended, tracked.failure(ended))
    stdout, stderr = b"".join(out), b"".join(err)
    failure = header.pop("infrastructure_error")
    return RunResult(
        stdout=stdout.decode("utf-8", "replace"),
        stderr=stderr.decode("utf-8", "replace"),
        infrastructure_error=failure,
        stdout_bytes=stdout,
        stderr_bytes=stderr,
        **header,
    )


def _see_to(
    tracked: Run, orders: Orders, job: Job, output: int, watch: Callable[[str, Any], None] | None, owner: int | None = None
) -> tuple[Outcome, list[memoryview], list[memoryview]]:
    """Start a command and see it to its end: how it ended, what it wrote. Raises SeatGone, SandboxLost."""
    captures = (Capture(output), Capture(output))

    def spawn(*descriptors: int) -> Started:
        return tracked.start("r", orders, list(descriptors))

    try:
        ended = supervise(job, spawn, tracked.kill, captures, owner=owner, watch=watch)
    except NotStarted as error:
        ended = Outcome()
        ended.exit_code = 125
        return ended, [], [memoryview(_NOT_STARTED.format(error).encode())]
    return ended, captures[0].pieces(), captures[1].pieces()


def _header(tracked: Run, ended: Outcome, failure: str | None) -> dict[str, Any]:
    killed = tracked.started is not None and tracked.started.memory_killed
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
    (state.place / "operations").mkdir(exist_ok=True)
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
    orders = Inside.of(state).orders(tuple(request["argv"]), request.get("cwd"), environment, body, request["pty"])
    tracked = Run(state.control, lambda group: end_group(state, group))

    def spawn(*_: int) -> Started:
        return tracked.start("s", orders, [channel.fileno()])

    try:
        ended = supervise(Job(None, request["timeout"]), spawn, tracked.kill, captures, owner=channel.fileno())
    except (NotStarted, SeatGone) as error:
        raise SandboxError(f"the session could not be started: {error}; end some of the container's processes") from None
    if not ended.abandoned:
        frames.send(channel, {"exit_code": ended.exit_code, "timed_out": ended.timed_out})


def become_session(orders: Orders, descriptors: list[int]) -> NoReturn:
    """In a seat's fork: become a program behind a terminal or pipes, whose other side goes to the client (the last one)."""
    with _said_on_stderr():
        client = socket.socket(fileno=descriptors[1])
        os.setsid()
        step_inside(descriptors[0], orders.tenant)
        if orders.pty:
            _terminal(client)
        else:
            mine, theirs = socket.socketpair()
            _hand_over(client, mine.fileno())
            for target in (0, 1, 2):
                os.dup2(theirs.fileno(), target)
        os.closerange(3, 2**20)
        _exec(orders)


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
