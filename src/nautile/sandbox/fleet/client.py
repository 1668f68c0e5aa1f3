"""A fleet's sandbox as a ``Driver``: every method is one request to a gateway, any of them.

An operation of a recorded sandbox (``log=``) names its place in the trajectory, so it is asked for again, for ``patience``
seconds, when a gateway or the edge dies under it: it is carried out once. Of one that is not recorded nobody could say
whether it was, so what breaks off under it is an infrastructure error and is not tried again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from nautile.sandbox.archive import pack_tree, unpack_tree
from nautile.sandbox.driver import Order, Watch
from nautile.sandbox.errors import EdgeGone, InvalidRequest, SandboxClosed, SandboxLost
from nautile.sandbox.fleet import wire
from nautile.sandbox.image import Image
from nautile.sandbox.limits import Limits
from nautile.sandbox.policy import NetworkPolicy
from nautile.sandbox.records import rebuilt, run_result
from nautile.sandbox.result import Capabilities, Entry, Info, RunResult

__all__ = ["Fleet", "FleetDriver", "FleetImage", "FleetSession", "Request", "wish"]

_MARGIN = 20.0  # seconds that an answer may take on top of what was asked for
_CLOSING = 3.0  # seconds of patience with an edge that is gone: its sandboxes end by themselves
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class FleetImage(Image):
    """An image that an edge keeps: a snapshot of one of its sandboxes, or a directory that its owner has named."""

    name: str = ""


@dataclass(frozen=True)
class Request:
    """One operation on a sandbox, as it goes over the wire; ``seconds``: how long its answer may take."""

    op: str
    header: dict[str, Any]
    body: bytes = b""
    seconds: float = 60.0


class Fleet:
    """The gateways of a fleet, asked in turn until one answers."""

    def __init__(self, gateways: str | Sequence[str], token: str, patience: float = 60.0) -> None:
        self.gateways = [gateways] if isinstance(gateways, str) else list(gateways)
        if not self.gateways or not all(url.startswith(("http://", "https://")) for url in self.gateways):
            raise InvalidRequest("fleet: give the URL of a gateway, http://HOST:PORT, or a list of them")
        self.patience = patience
        timeout, headers = httpx.Timeout(120.0, connect=5.0), {"authorization": f"Bearer {token}"}
        limits = httpx.Limits(max_connections=None)
        transport = httpx.HTTPTransport(limits=limits, socket_options=wire.SOCKET_OPTIONS, trust_env=False)
        self._http = httpx.Client(transport=transport, headers=headers, timeout=timeout, trust_env=False)
        self._at = 0

    def close(self) -> None:
        """Hang up."""
        self._http.close()

    def ask(
        self, method: str, path: str, header: dict[str, Any] | None = None, again: bool = True, patience: float | None = None
    ) -> dict[str, Any]:
        """One short exchange in JSON. ``again``: it may be repeated when a gateway or an edge breaks off."""
        content = b"" if header is None else wire.pack(header)

        def once() -> dict[str, Any]:
            answer = self._http.request(method, self.gateways[self._at] + path, content=content)
            said = _json(answer)
            if "error" in said:
                raise rebuilt(said)
            return said

        return self._patiently(once, again, self.patience if patience is None else patience)

    def operate(self, identity: str, request: Request, again: bool, watch: Watch | None = None) -> tuple[dict[str, Any], bytes]:
        """One operation: its last frame, which may hold an error. ``again`` as for ``ask``."""
        content = wire.pack(request.header, request.body)

        def once() -> tuple[dict[str, Any], bytes]:
            url = f"{self.gateways[self._at]}/v1/sandboxes/{identity}/{request.op}"
            seconds = request.seconds + _MARGIN
            headers, timeout = {wire.TIMEOUT: f"{seconds:g}"}, httpx.Timeout(seconds, connect=5.0)
            with self._http.stream("POST", url, content=content, headers=headers, timeout=timeout) as answer:
                if not answer.headers.get("content-type", "").startswith("application/octet-stream"):
                    answer.read()
                    said = _json(answer)
                    raise rebuilt(said) if "error" in said else EdgeGone("the gateway did not speak of sandboxes")
                return _last(answer, watch)

        return self._patiently(once, again, self.patience)

    def _patiently(self, once: Callable[[], _Answer], again: bool, patience: float) -> _Answer:
        """Try; after something has broken off, the next gateway, for as long as patience lasts, if it may be done again."""
        deadline, pause = time.monotonic() + patience, 0.02
        while True:
            try:
                return once()
            except (httpx.TransportError, EdgeGone) as error:
                gateway = self.gateways[self._at]
                self._at = (self._at + 1) % len(self.gateways)
                # What could not even connect has not happened, nor what a gateway found nobody for.
                may = (
                    again or isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) or getattr(error, "untouched", False)
                )
                if not may or time.monotonic() + pause > deadline:
                    if isinstance(error, EdgeGone):
                        raise
                    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                    raise EdgeGone(f"the fleet's gateway {gateway} does not answer ({said})") from None
                time.sleep(pause)
                pause = min(2 * pause, 1.0)


def _json(answer: httpx.Response) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        said = answer.json()
        if isinstance(said, dict):
            return said
    raise EdgeGone(f"what answers at {answer.url} (HTTP {answer.status_code}) is no gateway of a fleet")


def _last(answer: httpx.Response, watch: Watch | None) -> tuple[dict[str, Any], bytes]:
    """The last frame of an answer; pieces of output before it go to ``watch``."""
    parser = wire.Frames()
    for piece in answer.iter_raw():
        for header, body in parser.feed(piece):
            if "stream" not in header:
                return header, body
            if watch is not None:
                watch(header["stream"], body)
    raise EdgeGone("the answer broke off: the edge or the gateway has died")


class FleetDriver:
    """One sandbox of a fleet. ``create`` places it."""

    def __init__(self, fleet: Fleet, made: dict[str, Any]) -> None:
        self._fleet, self.id = fleet, str(made["id"])
        info = made["info"] or {"kind": made["kind"], "runtime": "lost", "accel": "native", "limits_enforced": ()}
        self.info = Info(**{**info, "id": self.id, "limits_enforced": tuple(info["limits_enforced"])})
        known = made["capabilities"] or {}
        self.capabilities = Capabilities(
            **{field.name: bool(known.get(field.name)) for field in dataclasses.fields(Capabilities)}
        )
        self._client, self._sequence = made.get("client"), int(made.get("sequence", 0))
        self._lock = threading.Lock()  # the order of recorded operations is one

    @classmethod
    def create(cls, fleet: Fleet, wish: dict[str, Any]) -> FleetDriver:
        """Ask for a sandbox. With a log's name it may be asked for again: there is one for each name."""
        return cls(fleet, fleet.ask("POST", "/v1/sandboxes", wish, again=wish.get("log") is not None))

    def reason(self, feature: str) -> tuple[str, str]:
        """See ``Driver.reason``."""
        if feature == "network":
            return "it was made without one", "create it with network=[...]"
        return f"the fleet's {self.info.kind} sandboxes cannot, or this one is lost", "choose another kind, or create another"

    def _do(
        self, op: str, header: dict[str, Any] | None = None, body: bytes = b"", *, seconds: float = 60.0, again: bool = False
    ) -> tuple[dict[str, Any], bytes]:
        return self._perform(Request(op, header or {}, body, seconds), again, None)

    def _perform(self, request: Request, again: bool, watch: Watch | None) -> tuple[dict[str, Any], bytes]:
        if self._client is None:
            return _opened(self._fleet.operate(self.id, request, again, watch))
        with self._lock:
            place = {"client": self._client, "sequence": self._sequence}
            numbered = dataclasses.replace(request, header={**request.header, **place})
            header, found = self._fleet.operate(self.id, numbered, True, watch)
            self._sequence = int(header.get("position", self._sequence))
        return _opened((header, found))

    def run(self, order: Order, watch: Watch | None) -> RunResult:
        """See ``Driver.run``. An edge that is gone is an infrastructure error of the result.

        Raises EdgeGone instead for a recorded sandbox, whose command is still to be asked for: the next must be the same one.
        """
        header: dict[str, Any] = {"argv": list(order.argv), "timeout": order.timeout, "watch": watch is not None}
        optional = {"cwd": order.cwd, "environment": dict(order.environment), "idempotent": order.idempotent}
        header |= {key: value for key, value in optional.items() if value}
        if order.python is not None:
            header["python"] = order.python
        try:
            request = Request("run", header, order.stdin, order.timeout)
            return run_result(*self._perform(request, order.idempotent, watch))
        except (SandboxLost, SandboxClosed) as error:
            if isinstance(error, EdgeGone) and self._client is not None:
                raise
            return RunResult(-1, "", "", False, False, f"fleet: {error}")

    def read(self, path: str, limit: int) -> bytes:
        """See ``Sandbox.read``."""
        return self._do("read", {"path": path, "limit": limit}, again=True)[1]

    def write(self, path: str, data: bytes, mode: int) -> None:
        """See ``Sandbox.write``."""
        self._do("write", {"path": path, "mode": mode}, data, again=True)

    def list(self, path: str) -> list[Entry]:
        """See ``Sandbox.list``."""
        return [Entry(**entry) for entry in self._do("list", {"path": path}, again=True)[0]["entries"]]

    def upload(self, source: Path, path: str) -> None:
        """See ``Sandbox.upload``; at most 60 MiB at once."""
        tree = pack_tree(source, wire.TRANSFER_MOST)
        if tree is None:
            raise InvalidRequest(f"{source} holds more than {wire.TRANSFER_MOST:,} bytes: upload parts of it")
        self._do("upload", {"path": path, "sha256": hashlib.sha256(tree).hexdigest()}, tree, again=True)

    def download(self, path: str, target: Path, limit: int) -> None:
        """See ``Sandbox.download``; at most 60 MiB at once."""
        if target.exists() or target.is_symlink():
            raise InvalidRequest(f"{target} exists: name a target that does not")
        unpack_tree(self._do("download", {"path": path, "limit": limit}, again=True)[1], target)

    def session(self, argv: Sequence[str], pty: bool) -> FleetSession:
        """See ``Sandbox.session``. It outlives gateways and this process; its edge holds it."""
        header, _ = self._do("session", {"argv": list(argv), "pty": pty})
        return FleetSession(self, int(header["session"]))

    def pause(self) -> None:
        """See ``Sandbox.pause``."""
        self._do("pause", again=True)

    def resume(self) -> None:
        """See ``Sandbox.resume``."""
        self._do("resume", again=True)

    def snapshot(self) -> FleetImage:
        """See ``Sandbox.snapshot``. The edge keeps it; new sandboxes of it are made there."""
        return FleetImage(name=str(self._do("snapshot", seconds=600.0)[0]["image"]))

    def fork(self) -> FleetDriver:
        """See ``Sandbox.fork``; at the same edge."""
        return FleetDriver(self._fleet, self._do("fork", seconds=600.0)[0])

    def pack_diff(self, target: Path) -> str:
        """See ``Sandbox.pack_diff``; at most 60 MiB."""
        header, data = self._do("pack_diff", seconds=600.0, again=True)
        target.write_bytes(data)
        return str(header["digest"])

    def set_policy(self, policy: NetworkPolicy) -> None:
        """See ``Sandbox.set_policy``."""
        self._do("policy", {"rules": list(policy.texts)}, again=True)

    def close(self) -> None:
        """See ``Driver.close``. If nobody answers it ends at its time."""
        with contextlib.suppress(EdgeGone):
            self._fleet.ask("DELETE", f"/v1/sandboxes/{self.id}", patience=min(self._fleet.patience, _CLOSING))

    def detach(self) -> None:
        """Let go: a recorded one lives on until somebody asks for its log's name again, or its time is over."""
        if self._client is None:
            self.close()


