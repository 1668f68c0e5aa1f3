"""Our own small programs in C, compiled at their first use and kept in the cache; and programs that nobody can change."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["compiled", "sealed"]

_FLAGS = ("-O2", "-s", "-std=gnu11", "-fstack-protector-strong", "-D_FORTIFY_SOURCE=2")
_PROGRAM, _LIBRARY = ("-static",), ("-shared", "-fPIC", "-Wl,-z,now")
_F_ADD_SEALS, _ALL_SEALS = 1033, 0x1 | 0x2 | 0x4 | 0x8  # seal, shrink, grow, write
_COMPILE_LIMIT = 60.0  # seconds


def compiled(source: Path, cache: Path, *, library: bool = False) -> Path | None:
    """The program, or the shared library, of one C file; None where it cannot be compiled: a caller must have another way."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    flags = (*_FLAGS, *(_LIBRARY if library else _PROGRAM))
    told = " ".join([compiler, *flags, os.uname().machine])
    target = cache / f"{source.stem}-{hashlib.sha256(source.read_bytes() + told.encode()).hexdigest()[:16]}"
    if target.exists():
        return target
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        made = Path(work, source.stem)
        argv = [compiler, *flags, "-o", str(made), str(source)]
        try:
            done = subprocess.run(argv, capture_output=True, check=False, timeout=_COMPILE_LIMIT)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
        made.chmod(0o700)
        os.rename(made, target)
    return target


def sealed(program: Path) -> int:
    """A descriptor of a copy in memory that nobody can write, not even who runs it and owns the file (CVE-2019-5736)."""
    file = os.memfd_create(program.name, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        view = memoryview(program.read_bytes())
        while view:
            view = view[os.write(file, view) :]
        fcntl.fcntl(file, _F_ADD_SEALS, _ALL_SEALS)
    except BaseException:
        os.close(file)
        raise
    return file
