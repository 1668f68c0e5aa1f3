"""Run one process to its end: feed it, keep the head and the tail of what it writes, and leave nothing of it behind.

Used by the function worker, which runs inside, and by the keeper, which has a container's seat start it; the difference is in
``spawn`` and ``kill_tree``.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any, NoReturn

__all__ = ["Capture", "Job", "Outcome", "Prepared", "attend", "execute", "supervise"]

_GRACE = 5.0  # seconds that killed processes may take to be gone before this is an infrastructure failure
_CHUNK = 2**16


# Plain classes: every module that is loaded here is copied by every fork, and dataclasses and typing are among the largest.
class Job:
    """What to feed (None: the child sees to it), and for how many seconds."""

    def __init__(self, stdin: bytes | None, timeout: float) -> None:
        self.stdin, self.timeout = stdin, timeout


class Outcome:
    """How it ended. ``stuck``: killed, and still there after the grace period; ``abandoned``: its owner hung up.

    ``lost``: who could have said its exit status had ended before.
    """

    exit_code = -1
    truncated = timed_out = stuck = abandoned = lost = False
    seconds = 0.0


class Capture:
    """The first and the last half of a stream that may never end, in bounded memory that a fork does not inherit.

    Bytes go from the pipe into the mapping and from there to the reader's socket: no copy stays in the interpreter's heap,
    where the next call could find it.
    """

    def __init__(self, keep: int) -> None:
        self.half = max(keep // 2, 1)
        self._memory = mmap.mmap(-1, 2 * self.half, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_DONTFORK)
        self._view = memoryview(self._memory)
        self.total = 0

    def fill(self, descriptor: int) -> memoryview:
        """Read once; a view of what came, empty at the end of the stream. Raises BlockingIOError."""
        if self.total < self.half:
            begin, end = self.total, self.half
        else:  # the second half is a ring
            begin, end = self.half + (self.total - self.half) % self.half, 2 * self.half
        count = os.readv(descriptor, [self._view[begin : min(end, begin + _CHUNK)]])
        self.total += count
        return self._view[begin : begin + count]

    @property
    def truncated(self) -> bool:
        """Whether something of the middle was dropped."""
        return self.total > 2 * self.half

    def pieces(self) -> list[memoryview]:
        """What was kept, in order; a line says how much is missing, if anything is."""
        if not self.truncated:
            return [self._view[: self.total]]
        missing = b"\n[... %d bytes omitted ...]\n" % (self.total - 2 * self.half)
        turn = self.half + (self.total - self.half) % self.half
        return [self._view[: self.half], memoryview(missing), self._view[turn:], self._view[self.half : turn]]

    def reset(self) -> None:
        """Forget, and give the memory back."""
        if self.total:
            self._memory.madvise(mmap.MADV_DONTNEED)
        self.total = 0


def execute(argv: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Become ``argv``; if that fails say why on stderr and exit as a shell would: 127 not found, 126 not executable."""
    try:
        os.execvpe(argv[0], list(argv), dict(environment))
    except OSError as error:
        os.write(2, f"{argv[0]}: {error.strerror}\n".encode("utf-8", "replace"))
        os._exit(127 if error.errno == errno.ENOENT else 126)


class Prepared:
    """Something that was started, and our ends of its pipes (``stdin``: -1 if it has none)."""

    def __init__(self, spawn: Callable[[int, int, int], Any], *, stdin: bool) -> None:
        """Let ``spawn`` start it with these descriptors as stdin, stdout and stderr."""
        (self.stdout, out_write), (self.stderr, err_write) = os.pipe(), os.pipe()
        in_read, self.stdin = os.pipe() if stdin else (-1, -1)
        try:
            self.child = spawn(in_read, out_write, err_write)
        except BaseException:
            self._close(self.stdin, self.stdout, self.stderr)
            raise
        finally:
            self._close(in_read, out_write, err_write)

    @staticmethod
    def _close(*descriptors: int) -> None:
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)


def supervise(
    job: Job,
    spawn: Callable[[int, int, int], Any],
    kill_tree: Callable[[], None],
    captures: tuple[Capture, Capture],
    *,
    owner: int | None = None,
    watch: Callable[[str, memoryview], None] | None = None,
) -> Outcome:
    """Start a command, and see it to its end: ``Prepared`` and ``attend`` in one."""
    began = time.monotonic()
    prepared = Prepared(spawn, stdin=job.stdin is not None)
    return attend(job, prepared, kill_tree, captures, owner=owner, watch=watch, began=began)


