"""runsc's processes of one sandbox, in control groups of ours, and the channel to the agent that is its process 1.

runsc is told to leave the groups alone, and would set no limits by itself. The agent (guest/agent.c, compiled here) has the
channel as its stdin: a socket, which runsc puts in its place again when a checkpoint goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from nautile.sandbox import bundle, cgroup
from nautile.sandbox.errors import InvalidRequest, SandboxLost, SubstrateUnavailable
from nautile.sandbox.function import ENVIRONMENT
from nautile.sandbox.guest import boot
from nautile.sandbox.guest.link import Link
from nautile.sandbox.image import Image
from nautile.sandbox.limits import Limits

__all__ = ["Runsc", "bound"]

_START_LIMIT, _STOP_LIMIT = 30.0, 10.0  # seconds
_OWN_THREADS = 256  # of runsc: they count in the group that holds it
_OWN_FILES = 1024  # of the agent
_APT = "apt-get install runsc (Debian 12: from bookworm-backports)"
_SYSTEM = ("/proc", "/dev", "/sys")  # destinations that runsc fills, or the agent
# What the agent needs to make the tenant's surroundings, to become the tenant, and to end and to pack what is its.
_CAPABILITIES = ("SYS_ADMIN", "SYS_CHROOT", "SETUID", "SETGID", "SETPCAP", "KILL", "CHOWN", "DAC_OVERRIDE", "FOWNER")


class Runsc:
    """One sandbox. ``start`` begins it; it ends with this process, whose end of the channel the agent watches."""

    link: Link

    def __init__(self, identity: str, image: Image, limits: Limits) -> None:
        """Its groups and its directory; nothing runs yet. Raises SubstrateUnavailable, LimitUnavailable, InvalidRequest."""
        if shutil.which("runsc") is None:
            raise SubstrateUnavailable("container", "runsc is missing", _APT)
        if os.geteuid() != 0:
            raise SubstrateUnavailable("container", "runsc is used as root only in this version", "run as root, or use crun")
        if len(image.layers) > (0 if image.host_usr else 1) or any(not layer.is_dir() for layer in image.layers):
            raise InvalidRequest("runtime='runsc' takes the host's /usr or one directory: give that, or leave runtime out")
        self._id, self._image, self._limits = identity, image, limits
        self._agent = boot.agent("container")
        _sweep()
        above = Path("/run/nautile-runsc")
        above.mkdir(mode=0o711, exist_ok=True)
        self._place = Path(tempfile.mkdtemp(dir=above, prefix=f"{cgroup.owner_name()}-"))
        self._place.chmod(0o711)
        own = dataclasses.replace(limits, pids=limits.pids + _OWN_THREADS)
        try:
            self.group = cgroup.Group.create(identity, own, owner=cgroup.owner_name())
        except BaseException:
            shutil.rmtree(self._place)
            raise

    @classmethod
    def started(cls, identity: str, image: Image, limits: Limits, words: list[str]) -> Runsc:
        """A new one, of which runsc has done what ``words`` say."""
        made = cls(identity, image, limits)
        try:
            made._start(words)
        except BaseException:
            made.close()
            raise
        return made

    def _start(self, words: list[str]) -> None:
        (self._place / "bundle").mkdir()
        root = self._image.layers[0] if self._image.layers else self._place / "root"
        if not self._image.layers:
            root.mkdir()
            bundle.skeleton(root)
            os.chown(root / "workspace", bundle.TENANT, bundle.TENANT)
        told = _configuration(root, self._agent, self._image.host_usr, self._limits)
        (self._place / "bundle/config.json").write_text(json.dumps(told))
        argv = self._argv(*words, "--bundle", str(self._place / "bundle"), self._id)
        self._launch(argv)
        if not self._confined():  # runsc was faster than the kernel: once more, and this time not side by side
            self.link.close()
            self._end_outside()
            enter = 'while [ "$1" != -- ]; do echo 0 > "$1" || exit 9; shift; done; shift; exec "$@"'
            self._launch(["/bin/sh", "-c", enter, "sh", *map(str, self.group.entrances), "--", *argv])
            if not self._confined():
                raise SubstrateUnavailable("container", "runsc did not stay in its cgroups", "nautile sandbox doctor")

    def _launch(self, argv: list[str]) -> None:
        """Start it, and move runsc into the cgroups while it prepares: moving takes 10 ms and more, as long as its start."""
        ours, theirs = socket.socketpair()
        self.link = Link(ours)
        with theirs, open(self._place / "log", "w+b") as log:  # a file: what is detached keeps it open
            process = subprocess.Popen(
                argv, stdin=theirs.fileno(), stdout=log, stderr=log, env=ENVIRONMENT, start_new_session=True
            )
            try:
                for entrance in self.group.entrances:
                    entrance.write_text(str(process.pid))
                code = process.wait(_START_LIMIT)
            except (subprocess.TimeoutExpired, OSError) as error:
                process.kill()
                process.wait()
                raise SubstrateUnavailable("container", f"runsc did not start ({error})", _APT) from None
            if code:
                log.seek(0)
                said = log.read(4000).decode("utf-8", "replace").strip().splitlines()
                old = "; this runsc is too old" if "unknown platform" in str(said) else ""
                why = f"runsc could not start it ({said[-1] if said else code}){old}"
                raise SubstrateUnavailable("container", why, _APT)

    def _confined(self) -> bool:
        """Whether the sandbox and its helper are in every group: only what runsc started after it was moved is."""
        own = set(map(str, self._processes()))
        return all(own <= set(_members(place)) for place in self.group.places)

    def _processes(self) -> list[int]:
        """The sandbox and its helper, by runsc's own record."""
        (found,) = (self._place / "state").glob(f"{self._id}*.state")
        told = json.loads(found.read_text())
        return [told["sandbox"]["pid"], told["goferPid"]]

    def _end_outside(self) -> None:
        """End what is not in the groups, with the record of it: ``runsc delete`` would take a second and more."""
        for process in self._processes():
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(process)
                try:
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                    select.select([descriptor], [], [], _STOP_LIMIT)
                finally:
                    os.close(descriptor)
        shutil.rmtree(self._place / "state")

    def _argv(self, *words: str) -> list[str]:
        flags = ["--root", str(self._place / "state"), "--platform=systrap", "--network=none", "--ignore-cgroups"]
        return ["runsc", *flags, *words]

    def _do(self, *words: str) -> None:
        """A command of runsc's. Raises SandboxLost."""
        try:
            done = subprocess.run(
                self._argv(*words), stdin=subprocess.DEVNULL, capture_output=True, timeout=_START_LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            raise SandboxLost(f"runsc {words[0]} did not end within {_START_LIMIT:g} s") from None
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()
            raise SandboxLost(f"runsc {words[0]} failed: {said[-1] if said else done.returncode}")

    # -- life

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return not any(_members(place) for place in self.group.places)

    def save(self, place: Path) -> None:
        """Write processes and files to a directory, and go on. Raises SandboxLost."""
        self._do("checkpoint", "--leave-running", "--compression=none", "--image-path", str(place), self._id)

    def restore(self, place: Path) -> None:
        """In a sandbox that was only created: go on from what was saved. Raises SandboxLost."""
        self._do("restore", "--image-path", str(place), "--detach", self._id)

    def stop(self) -> None:
        """Let all of it stand still."""
        self._do("pause", self._id)

    def go_on(self) -> None:
        """After ``stop``."""
        self._do("resume", self._id)

    def close(self) -> None:
        """End it. Killed as a group: ``runsc delete`` waits for a second and more."""
        if hasattr(self, "link"):
            self.link.close()
        self.group.remove()
        shutil.rmtree(self._place, ignore_errors=True)


def bound(image: Image) -> list[str]:
    """What of the host the tenant sees: the places that are mounted over the root, apart from the system's own."""
    mounts = bundle.configuration(Path("/"), Path("/"), image.host_usr, [], 1, None)["mounts"]
    return [one["destination"] for one in mounts if not one["destination"].startswith(_SYSTEM)]


def _configuration(root: Path, agent: Path, host_usr: bool, limits: Limits) -> dict[str, Any]:
    """The OCI configuration: a read-only root, the agent as process 1, no user namespace (the sandbox makes its own)."""
    told = bundle.configuration(root, agent, host_usr, [], limits.disk, None)
    told["root"]["readonly"] = True
    own = [f"CAP_{name}" for name in _CAPABILITIES]
    most = max(limits.open_files, _OWN_FILES)
    told["process"] |= {
        "args": ["/dev/init", "gvisor"],
        "capabilities": {kind: own for kind in ("bounding", "effective", "permitted")},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": most, "soft": _OWN_FILES}],
    }
    told["linux"] = {"namespaces": [{"type": name} for name in ("pid", "ipc", "uts", "mount")]}
    return told


def _members(place: Path) -> list[str]:
    """The processes in a group directory."""
    try:
        return (place / "cgroup.procs").read_text().split()
    except OSError:
        return []


def _sweep() -> None:
    """What clients that were killed have left: processes in groups, and directories."""
    cgroup.sweep()
    before = time.time() - 60
    with contextlib.suppress(FileNotFoundError):
        for entry in Path("/run/nautile-runsc").iterdir():
            owner = entry.name.rpartition("-")[0]
            if not cgroup.alive(owner) and entry.stat().st_mtime < before:
                shutil.rmtree(entry, ignore_errors=True)
