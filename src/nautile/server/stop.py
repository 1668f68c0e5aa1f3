"""Stop strings: the answer ends where one of them is complete, and nothing of it is ever shown."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopFilter"]


class StopFilter:
    """Passes text on as far as it cannot be the beginning of a stop string.

    The stop string that is complete first ends the text; of several that end at one place the longest counts. So it makes no
    difference how the text is cut into pieces. Stop strings must not be empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self.held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Take more text; gives what may be shown. After ``matched`` is set nothing more comes."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        text = self.held + text
        ends = [(place + len(stop), place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            _, place, self.matched = min(ends)
            self.held = ""
            return text[:place]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text is over: what was held back."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
