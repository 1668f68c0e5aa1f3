"""Limits, pausing and the killing of whole trees, through cgroup version 1, version 2, and both mounted side by side.

A ``Group`` is one directory in every hierarchy that is of use. Version 1 has a hierarchy for each controller; version 2 has
one, which kills and freezes by itself even where its controllers belong to version 1 (a hybrid system).

Where groups are made: below the top of the hierarchy when it can be written (root), else below our own group (delegated to
an ordinary user). Their names carry the process that owns them, so that what a killed owner left can be swept away.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nautile.sandbox.errors import LimitUnavailable
from nautile.sandbox.limits import Limits

__all__ = [
    "Group",
    "Hierarchy",
    "alive",
    "end",
    "enter",
    "hierarchies",
    "kill_group",
    "owner_name",
    "remove_group",
    "runs",
    "sweep",
]

_WANTED = ("memory", "pids", "cpu", "freezer")
_TOP = "nautile"
_PERIOD = 100_000  # microseconds of a cpu quota's period
_ATTEMPTS = 100  # at making a group while others remove theirs
_REMOVED = (errno.ENOENT, errno.ENODEV)  # of a file whose group was removed before it was opened, or after that
_REMEDY = (
    "run as root, or in a delegated cgroup (systemd-run --user --scope -p Delegate=yes COMMAND), or pass "
    "limits=Limits(allow_unenforced=True) to go without"
)


@dataclass(frozen=True)
class Hierarchy:
    """A mounted cgroup hierarchy: where we may make groups in it, its version, and the controllers that we use of it."""

    base: Path
    version: int
    controllers: frozenset[str]


def hierarchies(proc: Path = Path("/proc")) -> list[Hierarchy]:
    """The hierarchies of this machine in which we may make groups. ``proc`` is for tests."""
    own = _own_groups(proc)
    found: list[Hierarchy] = []
    for line in (proc / "self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields, _, tail = line.partition(" - ")
        kind, _, options = tail.split()[:3]
        if kind not in ("cgroup", "cgroup2"):
            continue
        root, point = fields.split()[3:5]
        mount = Path(point.replace("\\040", " "))
        names = {"": ""} if kind == "cgroup2" else {name: name for name in options.split(",") if name in _WANTED}
        if not names or any(entry.base.is_relative_to(mount) for entry in found):
            continue
        base = _place(mount, root, own.get(next(iter(names)), "/"))
        if base is None:
            continue
        controllers = frozenset(names) if kind == "cgroup" else _version2(base)
        found.append(Hierarchy(base, 1 if kind == "cgroup" else 2, controllers))
    return found


def _own_groups(proc: Path) -> dict[str, str]:
    groups = {}
    for line in (proc / "self/cgroup").read_text(encoding="utf-8").splitlines():
        _, names, path = line.split(":", 2)
        groups.update({name: path for name in names.split(",")})
    return groups


def _place(mount: Path, root: str, own: str) -> Path | None:
    """The top of the hierarchy if it can be written, else our own group if that can, else None."""
    inner = mount / os.path.relpath(own, root) if own.startswith(root) else mount
    for place in (mount, inner):
        if os.access(place, os.W_OK) and os.access(place / "cgroup.procs", os.W_OK):
            return place
    return None


def _version2(base: Path) -> frozenset[str]:
    """Enable what we use for groups below ``base``; what is enabled then."""
    try:
        offered = set((base / "cgroup.controllers").read_text().split()) & {"memory", "pids", "cpu"}
        missing = offered - set((base / "cgroup.subtree_control").read_text().split())
        if missing and (base / "cgroup.type").exists():  # not the root: no process may stay beside groups with controllers
            _step_aside(base)
        if missing:
            (base / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in sorted(missing)))
        return frozenset(set((base / "cgroup.subtree_control").read_text().split()) & {"memory", "pids", "cpu"})
    except OSError:
        return frozenset()


def _step_aside(base: Path) -> None:
    leaf = base / f"{_TOP}-callers"
    leaf.mkdir(exist_ok=True)
    for process in (base / "cgroup.procs").read_text().split():
        with contextlib.suppress(OSError):
            (leaf / "cgroup.procs").write_text(process)


def owner_name(process: int | None = None) -> str:
    """``PID.STARTTIME`` of a process: no other one ever has the same until the machine restarts."""
    number = os.getpid() if process is None else process
    stat = Path(f"/proc/{number}/stat").read_bytes()
    return f"{number}.{stat.rpartition(b')')[2].split()[19].decode()}"


class Group:
    """One sandbox's directory in every hierarchy. Made by ``create``, ended by ``remove``."""

    def __init__(self, places: dict[Path, Hierarchy]) -> None:
        self.places = places

    @classmethod
    def create(cls, name: str, limits: Limits, *, owner: str, found: Iterable[Hierarchy] | None = None) -> Group:
        """Make the group and set its limits. Raises LimitUnavailable unless ``limits.allow_unenforced``."""
        group = cls.make(name, owner=owner, found=found)
        try:
            group.apply(limits)
        except BaseException:
            group.remove()
            raise
        return group

    @classmethod
    def make(cls, name: str, *, owner: str, found: Iterable[Hierarchy] | None = None) -> Group:
        """The group without limits; its directories may be there already."""
        places: dict[Path, Hierarchy] = {}
        for hierarchy in hierarchies() if found is None else found:
            mine = hierarchy.base / _TOP / owner
            _make_directory(hierarchy, mine, mine / name)
            places[mine / name] = hierarchy
        return cls(places)

    def apply(self, limits: Limits) -> None:
        """Write the limits. Raises LimitUnavailable."""
        wanted = {"memory": limits.memory, "pids": limits.pids} | ({"cpu": limits.cpus} if limits.cpus else {})
        for controller, value in wanted.items():
            done = any(
                _write_limit(place, hierarchy.version, controller, float(value))
                for place, hierarchy in self.places.items()
                if controller in hierarchy.controllers
            )
            if not done and not limits.allow_unenforced:
                raise LimitUnavailable(controller, "no cgroup hierarchy with this controller can be written here", _REMEDY)
        if self.tracker is None and not limits.allow_unenforced:
            raise LimitUnavailable("lifetime of processes", "no cgroup can be made to keep track of them", _REMEDY)

    @property
    def enforced(self) -> tuple[str, ...]:
        """The controllers that hold this group."""
        return tuple(sorted({name for one in self.places.values() for name in one.controllers if name != "freezer"}))

    @property
    def entrances(self) -> list[Path]:
        """The files into which a process writes ``0`` to enter."""
        return [place / "cgroup.procs" for place in self.places]

    @property
    def tracker(self) -> Path | None:
        """The directory whose subgroups keep track of what one command started: version 2 if it is there."""
        for wanted in ("v2", "freezer", "pids"):
            for place, hierarchy in self.places.items():
                if (wanted == "v2" and hierarchy.version == 2) or wanted in hierarchy.controllers:
                    return place
        return None

    def memory_kills(self) -> int:
        """How often the kernel killed something of this group at the memory limit."""
        for place, hierarchy in self.places.items():
            if "memory" in hierarchy.controllers:
                name = "memory.oom_control" if hierarchy.version == 1 else "memory.events"
                with contextlib.suppress(OSError):
                    lines = (place / name).read_text().splitlines()
                    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
        return 0

    def freeze(self, frozen: bool) -> None:
        """Stop or continue every process of the group. Raises LimitUnavailable when no hierarchy can."""
        for place, hierarchy in self.places.items():
            if hierarchy.version == 2 and (place / "cgroup.freeze").exists():
                (place / "cgroup.freeze").write_text("1" if frozen else "0")
                return _until(place / "cgroup.events", f"frozen {int(frozen)}")
        for place, hierarchy in self.places.items():
            if "freezer" in hierarchy.controllers:
                state = "FROZEN" if frozen else "THAWED"
                (place / "freezer.state").write_text(state)
                return _until(place / "freezer.state", state)
        raise LimitUnavailable("running", "no cgroup freezer can be written here", _REMEDY)

    def kill(self) -> None:
        """Kill every process of the group and of its subgroups, and wait until they are gone (five seconds at most)."""
        if self.tracker is not None:
            kill_group(self.tracker)

    def remove(self) -> None:
        """Kill what is inside and remove the directories."""
        self.kill()
        for place in self.places:
            remove_group(place)
            for above in (place.parent, place.parent.parent):
                with contextlib.suppress(OSError):  # others of this owner, or other owners, are still there
                    above.rmdir()


