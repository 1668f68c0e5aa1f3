"""Which edge a new sandbox goes to: filter, then the least loaded of k at random, then the others. An edge may still refuse."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["EdgeView", "by_name", "order"]


@dataclass(frozen=True)
class EdgeView:
    """An edge as it described itself when it was last asked."""

    name: str
    url: str
    live: int
    capacity: int
    kinds: tuple[str, ...]
    accepting: bool
    usage: dict[str, tuple[int, int]]  # by project: sandboxes, bytes of memory limits
    change: int  # the number of the last change that this has

    @property
    def load(self) -> float:
        """Share of its capacity that is in use."""
        return self.live / self.capacity if self.capacity else 1.0

    @classmethod
    def of(cls, url: str, status: dict[str, Any]) -> EdgeView:
        """Of what ``/v1/status`` gave."""
        usage = {str(name): (int(count), int(memory)) for name, (count, memory) in status["usage"].items()}
        kinds = tuple(map(str, status["kinds"]))
        numbers = (int(status["live"]), int(status["capacity"]))
        return cls(str(status["name"]), url, *numbers, kinds, bool(status["accepting"]), usage, int(status["change"]))


def order(edges: Sequence[EdgeView], kind: str, choices: int, chance: random.Random) -> list[EdgeView]:
    """Edges in the order in which they are asked: power of ``choices``. Those that would refuse anyway are left out."""
    able = [edge for edge in edges if kind in edge.kinds and edge.accepting and edge.live < edge.capacity]
    sample = chance.sample(able, min(choices, len(able)))
    rest = [edge for edge in able if edge not in sample]
    chance.shuffle(rest)
    return sorted(sample, key=lambda edge: edge.load) + rest


def by_name(edges: Sequence[EdgeView], kind: str, name: str) -> list[EdgeView]:
    """Edges in an order that depends on ``name`` alone, so that two gateways ask the same one first (rendezvous hashing)."""
    able = [edge for edge in edges if kind in edge.kinds]
    return sorted(able, key=lambda edge: hashlib.sha256(f"{edge.name}\0{name}".encode()).digest())
