"""A sandbox behind its trajectory log: recorded operations are answered from it, new ones are carried out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from nautile.sandbox.driver import Driver, Environment, Order, Terminal, Watch
from nautile.sandbox.errors import FileRefused, SandboxError, SandboxLost, TrajectoryDiverged, Unsupported
from nautile.sandbox.image import Image
from nautile.sandbox.limits import Limits
from nautile.sandbox.log import Contents, Operation, TrajectoryLog, expand, load
from nautile.sandbox.policy import NetworkPolicy
from nautile.sandbox.result import Capabilities, Entry, Info, RunResult

__all__ = ["Recorded", "reexecute", "repeat"]

_COMPARED = ("exit_code", "stdout", "stderr", "data", "refused")


class Recorded:
    """A driver in front of a driver. ``driver`` None: the sandbox is lost, and only what the log has can be given."""

    def __init__(self, driver: Driver | None, log: TrajectoryLog, info: Info, capabilities: Capabilities) -> None:
        self._driver, self.log, self.info = driver, log, info
        self.capabilities = dataclasses.replace(capabilities, session=False, snapshot=False, fork=False)

    def reason(self, feature: str) -> tuple[str, str]:
        """See ``Driver.reason``."""
        if feature == "session":
            return "what is typed into a session is not recorded yet", "use run, or a sandbox without log="
        if feature in ("snapshot", "fork"):
            return "what they make is not in the log", "use pack_diff, or a sandbox without log="
        return self._live().reason(feature)

    def _live(self) -> Driver:
        if self._driver is None:
            recorded = len(self.log.contents.operations)
            raise SandboxLost(
                f"the sandbox of this log is gone; its {recorded} recorded operations can be given again, new ones need it. "
                "Pass replay='reexecute' to build it anew by running them again, each compared with what is recorded"
            )
        return self._driver

    @property
    def _environment(self) -> Environment:
        return cast(Environment, self._live())

    def _perform(
        self, kind: str, request: dict[str, Any], execute: Callable[[str], dict[str, Any]], *, idempotent: bool = True
    ) -> dict[str, Any]:
        """File operations may be repeated: a write puts the same bytes there, and nobody has seen what a read gave."""

        def guarded(name: str) -> dict[str, Any]:
            try:
                return execute(name)
            except FileRefused as error:  # an answer about the sandbox's files, which replays like any other
                return {"refused": str(error), "path": error.path, "why": error.why}

        result = self.log.perform(kind, request, guarded, self._recover, idempotent=idempotent)
        if "refused" in result:
            raise FileRefused(result["path"], result["why"])
        return result

    def _do(self, kind: str, request: dict[str, Any], action: Callable[[], None]) -> None:
        def execute(_: str) -> dict[str, Any]:
            action()
            return {}

        self._perform(kind, request, execute)

    def _recover(self, name: str) -> dict[str, Any] | str:
        ask = getattr(self._driver, "outcome", None)
        if ask is None:
            return "unknown"
        try:
            found = ask(name, 600.0)
        except SandboxLost:
            return "unknown"
        return found if isinstance(found, str) else _as_record(found)

    def run(self, order: Order, watch: Watch | None) -> RunResult:
        """See ``Driver.run``."""
        request: dict[str, Any] = {"argv": list(order.argv), "timeout": order.timeout}
        optional = {"cwd": order.cwd, "environment": dict(order.environment), "python": order.python, "stdin": order.stdin}
        request |= {key: self.log.compact(value) for key, value in optional.items() if value}

        def execute(name: str) -> dict[str, Any]:
            return _as_record(self._live().run(dataclasses.replace(order, operation=name), watch))

        return _as_result(self._perform("run", request, execute, idempotent=order.idempotent))

    def read(self, path: str, limit: int) -> bytes:
        """See ``Sandbox.read``."""
        done = self._perform("read", {"path": path}, lambda _: {"data": self._environment.read(path, limit)})
        return cast(bytes, done["data"])

    def write(self, path: str, data: bytes, mode: int) -> None:
        """See ``Sandbox.write``."""
        request = {"path": path, "data": self.log.compact(data), "mode": mode}
        self._do("write", request, lambda: self._environment.write(path, data, mode))

    def list(self, path: str) -> list[Entry]:
        """See ``Sandbox.list``."""

        def execute(_: str) -> dict[str, Any]:
            return {"entries": [dataclasses.asdict(entry) for entry in self._environment.list(path)]}

        return [Entry(**entry) for entry in self._perform("list", {"path": path}, execute)["entries"]]

    def upload(self, source: Path, path: str) -> None:
        """See ``Sandbox.upload``. The log has the digest of what was sent, not the files."""
        self._do("upload", {"path": path, "sha256": _digest(source)}, lambda: self._environment.upload(source, path))

    def download(self, path: str, target: Path, limit: int) -> None:
        """See ``Sandbox.download``. A repeated one finds its target already there, with the content that is recorded."""
        repeated = self.log.replaying

        def execute(_: str) -> dict[str, Any]:
            self._environment.download(path, target, limit)
            return {"sha256": _digest(target)}

        done = self._perform("download", {"path": path, "target": str(target)}, execute)
        if repeated and (not target.exists() or _digest(target) != done["sha256"]):
            raise SandboxError(f"{target} is not what was downloaded when this log was written: put it back, or use a new log")

    def session(self, argv: Sequence[str], pty: bool) -> Terminal:
        """Never called: see ``capabilities``."""
        raise Unsupported(self.info.kind, "session", *self.reason("session"))

    def snapshot(self) -> Image:
        """Never called: see ``capabilities``."""
        raise Unsupported(self.info.kind, "snapshot", *self.reason("snapshot"))

    def fork(self) -> Environment:
        """Never called: see ``capabilities``."""
        raise Unsupported(self.info.kind, "fork", *self.reason("fork"))

    def pause(self) -> None:
        """See ``Sandbox.pause``."""
        self._do("pause", {}, self._pause)

    def resume(self) -> None:
        """See ``Sandbox.resume``."""
        self._do("resume", {}, self._resume)

    def _pause(self) -> None:
        self._environment.pause()

    def _resume(self) -> None:
        self._environment.resume()

    def pack_diff(self, target: Path) -> str:
        """See ``Sandbox.pack_diff``."""
        request = {"target": str(target)}
        return str(self._perform("pack_diff", request, lambda _: {"digest": self._environment.pack_diff(target)})["digest"])

    def set_policy(self, policy: NetworkPolicy) -> None:
        """See ``Sandbox.set_policy``."""
        self._do("set_policy", {"rules": policy.texts}, lambda: self._environment.set_policy(policy))

    def close(self) -> None:
        """End the sandbox and note it in the log."""
        if self._driver is not None:
            self._driver.close()
        self.log.end()

    def detach(self) -> None:
        """Let go of the log; the sandbox lives on."""
        self.log.close()


def _as_record(result: RunResult) -> dict[str, Any]:
    record = {
        field.name: getattr(result, field.name) for field in dataclasses.fields(result) if not field.name.startswith("std")
    }
    return {**record, "stdout": result.stdout_bytes, "stderr": result.stderr_bytes}


def _as_result(record: dict[str, Any]) -> RunResult:
    out, err = record["stdout"], record["stderr"]
    texts = {"stdout": out.decode("utf-8", "replace"), "stderr": err.decode("utf-8", "replace")}
    return RunResult(**{**record, **texts, "stdout_bytes": out, "stderr_bytes": err})


def _digest(place: Path) -> str:
    """A hash of a file, or of the names and contents of a directory."""
    total = hashlib.sha256()
    for path in [place, *(sorted(place.rglob("*")) if place.is_dir() else ())]:
        total.update(str(path.relative_to(place)).encode("utf-8", "surrogateescape") + b"\0")
        if path.is_file():
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def repeat(place: Path) -> None:
    """Run a log's operations again in a sandbox of the same kind, image and limits, and compare; the log is only read."""
    from nautile.sandbox.sandbox import Sandbox  # noqa: PLC0415

    contents = load(place)
    image, limits = contents.head["image"], Limits(**contents.head["limits"])
    kind = contents.head["kind"]
    layers = Image(tuple(map(Path, image["layers"])), image["host_usr"]) if kind == "container" else None
    with Sandbox.create(kind, image=layers, limits=limits) as sandbox:
        reexecute(sandbox.driver, place, contents)