def attend(
    job: Job,
    prepared: Prepared,
    kill_tree: Callable[[], None],
    captures: tuple[Capture, Capture],
    *,
    owner: int | None = None,
    watch: Callable[[str, memoryview], None] | None = None,
    began: float | None = None,
) -> Outcome:
    """See what was started to its end.

    When the child ends, or at the time limit, ``kill_tree`` must end everything that it started. stdout and stderr go into
    ``captures``. ``owner`` is a descriptor whose hang-up means that nobody waits for the result any more. ``watch`` gets
    ("stdout" | "stderr", bytes) as they come.
    """
    streams = {prepared.stdout: ("stdout", captures[0]), prepared.stderr: ("stderr", captures[1])}
    pump = _Pump(job, prepared.child, prepared.stdin, streams, watch)
    try:
        return pump.run(time.monotonic() if began is None else began, kill_tree, owner)
    finally:
        pump.close()


class _Pump:
    """The parent's side of ``supervise``."""

    def __init__(
        self,
        job: Job,
        child: Any,
        stdin: int,
        captures: dict[int, tuple[str, Capture]],
        watch: Callable[[str, memoryview], None] | None,
    ) -> None:
        self.job, self.child, self.stdin, self.captures, self.watch = job, child, stdin, captures, watch
        self.open = set(captures)
        self.pidfd = child.pidfd
        self.sent = 0
        for descriptor in [*captures, *([stdin] if stdin >= 0 else [])]:
            os.set_blocking(descriptor, False)

    def run(self, began: float, kill_tree: Callable[[], None], owner: int | None) -> Outcome:
        ended, abandoned = self._until(began + self.job.timeout, owner)
        if not ended:
            # The tree is killed first and the child after it: a dead child's group could be somebody else's.
            kill_tree()
            self.child.kill()
        stuck = not _readable([self.pidfd], _GRACE)
        status = 0 if stuck else self.child.collect()
        kill_tree()
        self._drain(time.monotonic() + _GRACE)
        code = os.waitstatus_to_exitcode(status)
        outcome = Outcome()
        outcome.exit_code = code if code >= 0 else 128 - code
        outcome.truncated = any(capture.truncated for _, capture in self.captures.values())
        outcome.timed_out, outcome.abandoned = not ended and not abandoned, abandoned
        outcome.stuck, outcome.lost = stuck or bool(self.open), self.child.lost
        outcome.seconds = time.monotonic() - began
        return outcome

    def close(self) -> None:
        for descriptor in [*self.captures, self.pidfd, self.stdin]:
            if descriptor >= 0:
                os.close(descriptor)

    def _until(self, deadline: float, owner: int | None) -> tuple[bool, bool]:
        """Pump until the child ends: (it ended by itself, its owner hung up)."""
        poll = select.poll()
        for descriptor in (self.pidfd, *self.open):
            poll.register(descriptor, select.POLLIN)
        if owner is not None:
            poll.register(owner, select.POLLRDHUP)
        if self.stdin >= 0 and self._feed():
            poll.register(self.stdin, select.POLLOUT)
        while (left := deadline - time.monotonic()) > 0:
            ready = [descriptor for descriptor, _ in poll.poll(max(left * 1000, 1))]
            for descriptor in ready:
                if descriptor == owner:
                    return False, True
                if descriptor == self.stdin:
                    if not self._feed():
                        poll.unregister(descriptor)
                elif descriptor in self.open and not self._read(descriptor):
                    poll.unregister(descriptor)
            if self.pidfd in ready:
                return True, False
        return False, False

    def _feed(self) -> bool:
        """Write what fits of stdin; whether more is left. At the end the pipe is closed."""
        stdin = self.job.stdin or b""
        try:
            while self.sent < len(stdin):
                self.sent += os.write(self.stdin, memoryview(stdin)[self.sent : self.sent + _CHUNK])
        except BlockingIOError:
            return True
        except BrokenPipeError:  # the command does not read on
            pass
        os.close(self.stdin)
        self.stdin = -1
        return False

    def _read(self, descriptor: int) -> bool:
        name, capture = self.captures[descriptor]
        try:
            data = capture.fill(descriptor)
        except BlockingIOError:
            return True
        if data and self.watch is not None:
            self.watch(name, data)
        if not data:
            self.open.discard(descriptor)
        return bool(data)

    def _drain(self, deadline: float) -> None:
        """Read to the end what dead writers left in the pipes."""
        while self.open and time.monotonic() < deadline:
            for descriptor in _readable(self.open, 0.1):
                self._read(descriptor)


def _readable(descriptors: Iterable[int], seconds: float) -> list[int]:
    """Those from which something can be read within so long; select(2) takes none above 1,023."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(seconds * 1000)]
