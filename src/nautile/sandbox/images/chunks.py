"""The data of a layer, fetched in chunks when they are read, checked, and kept in a directory that all layers share."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from nautile.sandbox.errors import ImageRefused
from nautile.sandbox.images.blobs import Blobs
from nautile.sandbox.images.tree import CHUNK, Layer, digest_of

__all__ = ["Chunks", "Fetched", "trim"]

_IN_MEMORY = 32  # chunks
_NOTE_EVERY = 0.2  # seconds between two notes of what was fetched


@dataclass
class Fetched:
    """What one layer has cost: ``bytes`` came from the store, of ``size``; ``cached`` chunks were on this machine already."""

    size: int
    bytes: int = 0
    requests: int = 0
    cached: int = 0
    failures: int = 0


class Chunks:
    """Reads from the memory, the cache directory or the store, in this order. For several threads."""

    def __init__(self, layer: Layer, blobs: Blobs, cache: Path, notes: Path | None = None) -> None:
        self.layer, self.blobs, self.cache, self.notes = layer, blobs, cache, notes
        self.fetched = Fetched(layer.size)
        self._memory: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._busy: dict[str, threading.Lock] = {}
        self._noted = 0.0

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the layer's data. Raises ImageRefused when they cannot be had, or are not what the index says."""
        end = min(offset + length, self.layer.size)
        pieces = []
        for number in range(offset // CHUNK, -(-end // CHUNK)):
            begin = number * CHUNK
            pieces.append(self._chunk(number)[max(offset - begin, 0) : end - begin])
        return b"".join(pieces)

    def _chunk(self, number: int) -> bytes:
        digest = self.layer.chunks[number]
        with self._lock:
            if (data := self._memory.get(digest)) is not None:
                self._memory.move_to_end(digest)
                return data
            busy = self._busy.setdefault(digest, threading.Lock())
        with busy:  # whoever comes second finds it in memory
            with self._lock:
                data = self._memory.get(digest)
            if data is None:
                data = self._cached(digest)
                if data is None:
                    data = self._fetch(number, digest)
        with self._lock:
            self._memory[digest] = data
            self._memory.move_to_end(digest)
            self._busy.pop(digest, None)
            while len(self._memory) > _IN_MEMORY:
                self._memory.popitem(last=False)
        return data

    def _place(self, digest: str) -> Path:
        return self.cache / digest[:2] / digest

    def _cached(self, digest: str) -> bytes | None:
        try:
            data = self._place(digest).read_bytes()
        except OSError:
            return None
        if digest_of(data) != digest:  # a machine that was switched off leaves such files
            return None
        self.fetched.cached += 1
        return data

    def _fetch(self, number: int, digest: str) -> bytes:
        size = min(CHUNK, self.layer.size - number * CHUNK)
        try:
            data = self.blobs.read(self.layer.data, number * CHUNK, size)
            self.fetched.bytes += len(data)
            self.fetched.requests += 1
            if digest_of(data) != digest:
                raise ImageRefused(self.layer.data[:12], f"chunk {number} is not what its index says", "copy the image again")
        except ImageRefused:
            self.fetched.failures += 1
            self.note(force=True)
            raise
        self._keep(digest, data)
        self.note()
        return data

    def _keep(self, digest: str, data: bytes) -> None:
        """Into the cache; a full disk is no reason to fail."""
        with contextlib.suppress(OSError):
            place = self._place(digest)
            place.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=place.parent, prefix=".new-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                os.rename(name, place)
            except OSError:
                os.unlink(name)

    def note(self, force: bool = False) -> None:
        """Write what was fetched where others can read it."""
        if self.notes is None or (not force and time.monotonic() - self._noted < _NOTE_EVERY):
            return
        self._noted = time.monotonic()
        with contextlib.suppress(OSError):
            new = self.notes.with_name(f".{self.notes.name}.{os.getpid()}.{threading.get_ident()}")
            new.write_text(json.dumps(vars(self.fetched)))
            os.rename(new, self.notes)


def trim(cache: Path, most: int) -> int:
    """Remove the chunks that were written longest ago until at most ``most`` bytes are left; how many were removed."""
    files = [
        (entry.stat().st_mtime, entry.stat().st_size, Path(entry)) for above in os.scandir(cache) for entry in os.scandir(above)
    ]
    total, removed = sum(size for _, size, _ in files), 0
    for _, size, place in sorted(files):
        if total <= most:
            break
        place.unlink(missing_ok=True)
        total, removed = total - size, removed + 1
    return removed
