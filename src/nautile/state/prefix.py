"""The prefix tree: which token sequences have state somewhere, and what of it.

A node stands for the tokens from its parent to it. Nodes at multiples of the snapshot interval k are ``steps`` and may have
children; nodes elsewhere are ``ends`` (where a sequence was released) and are leaves. A prefix can be used at a node that
has a tail; the history before it is that of its ancestors. Partitions have roots of their own and never share.

What this file does not know: memory, files, what a tail is.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from torch import Tensor

__all__ = ["Node", "Place", "PrefixTree"]

Place = Literal["device", "host", "disk"]


@dataclass(eq=False)
class Node:
    """State of the tokens after the parent's, wherever it is. Written by the prefix cache.

    place says where the history is: "device": in ``blocks``; "host": in ``stored``; "disk": in ``file`` only. A file that
    has been written stays valid while the node moves up again. ``has_tail``: a sequence can start here; the tail is in
    ``tail``, or in the file (``file_tail``). ``users`` live sequences continue from here; ``pins`` forbid to move it now.
    """

    parent: Node | None
    ids: tuple[int, ...]
    partition: str
    length: int = 0
    digest: bytes = b""  # of the partition and all ids up to here
    place: Place = "device"
    blocks: list[int] = field(default_factory=list)
    tail: Tensor | None = None
    stored: Tensor | None = None
    file: Path | None = None
    file_bytes: int = 0
    file_tail: bool = False
    has_tail: bool = False
    users: int = 0
    pins: int = 0
    hits: int = 0
    clock: float = 0.0
    attached: bool = True
    steps: dict[tuple[int, ...], Node] = field(default_factory=dict)
    ends: dict[int, dict[tuple[int, ...], Node]] = field(default_factory=dict)  # by number of tokens

    def children(self) -> Iterator[Node]:
        """All of them."""
        yield from self.steps.values()
        for group in self.ends.values():
            yield from group.values()

    def path(self) -> list[Node]:
        """From the first node after the root to this one."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class PrefixTree:
    """Nodes by partition; ``interval`` is k."""

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.roots: dict[str, Node] = {}

    def root(self, partition: str) -> Node:
        """The node of no tokens."""
        if partition not in self.roots:
            self.roots[partition] = Node(None, (), partition, digest=blake2b(partition.encode(), digest_size=16).digest())
        return self.roots[partition]

    def deepest(self, partition: str, ids: Many[int], most: int) -> Node | None:
        """The longest node with a tail whose tokens are a prefix of ``ids``, at most ``most`` tokens long."""
        visited = [self.root(partition)]
        while (end := visited[-1].length + self.interval) <= most:
            child = visited[-1].steps.get(tuple(ids[visited[-1].length : end]))
            if child is None:
                break
            visited.append(child)
        for node in reversed(visited):
            found = self._end(node, ids, most) if node.ends else None
            if found is not None or node.has_tail:
                return found or node
        return None

    def _end(self, node: Node, ids: Many[int], most: int) -> Node | None:
        for count in sorted(node.ends, reverse=True):
            if node.length + count <= most:
                found = node.ends[count].get(tuple(ids[node.length : node.length + count]))
                if found is not None and found.has_tail:
                    return found
        return None

    def child(self, parent: Node, ids: tuple[int, ...]) -> Node | None:
        """The node of exactly these tokens after ``parent``."""
        return parent.steps.get(ids) if len(ids) == self.interval else parent.ends.get(len(ids), {}).get(ids)

    def add(self, parent: Node, ids: tuple[int, ...]) -> Node:
        """A new node; the caller fills it."""
        assert 0 < len(ids) <= self.interval and self.child(parent, ids) is None
        digest = blake2b(parent.digest + array("I", ids).tobytes(), digest_size=16).digest()
        node = Node(parent, ids, parent.partition, parent.length + len(ids), digest)
        if len(ids) == self.interval:
            parent.steps[ids] = node
        else:
            parent.ends.setdefault(len(ids), {})[ids] = node
        return node

    def remove(self, node: Node) -> None:
        """Take a node without children out."""
        assert node.parent is not None and node.attached and not any(True for _ in node.children())
        if len(node.ids) == self.interval:
            del node.parent.steps[node.ids]
        else:
            group = node.parent.ends[len(node.ids)]
            del group[node.ids]
            if not group:
                del node.parent.ends[len(node.ids)]
        node.attached = False

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents before children."""
        waiting = [child for root in self.roots.values() for child in root.children()]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children())
