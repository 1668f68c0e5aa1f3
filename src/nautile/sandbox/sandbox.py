"""``Sandbox``: one object for every substrate. It checks what is asked and hands over to a driver, or to a log before one."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from nautile.sandbox.driver import Driver, Environment, Order, Terminal, Watch
from nautile.sandbox.errors import InvalidRequest, SandboxClosed, SandboxLost, SubstrateUnavailable, Unsupported
from nautile.sandbox.image import Image
from nautile.sandbox.limits import Limits
from nautile.sandbox.policy import NetworkPolicy
from nautile.sandbox.result import Capabilities, Entry, Info, RunResult

if TYPE_CHECKING:
    from nautile.sandbox.fleet.client import Fleet
    from nautile.sandbox.recorded import Recorded

__all__ = ["Sandbox"]

KINDS = ("function", "container", "microvm", "vm")
_READ_LIMIT = 64 * 2**20  # bytes that read() returns at most unless told otherwise


class Sandbox:
    """A place where commands run that cannot touch anything else. Make one with ``create``; end it with ``close`` or ``with``.

    One thread at a time may use a container; function calls may come from many threads.
    """

    def __init__(self, driver: Driver, limits: Limits) -> None:
        self._driver, self._limits, self._closed = driver, limits, False
        # At the latest when the interpreter ends; a recorded sandbox outlives it.
        self._finalizer = weakref.finalize(self, getattr(driver, "detach", driver.close))

    @classmethod
    def create(  # noqa: PLR0913, PLR0917  # one parameter a decision
        cls,
        kind: str = "container",
        image: Image | Path | str | None = None,
        limits: Limits | None = None,
        network: NetworkPolicy | Sequence[str] | None = None,
        runtime: str | None = None,
        allow_emulation: bool = False,
        workspace: Path | str | None = None,
        workers: int = 1,
        log: Path | str | None = None,
        replay: str = "attach",
        keep: float = 3600.0,
        fleet: str | Sequence[str] | Fleet | None = None,
        token: str | None = None,
    ) -> Sandbox:
        """A new sandbox. ``image`` None: the host's /usr read-only and an empty workspace, and no user data.

        ``allow_emulation``: machines may run without KVM, in software. ``workspace``: a host directory that is bound read-write
        at /workspace instead (machines copy it in, and changes out after each command). ``network``: None, or a list of
        ``HOST:PORT`` that a proxy lets through. ``workers``: function calls at once.

        ``log``: a directory for the trajectory log. The sandbox then outlives this process by ``keep`` seconds; opened again,
        the log answers what was asked before and goes on in the same sandbox. If that is gone, ``replay="reexecute"`` builds
        it anew by running everything again; the default says so instead.

        ``fleet``: the URL of a gateway (or of several, or a ``Fleet``), which places the sandbox on one of its machines;
        ``token``: what the fleet gave you. ``image`` is then a name, ``log`` a trajectory's name, ``keep`` its idle timeout.

        Nothing is ever replaced by something weaker: raises InvalidRequest, Unsupported, SubstrateUnavailable,
        LimitUnavailable, LogCorrupt.
        """
        chosen = limits or Limits()
        policy = NetworkPolicy.of(cast(Any, network))
        if fleet is not None:
            if workspace is not None or runtime is not None or allow_emulation:
                why = "workspace, runtime and allow_emulation are of one machine, and its owner's"
                raise Unsupported(kind, "such option in a fleet", why, "use upload, and the kinds that the fleet's edges offer")
            from nautile.sandbox.fleet import client  # noqa: PLC0415

            gateways = fleet if isinstance(fleet, client.Fleet) else client.Fleet(fleet, token or "")
            name = None if log is None else str(log)
            wish = client.wish(kind, image, chosen, policy, workers, name, replay)
            return cls(client.FleetDriver.create(gateways, {**wish, "idle": keep}), chosen)
        place = _directory(workspace)
        identity = f"{kind[:1]}-{secrets.token_hex(8)}"
        order = _Order(kind, _image(kind, image), chosen, policy, runtime, place, workers, allow_emulation)
        order.check(image is not None, log is not None)
        chosen.check_host()
        if log is None:
            return cls(order.make(identity, None), chosen)
        return cls(_recorded(order, Path(log), identity, replay, keep), chosen)

    # -- what it is

    @property
    def info(self) -> Info:
        """Its id, substrate, runtime, and which limits cgroups enforce."""
        return self._driver.info

    @property
    def capabilities(self) -> Capabilities:
        """What it can do at all."""
        return self._driver.capabilities

    @property
    def driver(self) -> Driver:
        """What carries out its operations. Raises SandboxClosed."""
        return self._live()

    # -- commands

    def run(  # one parameter a decision
        self,
        command: str | Sequence[str],
        timeout: float | None = None,
        stdin: bytes | str | None = None,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        on_output: Watch | None = None,
        idempotent: bool = False,
    ) -> RunResult:
        """Run a command to its end: a string with ``sh -c``, a list as it is. ``timeout`` in seconds.

        What it started is killed when it ends, or at its time limit. ``on_output("stdout" | "stderr", bytes)`` gets the
        output as it comes. A failing command and a failing sandbox are both in the result.
        ``idempotent``: with a log, it may run again if nobody can say whether it ran.
        """
        argv = ("/bin/sh", "-c", command) if isinstance(command, str) else tuple(command)
        order = self._order(argv, timeout, stdin, cwd=cwd, env=env)
        return self._execute(dataclasses.replace(order, idempotent=idempotent), on_output)

    def python(
        self, source: str, arguments: Sequence[str] = (), *, timeout: float | None = None, stdin: bytes | str | None = None
    ) -> RunResult:
        """Run a Python program with the interpreter inside; in a function sandbox without starting one."""
        if self.info.kind == "function":
            return self._execute(self._order(tuple(arguments), timeout, stdin, python=source), None)
        return self._execute(self._order(("python3", "-I", "-c", source, *arguments), timeout, stdin), None)

    def _order(
        self,
        argv: tuple[str, ...],
        timeout: float | None,
        stdin: bytes | str | None,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        python: str | None = None,
    ) -> Order:
        seconds = self._limits.seconds if timeout is None else timeout
        if not 0 < seconds < 10**7:
            raise InvalidRequest(f"timeout is {seconds!r}: give seconds, more than 0")
        environment = dict(env or {})
        words = [*argv, *environment, *environment.values(), *([cwd] if cwd else []), *([python] if python is not None else [])]
        if (python is None and not argv) or not all(isinstance(word, str) for word in words):
            raise InvalidRequest("the command must be a string, or a list of strings that is not empty")
        if python is None and not argv[0]:
            raise InvalidRequest("the command's first word is empty")
        if any("\0" in word for word in words) or any("=" in name or not name for name in environment):
            raise InvalidRequest("commands, paths and variables cannot contain a NUL byte, nor a variable's name an =")
        try:
            given = stdin.encode() if isinstance(stdin, str) else stdin or b""
            "".join(words).encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the command is not text that UTF-8 can hold: {error.reason}") from None
        if len(given) > 64 * 2**20:
            raise InvalidRequest(f"stdin has {len(given):,} bytes: write more than 64 MiB into a file first")
        return Order(argv, given, float(seconds), cwd, environment, python)

    def _execute(self, order: Order, watch: Watch | None) -> RunResult:
        return self._live().run(order, watch)

    def session(self, command: str | Sequence[str] = ("/bin/sh",), *, pty: bool = True) -> Terminal:
        """An interactive program: ``send``, ``read``, ``until``, ``close``."""
        argv = ("/bin/sh", "-c", command) if isinstance(command, str) else tuple(command)
        return self._able("session").session(self._order(argv, None, None).argv, pty)

    # -- files; paths inside are relative to / and never lead through a symbolic link

    def read(self, path: str, *, limit: int = _READ_LIMIT) -> bytes:
        """A plain file's content. Raises FileRefused."""
        return self._able("files").read(_inside(path), limit)

    def write(self, path: str, data: bytes | str, *, mode: int = 0o644) -> None:
        """Make or replace a plain file, and the directories above it; readers see the old file or the new one."""
        self._able("files").write(_inside(path), data.encode() if isinstance(data, str) else data, mode & 0o777)

    def list(self, path: str = "/workspace") -> list[Entry]:
        """What a directory holds, by name."""
        return self._able("files").list(_inside(path))

    def upload(self, source: Path | str, path: str) -> None:
        """Copy a file or a directory of the host to ``path``. Links and special files of the source are refused."""
        self._able("files").upload(Path(source), _inside(path))

    def download(self, path: str, target: Path | str, *, limit: int = 2**30) -> None:
        """Copy a file or a directory out, to ``target``, which must not exist. Links and special files are left out."""
        self._able("files").download(_inside(path), Path(target), limit)

    # -- life

    def pause(self) -> None:
        """Stop every process; memory and files stay. The next request continues them, and so does ``resume``."""
        self._able("pause").pause()

    def resume(self) -> None:
        """Continue after ``pause``."""
        self._able("pause").resume()

    def snapshot(self) -> Image:
        """The files as they are now, as an image for new sandboxes. Processes are not in it."""
        return self._able("snapshot").snapshot()

    def fork(self) -> Sandbox:
        """A new sandbox with the files as they are now; both go on by themselves."""
        return Sandbox(self._able("fork").fork(), self._limits)

    def pack_diff(self, target: Path | str) -> str:
        """Write what changed since the image as an OCI layer (tar, with whiteouts); its sha256 digest."""
        return self._able("pack_diff").pack_diff(Path(target))

    def set_policy(self, network: NetworkPolicy | Sequence[str] | None) -> None:
        """Change which hosts may be reached; connections to hosts that no longer may are cut."""
        self._able("network").set_policy(NetworkPolicy.of(cast(Any, network)))

    def close(self) -> None:
        """End it. Nothing of it stays: no process, mount, cgroup or file. More than once is allowed."""
        if not self._closed:
            self._closed = True
            self._finalizer.detach()
            self._driver.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _live(self) -> Driver:
        if self._closed:
            raise SandboxClosed("the sandbox is closed")
        return self._driver

    def _able(self, feature: str) -> Environment:
        driver = self._live()
        if not getattr(driver.capabilities, feature):
            why, remedy = driver.reason(feature)
            raise Unsupported(driver.info.kind, feature.replace("_", " "), why, remedy)
        return cast(Environment, driver)


