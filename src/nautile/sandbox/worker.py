"""A warm worker as its client sees it: a bubblewrap with a fork server in it (inside/worker.py), and the calls that it takes.

A call goes to the fork that waits for it, with the ends of two pipes; what it writes is read here and cut here. Process 1
says how it ended. All a worker does between two calls, it does after the caller has the result.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import select
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nautile.sandbox import cgroup, native, seccomp
from nautile.sandbox.driver import Order, Watch
from nautile.sandbox.errors import InvalidRequest, SubstrateUnavailable
from nautile.sandbox.guest.kernel import cache_directory
from nautile.sandbox.inside import supervise
from nautile.sandbox.inside import worker as inside
from nautile.sandbox.limits import Limits
from nautile.sandbox.result import RunResult

__all__ = ["ENVIRONMENT", "LOOP", "MASKED", "MASKED_DIRECTORIES", "Lost", "Plan", "Worker", "host_directories", "message_of"]

ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    "HOME": "/workspace",
    "LANG": "C.UTF-8",
    "TMPDIR": "/tmp",
}
_HIDDEN = """
buddyinfo cmdline config.gz diskstats iomem ioports kallsyms kcore key-users keys kmsg kpagecgroup kpagecount kpageflags
latency_stats locks misc modules pagetypeinfo partitions sched_debug schedstat slabinfo swaps sysrq-trigger timer_list
timer_stats vmallocinfo vmstat zoneinfo
"""
MASKED = tuple(str.split(_HIDDEN))  # files of /proc that say something of the host
MASKED_DIRECTORIES = ("acpi", "asound", "bus", "driver", "fs", "irq", "scsi", "sysvipc", "tty")
_ROOT_LINKS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_SETTINGS = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/ssl/certs")
_START_LIMIT = 15.0  # seconds
_ANSWER_LIMIT = 1.0  # seconds in which process 1 must have ended a call that is over its time; else the whole worker is killed
_GRACE = 5.0  # seconds that killed processes may take to be gone before this is an infrastructure failure
_MOST = 16 * 2**20  # bytes of a call without its stdin
LOOP = Path(inside.__file__).with_name("loop.c")
_LOADED = "/nautile/loop.so"
_FIRST_ID, _LAST_ID = 524_288, 1_878_982_656  # user ids that no account has
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def host_directories() -> list[str]:
    """bubblewrap arguments for /usr and what leads into it, read-only."""
    argv = ["--ro-bind", "/usr", "/usr"]
    for place in map(Path, _ROOT_LINKS):
        if place.is_symlink():
            argv += ["--symlink", os.readlink(place), str(place)]
        elif place.exists():
            argv += ["--ro-bind", str(place), str(place)]
    for setting in _SETTINGS:
        argv += ["--ro-bind-try", setting, setting]
    return argv


@dataclass(frozen=True)
class Plan:
    """What every worker of one sandbox has in common."""

    bwrap: str
    python: str
    limits: Limits
    workspace: Path | None
    user: int | None  # host user id of the tenant, when we are root
    loop: bytes | None = None  # the library of inside/loop.c; None where it cannot be compiled

    @classmethod
    def make(cls, limits: Limits, workspace: Path | None) -> Plan:
        """Find what workers need. Raises SubstrateUnavailable."""
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise SubstrateUnavailable("function", "bubblewrap is missing", "apt-get install bubblewrap")
        python = "/usr/bin/python3"
        if not os.access(python, os.X_OK):
            raise SubstrateUnavailable(
                "function", f"{python} is missing, and workers run it", "apt-get install python3-minimal"
            )
        user = None
        if os.geteuid() == 0:
            user = workspace.stat().st_uid if workspace else _FIRST_ID + secrets.randbelow(_LAST_ID - _FIRST_ID)
            if user and shutil.which("setpriv") is None:
                raise SubstrateUnavailable("function", "setpriv is missing", "apt-get install util-linux")
        return cls(bwrap, python, limits, workspace, user or None, _loop())


def _loop() -> bytes | None:
    """The library of inside/loop.c; None where there is no compiler, or no cache that can be written."""
    with contextlib.suppress(OSError):
        library = native.compiled(LOOP, cache_directory() / "function", library=True)
        return None if library is None else library.read_bytes()
    return None


class Lost(Exception):  # noqa: N818
    """The worker has gone, or hung up, in the middle of a call."""


class Worker:
    """One bubblewrap with one fork server in it, and its cgroup. One thread at a time calls it."""

    def __init__(self, plan: Plan) -> None:
        """Start it. Raises SubstrateUnavailable, LimitUnavailable."""
        self.plan, self.calls, self.usable = plan, 0, True
        self._ready = self._busy = self._stopped = False
        self._captures = (supervise.Capture(plan.limits.output), supervise.Capture(plan.limits.output))
        self.group = cgroup.Group.create(f"f{secrets.token_hex(6)}", plan.limits, owner=cgroup.owner_name())
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        self._killed = self.group.memory_kills()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._calls, their_calls = socket.socketpair()
        self._calls.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(_START_LIMIT), 0))
        files = [_file(seccomp.program(system_v=False))]
        try:
            if self.plan.loop is not None:
                files.append(_file(self.plan.loop))
            argv = [*self._entrance(), *self._confinement(*files)]
            code = "import sys; sys.path.insert(0, '/nautile'); from nautile.sandbox.inside.worker import main; main()"
            self.process = subprocess.Popen(
                [*argv, "--", self.plan.python, "-I", "-S", "-B", "-c", code],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=ENVIRONMENT,
                pass_fds=files,
                start_new_session=True,
                cwd="/",
            )
            theirs.close()
            self._greet(their_calls)
        finally:
            theirs.close()
            their_calls.close()
            for file in files:
                os.close(file)

    def _entrance(self) -> list[str]:
        """A shell that enters the cgroup, then becomes bubblewrap, as a user who owns nothing if we are root."""
        entrances = [str(place) for place in self.group.entrances]
        script = 'while [ "$1" != -- ]; do echo 0 > "$1" || exit 9; shift; done; shift; exec "$@"'
        argv = ["/bin/sh", "-c", script, "sh", *entrances, "--"]
        if self.plan.user is not None:
            user = str(self.plan.user)
            argv += ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", "--inh-caps=-all", "--"]
        return argv

    def _confinement(self, program: int, loop: int | None = None) -> list[str]:
        limits, size = self.plan.limits, str(self.plan.limits.disk)
        argv = [self.plan.bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "1000", "--gid", "1000"]
        argv += ["--cap-drop", "ALL", "--new-session", "--hostname", "sandbox", "--clearenv", "--as-pid-1"]
        argv += ["--seccomp", str(program)]
        for name, value in ENVIRONMENT.items():
            argv += ["--setenv", name, value]
        argv += ["--proc", "/proc"]
        for name in MASKED:
            if os.path.exists(f"/proc/{name}"):
                argv += ["--ro-bind", "/dev/null", f"/proc/{name}"]
        for name in MASKED_DIRECTORIES:
            if os.path.isdir(f"/proc/{name}"):
                argv += ["--tmpfs", f"/proc/{name}", "--remount-ro", f"/proc/{name}"]
        argv += ["--remount-ro", "/proc", "--dev", "/dev", "--size", size, "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
        argv += host_directories()
        argv += ["--ro-bind", str(Path(inside.__file__).parent), "/nautile/nautile/sandbox/inside"]
        if loop is not None:
            argv += ["--perms", "0555", "--ro-bind-data", str(loop), _LOADED]
        argv += ["--size", size, "--tmpfs", "/tmp"]
        if self.plan.workspace is not None:
            argv += ["--bind", str(self.plan.workspace), "/workspace"]
        else:
            argv += ["--size", str(limits.disk), "--tmpfs", "/workspace"]
        return [*argv, "--remount-ro", "/", "--chdir", "/workspace"]

    def _greet(self, calls: socket.socket) -> None:
        limits = self.plan.limits
        rlimits = {"RLIMIT_NOFILE": limits.open_files, "RLIMIT_CORE": 0, "RLIMIT_FSIZE": limits.disk}
        if "memory" not in self.group.enforced:
            rlimits["RLIMIT_DATA"] = limits.memory  # of each process: the caller allowed to go without the cgroup's sum
        wipe = ["/tmp", "/dev/shm", *([] if self.plan.workspace else ["/workspace"])]
        loop = None if self.plan.loop is None else _LOADED
        settings = {"rlimits": rlimits, "wipe": wipe, "workspace": "/workspace", "environment": ENVIRONMENT, "loop": loop}
        with contextlib.suppress(OSError):  # it has died: what follows says so
            socket.send_fds(self._control, [json.dumps(settings).encode()], [calls.fileno()])
            calls.close()
        if not self.ready():
            self.process.kill()
            said = (self.process.stderr.read() if self.process.stderr else b"").decode("utf-8", "replace").strip()
            why = f"a worker did not start ({said.splitlines()[-1] if said else 'it said nothing'})"
            raise SubstrateUnavailable("function", why, "nautile sandbox doctor says what is missing")

    def ready(self) -> bool:
        """Wait until it can take a call; False if it has ended, because the call before left what it could not clean up."""
        if not self._ready:
            poll = select.poll()
            poll.register(self._control, select.POLLIN)
            with contextlib.suppress(OSError):
                self._ready = bool(poll.poll(_START_LIMIT * 1000)) and self._control.recv(8) == inside.READY
        return self._ready

    def call(self, message: bytes, order: Order, watch: Watch | None) -> RunResult:
        """One call to its end; ``ready`` must have said yes. ``usable`` says whether there can be another. Raises Lost.

        ``message``: what ``message_of`` made of the order.
        """
        self.calls += 1
        self.usable, self._ready, self._busy, began = False, False, True, time.monotonic()
        try:
            with _outputs() as (reading, writing):
                with _input(order.stdin) as given, contextlib.suppress(BrokenPipeError):  # it has died: what follows says so
                    _send(self._calls, message, [*writing, *given])
                for descriptor in writing:
                    os.close(descriptor)
                writing.clear()
                return self._result(_Pump(self._control, self.calls, reading, self._captures, watch), began, order.timeout)
        finally:
            for capture in self._captures:
                capture.reset()
            self._busy = False
            if self._stopped:
                self._hang_up()

    def _result(self, pump: _Pump, began: float, timeout: float) -> RunResult:
        status = pump.run(began + timeout)
        if status is None:  # it was told to end the call, and has not: starved by the tenant
            self.process.kill()
            self.group.kill()
        drained = pump.drain()
        out, err = (b"".join(capture.pieces()) for capture in self._captures)
        code = 137 if status is None else os.waitstatus_to_exitcode(status)
        self.usable = status is not None and drained
        return RunResult(
            exit_code=code if code >= 0 else 128 - code,
            stdout=out.decode("utf-8", "replace"),
            stderr=err.decode("utf-8", "replace"),
            truncated=any(capture.truncated for capture in self._captures),
            timed_out=pump.over_time,
            infrastructure_error=None if drained else f"a process could not be killed within {_GRACE:g} s",
            memory_killed=code in (137, -9) and self.memory_killed(),
            seconds=time.monotonic() - began,
            stdout_bytes=out,
            stderr_bytes=err,
        )

    def memory_killed(self) -> bool:
        """Whether the kernel has killed something at the memory limit since this was asked last."""
        before, self._killed = self._killed, self.group.memory_kills()
        return self._killed > before

    def stop(self) -> None:
        """End it; its process namespace and its file systems go with it. A call that is under way is lost."""
        self._stopped = True
        process: subprocess.Popen[bytes] | None = getattr(self, "process", None)
        if process is not None:
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)  # process 1 ends, also where there are no cgroups
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            if process.stderr is not None:
                process.stderr.close()
        self.group.remove()
        if process is not None:
            process.wait()
        if not self._busy:  # otherwise its caller does it, who still reads
            self._hang_up()

    def _hang_up(self) -> None:
        for channel in ("_control", "_calls"):
            if hasattr(self, channel):
                getattr(self, channel).close()


class _Pump:
    """What is read during one call: two pipes, and the word of process 1."""

    def __init__(
        self,
        control: socket.socket,
        number: int,
        reading: list[int],
        captures: tuple[supervise.Capture, supervise.Capture],
        watch: Watch | None,
    ) -> None:
        self.control, self.number, self.watch, self.over_time = control, number, watch, False
        self.open = dict(zip(reading, zip(("stdout", "stderr"), captures, strict=True), strict=True))
        self.poll = select.poll()
        for descriptor in (control.fileno(), *reading):
            self.poll.register(descriptor, select.POLLIN)

    def run(self, deadline: float) -> int | None:
        """Read until the call has ended, or until process 1 should have ended it: its wait status, or None. Raises Lost."""
        control = self.control.fileno()
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                if self.over_time:
                    return None
                self.over_time, deadline = True, time.monotonic() + _ANSWER_LIMIT
                with contextlib.suppress(OSError):
                    self.control.send(inside.ENOUGH + bytes([self.number % 256]))
                continue
            for descriptor, _ in self.poll.poll(left * 1000 + 1):
                if descriptor != control:
                    self._read(descriptor)
                    continue
                word = self._word()
                if word[:1] == inside.ENDED:
                    return int.from_bytes(word[1:], "little")
                raise Lost("the worker hung up")

    def _word(self) -> bytes:
        try:
            return self.control.recv(8)
        except OSError as error:
            raise Lost(str(error)) from None

    def _read(self, descriptor: int) -> None:
        name, capture = self.open[descriptor]
        try:
            data = capture.fill(descriptor)
        except BlockingIOError:
            return
        if not data:
            del self.open[descriptor]
            self.poll.unregister(descriptor)
        elif self.watch is not None:
            self.watch(name, bytes(data))

    def drain(self) -> bool:
        """Read what dead writers left in the pipes. False if somebody still holds an end after the grace period."""
        deadline = time.monotonic() + _GRACE
        for descriptor in list(self.open):
            while descriptor in self.open:
                before = self.open[descriptor][1].total
                self._read(descriptor)
                if descriptor in self.open and self.open[descriptor][1].total == before:
                    if time.monotonic() > deadline:
                        return False
                    time.sleep(0.001)
        return True


def _file(data: bytes) -> int:
    """A descriptor of a file in memory, at its beginning."""
    file = os.memfd_create("sandbox", os.MFD_CLOEXEC)
    os.write(file, data)
    os.lseek(file, 0, os.SEEK_SET)
    return file


@contextlib.contextmanager
def _outputs() -> Iterator[tuple[list[int], list[int]]]:
    """(our ends, the call's ends) of pipes for stdout and stderr; what is still in the lists is closed at the end."""
    reading: list[int] = []
    writing: list[int] = []
    try:
        for _ in range(2):
            read, write = os.pipe()
            os.set_blocking(read, False)
            reading.append(read)
            writing.append(write)
        yield reading, writing
    finally:
        for descriptor in (*reading, *writing):
            os.close(descriptor)


@contextlib.contextmanager
def _input(data: bytes) -> Iterator[list[int]]:
    """A descriptor of a file in memory that holds ``data`` and that nobody can change; none for no data."""
    if not data:
        yield []
        return
    file = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(file, view) :]
        os.lseek(file, 0, os.SEEK_SET)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
        yield [file]
    finally:
        os.close(file)


def message_of(order: Order) -> bytes:
    """A call as inside/worker.py takes it. Raises InvalidRequest."""
    rest = order.argv if order.python is None else (order.python, *order.argv)
    kind = "command" if order.python is None else "python"
    words = [kind, order.cwd or "", str(len(order.environment))]
    for name, value in order.environment.items():
        words += [name, value]
    data = "\0".join((*words, *rest)).encode()
    if len(data) > _MOST:
        raise InvalidRequest(f"the call has {len(data):,} bytes without its stdin, more than {_MOST:,}: give data as stdin")
    return len(data).to_bytes(4, "little") + data


def _send(channel: socket.socket, message: bytes, descriptors: list[int]) -> None:
    sent = socket.send_fds(channel, [message], descriptors)
    if sent < len(message):
        channel.sendall(memoryview(message)[sent:])
