"""A virtual machine in a process of its own, as its clients see it: it outlives them, and they find it again by its name."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nautile.sandbox import cgroup, container
from nautile.sandbox.driver import Order, Watch
from nautile.sandbox.errors import InvalidRequest, SandboxError, SandboxLost, SubstrateUnavailable
from nautile.sandbox.guest import places
from nautile.sandbox.guest.host import VERSION
from nautile.sandbox.guest.wish import MachineWish
from nautile.sandbox.image import Image, TemporaryLayer
from nautile.sandbox.inside import frames
from nautile.sandbox.policy import NetworkPolicy
from nautile.sandbox.records import rebuilt, run_result
from nautile.sandbox.result import Capabilities, Entry, Info, RunResult
from nautile.sandbox.session import Session

__all__ = ["HostedDriver", "hosts_directory", "stop_hosts"]

_MARGIN = 45.0  # seconds that a host may need on top of a command: killing it, copying a workspace
_STARTING = 180.0  # seconds for a machine to be made
_LONG = 600.0


def hosts_directory() -> Path:
    """Where this user's hosts are: beside the keeper's directory, of which a keeper clears everything that it does not know."""
    keeper = container._runtime_directory()
    return keeper.with_name(f"{keeper.name}-machines")


class HostedDriver:
    """One machine. ``create`` starts a host for it, ``attach`` finds it again."""

    def __init__(self, identity: str, image: Image, described: dict[str, Any]) -> None:
        self._id, self._image = identity, image
        info = described["info"]
        self.info = Info(**{**info, "limits_enforced": tuple(info["limits_enforced"])})
        self.capabilities = Capabilities(**described["capabilities"])

    @classmethod
    def create(cls, identity: str, wish: MachineWish, keep: float) -> HostedDriver:
        """Start a machine that lives on for ``keep`` seconds after its last request, with or without this process.

        Raises SubstrateUnavailable, LimitUnavailable, InvalidRequest.
        """
        root = _root(wish.kind)
        _sweep(root)
        _start(wish.kind, root / identity)
        request = {"op": "create", "id": identity, "wish": wish.record(), "keep": keep}
        try:
            described, _ = _ask(identity, request, seconds=_STARTING)
        except SandboxLost as error:
            raise SubstrateUnavailable(wish.kind, f"its host has failed ({error})", "nautile sandbox doctor") from None
        return cls(identity, wish.image, described)

    @classmethod
    def attach(cls, identity: str, keep: float) -> HostedDriver:
        """A machine that has outlived its client. Raises SandboxLost."""
        described, _ = _ask(identity, {"op": "describe", "id": identity}, seconds=_STARTING)
        layers, host_usr = described["image"]["layers"], described["image"]["host_usr"]
        driver = cls(identity, Image(tuple(map(Path, layers)), host_usr), described)
        driver.keep_alive(keep)
        return driver

    def keep_alive(self, seconds: float) -> None:
        """Live on for so long from now and from every request on. Raises SandboxLost."""
        self._do("keep", seconds=seconds)

    def _do(self, op: str, body: bytes = b"", patience: float = 60.0, **fields: Any) -> dict[str, Any]:
        return _ask(self._id, {"op": op, "id": self._id, **fields}, body, patience)[0]

    def reason(self, feature: str) -> tuple[str, str]:
        """See ``Driver.reason``."""
        if feature == "network":
            return "this sandbox was made without one", "create it with network=[...]"
        if feature in ("snapshot", "fork", "pack_diff"):
            return "its image is a disk with a whole system, and nothing says what of it is new", "use an image directory"
        return f"a {self.info.kind} of this version cannot", "use another substrate"

    # -- commands

    def run(self, order: Order, watch: Watch | None) -> RunResult:
        """See ``Driver.run``. The command ends by itself or at its time even if this process does not live to see it."""
        name = order.operation or secrets.token_hex(8)
        request = {
            "op": "run",
            "id": self._id,
            "operation": name,
            "argv": order.argv,
            "timeout": order.timeout,
            "cwd": order.cwd,
            "environment": dict(order.environment),
            "watch": watch is not None,
        }
        try:
            with _connected(self._id, request, order.stdin, order.timeout + _MARGIN) as channel:
                while "stream" in (message := _received(channel))[0]:
                    if watch is not None:
                        watch(message[0]["stream"], message[1])
            return run_result(message[0]["done"], message[1])
        except SandboxLost as error:  # also the answer to a client that was slow to read: then the outcome is there
            with contextlib.suppress(SandboxLost):
                found = self.outcome(name, order.timeout)
                if isinstance(found, RunResult):
                    return found
            return RunResult(-1, "", "", False, False, f"{self.info.kind}: {error}")

    def outcome(self, operation: str, timeout: float) -> RunResult | str:
        """The result of a named command that was begun earlier, or ``never`` or ``unknown``. Raises SandboxLost."""
        request = {"op": "outcome", "id": self._id, "operation": operation, "timeout": timeout}
        header, body = _ask(self._id, request, seconds=timeout + _MARGIN)
        return next((word for word in ("never", "unknown") if word in header), None) or run_result(header, body)

    def session(self, argv: Sequence[str], pty: bool) -> Session:
        """See ``Sandbox.session``. It ends with this process."""
        channel = _connection(self._id, 60.0)
        try:
            frames.send(channel, {"op": "session", "id": self._id, "version": VERSION, "argv": list(argv), "pty": pty})
            return Session.receive(channel)
        except OSError as error:
            channel.close()
            raise SandboxLost(f"the session did not start ({error})") from None
        except BaseException:
            channel.close()
            raise

    # -- files

    def read(self, path: str, limit: int) -> bytes:
        """See ``Sandbox.read``."""
        pieces = []
        with _connected(self._id, {"op": "read", "id": self._id, "path": path, "limit": limit}, b"", _LONG) as channel:
            while "piece" in (message := _received(channel))[0]:
                pieces.append(message[1])
        return b"".join((*pieces, message[1]))

    def write(self, path: str, data: bytes, mode: int) -> None:
        """See ``Sandbox.write``."""
        if len(data) > frames.BODY_LIMIT:
            raise InvalidRequest(f"{len(data):,} bytes are too many for write: use upload")
        self._do("write", data, path=path, mode=mode)

    def list(self, path: str) -> list[Entry]:
        """See ``Sandbox.list``."""
        return [Entry(**entry) for entry in self._do("list", path=path)["entries"]]

    def upload(self, source: Path, path: str) -> None:
        """See ``Sandbox.upload``."""
        self._do("upload", patience=_LONG, place=str(source.absolute()), path=path)

    def download(self, path: str, target: Path, limit: int) -> None:
        """See ``Sandbox.download``."""
        self._do("download", patience=_LONG, place=str(target.absolute()), path=path, limit=limit)

    # -- life

    def pause(self) -> None:
        """See ``Sandbox.pause``."""
        self._do("pause")

    def resume(self) -> None:
        """See ``Sandbox.resume``."""
        self._do("resume")

    def pack_diff(self, target: Path) -> str:
        """See ``Sandbox.pack_diff``."""
        return str(self._do("pack", patience=_LONG, place=str(target.absolute()))["digest"])

    def layer(self, place: Path) -> Image:
        """See ``Machine.layer``."""
        self._do("layer", patience=_LONG, place=str(place))
        return Image((*self._image.layers, place), self._image.host_usr, held=self._image.held)

    def snapshot(self) -> Image:
        """See ``Sandbox.snapshot``."""
        layer = TemporaryLayer(places.temporary("layer"))
        self.layer(layer.place)
        return self._image.with_layer(layer)

    def fork(self) -> HostedDriver:
        """See ``Sandbox.fork``. The copy is kept by the same host."""
        described = self._do("fork", patience=_STARTING)
        return HostedDriver(described["info"]["id"], self._image, described)

    def set_policy(self, policy: NetworkPolicy) -> None:
        """See ``Sandbox.set_policy``."""
        self._do("policy", rules=list(policy.texts))

    def close(self) -> None:
        """See ``Driver.close``."""
        with contextlib.suppress(SandboxError):
            self._do("close")


# -- hosts


def _root(kind: str) -> Path:
    """The directory of this user's hosts. Raises SubstrateUnavailable when it is somebody else's."""
    root = hosts_directory()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = root.lstat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o077 or not stat.S_ISDIR(found.st_mode):
        raise SubstrateUnavailable(kind, f"{root} is not ours alone", f"remove {root}")
    return root


def _start(kind: str, place: Path) -> None:
    """Start a host. Raises SubstrateUnavailable."""
    place.mkdir(mode=0o700)
    code = "from nautile.sandbox.guest.host import main; main()"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", code, str(place)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_MARGIN,
            check=False,
            cwd="/",
            start_new_session=True,
        )
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    except subprocess.TimeoutExpired:
        done, said = None, []
    if done is None or b"ready" not in done.stdout:
        shutil.rmtree(place, ignore_errors=True)
        why = f"a host for it did not start ({said[-1] if said else 'it said nothing'})"
        raise SubstrateUnavailable(kind, why, "nautile sandbox doctor")


def _sweep(root: Path) -> None:
    """Remove what killed hosts have left; their machines have ended with them."""
    for entry in root.iterdir():
        if entry.is_symlink():
            if not entry.exists():
                entry.unlink(missing_ok=True)
        elif not _alive(entry):
            shutil.rmtree(entry, ignore_errors=True)


def _alive(place: Path) -> bool:
    try:
        return cgroup.alive((place / "owner").read_text())
    except OSError:  # just being started, or left by one that was killed then
        with contextlib.suppress(OSError):
            return time.time() - place.stat().st_mtime < _MARGIN
    return False


def stop_hosts() -> int:
    """End every host of this user with its machines. How many there were."""
    root = hosts_directory()
    ended = 0
    for entry in root.iterdir() if root.is_dir() else ():
        if entry.is_symlink() or not _alive(entry):
            continue
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((entry / "owner").read_text().partition(".")[0]), signal.SIGTERM)
            ended += 1
        deadline = time.monotonic() + 20.0
        while entry.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    return ended


# -- one exchange


def _connection(identity: str, seconds: float) -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        channel.connect(str(hosts_directory() / identity / "host.sock"))
        channel.settimeout(seconds)
    except OSError:
        channel.close()
        raise SandboxLost(f"the machine {identity} is gone: it has ended, or its host has") from None
    return channel


@contextlib.contextmanager
def _connected(identity: str, request: dict[str, Any], body: bytes, seconds: float) -> Iterator[socket.socket]:
    with _connection(identity, seconds) as channel:
        try:
            frames.send(channel, {**request, "version": VERSION}, body)
        except OSError as error:
            raise SandboxLost(f"the machine's host has gone ({error})") from None
        yield channel


def _received(channel: socket.socket) -> tuple[dict[str, Any], bytes]:
    """The next frame. Raises the error that it holds, or SandboxLost."""
    try:
        message = frames.receive(channel)
    except TimeoutError:
        raise SandboxLost("the machine's host did not answer in time") from None
    except (OSError, frames.BrokenFrameError) as error:
        raise SandboxLost(f"the machine's host hung up ({error})") from None
    if message is None:
        raise SandboxLost("the machine's host hung up before it answered")
    if "error" in message[0]:
        raise rebuilt(message[0])
    return message


def _ask(identity: str, request: dict[str, Any], body: bytes = b"", seconds: float = 60.0) -> tuple[dict[str, Any], bytes]:
    with _connected(identity, request, body, seconds) as channel:
        header, data = _received(channel)
    return header["done"], data
