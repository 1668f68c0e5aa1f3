"""What runs a guest's instructions: the kernel's virtualisation if a guest really boots with it, else emulation if allowed.

That /dev/kvm opens says nothing: under nested virtualisation it may create machines on which no usual kernel starts. So a
canary is booted once, and what came of it is kept in the cache until the host's kernel, its processor or QEMU change.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from nautile.sandbox.errors import SandboxError, SubstrateUnavailable
from nautile.sandbox.guest import boot, kernel
from nautile.sandbox.limits import MIB, Limits
from nautile.sandbox.qemu import Emulator, Machine, devices, program, version

__all__ = ["CANARY_SECONDS", "Probe", "choose", "probe"]

CANARY_SECONDS = 3.0


@dataclass(frozen=True)
class Probe:
    """Whether a guest boots on the kernel's virtualisation here; ``seconds`` that the canary took, or was given."""

    works: bool
    why: str
    seconds: float


def choose(substrate: str, *, allow_emulation: bool, cache: Path | None = None) -> str:
    """``kvm`` or ``tcg``. Raises SubstrateUnavailable when it would have to be emulation and that is not allowed."""
    found = probe(cache)
    if found.works:
        return "kvm"
    if allow_emulation:
        return "tcg"
    remedy = (
        "pass allow_emulation=True to let QEMU emulate the processor (ten times slower inside), "
        "or use kind='container', which shares the host's kernel"
    )
    raise SubstrateUnavailable(substrate, found.why, remedy)


def probe(cache: Path | None = None, *, again: bool = False) -> Probe:
    """Boot the canary, or say what came of the last one (``again``: boot it anyway). Raises SubstrateUnavailable."""
    place = cache or kernel.cache_directory()
    path = program("microvm")
    for why in devices():
        return Probe(False, why, 0.0)
    guest = boot.prepare("microvm", "mmio", place)
    key = _key(version(path), guest.key)
    kept = place / f"kvm-{key}.json"
    if not again:
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Probe(**json.loads(kept.read_text()))
    result = _canary(guest)
    temporary = kept.with_name(f".{kept.name}.{secrets.token_hex(4)}")
    temporary.write_text(json.dumps(asdict(result)))
    os.rename(temporary, kept)
    return result


def _key(qemu: str, guest: str) -> str:
    processor = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        processor = next((line for line in lines if line.startswith("model name")), "")
    device = os.stat("/dev/kvm")
    parts = [qemu, guest, platform.release(), platform.version(), processor, str(device.st_rdev), str(os.geteuid())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _canary(guest: boot.Boot) -> Probe:
    began = time.monotonic()
    limits = Limits(memory=64 * MIB, allow_unenforced=True)
    try:
        emulator = Emulator(Machine("microvm", "kvm", limits, 1, guest), f"k-{secrets.token_hex(6)}")
        try:
            emulator.greet(CANARY_SECONDS)
        finally:
            emulator.close()
    except SandboxError as error:
        why = getattr(error, "why", str(error)).removeprefix("a guest did not boot: ")
        text = f"/dev/kvm opened, but a canary guest did not boot in {CANARY_SECONDS:g} s ({why})"
        return Probe(False, text, time.monotonic() - began)
    return Probe(True, "a canary guest booted", time.monotonic() - began)