@dataclasses.dataclass(frozen=True)
class _Order:
    """What ``create`` was asked for, checked."""

    kind: str
    image: Image
    limits: Limits
    policy: NetworkPolicy
    runtime: str | None
    workspace: Path | None
    workers: int
    allow_emulation: bool = False

    def check(self, has_image: bool, has_log: bool) -> None:
        """Raises what ``create`` raises for what can never work."""
        if self.kind not in KINDS:
            raise InvalidRequest(f"kind {self.kind!r}: choose one of {', '.join(KINDS)}")
        expected = {"function": "bubblewrap", "container": "crun"}.get(self.kind, "qemu")
        if self.kind == "container" and self.runtime == "runsc":
            self._check_runsc(has_log)
        elif self.image.memory is not None:
            raise InvalidRequest("the image holds saved processes, which only runtime='runsc' can continue")
        elif self.runtime not in (None, expected):
            why = f"the runtime {self.runtime!r} is not part of this version"
            raise SubstrateUnavailable(self.kind, why, f"leave runtime out, or give {expected!r}")
        if not 0 < self.workers <= 64:
            raise InvalidRequest(f"workers is {self.workers}: give 1 to 64")
        if self.kind == "function" and has_image:
            raise Unsupported("function", "image", "workers run the host's Python", "use kind='container'")
        if self.kind == "function" and self.policy.rules:
            raise Unsupported("function", "network", "workers have none", "use kind='container'")

    def _check_runsc(self, has_log: bool) -> None:
        for asked, feature in ((self.workspace, "workspace"), (has_log, "trajectory log")):
            if asked:
                raise Unsupported("container", feature, "runtime='runsc' has none in this version", "leave runtime out")

    def _machine(self, identity: str, keep: float | None) -> Driver:
        """In this process; or in one of its own, which keeps it."""
        from nautile.sandbox.guest.wish import MachineWish  # noqa: PLC0415

        wish = MachineWish(self.kind, self.image, self.limits, self.policy, self.workspace, self.allow_emulation)
        if keep is None:
            return wish.make(identity)
        from nautile.sandbox.guest.hosted import HostedDriver  # noqa: PLC0415

        return HostedDriver.create(identity, wish, keep)

    def attach(self, identity: str, keep: float) -> Driver:
        """A container or a machine that has outlived its client. Raises SandboxLost, InvalidRequest."""
        if self.kind == "container":
            from nautile.sandbox.container import ContainerDriver  # noqa: PLC0415

            return ContainerDriver.attach(identity, self.limits, keep)
        from nautile.sandbox.guest.hosted import HostedDriver  # noqa: PLC0415

        found = HostedDriver.attach(identity, keep)
        if found.info.accel == "tcg" and not self.allow_emulation:
            raise InvalidRequest("the machine of this log is emulated: open it with allow_emulation=True")
        return found

    @property
    def able(self) -> Capabilities:
        """What a lost sandbox of this kind could do: its log still gives it."""
        from nautile.sandbox.container import ContainerDriver  # noqa: PLC0415
        from nautile.sandbox.function import FunctionDriver  # noqa: PLC0415

        kind = FunctionDriver if self.kind == "function" else ContainerDriver  # machines can do what containers can
        return dataclasses.replace(kind.capabilities, network=bool(self.policy.rules))

    def make(self, identity: str, keep: float | None) -> Driver:
        """The driver of a new sandbox."""
        if self.kind == "function":
            from nautile.sandbox.function import FunctionDriver  # noqa: PLC0415

            return FunctionDriver(identity, self.limits, workers=self.workers, workspace=self.workspace)
        if self.kind in ("microvm", "vm"):
            return self._machine(identity, keep)
        if self.runtime == "runsc":
            from nautile.sandbox.gvisor import GvisorDriver  # noqa: PLC0415

            return GvisorDriver.create(identity, self.image, self.limits, self.policy)
        from nautile.sandbox.container import ContainerDriver  # noqa: PLC0415

        return ContainerDriver.create(identity, self.image, self.limits, self.policy, self.workspace, keep=keep)


