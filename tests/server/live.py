"""A real server for clients: uvicorn on a loopback port, with a scripted engine behind it."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from starlette.types import ASGIApp

from nautile.server import ServerOptions, Service, create_app
from server.scripted import ScriptedEngine

__all__ = ["Live", "serving"]


@dataclass(frozen=True)
class Live:
    """A server that runs, and the engine that a test tells what to say."""

    url: str
    engine: ScriptedEngine

    def reset(self) -> None:
        """Forget what was asked and what was to be said."""
        self.engine.scripts.clear()
        self.engine.requests.clear()
        self.engine.cancelled.clear()
        self.engine.answer = None

    def post(self, path: str, **body: Any) -> Any:
        """The JSON answer to a request, whatever its status."""
        return httpx.post(self.url + path, json=body, timeout=60).json()

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The server-sent events of a streamed answer; each must carry its own name."""
        with httpx.stream("POST", self.url + path, json={**body, "stream": True}, timeout=60) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = list(answer.iter_lines())
        found = []
        for line, following in itertools.pairwise(lines):
            if line.startswith("event: "):
                found.append(json.loads(following.removeprefix("data: ")))
                assert found[-1]["type"] == line.removeprefix("event: ")
        return found


@contextmanager
def serving(
    options: ServerOptions | None = None, name: str = "scripted", wrap: Callable[[ASGIApp], ASGIApp] | None = None
) -> Iterator[Live]:
    """Run a server until the block ends; the port is one that the system gives. ``wrap`` may put a layer around it."""
    engine = ScriptedEngine()
    app: ASGIApp = create_app(Service(engine, name, options or ServerOptions()))
    if wrap is not None:
        app = wrap(app)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=3))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < end, "the server did not start"
        time.sleep(0.01)
    try:
        yield Live(f"http://127.0.0.1:{listener.getsockname()[1]}", engine)
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"
