"""Snapshots of machines that have just booted: the next one of the same shape starts from one instead of booting.

A template is two files, the guest's memory (sparse) and the rest of its state. It is taken before any tenant: no secret and no
file of one is in it, and limits, clock, randomness and names are set when it is used. The shell and Python have been started in
it once, so that they are in the guest's memory. Machines copy its memory into their own: none reaches another's through it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

from nautile.sandbox.guest import kernel
from nautile.sandbox.qemu import Emulator, Machine, guest_memory

__all__ = ["Template", "find", "keep", "key_of"]

_KEPT = 8  # templates in the cache


@dataclass(frozen=True)
class Template:
    """Open descriptors of the two files; ``close`` them after use."""

    memory: int
    state: int

    def close(self) -> None:
        """Close both."""
        os.close(self.memory)
        os.close(self.state)


def key_of(machine: Machine, qemu: str) -> str:
    """What must be equal for a snapshot of one machine to be a start for another."""
    assert machine.boot is not None
    disks = [f"{one.stat().st_size} {one.stat().st_mtime_ns} {one}" for one in machine.disks]
    shape = [machine.substrate, machine.accel, str(guest_memory(machine.limits)), str(machine.processors), *disks]
    code = Path(__file__).parents[1].joinpath("qemu.py").read_bytes()  # its command line is the machine's shape
    return hashlib.sha256("\0".join([qemu, machine.boot.key, *shape]).encode() + code).hexdigest()[:20]


def find(key: str, cache: Path | None = None) -> Template | None:
    """The template of this key, if there is one."""
    place = (cache or kernel.cache_directory()) / "templates" / key
    with contextlib.suppress(OSError):
        memory = os.open(place / "memory", os.O_RDONLY | os.O_CLOEXEC)
        try:
            state = os.open(place / "state", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(memory)
            raise
        os.utime(place)
        return Template(memory, state)
    return None


def keep(emulator: Emulator, key: str, cache: Path | None = None) -> None:
    """Take a template of a machine without a tenant, which is held and then goes on. A full disk is a warning, no error."""
    place = (cache or kernel.cache_directory()) / "templates"
    work = place / f".part-{secrets.token_hex(6)}"
    try:
        work.mkdir(parents=True)
        state = os.open(work / "state", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        memory = os.open(work / "memory", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            emulator.save(state)
            try:
                _copy_nonzero(emulator.memory, memory)
            finally:
                emulator.go_on()
        finally:
            os.close(state)
            os.close(memory)
        os.rename(work, place / key)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        if not (place / key).exists():
            warnings.warn(f"no snapshot of a booted machine could be kept in {place} ({error}): each will boot", stacklevel=2)
    _forget(place)


def _copy_nonzero(source: int, target: int) -> None:
    """Copy a memory file; holes, which reading would fill with memory of ours, and pieces of zeros are left out."""
    size, piece = os.fstat(source).st_size, 65_536
    nothing = bytes(piece)
    os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError:  # nothing but a hole is left
            return
        end = os.lseek(source, at, os.SEEK_HOLE)
        while at < end:
            data = os.pread(source, min(piece, end - at), at)
            if data != nothing[: len(data)]:
                os.pwrite(target, data, at)
            at += len(data)


def _forget(place: Path) -> None:
    """Remove the templates that were used longest ago."""
    with contextlib.suppress(OSError):
        found = sorted((one for one in place.iterdir() if not one.name.startswith(".")), key=lambda one: one.stat().st_mtime)
        for one in found[:-_KEPT]:
            shutil.rmtree(one, ignore_errors=True)