def _recorded(order: _Order, place: Path, identity: str, replay: str, keep: float) -> Recorded:
    """Open a log, and the sandbox that belongs to it: a new one, the one that has outlived its client, or none."""
    from nautile.sandbox.log import TrajectoryLog  # noqa: PLC0415
    from nautile.sandbox.recorded import Recorded, Remaking, image_record, reexecute, starting_point  # noqa: PLC0415

    if replay not in ("attach", "reexecute"):
        raise InvalidRequest(f"replay {replay!r}: choose attach or reexecute")
    head: dict[str, Any] = {"sandbox": identity, "kind": order.kind, "image": image_record(order.image)}
    head |= {"limits": dataclasses.asdict(order.limits), "rules": list(order.policy.texts)}
    head |= {"emulation": order.allow_emulation} if order.kind in ("microvm", "vm") else {}
    log = TrajectoryLog.open(place, head)
    found, operations = log.contents.head, log.contents.operations
    driver: Driver | None = None
    why = ""

    def make(image: Image, policy: NetworkPolicy, name: str) -> Driver:
        return dataclasses.replace(order, image=image, policy=policy, workspace=None).make(name, keep)

    def discard(name: str) -> None:
        if order.kind != "function":
            with contextlib.suppress(SandboxLost):
                order.attach(name, keep).close()

    def reopen(child: Path, image: Image, policy: NetworkPolicy) -> Recorded:
        other = dataclasses.replace(order, image=image, policy=policy, workspace=None)
        return _recorded(other, child, f"{order.kind[:1]}-{secrets.token_hex(8)}", replay, keep)

    remaking = Remaking(make, discard, reopen, tuple(found.get("rules", ())))
    try:
        if found["kind"] != order.kind:
            raise InvalidRequest(f"{place} is the log of a {found['kind']} sandbox: open it with kind={found['kind']!r}")
        if order.kind != "function" and found["sandbox"] != identity:
            try:
                driver = order.attach(found["sandbox"], keep)
            except SandboxLost as error:
                why = str(error)
        if driver is None and order.kind == "function":
            driver = order.make(identity, keep)
        elif driver is None and (replay == "reexecute" or len(operations) == log.contents.inherited):
            image, first = starting_point(log.contents)
            driver = dataclasses.replace(order, image=image).make(identity, keep)
            reexecute(driver, place, log.contents, first)
        if driver is not None and driver.info.id != found["sandbox"]:
            log.moved(driver.info.id)
        info = driver.info if driver is not None else Info(found["sandbox"], order.kind, "lost", "native", ())
        return Recorded(driver or why, log, info, order.able if driver is None else driver.capabilities, remaking)
    except BaseException:
        log.close()
        if driver is not None and driver.info.id == identity:  # made for nothing; one that was attached to stays
            driver.close()
        raise


