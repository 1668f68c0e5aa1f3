"""What a sandbox may use: every number is enforced by the kernel, or where the output is produced."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from nautile.sandbox.errors import InvalidRequest

__all__ = ["MIB", "Limits"]

MIB = 2**20
_MOST_OUTPUT = 31 * MIB  # of each stream: both, and the notes of what is missing, go in one frame


@dataclass(frozen=True)
class Limits:
    """Bounds of one sandbox (of each worker, for function calls). Sizes in bytes, times in seconds."""

    memory: int = 512 * MIB  # resident memory, files in /tmp and /workspace included: they live in memory
    pids: int = 256  # processes and threads
    cpus: float | None = None  # processor time per second; None: no quota
    disk: int = 256 * MIB  # of each writable file system
    inodes: int = 65_536  # files and directories; containers only, bubblewrap's tmpfs has no such option
    open_files: int = 1024
    output: int = 10 * MIB  # kept of stdout and of stderr each: the first and the last half
    seconds: float = 60.0  # of a command whose caller names no timeout
    allow_unenforced: bool = False  # go without cgroups where the machine gives us none

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "allow_unenforced" or (field.name == "cpus" and value is None):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**62:
                raise InvalidRequest(f"limits: {field.name} is {value!r}; give a positive number")
            if field.name not in ("cpus", "seconds") and not isinstance(value, int):
                raise InvalidRequest(f"limits: {field.name} is {value!r}; give a whole number")
        if self.memory < 16 * MIB:
            raise InvalidRequest(f"limits: memory is {self.memory:,} bytes; a sandbox needs at least {16 * MIB:,}")
        if self.output > _MOST_OUTPUT:
            raise InvalidRequest(f"limits: output is {self.output:,} bytes; at most {_MOST_OUTPUT:,} fit into one result")
        if self.pids < 8:
            raise InvalidRequest(f"limits: pids is {self.pids}; a sandbox needs at least 8")

    def check_host(self) -> None:
        """Whether this machine, on which the sandbox is to be made, has as much. Raises InvalidRequest."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        processors = os.cpu_count() or 1
        if self.memory > memory:
            raise InvalidRequest(f"limits: memory is {self.memory:,} bytes, and the machine has {memory:,}: give less")
        if self.cpus is not None and self.cpus > processors:
            raise InvalidRequest(f"limits: cpus is {self.cpus:g}, and the machine has {processors}: give less, or None")
