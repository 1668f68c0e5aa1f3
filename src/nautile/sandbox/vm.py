"""The vm substrate: a whole PC (QEMU's q35) with a disk of its own.

Without an image, and for an image that is a directory, the disk holds what changes, over the same read-only disks as in a
microVM. An image that is a file, qcow2 or raw, holds a whole Linux system, which our kernel starts; it is never written.
Copies share the chain of disk files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

from nautile.sandbox import seccomp
from nautile.sandbox.errors import InvalidRequest
from nautile.sandbox.guest import accel, base, boot
from nautile.sandbox.guest.chain import Chain
from nautile.sandbox.guest.driver import GuestDriver, identity_of, settings_of
from nautile.sandbox.image import Image
from nautile.sandbox.limits import Limits
from nautile.sandbox.microvm import BOOT_SECONDS, Disks, disks_of
from nautile.sandbox.qemu import Emulator, Machine, program, version
from nautile.sandbox.result import Info

__all__ = ["DiskImage", "VMDriver"]


@dataclass(frozen=True)
class DiskImage(Image):
    """A file with a system on it: ext4 on the whole disk or on a partition."""

    disk: Path | None = None

    @classmethod
    def of_file(cls, path: Path) -> DiskImage:
        """Raises InvalidRequest when there is no such file."""
        if not path.is_file():
            raise InvalidRequest(f"image {path}: neither a directory nor a disk image")
        return cls((), host_usr=False, disk=path.absolute())


class VMDriver(GuestDriver[Emulator]):
    """One virtual machine."""

    def __init__(self, emulator: Emulator, info: Info, limits: Limits, image: Image, disks: Disks, chain: Chain) -> None:
        super().__init__(emulator, info, limits, image)
        self._disks, self._chain = disks, chain
        if chain.system:
            self.capabilities = dataclasses.replace(self.capabilities, snapshot=False, pack_diff=False)

    @classmethod
    def create(cls, identity: str, image: Image, limits: Limits, *, allow_emulation: bool, network: bool = False) -> VMDriver:
        """Boot one; it lives as long as this process. Raises SubstrateUnavailable, LimitUnavailable, InvalidRequest."""
        qemu = version(program("vm"))
        chosen = accel.choose("vm", allow_emulation=allow_emulation)
        disk = image.disk if isinstance(image, DiskImage) else None
        chain = Chain.empty(limits) if disk is None else Chain.of_image(disk)
        disks = disks_of("vm", image)
        machine = Machine("vm", chosen, limits, math.ceil(limits.cpus or 1), boot.prepare("vm", "pci"), tuple(disks.indexes))
        emulator = _booted(machine, identity, chain, network)
        if not disks.current:  # /usr has changed since its index was made
            emulator.close()
            base.index()
            return cls.create(identity, image, limits, allow_emulation=allow_emulation, network=network)
        info = Info(identity, "vm", f"qemu {qemu.split(maxsplit=1)[0]}", chosen, emulator.group.enforced)
        return cls(emulator, info, limits, image, disks, chain)

    def reason(self, feature: str) -> tuple[str, str]:
        """See ``Driver.reason``."""
        if feature in ("snapshot", "pack_diff"):
            return (
                "the disk image holds the whole system, and nothing says what of it is new",
                "use fork, or an image directory",
            )
        return super().reason(feature)

    def fork(self) -> VMDriver:
        """See ``Sandbox.fork``: the copy boots from the disk as it is now."""
        link, identity = self._link, identity_of("vm")
        link.hold()
        try:
            self._emulator.monitor.ask("stop")
            try:
                self._chain, copy = self._chain.split(self._emulator.monitor.ask)
            finally:
                self._emulator.go_on()
        finally:
            link.go_on()
        emulator = _booted(self._emulator.machine, identity, copy, self._network is not None)
        info = dataclasses.replace(self.info, id=identity, limits_enforced=emulator.group.enforced)
        driver = VMDriver(emulator, info, self._limits, self._image, self._disks, copy)
        self._share_network(driver)
        return driver


def _booted(machine: Machine, identity: str, chain: Chain, network: bool) -> Emulator:
    with contextlib.ExitStack() as opened, contextlib.ExitStack() as kept:
        drive = chain.open(lambda descriptor: opened.callback(os.close, descriptor))
        emulator = Emulator(dataclasses.replace(machine, drive=drive), identity)
        kept.callback(emulator.close)
        emulator.greet(BOOT_SECONDS)
        settings = settings_of(machine.limits, len(machine.disks), own=2 if chain.system else 1, proxy=network)
        emulator.link.configure(settings, seccomp.program(system_v=True))
        kept.pop_all()
        return emulator
