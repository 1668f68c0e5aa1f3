"""A gVisor checkpoint on the disk, and the sandbox that is made ahead to go on from one.

Most of a restore is starting runsc, which needs nothing of the checkpoint. So whoever takes a checkpoint has the next sandbox
started meanwhile, empty and waiting, and whoever has used it the one after it: one at most for a sandbox and all that descends
from it, of the limits that were asked for last. It ends with the last of them.
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

__all__ = ["Ahead", "Checkpoint"]

_SERIAL = "serial"  # the file with the number of the last stream


class _Closing(Protocol):
    def close(self) -> None: ...


_T = TypeVar("_T", bound=_Closing)


class _Spare(Generic[_T]):
    """One thing that is made in a thread. It knows nobody who uses it, so that they can end."""

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


class Ahead(Generic[_T]):
    """The place for one sandbox that is made ahead. What is in it ends when nobody refers to this any more."""

    def __init__(self) -> None:
        self._spare: _Spare[_T] = _Spare()
        weakref.finalize(self, self._spare.end)

    def take(self, limits: Limits) -> _T | None:
        """The sandbox that was made ahead, if there is one of these limits."""
        return self._spare.take(limits)

    def prepare(self, limits: Limits, make: Callable[[], _T]) -> None:
        """Let the next one be made in the background, unless there is one."""
        self._spare.prepare(limits, make)


class Checkpoint(TemporaryLayer, Generic[_T]):
    """A checkpoint's directory; it ends with the last image or sandbox that uses it."""

    def __init__(self, place: Path, ahead: Ahead[_T]) -> None:
        super().__init__(place)
        self.ahead = ahead

    @classmethod
    def of(cls, image: Image) -> Checkpoint[_T] | None:
        """The checkpoint that an image goes on from."""
        return next((one for one in image.held if isinstance(one, Checkpoint) and one.place == image.memory), None)

    def remember(self, serial: int) -> None:
        """Keep the number of the last stream that its sandbox has begun: it may still be there."""
        (self.place / _SERIAL).write_text(str(serial))

    @staticmethod
    def remembered(place: Path) -> int:
        """That number."""
        return int((place / _SERIAL).read_text())
