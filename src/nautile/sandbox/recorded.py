"""A sandbox behind its trajectory log: recorded operations are answered from it, new ones are carried out."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from nautile.sandbox.archive import pack_tree, unpack_tree
from nautile.sandbox.driver import Driver, Environment, Order, Terminal, Watch
from nautile.sandbox.errors import FileRefused, InvalidRequest, SandboxError, SandboxLost, TrajectoryDiverged, Unsupported
from nautile.sandbox.image import Image
from nautile.sandbox.limits import Limits
from nautile.sandbox.log import Contents, Operation, TrajectoryLog, expand, load
from nautile.sandbox.policy import NetworkPolicy
from nautile.sandbox.result import Capabilities, Entry, Info, RunResult

__all__ = ["Recorded", "RecordedSession", "Remaking", "image_record", "recorded_image", "reexecute", "repeat", "starting_point"]

_COMPARED = ("exit_code", "stdout", "stderr", "data", "refused")
_KEPT = 64 * 2**20  # bytes of one transfer that the log keeps; of longer ones it has the digest


@dataclass(frozen=True)
class Remaking:
    """How ``Recorded`` comes by other sandboxes of its kind. ``rules``: what the network policy was at the beginning."""

    make: Callable[[Image, NetworkPolicy, str], Driver]  # a new one, with this identity
    discard: Callable[[str], None]  # end one, if it is there
    open: Callable[[Path, Image, NetworkPolicy], Recorded]  # the one of another log, found or made
    rules: tuple[str, ...] = ()


class Recorded:
    """A driver in front of a driver. A text in its place: the sandbox is lost, and only what the log has can be given."""

    def __init__(
        self, found: Driver | str, log: TrajectoryLog, info: Info, capabilities: Capabilities, remaking: Remaking
    ) -> None:
        driver, self._why = (None, found) if isinstance(found, str) else (found, "")
        self._driver, self.log, self.info, self._remaking = driver, log, info, remaking
        layered = capabilities.snapshot and (driver is None or hasattr(driver, "layer"))
        self.capabilities = dataclasses.replace(capabilities, snapshot=layered, fork=capabilities.fork and layered)
        self._terminals: dict[int, Terminal] = {}  # of the sessions that this process has opened, by operation

    def reason(self, feature: str) -> tuple[str, str]:
        """See ``Driver.reason``."""
        if feature in ("snapshot", "fork") and self._driver is not None and self._driver.capabilities.snapshot:
            return "its snapshots end with this process, and a log outlives it", "use pack_diff, or a sandbox without log="
        return self._live().reason(feature)

    @property
    def live_driver(self) -> Driver | None:
        """What carries out new operations; None: it is lost."""
        return self._driver

    def _live(self) -> Driver:
        if self._driver is None:
            recorded = len(self.log.contents.operations)
            raise SandboxLost(
                f"the sandbox of this log is gone ({self._why}); its {recorded} recorded operations can be given again, new "
                "ones need it. Pass replay='reexecute' to build it anew by running them again, each compared with the record"
            )
        return self._driver

    @property
    def _environment(self) -> Environment:
        return cast(Environment, self._live())

    def _perform(
        self,
        kind: str,
        request: dict[str, Any],
        execute: Callable[[str], dict[str, Any]],
        *,
        idempotent: bool = True,
        recover: Callable[[str], dict[str, Any] | str] | None = None,
    ) -> dict[str, Any]:
        """File operations may be repeated: a write puts the same bytes there, and nobody has seen what a read gave."""

        def guarded(name: str) -> dict[str, Any]:
            try:
                return execute(name)
            except FileRefused as error:  # an answer about the sandbox's files, which replays like any other
                return {"refused": str(error), "path": error.path, "why": error.why}

        if not self.log.replaying:
            self._live()  # one that is known to be lost is not begun: it would be unknown for ever
        result = self.log.perform(kind, request, guarded, recover or self._recover, idempotent=idempotent)
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
        """See ``Sandbox.upload``. The log keeps the files too, up to 64 MiB: they are needed to build the sandbox anew."""

        def execute(_: str) -> dict[str, Any]:
            self._environment.upload(source, path)
            return {"tree": pack_tree(source, _KEPT)}

        self._perform("upload", {"path": path, "sha256": _digest(source)}, execute)

    def download(self, path: str, target: Path, limit: int) -> None:
        """See ``Sandbox.download``. A repeated one gives what is recorded, into its target or compared with what is there."""
        repeated = self.log.replaying

        def execute(_: str) -> dict[str, Any]:
            self._environment.download(path, target, limit)
            return {"sha256": _digest(target), "tree": pack_tree(target, _KEPT)}

        done = self._perform("download", {"path": path}, execute)
        if repeated and not os.path.lexists(target) and done["tree"] is not None:
            unpack_tree(done["tree"], target)
        if repeated and (not target.exists() or _digest(target) != done["sha256"]):
            raise SandboxError(f"{target} is not what was downloaded when this log was written: put it back, or use a new log")

    # -- sessions: what is typed and what is read are operations; the terminal itself ends with the process that opened it

    def session(self, argv: Sequence[str], pty: bool) -> Terminal:
        """See ``Sandbox.session``. A shell that nobody has typed into may be started again."""
        number = self.log.position

        def execute(_: str) -> dict[str, Any]:
            self._terminals[number] = self._environment.session(argv, pty)
            return {}

        harmless = tuple(argv) in (("/bin/sh",), ("/bin/bash",))
        request = {"argv": list(argv), "pty": pty}
        self._perform("session", request, execute, idempotent=harmless, recover=lambda _: "unknown")
        return RecordedSession(self, number)

    def terminal(self, number: int) -> Terminal:
        """The terminal of the session that operation ``number`` opened. Raises SandboxLost."""
        if number not in self._terminals:
            raise SandboxLost(
                f"session {number} ended with the process that held its terminal; what it gave until then can be given again. "
                "Open another session"
            )
        return self._terminals[number]

    def interact(self, kind: str, request: dict[str, Any], action: Callable[[], dict[str, Any]], again: bool) -> dict[str, Any]:
        """One operation on a session. ``again``: nothing is changed by it, so it may be carried out twice."""
        compact = {key: self.log.compact(value) for key, value in request.items()}
        return self._perform(kind, compact, lambda _: action(), idempotent=again, recover=lambda _: "unknown")

    # -- what outlives the sandbox: layers beside the log, and logs that continue it

    def snapshot(self) -> Image:
        """See ``Sandbox.snapshot``. The layer is kept beside the log, for as long as the log is."""
        done = self._perform("snapshot", {}, self._layer)
        return recorded_image(done)

    def _layer(self, name: str) -> dict[str, Any]:
        layer = cast(Callable[[Path], Image], getattr(self._live(), "layer"))  # noqa: B009  # not every driver has it
        for earlier in self.log.place.glob(f"layers/{name}-*"):  # of an attempt that nobody saw the end of
            shutil.rmtree(earlier, ignore_errors=True)
        # A place of its own: the keeper has mounted the earlier one, and knows it by its path.
        place = self.log.place / "layers" / f"{name}-{os.urandom(4).hex()}"
        place.mkdir(parents=True)
        place.chmod(0o755)
        return image_record(layer(place.resolve()))

    def fork(self) -> Recorded:
        """See ``Sandbox.fork``. The child's log points to this one: it continues what was recorded before this operation."""
        sequence = self.log.position
        policy = NetworkPolicy.of(self._rules(sequence))

        def execute(name: str) -> dict[str, Any]:
            place = self.log.place / "forks" / name
            if (place / "log").exists():  # of an attempt that nobody saw the end of
                self._remaking.discard(load(place, 0).head["sandbox"])
                shutil.rmtree(place)
            image, child = self._layer(name), f"{self.info.id[0]}-{os.urandom(8).hex()}"
            head = {**self.log.contents.head, "sandbox": child, "image": image, "rules": list(policy.texts)}
            head = {key: value for key, value in head.items() if key not in ("record", "version", "wall", "prev", "parent")}
            self.log.fork(place, head, sequence)  # before the sandbox, so that its name is known whatever happens
            self._remaking.make(recorded_image(image), policy, child)
            return {**image, "sandbox": child, "log": f"forks/{name}"}

        done = self._perform("fork", {}, execute)
        child = self._remaking.open(self.log.place / done["log"], recorded_image(done), policy)
        child.log.position = child.log.contents.inherited
        return child

    def _rules(self, sequence: int) -> tuple[str, ...]:
        for operation in reversed(self.log.contents.operations[:sequence]):
            if operation.kind == "set_policy" and operation.result == {}:
                return tuple(operation.request["rules"])
        return self._remaking.rules

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
        """See ``Sandbox.pack_diff``. A repeated one gives what is recorded, up to 64 MiB."""
        repeated = self.log.replaying

        def execute(_: str) -> dict[str, Any]:
            digest = self._environment.pack_diff(target)
            return {"digest": digest, "diff": target.read_bytes() if target.stat().st_size <= _KEPT else None}

        done = self._perform("pack_diff", {}, execute)
        if repeated and not target.exists() and done["diff"] is not None:
            target.write_bytes(done["diff"])
        if repeated and (not target.exists() or f"sha256:{_hash(target)}" != done["digest"]):
            raise SandboxError(f"{target} is not what was packed when this log was written: put it back, or use a new log")
        return str(done["digest"])

    def set_policy(self, policy: NetworkPolicy) -> None:
        """See ``Sandbox.set_policy``."""
        self._do("set_policy", {"rules": policy.texts}, lambda: self._environment.set_policy(policy))

    def close(self) -> None:
        """End the sandbox and note it in the log."""
        self._hang_up()
        if self._driver is not None:
            self._driver.close()
        self.log.end()

    def detach(self) -> None:
        """Let go of the log; the sandbox lives on, its sessions do not."""
        self._hang_up()
        self.log.close()

    def _hang_up(self) -> None:
        for terminal in self._terminals.values():
            terminal.close()
        self._terminals.clear()


