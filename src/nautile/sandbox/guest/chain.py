"""The disk of a VM: a chain of files, of which only the last is written, by one machine.

A copy of a machine gets the same chain and a last file of its own. Files that no machine uses any more are removed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nautile.sandbox.errors import InvalidRequest, SubstrateUnavailable
from nautile.sandbox.guest import places
from nautile.sandbox.limits import Limits
from nautile.sandbox.qemu import Drive

__all__ = ["Chain"]

_SECONDS = 120


class _File:
    """A file of a chain. One that we made is removed with the last chain that holds it; an image of the caller's stays."""

    def __init__(self, path: Path, kind: str, *, ours: bool) -> None:
        self.path, self.kind = path, kind
        if ours:
            self._finalizer = weakref.finalize(self, _remove, path)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    if not any(path.parent.iterdir()):
        path.parent.rmdir()


class Chain:
    """Files, the last of them writable. ``system``: the disk holds a whole system."""

    def __init__(self, files: tuple[_File, ...], *, system: bool) -> None:
        self._files, self.system = files, system

    @classmethod
    def empty(cls, limits: Limits) -> Chain:
        """A new disk with an empty file system of ``limits.disk`` bytes. Raises SubstrateUnavailable."""
        _need("mkfs.ext4", "e2fsprogs")
        path = places.temporary("disk") / "base.raw"
        with open(path, "wb") as file:
            file.truncate(limits.disk)
        # No journal: the file system is frozen while a copy is made of it, and ends with its machine.
        inodes = str(max(min(limits.inodes, limits.disk // 4096), 16))
        argv = ["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", "-N", inodes, "-E", "lazy_itable_init=1", str(path)]
        base = _File(path, "raw", ours=True)
        _run(argv)
        return cls((base,), system=False)._topped()

    @classmethod
    def of_image(cls, path: Path) -> Chain:
        """The disk image of a system, qcow2 or raw, which is never written. Raises InvalidRequest, SubstrateUnavailable."""
        with open(path, "rb") as file:
            kind = "qcow2" if file.read(4) == b"QFI\xfb" else "raw"
        if kind == "qcow2":
            described = json.loads(_run([_need("qemu-img", "qemu-utils"), "info", "--output=json", "-f", kind, str(path)]))
            data = described.get("format-specific", {}).get("data", {})
            if "backing-filename" in described or "data-file" in data:
                raise InvalidRequest(
                    f"image {path}: it names another file that it needs; make one file of it (qemu-img convert)"
                )
        elif path.stat().st_size < 65_536:
            raise InvalidRequest(f"image {path}: no disk image")
        return cls((_File(path, kind, ours=False),), system=True)._topped()

    def _topped(self) -> Chain:
        """This chain with a new, empty file at its end."""
        below = self._files[-1]
        place = places.temporary("disk")
        top = _File(place / "top.qcow2", "qcow2", ours=True)
        _run(
            [
                _need("qemu-img", "qemu-utils"),
                "create",
                "-q",
                "-f",
                "qcow2",
                "-F",
                below.kind,
                "-b",
                str(below.path),
                str(top.path),
            ]
        )
        return Chain((*self._files, top), system=self.system)

    def split(self, ask: Callable[..., Any]) -> tuple[Chain, Chain]:
        """(this machine's chain from now on, a copy's): both begin with the files of today, which nobody writes any more.

        ``ask`` speaks to the machine's emulator, which stands still.
        """
        mine, copy = self._topped(), self._topped()
        number = len(self._files)
        for flags in (os.O_RDWR, os.O_RDONLY):
            descriptor = os.open(mine._files[-1].path, flags | os.O_CLOEXEC)
            try:
                ask("add-fd", {"fdset-id": number + 1}, descriptor)
            finally:
                os.close(descriptor)
        file = {"driver": "file", "node-name": f"file{number}", "filename": f"/dev/fdset/{number + 1}", "locking": "off"}
        ask("blockdev-add", file)
        ask("blockdev-add", {"driver": "qcow2", "node-name": f"drive{number}", "file": f"file{number}", "backing": None})
        ask("blockdev-snapshot", {"node": f"drive{number - 1}", "overlay": f"drive{number}"})
        return mine, copy

    def open(self, keep: Callable[[int], object]) -> Drive:
        """Open descriptors for a machine that starts; each is given to ``keep``, which closes it."""
        descriptors: list[tuple[int, ...]] = []
        for number, file in enumerate(self._files):
            modes = [os.O_RDONLY] if number < len(self._files) - 1 else [os.O_RDWR, os.O_RDONLY]
            opened = tuple(os.open(file.path, mode | os.O_CLOEXEC) for mode in modes)
            for one in opened:
                keep(one)
            descriptors.append(opened)
        return Drive(tuple(descriptors), tuple(file.kind for file in self._files))


def _need(program: str, package: str) -> str:
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise SubstrateUnavailable("vm", f"{program} is missing", f"apt-get install {package}")
    return found


def _run(argv: list[str]) -> str:
    command = [_need(argv[0], "e2fsprogs") if "/" not in argv[0] else argv[0], *argv[1:]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SubstrateUnavailable("vm", f"{argv[0]} failed: {error}", "nautile sandbox doctor") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise InvalidRequest(f"{Path(argv[0]).name} refused: {said[-1] if said else done.returncode}")
    return done.stdout