def _opened(answer: tuple[dict[str, Any], bytes]) -> tuple[dict[str, Any], bytes]:
    if "error" in answer[0]:
        raise rebuilt(answer[0])
    return answer[0]["done"], answer[1]


class FleetSession:
    """A ``Terminal`` that an edge holds."""

    def __init__(self, driver: FleetDriver, number: int) -> None:
        self._driver, self.number = driver, number

    def _do(
        self, op: str, seconds: float, body: bytes = b"", again: bool = False, **header: Any
    ) -> tuple[dict[str, Any], bytes]:
        return self._driver._do(f"session_{op}", {"session": self.number, **header}, body, seconds=seconds, again=again)

    def send(self, data: str | bytes) -> None:
        """See ``Terminal.send``."""
        self._do("send", 15.0, data.encode() if isinstance(data, str) else data)

    def read(self, timeout: float = 1.0) -> bytes:
        """See ``Terminal.read``; it waits half a minute at most."""
        return self._do("read", timeout, timeout=timeout)[1]

    def until(self, text: str, timeout: float = 10.0) -> str:
        """See ``Terminal.until``."""
        return self._do("until", timeout, text=text, timeout=timeout)[1].decode("utf-8", "replace")

    def close(self) -> int:
        """See ``Terminal.close``."""
        try:
            return int(self._do("close", 15.0)[0]["exit_code"])
        except (SandboxLost, SandboxClosed):
            return -1


def wish(  # one parameter an option of ``Sandbox.create``
    kind: str, image: Any, limits: Limits, policy: NetworkPolicy, workers: int, log: str | None, replay: str
) -> dict[str, Any]:
    """What ``Sandbox.create`` was asked for, for a fleet. Raises InvalidRequest."""
    if isinstance(image, FleetImage):
        name: str | None = image.name
    elif image is None or isinstance(image, str):
        name = image
    else:
        raise InvalidRequest("a fleet's image is a name that its edges know, or what snapshot() gave there; not a path here")
    found = {"kind": kind, "limits": dataclasses.asdict(limits), "rules": list(policy.texts), "workers": workers}
    optional = {"image": name, "log": log, "replay": replay if log is not None else None}
    return found | {key: value for key, value in optional.items() if value is not None}