class RecordedSession:
    """A ``Terminal`` whose every call is an operation of the log."""

    def __init__(self, recorded: Recorded, number: int) -> None:
        self._recorded, self.number = recorded, number

    def send(self, data: str | bytes) -> None:
        """See ``Terminal.send``. Typing is never done twice."""
        typed = data.encode() if isinstance(data, str) else data

        def execute() -> dict[str, Any]:
            self._recorded.terminal(self.number).send(typed)
            return {}

        self._recorded.interact("session_send", {"session": self.number, "data": typed}, execute, False)

    def read(self, timeout: float = 1.0) -> bytes:
        """See ``Terminal.read``."""

        def execute() -> dict[str, Any]:
            return {"data": self._recorded.terminal(self.number).read(timeout)}

        request = {"session": self.number, "timeout": timeout}
        return cast(bytes, self._recorded.interact("session_read", request, execute, True)["data"])

    def until(self, text: str, timeout: float = 10.0) -> str:
        """See ``Terminal.until``. That the text did not come is an answer too, and is recorded."""

        def execute() -> dict[str, Any]:
            terminal = self._recorded.terminal(self.number)
            try:
                return {"data": terminal.until(text, timeout).encode()}
            except SandboxLost:
                raise
            except SandboxError as error:
                return {"missed": str(error)}

        request = {"session": self.number, "text": text, "timeout": timeout}
        done = self._recorded.interact("session_until", request, execute, True)
        if "missed" in done:
            raise SandboxError(done["missed"])
        return str(done["data"].decode("utf-8", "replace"))

    def close(self) -> int:
        """See ``Terminal.close``."""

        def execute() -> dict[str, Any]:
            return {"exit_code": self._recorded.terminal(self.number).close()}

        return int(self._recorded.interact("session_close", {"session": self.number}, execute, True)["exit_code"])


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
            total.update(bytes.fromhex(_hash(path)))
    return total.hexdigest()


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def image_record(image: Image) -> dict[str, Any]:
    """An image as a log has it. Its layers must outlive the log's readers."""
    disk = getattr(image, "disk", None)  # of a ``vm.DiskImage``
    whole = {"layers": [str(layer) for layer in image.layers], "host_usr": image.host_usr}
    return whole if disk is None else {**whole, "disk": str(disk)}


