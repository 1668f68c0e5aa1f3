"""How much memory this process may still take: an engine that cannot fit is refused at its start and not killed later."""

from __future__ import annotations

from pathlib import Path

__all__ = ["check_host_memory", "free_host_memory"]


def free_host_memory(root: Path = Path("/")) -> int | None:
    """Bytes of host memory that can be had: of the machine, or of the control group where that is less. None: not known."""
    found = [amount for amount in (_machine(root / "proc/meminfo"), _group(root / "sys/fs/cgroup")) if amount is not None]
    return min(found, default=None)


def check_host_memory(wanted: int, what: str, free: int | None) -> None:
    """Raises ValueError when ``what`` wants more than there is: memory is given out when it is touched, so that a pool that is
    too large would be noticed, and the process killed, in the middle of somebody's request."""
    if free is not None and wanted > free:
        raise ValueError(
            f"{what} want {wanted / 2**30:,.2f} GiB of memory, and {free / 2**30:,.2f} GiB are free: lower them, or free some"
        )


def _machine(path: Path) -> int | None:
    try:
        lines = (line.split() for line in path.read_text().splitlines())
        return next((int(words[1]) * 1024 for words in lines if words and words[0] == "MemAvailable:"), None)
    except (OSError, ValueError, IndexError):
        return None


def _group(directory: Path) -> int | None:
    """What a control group of version 2 leaves; file pages that are not in use can be had back."""
    try:
        limit = int((directory / "memory.max").read_text())  # "max" is no number: no limit
        used = int((directory / "memory.current").read_text())
        lines = (line.split() for line in (directory / "memory.stat").read_text().splitlines())
        cached = next((int(words[1]) for words in lines if words[:1] == ["inactive_file"]), 0)
        return max(0, limit - used + cached)
    except (OSError, ValueError, IndexError):
        return None
