"""What is kept of a stream that may never end: its first and its last half."""

from __future__ import annotations

__all__ = ["Kept"]


class Kept:
    """At most ``keep`` bytes of what is added, and a line in the middle that says how much is missing."""

    def __init__(self, keep: int) -> None:
        self.half = max(keep // 2, 1)
        self._head, self._tail = bytearray(), bytearray()
        self.total = 0

    def add(self, data: bytes) -> None:
        """Append; what falls out of the middle is dropped."""
        self.total += len(data)
        room = self.half - len(self._head)
        self._head += data[:room]
        self._tail += data[room:] if room else data
        if len(self._tail) > 2 * self.half:
            del self._tail[: len(self._tail) - self.half]

    @property
    def truncated(self) -> bool:
        """Whether something is missing."""
        return self.total > 2 * self.half

    def data(self) -> bytes:
        """What was kept."""
        if not self.truncated:
            return bytes(self._head + self._tail)
        missing = b"\n[... %d bytes omitted ...]\n" % (self.total - 2 * self.half)
        return bytes(self._head) + missing + bytes(self._tail[-self.half :])