def recorded_image(record: dict[str, Any]) -> Image:
    """The image of a record. Raises InvalidRequest when a layer is no longer there."""
    if record.get("disk") is not None:
        from nautile.sandbox.vm import DiskImage  # noqa: PLC0415

        return DiskImage.of_file(Path(record["disk"]))
    layers = tuple(map(Path, record["layers"]))
    for layer in layers:
        if not layer.exists():
            raise InvalidRequest(f"the layer {layer} of this log is gone: begin from an earlier point, in a new log")
    return Image(layers, record["host_usr"])


def starting_point(contents: Contents) -> tuple[Image, int]:
    """The newest image that a log has, and the operation from which on it must be carried out again."""
    for operation in reversed(contents.operations[contents.inherited :]):
        made = operation.result if operation.kind in ("snapshot", "fork") else None
        if made is not None and "layers" in made and all(Path(layer).exists() for layer in made["layers"]):
            return recorded_image(made), operation.sequence + 1
    return recorded_image(contents.head["image"]), contents.inherited


def repeat(place: Path) -> None:
    """Run a log's operations again in a sandbox of the same kind, image and limits, and compare; the log is only read."""
    from nautile.sandbox.sandbox import Sandbox  # noqa: PLC0415

    contents = load(place)
    head, limits = contents.head, Limits(**contents.head["limits"])
    image = None if head["kind"] == "function" else recorded_image(head["image"])
    options = {"network": head.get("rules") or None, "allow_emulation": head.get("emulation", False)}
    with Sandbox.create(head["kind"], image=image, limits=limits, **options) as sandbox:
        reexecute(sandbox.driver, place, contents, contents.inherited)