def _inside(path: str) -> str:
    """A path inside as steps from /: no ``..``, no NUL. Raises InvalidRequest."""
    if not isinstance(path, str) or "\0" in path or len(path.encode("utf-8", "surrogateescape")) > 4000:
        raise InvalidRequest(f"path {str(path)[:80]!r}: give a path of at most 4,000 bytes without NUL")
    full = path if path.startswith("/") else f"/workspace/{path}"
    steps = [step for step in full.split("/") if step not in ("", ".")]
    if ".." in steps:
        raise InvalidRequest(f"path {path!r}: '..' is not followed; give the path itself")
    return "/".join(steps) or "."


def _image(kind: str, image: Image | Path | str | None) -> Image:
    """A VM also takes a file with a disk on it."""
    if kind == "vm" and isinstance(image, Path | str) and not Path(image).is_dir():
        from nautile.sandbox.vm import DiskImage  # noqa: PLC0415

        return DiskImage.of_file(Path(image))
    return Image.of(image)


def _directory(workspace: Path | str | None) -> Path | None:
    if workspace is None:
        return None
    place = Path(workspace)
    with contextlib.suppress(OSError):
        place = place.resolve(strict=True)
        if place.is_dir() and place != Path("/"):
            return place
    raise InvalidRequest(f"workspace {workspace}: not a directory that can be given to a sandbox")
