"""The container substrate with ``runtime="runsc"``: gVisor's kernel in user space stands between the tenant and the host's.

Inside, the agent that machines have is process 1: it gives the tenant a root of its own and carries out what is asked for over
its channel. Everything that the tenant writes is in the memory of runsc's processes, so a checkpoint holds files and processes.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from pathlib import Path

from nautile.sandbox import seccomp
from nautile.sandbox.checkpoint import Ahead, Checkpoint
from nautile.sandbox.driver import Order, Watch
from nautile.sandbox.errors import SandboxError, SandboxLost, SubstrateUnavailable
from nautile.sandbox.guest.driver import GuestDriver, settings_of
from nautile.sandbox.image import Image
from nautile.sandbox.limits import Limits
from nautile.sandbox.policy import NetworkPolicy
from nautile.sandbox.result import Info, RunResult
from nautile.sandbox.runsc import Runsc, bound

__all__ = ["GvisorDriver"]

_BEGIN = 20.0  # seconds in which the agent must say that it is there
_NO_NETWORK = NetworkPolicy()


class GvisorDriver(GuestDriver[Runsc]):
    """One sandbox. ``create`` starts it, or continues a checkpoint; it ends with this process."""

    capabilities = dataclasses.replace(GuestDriver.capabilities, memory_snapshot=True)

    def __init__(self, runsc: Runsc, info: Info, limits: Limits, image: Image, ahead: Ahead[Runsc]) -> None:
        super().__init__(runsc, info, limits, image)
        self._ahead = ahead

    @classmethod
    def create(cls, identity: str, image: Image, limits: Limits, policy: NetworkPolicy = _NO_NETWORK) -> GvisorDriver:
        """Start a sandbox. Raises SubstrateUnavailable, LimitUnavailable, InvalidRequest."""
        checkpoint: Checkpoint[Runsc] | None = Checkpoint.of(image)
        ahead: Ahead[Runsc] = checkpoint.ahead if checkpoint is not None else Ahead()
        runsc = _began(identity, image, limits) if image.memory is None else _resumed(identity, image, limits, ahead)
        try:
            info = Info(identity, "container", "runsc", "native", runsc.group.enforced)
            driver = cls(runsc, info, limits, image, ahead)
            settings = settings_of(limits, 0, own=0, proxy=bool(policy.rules)) | {"bind": bound(image)}
            if image.memory is None:
                runsc.link.configure(settings, seccomp.program(system_v=True))
            else:
                runsc.link.adjust(settings)
            if policy.rules:  # before it is told to go on: connections may be waiting
                driver.give_network(policy)
            if image.memory is not None:
                runsc.link.refresh(int(time.time()), "")
                driver._make_ahead()
        except SandboxLost as error:
            runsc.close()
            raise SubstrateUnavailable("container", f"runsc started, but not what runs in it: {error}", "use crun") from None
        except BaseException:
            runsc.close()
            raise
        return driver

    def _make_ahead(self) -> None:
        """Let an empty sandbox be made in the background, which can go on from any checkpoint of this one's."""
        image, limits = dataclasses.replace(self._image, memory=None, held=()), self._limits
        self._ahead.prepare(limits, lambda: Runsc.started(f"c-{os.urandom(8).hex()}", image, limits, ["create"]))

    # -- what differs from a machine

    def run(self, order: Order, watch: Watch | None) -> RunResult:
        """See ``Driver.run``."""
        before = self._emulator.group.memory_kills()
        result = super().run(order, watch)
        killed = result.memory_killed or self._emulator.group.memory_kills() > before
        return dataclasses.replace(result, memory_killed=killed)

    def snapshot(self) -> Image:
        """Files and processes as they are now. The sandbox stops for a moment and goes on."""
        link = self._link
        self._make_ahead()  # whoever takes a snapshot is about to go on from it
        layer = Checkpoint(Path(tempfile.mkdtemp(prefix="nautile-checkpoint-")), self._ahead)
        with link.held():
            self._emulator.save(layer.place)
            layer.remember(link.serial)
        return dataclasses.replace(self._image, memory=layer.place, held=(*self._image.held, layer))

    def close(self) -> None:
        """See ``Driver.close``."""
        super().close()
        self._ahead = Ahead()  # another one's may live on

    def fork(self) -> GvisorDriver:
        """A second one that goes on from here."""
        policy = _NO_NETWORK if self._network is None else self._network.policy
        return GvisorDriver.create(f"c-{os.urandom(8).hex()}", self.snapshot(), self._limits, policy)


def _began(identity: str, image: Image, limits: Limits) -> Runsc:
    runsc = Runsc.started(identity, image, limits, ["run", "--detach"])
    try:
        runsc.link.greet(_BEGIN)
    except SandboxLost as error:
        runsc.close()
        raise SubstrateUnavailable("container", f"runsc started, but not what runs in it: {error}", "use crun") from None
    return runsc


def _resumed(identity: str, image: Image, limits: Limits, ahead: Ahead[Runsc]) -> Runsc:
    """What goes on from a checkpoint: the sandbox that was made ahead, or else a new one."""
    assert image.memory is not None
    runsc = ahead.take(limits)
    if runsc is not None:
        try:
            runsc.restore(image.memory)
        except SandboxError:
            runsc.close()
            runsc = None
    if runsc is None:
        runsc = Runsc.started(identity, image, limits, ["restore", "--image-path", str(image.memory), "--detach"])
    runsc.link.serial = Checkpoint.remembered(image.memory)
    return runsc
