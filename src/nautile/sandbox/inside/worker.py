"""The warm fork server inside a function sandbox: process 1 of its own process namespace, one fork a call, made ahead of it.

It answers frames on descriptor 0. After a call it kills every other process of the namespace and empties the writable
places; if either fails it ends, and the namespace and its file systems with it. The tenant has the same user id, so this
process is not dumpable (its memory and descriptors cannot be opened) and signals to process 1 do not arrive.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import os
import resource
import select
import signal
import socket
import sys

from nautile.sandbox.inside import frames
from nautile.sandbox.inside.supervise import Capture, Job, Prepared, attend, execute, forking

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

__all__ = ["main"]

_PR_SET_DUMPABLE = 4


def main() -> NoReturn:
    """Serve until the other side hangs up, or until a call leaves something that cannot be cleaned up."""
    channel = socket.socket(fileno=os.dup(0))
    devnull = os.open("/dev/null", os.O_RDWR)
    os.dup2(devnull, 0)
    os.close(devnull)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) or os.getpid() != 1:
        os._exit(3)
    settings, _ = frames.receive(channel) or ({}, b"")
    _restrict(settings["rlimits"])
    captures = (Capture(settings["output"]), Capture(settings["output"]))
    frames.send(channel, {"ready": True})
    gc.freeze()
    gc.disable()
    while True:
        ready, go = _ahead(channel, settings, libc)
        notice = frames.receive(channel)
        if notice is None or not _serve(channel, settings, float(notice[0]["timeout"]), captures, (ready, go)):
            break
    os._exit(0)


def _ahead(channel: socket.socket, settings: dict[str, Any], libc: Any) -> tuple[Prepared, int]:
    """The fork for the next call, which waits until a byte is written to the descriptor; then it reads the call by itself.

    Process 1 never sees a call, so the next fork cannot find it in its memory.
    """
    gate, go = os.pipe()

    def start() -> NoReturn:
        os.close(go)
        if not os.read(gate, 1):
            os._exit(125)
        message = frames.receive(channel)
        if message is None:
            os._exit(125)
        header, stdin = message
        os.closerange(3, 64)
        os.setsid()
        libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # its files in /proc are its own
        os.chdir(header.get("cwd") or settings["workspace"])
        if stdin:
            file = os.memfd_create("stdin")
            os.write(file, stdin)
            os.lseek(file, 0, os.SEEK_SET)
            os.dup2(file, 0)
            os.close(file)
        if "python" in header:
            _python(header["python"], header.get("arguments", []))
        execute(header["argv"], {**settings["environment"], **header.get("environment", {})})

    prepared = Prepared(forking(start), stdin=False)
    os.close(gate)
    return prepared, go


def _serve(
    channel: socket.socket,
    settings: dict[str, Any],
    timeout: float,
    captures: tuple[Capture, Capture],
    ahead: tuple[Prepared, int],
) -> bool:
    """One call, of which a notice with the time limit has come: run it, clean up, answer.

    False if this worker must not serve another one.
    """
    prepared, go = ahead
    with contextlib.suppress(BrokenPipeError):  # it has died: what follows says so
        os.write(go, b"g")
    os.close(go)
    outcome = attend(Job(None, timeout), prepared, _kill_all, captures, owner=channel.fileno())
    clean = not outcome.stuck and not outcome.abandoned and _reap() and _wipe(settings["wipe"]) and not _pending(channel)
    header = {name: getattr(outcome, name) for name in ("exit_code", "truncated", "timed_out", "stuck", "seconds")}
    out, err = (capture.pieces() for capture in captures)
    frames.send(channel, {**header, "stdout": sum(map(len, out)), "clean": clean}, *out, *err)
    for capture in captures:
        capture.reset()
    return clean


def _pending(channel: socket.socket) -> bool:
    """Whether something of the call was left unread: its fork died before it began."""
    return bool(select.select([channel], [], [], 0)[0])


def _restrict(rlimits: dict[str, int]) -> None:
    """Limits of every process from here on; none can raise them again."""
    for name, value in rlimits.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (allowed, allowed))


def _python(source: str, arguments: list[str]) -> NoReturn:
    """Run a program in this fork of the interpreter, as ``python -c`` would, without starting another one."""
    code = 1
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8", errors="surrogateescape")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8", errors="replace")
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding="utf-8", errors="replace", write_through=True)
    sys.argv = ["-c", *arguments]
    try:
        exec(compile(source, "<call>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        if leave.code is not None and not isinstance(leave.code, int):
            print(leave.code, file=sys.stderr)
    except BaseException:
        import traceback  # noqa: PLC0415  # only those that fail need it

        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code & 255)


def _kill_all() -> None:
    """Every process of this namespace but process 1, which calls this. One call is served at a time, so all are its own."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)


def _reap() -> bool:
    """Collect what was killed, until nothing is left: whoever is alive has a living chain of parents that ends here."""
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return True


def _wipe(places: list[str]) -> bool:
    """Empty the writable places. False when something resists: the worker then ends, and the kernel does it."""
    for place in places:
        try:
            if names := os.listdir(place):
                for name in names:
                    _remove(os.path.join(place, name), 0)
                if os.listdir(place):
                    return False
        except OSError:
            return False
    return True


def _remove(path: str, depth: int) -> None:
    if depth > 200:
        raise OSError("too deep")
    try:
        os.unlink(path)
        return
    except IsADirectoryError:
        pass
    for name in os.listdir(path):
        _remove(os.path.join(path, name), depth + 1)
    os.rmdir(path)
