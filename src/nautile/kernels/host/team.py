"""A team of threads that computes MXFP4 experts from host memory.

y = sum over pairs of w2_e (weight * silu(min(w1_e x, L)) * clip(w3_e x, -L, L)), activations and the hidden vector in
bfloat16, sums in float32, exactly as the card's kernel rounds them. An expert is one run of bytes in the order w1, s1, w3,
s3, w2, s2 (codes, then their scales).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from nautile.kernels.native.build import NativeUnavailable

__all__ = ["ExpertJob", "ExpertStream", "HostTeam", "host_fast_path", "read_rate_words"]

_SOURCE = Path(__file__).parent / "experts.cpp"
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", "-pthread")
_int, _pointer, _double, _address = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double, ctypes.c_uint64


class _Pair(ctypes.Structure):
    _fields_: ClassVar = [("expert", _address), ("token", _int), ("weight", ctypes.c_float)]


@dataclass(frozen=True)
class ExpertJob:
    """One expert for one token. ``address`` of its bytes in host memory, which stay there until ``wait``."""

    address: int
    token: int
    weight: float


class HostTeam:
    """``threads`` threads for experts of one shape. ``start`` returns at once, ``wait`` when ``out`` holds the sums."""

    def __init__(self, threads: int, hidden: int, inner: int, limit: float, *, tokens: int = 1, pairs: int = 64) -> None:
        """Raises NativeUnavailable without a C++ compiler, ValueError for sizes that MXFP4 cannot hold."""
        if threads < 1 or hidden % 32 or inner % 32:
            raise ValueError(f"a team needs a thread, and sizes that are multiples of 32: {threads}, {hidden}, {inner}")
        self.threads, self.hidden, self.most = threads, hidden, (tokens, pairs)
        self._library = _library()
        self._team = self._library.team_new(threads, hidden, inner, limit, tokens, pairs)
        self._pairs = (_Pair * pairs)()

    def start(self, jobs: Sequence[ExpertJob], x: Tensor, out: Tensor) -> None:
        """Begin: x bfloat16 [T, d] and out float32 [T, d], contiguous, in host memory and alive until ``wait``.

        Jobs of one expert stand beside each other. Raises ValueError for more tokens or pairs than the team was made for.
        """
        if len(jobs) > self.most[1] or x.shape[0] > self.most[0] or x.shape[1] != self.hidden:
            raise ValueError(
                f"{len(jobs)} pairs of x {tuple(x.shape)}: this team takes {self.most[1]} and {self.most[0]} tokens"
            )
        if x.dtype != torch.bfloat16 or out.dtype != torch.float32 or not (x.is_contiguous() and out.is_contiguous()):
            raise ValueError("x is bfloat16 and out float32, both contiguous")
        for slot, job in zip(self._pairs, jobs, strict=False):
            slot.expert, slot.token, slot.weight = job.address, job.token, job.weight
        self._library.team_start(self._team, self._pairs, len(jobs), x.data_ptr(), x.shape[0], out.data_ptr())

    def wait(self) -> None:
        """Until the last ``start`` is done."""
        self._library.team_wait(self._team)

    def close(self) -> None:
        """End the threads."""
        if self._team:
            self._library.team_free(self._team)
            self._team = None

    def __del__(self) -> None:
        if getattr(self, "_team", None):
            self.close()


class ExpertStream:
    """Copies experts from host memory into slots of six arenas, one call for all of them: issued one by one from Python,
    copies to a card cost a third of the time that they take."""

    def __init__(self, arenas: Sequence[Tensor]) -> None:
        """arenas: the six tensors uint8 [slots, ...], on a card or in host memory. Raises RuntimeError without a driver."""
        self._library = _library()
        self._arenas = (_address * 6)(*(arena.data_ptr() for arena in arenas))
        self._sizes = (_int * 6)(*(arena[0].nbytes if len(arena) else 0 for arena in arenas))
        self._copy = _card_copy() if arenas[0].is_cuda else None

    def copy(self, addresses: Sequence[int], first: int, stream: int = 0) -> None:
        """Start copying experts at these host addresses into slots first, first + 1, ...; ``stream`` is a CUDA stream's number.

        In host memory the copies are done when this returns. Raises RuntimeError with the driver's error number.
        """
        blobs = (_pointer * len(addresses))(*addresses)
        error = self._library.stream_experts(
            self._copy, self._arenas, self._sizes, first, blobs, len(addresses), ctypes.c_void_p(stream)
        )
        if error:
            raise RuntimeError(f"copying experts to the card failed: CUDA driver error {error}")


def _card_copy() -> ctypes.c_void_p:
    """The driver's asynchronous copy from host memory."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"the NVIDIA driver's libcuda.so.1 does not load: {error}") from error
    return ctypes.cast(driver.cuMemcpyHtoDAsync_v2, ctypes.c_void_p)


def host_fast_path() -> bool:
    """Whether the compiled code uses AVX-512's bfloat16 products; without them it is correct and slow."""
    return bool(_library().fast_path())


def read_rate_words(data: Tensor, threads: int) -> int:
    """Read all of ``data`` (contiguous, host) with ``threads`` threads; the sum keeps the reads. For measuring bandwidth."""
    return int(_library().read_words(data.data_ptr(), data.nbytes // 8, threads))


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_build()))
    library.team_new.restype, library.team_new.argtypes = _pointer, [_int, _int, _int, _double, _int, _int]
    library.team_free.restype, library.team_free.argtypes = None, [_pointer]
    library.team_start.restype = None
    library.team_start.argtypes = [_pointer, _pointer, _int, _pointer, _int, _pointer]
    library.team_wait.restype, library.team_wait.argtypes = None, [_pointer]
    library.stream_experts.restype = ctypes.c_int
    library.stream_experts.argtypes = [_pointer, _pointer, _pointer, _int, _pointer, _int, _pointer]
    library.read_words.restype, library.read_words.argtypes = ctypes.c_uint64, [_pointer, _int, _int]
    library.fast_path.restype, library.fast_path.argtypes = _int, []
    return library


def _build() -> Path:
    """The compiled file in the user's cache, named after source, flags and instruction sets."""
    compiler = next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        raise NativeUnavailable("a C++ compiler was not found; install one (Debian: apt-get install g++) for host experts")
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nautile" / "host"
    target = directory / f"experts-{_fingerprint()}.so"
    if target.exists():
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            part = Path(scratch) / "experts.so"
            command = [compiler, *_FLAGS, "-o", str(part), str(_SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
            if done.returncode:
                first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
                raise NativeUnavailable(f"{compiler} could not compile the host experts: {first}")
            part.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"compiling the host experts with {compiler} failed: {error}") from error
    return target


def _fingerprint() -> str:
    flags = b""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_bytes().splitlines()
        flags = next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    return hashlib.sha256(_SOURCE.read_bytes() + " ".join(_FLAGS).encode() + flags).hexdigest()[:24]
