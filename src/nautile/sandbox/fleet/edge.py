"""The owner of a machine's sandboxes: makes, finds again and ends them, within its limits; HTTP is ``edge_server``'s.

What it knows of each is a small file below ``state/sandboxes``, so that an edge that was killed takes over again what still
lives: containers and machines run on for ``orphan`` seconds without an edge, then end by themselves. With a name for its log,
a sandbox's operations are recorded in ``state/logs``: they carry their sequence number, and are carried out once however often
they come.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nautile.sandbox.driver import Driver, Terminal
from nautile.sandbox.errors import (
    AccessDenied,
    FleetFull,
    InvalidRequest,
    SandboxClosed,
    SandboxError,
    SandboxLost,
    Unsupported,
)
from nautile.sandbox.fleet.admission import Admission
from nautile.sandbox.fleet.quota import belongs
from nautile.sandbox.fleet.wire import is_edge_name, limits_of
from nautile.sandbox.image import Image
from nautile.sandbox.limits import Limits
from nautile.sandbox.policy import NetworkPolicy
from nautile.sandbox.recorded import Recorded
from nautile.sandbox.sandbox import Sandbox

__all__ = ["Edge", "EdgeConfig", "Held", "Wish"]

_log = logging.getLogger(__name__)
_IMAGES = 64  # snapshots that a project may have at an edge


@dataclass(frozen=True)
class EdgeConfig:
    """``state``: a directory of this edge alone. ``orphan``: seconds that sandboxes live on without it."""

    name: str
    state: Path
    admission: Admission = field(default_factory=Admission)
    orphan: float = 600.0
    longest: float = 86_400.0  # seconds that a sandbox may live at most
    idle: float = 3600.0  # seconds without a request after which one ends, unless it asked for less
    pool: int = 0  # containers with the default limits that are made ahead
    images: Path | None = None  # whose directories may be named as images; None: those of the user's image store
    kinds: tuple[str, ...] = ("function", "container")
    allow_emulation: bool = False  # machines may be emulated where the processor cannot run them


@dataclass(frozen=True)
class Wish:
    """What a client asks for, checked. ``log``: the name of its trajectory, or None. ``ttl`` and ``idle`` in seconds."""

    project: str
    kind: str
    limits: Limits
    rules: tuple[str, ...] = ()
    workers: int = 1
    image: str | None = None
    log: str | None = None
    replay: str = "attach"
    ttl: float = 86_400.0
    idle: float = 3600.0

    @classmethod
    def of(cls, project: str, request: dict[str, Any], config: EdgeConfig) -> Wish:
        """Raises InvalidRequest, Unsupported."""
        known = {field.name for field in dataclasses.fields(cls)} - {"project"}
        if unknown := sorted(set(request) - known):
            raise InvalidRequest(f"create: {unknown[0]!r} is no option of a fleet's sandbox")
        kind = str(request.get("kind", "container"))
        if kind not in config.kinds:
            remedy = f"this edge has {', '.join(config.kinds)}"
            raise Unsupported(kind, "sandbox of this kind in this fleet", "no edge that was asked offers it", remedy)
        limits = limits_of(request)
        limits.check_host()
        if limits.allow_unenforced:
            raise InvalidRequest("limits: allow_unenforced is for a machine of one's own, not for a fleet")
        name = request.get("log")
        if name is not None and not (isinstance(name, str) and re.fullmatch(r"[\w./ -]{1,200}", name)):
            raise InvalidRequest(f"log {str(name)[:80]!r}: the name of a trajectory is up to 200 letters, digits and . / _ -")
        seconds = {}
        for key, most in (("ttl", config.longest), ("idle", config.idle)):
            value = request.get(key, most)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
                raise InvalidRequest(f"{key} is {value!r}: give up to {most:g} seconds")
            seconds[key] = float(value)
        rules = NetworkPolicy.of(request.get("rules") or None).texts
        workers, replay = request.get("workers", 1), str(request.get("replay", "attach"))
        image = request.get("image")
        if image is not None and not isinstance(image, str):
            raise InvalidRequest("image: give the name of an image of the fleet, or a snapshot of one of its sandboxes")
        return cls(project, kind, limits, tuple(rules), workers, image, name, replay, **seconds)


@dataclass
class Held:
    """A sandbox of this edge. Its file has everything but ``sandbox``, ``lock``, ``terminals`` and ``busy``."""

    id: str
    wish: Wish
    created: float  # wall time: it means the same after a restart
    inner: str  # its id at the substrate
    log: str | None  # its log's directory, relative to the state
    sandbox: Sandbox | None = None  # None: lost
    lock: threading.RLock = field(default_factory=threading.RLock)  # of the order of logged operations
    terminals: dict[int, Terminal] = field(default_factory=dict)
    used: float = 0.0
    busy: int = 0

    @property
    def expired(self) -> bool:
        """Whether its time is over. A request under way keeps it from being idle; pausing it does not stop the clock."""
        now = time.time()
        return now > self.created + self.wish.ttl or (not self.busy and now > self.used + self.wish.idle)

    @property
    def recorded(self) -> Recorded | None:
        """Its log, if it has one."""
        driver = self.sandbox.driver if self.sandbox is not None else None
        return driver if isinstance(driver, Recorded) else None


class Edge:
    """All methods may be called from many threads."""

    def __init__(self, config: EdgeConfig) -> None:
        if not is_edge_name(config.name):
            raise InvalidRequest(f"edge name {config.name!r}: lower-case letters, digits and hyphens, at most 40")
        self.config = config
        self.held: dict[str, Held] = {}
        self.images: dict[str, tuple[str, Image]] = {}  # by name: project, image
        self.change = time.time_ns() // 1000  # goes on from where an earlier run cannot have got
        self.draining = False
        self.making = 0
        self._lock = threading.RLock()
        self._logs: dict[str, threading.RLock] = {}  # one creation at a time for each log
        self._pool: list[Driver] = []
        for name in ("sandboxes", "logs"):
            (config.state / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    # -- taking over

    def adopt(self) -> tuple[int, int]:
        """Take over what an earlier run has left: (sandboxes found again, lost ones)."""
        found = [Path(entry) for entry in sorted((self.config.state / "sandboxes").glob("*.json"))]
        with ThreadPoolExecutor(8) as pool:
            alive = list(pool.map(self._adopt, found))
        return sum(alive), len(alive) - sum(alive)

    def _adopt(self, file: Path) -> bool:
        stored = json.loads(file.read_text())
        wish = stored.pop("wish")
        wish = Wish(**{**wish, "limits": Limits(**wish["limits"]), "rules": tuple(wish["rules"])})
        held = Held(wish=wish, used=file.stat().st_mtime, **stored)
        try:
            held.sandbox = self._find(held)
        except SandboxError as error:
            _log.warning("sandbox %s is lost: %s", held.id, error)
        with self._lock:
            self.held[held.id] = held
            self.change += 1
        return held.sandbox is not None

    def _find(self, held: Held) -> Sandbox:
        wish = held.wish
        if held.log is not None:
            return self._open(wish, self.config.state / held.log)
        if wish.kind == "function":  # nothing stays between its calls: new workers are the same sandbox
            return Sandbox.create("function", limits=wish.limits, workers=wish.workers)
        if wish.kind == "container":
            from nautile.sandbox.container import ContainerDriver  # noqa: PLC0415

            return Sandbox(ContainerDriver.attach(held.inner, wish.limits, self.config.orphan), wish.limits)
        from nautile.sandbox.guest.hosted import HostedDriver  # noqa: PLC0415

        return Sandbox(HostedDriver.attach(held.inner, self.config.orphan), wish.limits)

    def _open(self, wish: Wish, place: Path) -> Sandbox:
        return Sandbox.create(
            wish.kind,
            image=self._image(wish),
            limits=wish.limits,
            network=list(wish.rules) or None,
            workers=wish.workers,
            allow_emulation=self.config.allow_emulation,
            log=place,
            replay=wish.replay,
            keep=self.config.orphan,
        )

    # -- making

    def create(self, wish: Wish) -> dict[str, Any]:
        """A new sandbox, or the one whose log has this name. Raises FleetFull and what ``Sandbox.create`` raises."""
        if wish.log is None:
            return self._new(wish, None)
        digest = hashlib.sha256(f"{wish.project}\0{wish.log}".encode()).hexdigest()[:32]
        with self._lock:
            one_at_a_time = self._logs.setdefault(digest, threading.RLock())
        with one_at_a_time:
            log = f"logs/{digest}"
            held = self._of_log(log)
            if held is not None and held.sandbox is not None:
                return self._attached(held, 0)
            if held is not None:
                self._forget(held)
            return self._new(wish, log)

    def has_log(self, project: str, name: str) -> bool:
        """Whether the trajectory of this name is here, its sandbox alive or not."""
        digest = hashlib.sha256(f"{project}\0{name}".encode()).hexdigest()[:32]
        return (self.config.state / "logs" / digest / "log").exists()

    def _of_log(self, log: str) -> Held | None:
        with self._lock:
            return next((held for held in self.held.values() if held.log == log), None)

    def _new(self, wish: Wish, log: str | None) -> dict[str, Any]:
        with self._lock:
            refusal = "it is about to stop" if self.draining else self.config.admission.refusal(len(self.held) + self.making)
            if refusal is not None:
                raise FleetFull(f"edge {self.config.name} takes no more sandboxes: {refusal}")
            self.making += 1
        try:
            sandbox = self._make(wish) if log is None else self._open(wish, self.config.state / log)
            return self._admitted(wish, sandbox, log)
        finally:
            with self._lock:
                self.making -= 1

    def _admitted(self, wish: Wish, sandbox: Sandbox, log: str | None) -> dict[str, Any]:
        info, now = sandbox.info, time.time()
        held = Held(f"{self.config.name}.{info.id}", wish, now, info.id, log, sandbox, used=now)
        self._save(held)
        with self._lock:
            self.held[held.id] = held
            self.change += 1
            change = self.change  # its own: by the time it is described there may have been others
        return {**(self._attached(held, 0) if log is not None else self.describe(held)), "change": change}

    def _make(self, wish: Wish) -> Sandbox:
        if wish.kind == "function":
            return Sandbox.create("function", image=self._image(wish), limits=wish.limits, workers=wish.workers)
        if wish.kind != "container":
            return Sandbox(self._machine(wish), wish.limits)
        if wish.limits == Limits() and wish.image is None and not wish.rules:
            with self._lock:
                ready = self._pool.pop() if self._pool else None
            if ready is not None:
                return Sandbox(ready, wish.limits)
        return Sandbox(self._container(wish), wish.limits)

    def _container(self, wish: Wish) -> Driver:
        from nautile.sandbox.container import ContainerDriver  # noqa: PLC0415

        identity, image = f"c-{secrets.token_hex(8)}", self._image(wish) or Image()
        policy = NetworkPolicy.of(list(wish.rules) or None)
        return ContainerDriver.create(identity, image, wish.limits, policy, None, keep=self.config.orphan)

    def _machine(self, wish: Wish) -> Driver:
        """In a process of its own, which outlives this one as a container does."""
        from nautile.sandbox.guest.hosted import HostedDriver  # noqa: PLC0415
        from nautile.sandbox.guest.wish import MachineWish  # noqa: PLC0415

        policy, emulated = NetworkPolicy.of(list(wish.rules) or None), self.config.allow_emulation
        machine = MachineWish(wish.kind, self._image(wish) or Image(), wish.limits, policy, None, emulated)
        return HostedDriver.create(f"{wish.kind[0]}-{secrets.token_hex(8)}", machine, self.config.orphan)

    def _image(self, wish: Wish) -> Image | None:
        """A snapshot of this edge, a directory below ``images``, or an image of the store: no other place of this machine."""
        name = wish.image
        if name is None:
            return None
        if name in self.images:
            project, image = self.images[name]
            if not belongs(project, wish.project):
                raise AccessDenied(f"the image {name} belongs to another project")
            return image
        if not re.fullmatch(r"[a-zA-Z0-9][\w.-]{0,99}", name):
            raise InvalidRequest(f"image {name[:80]!r}: edge {self.config.name} has no image of this name")
        if self.config.images is not None:
            return Image.of(self.config.images / name)
        from nautile.sandbox.images.store import ImageStore  # noqa: PLC0415

        return ImageStore().image(name)

    def add_image(self, held: Held, image: Image) -> str:
        """Keep a snapshot for its project; its name."""
        digest = hashlib.sha256("\0".join(map(str, image.layers)).encode()).hexdigest()[:16]
        name = f"{self.config.name}.s-{digest}"
        with self._lock:
            mine = [one for one, (project, _) in self.images.items() if project == held.wish.project]
            if len(mine) >= _IMAGES and name not in self.images:
                del self.images[mine[0]]  # the oldest; sandboxes that use it keep it
            self.images[name] = (held.wish.project, image)
        return name

    def add_fork(self, parent: Held, child: Sandbox) -> dict[str, Any]:
        """Own what a fork has made; the place of an earlier client's object is taken by the new one."""
        recorded = child.driver if isinstance(child.driver, Recorded) else None
        log = None if recorded is None else os.path.relpath(recorded.log.place.resolve(), self.config.state.resolve())
        wish = dataclasses.replace(parent.wish, image=None)
        with self._lock:
            earlier = self.held.pop(f"{self.config.name}.{child.info.id}", None)
        if earlier is not None and earlier.recorded is not None:
            earlier.recorded.detach()
        if recorded is None:
            return self._admitted(wish, child, None)
        first = recorded.log.contents.inherited
        change = self._admitted(wish, child, log)["change"]
        held = self.find(f"{self.config.name}.{child.info.id}", wish.project)
        return {**self._attached(held, first, again=False), "change": change}

    # -- finding

    def find(self, identity: str, project: str) -> Held:
        """Raises SandboxClosed, AccessDenied."""
        with self._lock:
            held = self.held.get(identity)
        if held is None:
            raise SandboxClosed(f"edge {self.config.name} has no sandbox {identity[:80]}: it was closed, or its time was over")
        if not belongs(held.wish.project, project):
            raise AccessDenied(f"the sandbox {identity[:80]} belongs to another project")
        return held

    def living(self, identity: str, project: str) -> tuple[Held, Sandbox]:
        """A sandbox that can be worked with. Raises SandboxLost too."""
        held = self.find(identity, project)
        if held.sandbox is None:
            raise SandboxLost(f"the sandbox {identity} did not outlive its edge")
        return held, held.sandbox

    @contextlib.contextmanager
    def working(self, held: Held) -> Iterator[None]:
        """While a request is carried out: it is not idle."""
        with self._lock:
            held.busy += 1
        try:
            yield
        finally:
            with self._lock:
                held.busy -= 1
                held.used = time.time()
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._file(held))

    def describe(self, held: Held) -> dict[str, Any]:
        """What a client needs to know."""
        info = held.sandbox.info if held.sandbox is not None else None
        capabilities = held.sandbox.capabilities if held.sandbox is not None else None
        return {
            "id": held.id,
            "project": held.wish.project,
            "kind": held.wish.kind,
            "state": "lost" if held.sandbox is None else "live",
            "info": None if info is None else {**dataclasses.asdict(info), "id": held.id},
            "capabilities": None if capabilities is None else dataclasses.asdict(capabilities),
            "log": held.wish.log if held.log is not None else None,
            "memory": held.wish.limits.memory,
            "limits": dataclasses.asdict(held.wish.limits),
            "ends": held.created + held.wish.ttl,
            "idle": round(time.time() - held.used, 3),
            "change": self.change,
        }

    def _attached(self, held: Held, first: int, again: bool = True) -> dict[str, Any]:
        recorded = held.recorded
        assert recorded is not None
        with held.lock:
            client = recorded.log.attach()
        return {**self.describe(held), "client": client, "sequence": first, "attached": again}

    def listing(self, project: str) -> list[dict[str, Any]]:
        """The sandboxes of a project and of those below it."""
        with self._lock:
            mine = [held for held in self.held.values() if belongs(held.wish.project, project)]
        return [self.describe(held) for held in mine]

    def status(self) -> dict[str, Any]:
        """What gateways place by."""
        usage: dict[str, list[int]] = {}
        with self._lock:
            for held in self.held.values():
                counts = usage.setdefault(held.wish.project, [0, 0])
                counts[0] += 1
                counts[1] += held.wish.limits.memory
            live, change = len(self.held) + self.making, self.change
        return {
            "name": self.config.name,
            "live": live,
            "capacity": self.config.admission.capacity,
            "kinds": list(self.config.kinds),
            "accepting": not self.draining and self.config.admission.refusal(live) is None,
            "usage": usage,
            "change": change,
            "ready": len(self._pool),
        }

    # -- ending

    def close(self, identity: str, project: str) -> dict[str, Any]:
        """End one; closing what is closed already is no error."""
        try:
            held = self.find(identity, project)
        except SandboxClosed:
            return {"change": self.change, "memory": 0, "closed": False}
        change = self._forget(held)
        return {"change": change, "memory": held.wish.limits.memory, "project": held.wish.project, "closed": change > 0}

    def _forget(self, held: Held) -> int:
        with self._lock:
            if self.held.pop(held.id, None) is None:
                return 0
            self.change += 1
            change = self.change
        for terminal in held.terminals.values():
            with contextlib.suppress(SandboxError, OSError):
                terminal.close()
        if held.sandbox is not None:
            with contextlib.suppress(SandboxError):
                held.sandbox.close()
        self._file(held).unlink(missing_ok=True)
        return change

    def maintain(self) -> None:
        """To be called every second or so: end what is over, keep the rest alive, fill the pool."""
        with self._lock:
            over = [held for held in self.held.values() if held.expired]
        for held in over:
            _log.info("sandbox %s: its time is over", held.id)
            self._forget(held)
        if len(self._pool) < self.config.pool and self.config.admission.refusal(len(self.held) + len(self._pool)) is None:
            made = self._container(Wish("pool", "container", Limits()))
            with self._lock:
                self._pool.append(made)

    def keep_alive(self) -> None:
        """To be called well within ``orphan`` seconds: containers without requests live on."""
        with self._lock:
            drivers = [held.sandbox.driver for held in self.held.values() if held.sandbox is not None] + self._pool
        for driver in drivers:
            with contextlib.suppress(SandboxError):
                keep = getattr(getattr(driver, "live_driver", driver), "keep_alive", None)
                if keep is not None:
                    keep(self.config.orphan)

    def stop(self, leave: bool) -> None:
        """End: with every sandbox, or ``leave`` them to the next run of this edge."""
        self.draining = True
        with self._lock:
            held, pool, self._pool = list(self.held.values()), self._pool, []
        for driver in pool:
            driver.close()
        if leave:
            for one in held:
                if one.recorded is not None:
                    one.recorded.detach()
            return
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(self._forget, held))

    # -- its file

    def _file(self, held: Held) -> Path:
        return self.config.state / "sandboxes" / f"{held.inner}.json"

    def _save(self, held: Held) -> None:
        stored = {"id": held.id, "created": held.created, "inner": held.inner, "log": held.log}
        text = json.dumps({**stored, "wish": dataclasses.asdict(held.wish)})
        temporary = self._file(held).with_suffix(f".{secrets.token_hex(4)}")
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, self._file(held))
