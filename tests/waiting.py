"""Waiting for what another thread or process brings about."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["soon"]


def soon(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Return when the condition holds. The time is for machines that stand still; nothing is learnt from how long it took."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
