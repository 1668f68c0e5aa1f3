"""The host's side of the channel to a guest's agent. The guest is hostile: every frame is checked before it is believed.

Frames are as agent.c describes. Several commands, sessions and transfers share the channel; each has a window in every
direction, so that one whose output nobody reads holds up nobody else. There is no thread: whoever waits for something reads
what comes and puts it where it belongs.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from nautile.sandbox.errors import SandboxLost

__all__ = ["ERR", "EXIT", "FAILED", "OUT", "VERSION", "WINDOW", "Ended", "Link", "Stream"]

VERSION = 1
PIECE, WINDOW = 65_536, 256 * 1024
REQUEST = 4 * 2**20 - 64
CONFIGURE, SPAWN, SPAWN_PART, DATA, END, KILL, CREDIT, RESIZE, REFRESH, HOLD, GO_ON, ADJUST = range(1, 13)
HELLO, READY, OUT, ERR, EXIT, TAKEN, OPEN, FAILED, REFRESHED = range(16, 25)
EXECUTE, READ_FILE, WRITE_FILE, LIST, UPLOAD, DOWNLOAD, PACK, WALK = range(8)
_HEAD = struct.Struct("<IB3xI")
_EXIT = struct.Struct("<iBB2xI")
_PATIENCE = 20.0  # seconds for what a guest must do at once
_CONNECTIONS = 0x80000000


def _settings(settings: Mapping[str, str | Sequence[str]]) -> bytes:
    out = bytearray()
    for name, value in settings.items():
        for one in [value] if isinstance(value, str) else value:
            out += f"{name}={one}".encode() + b"\0"
    return bytes(out)


class Ended:
    """How a program ended: ``code`` as a shell gives it; ``stuck``: killed, and still there."""

    def __init__(self, data: bytes) -> None:
        self.code, killed, stuck, _ = _EXIT.unpack(data)
        self.code &= 255
        self.memory_killed, self.stuck = bool(killed), bool(stuck)


class Stream:
    """One program in the guest, or one connection of the tenant's to the proxy."""

    def __init__(self, link: Link, number: int) -> None:
        self.link, self.number = link, number
        self.room = WINDOW  # bytes of input that the guest takes now
        self.ended: Ended | None = None
        self._events: deque[tuple[int, bytes]] = deque()
        self._given = {OUT: WINDOW, ERR: WINDOW}  # what the guest may still send
        self._owed = {OUT: 0, ERR: 0}
        self._counting = threading.Lock()  # one thread may receive while another feeds or takes

    def _arrived(self, kind: int, data: bytes) -> None:
        if kind in (OUT, ERR):
            with self._counting:
                self._given[kind] -= len(data)
            if self._given[kind] < 0 or (not data and self.number < _CONNECTIONS):
                raise SandboxLost("the guest sent more than it may")
        elif kind == TAKEN:
            with self._counting:
                if len(data) != 4 or (count := int.from_bytes(data, "little")) > WINDOW - self.room:
                    raise SandboxLost("the guest took more than it was given")
                self.room += count
            return
        elif kind == EXIT:
            if len(data) != _EXIT.size:
                raise SandboxLost("the guest sent an end that is none")
            self.ended = Ended(data)
        elif kind != FAILED:
            raise SandboxLost(f"the guest sent a frame of kind {kind} of a program")
        self._events.append((kind, data))

    def next(self, deadline: float) -> tuple[int, bytes] | None:
        """(OUT | ERR | EXIT | FAILED, data), or None at the deadline or as soon as there is room for input again."""
        had = self.room
        while not self._events:
            if not self.link.pump(deadline) or (had == 0 and self.room):
                return None
        kind, data = self._events.popleft()
        if kind in self._owed and data:
            self._owed[kind] += len(data)
            if self._owed[kind] >= WINDOW // 2 and self.ended is None:
                credit, self._owed[kind] = self._owed[kind], 0
                with self._counting:  # before it is told: the guest may be fast
                    self._given[kind] += credit
                self.link.send(CREDIT, self.number, struct.pack("<IB", credit, kind == ERR))
        return kind, data

    @property
    def waiting(self) -> bool:
        """Whether something has arrived that has not been taken."""
        return bool(self._events)

    def feed(self, data: memoryview) -> int:
        """Send as much input as fits; how much that was."""
        with self._counting:  # before it is sent: the guest may be fast
            count = min(self.room, len(data))
            self.room -= count
        for at in range(0, count, PIECE):
            self.link.send(DATA, self.number, data[at : min(at + PIECE, count)])
        return count

    def feed_all(self, data: bytes | memoryview, seconds: float = _PATIENCE) -> None:
        """Send all of it. Raises SandboxLost when the guest takes none of it for ``seconds``."""
        view = memoryview(data)
        deadline = time.monotonic() + seconds
        while view and self.ended is None and not any(kind == FAILED for kind, _ in self._events):
            if count := self.feed(view):
                view, deadline = view[count:], time.monotonic() + seconds
            elif not self.link.pump(deadline) and time.monotonic() > deadline:
                raise SandboxLost("the guest takes no data")

    def end_input(self) -> None:
        """Nothing more comes."""
        self.link.send(END, self.number)

    def kill(self, *, discard: bool = False) -> None:
        """Kill the program with everything it has started; with ``discard`` its output is of no interest."""
        self.link.send(KILL, self.number, struct.pack("<I", discard))
        if discard:
            self.link.forget(self)

    def resize(self, rows: int, columns: int) -> None:
        """Tell a terminal its size."""
        self.link.send(RESIZE, self.number, struct.pack("<HH", rows, columns))


