"""Run an edge or a gateway in this process until it is told to end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import uvicorn

from nautile.sandbox import cgroup
from nautile.sandbox.errors import InvalidRequest
from nautile.sandbox.fleet import edge_server, gateway
from nautile.sandbox.fleet.edge import Edge, EdgeConfig
from nautile.sandbox.fleet.watcher import Edges, Watcher

__all__ = ["listen", "serve_edge", "serve_gateway"]

_HANDING_OVER = 10.0  # seconds until an earlier run of an edge has ended


def listen(address: str) -> tuple[socket.socket, str]:
    """A listening socket at ``HOST:PORT`` (0: any port) or ``unix:PATH`` (for this user only), and its URL."""
    if address.startswith("unix:"):
        path = Path(address.removeprefix("unix:")).absolute()
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        except OSError as error:
            raise InvalidRequest(f"{path}: {error.strerror or error}; a socket's path has at most 107 bytes") from None
        finally:
            os.umask(before)
        url = f"unix:{path}"
    else:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise InvalidRequest(f"address {address!r}: give HOST:PORT or unix:PATH")
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise InvalidRequest(f"{address} cannot be listened at: {error.strerror or error}") from None
        url = f"http://{host}:{listener.getsockname()[1]}"
    listener.listen(1024)
    return listener, url


def _serve(app: Any, listener: socket.socket) -> None:
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5, timeout_keep_alive=75)
    server = uvicorn.Server(config)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        server.run([listener])


def _leave(*_: object) -> NoReturn:
    raise SystemExit(0)


def serve_edge(config: EdgeConfig, address: str, secret: str | None, leave: bool, evict: bool = False) -> None:
    """Take over what an earlier run left, print ``ready URL``, serve; ``leave``: sandboxes stay for the next run.

    ``evict``: an earlier run that still holds the state is killed; its containers live on and are taken over. Raises
    InvalidRequest without it.
    """
    if secret is None and not address.startswith("unix:"):
        raise InvalidRequest("an edge that listens on TCP needs --secret-file: whoever reaches it could use it")
    edge = Edge(config)
    lock = _take(config.state, evict)
    listener, url = listen(address)
    found, lost = edge.adopt()
    if found or lost:
        print(f"found {found} sandboxes again, {lost} are lost", file=sys.stderr)
    signal.signal(signal.SIGTERM, _leave)  # uvicorn raises the signal again when it has ended
    try:
        print(f"ready {url}", flush=True)
        _serve(edge_server.application(edge, secret), listener)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # ending takes a moment; it is not to be cut short by the second request
        edge.stop(leave)
        os.close(lock)
        if leave:
            sys.stdout.flush()
            os._exit(0)  # what would end them is not called


def _take(state: Path, evict: bool) -> int:
    """The lock of an edge's state, held for life: two edges would both think that a sandbox is theirs."""
    lock = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _HANDING_OVER
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = os.pread(lock, 100, 0).decode("ascii", "replace")
            runs = cgroup.alive(holder)
            if evict and runs:
                os.kill(int(holder.partition(".")[0]), signal.SIGKILL)
            # One that was killed while it started another program: its child holds the lock until that program has begun.
            if time.monotonic() > deadline or (runs and not evict):
                os.close(lock)
                raise InvalidRequest(f"{state} belongs to an edge that runs (process {holder.partition('.')[0]})") from None
            time.sleep(0.05)
    os.ftruncate(lock, 0)
    os.pwrite(lock, cgroup.owner_name().encode(), 0)
    return lock


def serve_gateway(config: gateway.GatewayConfig, edges: Edges, address: str, secret: str | None) -> None:
    """Print ``ready URL`` and serve."""
    edges.now()
    app = gateway.application(config, Watcher(edges, secret))
    listener, url = listen(address)
    signal.signal(signal.SIGTERM, _leave)
    print(f"ready {url}", flush=True)
    _serve(app, listener)
