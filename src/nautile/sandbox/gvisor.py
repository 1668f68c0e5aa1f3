"""The container substrate with ``runtime="runsc"``: gVisor's kernel in user space stands between the tenant and the host's.

A sandbox is a process of runsc and its helper, in cgroups of our own: runsc is told to leave them alone, and would set no
limits by itself. Everything that the tenant writes is in that process's memory, so a checkpoint holds files and processes. The
root file system is read-only; /workspace and /tmp are writable. A command is one ``runsc exec``, and so is a file operation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nautile.sandbox import bundle, cgroup
from nautile.sandbox.checkpoint import Checkpoint
from nautile.sandbox.driver import Order, Watch
from nautile.sandbox.errors import InvalidRequest, SandboxError, SandboxLost, SubstrateUnavailable
from nautile.sandbox.function import ENVIRONMENT
from nautile.sandbox.gvisor_files import Files
from nautile.sandbox.image import Image
from nautile.sandbox.inside.supervise import Capture, Job, Outcome, supervise
from nautile.sandbox.limits import Limits
from nautile.sandbox.result import Capabilities, Entry, Info, RunResult

__all__ = ["GvisorDriver"]

_START_LIMIT, _STOP_LIMIT = 30.0, 10.0  # seconds
_OWN_THREADS = 256  # of runsc: they count in the group that holds it
_APT = "apt-get install runsc (Debian 12: from bookworm-backports)"
# The command's own shell ends what the command has left: a signal to all spares its sender and process 1, which is root's.
_WRAPPER = '"$@"; code=$?; kill -9 -1 2>/dev/null; exit $code'


class GvisorDriver:
    """One sandbox. ``create`` starts it, or continues a checkpoint; it ends with this process."""

    capabilities = Capabilities(
        files=True, session=False, pause=True, snapshot=True, fork=True, pack_diff=False, network=False, memory_snapshot=True
    )

    def __init__(self, identity: str, image: Image, limits: Limits, place: Path, group: cgroup.Group) -> None:
        self._id, self._image, self._limits, self._place, self._group = identity, image, limits, place, group
        self.info = Info(identity, "container", "runsc", "native", group.enforced)
        self._paused = False

    @classmethod
    def create(cls, identity: str, image: Image, limits: Limits) -> GvisorDriver:
        """Start a sandbox. Raises SubstrateUnavailable, LimitUnavailable, InvalidRequest."""
        checkpoint: Checkpoint[GvisorDriver] | None = Checkpoint.of(image)
        driver = None if checkpoint is None else _adopted(checkpoint, identity, image, limits)
        if driver is None:
            words = ["run"] if image.memory is None else ["restore", "--image-path", str(image.memory)]
            driver = cls._started(identity, image, limits, [*words, "--detach"])
        if checkpoint is not None:
            alone = dataclasses.replace(image, held=())  # what is made ahead must not keep the checkpoint alive
            checkpoint.prepare(limits, lambda: cls._started(f"c-{os.urandom(8).hex()}", alone, limits, ["create"]))
        return driver

    @classmethod
    def _started(cls, identity: str, image: Image, limits: Limits, words: list[str]) -> GvisorDriver:
        """A new one, of which runsc has done what ``words`` say."""
        driver = cls._placed(identity, image, limits)
        try:
            driver._start(words)
        except BaseException:
            driver.close()
            raise
        return driver

    @classmethod
    def _placed(cls, identity: str, image: Image, limits: Limits) -> GvisorDriver:
        """Its cgroups and its directory; nothing runs yet."""
        if shutil.which("runsc") is None:
            raise SubstrateUnavailable("container", "runsc is missing", _APT)
        if os.geteuid() != 0:
            raise SubstrateUnavailable("container", "runsc is used as root only in this version", "run as root, or use crun")
        if len(image.layers) > (0 if image.host_usr else 1) or any(not layer.is_dir() for layer in image.layers):
            raise InvalidRequest("runtime='runsc' takes the host's /usr or one directory: give that, or leave runtime out")
        _sweep()
        above = Path("/run/nautile-runsc")
        above.mkdir(mode=0o711, exist_ok=True)
        place = Path(tempfile.mkdtemp(dir=above, prefix=f"{cgroup.owner_name()}-"))
        place.chmod(0o711)
        own = dataclasses.replace(limits, pids=limits.pids + _OWN_THREADS)
        try:
            group = cgroup.Group.create(identity, own, owner=cgroup.owner_name())
        except BaseException:
            shutil.rmtree(place)
            raise
        return cls(identity, image, limits, place, group)

    def _start(self, words: list[str]) -> None:
        (self._place / "bundle").mkdir()
        root = self._image.layers[0] if self._image.layers else self._place / "root"
        if not self._image.layers:
            root.mkdir()
            bundle.skeleton(root)
        told = _configuration(root, self._image.host_usr, self._limits)
        (self._place / "bundle/config.json").write_text(json.dumps(told))
        argv = self._runsc(*words, "--bundle", str(self._place / "bundle"), self._id)
        self._launch(argv)
        if not self._confined():  # runsc was faster than the kernel: once more, and this time not side by side
            self._do("delete", "--force", self._id)
            enter = 'while [ "$1" != -- ]; do echo 0 > "$1" || exit 9; shift; done; shift; exec "$@"'
            self._launch(["/bin/sh", "-c", enter, "sh", *map(str, self._group.entrances), "--", *argv])
            if not self._confined():
                raise SubstrateUnavailable("container", "runsc did not stay in its cgroups", "nautile sandbox doctor")

    def _go_on_from(self, identity: str, image: Image) -> None:
        """Continue a checkpoint in a sandbox that was made ahead and is empty. Raises SandboxLost."""
        self._image, self.info = image, dataclasses.replace(self.info, id=identity)
        self._do("restore", "--image-path", str(image.memory), "--detach", self._id)

    def _launch(self, argv: list[str]) -> None:
        """Start it, and move runsc into the cgroups while it prepares: moving takes 10 ms and more, as long as its start."""
        with open(self._place / "log", "w+b") as log:  # a file: what is detached keeps it open
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=ENVIRONMENT, start_new_session=True
            )
            try:
                for entrance in self._group.entrances:
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
        (found,) = (self._place / "state").glob(f"{self._id}*.state")
        told = json.loads(found.read_text())
        own = {str(told["sandbox"]["pid"]), str(told["goferPid"])}
        return all(own <= set(cgroup_processes(place)) for place in self._group.places)

    def _runsc(self, *words: str) -> list[str]:
        return [
            "runsc",
            "--root",
            str(self._place / "state"),
            "--platform=systrap",
            "--network=none",
            "--ignore-cgroups",
            *words,
        ]

    def _do(self, *words: str) -> None:
        """A command of runsc's. Raises SandboxLost."""
        try:
            done = subprocess.run(
                self._runsc(*words), stdin=subprocess.DEVNULL, capture_output=True, timeout=_START_LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            raise SandboxLost(f"runsc {words[0]} did not end within {_START_LIMIT:g} s") from None
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()
            raise SandboxLost(f"runsc {words[0]} failed: {said[-1] if said else done.returncode}")

    @property
    def _files(self) -> Files:  # made anew: kept, it would be a cycle, and a checkpoint should end with its last user
        return Files(self._command)

    def _command(self, argv: Sequence[str]) -> list[str]:
        """How the tenant's ``argv`` is started."""
        self._go_on()
        return self._runsc("exec", "--user", "1000:1000", "--cwd", "/", self._id, *argv)

    def _go_on(self) -> None:
        """The next request continues a paused sandbox."""
        if self._paused:
            self.resume()

    def reason(self, feature: str) -> tuple[str, str]:
        """See ``Driver.reason``."""
        reasons = {
            "network": "gVisor has a network stack of its own, in which the proxy cannot listen",
            "session": "the end of any command kills every process of the tenant, and so it would a session",
            "pack_diff": "what it writes is in the memory of its kernel, where no difference can be told",
        }
        remedies = {"network": "leave runtime out and give network=[...]", "pack_diff": "use snapshot, or download"}
        return reasons[feature], remedies.get(feature, "use commands, or leave runtime out")

    def run(self, order: Order, watch: Watch | None) -> RunResult:
        """See ``Driver.run``. What it started ends with it; an image needs /bin/sh for that."""
        self._go_on()
        before = self._group.memory_kills()
        captures = (Capture(self._limits.output), Capture(self._limits.output))
        words = ["exec", "--user", "1000:1000", "--cwd", order.cwd or "/workspace"]
        for name, value in {**ENVIRONMENT, **order.environment}.items():
            words += ["--env", f"{name}={value}"]
        argv = self._runsc(*words, self._id, "/bin/sh", "-c", _WRAPPER, "sh", *order.argv)
        argv[1:1] = ["--log", str(self._place / "exec.log")]  # runsc's own words, apart from the command's
        running: list[_Process] = []
        failures: list[str | None] = []

        def spawn(*ends: int) -> _Process:
            running.append(_Process(argv, ends))
            return running[0]

        def kill_tree() -> None:
            # At its time limit, or when it may have killed its shell, which then ended nothing; else that has seen to it.
            if running[0].process.poll() in (None, 137):
                failures.append(self._killed_all())

        seen = None if watch is None else lambda name, data: watch(name, bytes(data))
        ended = supervise(Job(order.stdin, order.timeout), spawn, kill_tree, captures, watch=seen)
        failure = next((one for one in failures if one), None)
        if not self._alive():
            failure = "runsc has died during the command"
        return _result(ended, captures, failure, self._group.memory_kills() > before)

    def _killed_all(self) -> str | None:
        """End whatever runs but process 1; what went wrong."""
        try:
            self._do("exec", "--user", "1000:1000", self._id, "/bin/sh", "-c", "kill -9 -1")
        except SandboxError as error:
            return str(error) if self._alive() and "exit status" not in str(error) else None
        return None

    def _alive(self) -> bool:
        return any(cgroup_processes(place) for place in self._group.places)

    def read(self, path: str, limit: int) -> bytes:
        """See ``Sandbox.read``."""
        return self._files.read(path, limit)

    def write(self, path: str, data: bytes, mode: int) -> None:
        """See ``Sandbox.write``."""
        self._files.write(path, data, mode)

    def list(self, path: str) -> list[Entry]:
        """See ``Sandbox.list``."""
        return self._files.list(path)

    def upload(self, source: Path, path: str) -> None:
        """See ``Sandbox.upload``."""
        self._files.upload(source, path)

    def download(self, path: str, target: Path, limit: int) -> None:
        """See ``Sandbox.download``."""
        self._files.download(path, target, limit)

    def pause(self) -> None:
        """See ``Sandbox.pause``."""
        self._do("pause", self._id)
        self._paused = True

    def resume(self) -> None:
        """See ``Sandbox.resume``."""
        self._do("resume", self._id)
        self._paused = False

    def snapshot(self) -> Image:
        """Files and processes as they are now. The sandbox stops for a moment and goes on."""
        self._go_on()
        layer: Checkpoint[GvisorDriver] = Checkpoint(Path(tempfile.mkdtemp(prefix="nautile-checkpoint-")))
        self._do("checkpoint", "--leave-running", "--compression=none", "--image-path", str(layer.place), self._id)
        return dataclasses.replace(self._image, memory=layer.place, held=(*self._image.held, layer))

    def fork(self) -> GvisorDriver:
        """A second one that goes on from here."""
        return GvisorDriver.create(f"c-{os.urandom(8).hex()}", self.snapshot(), self._limits)

    def close(self) -> None:
        """See ``Driver.close``. Killed as a group: ``runsc delete`` waits for a second and more."""
        self._group.remove()
        shutil.rmtree(self._place, ignore_errors=True)


def _adopted(checkpoint: Checkpoint[GvisorDriver], identity: str, image: Image, limits: Limits) -> GvisorDriver | None:
    """The sandbox that was made ahead, gone on from the checkpoint; None if there is none, or if it has died meanwhile."""
    spare = checkpoint.take(limits)
    if spare is None:
        return None
    try:
        spare._go_on_from(identity, image)
    except SandboxError:
        spare.close()
        return None
    return spare


class _Process:
    """A child, as ``supervise`` needs it."""

    lost = False

    def __init__(self, argv: Sequence[str], ends: Sequence[int]) -> None:
        stdin, stdout, stderr = ends
        self.process = subprocess.Popen(
            argv, stdin=stdin, stdout=stdout, stderr=stderr, env=ENVIRONMENT, start_new_session=True
        )
        self.pidfd = os.pidfd_open(self.process.pid)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()

    def collect(self) -> int:
        """Its wait status."""
        code = self.process.wait()
        return code << 8 if code >= 0 else -code


def _configuration(root: Path, host_usr: bool, limits: Limits) -> dict[str, Any]:
    """The OCI configuration: a read-only root, memory for what is written, no user namespace (the sandbox makes its own)."""
    told = bundle.configuration(root, root, host_usr, [], limits.disk, None)
    told["root"]["readonly"] = True
    told["mounts"] = [one for one in told["mounts"] if one["destination"] != "/dev/init"]
    for place in ("/workspace", "/tmp"):
        options = ["nosuid", "nodev", "mode=1777", f"size={limits.disk}"]
        told["mounts"].append({"destination": place, "type": "tmpfs", "source": "tmpfs", "options": options})
    told["process"]["args"] = ["/bin/sleep", "2147483647"]
    told["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "hard": limits.open_files, "soft": limits.open_files}]
    names = ("pid", "ipc", "uts", "mount")
    told["linux"] = {"namespaces": [{"type": name} for name in names]}
    return told


def _result(ended: Outcome, captures: tuple[Capture, Capture], failure: str | None, killed: bool) -> RunResult:
    out, err = (b"".join(one.pieces()) for one in captures)
    return RunResult(
        exit_code=-1 if failure else 137 if ended.timed_out else ended.exit_code,
        stdout=out.decode("utf-8", "replace"),
        stderr=err.decode("utf-8", "replace"),
        truncated=ended.truncated,
        timed_out=ended.timed_out,
        infrastructure_error=failure,
        memory_killed=killed,
        seconds=ended.seconds,
        stdout_bytes=out,
        stderr_bytes=err,
    )


def cgroup_processes(place: Path) -> list[str]:
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
