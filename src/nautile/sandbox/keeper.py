"""The process that keeps a user's containers: one per user, started by the first container and gone soon after the last.

It is a fork server of its own, in a private mount namespace: a request is one connection, carried out by a fork, and what it
mounts is seen by nobody else and vanishes with it. Containers that were used lately have a seat (seat.py), and some seats wait
for the next containers; a client asks a seat directly. Its only state besides leases and seats is in its directory:

    keeper.sock  keeper.log  shared/  skeleton/  layers/N/       for all
    ID/  state.json  pid  group  operations/
    work/GROUP/  fs/ (tmpfs: upper, work, shm; below it root/, the overlay)        seen by the keeper alone
                 bundle/  crun/        only until it runs

A lease is a connection that a client holds open for a sandbox; when it breaks, the sandbox is closed. A sandbox without a
lease outlives its client and ends at its time to live.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import IO, Any, NoReturn

from nautile.sandbox import bundle, cgroup, enter, kernel, native, seat
from nautile.sandbox.errors import SandboxError, SandboxLost, SubstrateUnavailable
from nautile.sandbox.guest.kernel import cache_directory
from nautile.sandbox.inside import frames
from nautile.sandbox.operations import MOUNTS, SHARED, Task, adopt, become_crun, carry_out, end_first_process, give, group_name
from nautile.sandbox.seat import Seat, know, open_seat
from nautile.sandbox.spares import (
    SPARE_IDLE,
    Clerk,
    Crew,
    Spare,
    Spares,
    kind_of,
    receive_task,
    rehearse,
    send_task,
    sockets_of,
)
from nautile.sandbox.state import SHARE, WORK, Settings, State, version

__all__ = ["Keeper", "main"]

_IDLE = 5.0  # seconds without a sandbox and without a request, after which the keeper ends
_TIDYING = 15  # seconds that an earlier keeper may need to end
_CALM = 0.005  # seconds without a request after which things are made ahead
_MAKERS = 4  # creations and endings at once
_KEPT = 200  # the descriptors of the settings have this number and up, in every process
_PATIENT = 15  # how nice those are who make things ahead
_ENTRIES = {"c": become_crun, "r": enter.become_command, "s": enter.become_session}
_FIRST_BASE, _BASES = 524_288, 20_000  # each keeper's share of user ids that no account has


def main() -> None:
    """``keeper.main DIRECTORY``: take over as a daemon. Prints ``ready`` on stdout when requests are served."""
    place = Path(sys.argv[1])
    os.umask(0o077)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a lease is a descriptor
    with open(place / "keeper.lock", "w") as lock:  # held for life: there is one keeper
        if not _first(place, lock):
            print("ready", flush=True)
            return
        if os.fork():
            os._exit(0)
        os.setsid()
        kernel.adopt_orphans()  # not inherited by a fork
        Keeper(place).serve()


def _first(place: Path, lock: IO[str]) -> bool:
    """Take the lock of keepers, which one that tidies up gives back; False if another one serves, and stays."""
    signal.alarm(_TIDYING)
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            signal.alarm(0)
            return True
        except BlockingIOError:
            from nautile.sandbox.container import KeeperClient  # noqa: PLC0415  # no keeper that serves needs it

            if KeeperClient(place).running:
                return False
        time.sleep(0.01)


class Keeper:
    """The server. ``serve`` returns when it has been idle."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.leases: dict[int, tuple[socket.socket, str]] = {}
        self.live: dict[str, tuple[float, float] | None] = {}  # without a lease: (seconds, the time until which it may live)
        self.children: set[int] = set()
        self.spares = Spares()
        self.seats: dict[str, Seat] = {}
        self.poll = select.epoll()
        self.crew = self._crew(_MAKERS, 0)
        self.patient = self._crew(1, _PATIENT)  # for what is made ahead
        self.looked = 0.0  # when it was looked for what has become old
        self.version = version()
        self._sweep()
        self.root = os.geteuid() == 0
        self.base = _FIRST_BASE + SHARE * (int.from_bytes(os.urandom(4), "little") % _BASES) if self.root else 0
        if not self.root:
            _enter_user_namespace()
        kernel.forget_dump()
        self.owner = cgroup.owner_name()
        found = cgroup.hierarchies()
        cgroup.Group.make("keeper", owner=self.owner, found=found)  # others' directory: nobody removes it while this is in it
        mounts = _mount_namespaces(self.place / WORK)
        crun, program = shutil.which("crun"), native.compiled(seat.PROGRAM, cache_directory() / "seat")
        kept = [None if one is None else native.sealed(Path(one)) for one in (program, crun)] + [mounts]
        numbers = [None if one is None else fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, _KEPT) for one in kept]
        self.settings = Settings(self.owner, self.base if self.root else None, found, *numbers)
        self._furnish()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place / "keeper.sock")
        self.listener.bind(str(place / "keeper.sock"))
        self.listener.listen(512)

    def _sweep(self) -> None:
        """What a killed keeper left: processes, cgroups, directories. Its mounts have vanished with it."""
        cgroup.sweep()
        for entry in self.place.glob("*/pid"):
            end_first_process(entry.parent)
        for entry in self.place.iterdir():
            if entry.is_dir() and not _in_use(entry):
                _remove(entry)
            elif entry.name.endswith(".lock") and entry.name.startswith("."):
                entry.unlink(missing_ok=True)

    def _furnish(self) -> None:
        layer = self.place / "skeleton"
        layer.mkdir()
        os.umask(0o022)
        bundle.skeleton(layer)
        bundle.furnish(self.place / SHARED)
        if self.root:
            os.chown(layer / "workspace", bundle.TENANT, bundle.TENANT)
        os.umask(0o077)
        (self.place / "layers").mkdir(mode=0o711)
        (self.place / "layers").chmod(0o711)
        layer.chmod(0o755)
        (self.place / MOUNTS).mkdir(mode=0o711, exist_ok=True)
        (self.place / MOUNTS).chmod(0o711)

    def serve(self) -> None:
        """Until idle."""
        print("ready", flush=True)
        devnull = os.open("/dev/null", os.O_RDWR)
        log = os.open(self.place / "keeper.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for source, target in ((devnull, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        if self.settings.seat is None:
            print(
                "no C compiler, or it fails: commands are started in a slower way (apt-get install gcc libc6-dev)", flush=True
            )
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._end)
        self.poll.register(woken, select.EPOLLIN)
        self.poll.register(self.listener.fileno(), select.EPOLLIN)
        gc.freeze()
        last = time.monotonic()
        while True:
            busy = self.crew.busy or self.patient.busy  # nothing is made ahead at the cost of what is asked for
            missing = self.spares.missing() if self.live and not busy else None
            ready = [descriptor for descriptor, _ in self.poll.poll(_CALM if missing else 1.0)]
            if missing and not ready:
                try:
                    self._make_ahead(missing)
                except OSError:  # there is no room for what nobody has asked for
                    self.spares.used = self.spares.created = 0.0
            for descriptor in ready:
                if descriptor == woken:
                    os.read(woken, 4096)
                elif descriptor in self.leases:
                    self._close(self._release(descriptor))
                elif (crew := next((one for one in (self.crew, self.patient) if descriptor in one.members), None)) is not None:
                    self._made(crew.hear(descriptor))
                else:
                    self._accept()
            self._collect()
            if time.monotonic() - self.looked > 1.0:
                self._look()
            last = time.monotonic() if ready or self.children or self.live or self.crew.busy else last
            if time.monotonic() - last > _IDLE and self._leave():
                return

    def _look(self) -> None:
        """What has become old: containers without a lease, things made ahead."""
        self.looked = time.monotonic()
        for identity in [one for one, kept in self.live.items() if kept is not None and kept[1] < time.time()]:
            self._close(identity)
        self._rest()

    def _release(self, descriptor: int) -> str:
        channel, identity = self.leases.pop(descriptor)
        self.poll.unregister(descriptor)
        channel.close()
        return identity

    def _close(self, identity: str) -> None:
        if identity in self.live:
            del self.live[identity]
            self._leave_seat(identity)
            self._make(Task({"op": "close", "id": identity}))

    # -- seats

    def _seat(self, name: str | None = None) -> Seat:
        """A seat in groups of this name, or in new ones."""
        return open_seat(self.settings, name or f"c-{os.urandom(8).hex()}", _ENTRIES)

    def _new_seat(self) -> Seat:
        """The oldest of those that wait, which has its groups by now if any has."""
        while self.spares.seats:
            found = self.spares.seats.pop(0)
            if not _speaks(found.control):  # which a seat never does: it has died
                return found
            found.control.close()
            self.settings.group(found.name).remove()
        return self._seat()

    def _seat_of(self, identity: str) -> Seat | None:
        """The seat of a container, made again if it had none lately; None if there is no such container."""
        found = self.seats.get(identity)
        if found is not None and _speaks(found.control):  # which a seat never does: it has died
            self._leave_seat(identity)
            found = None
        if found is None and (name := group_name(self.place / identity)) is not None:
            found = self._seat(name)
            try:
                pidfd = State.load(self.place, self.settings, identity, found.control).open()
            except SandboxLost:
                found.control.close()
                return None
            know(found.control, pidfd)
            os.close(pidfd)
            self.seats[identity] = found
        return found

    def _leave_seat(self, identity: str) -> None:
        seat = self.seats.pop(identity, None)
        if seat is not None:
            seat.control.close()

    def _rest(self) -> None:
        """Forget the seats that have ended because nobody needed them, and end what was made ahead for nobody."""
        before = time.monotonic() - SPARE_IDLE
        for identity in [one for one, found in self.seats.items() if _speaks(found.control)]:
            self._leave_seat(identity)
        if not self.live or self.spares.created < before:
            self._drop_spares(clerks=not self.live or self.spares.used < before)
            self.crew.end()
            self.patient.end()

    # -- spares

    def _make_ahead(self, what: str) -> None:
        if what == "seat":
            self.spares.seats.append(self._seat())
        elif what == "container" and self.spares.pattern is not None:
            identity, seat = f"c-{os.urandom(8).hex()}", self._new_seat()
            request = {**self.spares.pattern, "op": "create", "id": identity, "ahead": True}
            spare = Spare(kind_of(request) or "", identity, seat)
            self.spares.containers.append(spare)
            self.patient.give(Task(request, seat=seat), spare)
            for other in self.spares.surplus():
                other.seat.control.close()
                self.patient.give(Task({"op": "close", "id": other.identity}))
        else:
            mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            child = os.fork()
            if child == 0:
                self._child(theirs)
            theirs.close()
            self.spares.clerks.append(Clerk(child, mine))

    def _drop_spares(self, clerks: bool) -> None:
        while clerks and self.spares.clerks:
            self.spares.clerks.pop().channel.close()
        while self.spares.seats:
            seat = self.spares.seats.pop()
            seat.control.close()
            self.settings.group(seat.name).remove()
        while self.spares.containers:
            spare = self.spares.containers.pop()
            spare.seat.control.close()
            self._make(Task({"op": "close", "id": spare.identity}))
        self.spares.pattern = None

    def _accept(self) -> None:
        try:
            channel, _ = self.listener.accept()
        except OSError:  # too many descriptors are open: whoever waits does so until some are closed
            time.sleep(_CALM)
            return None
        try:
            user = struct.unpack("iii", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
            channel.settimeout(5.0)
            message = frames.receive(channel) if user == os.geteuid() else None
        except (OSError, frames.BrokenFrameError):
            message = None
        if message is None:
            return channel.close()
        request, body = message
        self.spares.used = time.monotonic()
        if request["op"] in ("lease", "keep", "create") and request["version"] != self.version:
            text = "the keeper was started by another version of this package: close its sandboxes, or nautile sandbox stop"
            _refuse(Task(request, b"", channel), SubstrateUnavailable("container", text, "try again after that"))
            return channel.close()
        try:
            self._answer(request, body, channel)
        except OSError as error:  # no process, no descriptor: this request fails, the containers stay
            _refuse(Task(request, b"", channel), SandboxLost(f"{request['op']}: the keeper could not begin it: {error}"))
            if channel.fileno() not in self.leases:
                channel.close()
        return None

    def _answer(self, request: dict[str, Any], body: bytes, channel: socket.socket) -> None:
        match request["op"]:
            case "lease" | "keep":
                self._hold(request, channel)
                frames.send(channel, {"ok": True})
                if request["op"] == "keep":
                    channel.close()
            case "create":
                self._hold(request, channel)
                self._create(request, channel)
            case "stop":
                self._end()
            case "close":
                self.live.pop(request["id"], None)
                self._leave_seat(request["id"])
                self._make(Task(request, body, channel))
            case "seat":
                self._give_seat(request, channel)
            case _:
                if (kept := self.live.get(request["id"])) is not None:
                    self.live[request["id"]] = (kept[0], time.time() + kept[0] + float(request.get("timeout", 0)))
                self._fork(Task(request, body, channel, self._seat_of(request["id"])))

    def _create(self, request: dict[str, Any], channel: socket.socket) -> None:
        self.spares.note(request)
        spare = self.spares.take(request, lambda one: not _speaks(one.seat.control))
        seat = self._new_seat() if spare is None else spare.seat
        self.seats[request["id"]] = seat
        leased = request["seconds"] is None
        if spare is None:
            task = Task(request, b"", channel, seat)
            self._fork(task, keep=leased) if request["rules"] is not None else self._make(task, keep=leased)
        else:
            self._adopt(request, channel, spare)
            if not leased:
                channel.close()
        if self.spares.seats_missing:
            self.spares.seats.append(self._seat())

    def _adopt(self, request: dict[str, Any], channel: socket.socket, spare: Spare) -> None:
        """Give a client a container that is there. Some files are written: sooner done than handed to another process."""
        try:
            made = adopt(self.place, self.settings, request, spare.identity, spare.seat)
            with contextlib.suppress(OSError, frames.BrokenFrameError):  # it has gone: its lease says so, too
                give(channel, spare.seat, made)
        except SandboxError as error:
            _refuse(Task(request, b"", channel), error)
        except OSError as error:
            _refuse(Task(request, b"", channel), SandboxLost(f"create: {error}"))

    def _give_seat(self, request: dict[str, Any], channel: socket.socket) -> None:
        """Give the client of a container what reaches its seat, which is made again if it has ended."""
        found = self._seat_of(request["id"])
        with channel:
            if found is None:
                _refuse(Task(request, b"", channel), SandboxLost(f"the container {request['id']} is gone"))
                return
            with contextlib.suppress(OSError, frames.BrokenFrameError):
                give(channel, found, {})

    def _hold(self, request: dict[str, Any], channel: socket.socket) -> None:
        """Keep a sandbox as long as its client holds the connection, or some seconds after the last request."""
        seconds = request["seconds"]
        if seconds is None:
            self.live[request["id"]] = None
            self.leases[channel.fileno()] = (channel, request["id"])
            self.poll.register(channel.fileno(), select.EPOLLIN)
        else:
            self.live[request["id"]] = (seconds, time.time() + seconds)

    def _fork(self, task: Task, keep: bool = False) -> int:
        """Carry out a task in a fork, one that waits for it or a new one. ``keep``: its connection is also a lease."""
        child = 0
        while self.spares.clerks and not child:
            clerk = self.spares.clerks.pop(0)
            child = clerk.process if send_task(clerk, task) else 0
            clerk.channel.close()
        if not child:
            child = os.fork()
            if child == 0:
                self._child(task)
        self.children.add(child)
        if task.channel is not None and not keep:
            task.channel.close()
        return child

    def _make(self, task: Task, keep: bool = False) -> None:
        """Let one of the crew make or end a container. ``keep``: the connection is also a lease."""
        if not self.crew.give(task):
            self._fork(task, keep)
        elif task.channel is not None and not keep:
            task.channel.close()

    def _crew(self, most: int, nice: int) -> Crew:
        def fork(channel: socket.socket) -> int:
            child = os.fork()
            if child == 0:
                self._member(channel, nice)
            return child

        return Crew(most, fork, lambda one: self.poll.register(one, select.EPOLLIN), self.poll.unregister)

    def _member(self, source: socket.socket, nice: int) -> NoReturn:
        """In a fork: carry out one task after the other, and tell when each is done."""
        try:
            _forget_signals()
            os.nice(nice)
            (channel,) = self._only(source)
            rehearse()
            while (task := receive_task(channel)) is not None:
                self._carry_out(task)
                for one in sockets_of(task):
                    one.close()
                with contextlib.suppress(ChildProcessError):  # those behind layers that were mounted
                    while os.waitpid(-1, os.WNOHANG)[0]:
                        pass
                channel.send(b".")
        finally:
            os._exit(0)

    def _child(self, source: Task | socket.socket) -> NoReturn:
        """In a fork: carry out a task, or the one that comes on a channel."""
        try:
            _forget_signals()
            if isinstance(source, Task):
                task: Task | None = self._alone(source)
            else:
                (waiting,) = self._only(source)
                rehearse()
                task = receive_task(waiting)
                waiting.close()
            if task is not None:
                self._carry_out(task)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)

    def _carry_out(self, task: Task) -> None:
        """Do it; an error becomes the answer."""
        try:
            if task.channel is not None:
                task.channel.settimeout(None)
            carry_out(self.place, self.settings, task)
        except SandboxError as error:
            _refuse(task, error)
        except (OSError, frames.BrokenFrameError) as error:
            _refuse(task, SandboxLost(f"{task.request['op']}: {error}"))
        except BaseException as error:
            traceback.print_exc()
            _refuse(task, SandboxLost(f"{task.request['op']} failed inside the keeper: {type(error).__name__}: {error}"))

    def _only(self, *sockets: socket.socket) -> list[socket.socket]:
        """Close every other descriptor than these, the standard ones and those of the settings; they become 3 and up."""
        moved = [fcntl.fcntl(one.fileno(), fcntl.F_DUPFD_CLOEXEC, _KEPT // 2) for one in sockets]
        for target, one in enumerate(moved, 3):
            os.dup2(one, target, inheritable=False)
        first = 3 + len(moved)
        for kept in sorted(self.settings.descriptors):
            os.closerange(first, kept)
            first = kept + 1
        os.closerange(first, 2**20)
        return [socket.socket(fileno=target) for target in range(3, 3 + len(moved))]

    def _alone(self, task: Task) -> Task:
        """The same task with nothing else open."""
        sockets = self._only(*sockets_of(task))
        channel = None if task.channel is None else sockets[0]
        return Task(task.request, task.body, channel, None if task.seat is None else Seat(task.seat.name, sockets[-1]))

    def _collect(self) -> None:
        """Our own children, and the first processes of containers, which come to us when crun ends."""
        with contextlib.suppress(ChildProcessError):
            while child := os.waitpid(-1, os.WNOHANG)[0]:
                self.children.discard(child)

    def _made(self, spares: list[Spare]) -> None:
        for spare in spares:
            spare.made = (self.place / spare.identity / "state.json").exists()
            if not spare.made and spare in self.spares.containers:  # it will fail for the next caller too, who is told why
                self.spares.containers.remove(spare)
                self.spares.pattern = None
                spare.seat.control.close()

    def _leave(self) -> bool:
        """End, unless somebody has just connected, who must not be left without an answer."""
        found, hidden = self.place / "keeper.sock", self.place / "keeper.leaving"
        if _speaks(self.listener):
            return False
        with contextlib.suppress(FileNotFoundError):
            os.rename(found, hidden)
            if _speaks(self.listener):  # before it was hidden
                os.rename(hidden, found)
                return False
        self._tidy()
        return True

    def _end(self, *_: object) -> NoReturn:
        """End with every sandbox."""
        cgroup.end(self.owner)
        self._tidy()
        os._exit(0)

    def _tidy(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.place / "keeper.sock")
        cgroup.end(self.owner)
        for entry in self.place.glob("*/pid"):
            end_first_process(entry.parent)
        for entry in [
            *self.place.glob(f"{WORK}/*/fs"),
            self.place / WORK,
            *self.place.glob("layers/*"),
            *self.place.glob(f"{MOUNTS}/*"),
        ]:
            with contextlib.suppress(OSError):
                kernel.unmount(str(entry))
        for entry in self.place.iterdir():
            if entry.is_dir():
                if not _in_use(entry):
                    _remove(entry)
            elif entry.name not in ("keeper.lock", "start.lock"):
                entry.unlink(missing_ok=True)


def _speaks(channel: socket.socket) -> bool:
    """Whether something, or the end, can be read. For descriptors above 1,023, too, which select(2) cannot take."""
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def _remove(entry: Path) -> None:
    """Remove a directory of the keeper's; the mount points of callers' directories only if they are empty."""
    if entry.name != MOUNTS:
        shutil.rmtree(entry, ignore_errors=True)
        return
    for point in entry.iterdir():
        with contextlib.suppress(OSError):
            point.rmdir()
    with contextlib.suppress(OSError):
        entry.rmdir()


def _in_use(entry: Path) -> bool:
    """Whether a directory holds the images of a client that still runs."""
    return entry.name.startswith("images-") and cgroup.alive(entry.name.removeprefix("images-"))


def _forget_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _mount_namespaces(work: Path) -> int:
    """Two namespaces of our own: one to work in, and one without containers, of which a descriptor is returned.

    Both have a file system in memory at ``work``, which is made.
    """
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_SLAVE)
    work.mkdir(mode=0o711)
    kernel.mount("nautile", str(work), "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=0711")
    without = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    hybrid = "/sys/fs/cgroup/unified"
    covered = os.path.ismount(hybrid)
    if covered:  # crun refuses a hybrid system; it needs no cgroups, they are ours
        # Covered, not unmounted: in an ordinary user's namespace what was there before cannot be taken away.
        kernel.mount("none", hybrid, "tmpfs", kernel.MS_RDONLY)
    kernel.unshare(kernel.CLONE_NEWNS)
    if covered:
        kernel.unmount(hybrid)
    return without


def _refuse(task: Task | None, error: SandboxError) -> None:
    if task is not None and task.channel is not None:
        with contextlib.suppress(OSError, frames.BrokenFrameError):
            frames.send(task.channel, {"error": type(error).__name__, "text": str(error), "fields": vars(error)})


def _enter_user_namespace() -> None:
    """An ordinary user's keeper is root in a namespace of its own, which has this one user."""
    user, group = os.geteuid(), os.getegid()
    kernel.unshare(kernel.CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


if __name__ == "__main__":
    main()