class Link:
    """The channel to one guest. After SandboxLost nothing works any more."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel, self._buffer = channel, bytearray()
        channel.setblocking(False)
        self._streams: dict[int, Stream] = {}
        self._answers: deque[tuple[int, bytes]] = deque()
        self.serial = 0  # of the last stream
        self._sending, self._receiving = threading.RLock(), threading.Lock()
        self._arrival = threading.Condition()
        self.lost: str | None = None
        self.accept: deque[Stream] | None = None  # connections to the proxy go here, if there is one

    # -- what a machine is asked as a whole

    def greet(self, seconds: float) -> None:
        """Wait for the agent. Raises SandboxLost."""
        text = self._answer(HELLO, seconds).decode("ascii", "replace")
        if text != f"nautile agent {VERSION}":
            raise self._broken(f"the guest's agent is {text[:60]!a}, and version {VERSION} is needed")

    def configure(self, settings: Mapping[str, str | Sequence[str]], program: bytes) -> None:
        """Make the tenant's surroundings. Raises SandboxLost with the step that failed."""
        self.send(CONFIGURE, 0, _settings(settings) + b"filter=" + program)
        self._answer(READY, _PATIENCE)

    def adjust(self, settings: Mapping[str, str | Sequence[str]]) -> None:
        """Change limits, clock, randomness and names of a machine that is configured. Raises SandboxLost."""
        self.send(ADJUST, 0, _settings(settings))
        self._answer(READY, _PATIENCE)

    def refresh(self, seconds: int, entropy: str) -> None:
        """Be a copy of another machine: new randomness, the right time, none of its processes."""
        self.send(REFRESH, 0, f"{seconds} {entropy}".encode())
        self._answer(REFRESHED, _PATIENCE)

    def continue_from(self, other: Link) -> None:
        """Be the channel to a copy of another machine, whose agent still ends streams that the other has begun."""
        self.serial = other.serial

    def hold(self) -> None:
        """Nothing is begun or said until ``go_on``; everything written is on the disk."""
        self.send(HOLD, 0)
        self._answer(REFRESHED, _PATIENCE)

    def go_on(self) -> None:
        """See ``hold``."""
        self.send(GO_ON, 0)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """``hold`` until it is left, and no thread of ours says anything either: no frame is on its way."""
        with self._sending:
            self.hold()
            try:
                yield
            finally:
                self.go_on()

    def _answer(self, wanted: int, seconds: float) -> bytes:
        deadline = time.monotonic() + seconds
        while not self._answers:
            if not self.pump(deadline) and time.monotonic() >= deadline:
                raise self._broken(f"the guest did not answer within {seconds:g} s")
        kind, data = self._answers.popleft()
        if kind == FAILED:
            raise self._broken(f"the guest refused: {data.decode('utf-8', 'replace')[:300]}")
        if kind != wanted:
            raise self._broken(f"the guest answered {kind}, not {wanted}")
        return data

    # -- streams

    def spawn(
        self,
        kind: int,
        words: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        cwd: str | None = None,
        terminal: tuple[int, int] | None = None,
    ) -> Stream:
        """Start a program (or one of the agent's own, by ``kind``); ``terminal``: (rows, columns)."""
        pairs = [f"{name}={value}" for name, value in (environment or {}).items()]
        rows, columns = terminal or (0, 0)
        texts = [one.encode("utf-8", "surrogateescape") for one in (cwd or "", *words, *pairs)]
        head = struct.pack("<BBHHHII", kind, terminal is not None, rows, columns, 0, len(words), len(pairs))
        data = memoryview(head + b"".join(one + b"\0" for one in texts))
        with self._sending:
            self.serial = self.serial % (_CONNECTIONS - 1) + 1
            stream = self._streams[self.serial] = Stream(self, self.serial)
            if len(data) > REQUEST:
                stream._arrived(FAILED, b"Argument list too long")
                return stream
            while len(data) > PIECE:
                self.send(SPAWN_PART, stream.number, data[:PIECE])
                data = data[PIECE:]
            self.send(SPAWN, stream.number, data)
        return stream

    def forget(self, stream: Stream) -> None:
        """What still comes for a stream is dropped."""
        self._streams.pop(stream.number, None)

    # -- frames

    def send(self, kind: int, stream: int, data: bytes | memoryview = b"") -> None:
        """One frame. Raises SandboxLost when the guest does not take it."""
        pieces = memoryview(_HEAD.pack(len(data), kind, stream) + bytes(data))
        deadline = time.monotonic() + _PATIENCE
        with self._sending:
            if self.lost:
                raise SandboxLost(self.lost)
            while pieces:
                try:
                    pieces = pieces[self._channel.send(pieces) :]
                except BlockingIOError:
                    if not select.select([], [self._channel], [], max(deadline - time.monotonic(), 0))[1]:
                        raise self._broken("the guest reads nothing any more") from None
                except OSError as error:
                    raise self._broken(f"the machine has ended ({error.strerror})") from None

    def pump(self, deadline: float) -> bool:
        """Receive something and put it where it belongs; False when nothing came until the deadline."""
        if self.lost:
            raise SandboxLost(self.lost)
        left = max(deadline - time.monotonic(), 0)
        if not self._receiving.acquire(blocking=False):  # another thread receives, also what is ours
            with self._arrival:
                self._arrival.wait(min(left, 0.01))
            return time.monotonic() < deadline
        try:
            if not select.select([self._channel], [], [], min(left, 0.5))[0]:
                return time.monotonic() < deadline
            self._receive()
        finally:
            self._receiving.release()
            with self._arrival:
                self._arrival.notify_all()
        return True

    def _receive(self) -> None:
        try:
            data = self._channel.recv(2**18)
        except BlockingIOError:
            return
        except OSError as error:
            raise self._broken(f"the machine has ended ({error.strerror})") from None
        if not data:
            raise self._broken("the machine has ended")
        self._buffer += data
        self._dispatch()

    def _dispatch(self) -> None:
        at = 0
        while len(self._buffer) - at >= _HEAD.size:
            size, kind, number = _HEAD.unpack_from(self._buffer, at)
            if size > PIECE or not HELLO <= kind <= REFRESHED:
                raise self._broken(f"the guest sent a frame of kind {kind} with {size:,} bytes")
            if len(self._buffer) - at < _HEAD.size + size:
                break
            data = bytes(self._buffer[at + _HEAD.size : at + _HEAD.size + size])
            at += _HEAD.size + size
            self._deliver(kind, number, data)
        del self._buffer[:at]

    def _deliver(self, kind: int, number: int, data: bytes) -> None:
        if number == 0:
            if len(self._answers) > 4:
                raise self._broken("the guest answers what it was not asked")
            self._answers.append((kind, data))
        elif kind == OPEN:
            if self.accept is None or number < _CONNECTIONS or number in self._streams or len(self._streams) > 256:
                raise self._broken("the guest opened a connection that it may not")
            stream = self._streams[number] = Stream(self, number)
            self.accept.append(stream)
        elif (found := self._streams.get(number)) is not None:  # else it has been forgotten
            try:
                found._arrived(kind, data)
            except SandboxLost as error:
                raise self._broken(str(error)) from None
            if kind in (EXIT, FAILED):
                self.forget(found)

    def _broken(self, why: str) -> SandboxLost:
        self.lost = self.lost or why
        return SandboxLost(self.lost)

    def close(self) -> None:
        """Hang up."""
        self.lost = self.lost or "the sandbox is closed"
        self._channel.close()
