"""The disk that every guest without an image has: the skeleton of a system, and the host's /usr and settings below it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
from pathlib import Path

from nautile.sandbox import bundle
from nautile.sandbox.guest import disk, kernel

__all__ = ["Checked", "index", "layer_index"]

_SETTINGS = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/ssl/certs")


def index(cache: Path | None = None) -> Path:
    """The index of the host's system, made anew when a directory of /usr has changed: a few seconds."""
    place = (cache or kernel.cache_directory()) / "base"
    place.mkdir(parents=True, exist_ok=True)
    settings = [Path(one) for one in _SETTINGS if os.path.exists(one)]
    target = place / "host.index"
    if disk.is_current(target):
        return target
    with open(place / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if disk.is_current(target):  # another process has been faster
            return target
        skeleton = _skeleton(place)
        root = disk.scan(skeleton)
        root.names[b"workspace"].owner = (bundle.TENANT, bundle.TENANT)
        for path in (Path("/usr"), *settings):
            disk.graft(root, str(path), disk.scan(path, public=True))
        disk.write_index(root, target, [Path("/usr"), *settings, skeleton])
    return target


class Checked:
    """The index as it is, and in the background whether it still holds: a machine can start meanwhile."""

    def __init__(self, cache: Path | None = None) -> None:
        self.path = (cache or kernel.cache_directory()) / "base" / "host.index"
        if not self.path.exists():
            index(cache)
        self._current = False
        self._thread = threading.Thread(target=self._check, daemon=True)
        self._thread.start()

    def _check(self) -> None:
        self._current = disk.is_current(self.path)

    @property
    def current(self) -> bool:
        """Waits for the answer."""
        self._thread.join()
        return self._current


def _skeleton(place: Path) -> Path:
    """The files of a system that has none; named by their content, since running machines read them."""
    with tempfile.TemporaryDirectory(dir=place) as work:
        made = Path(work, "skeleton")
        made.mkdir(mode=0o755)
        bundle.skeleton(made)
        digest = hashlib.sha256()
        for path in sorted(made.rglob("*")):
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            digest.update(str(path.relative_to(made)).encode() + b"\0" + content + b"\0")
        target = place / f"skeleton-{digest.hexdigest()[:16]}"
        if not target.exists():
            try:
                os.rename(made, target)
            except OSError:
                shutil.rmtree(target, ignore_errors=True)
                raise
    return target


def layer_index(layer: Path, target: Path) -> Path:
    """The index of a directory in overlayfs form. An ordinary user's own files become the tenant's."""
    user = None if os.geteuid() == 0 else os.geteuid()
    disk.write_index(disk.scan(layer, user=user), target, [])
    return target
