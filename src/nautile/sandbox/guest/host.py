"""The process that keeps a virtual machine whose client may die before it: the machine lives as long as its host.

A host has a directory of its user's, in which its socket is; every request is one connection and one thread. A machine ends
when it is closed, ``keep`` seconds after its last request, or with its host. Commands have names: one of a name is run once and
to its end, whether or not somebody still listens, and its outcome is kept for whoever asks. A fork is in the same host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from nautile.sandbox import cgroup
from nautile.sandbox.driver import Order
from nautile.sandbox.errors import InvalidRequest, SandboxError, SandboxLost
from nautile.sandbox.guest.driver import Machine
from nautile.sandbox.guest.session import GuestSession, bridge
from nautile.sandbox.guest.wish import MachineWish
from nautile.sandbox.inside import frames
from nautile.sandbox.policy import NetworkPolicy
from nautile.sandbox.recorded import image_record
from nautile.sandbox.records import error_record, result_record

__all__ = ["VERSION", "Host", "main"]

VERSION = 1  # of what hosts and clients say to each other
PIECE = 16 * 2**20  # bytes of a file in one frame
_TICK = 0.5
_UNUSED = 60.0  # seconds after which a host whose client never asked for a machine ends
_KEPT = 128 * 2**20  # bytes of outcomes that are kept; the newest is kept whatever its size
_READER = 10.0  # seconds that a client may leave what it is sent unread
_LEAVING = 10.0  # seconds in which answers that are under way are given when everything else has ended


class Outcomes:
    """What has become of the commands that have a name."""

    def __init__(self) -> None:
        self._begun: dict[str, threading.Event] = {}
        self._ended: OrderedDict[str, tuple[dict[str, Any], bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, name: str) -> bool:
        """Whether this is the first time that it is asked for."""
        with self._lock:
            if name in self._begun:
                return False
            self._begun[name] = threading.Event()
            return True

    def end(self, name: str, header: dict[str, Any] | None, body: bytes = b"") -> None:
        """It has ended so; None: nobody can say how."""
        with self._lock:
            if header is not None:
                self._ended[name] = (header, body)
            while len(self._ended) > 1 and sum(len(data) for _, data in self._ended.values()) > _KEPT:
                self._ended.popitem(last=False)
        self._begun[name].set()

    def ask(self, name: str, seconds: float) -> tuple[dict[str, Any], bytes] | str:
        """Its outcome, waiting for it while it runs; ``never`` begun; or ``unknown``."""
        begun = self._begun.get(name)
        if begun is None:
            return "never"
        begun.wait(seconds)
        with self._lock:
            return self._ended.get(name, "unknown")


@dataclasses.dataclass
class _Held:
    """One machine. ``until``: when it ends unless somebody asks for something, as wall time."""

    driver: Machine
    keep: float
    until: float = 0.0
    busy: int = 0
    outcomes: Outcomes = dataclasses.field(default_factory=Outcomes)


class Host:
    """Serves ``place/host.sock`` until its machines have ended. ``make(identity, record)`` makes the first of them."""

    def __init__(self, place: Path, make: Callable[[str, dict[str, Any]], Machine]) -> None:
        self.place, self._make = place, make
        self._held: dict[str, _Held] = {}
        self._lock = threading.RLock()
        self._made, self._over = threading.Event(), threading.Event()
        self._began, self._answering = time.monotonic(), 0
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(place / "host.sock"))
        self._listener.listen(64)

    def serve(self) -> None:
        """Until there is nothing left to be kept."""
        self._listener.settimeout(_TICK)
        while not self._over.is_set() and self._needed():
            with contextlib.suppress(TimeoutError):
                channel, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(channel,), daemon=True).start()
        self.end()

    def stop(self, *_: object) -> None:
        """Let ``serve`` return; for a signal, too."""
        self._over.set()

    def end(self) -> None:
        """Close every machine, and be found no more."""
        self._listener.close()
        for identity in list(self._held):
            self._close(identity)
        shutil.rmtree(self.place, ignore_errors=True)
        deadline = time.monotonic() + _LEAVING
        while self._answering and time.monotonic() < deadline:
            time.sleep(0.005)

    def _needed(self) -> bool:
        if not self._made.is_set():
            return time.monotonic() - self._began < _UNUSED
        with self._lock:
            now, held = time.time(), dict(self._held)
        for identity, one in held.items():
            if one.busy == 0 and (one.until < now or one.driver.ended):
                self._close(identity)
        return bool(self._held)

    def _close(self, identity: str) -> None:
        with self._lock:
            held = self._held.pop(identity, None)
            link = self.place.parent / identity
            if link.is_symlink():
                link.unlink()
        if held is not None:
            with contextlib.suppress(SandboxError):
                held.driver.close()

    def _add(self, identity: str, driver: Machine, keep: float) -> None:
        with self._lock:
            self._held[identity] = _Held(driver, keep, time.time() + keep)
            if identity != self.place.name:  # a fork is found by its own name
                (self.place.parent / identity).symlink_to(self.place.name)

    @contextlib.contextmanager
    def _working(self, identity: str) -> Iterator[_Held]:
        """One of the machines, which does not end meanwhile. Raises SandboxLost."""
        self._made.wait(_UNUSED)
        with self._lock:
            held = self._held.get(identity)
            if held is None:
                raise SandboxLost(f"the machine {identity} is gone")
            held.busy += 1
        try:
            yield held
        finally:
            with self._lock:
                held.busy -= 1
                held.until = time.time() + held.keep

    # -- requests

    def _answer(self, channel: socket.socket) -> None:
        """One connection."""
        with self._lock:
            self._answering += 1
        with channel:
            try:
                channel.settimeout(_READER)
                user = struct.unpack("iii", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
                message = frames.receive(channel) if user == os.geteuid() else None
                if message is None:
                    return
                self._carried_out(channel, *message)
            except (OSError, frames.BrokenFrameError):
                return  # who asked has gone
            finally:
                with self._lock:
                    self._answering -= 1

    def _carried_out(self, channel: socket.socket, request: dict[str, Any], body: bytes) -> None:
        op = str(request.get("op"))
        action = getattr(self, f"do_{op}", None)
        try:
            if (action is None and op != "create") or request.get("version") != VERSION:
                raise InvalidRequest(f"the machine's host is of another version ({VERSION}) and does not know {op[:40]!r}")
            if op == "create":
                return frames.send(channel, {"done": self._create(request)})
            assert action is not None
            with self._working(request["id"]) as held:
                answer = action(held, request, body, channel)
            if op == "close":
                self._close(request["id"])
            if answer is None:  # it has said itself what there was to be said
                return
            header, data = {"done": answer[0]}, answer[1]
        except SandboxError as error:
            header, data = error_record(error), b""
        except (OSError, frames.BrokenFrameError, KeyError, TypeError, ValueError) as error:
            traceback.print_exc()
            header, data = error_record(SandboxLost(f"{op} failed at the machine's host: {error}")), b""
        frames.send(channel, header, data)

    def _create(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            if self._made.is_set() or self._held:
                raise InvalidRequest("this host has its machine")
            try:
                driver = self._make(request["id"], request["wish"])
                self._add(request["id"], driver, float(request["keep"]))
            except BaseException:
                self._over.set()
                raise
            finally:
                self._made.set()
        return _described(driver)

    @staticmethod
    def do_describe(held: _Held, *_: Any) -> tuple[dict[str, Any], bytes]:
        """What it is. Raises SandboxLost when the machine has died."""
        if held.driver.ended:
            raise SandboxLost(f"the machine {held.driver.info.id} has died")
        return _described(held.driver), b""

    @staticmethod
    def do_keep(held: _Held, request: dict[str, Any], *_: Any) -> tuple[dict[str, Any], bytes]:
        """Live on for so long after every request, beginning with this one."""
        held.keep = float(request["seconds"])
        return {}, b""

    @staticmethod
    def do_close(*_: Any) -> tuple[dict[str, Any], bytes]:
        """End it, when this has been answered for."""
        return {}, b""

    @staticmethod
    def do_run(held: _Held, request: dict[str, Any], body: bytes, channel: socket.socket) -> tuple[dict[str, Any], bytes]:
        """A command, once for its name. A machine that dies under it leaves its outcome unknown."""
        name = str(request["operation"])
        if not held.outcomes.begin(name):
            return Host.do_outcome(held, {**request, "timeout": request["timeout"] + 60.0})
        listens = bool(request["watch"])

        def watch(stream: str, data: bytes) -> None:
            nonlocal listens
            if listens:
                try:
                    frames.send(channel, {"stream": stream}, data)
                except OSError:  # gone, or reads no more: the command ends all the same
                    listens = False
                    with contextlib.suppress(OSError):
                        channel.shutdown(socket.SHUT_RDWR)

        known: tuple[dict[str, Any], bytes] | None = None
        try:
            argv, where = tuple(request["argv"]), request["cwd"]
            order = Order(argv, body, float(request["timeout"]), where, request["environment"], operation=name)
            result = held.driver.run(order, watch)
            answer = result_record(result)
            known = None if result.infrastructure_error is not None and held.driver.ended else answer
        finally:
            held.outcomes.end(name, *(known or (None,)))
        return answer

    @staticmethod
    def do_outcome(held: _Held, request: dict[str, Any], *_: Any) -> tuple[dict[str, Any], bytes]:
        """What has become of a command."""
        found = held.outcomes.ask(str(request["operation"]), float(request["timeout"]))
        return ({found: True}, b"") if isinstance(found, str) else found

    @staticmethod
    def do_read(held: _Held, request: dict[str, Any], _: bytes, channel: socket.socket) -> tuple[dict[str, Any], bytes]:
        """A file, in pieces."""
        data = memoryview(held.driver.read(request["path"], int(request["limit"])))
        while len(data) > PIECE:
            frames.send(channel, {"piece": True}, data[:PIECE])
            data = data[PIECE:]
        return {}, bytes(data)

    @staticmethod
    def do_write(held: _Held, request: dict[str, Any], body: bytes, *_: Any) -> tuple[dict[str, Any], bytes]:
        """A file."""
        held.driver.write(request["path"], body, int(request["mode"]))
        return {}, b""

    @staticmethod
    def do_list(held: _Held, request: dict[str, Any], *_: Any) -> tuple[dict[str, Any], bytes]:
        """A directory."""
        return {"entries": [dataclasses.asdict(one) for one in held.driver.list(request["path"])]}, b""

    # Host and client are the same user on the same machine: what goes in and out is named, not sent.

    @staticmethod
    def do_upload(held: _Held, request: dict[str, Any], *_: Any) -> tuple[dict[str, Any], bytes]:
        """Files."""
        held.driver.upload(Path(request["place"]), request["path"])
        return {}, b""

    @staticmethod
    def do_download(held: _Held, request: dict[str, Any], *_: Any) -> tuple[dict[str, Any], bytes]:
        """Files."""
        held.driver.download(request["path"], Path(request["place"]), int(request["limit"]))
        return {}, b""

    @staticmethod
    def do_pack(held: _Held, request: dict[str, Any], *_: Any) -> tuple[dict[str, Any], bytes]:
        """What changed, as a file."""
        return {"digest": held.driver.pack_diff(Path(request["place"]))}, b""

    @staticmethod
    def do_layer(held: _Held, request: dict[str, Any], *_: Any) -> tuple[dict[str, Any], bytes]:
        """What changed, as a directory."""
        held.driver.layer(Path(request["place"]))
        return {}, b""

    @staticmethod
    def do_pause(held: _Held, *_: Any) -> tuple[dict[str, Any], bytes]:
        """Stop."""
        held.driver.pause()
        return {}, b""

    @staticmethod
    def do_resume(held: _Held, *_: Any) -> tuple[dict[str, Any], bytes]:
        """Continue."""
        held.driver.resume()
        return {}, b""

    @staticmethod
    def do_policy(held: _Held, request: dict[str, Any], *_: Any) -> tuple[dict[str, Any], bytes]:
        """Change which hosts may be reached."""
        held.driver.set_policy(NetworkPolicy.of(request["rules"] or None))
        return {}, b""

    def do_fork(self, held: _Held, *_: Any) -> tuple[dict[str, Any], bytes]:
        """A copy of the machine, kept here too."""
        copy = cast(Machine, held.driver.fork())
        self._add(copy.info.id, copy, held.keep)
        return _described(copy), b""

    @staticmethod
    def do_session(held: _Held, request: dict[str, Any], _: bytes, channel: socket.socket) -> None:
        """A program whose terminal is a socket that the client is given; it ends with the connection."""
        terminal = held.driver.session(request["argv"], bool(request["pty"]))
        assert isinstance(terminal, GuestSession)
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                socket.send_fds(channel, [b"\0"], [theirs.fileno()])
            frames.send(channel, {"exit_code": bridge(terminal, ours, channel)})


def _described(driver: Machine) -> dict[str, Any]:
    info, able = dataclasses.asdict(driver.info), dataclasses.asdict(driver.capabilities)
    return {"info": info, "capabilities": able, "image": image_record(driver.image)}


def _make(identity: str, record: dict[str, Any]) -> Machine:
    return MachineWish.of(record).make(identity)


def main() -> None:
    """``host.main DIRECTORY``: become a daemon that listens there. Prints ``ready`` on stdout when it does."""
    place = Path(sys.argv[1])
    host = Host(place, _make)
    if os.fork():
        os._exit(0)
    os.setsid()
    (place / "owner").write_text(cgroup.owner_name())
    print("ready", flush=True)
    devnull, log = os.open("/dev/null", os.O_RDWR), os.open(place / "host.log", os.O_WRONLY | os.O_CREAT, 0o600)
    for source, target in ((devnull, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(devnull)
    os.close(log)
    signal.signal(signal.SIGTERM, host.stop)
    host.serve()
    os._exit(0)  # threads of connections that are still open are of no use any more
