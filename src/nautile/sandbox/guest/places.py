"""Temporary directories of a machine's client: removed by it, or when it has been killed, by the next one that starts."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

from nautile.sandbox import cgroup

__all__ = ["sweep", "temporary"]

_NAME = re.compile(r"nautile-(?:disk|disks|layer)-(\d+\.\d+)-\w+")


def temporary(what: str) -> Path:
    """A new directory for ``disk``, ``disks`` or ``layer``, whose name says whose it is."""
    return Path(tempfile.mkdtemp(prefix=f"nautile-{what}-{cgroup.owner_name()}-"))


def sweep() -> int:
    """Remove what dead clients of this user have left. How many directories that were."""
    count = 0
    for entry in os.scandir(tempfile.gettempdir()):
        match = _NAME.fullmatch(entry.name)
        if match is None or cgroup.alive(match[1]):
            continue
        try:
            found = entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # somebody else sweeps, too
            continue
        if found.st_uid == os.geteuid() and stat.S_ISDIR(found.st_mode):
            shutil.rmtree(entry.path, ignore_errors=True)
            count += 1
    return count
