"""Keep an edge running: start it, watch whether it answers, start it again when it has died. Ray puts one on every node."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

from nautile.sandbox.errors import SubstrateUnavailable
from nautile.sandbox.fleet import wire

__all__ = ["Supervisor", "node_name"]

_STARTING = 60.0  # seconds until an edge must be ready; taking over thousands of sandboxes takes some


@dataclass
class Supervisor:
    """``options``: what ``nautile sandbox edge`` gets after its name. An edge that is started again keeps its address."""

    name: str
    options: Sequence[str]
    secret: str | None = None
    interval: float = 1.0  # seconds between two looks
    patience: int = 10  # looks without an answer after which an edge that runs is taken for stuck, and killed
    command: Sequence[str] = (sys.executable, "-m", "nautile.cli", "sandbox", "edge")
    url: str = ""
    restarts: int = 0
    _process: subprocess.Popen[str] | None = None
    _over: threading.Event = field(default_factory=threading.Event)
    _watcher: threading.Thread | None = None

    def start(self) -> str:
        """Start the edge; its URL. Raises SubstrateUnavailable with what it said."""
        self._launch()
        self._watcher = threading.Thread(target=self._watch, name=f"edge {self.name}", daemon=True)
        self._watcher.start()
        return self.url

    def _launch(self) -> None:
        argv = [*self.command, self.name, *self.options]
        if self.url:  # as before: gateways know it there
            argv += ["--listen", self.url.removeprefix("http://")]
        self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        stdout = self._process.stdout
        assert stdout is not None
        ready = select.select([stdout], [], [], _STARTING)[0]
        said = stdout.readline().split() if ready else []
        if said[:1] != ["ready"]:
            self._process.kill()
            self._process.wait()
            why = f"edge {self.name} did not start (status {self._process.returncode}); its reason is above"
            raise SubstrateUnavailable("fleet", why, f"try: {' '.join(argv)}")
        self.url = said[1]

    def _watch(self) -> None:
        missed, pause = 0, 0.1
        while not self._over.wait(self.interval):
            process = self._process
            assert process is not None
            missed = 0 if self.answers() else missed + 1
            if process.poll() is None and missed < self.patience:
                continue
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
            if self._over.is_set():
                return
            try:
                self._launch()
                self.restarts += 1
                missed, pause = 0, 0.1
            except SubstrateUnavailable as error:
                print(error, file=sys.stderr)
                self._over.wait(pause)
                pause = min(2 * pause, 30.0)

    def answers(self) -> bool:
        """Whether the edge answers now."""
        headers = {} if self.secret is None else {wire.SECRET: self.secret}
        transport = httpx.HTTPTransport(uds=self.url.removeprefix("unix:")) if self.url.startswith("unix:") else None
        base = "http://edge" if transport is not None else self.url
        try:
            with httpx.Client(transport=transport, trust_env=False, timeout=5.0) as client:
                return client.get(f"{base}/v1/status", headers=headers).is_success
        except httpx.HTTPError:
            return False

    @property
    def process(self) -> int:
        """The edge's number."""
        assert self._process is not None
        return self._process.pid

    def stop(self, seconds: float = 30.0) -> None:
        """End the edge, with its sandboxes unless it was started with ``--leave``."""
        self._over.set()
        process, deadline = self._process, time.monotonic() + seconds
        if process is None:
            return
        process.terminate()
        if self._watcher is not None:
            self._watcher.join(max(deadline - time.monotonic(), 0.1))
            process = self._process  # the watcher may have been about to start it again
            assert process is not None
            process.terminate()
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def node_name(host: str) -> str:
    """An edge's name for a machine's: lower-case letters, digits and hyphens."""
    found = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in host.lower()).strip("-")
    return found[:40].strip("-") or f"node-{os.getpid()}"
