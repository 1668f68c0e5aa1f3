"""A gVisor checkpoint on the disk, and the sandbox that is made ahead to go on from it.

Most of a restore is starting runsc, which needs nothing of the checkpoint. So whoever has gone on from a checkpoint once finds
the next sandbox started, empty and waiting: one at most, of the limits that were asked for last. It ends with the checkpoint.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from nautile.sandbox.errors import SandboxError
from nautile.sandbox.image import Image, TemporaryLayer
from nautile.sandbox.limits import Limits

__all__ = ["Checkpoint"]


class _Closing(Protocol):
    def close(self) -> None: ...


_T = TypeVar("_T", bound=_Closing)


class _Spare(Generic[_T]):
    """One thing that is made in a thread. It knows no checkpoint, so that a checkpoint can end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._made: tuple[Limits, _T] | None = None
        self._ended = False

    def prepare(self, limits: Limits, make: Callable[[], _T]) -> None:
        """Begin to make it, unless there is one."""

        def work() -> None:
            with contextlib.suppress(
                SandboxError, OSError
            ):  # then the next is made when it is asked for, and says why it cannot be
                made = make()
                with self._lock:
                    if not self._ended:
                        self._made = (limits, made)
                        return
                made.close()

        with self._lock:
            if self._ended or self._made is not None or (self._thread is not None and self._thread.is_alive()):
                return
            self._thread = threading.Thread(target=work, daemon=True)
            self._thread.start()

    def take(self, limits: Limits) -> _T | None:
        """What was made, if it has these limits; one that is being made is waited for."""
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            found, self._made = self._made, None
        if found is None:
            return None
        if found[0] == limits:
            return found[1]
        found[1].close()
        return None

    def end(self) -> None:
        """Close what was made, and make nothing more."""
        with self._lock:
            self._ended = True
            found, self._made = self._made, None
        if found is not None:
            found[1].close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()


class Checkpoint(TemporaryLayer, Generic[_T]):
    """A checkpoint's directory; it ends with the last image or sandbox that uses it."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._spare: _Spare[_T] = _Spare()
        self._end = weakref.finalize(self, self._spare.end)

    @classmethod
    def of(cls, image: Image) -> Checkpoint[_T] | None:
        """The checkpoint that an image goes on from."""
        return next((one for one in image.held if isinstance(one, Checkpoint) and one.place == image.memory), None)

    def take(self, limits: Limits) -> _T | None:
        """The sandbox that was made ahead, if there is one of these limits."""
        return self._spare.take(limits)

    def prepare(self, limits: Limits, make: Callable[[], _T]) -> None:
        """Let the next one be made in the background."""
        self._spare.prepare(limits, make)