def reexecute(driver: Driver, place: Path, contents: Contents) -> None:
    """Build a lost sandbox anew: carry out every recorded operation again and compare. Raises TrajectoryDiverged, Unsupported.

    Clocks, random numbers, process numbers and the network differ from run to run: what prints them diverges, and says so.
    """
    for operation in contents.operations:
        if operation.result is None:
            return  # its outcome is unknown, which the client learns when it gets there
        recorded = expand(place, contents.head, operation.result)
        again = _again(cast(Environment, driver), operation, expand(place, contents.head, operation.request))
        for key in _COMPARED:
            if operation.kind in ("run", "read", "write") and again.get(key) != recorded.get(key):
                given = f"{operation.kind} with {key} {str(recorded.get(key))[:120]!r}"
                raise TrajectoryDiverged(operation.sequence, given, f"{str(again.get(key))[:120]!r} when run again")


def _again(driver: Environment, operation: Operation, request: dict[str, Any]) -> dict[str, Any]:
    try:
        match operation.kind:
            case "run":
                order = Order(
                    tuple(request["argv"]),
                    request.get("stdin") or b"",
                    request["timeout"],
                    request.get("cwd"),
                    request.get("environment") or {},
                    request.get("python"),
                )
                return _as_record(driver.run(order, None))
            case "write":
                driver.write(request["path"], request["data"], request["mode"])
                return {}
            case "read":
                return {"data": driver.read(request["path"], 2**30)}
            case "list" | "pause" | "resume" | "pack_diff" | "download" | "set_policy":
                return {}  # they change nothing inside
            case _:
                why = f"operation {operation.sequence} is {operation.kind}, whose content is not in the log"
                raise Unsupported(driver.info.kind, "re-execution of this log", why, "start from a snapshot")
    except FileRefused as error:
        return {"refused": str(error)}
