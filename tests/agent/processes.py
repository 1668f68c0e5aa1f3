"""Looking for processes without any tool that a small system might lack."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

_PATIENCE = 60.0  # seconds for what happens at once on a machine that has time


def nap(number: int) -> str:
    """A command that no other test of this machine runs at the same time: it sleeps for two hours."""
    return f"sleep {number}.{os.getpid():07}"


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


def began(*commands: str) -> bool:
    """Whether processes run these commands; a new one may take a moment to be itself."""
    return _soon(lambda: all(map(running, commands)))


def gone(*commands: str) -> bool:
    """Whether no process runs these commands; a killed one may take a moment to vanish."""
    return _soon(lambda: not any(map(running, commands)))


def _soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
