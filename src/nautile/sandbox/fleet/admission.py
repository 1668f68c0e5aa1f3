"""Whether an edge takes one more sandbox. Its word is final: a gateway's view is always a little old."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Admission"]

_DESCRIPTORS_EACH = 8  # open at once for a sandbox that is being made
_PROCESSES_EACH = 4


@dataclass(frozen=True)
class Admission:
    """``reserve``: the share of the machine's memory that stays free."""

    capacity: int = 4000
    reserve: float = 0.2

    def refusal(self, live: int, proc: Path = Path("/proc")) -> str | None:
        """Why one more is refused with ``live`` already there; None: welcome."""
        if live >= self.capacity:
            return f"it has {live} sandboxes, as many as it may"
        memory = _memory(proc)
        if memory["MemAvailable"] < self.reserve * memory["MemTotal"]:
            return f"{memory['MemAvailable'] // 1024} MiB of memory are left, less than the {self.reserve:.0%} that stay free"
        most = int((proc / "sys/kernel/pid_max").read_text())
        processes = int((proc / "loadavg").read_text().split()[3].partition("/")[2])
        if processes + _PROCESSES_EACH > most * 0.9:
            return f"{processes} processes run, of {most}"
        descriptors = len(os.listdir(proc / "self/fd"))
        if descriptors + _DESCRIPTORS_EACH > resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 0.9:
            return f"{descriptors} files are open, nearly as many as may be (ulimit -n)"
        return None


def _memory(proc: Path) -> dict[str, int]:
    lines = (line.split() for line in (proc / "meminfo").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if words[0] in ("MemTotal:", "MemAvailable:")}
