"""The prefix cache: keeps state that no live sequence needs, in three tiers, and decides what to forget.

Device: blocks of the pool, with tails in ordinary memory. Host: both in ordinary memory. Disk: one file a node. On the way
from the root to a leaf the tiers only go down, so a node's history is never further away than its own. What is forgotten
first is what costs least to compute again per byte (greedy-dual: clock + uses x seconds / bytes; the clock is the value of
what was evicted last, so that old worth fades). A file that cannot be trusted is set aside, reported once, and computed again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nautile.state.costs import RecomputeCost
from nautile.state.pages import Pages, PoolFull, Sequence
from nautile.state.prefix import Node, Place, PrefixTree
from nautile.state.store import NodeName, NodeStore, StoreError, StoreUnavailable

__all__ = ["CacheCounters", "PrefixCache"]


@dataclass
class CacheCounters:
    """Written by the prefix cache."""

    lookups: int = 0
    lookup_tokens: int = 0
    hit_tokens: int = 0
    snapshots: int = 0
    missed_snapshots: int = 0  # boundaries that a step ran across
    dropped_tails: int = 0
    demotions: int = 0  # to a lower tier
    promotions: int = 0
    forgotten: int = 0  # nodes


class PrefixCache:
    """Nodes, their memory, and the three budgets. ``report`` is told once about everything that went wrong."""

    def __init__(self, pages: Pages, report: Callable[[str], None]) -> None:
        self.pages, self.report, self.options = pages, report, pages.options
        self.store: NodeStore | None = None
        self.tree = PrefixTree(self.options.snapshot_every)
        self.costs, self.counters = RecomputeCost(), CacheCounters()
        self.clock = 0.0
        self.bytes: dict[Place, int] = {"device": 0, "host": 0, "disk": 0}  # device: tails only
        self.orphans: dict[Path, int] = {}  # files that nothing leads to any more
        self._said: set[str] = set()

    def open_store(self, store: NodeStore) -> None:
        """Begin the disk tier with what an earlier run left."""
        assert self.store is None
        self.store = store
        self._adopt_files(store)

    # Finding ------------------------------------------------------------------------------------------------------

    def find(self, partition: str, ids: Many[int], most: int) -> tuple[Node, Tensor] | None:
        """The longest usable prefix of at most ``most`` tokens, its history in blocks, and its tail.

        Raises PoolFull when there are not enough blocks to bring it back to.
        """
        while (node := self.tree.deepest(partition, ids, most)) is not None:
            if not self._fetch(node):
                continue
            tail = node.tail
            assert tail is not None
            node.hits += 1
            node.clock = self.clock
            with self._pinned([node]):
                self._fit_tails()
            return node, tail
        return None

    def blocks(self, node: Node) -> list[int]:
        """The blocks of all tokens up to a node that is on the device."""
        return [block for part in node.path() for block in part.blocks]

    def tail(self, node: Node) -> Tensor | None:
        """The tail of a node wherever it is; None when there is none that can be trusted."""
        if node.tail is not None or not node.file_tail or node.file is None or self.store is None:
            return node.tail
        try:
            return self.store.read(node.file, node.digest)[1]
        except StoreError as error:
            self._say(str(error))
            self._file_is_bad(node)
            return None

    # Keeping ------------------------------------------------------------------------------------------------------

    def publish(self, sequence: Sequence, node: Node | None, tail: Tensor) -> Node:
        """File the state of a sequence at its present length under its tokens; gives the node it continues from.

        ``node`` is what this gave last time for the sequence. Blocks are shared, not copied. Where somebody else filed the
        same tokens before, theirs stay; the sequence changes over to them if they hold the same bytes.
        """
        parent = self._parent(sequence, node)
        ids = tuple(sequence.ids[parent.length : sequence.length])
        found = self._node_for(parent, ids, sequence)
        if not found.has_tail:
            self._set_tail(found, tail)
            self.counters.snapshots += 1
        found.clock = self.clock
        with self._pinned([found]):
            self._fit_tails()
        return found

    def _node_for(self, parent: Node, ids: tuple[int, ...], sequence: Sequence) -> Node:
        """The node of these tokens, on the device."""
        node = self.tree.child(parent, ids)
        if node is None:
            node = self.tree.add(parent, ids)
            node.clock = self.clock
            node.blocks = sequence.blocks[self._span(node)]
            self.pages.share(node.blocks, cached=True)
        elif node.place != "device":  # a live sequence has computed its history: it comes back for nothing
            blocks = sequence.blocks[self._span(node)]
            self.pages.share(blocks, cached=True)
            self._to_device(node, blocks)
        else:
            self._deduplicate(node, sequence)
        return node

    def _parent(self, sequence: Sequence, node: Node | None) -> Node:
        """The step that the next node of a sequence hangs on; steps without a tail are made where they are missing."""
        k, bottom = self.options.snapshot_every, (sequence.length - 1) // self.options.snapshot_every
        if node is None or not node.attached or node.place != "device" or node.length > bottom * k:
            node = self.tree.root(sequence.partition)
        while node.length < bottom * k:
            node = self._node_for(node, tuple(sequence.ids[node.length : node.length + k]), sequence)
        return node

    def _span(self, node: Node) -> slice:
        size = self.options.block_tokens
        start = node.parent.length if node.parent is not None else 0
        return slice(start // size, -(-node.length // size))

    def _deduplicate(self, node: Node, sequence: Sequence) -> None:
        span = self._span(node)
        own = sequence.blocks[span]
        if own == node.blocks or not self.pages.equal_blocks(own, node.blocks):
            return
        self.pages.share(node.blocks)
        self.pages.drop(own)
        sequence.blocks[span] = node.blocks

    def _set_tail(self, node: Node, tail: Tensor | None) -> None:
        """Put a tail into memory, or None for one that is in the node's file or nowhere."""
        if node.place != "disk":
            self.bytes[node.place] += (tail.nbytes if tail is not None else 0) - (
                node.tail.nbytes if node.tail is not None else 0
            )
        node.tail, node.has_tail = tail, tail is not None or node.file_tail

    @contextlib.contextmanager
    def _pinned(self, nodes: list[Node]) -> Iterator[None]:
        for node in nodes:
            node.pins += 1
        try:
            yield
        finally:
            for node in nodes:
                node.pins -= 1

    # Room ---------------------------------------------------------------------------------------------------------

    def make_room(self, blocks: int) -> bool:
        """Free blocks until there are as many; says whether it worked."""
        while len(self.pages.free_blocks) < blocks:
            node = self._least(node for node in self.tree.nodes() if self._can_leave_device(node))
            if node is None:
                return False
            self._demote(node)
        return True

    def prune(self, node: Node | None) -> None:
        """Remove a node that has become useless, and its ancestors that become so."""
        while node is not None and node.parent is not None and node.attached:
            if node.has_tail or node.users or node.pins or _has_children(node):
                return
            parent = node.parent
            self._drop_node(node)
            node = parent

    def forget_all(self) -> None:
        """Drop everything from memory; files stay for the next start."""
        for root in self.tree.roots.values():
            for child in list(root.children()):
                self._forget(child, keep_files=True)

    def flush(self) -> int:
        """Write whatever a restart could use to disk; gives the number of files written."""
        return sum(self._write(node) for node in list(self.tree.nodes()) if node.file is None)

    def value(self, node: Node) -> float:
        """Clock when it was last used + uses x seconds to compute it again / bytes it takes."""
        above = node.parent
        while above is not None and above.parent is not None and not above.has_tail:
            above = above.parent
        tokens = node.length - (above.length if above is not None else 0)
        seconds = tokens * self.costs.per_token(node.length)
        return node.clock + (1 + node.hits) * seconds / max(1, self._size(node))

    def _size(self, node: Node) -> int:
        """Bytes that would be free without the node."""
        tail = self.pages.tail_bytes(node.length) if node.has_tail else 0
        return tail + -(-len(node.ids) // self.options.block_tokens) * self.pages.block_bytes

    def _least(self, nodes: Iterable[Node]) -> Node | None:
        chosen = min(nodes, key=lambda node: (self.value(node), node.length), default=None)
        if chosen is not None:
            self.clock = max(self.clock, self.value(chosen))
        return chosen

    def _can_leave_device(self, node: Node) -> bool:
        if node.place != "device" or node.pins or any(child.place == "device" for child in node.children()):
            return False
        return any(self.pages.references[block] == 1 for block in node.blocks)

    def _fit_tails(self) -> None:
        """Keep the tails of the device tier within their budget. Nodes that nothing on the device hangs on leave it whole;
        the others lose the tail, to their file where there is a disk."""
        for spare_users in (True, False):
            while self.bytes["device"] > self.options.snapshot_bytes:
                holders = (n for n in self.tree.nodes() if n.place == "device" and n.tail is not None)
                node = self._least(n for n in holders if not (spare_users and (n.users or n.pins)))
                if node is None:
                    break
                if node.users or not self._can_leave_device(node):
                    self._drop_tail(node)
                else:
                    self._demote(node)

    def _drop_tail(self, node: Node) -> None:
        if not node.file_tail:
            self._write(node)
        self._set_tail(node, None)
        self.counters.dropped_tails += not node.has_tail
        self.prune(node)

    # Tiers --------------------------------------------------------------------------------------------------------

    def _demote(self, node: Node) -> None:
        """One tier down, or away."""
        worth = node.has_tail or _has_children(node)
        if worth and self._size(node) <= self.options.host_bytes:
            self._to_host(node)
        elif not (worth and self._to_disk(node)):
            self._forget(node)

    def _to_device(self, node: Node, blocks: list[int]) -> None:
        """Move to blocks that are the node's from now on; the tail stays in memory or in the file."""
        self.bytes[node.place] -= self._held(node)
        node.place, node.blocks, node.stored = "device", blocks, None
        self.bytes["device"] += self._held(node)

    def _to_host(self, node: Node) -> None:
        stored = self.pages.read_blocks(node.blocks)
        self._leave_device(node)
        node.place, node.stored = "host", stored
        self.bytes["host"] += self._held(node)
        self.counters.demotions += 1
        while self.bytes["host"] > self.options.host_bytes:
            hosted = (n for n in self.tree.nodes() if n.place == "host" and not n.pins)
            least = self._least(n for n in hosted if all(child.place == "disk" for child in n.children()))
            if least is None:
                return
            if not self._to_disk(least):
                self._forget(least)

    def _to_disk(self, node: Node) -> bool:
        """Whether the node is safe in its file now and needs no memory."""
        if (node.file is None or (node.tail is not None and not node.file_tail)) and not self._write(node):
            return False
        if node.place == "device":
            self._leave_device(node)
        else:
            self.bytes["host"] -= self._held(node)
        node.place, node.stored, node.tail = "disk", None, None
        self.counters.demotions += 1
        return True

    def _leave_device(self, node: Node) -> None:
        self.bytes["device"] -= self._held(node)
        self.pages.drop(node.blocks, cached=True)
        node.blocks = []

    def _write(self, node: Node) -> bool:
        """Write a node's file. A disk that refuses is reported once; the cache goes on without it."""
        if self.store is None or not self.store.writable:
            return False
        stored = node.stored if node.stored is not None else self.pages.read_blocks(node.blocks)
        try:
            path, size = self.store.write(_name(node), stored, node.tail)
        except StoreUnavailable as error:
            self._say(f"{error.strerror}; the prefix cache goes on without writing to disk")
            self.store.writable = False
            return False
        self.bytes["disk"] += size - node.file_bytes - self.orphans.pop(path, 0)
        node.file, node.file_bytes, node.file_tail = path, size, node.tail is not None
        with self._pinned([node]):
            self._fit_disk()
        return node.file is not None

    def _fit_disk(self) -> None:
        """Files nobody can reach go first, then copies of what is in memory, then the least valuable."""
        while self.bytes["disk"] > self.options.disk_bytes and self.store is not None:
            if self.orphans:
                path, size = self.orphans.popitem()
                self.store.delete(path)
                self.bytes["disk"] -= size
                continue
            holders = [n for n in self.tree.nodes() if n.file is not None and (n.place != "disk" or not _has_children(n))]
            node = self._least(n for n in holders if not n.pins) or next((n for n in holders if n.place != "disk"), None)
            if node is None:
                return
            if node.place == "disk":
                self._forget(node)
            else:
                self._lose_file(node)
                self.prune(node)

    def _lose_file(self, node: Node) -> None:
        assert node.file is not None and self.store is not None
        self.store.delete(node.file)
        self.bytes["disk"] -= node.file_bytes
        node.file, node.file_bytes, node.file_tail, node.has_tail = None, 0, False, node.tail is not None

    def _fetch(self, node: Node) -> bool:
        """Bring a node's history to the device and its tail to memory. False when a file was bad: the tree has shrunk, look
        again."""
        path = node.path()
        with self._pinned(path):
            broken = next((part for part in path if not self._promote(part, with_tail=part is node)), None)
        if broken is None:
            return True
        self._file_is_bad(broken)
        return False

    def _file_is_bad(self, node: Node) -> None:
        """A node without its file, and what depended on it. A file that could only not be read now stays, and takes its place
        on the disk; so do those of the nodes below it."""
        assert node.file is not None
        stays = node.file.exists()
        if stays:
            self.orphans[node.file] = node.file_bytes
        else:
            self.bytes["disk"] -= node.file_bytes
        node.file, node.file_bytes, node.file_tail, node.has_tail = None, 0, False, node.tail is not None
        if node.place == "disk":
            self._forget(node, keep_files=stays)
        else:
            self.prune(node)

    def _promote(self, node: Node, with_tail: bool) -> bool:
        missing_tail = with_tail and node.tail is None
        if node.place == "device" and not missing_tail:
            return True
        stored, tail = node.stored, node.tail
        if node.place == "disk" or missing_tail:
            assert self.store is not None and node.file is not None
            try:
                stored, tail = self.store.read(node.file, node.digest, with_tail)
            except StoreError as error:
                self._say(str(error))
                return False
        if node.place != "device":
            assert stored is not None
            blocks = self._room_for(stored.shape[0], node.length)
            self.pages.write_blocks(blocks, stored)
            self._to_device(node, blocks)
            self.counters.promotions += 1
        if with_tail:
            self._set_tail(node, tail)
        return True

    def _room_for(self, blocks: int, tokens: int) -> list[int]:
        if not self.make_room(blocks):
            free = len(self.pages.free_blocks)
            raise PoolFull(f"{tokens} cached tokens cannot be brought back: {blocks} blocks wanted, {free} free")
        return self.pages.allocate(blocks, cached=True)

    def _forget(self, node: Node, keep_files: bool = False) -> None:
        """Remove a node and everything below it."""
        parent, waiting, below = node.parent, [node], []
        while waiting:
            below.append(waiting.pop())
            waiting.extend(below[-1].children())
        for part in reversed(below):
            if part.file is not None and not keep_files:
                self._lose_file(part)
            self._drop_node(part)
            self.counters.forgotten += 1
        self.prune(parent)

    def _drop_node(self, node: Node) -> None:
        """Out of the tree, with what it holds in memory. Its file stays."""
        if node.place == "device":
            self._leave_device(node)
        elif node.place == "host":
            self.bytes["host"] -= self._held(node)
        if node.file is not None:
            self.orphans[node.file] = node.file_bytes
        node.stored, node.tail, node.file, node.file_bytes, node.file_tail, node.has_tail = None, None, None, 0, False, False
        self.tree.remove(node)

    def _held(self, node: Node) -> int:
        """Bytes of memory that a node takes outside the blocks."""
        return sum(part.nbytes for part in (node.tail, node.stored) if part is not None)

    def _adopt_files(self, store: NodeStore) -> None:
        """Take up the files that an earlier run, or another process, left."""
        known: dict[bytes, Node] = {}
        for file in store.scan(self._say):
            ids, root = file.name.ids, self.tree.root(file.name.partition)
            known[root.digest] = root
            parent = known.get(file.name.parent)
            self.bytes["disk"] += file.file_bytes
            if parent is None or not 0 < len(ids) <= self.options.snapshot_every or self.tree.child(parent, ids):
                self.orphans[file.path] = file.file_bytes  # its history is not here, or k was another
                continue
            node = self.tree.add(parent, ids)
            node.place, node.file, node.file_bytes = "disk", file.path, file.file_bytes
            node.file_tail = node.has_tail = file.has_tail
            known[node.digest] = node
        for node in list(self.tree.nodes())[::-1]:
            if not node.has_tail and not _has_children(node):
                self.prune(node)
        self._fit_disk()

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.report(text)

    # Checking -----------------------------------------------------------------------------------------------------

    def problems(self) -> Iterator[str]:
        """Everything about nodes that is not as it must be."""
        order = {"device": 0, "host": 1, "disk": 2}
        totals: dict[Place, int] = {"device": 0, "host": 0, "disk": sum(self.orphans.values())}
        for node in self.tree.nodes():
            name, span = f"node at {node.length}", self._span(node)
            totals[node.place] += self._held(node)
            totals["disk"] += node.file_bytes
            if node.parent is not None and node.parent.parent is not None and order[node.parent.place] > order[node.place]:
                yield f"{name} is on {node.place}, its history before it on {node.parent.place}"
            if len(node.blocks) != (span.stop - span.start if node.place == "device" else 0):
                yield f"{name} on {node.place} has {len(node.blocks)} blocks for {span}"
            if (node.stored is not None) != (node.place == "host") or (node.place == "disk" and node.file is None):
                yield f"{name} on {node.place} is not where it says"
            if node.has_tail != (node.tail is not None or node.file_tail) or (node.file_tail and node.file is None):
                yield f"{name} says it has a tail"
            if node.tail is not None and node.tail.nbytes != self.pages.tail_bytes(node.length):
                yield f"{name} has a tail of {node.tail.nbytes} bytes"
            if node.pins or not (node.has_tail or node.users or _has_children(node)):
                yield f"{name} is of no use, or still pinned"
        if totals != self.bytes:
            yield f"bytes by tier are {totals}, the counters say {self.bytes}"
        if self.bytes["device"] > self.options.snapshot_bytes or self.bytes["host"] > self.options.host_bytes:
            yield f"{self.bytes} are over the budget"


def _name(node: Node) -> NodeName:
    assert node.parent is not None
    return NodeName(node.partition, node.digest, node.parent.digest, node.length, node.ids)


def _has_children(node: Node) -> bool:
    return next(node.children(), None) is not None