def _make_directory(hierarchy: Hierarchy, mine: Path, target: Path) -> None:
    """Make a group's directory, and those above it, which the last group of an owner takes away when it is removed."""
    for attempts_left in reversed(range(_ATTEMPTS)):
        try:
            for place in (mine.parent, mine, target):
                with contextlib.suppress(FileExistsError):
                    place.mkdir()
                if hierarchy.version == 2 and hierarchy.controllers and place != target:
                    (place / "cgroup.subtree_control").write_text(" ".join(f"+{one}" for one in sorted(hierarchy.controllers)))
            return
        except OSError as error:  # another process has just removed its last group, and the empty directory above it
            if error.errno not in _REMOVED or not attempts_left:
                raise


def _write_limit(place: Path, version: int, controller: str, value: float) -> bool:
    number, quota = str(int(value)), str(max(int(value * _PERIOD), 1000))
    files = {
        ("memory", 1): [("memory.limit_in_bytes", number)],
        ("memory", 2): [("memory.max", number)],
        ("pids", 1): [("pids.max", number)],
        ("pids", 2): [("pids.max", number)],
        ("cpu", 1): [("cpu.cfs_period_us", str(_PERIOD)), ("cpu.cfs_quota_us", quota)],
        ("cpu", 2): [("cpu.max", f"{quota} {_PERIOD}")],
    }[controller, version]
    swap = {("memory", 1): [("memory.memsw.limit_in_bytes", number)], ("memory", 2): [("memory.swap.max", "0")]}
    # Where swap is not accounted for, its file is not there.
    files += [one for one in swap.get((controller, version), []) if (place / one[0]).exists()]
    if (controller, version) == ("memory", 1) and len(files) > 1:  # a group that had less: the sum may never be the smaller one
        files.insert(0, ("memory.memsw.limit_in_bytes", "-1"))
    try:
        for name, text in files:
            (place / name).write_text(text)
    except OSError:
        return False
    return True


