"""Sandboxes made ahead, so that taking one costs no creation."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType

from nautile.sandbox.errors import InvalidRequest, SandboxClosed, SandboxError
from nautile.sandbox.sandbox import Sandbox

__all__ = ["SandboxPool"]


class SandboxPool:
    """Keeps ``size`` unused sandboxes ready; each is given out once, to be closed by its taker, and replaced in the background.

    ``create`` makes one, for example ``lambda: Sandbox.create("container", limits=limits)``.
    """

    def __init__(self, size: int, create: Callable[[], Sandbox]) -> None:
        if not 0 < size <= 1000:
            raise InvalidRequest(f"size is {size}: give 1 to 1,000")
        self._size, self._create = size, create
        self._ready: queue.SimpleQueue[Sandbox | SandboxError] = queue.SimpleQueue()
        self._wanted = threading.Semaphore(size)
        self._closed = threading.Event()
        self._worker = threading.Thread(target=self._refill, name="sandbox-pool", daemon=True)
        self._worker.start()

    def _refill(self) -> None:
        while True:
            self._wanted.acquire()
            if self._closed.is_set():
                return
            try:
                made: Sandbox | SandboxError = self._create()
            except SandboxError as error:
                made = error
            self._ready.put(made)

    def take(self, timeout: float = 60.0) -> Sandbox:
        """One that is ready, or the next. Raises what ``create`` raised, SandboxError when there is none in time."""
        if self._closed.is_set():
            raise SandboxClosed("the pool is closed")
        try:
            found = self._ready.get(timeout=timeout)
        except queue.Empty:
            raise SandboxError(f"no sandbox became ready within {timeout:g} s") from None
        self._wanted.release()
        if isinstance(found, SandboxError):
            raise found
        return found

    @property
    def ready(self) -> int:
        """How many are ready now."""
        return self._ready.qsize()

    def close(self) -> None:
        """End those that nobody has taken."""
        self._closed.set()
        self._wanted.release()
        self._worker.join()
        while not self._ready.empty():
            found = self._ready.get()
            if isinstance(found, Sandbox):
                found.close()

    def __enter__(self) -> SandboxPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
