"""What the keeper knows of a container: written once when it is made, read by every request."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from nautile.sandbox import cgroup
from nautile.sandbox.errors import SandboxLost
from nautile.sandbox.limits import Limits

__all__ = ["SHARE", "WORK", "Settings", "State", "version"]

SHARE = 65_536  # user ids of a container
WORK = "work"  # the keeper's own file system, in memory: what of containers nobody else needs to see
_SHARED = tuple(
    str.split(
        "bundle cgroup container enter filing keeper kernel layers limits native operations orders policy portable_seat proxy "
        "seat seccomp_profile spares state"
    )
)


@lru_cache(maxsize=1)
def version() -> str:
    """What a keeper and its clients must agree on, as this process has it: one of another version is not spoken to."""
    here = Path(__file__).parent
    mine = [here / "seat.c", *(here / f"{name}.py" for name in _SHARED)]
    files = sorted([*mine, *here.glob("inside/*.py"), *here.glob("images/*.py")])
    texts = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Settings:
    """What all containers of a keeper share. ``base``: the host's user id of their root; None for an ordinary user's keeper.

    ``seat``, ``crun``: descriptors of programs that nobody can change, the seat's None where it cannot be compiled.
    ``mounts``: the mount namespace without containers, of which crun gets a copy: the fewer mounts, the sooner it is made.
    """

    owner: str
    base: int | None
    hierarchies: list[cgroup.Hierarchy]
    seat: int | None = None
    crun: int | None = None
    mounts: int | None = None

    @property
    def descriptors(self) -> list[int]:
        """Those that every process of the keeper has."""
        return [one for one in (self.seat, self.crun, self.mounts) if one is not None]

    def group(self, name: str) -> cgroup.Group:
        """A group that has been made."""
        return cgroup.Group({one.base / "nautile" / self.owner / name: one for one in self.hierarchies})


@dataclass(frozen=True)
class State:
    """A container that runs."""

    place: Path
    work: Path  # its part of the keeper's own file system
    process: int  # its process 1, as the host names it
    started: str  # that process's start time, so that another one of the same number is not mistaken for it
    tenant: int
    limits: Limits
    group: cgroup.Group
    control: socket.socket  # of its seat
    layers: tuple[str, ...]
    host_usr: bool
    network: bool
    base: int | None

    @classmethod
    def load(cls, keeper: Path, settings: Settings, identity: str, control: socket.socket) -> State:
        """Read what ``create`` wrote. Raises SandboxLost when it is not there or has died."""
        place = keeper / identity
        try:
            stored = json.loads((place / "state.json").read_text())
        except FileNotFoundError:
            raise SandboxLost(f"the container {identity} is gone") from None
        if not cgroup.alive(stored["started"]):
            raise SandboxLost(f"the container {identity} has died")
        limits = Limits(**stored["limits"])
        return cls(
            place=place,
            work=keeper / WORK / stored["group"],
            process=stored["process"],
            started=stored["started"],
            tenant=stored["tenant"],
            limits=limits,
            group=settings.group(stored["group"]),
            control=control,
            layers=tuple(stored["layers"]),
            host_usr=stored["host_usr"],
            network=stored["network"],
            base=settings.base,
        )

    def alive(self) -> bool:
        """Whether its process 1 runs. One that is ending has no namespaces that could be entered, though it has a number."""
        return cgroup.alive(self.started)

    def open(self) -> int:
        """A pidfd of its process 1. Raises SandboxLost."""
        try:
            return os.pidfd_open(self.process)
        except ProcessLookupError:
            raise SandboxLost("the container has died") from None
