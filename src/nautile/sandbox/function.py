"""The function substrate: warm workers inside hardened bubblewrap; one fork a call, nothing left between calls.

A worker sees /usr (read-only), an empty /workspace and /tmp in memory, and nothing of the host besides: no network, no
capability, no environment, no user data, the calls of ``seccomp.ALLOWED`` only. It is replaced after a number of calls, when
it could not clean up, and when it died. Run by root, its tenant is a user id that owns nothing on the host.

There is one worker more than calls at once: it takes the next call while the one before cleans up and forks ahead.
"""

from __future__ import annotations

import queue
import threading
from pathlib import Path

from nautile.sandbox import cgroup
from nautile.sandbox.driver import Order, Watch
from nautile.sandbox.errors import SandboxClosed, SandboxError, SandboxLost
from nautile.sandbox.limits import Limits
from nautile.sandbox.result import Capabilities, Info, RunResult
from nautile.sandbox.worker import ENVIRONMENT, MASKED, MASKED_DIRECTORIES, Lost, Plan, Worker, host_directories, message_of

__all__ = ["ENVIRONMENT", "MASKED", "MASKED_DIRECTORIES", "FunctionDriver", "host_directories"]

_RECYCLE = 1000  # calls of one worker
_PATIENCE = 15.0  # seconds that a caller waits for a free worker, or as long as its own call may take


class FunctionDriver:
    """``workers`` calls at once; more callers wait."""

    capabilities = Capabilities(
        files=False, session=False, pause=False, snapshot=False, fork=False, pack_diff=False, network=False
    )

    def __init__(self, identity: str, limits: Limits, *, workers: int = 1, workspace: Path | None = None) -> None:
        self._plan, self._closed = Plan.make(limits, workspace), False
        self._idle: queue.SimpleQueue[Worker | SandboxError] = queue.SimpleQueue()  # the one that has rested longest first
        self._turns: queue.SimpleQueue[None] = queue.SimpleQueue()  # as many as calls at once
        self._all: set[Worker] = set()
        self._lock, self._calls = threading.Lock(), 0
        cgroup.sweep()
        for _ in range(workers):
            self._turns.put(None)
            self._hire()
        first = self._idle.get()
        self._idle.put(first)
        if isinstance(first, SandboxError):
            self.close()
            raise first
        self.info = Info(identity, "function", "bubblewrap", "native", first.group.enforced)

    def reason(self, feature: str) -> tuple[str, str]:
        """See ``Driver.reason``."""
        return "a function call leaves nothing behind that could be kept or continued", "use kind='container'"

    def run(self, order: Order, watch: Watch | None) -> RunResult:
        """See ``Driver.run``."""
        message = message_of(order)
        patience = max(order.timeout, _PATIENCE)
        try:
            self._turns.get(timeout=patience)
        except queue.Empty:
            raise SandboxLost(f"no worker became free within {patience:g} s: ask for more workers") from None
        try:
            worker = self._ready_worker(patience)
            try:
                return worker.call(message, order, watch)
            except Lost as error:
                return self._lost(worker, error)
            finally:
                self._give_back(worker)
        finally:
            self._turns.put(None)

    def _ready_worker(self, patience: float) -> Worker:
        """One that can take a call. Raises SandboxClosed, SandboxLost, and why none could be started."""
        self._calls += 1
        if self._calls == 2:  # whoever calls twice may call often
            threading.Thread(target=self._hire, daemon=True).start()
        while not self._closed:
            try:
                worker = self._idle.get(timeout=patience)
            except queue.Empty:
                raise SandboxLost(f"no worker started within {patience:g} s") from None
            if isinstance(worker, SandboxError):
                self._idle.put(worker)
                raise worker
            if worker.ready():
                return worker
            self._replace(worker)
        raise SandboxClosed("the sandbox is closed")

    def _lost(self, worker: Worker, error: Lost) -> RunResult:
        if self._closed:
            raise SandboxClosed("the sandbox was closed during the call")
        if worker.memory_killed():  # the tenant's doing, therefore its result
            text = "sandbox: the call exceeded its memory limit\n"
            return RunResult(137, "", text, False, False, None, memory_killed=True, stderr_bytes=text.encode())
        return RunResult(-1, "", "", False, False, f"function: the worker was lost during the call ({error})")

    def _give_back(self, worker: Worker) -> None:
        if worker.usable and worker.calls < _RECYCLE and not self._closed:
            self._idle.put(worker)
        else:
            self._replace(worker)

    def _replace(self, worker: Worker) -> None:
        """End a worker; its successor starts beside the caller, who does not wait for it."""
        with self._lock:
            self._all.discard(worker)

        def change() -> None:
            if not self._closed:
                self._hire()
            worker.stop()

        threading.Thread(target=change, daemon=True).start()

    def _hire(self) -> None:
        try:
            worker = Worker(self._plan)
        except SandboxError as error:
            self._idle.put(error)
            return
        with self._lock:
            if not self._closed:
                self._all.add(worker)
                self._idle.put(worker)
                return
        worker.stop()

    def close(self) -> None:
        """End every worker."""
        with self._lock:
            self._closed = True
            workers, self._all = self._all, set()
        for worker in workers:
            worker.stop()
