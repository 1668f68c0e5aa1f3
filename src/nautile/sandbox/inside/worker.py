"""The warm fork server inside a function sandbox: process 1 of its own process namespace, one fork a call, made ahead of it.

Process 1 never sees a call: its fork, which waits, takes the call from one socket, and writes what it prints into pipes that
came with it. Process 1 has another socket, over which it hears that enough is enough, and says how a fork has ended. Then it
kills every other process of the namespace and empties the writable places; if that fails it ends, and the namespace and its
file systems with it. The tenant has the same user id, so process 1 is not dumpable (its memory and descriptors cannot be
opened), no signal has a handler in it (so none arrives), and it ends when its scheduling has been changed.

Everything here is written for few pages: after a fork each page that either side touches is copied, and that is what a call
costs. So there are no frames, no selectors and no objects that need not be, and the loop of process 1 is in C where it can be
compiled (loop.c).
"""

from __future__ import annotations

import _socket
import ctypes
import gc
import io
import json
import os
import select
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

__all__ = ["ENDED", "ENOUGH", "READY", "main"]

READY, ENDED = b"r", b"e"  # what comes from process 1, the second with a wait status
ENOUGH = b"k"  # what goes to it, with the number of the call

_PR_SET_DUMPABLE = 4
_LENGTH = 4  # bytes before a call
_PIECE = 2**16
_ALL = 2**30  # more than any descriptor
_FORK, _LEFT = 0, 1  # what loop.c returns
_MEMORY = 2048  # bytes of what it remembers
_SCHEDULING = {"x86_64": (315, 252), "aarch64": (275, 31)}  # numbers of sched_getattr and ioprio_get
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> NoReturn:
    """Serve until the other side hangs up, or until a call leaves something that cannot be cleaned up."""
    control = _socket.socket(fileno=os.dup(0))
    _quiet_descriptors()
    if _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) or os.getpid() != 1:
        os._exit(3)
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # which for process 1 means that it does not arrive
    text, ancillary, _, _ = control.recvmsg(_PIECE, _socket.CMSG_SPACE(4))
    settings = json.loads(text)
    calls = _socket.socket(fileno=_descriptors(ancillary)[0])
    _restrict(settings["rlimits"])
    scheduling, streams = _scheduling(), _streams()
    exec(compile("pass", "<call>", "exec"), {})  # what the interpreter prepares once is prepared here
    gc.collect()
    gc.freeze()
    gc.disable()
    if settings["loop"] is not None:
        _serve_in_c(control, calls, settings, streams)
    _serve(control, calls, settings, streams, scheduling)


def _serve(
    control: _socket.socket,
    calls: _socket.socket,
    settings: dict[str, Any],
    streams: tuple[io.TextIOWrapper, ...],
    scheduling: tuple[bytes, int, set[int]],
) -> NoReturn:
    """Where there is no C compiler: what ``loop.c`` does, which is described there."""
    turn = 0
    while True:
        turn = (turn + 1) % 256
        child = os.fork()
        if not child:
            _take(calls, settings, streams)
        control.send(READY)
        status = _see_to_its_end(child, turn, control)
        _kill_all()
        _reap()
        control.send(ENDED + status.to_bytes(4, "little"))
        if not _wipe(settings["wipe"]) or _pending(calls) or _scheduling() != scheduling:
            os._exit(0)


def _serve_in_c(
    control: _socket.socket, calls: _socket.socket, settings: dict[str, Any], streams: tuple[io.TextIOWrapper, ...]
) -> NoReturn:
    """Between two calls nothing of the interpreter runs, and so nothing of it is copied."""
    serve, memory = ctypes.PyDLL(settings["loop"]).serve, ctypes.create_string_buffer(_MEMORY)
    serve.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]
    places = b"".join(place.encode() + b"\0" for place in settings["wipe"]) + b"\0"
    after_fork = ctypes.pythonapi.PyOS_AfterFork_Child
    after_fork.restype = None
    while True:
        ended = serve(control.fileno(), calls.fileno(), places, ctypes.addressof(memory), _MEMORY)
        if ended == _FORK:
            after_fork()
            _take(calls, settings, streams)
        if ended < 0:
            raise OSError(-ended, os.strerror(-ended))
        if ended != _LEFT or not _wipe(settings["wipe"]):
            os._exit(0)


def _quiet_descriptors() -> None:
    devnull = os.open("/dev/null", os.O_RDWR)
    for target in (0, 1):
        os.dup2(devnull, target)
    os.close(devnull)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """What came with a message."""
    data = ancillary[0][2] if ancillary else b""
    return [int.from_bytes(data[at : at + 4], sys.byteorder) for at in range(0, len(data), 4)]


def _restrict(rlimits: dict[str, int]) -> None:
    """Limits of every process from here on; none can raise them again."""
    import resource  # noqa: PLC0415  # forks need it no more

    for name, value in rlimits.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (allowed, allowed))


