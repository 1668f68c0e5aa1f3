"""What every virtual machine can do, whichever emulator runs it: commands, files, sessions, pauses, layers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from nautile.sandbox import layers
from nautile.sandbox.container import _walk as walk_host
from nautile.sandbox.driver import Environment, Order, Watch
from nautile.sandbox.errors import InvalidRequest, SandboxLost
from nautile.sandbox.function import ENVIRONMENT, MASKED, MASKED_DIRECTORIES
from nautile.sandbox.guest import link as wire
from nautile.sandbox.guest import places, transfer
from nautile.sandbox.guest.network import GuestNetwork
from nautile.sandbox.guest.output import Kept
from nautile.sandbox.guest.session import GuestSession
from nautile.sandbox.guest.workspace import Workspace
from nautile.sandbox.image import Image, TemporaryLayer
from nautile.sandbox.limits import Limits
from nautile.sandbox.policy import NetworkPolicy
from nautile.sandbox.proxy import ENVIRONMENT as PROXIED
from nautile.sandbox.result import Capabilities, Entry, Info, RunResult

__all__ = ["GuestDriver", "Host", "Machine", "identity_of", "settings_of"]

_GRACE = 15.0  # seconds that a guest may take to kill a command
_LARGEST = 2**34  # bytes of a packed layer


def settings_of(limits: Limits, layer_count: int, *, own: int, proxy: bool) -> dict[str, str | list[str]]:
    """What the agent is told about its tenant; new randomness and a new boot id with every call.

    ``own``: 0, changes are in memory; 1, on a disk of the machine's own; 2, a disk holds the whole system.
    """
    return {
        "memory": str(limits.memory),
        "pids": str(limits.pids),
        "disk": str(limits.disk),
        "inodes": str(limits.inodes),
        "open_files": str(limits.open_files),
        "layers": str(layer_count),
        "own": str(own),
        "proxy": str(int(proxy)),
        "seconds": str(int(time.time())),
        "entropy": secrets.token_hex(32),
        "hostname": "sandbox",
        "boot_id": str(uuid.uuid4()),
        "mask": [f"/proc/{name}" for name in (*MASKED, *MASKED_DIRECTORIES)],
    }


class Host(Protocol):
    """What runs a guest: an emulator, or runsc."""

    link: wire.Link

    @property
    def ended(self) -> bool:
        """Whether it has died."""

    def stop(self) -> None:
        """Let the guest stand still."""

    def go_on(self) -> None:
        """After ``stop``."""

    def close(self) -> None:
        """End it: nothing of it stays."""


_Host = TypeVar("_Host", bound=Host)


class Machine(Environment, Protocol):
    """A driver of a virtual machine."""

    @property
    def image(self) -> Image:
        """What it was started from."""

    @property
    def ended(self) -> bool:
        """Whether the machine has died."""

    def layer(self, place: Path) -> Image:
        """The files as they are now, as an image whose top layer is in ``place``, which the caller keeps while it is used."""


class GuestDriver(Generic[_Host]):
    """One machine, or what has the same agent. ``capabilities`` and ``fork`` are its substrate's."""

    capabilities = Capabilities(files=True, session=True, pause=True, snapshot=True, fork=True, pack_diff=True, network=False)

    def __init__(self, emulator: _Host, info: Info, limits: Limits, image: Image) -> None:
        self._emulator, self.info, self._limits, self._image = emulator, info, limits, image
        self._paused = False
        self._workspace: Workspace | None = None
        self._network: GuestNetwork | None = None

    def give_network(self, policy: NetworkPolicy) -> None:
        """Let the guest reach the hosts of a policy, through the proxy of this process."""
        self._network = GuestNetwork(self._emulator.link, policy)
        self.capabilities = dataclasses.replace(self.capabilities, network=True)

    def give_workspace(self, place: Path) -> None:
        """Copy a directory of the caller's in; from now on what changes in it is copied back. Raises InvalidRequest."""
        self._workspace = Workspace(place, self._limits.disk)
        self._workspace.give(self._link)

    def _share_network(self, copy: GuestDriver[_Host]) -> None:
        if self._network is not None:
            copy.give_network(self._network.policy)

    @property
    def _link(self) -> wire.Link:
        if self._paused:
            self.resume()
        return self._emulator.link

    @property
    def _environment(self) -> dict[str, str]:
        return ENVIRONMENT | (PROXIED if self._network is not None else {})

    @property
    def image(self) -> Image:
        """See ``Machine.image``."""
        return self._image

    @property
    def ended(self) -> bool:
        """See ``Machine.ended``."""
        return self._emulator.ended or self._emulator.link.lost is not None

    def reason(self, feature: str) -> tuple[str, str]:
        """See ``Driver.reason``."""
        if feature == "network":
            return "this sandbox was made without one", "create it with network=[...]"
        return f"a {self.info.kind} of this version cannot", "use another substrate"

    # -- commands

    def run(self, order: Order, watch: Watch | None) -> RunResult:
        """See ``Driver.run``."""
        began = time.monotonic()
        try:
            if self._workspace is not None:
                self._workspace.give(self._link)
            try:
                return self._run(order, watch, began)
            finally:
                if self._workspace is not None and self._emulator.link.lost is None:
                    self._workspace.take(self._link)
        except SandboxLost as error:
            return RunResult(-1, "", "", False, False, f"{self.info.kind}: {error}", seconds=time.monotonic() - began)

    def _run(self, order: Order, watch: Watch | None, began: float) -> RunResult:
        kept = {wire.OUT: Kept(self._limits.output), wire.ERR: Kept(self._limits.output)}
        link = self._link
        stream = link.spawn(wire.EXECUTE, order.argv, {**self._environment, **order.environment}, cwd=order.cwd)
        stdin, deadline, timed_out = memoryview(order.stdin), began + order.timeout, False
        ended_input = False
        failure = None
        try:
            while True:
                if stdin:
                    stdin = stdin[stream.feed(stdin) :]
                if not stdin and not ended_input:
                    stream.end_input()
                    ended_input = True
                event = stream.next(deadline)
                if event is None:
                    if time.monotonic() < deadline:
                        continue
                    if timed_out:
                        raise SandboxLost("the guest did not kill a command in time")
                    timed_out, deadline = True, time.monotonic() + _GRACE
                    stream.kill()
                    continue
                kind, data = event
                if kind == wire.FAILED:
                    failure = data.decode("utf-8", "replace")
                    break
                if kind == wire.EXIT:
                    break
                kept[kind].add(data)
                if watch is not None:
                    watch("stdout" if kind == wire.OUT else "stderr", data)
        except BaseException:
            if link.lost is None:
                with contextlib.suppress(SandboxLost):
                    stream.kill(discard=True)
            raise
        return self._result(stream.ended, failure, kept, timed_out, time.monotonic() - began)

    def _result(
        self, ended: wire.Ended | None, failure: str | None, kept: dict[int, Kept], timed_out: bool, seconds: float
    ) -> RunResult:
        out, err = (kept[kind].data() for kind in (wire.OUT, wire.ERR))
        code = ended.code if ended is not None else -1
        if failure == "Argument list too long":
            code, failure, err = 126, None, b"sandbox: Argument list too long\n"
        if ended is not None and ended.stuck:
            code, failure = -1, "a process could not be killed within 5 s"
        return RunResult(
            exit_code=code,
            stdout=out.decode("utf-8", "replace"),
            stderr=err.decode("utf-8", "replace"),
            truncated=any(one.truncated for one in kept.values()),
            timed_out=timed_out,
            infrastructure_error=None if failure is None else f"{self.info.kind}: {failure}",
            memory_killed=ended is not None and ended.memory_killed,
            seconds=seconds,
            stdout_bytes=out,
            stderr_bytes=err,
        )

    def session(self, argv: Sequence[str], pty: bool) -> GuestSession:
        """See ``Sandbox.session``."""
        environment = {**self._environment, "TERM": "xterm"}
        return GuestSession(self._link.spawn(wire.EXECUTE, argv, environment, terminal=(24, 80) if pty else None))

    # -- files

    def read(self, path: str, limit: int) -> bytes:
        """See ``Sandbox.read``."""
        return transfer.read(self._link, path, limit)

    def write(self, path: str, data: bytes, mode: int) -> None:
        """See ``Sandbox.write``."""
        transfer.write(self._link, path, data, mode)
        self._take()

    def list(self, path: str) -> list[Entry]:
        """See ``Sandbox.list``."""
        return transfer.entries(self._link, path)

    def upload(self, source: Path, path: str) -> None:
        """See ``Sandbox.upload``."""
        transfer.upload(self._link, walk_host(source), path)
        self._take()

    def _take(self) -> None:
        if self._workspace is not None:
            self._workspace.take(self._link)

    def download(self, path: str, target: Path, limit: int) -> None:
        """See ``Sandbox.download``."""
        transfer.download(self._link, path, transfer.target_of(target), limit)

    # -- life

    def pause(self) -> None:
        """See ``Sandbox.pause``: the whole machine stands still."""
        self._emulator.stop()
        self._paused = True

    def resume(self) -> None:
        """See ``Sandbox.resume``."""
        self._emulator.go_on()
        self._paused = False

    def pack_diff(self, target: Path) -> str:
        """See ``Sandbox.pack_diff``."""
        if not target.parent.is_dir():
            raise InvalidRequest(f"{target.parent} is not a directory")
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                digest = transfer.pack(self._link, file, _LARGEST)
                file.flush()
                os.fsync(file.fileno())
            os.rename(name, target)
        except BaseException:
            os.unlink(name)
            raise
        return digest

    def snapshot(self) -> Image:
        """See ``Sandbox.snapshot``: a layer that containers and machines can start from."""
        layer = TemporaryLayer(places.temporary("layer"))
        self.layer(layer.place)
        return self._image.with_layer(layer)

    def layer(self, place: Path) -> Image:
        """See ``Machine.layer``."""
        place.chmod(0o755)
        with tempfile.TemporaryFile() as file:
            transfer.pack(self._link, file, _LARGEST)
            file.seek(0)
            layers.unpack(file, place, "trusted" if os.geteuid() == 0 else "user")
        return Image((*self._image.layers, place), self._image.host_usr, held=self._image.held)

    def set_policy(self, policy: NetworkPolicy) -> None:
        """See ``Sandbox.set_policy``."""
        assert self._network is not None  # else the capability is False
        self._network.change(policy)

    def close(self) -> None:
        """See ``Driver.close``."""
        try:
            if self._emulator.link.lost is None and not self._paused:
                with contextlib.suppress(SandboxLost):
                    self._take()  # what sessions have changed
        finally:
            if self._network is not None:
                self._network.close()
            self._emulator.close()


def identity_of(kind: str) -> str:
    """A new name for a sandbox."""
    return f"{kind[:1]}-{secrets.token_hex(8)}"
