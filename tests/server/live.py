"""A real server for clients: uvicorn on a loopback port, with a scripted engine behind it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from nautile.server import ServerOptions, Service, create_app
from server.scripted import ScriptedEngine

__all__ = ["Live", "serving"]


@dataclass(frozen=True)
class Live:
    """A server that runs, and the engine that a test tells what to say."""

    url: str
    engine: ScriptedEngine


@contextmanager
def serving(
    options: ServerOptions | None = None, engine: ScriptedEngine | None = None, name: str = "scripted"
) -> Iterator[Live]:
    """Run a server until the block ends; the port is one that the system gives."""
    engine = engine or ScriptedEngine()
    app = create_app(Service(engine, name, options or ServerOptions()))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=3))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < end, "the server did not start"
        time.sleep(0.01)
    try:
        yield Live(f"http://127.0.0.1:{listener.getsockname()[1]}", engine)
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"