def reexecute(driver: Driver, place: Path, contents: Contents, first: int = 0) -> None:
    """Build a lost sandbox anew: carry out the recorded operations from ``first`` on again and compare.

    Clocks, random numbers, process numbers and the network differ from run to run: what prints them diverges, and says so.
    Raises TrajectoryDiverged, Unsupported.
    """
    for operation in contents.operations[first:]:
        if operation.result is None:
            return  # its outcome is unknown, which the client learns when it gets there
        recorded = expand(place, contents.head, operation.result)
        request = expand(place, contents.head, operation.request)
        again = _again(cast(Environment, driver), operation, request, recorded)
        for key in _COMPARED:
            if operation.kind in ("run", "read", "write") and again.get(key) != recorded.get(key):
                given = f"{operation.kind} with {key} {str(recorded.get(key))[:120]!r}"
                raise TrajectoryDiverged(operation.sequence, given, f"{str(again.get(key))[:120]!r} when run again")


def _again(driver: Environment, operation: Operation, request: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    try:
        return _carried_out(driver, operation, request, recorded)
    except FileRefused as error:
        return {"refused": str(error)}


def _carried_out(
    driver: Environment, operation: Operation, request: dict[str, Any], recorded: dict[str, Any]
) -> dict[str, Any]:
    given: dict[str, Any] = {}
    match operation.kind:
        case "run":
            optional = (request.get("cwd"), request.get("environment") or {}, request.get("python"))
            order = Order(tuple(request["argv"]), request.get("stdin") or b"", request["timeout"], *optional)
            given = _as_record(driver.run(order, None))
        case "write":
            driver.write(request["path"], request["data"], request["mode"])
        case "read":
            given = {"data": driver.read(request["path"], 2**30)}
        case "upload" if recorded.get("tree") is not None:
            with tempfile.TemporaryDirectory(prefix="nautile-upload-") as scratch:
                unpack_tree(recorded["tree"], Path(scratch, "tree"))
                driver.upload(Path(scratch, "tree"), request["path"])
        case "set_policy":
            driver.set_policy(NetworkPolicy.of(request["rules"]))
        case "list" | "pause" | "resume" | "pack_diff" | "download" | "snapshot" | "fork":
            pass  # they change nothing inside
        case kind:
            why = f"operation {operation.sequence} is {kind}, which cannot be repeated from the log"
            raise Unsupported(driver.info.kind, "re-execution of this log", why, "start from a snapshot")
    return given
