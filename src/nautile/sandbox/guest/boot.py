"""What a guest starts with: our agent, compiled here, and the kernel's modules, in an initial file system of 2 MB."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nautile.sandbox.errors import SubstrateUnavailable
from nautile.sandbox.guest import kernel

__all__ = ["Boot", "agent", "prepare"]

_SOURCE = Path(__file__).with_name("agent.c")
_INCLUDED = Path(__file__).with_name("gvisor.h")
_FLAGS = ("-static", "-Os", "-s", "-std=gnu11", "-fstack-protector-strong", "-D_FORTIFY_SOURCE=2")
_TRANSPORTS = {
    "mmio": ("virtio_mmio", "virtio_console", "virtio_blk", "erofs", "overlay"),
    "pci": ("virtio_pci", "virtio_console", "virtio_blk", "erofs", "overlay"),
}


@dataclass(frozen=True)
class Boot:
    """``key`` names both contents: what is made from one is of no use to another."""

    kernel: Path
    initrd: Path
    version: str
    key: str


def prepare(substrate: str, transport: str, cache: Path | None = None) -> Boot:
    """The kernel and the initial file system for machines with one kind of virtio (``mmio``, ``pci``).

    Raises SubstrateUnavailable.
    """
    place = cache or kernel.cache_directory()
    try:
        found = kernel.find(place)
    except kernel.KernelMissing as error:
        raise SubstrateUnavailable(substrate, str(error).partition(":")[0], "nautile sandbox kernel") from None
    program = agent(substrate, place)
    names = found.load_order(_TRANSPORTS[transport])
    key = hashlib.sha256("\0".join([found.version, program.name, *names]).encode()).hexdigest()[:16]
    target = place / "boot" / f"{transport}-{key}.cpio"
    if not target.exists():
        files = {"init": (0o755, program.read_bytes()), "modules/list": (0o644, "\n".join(f"{n}.ko" for n in names).encode())}
        files |= {f"modules/{name}.ko": (0o644, (found.modules / f"{name}.ko").read_bytes()) for name in names}
        _place(target, _archive(files))
    return Boot(found.image, target, found.version, key)


def agent(substrate: str, cache: Path | None = None) -> Path:
    """The guest agent, compiled now if it is not in the cache. Raises SubstrateUnavailable."""
    place = (cache or kernel.cache_directory()) / "boot"
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise SubstrateUnavailable(substrate, "there is no C compiler for the guest agent", "apt-get install gcc libc6-dev")
    told = " ".join(_FLAGS).encode() + os.fsencode(compiler)
    key = hashlib.sha256(_SOURCE.read_bytes() + _INCLUDED.read_bytes() + told).hexdigest()[:16]
    target = place / f"agent-{key}"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory() as work:
        out = Path(work, "agent")
        done = subprocess.run(
            [compiler, *_FLAGS, "-o", str(out), str(_SOURCE)], capture_output=True, text=True, check=False, timeout=120
        )
        if done.returncode:
            why = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            raise SubstrateUnavailable(substrate, f"the guest agent does not compile: {why}", "apt-get install gcc libc6-dev")
        _place(target, out.read_bytes(), 0o755)
    return target


def _place(target: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a cache file so that nobody sees half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, mode)
        os.rename(name, target)
    except BaseException:
        os.unlink(name)
        raise


def _archive(files: dict[str, tuple[int, bytes]]) -> bytes:
    """A cpio archive in the format that the kernel unpacks (newc), with the directories that the names need."""
    made: dict[str, tuple[int, bytes]] = {}
    for name, (mode, data) in files.items():
        steps = name.split("/")[:-1]
        for depth in range(1, len(steps) + 1):
            made.setdefault("/".join(steps[:depth]), (0o40755, b""))
        made[name] = (0o100000 | mode, data)
    out = bytearray()
    for number, (name, (mode, data)) in enumerate([*made.items(), ("TRAILER!!!", (0, b""))], 1):
        fields: Iterable[int] = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)
