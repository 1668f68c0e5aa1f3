"""Compiles the C++ beside this file for the machine at hand and keeps the result in the user's cache directory.

The file is named after what it was made from: sources, flags, compiler version and the CPU's instruction sets. Two processes
that build at once each write a file of their own and move it into place, so nobody loads half a library.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["NativeUnavailable", "library_path"]

_SOURCE = Path(__file__).parent
_COMPILERS = ("g++", "c++", "clang++")
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
_SECONDS = 300  # a build takes ten on a slow core


class NativeUnavailable(RuntimeError):  # noqa: N818  # it is a state of the machine, and callers fall back on it
    """This machine cannot run the native kernels; the text says why and what would help."""


def library_path(compiler: str | None = None, cache: Path | None = None) -> Path:
    """The compiled library, built now if it is not in the cache. Raises NativeUnavailable.

    Args: compiler, a command other than the first found of g++, c++ and clang++; cache, a directory other than the user's.
    """
    command = compiler or next((name for name in _COMPILERS if shutil.which(name)), None)
    if command is None or shutil.which(command) is None:
        wanted = compiler or "a C++ compiler"
        raise NativeUnavailable(f"{wanted} was not found; install one (Debian: apt-get install g++) to use the native kernels")
    directory = cache or _cache_directory()
    target = directory / f"nautile-{_fingerprint(command)}.so"
    if not target.exists():
        _compile(command, target)
    return target


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nautile" / "native"


def _sources() -> bytes:
    """A digest of the C++ and of the Python that knows its structures."""
    digest = hashlib.sha256()
    for file in sorted(file for file in _SOURCE.iterdir() if file.suffix in (".cpp", ".h", ".py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.digest()


_IMPORTED = _sources()


def _fingerprint(compiler: str) -> str:
    if _sources() != _IMPORTED:  # new C++ behind old Python would read past the ends of structures
        raise NativeUnavailable("the package was changed while this process runs: start it again to use the native kernels")
    return hashlib.sha256(_IMPORTED + " ".join(_FLAGS).encode() + _version(compiler) + _instruction_sets()).hexdigest()[:24]


def _version(compiler: str) -> bytes:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"{compiler} does not run: {error}") from error


def _instruction_sets() -> bytes:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line.encode() for line in lines if line.startswith(("flags", "Features"))), platform.machine().encode())


def _compile(compiler: str, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, suffix=".so.part")
        os.close(handle)
    except OSError as error:
        raise NativeUnavailable(
            f"{target.parent} cannot be written ({error.strerror}); the native kernels are kept there"
        ) from error
    part = Path(name)
    try:
        result = subprocess.run(
            [compiler, *_FLAGS, "-o", str(part), str(_SOURCE / "nautile.cpp")],
            capture_output=True, text=True, check=False, timeout=_SECONDS,
        )  # fmt: skip
        if result.returncode:
            first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip()[:200])
            raise NativeUnavailable(f"{compiler} could not compile the native kernels: {first}")
        part.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"compiling the native kernels with {compiler} failed: {error}") from error
    finally:
        part.unlink(missing_ok=True)
