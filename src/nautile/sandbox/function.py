"""The function substrate: warm workers inside hardened bubblewrap; one fork a call, nothing left between calls.

A worker sees /usr (read-only), an empty /workspace and /tmp in memory, and nothing of the host besides: no network, no
capability, no environment, no user data, the calls of ``seccomp.ALLOWED`` only. It is replaced after a number of calls, when
it could not clean up, and when it died. Run by root, its tenant is a user id that owns nothing on the host.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import shutil
import socket
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nautile.sandbox import cgroup, seccomp
from nautile.sandbox.driver import Order, Watch
from nautile.sandbox.errors import SandboxClosed, SandboxError, SandboxLost, SubstrateUnavailable
from nautile.sandbox.inside import frames
from nautile.sandbox.limits import Limits
from nautile.sandbox.result import Capabilities, Info, RunResult

__all__ = ["ENVIRONMENT", "MASKED", "MASKED_DIRECTORIES", "FunctionDriver", "host_directories"]

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
_RECYCLE = 1000  # calls of one worker
_START_LIMIT = 15.0  # seconds
_MARGIN = 15.0  # seconds that a worker may need on top of its call
_FIRST_ID, _LAST_ID = 524_288, 1_878_982_656  # user ids that no account has


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
class _Plan:
    """What every worker of one sandbox has in common."""

    bwrap: str
    python: str
    limits: Limits
    workspace: Path | None
    user: int | None  # host user id of the tenant, when we are root


def _plan(limits: Limits, workspace: Path | None) -> _Plan:
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SubstrateUnavailable("function", "bubblewrap is missing", "apt-get install bubblewrap")
    python = "/usr/bin/python3"
    if not os.access(python, os.X_OK):
        raise SubstrateUnavailable("function", f"{python} is missing, and workers run it", "apt-get install python3-minimal")
    user = None
    if os.geteuid() == 0:
        user = workspace.stat().st_uid if workspace else _FIRST_ID + secrets.randbelow(_LAST_ID - _FIRST_ID)
        if user and shutil.which("setpriv") is None:
            raise SubstrateUnavailable("function", "setpriv is missing", "apt-get install util-linux")
    return _Plan(bwrap, python, limits, workspace, user or None)


class _Worker:
    """One bubblewrap with one fork server in it, and its cgroup."""

    def __init__(self, plan: _Plan) -> None:
        self.plan, self.calls = plan, 0
        self.group = cgroup.Group.create(f"f{secrets.token_hex(6)}", plan.limits, owner=cgroup.owner_name())
        try:
            self.process, self.channel = self._start()
            self._greet()
        except BaseException:
            self.stop()
            raise
        self.killed = self.group.memory_kills()

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        mine, theirs = socket.socketpair()
        program = os.memfd_create("seccomp")
        try:
            os.write(program, seccomp.program(system_v=False))
            os.lseek(program, 0, os.SEEK_SET)
            argv = [*self._entrance(), *self._confinement(program)]
            code = "import sys; sys.path.insert(0, '/nautile'); from nautile.sandbox.inside.worker import main; main()"
            process = subprocess.Popen(
                [*argv, "--", self.plan.python, "-I", "-S", "-B", "-c", code],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=ENVIRONMENT,
                pass_fds=(program,),
                start_new_session=True,
                cwd="/",
            )
        except BaseException:
            mine.close()
            raise
        finally:
            theirs.close()
            os.close(program)
        return process, mine

    def _entrance(self) -> list[str]:
        """A shell that enters the cgroup, then becomes bubblewrap, as a user who owns nothing if we are root."""
        entrances = [str(place) for place in self.group.entrances]
        script = 'while [ "$1" != -- ]; do echo 0 > "$1" || exit 9; shift; done; shift; exec "$@"'
        argv = ["/bin/sh", "-c", script, "sh", *entrances, "--"]
        if self.plan.user is not None:
            user = str(self.plan.user)
            argv += ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", "--inh-caps=-all", "--"]
        return argv

    def _confinement(self, program: int) -> list[str]:
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
        inside = Path(frames.__file__).parent
        argv += ["--ro-bind", str(inside), "/nautile/nautile/sandbox/inside", "--size", size, "--tmpfs", "/tmp"]
        if self.plan.workspace is not None:
            argv += ["--bind", str(self.plan.workspace), "/workspace"]
        else:
            argv += ["--size", str(limits.disk), "--tmpfs", "/workspace"]
        return [*argv, "--remount-ro", "/", "--chdir", "/workspace"]

    def _greet(self) -> None:
        limits = self.plan.limits
        rlimits = {"RLIMIT_NOFILE": limits.open_files, "RLIMIT_CORE": 0, "RLIMIT_FSIZE": limits.disk}
        if "memory" not in self.group.enforced:
            rlimits["RLIMIT_DATA"] = limits.memory  # of each process: the caller allowed to go without the cgroup's sum
        wipe = ["/tmp", "/dev/shm", *([] if self.plan.workspace else ["/workspace"])]
        settings = {"rlimits": rlimits, "output": limits.output, "wipe": wipe, "workspace": "/workspace"}
        self.channel.settimeout(_START_LIMIT)
        try:
            frames.send(self.channel, {**settings, "environment": ENVIRONMENT})
            answer = frames.receive(self.channel)
        except (OSError, frames.BrokenFrameError):
            answer = None
        if answer is None or not answer[0].get("ready"):
            self.process.kill()
            said = (self.process.stderr.read() if self.process.stderr else b"").decode("utf-8", "replace").strip()
            why = f"a worker did not start ({said.splitlines()[-1] if said else 'it said nothing'})"
            raise SubstrateUnavailable("function", why, "nautile sandbox doctor says what is missing")

    def call(self, header: dict[str, Any], stdin: bytes) -> tuple[dict[str, Any], bytes]:
        """One exchange. Raises OSError or BrokenFrameError when the worker is gone."""
        self.calls += 1
        self.channel.settimeout(float(header["timeout"]) + _MARGIN)
        frames.send(self.channel, {"timeout": header["timeout"]})
        frames.send(self.channel, header, stdin)
        answer = frames.receive(self.channel)
        if answer is None:
            raise frames.BrokenFrameError("the worker hung up")
        return answer

    def stop(self) -> None:
        """End it; its process namespace and its file systems go with it."""
        process: subprocess.Popen[bytes] | None = getattr(self, "process", None)
        if process is not None:
            self.channel.close()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            if process.stderr is not None:
                process.stderr.close()
        self.group.remove()
        if process is not None:
            process.wait()


class FunctionDriver:
    """Calls on ``workers`` warm workers; more callers at once wait for one."""

    capabilities = Capabilities(
        files=False, session=False, pause=False, snapshot=False, fork=False, pack_diff=False, network=False
    )

    def __init__(self, identity: str, limits: Limits, *, workers: int = 1, workspace: Path | None = None) -> None:
        self._plan, self._limits, self._closed = _plan(limits, workspace), limits, False
        self._idle: queue.LifoQueue[_Worker | SandboxError] = queue.LifoQueue()
        self._all: set[_Worker] = set()
        self._lock = threading.Lock()
        cgroup.sweep()
        for _ in range(workers):
            self._hire()
        first = self._idle.get()
        self._idle.put(first)
        if isinstance(first, SandboxError):
            self.close()
            raise first
        self.info = Info(identity, "function", "bubblewrap", "native", first.group.enforced)

    def reason(self, feature: str) -> tuple[str, str]:
        """See ``Driver.reason``."""
        return "a function call leaves nothing behind that could be kept or continued", "use kind='container'"

    def run(self, order: Order, watch: Watch | None) -> RunResult:
        """See ``Driver.run``; ``watch`` gets the output when the call has ended."""
        worker = self._take(order.timeout)
        header: dict[str, Any] = {"timeout": order.timeout, "cwd": order.cwd, "environment": dict(order.environment)}
        header |= (
            {"argv": list(order.argv)} if order.python is None else {"python": order.python, "arguments": list(order.argv)}
        )
        keep = False
        try:
            answer, body = worker.call(header, order.stdin)
            keep = bool(answer["clean"]) and worker.calls < _RECYCLE
            result = self._result(worker, answer, body)
        except (OSError, frames.BrokenFrameError) as error:
            result = self._lost(worker, error)
        finally:
            self._give_back(worker, keep)
        if watch is not None:
            for name, data in (("stdout", result.stdout_bytes), ("stderr", result.stderr_bytes)):
                if data:
                    watch(name, data)
        return result

    def _result(self, worker: _Worker, answer: dict[str, Any], body: bytes) -> RunResult:
        out, err = body[: answer["stdout"]], body[answer["stdout"] :]
        killed = answer["exit_code"] == 137 and worker.group.memory_kills() > worker.killed
        stuck = "a process could not be killed within 5 s" if answer["stuck"] else None
        return RunResult(
            exit_code=answer["exit_code"],
            stdout=out.decode("utf-8", "replace"),
            stderr=err.decode("utf-8", "replace"),
            truncated=answer["truncated"],
            timed_out=answer["timed_out"],
            infrastructure_error=stuck,
            memory_killed=killed,
            seconds=answer["seconds"],
            stdout_bytes=out,
            stderr_bytes=err,
        )

    def _lost(self, worker: _Worker, error: Exception) -> RunResult:
        if self._closed:
            raise SandboxClosed("the sandbox was closed during the call")
        if worker.group.memory_kills() > worker.killed:  # the tenant's doing, therefore its result
            text = "sandbox: the call exceeded its memory limit\n"
            return RunResult(137, "", text, False, False, None, memory_killed=True, stderr_bytes=text.encode())
        return RunResult(-1, "", "", False, False, f"function: the worker was lost during the call ({error})")

    def _take(self, timeout: float) -> _Worker:
        if self._closed:
            raise SandboxClosed("the sandbox is closed")
        try:
            worker = self._idle.get(timeout=max(timeout, _START_LIMIT))
        except queue.Empty:
            raise SandboxLost(f"no worker became free within {max(timeout, _START_LIMIT):g} s: ask for more workers") from None
        if isinstance(worker, SandboxError):
            self._idle.put(worker)
            raise worker
        return worker

    def _give_back(self, worker: _Worker, keep: bool) -> None:
        if keep and not self._closed:
            self._idle.put(worker)
            return
        with self._lock:
            self._all.discard(worker)
        # Its successor starts beside the caller, who has the result already.
        threading.Thread(target=self._replace, args=(worker,), daemon=True).start()

    def _replace(self, worker: _Worker) -> None:
        if not self._closed:
            self._hire()
        worker.stop()

    def _hire(self) -> None:
        try:
            worker = _Worker(self._plan)
        except SandboxError as error:
            self._idle.put(error)
            return
        with self._lock:
            if not self._closed:
                self._all.add(worker)
                self._idle.put(worker)
                return
        worker.stop()

    def close(self) -> None:
        """End every worker."""
        with self._lock:
            self._closed = True
            workers, self._all = self._all, set()
        for worker in workers:
            worker.stop()
