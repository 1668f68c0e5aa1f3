"""Looking for processes without any tool that a small system might lack."""

from __future__ import annotations

import time
from pathlib import Path


def running(command: str) -> bool:
    """Whether some process of this machine has exactly this command line."""
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            try:
                found = (place / "cmdline").read_bytes()
            except OSError:
                continue  # it has just ended
            if found.rstrip(b"\0").split(b"\0") == command.encode().split(b" "):
                return True
    return False


def gone(*commands: str) -> bool:
    """Whether no process runs these commands; a killed one may take a moment to vanish."""
    deadline = time.monotonic() + 5
    while any(map(running, commands)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
