"""The container substrate as its client sees it: a method is one connection to the user's keeper.

Only a command without a name is started at the container's seat directly, and seen to its end by this process: nobody is waked
who does not need to be. A named one must go on when its client dies, and is seen to by the keeper.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from nautile.sandbox import cgroup, enter, errors, seccomp
from nautile.sandbox.driver import Order, Watch
from nautile.sandbox.errors import FileRefused, InvalidRequest, SandboxError, SandboxLost, SubstrateUnavailable
from nautile.sandbox.image import Image, TemporaryLayer
from nautile.sandbox.inside import frames
from nautile.sandbox.limits import Limits
from nautile.sandbox.policy import NetworkPolicy
from nautile.sandbox.result import Capabilities, Entry, Info, RunResult
from nautile.sandbox.seat import SeatGone
from nautile.sandbox.session import Session
from nautile.sandbox.state import version

__all__ = ["ContainerDriver", "KeeperClient"]

_MARGIN = 20.0  # seconds that the keeper may need on top of a command
_START_LIMIT = 20.0
_SEATS = 5  # that the kernel may kill at the memory limit before a command is given up
_FULL = "sandbox: the command could not be started: the container is at its memory limit\n"
_AT_LIMIT = RunResult(125, "", _FULL, False, False, None, memory_killed=True, stderr_bytes=_FULL.encode())


class KeeperClient:
    """Where the keeper of this user is, and how to start it."""

    def __init__(self, place: Path | None = None) -> None:
        self.place = place or _runtime_directory()
        self.version = version()

    @property
    def running(self) -> bool:
        """Whether there is a keeper."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            self._reach(channel)
            return True
        return False

    def _reach(self, channel: socket.socket) -> None:
        """Raises ConnectionRefusedError also where a fork of a killed keeper still holds its socket, and nobody will answer."""
        channel.connect(str(self.place / "keeper.sock"))
        listening = struct.unpack("iii", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        if listening and not cgroup.runs(listening):  # 0: it cannot be seen from here
            raise ConnectionRefusedError

    def connect(self, begin: bool = True) -> socket.socket:
        """A connection; starts the keeper if there is none. Raises SubstrateUnavailable, or SandboxLost unless ``begin``."""
        for _ in range(3):
            channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self._reach(channel)
                return channel
            except (FileNotFoundError, ConnectionRefusedError):
                channel.close()
                if not begin:
                    raise SandboxLost("the keeper has ended") from None
                self._start()
            except BaseException:
                channel.close()
                raise
        raise SubstrateUnavailable("container", f"the keeper does not answer: {self._said()}", "nautile sandbox doctor")

    def _start(self) -> None:
        if shutil.which("crun") is None:
            raise SubstrateUnavailable("container", "crun is missing", "apt-get install crun")
        # Containers' own users must be able to pass through; the socket and all files are for their owner alone.
        self.place.mkdir(mode=0o711, parents=True, exist_ok=True)
        self.place.chmod(0o711)
        found = self.place.lstat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o022 or not stat.S_ISDIR(found.st_mode):
            raise SubstrateUnavailable("container", f"{self.place} is not ours alone", f"remove {self.place}")
        with open(self.place / "start.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.running:  # somebody else has been faster
                return
            code = "from nautile.sandbox.keeper import main; main()"
            try:
                done = subprocess.run(
                    [sys.executable, "-I", "-c", code, str(self.place)],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=_START_LIMIT,
                    check=False,
                    cwd="/",
                    start_new_session=True,
                )
            except subprocess.TimeoutExpired:
                why = f"the keeper did not start within {_START_LIMIT:g} s"
                raise SubstrateUnavailable("container", why, "try again when the machine is less busy") from None
        if b"ready" not in done.stdout:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()
            why = f"the keeper did not start ({said[-1] if said else 'it said nothing'})"
            raise SubstrateUnavailable("container", why, "nautile sandbox doctor")

    def _said(self) -> str:
        with contextlib.suppress(OSError):
            return (self.place / "keeper.log").read_text(errors="replace").strip()[-500:]
        return "it left no log"

    def ask(
        self, request: dict[str, Any], body: bytes = b"", *, timeout: float = 60.0, begin: bool = True
    ) -> tuple[dict[str, Any], bytes]:
        """One request, one answer. Raises what the keeper raised, or SandboxLost."""
        with self.connect(begin) as channel:
            channel.settimeout(timeout)
            send(channel, request, body)
            return answer(channel)

    def stop(self) -> None:
        """End the keeper with every sandbox of this user."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.connect(str(self.place / "keeper.sock"))
            channel.settimeout(30.0)
            frames.send(channel, {"op": "stop"})
            channel.recv(1)


def send(channel: socket.socket, request: dict[str, Any], body: bytes = b"") -> None:
    """Send, or raise SandboxLost."""
    try:
        frames.send(channel, request, body)
    except OSError as error:
        raise SandboxLost(f"the keeper has gone ({error})") from None


def answer(channel: socket.socket) -> tuple[dict[str, Any], bytes]:
    """The next frame. Raises the error that it holds, or SandboxLost."""
    try:
        message = frames.receive(channel)
    except TimeoutError:
        raise SandboxLost("the keeper did not answer in time") from None
    except (OSError, frames.BrokenFrameError) as error:
        raise SandboxLost(f"the keeper hung up ({error})") from None
    if message is None:
        raise SandboxLost("the keeper hung up before it answered")
    if "error" in message[0]:
        raise _rebuilt(message[0])
    return message


def _receive_seat(channel: socket.socket) -> socket.socket:
    """What reaches the seat, after the answer that says that there is one. Raises SandboxLost."""
    try:
        _, descriptors, _, _ = socket.recv_fds(channel, 1, 1, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        raise SandboxLost(f"the keeper hung up ({error})") from None
    if not descriptors:
        raise SandboxLost("the keeper gave no way to the container's seat: are too many descriptors open?")
    return socket.socket(fileno=descriptors[0])


def _rebuilt(header: dict[str, Any]) -> SandboxError:
    """The error that the keeper met, as the same class here."""
    kind = getattr(errors, header["error"], SandboxError)
    error = kind.__new__(kind)
    RuntimeError.__init__(error, header["text"])
    vars(error).update(header["fields"])
    return cast(SandboxError, error)


def _runtime_directory() -> Path:
    user = os.geteuid()
    if user == 0:
        return Path("/run/nautile")
    place = Path(f"/run/user/{user}")
    return place / "nautile" if os.access(place, os.W_OK) else Path(tempfile.gettempdir()) / f"nautile-{user}"


class ContainerDriver:
    """One container. ``create`` makes it; the lease keeps it alive for as long as this process is."""

    capabilities = Capabilities(files=True, session=True, pause=True, snapshot=True, fork=True, pack_diff=True, network=False)

    def __init__(self, keeper: KeeperClient, identity: str, limits: Limits, image: Image, info: Info) -> None:
        self._keeper, self._id, self._limits, self._image, self.info = keeper, identity, limits, image, info
        self._lease: socket.socket | None = None
        self._tenant = 0
        self._seat: socket.socket | None = None
        self._direct = False  # whether it ends with this process, which can then see to its commands
        self._paused = False
        self._policy = NetworkPolicy()
        self._filter = seccomp.program(system_v=True)

    @classmethod
    def create(
        cls,
        identity: str,
        image: Image,
        limits: Limits,
        policy: NetworkPolicy,
        workspace: Path | None,
        keeper: KeeperClient | None = None,
        keep: float | None = None,
    ) -> ContainerDriver:
        """Make a container; it lives as long as this process, or ``keep`` seconds after the last request.

        Raises SubstrateUnavailable, LimitUnavailable.
        """
        client = keeper or KeeperClient()
        info = Info(identity, "container", "crun", "native", ())
        driver = cls(client, identity, limits, image, info)
        channel = client.connect()
        try:
            channel.settimeout(60.0)
            request = {
                "op": "create",
                "id": identity,
                "seconds": keep,
                "version": client.version,
                "limits": dataclasses.asdict(limits),
                "layers": [str(layer) for layer in image.layers],
                "host_usr": image.host_usr,
                "rules": policy.texts or None,
                "workspace": None if workspace is None else str(workspace),
            }
            send(channel, request)
            made, _ = answer(channel)
            driver._seat = _receive_seat(channel)
        except BaseException:
            channel.close()  # the lease, if there is one
            if keep is not None:
                with contextlib.suppress(SandboxError):
                    client.ask({"op": "close", "id": identity})
            raise
        driver._lease, driver._tenant = channel, made["tenant"]
        driver._direct = keep is None
        if not driver._direct:
            driver._leave_seat()
        driver.info = dataclasses.replace(info, limits_enforced=tuple(made["enforced"]))
        driver.capabilities = dataclasses.replace(cls.capabilities, network=bool(policy.rules))
        driver._policy = policy
        return driver

    @classmethod
    def attach(cls, identity: str, limits: Limits, keep: float, keeper: KeeperClient | None = None) -> ContainerDriver:
        """A container that has outlived its client. Raises SandboxLost."""
        client = keeper or KeeperClient()
        if not client.running:
            raise SandboxLost(f"the container {identity} is gone: its keeper has ended")
        described, _ = client.ask({"op": "describe", "id": identity})
        image = Image(tuple(map(Path, described["layers"])), described["host_usr"])
        driver = cls(
            client, identity, limits, image, Info(identity, "container", "crun", "native", tuple(described["enforced"]))
        )
        driver.capabilities = dataclasses.replace(cls.capabilities, network=described["network"])
        driver._hold(keep)
        return driver

    def _hold(self, keep: float | None) -> None:
        """Keep it alive: with this process, or for ``keep`` seconds after the last request."""
        channel = self._keeper.connect()
        try:
            channel.settimeout(_MARGIN)
            send(
                channel,
                {"op": "lease" if keep is None else "keep", "id": self._id, "seconds": keep, "version": self._keeper.version},
            )
            answer(channel)
        except BaseException:
            channel.close()
            raise
        self._lease = channel

    def keep_alive(self, seconds: float) -> None:
        """Without a lease: live on for so long from now. Raises SandboxLost when there is no keeper any more."""
        if not self._keeper.running:
            raise SandboxLost("the keeper has ended")
        self._keeper.ask({"op": "keep", "id": self._id, "seconds": seconds, "version": self._keeper.version})

    def reason(self, feature: str) -> tuple[str, str]:
        """See ``Driver.reason``."""
        if feature == "network":
            return "this container was made without one", "create it with network=[...]"
        return "containers of this version cannot", "use another substrate"

    def _request(self, op: str, **fields: Any) -> dict[str, Any]:
        if self._paused and op != "freeze":
            self.resume()
        return {"op": op, "id": self._id, **fields}

    def run(self, order: Order, watch: Watch | None) -> RunResult:
        """See ``Driver.run``."""
        try:
            if order.operation is None and self._direct:
                return self._run_directly(order, watch)
            return self._run(order, watch)
        except SandboxLost as error:
            return RunResult(-1, "", "", False, False, f"container: {error}")

    def _run_directly(self, order: Order, watch: Watch | None) -> RunResult:
        """Raises SandboxLost."""
        if self._paused:
            self.resume()

        def rescue(group: str) -> None:
            self._keeper.ask({"op": "end", "id": self._id, "group": group})

        for _ in range(_SEATS):
            if self._seat is None:
                self._seat = self._ask_for_seat()
            inside = enter.Inside(self._seat, self._tenant, self._limits, bool(self._policy.rules))
            try:
                return enter.run_directly(inside, order, self._filter, watch, rescue)
            except SeatGone:
                self._leave_seat()
        return _AT_LIMIT

    def _ask_for_seat(self) -> socket.socket:
        with self._keeper.connect() as channel:
            channel.settimeout(_MARGIN)
            send(channel, {"op": "seat", "id": self._id})
            answer(channel)
            return _receive_seat(channel)

    def _leave_seat(self) -> None:
        if self._seat is not None:
            self._seat.close()
        self._seat = None

    def _run(self, order: Order, watch: Watch | None) -> RunResult:
        """Through the keeper. Raises SandboxLost."""
        request = self._request(
            "run",
            argv=order.argv,
            cwd=order.cwd,
            environment=dict(order.environment),
            timeout=order.timeout,
            operation=order.operation,
            watch=watch is not None,
            filter=len(self._filter),
        )
        for _ in range(_SEATS):
            with self._keeper.connect() as channel:
                channel.settimeout(order.timeout + _MARGIN)
                send(channel, request, self._filter + order.stdin)
                while "stream" in (message := answer(channel))[0]:
                    if watch is not None:
                        watch(message[0]["stream"], message[1])
            if "again" not in message[0]:  # nothing was begun
                return result_of(*message)
        return _AT_LIMIT

    def outcome(self, operation: str, timeout: float) -> RunResult | str:
        """The result of a named operation that was begun earlier, or ``never`` or ``unknown``. Raises SandboxLost."""
        request = self._request("outcome", operation=operation, timeout=timeout)
        header, body = self._keeper.ask(request, timeout=timeout + 2 * _MARGIN)
        return next((word for word in ("never", "unknown") if word in header), None) or result_of(header, body)

    def read(self, path: str, limit: int) -> bytes:
        """See ``Sandbox.read``."""
        pieces = []
        with self._exchange("read", path=path, limit=limit) as channel:
            while "done" not in (message := answer(channel))[0]:
                pieces.append(message[1])
        return b"".join(pieces)

    def write(self, path: str, data: bytes, mode: int) -> None:
        """See ``Sandbox.write``."""
        if len(data) > frames.BODY_LIMIT:
            raise InvalidRequest(f"{len(data):,} bytes are too many for write: use upload")
        self._keeper.ask(self._request("write", path=path, mode=mode), data)

    def list(self, path: str) -> list[Entry]:
        """See ``Sandbox.list``."""
        header, _ = self._keeper.ask(self._request("list", path=path))
        return [Entry(name, _kind(mode), size, mode & 0o7777) for name, mode, size in header["entries"]]

    def upload(self, source: Path, path: str) -> None:
        """See ``Sandbox.upload``."""
        with self._exchange("upload", path=path) as channel:
            answer(channel)
            for relative, entry in _walk(source):
                directory = entry.is_dir()
                mode = entry.stat().st_mode & 0o777
                send(channel, {"entry": relative, "mode": mode, "directory": directory})
                if not directory:
                    with open(entry, "rb") as file:
                        while data := file.read(2**20):
                            send(channel, {"data": True}, data)
                    send(channel, {"end": True})
            send(channel, {"finished": True})
            answer(channel)

    def download(self, path: str, target: Path, limit: int) -> None:
        """See ``Sandbox.download``."""
        if target.exists() or target.is_symlink():
            raise InvalidRequest(f"{target} exists: name a target that does not")
        with self._exchange("download", path=path, limit=limit) as channel:
            _receive_tree(channel, target)

    @contextlib.contextmanager
    def _exchange(self, operation: str, **fields: Any) -> Iterator[socket.socket]:
        with self._keeper.connect() as channel:
            channel.settimeout(60.0)
            send(channel, self._request(operation, **fields))
            yield channel

    def session(self, argv: Sequence[str], pty: bool) -> Session:
        """See ``Sandbox.session``."""
        channel = self._keeper.connect()
        try:
            channel.settimeout(_MARGIN)
            request = self._request("session", argv=list(argv), pty=pty, timeout=10.0**6)
            send(channel, request, self._filter)
            return Session.receive(channel)
        except BaseException:
            channel.close()
            raise

    def pause(self) -> None:
        """See ``Sandbox.pause``."""
        self._keeper.ask(self._request("freeze", frozen=True))
        self._paused = True

    def resume(self) -> None:
        """See ``Sandbox.resume``."""
        self._keeper.ask(self._request("freeze", frozen=False))
        self._paused = False

    def pack_diff(self, target: Path) -> str:
        """See ``Sandbox.pack_diff``."""
        header, _ = self._keeper.ask(self._request("pack", target=str(target.absolute())), timeout=600.0)
        return str(header["digest"])

    def layer(self, place: Path) -> Image:
        """The files as they are now, as an image whose top layer is in ``place``, which the caller keeps while it is used."""
        self._keeper.ask(self._request("pack", layer=str(place)), timeout=600.0)
        return Image((*self._image.layers, place), self._image.host_usr, held=self._image.held)

    def snapshot(self) -> Image:
        """See ``Sandbox.snapshot``."""
        images = self._keeper.place / f"images-{cgroup.owner_name()}"
        images.mkdir(mode=0o711, exist_ok=True)
        layer = TemporaryLayer(Path(tempfile.mkdtemp(dir=images)))
        layer.place.chmod(0o755)
        self._keeper.ask(self._request("pack", layer=str(layer.place)), timeout=600.0)
        return self._image.with_layer(layer)

    def fork(self) -> ContainerDriver:
        """See ``Sandbox.fork``."""
        identity = f"c-{os.urandom(8).hex()}"
        return ContainerDriver.create(identity, self.snapshot(), self._limits, self._policy, None, self._keeper)

    def set_policy(self, policy: NetworkPolicy) -> None:
        """See ``Sandbox.set_policy``."""
        self._keeper.ask(self._request("policy", rules=policy.texts))
        self._policy = policy

    def close(self) -> None:
        """See ``Driver.close``."""
        lease, self._lease = self._lease, None
        self._leave_seat()
        if lease is None:
            return
        with contextlib.suppress(SandboxError):  # no keeper is started to end what has ended with the last one
            self._keeper.ask({"op": "close", "id": self._id}, begin=False)
        lease.close()


def result_of(header: dict[str, Any], body: bytes) -> RunResult:
    """A frame as a result."""
    out, err = body[: header["stdout"]], body[header["stdout"] :]
    return RunResult(
        exit_code=header["exit_code"],
        stdout=out.decode("utf-8", "replace"),
        stderr=err.decode("utf-8", "replace"),
        truncated=header["truncated"],
        timed_out=header["timed_out"],
        infrastructure_error=header["infrastructure_error"],
        memory_killed=header["memory_killed"],
        seconds=header["seconds"],
        stdout_bytes=out,
        stderr_bytes=err,
    )


def _kind(mode: int) -> str:
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}
    return kinds.get(stat.S_IFMT(mode), "other")


def _walk(source: Path) -> Iterator[tuple[str, Path]]:
    """(relative path, place) of a file, or of a directory and what it holds. Raises FileRefused for anything else."""
    found = os.lstat(source) if os.path.lexists(source) else None
    if found is None or stat.S_ISLNK(found.st_mode) or not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise FileRefused(str(source), "not a plain file or a directory" if found else "it does not exist")
    if stat.S_ISREG(found.st_mode):
        yield "", source
        return
    for directory, _, names in os.walk(source):
        relative = os.path.relpath(directory, source)
        prefix = "" if relative == "." else relative
        yield prefix, Path(directory)
        for name in sorted(names):
            place = Path(directory, name)
            if not stat.S_ISREG(os.lstat(place).st_mode):
                raise FileRefused(str(place), "links and special files are not uploaded")
            yield f"{prefix}/{name}" if prefix else name, place


def _receive_tree(channel: socket.socket, target: Path) -> None:
    """Build what the sandbox sends below ``target``, whose names are checked: nothing is made outside of it."""
    file: int | None = None
    made: list[tuple[Path, int]] = []
    try:
        while "done" not in (message := answer(channel))[0]:
            header, data = message
            if "data" in header:
                assert file is not None
                os.write(file, data)
                continue
            if file is not None:
                os.close(file)
                file = None
            steps = [] if header["entry"] == "" else header["entry"].split("/")
            if any(step in ("", ".", "..") or "\0" in step for step in steps):
                raise FileRefused(header["entry"], "the sandbox sent a name that leads elsewhere")
            place = target.joinpath(*steps)
            if header["directory"]:
                place.mkdir(mode=0o700)
                made.append((place, header["mode"]))
            else:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                file = os.open(place, flags, header["mode"] & 0o777)
    finally:
        if file is not None:
            os.close(file)
    for place, mode in reversed(made):
        place.chmod(mode & 0o777 | 0o700)
