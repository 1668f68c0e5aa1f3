"""The kernel of virtual machines: Debian's cloud kernel, downloaded through apt and unpacked into the cache, never installed.

This file needs nothing but the standard library, so that ``python3 kernel.py`` can be run before the package is set up.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MODULES", "Kernel", "KernelMissing", "cache_directory", "fetch", "find"]

MODULES = ("virtio_mmio", "virtio_pci", "virtio_console", "virtio_blk", "erofs", "overlay")
_PACKAGE = "linux-image-cloud-amd64"
_SECONDS = 300.0


class KernelMissing(RuntimeError):  # noqa: N818  # a state of the machine
    """There is no kernel for guests, or it could not be fetched; the text says why and what to do."""


@dataclass(frozen=True)
class Kernel:
    """``image``: what a bootloader loads; ``modules``: a directory with the modules that guests need, ``NAME.ko``."""

    version: str
    image: Path
    modules: Path

    def load_order(self, wanted: tuple[str, ...]) -> list[str]:
        """``wanted`` and what they depend on, each after what it needs."""
        order: list[str] = []

        def add(name: str) -> None:
            if name in order:
                return
            for needed in _depends(self.modules / f"{name}.ko"):
                add(needed)
            order.append(name)

        for name in wanted:
            add(name)
        return order


def cache_directory() -> Path:
    """Where kernels, the agent and snapshots are kept: the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nautile" / "sandbox"


def find(cache: Path | None = None) -> Kernel:
    """The newest kernel in the cache. Raises KernelMissing."""
    place = (cache or cache_directory()) / "kernels"
    versions = sorted((one for one in place.glob("*") if (one / "vmlinuz").is_file()), key=lambda one: _numbers(one.name))
    if not versions:
        raise KernelMissing("there is no kernel for guests: run nautile sandbox kernel, which downloads Debian's with apt")
    return Kernel(versions[-1].name, versions[-1] / "vmlinuz", versions[-1] / "modules")


def fetch(cache: Path | None = None) -> Kernel:
    """Download and unpack the kernel that apt names now; one that is there already is kept. Raises KernelMissing."""
    place = (cache or cache_directory()) / "kernels"
    package = _resolve()
    version = package.removeprefix("linux-image-")
    if not (place / version / "vmlinuz").is_file():
        for program in ("apt-get", "dpkg-deb"):
            if shutil.which(program) is None:
                raise KernelMissing(f"{program} is missing: the kernel comes from a Debian or Ubuntu archive")
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place, prefix=".fetch-") as work:
            _unpack(package, version, Path(work))
            (Path(work) / "kernel").chmod(0o755)
            try:
                os.rename(Path(work) / "kernel", place / version)
            except OSError:  # another process has been faster
                if not (place / version / "vmlinuz").is_file():
                    raise
    return find(cache)


def _resolve() -> str:
    """The package that ``linux-image-cloud-amd64`` depends on today."""
    said = _run(["apt-cache", "depends", _PACKAGE], "apt's lists do not know it: run apt-get update")
    match = re.search(r"Depends: (linux-image-[0-9][^\s]*)", said)
    if match is None:
        raise KernelMissing(f"apt-cache depends {_PACKAGE} names no kernel: run apt-get update, on Debian 12 or newer")
    return match[1]


def _unpack(package: str, version: str, work: Path) -> None:
    _run(["apt-get", "download", package], "check the network and run apt-get update", work)
    archive = next(work.glob("*.deb"))
    _run(["dpkg-deb", "-x", str(archive), str(work / "all")], "the download may be broken: try again")
    target = work / "kernel"
    (target / "modules").mkdir(parents=True)
    shutil.copyfile(work / "all/boot" / f"vmlinuz-{version}", target / "vmlinuz")
    found = {path.stem: path for path in (work / "all/lib/modules" / version).rglob("*.ko")}
    pending, kept = list(MODULES), set[str]()
    while pending:
        name = pending.pop()
        if name in kept:
            continue
        if name not in found:
            raise KernelMissing(f"{package} has no module {name}: its configuration has changed")
        kept.add(name)
        shutil.copyfile(found[name], target / "modules" / f"{name}.ko")
        pending += _depends(found[name])


def _depends(module: Path) -> list[str]:
    """What a module's own information says that it needs."""
    match = re.search(rb"\0depends=([^\0]*)\0", module.read_bytes())
    return [name.decode().replace("-", "_") for name in match[1].split(b",") if name] if match else []


def _run(command: list[str], remedy: str, place: Path | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS, cwd=place)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelMissing(f"{command[0]}: {error}; {remedy}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise KernelMissing(f"{' '.join(command[:2])}: {said[-1] if said else done.returncode}; {remedy}")
    return done.stdout


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


if __name__ == "__main__":
    try:
        print(f"kernel for guests: {fetch().version}")
    except KernelMissing as error:
        sys.exit(f"kernel for guests: {error}")
