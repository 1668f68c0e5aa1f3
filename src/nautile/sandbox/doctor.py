"""What of the sandboxes works on this machine: each substrate tried out for real, timed, and with its remedy."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nautile.sandbox import cgroup, native, seat, seccomp, worker
from nautile.sandbox.errors import SandboxError, SubstrateUnavailable
from nautile.sandbox.guest.kernel import cache_directory
from nautile.sandbox.limits import MIB, Limits
from nautile.sandbox.sandbox import Sandbox

__all__ = ["Finding", "examine"]


@dataclass(frozen=True)
class Finding:
    """``state``: ok, degraded (works with less than asked), missing. ``seconds``: creation and first command; None untried."""

    part: str
    state: str
    detail: str
    remedy: str = ""
    seconds: float | None = None


def examine() -> Iterator[Finding]:
    """Try everything, one after the other; leaves nothing behind."""
    yield _seccomp()
    yield _limits()
    for kind in ("function", "container"):
        yield _substrate(kind)
    for kind in ("microvm", "vm"):
        yield _machine(kind)


def _seccomp() -> Finding:
    try:
        size = len(seccomp.program(system_v=False)) // 8
    except SubstrateUnavailable as error:
        return Finding("seccomp", "missing", error.why, error.remedy)
    return Finding("seccomp", "ok", f"{len(seccomp.ALLOWED)} system calls allowed, {size} instructions")


def _limits() -> Finding:
    found = cgroup.hierarchies()
    have = {name for one in found for name in one.controllers}
    versions = "+".join(f"v{version}" for version in sorted({one.version for one in found})) or "none"
    lacking = sorted({"memory", "pids", "cpu"} - have)
    if lacking:
        remedy = "run as root, or: systemd-run --user --scope -p Delegate=yes nautile ..."
        return Finding("limits", "missing", f"cgroup {versions}: {', '.join(lacking)} cannot be set", remedy)
    return Finding("limits", "ok", f"cgroup {versions}: memory, pids, cpu")


def _substrate(kind: str) -> Finding:
    """The canary: create, run, compare, close."""
    small = Limits(memory=128 * MIB, pids=32, disk=16 * MIB, seconds=20.0)
    degraded = ""
    try:
        seconds = _canary(lambda: Sandbox.create(kind, limits=small))
    except SandboxError as error:
        if type(error).__name__ != "LimitUnavailable":
            remedy = getattr(error, "remedy", "")
            return Finding(kind, "missing", getattr(error, "why", str(error)), remedy)
        degraded = str(error)
        loose = Limits(memory=128 * MIB, pids=32, disk=16 * MIB, seconds=20.0, allow_unenforced=True)
        try:
            seconds = _canary(lambda: Sandbox.create(kind, limits=loose))
        except SandboxError as second:
            return Finding(kind, "missing", getattr(second, "why", str(second)), getattr(second, "remedy", ""))
    if degraded:
        return Finding(kind, "degraded", "only with Limits(allow_unenforced=True)", degraded, seconds)
    user = "root" if os.geteuid() == 0 else "an ordinary user"
    program = shutil.which("bwrap" if kind == "function" else "crun")
    if kind == "container" and native.compiled(seat.PROGRAM, cache_directory() / "seat") is None:
        text = f"{program}, as {user}; commands are started in a slower way: the C compiler is missing, or fails"
        return Finding(kind, "degraded", text, "apt-get install gcc libc6-dev", seconds)
    if kind == "function" and native.compiled(worker.LOOP, cache_directory() / "function", library=True) is None:
        text = f"{program}, as {user}; calls take more of the processor: the C compiler is missing, or fails"
        return Finding(kind, "degraded", text, "apt-get install gcc libc6-dev", seconds)
    return Finding(kind, "ok", f"{program}, as {user}", "", seconds)


def _machine(kind: str) -> Finding:
    """A virtual machine: ok with the kernel's virtualisation, degraded where only emulation boots a guest."""
    from nautile.sandbox.guest import accel  # noqa: PLC0415  # for those who ask about machines only
    from nautile.sandbox.qemu import program, version  # noqa: PLC0415

    small = Limits(memory=128 * MIB, pids=32, disk=16 * MIB, seconds=60.0)
    try:
        found = accel.probe(again=True)
        seconds = _canary(lambda: Sandbox.create(kind, limits=small, allow_emulation=True))
    except SandboxError as error:
        return Finding(kind, "missing", getattr(error, "why", str(error)), getattr(error, "remedy", ""))
    qemu = f"QEMU {version(program(kind))}"
    if found.works:
        return Finding(kind, "ok", f"{qemu} on KVM", "", seconds)
    return Finding(kind, "degraded", f"{qemu}, emulated: {found.why}", "pass allow_emulation=True (--emulate)", seconds)


def _canary(create: Callable[[], Sandbox]) -> float:
    began = time.monotonic()
    with create() as sandbox:
        result = sandbox.run("echo canary; id -u; cat /proc/self/status | grep CapEff")
        seconds = time.monotonic() - began
        if result.infrastructure_error is not None or not result.stdout.startswith("canary\n"):
            said = result.infrastructure_error or result.stderr.strip() or f"exit {result.exit_code}"
            raise SubstrateUnavailable(sandbox.info.kind, f"the canary did not run: {said}", "report this as a bug")
    return seconds