def _scheduling() -> tuple[bytes, int, set[int]]:
    """How this process is scheduled: its forks inherit it, and a tenant of the same user may change it."""
    attributes, (get, ioprio) = ctypes.create_string_buffer(56), _SCHEDULING[os.uname().machine]
    _libc.syscall(get, 0, attributes, 56, 0)
    return attributes.raw, _libc.syscall(ioprio, 1, 0), os.sched_getaffinity(0)


def _streams() -> tuple[io.TextIOWrapper, io.TextIOWrapper, io.TextIOWrapper]:
    """stdin, stdout and stderr of calls, made once: of pipes, since they remember that one cannot seek in them."""
    read, write = os.pipe()
    kept = [os.dup(number) for number in (0, 1, 2)]
    for source, target in ((read, 0), (write, 1), (write, 2)):
        os.dup2(source, target)
    streams = (
        io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8", errors="surrogateescape"),
        io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8", errors="replace"),
        io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding="utf-8", errors="replace", write_through=True),
    )
    for source, target in zip(kept, (0, 1, 2), strict=True):
        os.dup2(source, target)
    for descriptor in (*kept, read, write):
        os.close(descriptor)
    return streams


# -- process 1


def _see_to_its_end(child: int, number: int, control: _socket.socket) -> int:
    """Wait for a fork, and kill everything when the other side has had enough of this call. Its wait status."""
    pidfd, poll = os.pidfd_open(child), select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(control, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == pidfd:
                os.close(pidfd)
                return os.waitpid(child, 0)[1]
            if not (word := control.recv(2)):
                os._exit(0)  # nobody waits for anything any more
            if word[1] == number:  # and not the call before, which had just ended
                _kill_all()


def _kill_all() -> None:
    """Every process of this namespace but process 1, which calls this. One call is served at a time, so all are its own."""
    try:  # noqa: SIM105  # nothing is imported that is not needed
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _reap() -> None:
    """Collect what was killed, until nothing is left: whoever is alive has a living chain of parents that ends here."""
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        pass


def _pending(calls: _socket.socket) -> bool:
    """Whether something of the call was left unread: its fork died before it began."""
    return bool(select.select([calls], [], [], 0)[0])


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


# -- a fork


def _take(calls: _socket.socket, settings: dict[str, Any], streams: tuple[io.TextIOWrapper, ...]) -> NoReturn:
    """Wait for a call and be it."""
    try:
        os.setsid()
        exec(compile("pass", "<call>", "exec"), {})  # touch now what a call touches: nobody waits yet
        words = _receive(calls)
        _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # its files in /proc are its own
        kind, place, count = words[0], words[1], 3 + 2 * int(words[2])
        environment = {**settings["environment"], **dict(zip(words[3:count:2], words[4:count:2], strict=True))}
        os.chdir(place or settings["workspace"])
        if kind == "python":
            _python(words[count], words[count + 1 :], streams)
        _execute(words[count:], environment)
    except BaseException as error:
        os.write(2, f"sandbox: the command could not be started: {error}\n".encode("utf-8", "replace"))
    finally:
        os._exit(125)


def _receive(calls: _socket.socket) -> list[str]:
    """The words of a call. Its descriptors are then stdout, stderr and, if there are three, stdin; there are no others."""
    data, ancillary, _, _ = calls.recvmsg(_PIECE, _socket.CMSG_SPACE(12))
    length = int.from_bytes(data[:_LENGTH], "little")
    if not data:
        os._exit(125)
    pieces, left = [data[_LENGTH:]], length + _LENGTH - len(data)
    while left > 0:
        piece = calls.recv(min(left, 2**20))
        if not piece:
            os._exit(125)
        pieces.append(piece)
        left -= len(piece)
    for source, target in zip(_descriptors(ancillary), (1, 2, 0), strict=False):
        os.dup2(source, target)
    os.closerange(3, _ALL)
    return b"".join(pieces).decode().split("\0")


def _execute(argv: list[str], environment: dict[str, str]) -> NoReturn:
    """Become ``argv``; if that fails say why on stderr and exit as a shell would: 127 not found, 126 not executable."""
    try:
        os.execvpe(argv[0], argv, environment)
    except OSError as error:
        os.write(2, f"{argv[0]}: {error.strerror}\n".encode("utf-8", "replace"))
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def _python(source: str, arguments: list[str], streams: tuple[io.TextIOWrapper, ...]) -> NoReturn:
    """Run a program in this fork of the interpreter, as ``python -c`` would, without starting another one."""
    code = 1
    sys.stdin, sys.stdout, sys.stderr = streams
    sys.argv = ["-c", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    gc.enable()
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
    try:  # noqa: SIM105
        sys.stdout.flush()
    except Exception:
        pass
    os._exit(code & 255)