def enter(entrance: Path) -> None:
    """Move this process into a group, by its ``cgroup.procs``. Without Python's file objects: every command pays for it."""
    descriptor = os.open(entrance, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, b"0")
    finally:
        os.close(descriptor)


def kill_group(place: Path) -> None:
    """Kill every process in a group directory and below it, and wait for their end."""
    if (place / "cgroup.kill").exists() and not _written(place / "cgroup.kill", "1"):
        return  # it has just been removed, which nothing that is inside lets happen
    deadline = time.monotonic() + 5.0
    pause = 0.0002
    while (left := _members(place)) and time.monotonic() < deadline:
        if not (place / "cgroup.kill").exists():
            for process in left:  # a fork that races with this is caught by the next round; the pids limit bounds the rounds
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            if (place / "freezer.state").exists() and not _written(place / "freezer.state", "THAWED"):
                return
        time.sleep(pause)
        pause = min(pause * 2, 0.02)


def _written(file: Path, text: str) -> bool:
    """Write to a group's file; False if somebody else has just removed the group, as two who sweep at once may."""
    try:
        file.write_text(text)
    except OSError as error:
        if error.errno not in _REMOVED:
            raise
        return False
    return True


def _members(place: Path) -> list[int]:
    found = []
    for directory, _, _ in os.walk(place):
        with contextlib.suppress(OSError):
            found += [int(line) for line in Path(directory, "cgroup.procs").read_text().split()]
    return found


def remove_group(place: Path) -> None:
    """Remove a group directory and its subgroups. Processes that are just ending may hold it for a moment."""
    for directory, _, _ in os.walk(place, topdown=False):
        deadline = time.monotonic() + 2.0
        while True:
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                pass
            except OSError:
                if time.monotonic() < deadline:
                    time.sleep(0.001)
                    continue
            break


def sweep(found: Iterable[Hierarchy] | None = None) -> int:
    """Kill and remove the groups whose owner is dead. How many were found."""
    swept = 0
    for hierarchy in hierarchies() if found is None else found:
        top = hierarchy.base / _TOP
        owners: list[Path] = []
        with contextlib.suppress(FileNotFoundError):  # the last group of all may be removed at any moment
            owners = list(top.iterdir())
        for owner in owners:
            if owner.is_dir() and not alive(owner.name):
                kill_group(owner)
                remove_group(owner)
                swept += 1
        with contextlib.suppress(OSError):
            top.rmdir()
    return swept


_EXITING = 0x4  # PF_EXITING: set before a process gives up its namespaces, and never taken back


def alive(owner: str) -> bool:
    """Whether the process of an ``owner_name`` still runs; one that is ending or waits to be collected does not."""
    number = owner.partition(".")[0]
    try:
        fields = Path(f"/proc/{int(number)}/stat").read_bytes().rpartition(b")")[2].split()
    except (OSError, ValueError):
        return False
    ending = fields[0] in (b"Z", b"X") or int(fields[6]) & _EXITING
    return not ending and fields[19].decode() == owner.partition(".")[2]


def runs(process: int) -> bool:
    """Whether there is a process of this number that is not ending."""
    try:
        return alive(owner_name(process))
    except OSError:
        return False


def _until(file: Path, text: str, seconds: float = 5.0) -> None:
    """Wait until a file has a line. Raises LimitUnavailable."""
    deadline = time.monotonic() + seconds
    while text not in file.read_text().splitlines():
        if time.monotonic() > deadline:
            raise LimitUnavailable("running", f"the freezer did not finish within {seconds:g} s", "close the sandbox")
        time.sleep(0.0005)


def end(owner: str) -> None:
    """Kill and remove every group of an owner."""
    for hierarchy in hierarchies():
        place = hierarchy.base / _TOP / owner
        if place.is_dir():
            kill_group(place)
            remove_group(place)
        with contextlib.suppress(OSError):
            place.parent.rmdir()
