"""The microVM substrate: QEMU's smallest machine, with the host's /usr or an image as read-only disks and files in memory.

A machine of a shape that has booted before starts from a snapshot of that; a fork is a copy of a running one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import secrets
import shutil
import time
import weakref
from pathlib import Path

from nautile.sandbox import seccomp
from nautile.sandbox.errors import SubstrateUnavailable
from nautile.sandbox.function import ENVIRONMENT
from nautile.sandbox.guest import accel, base, boot, places, template
from nautile.sandbox.guest import link as wire
from nautile.sandbox.guest.driver import GuestDriver, identity_of, settings_of
from nautile.sandbox.image import Image
from nautile.sandbox.limits import Limits
from nautile.sandbox.qemu import Emulator, Machine, program, version
from nautile.sandbox.result import Info

__all__ = ["BOOT_SECONDS", "MicroVMDriver", "disks_of"]

BOOT_SECONDS = 60.0  # an emulated machine on a busy host may need many of them


class Disks:
    """The indexes of an image's layers. What was made for one image goes with the last machine that uses it."""

    def __init__(self, image: Image) -> None:
        self.held = image.held
        self._checked = base.Checked() if image.host_usr else None
        self.indexes: list[Path] = [self._checked.path] if self._checked is not None else []
        self.shared = not image.layers
        if image.layers:
            place = places.temporary("disks")
            self._finalizer = weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)
            for number, layer in enumerate(image.layers):
                self.indexes.append(base.layer_index(layer, place / f"{number}.index"))

    @property
    def current(self) -> bool:
        """Whether the host's /usr is still what the index says."""
        return self._checked is None or self._checked.current


def disks_of(substrate: str, image: Image) -> Disks:
    """The read-only disks for an image. Raises SubstrateUnavailable for more layers than a machine has room for."""
    if len(image.layers) > 12:
        why = f"{len(image.layers)} layers are more than a machine has disks"
        raise SubstrateUnavailable(substrate, why, "pack them into fewer")
    return Disks(image)


class MicroVMDriver(GuestDriver[Emulator]):
    """One microVM."""

    def __init__(self, emulator: Emulator, info: Info, limits: Limits, image: Image, disks: Disks) -> None:
        super().__init__(emulator, info, limits, image)
        self._disks = disks

    @classmethod
    def create(
        cls,
        identity: str,
        image: Image,
        limits: Limits,
        *,
        allow_emulation: bool,
        network: bool = False,
        snapshots: bool = True,
    ) -> MicroVMDriver:
        """Start one; it lives as long as this process.

        ``network``: its agent listens for the proxy. ``snapshots`` False: boot it, whatever is in the cache.

        Raises SubstrateUnavailable, LimitUnavailable.
        """
        qemu = version(program("microvm"))
        chosen = accel.choose("microvm", allow_emulation=allow_emulation)
        disks = disks_of("microvm", image)
        processors = math.ceil(limits.cpus or 1)
        machine = Machine("microvm", chosen, limits, processors, boot.prepare("microvm", "mmio"), tuple(disks.indexes))
        emulator = _started(machine, identity, qemu, snapshots and disks.shared, network)
        if not disks.current:  # /usr has changed since its index was made
            emulator.close()
            base.index()
            options = {"allow_emulation": allow_emulation, "network": network, "snapshots": snapshots}
            return cls.create(identity, image, limits, **options)
        return cls(emulator, _info(identity, qemu, chosen, emulator), limits, image, disks)

    def fork(self) -> MicroVMDriver:
        """See ``Sandbox.fork``: memory is copied, and with it everything but the processes, which end in the copy."""
        identity, link = identity_of("microvm"), self._link
        state = os.memfd_create("state", os.MFD_CLOEXEC)
        try:
            link.hold()
            try:
                self._emulator.save(state)
                os.lseek(state, 0, os.SEEK_SET)
                machine = dataclasses.replace(self._emulator.machine, memory=self._emulator.memory, state=state)
                emulator = Emulator(machine, identity)  # it has copied the memory when this returns
            finally:
                self._emulator.go_on()
                link.go_on()
        finally:
            os.close(state)
        info = dataclasses.replace(self.info, id=identity, limits_enforced=emulator.group.enforced)
        copy = MicroVMDriver(emulator, info, self._limits, self._image, self._disks)
        try:
            emulator.link.continue_from(link)
            self._share_network(copy)  # first, since connections of the tenant's may be waiting
            emulator.link.refresh(int(time.time()), secrets.token_hex(32))
        except BaseException:
            copy.close()
            raise
        return copy


def _started(machine: Machine, identity: str, qemu: str, snapshots: bool, network: bool) -> Emulator:
    """A machine that is ready: from a snapshot if there is one of its shape, which is taken of the first that boots."""
    key = template.key_of(machine, qemu) if snapshots else ""
    settings = settings_of(machine.limits, len(machine.disks), own=0, proxy=network)
    with contextlib.ExitStack() as kept:
        found = template.find(key) if snapshots else None
        if found is not None:
            kept.callback(found.close)
            emulator = Emulator(dataclasses.replace(machine, memory=found.memory, state=found.state), identity)
            kept.callback(emulator.close)
            emulator.link.go_on()  # it was held when its state was saved
        else:
            emulator = Emulator(machine, identity)
            kept.callback(emulator.close)
            emulator.greet(BOOT_SECONDS)
            emulator.link.configure({**settings, "proxy": "1"}, seccomp.program(system_v=True))
            if snapshots:
                _warm(emulator.link)
                emulator.link.hold()
                template.keep(emulator, key)
                emulator.link.go_on()
        emulator.link.adjust(settings)
        kept.pop_all()
        if found is not None:
            found.close()
        return emulator


def _warm(link: wire.Link) -> None:
    """Start once what most commands start."""
    for words in (["/bin/sh", "-c", "ls /workspace; cat /dev/null; true"], ["/usr/bin/python3", "-I", "-c", ""]):
        stream = link.spawn(wire.EXECUTE, words, ENVIRONMENT)
        stream.end_input()
        deadline = time.monotonic() + BOOT_SECONDS
        while stream.ended is None and (event := stream.next(deadline)) is not None and event[0] != wire.FAILED:
            pass


def _info(identity: str, qemu: str, chosen: str, emulator: Emulator) -> Info:
    return Info(identity, "microvm", f"qemu {qemu.split(maxsplit=1)[0]}", chosen, emulator.group.enforced)
