"""Which edges there are and how they are: asked again and again and kept nowhere else, so it can be rebuilt at any time."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from nautile.sandbox.errors import EdgeGone, InvalidRequest
from nautile.sandbox.fleet import wire
from nautile.sandbox.fleet.placement import EdgeView
from nautile.sandbox.fleet.quota import Ledger

__all__ = ["Edges", "Watcher", "client_of"]

_log = logging.getLogger(__name__)


def client_of(url: str, secret: str | None, timeout: float) -> httpx.AsyncClient:
    """For an edge at ``http://HOST:PORT`` or ``unix:PATH``; only connecting has a time limit, unless ``timeout`` is for all."""
    headers = {} if secret is None else {wire.SECRET: secret}
    limits = httpx.Timeout(timeout, connect=5.0)
    pool = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    if url.startswith("unix:"):
        transport = httpx.AsyncHTTPTransport(uds=url.removeprefix("unix:"), limits=pool)
        return httpx.AsyncClient(transport=transport, base_url="http://edge", headers=headers, timeout=limits, trust_env=False)
    plain = httpx.AsyncHTTPTransport(limits=pool, socket_options=wire.SOCKET_OPTIONS, trust_env=False)
    return httpx.AsyncClient(transport=plain, base_url=url, headers=headers, timeout=limits, trust_env=False)


@dataclass(frozen=True)
class Edges:
    """Where edges are: fixed URLs, and those of a file with one a line, which may change at any time."""

    urls: tuple[str, ...] = ()
    file: Path | None = None

    def now(self) -> list[str]:
        """All of them. Raises InvalidRequest for what is no URL."""
        lines = [] if self.file is None or not self.file.exists() else self.file.read_text(encoding="utf-8").splitlines()
        found = list(dict.fromkeys([*self.urls, *(line.strip() for line in lines if line.strip() and line[0] != "#")]))
        for url in found:
            if not url.startswith(("http://", "https://", "unix:/")):
                raise InvalidRequest(f"edge {url!r}: give http://HOST:PORT or unix:/PATH")
        return found


class Watcher:
    """The view of all edges. ``seen`` has those that answered within ``patience`` seconds."""

    def __init__(self, edges: Edges, secret: str | None, interval: float = 1.0, patience: float = 5.0) -> None:
        self.edges, self.secret, self.interval, self.patience = edges, secret, interval, patience
        self.ledger = Ledger()
        self.clients: dict[str, httpx.AsyncClient] = {}
        self._answers: dict[str, tuple[EdgeView, float]] = {}  # by name: and when it came

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self.interval)
            try:
                await self.look()
            except Exception:
                _log.exception("watching the edges")

    async def look(self) -> None:
        """Ask every edge once."""
        await asyncio.gather(*(self._ask(url) for url in self.edges.now()))

    async def _ask(self, url: str) -> None:
        if url not in self.clients:
            self.clients[url] = client_of(url, self.secret, 900.0)
        try:
            answer = await self.clients[url].get("/v1/status", timeout=self.patience)
            answer.raise_for_status()
            view = EdgeView.of(url, answer.json())
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            _log.warning("edge %s: %s %s", url, type(error).__name__, error)
            return
        earlier = self._answers.get(view.name)
        if earlier is not None and time.monotonic() - earlier[1] < self.patience:
            if earlier[0].url != url:
                _log.error("edges at %s and %s are both named %s: the second is left out", earlier[0].url, url, view.name)
                return
            if view.change < earlier[0].change:  # two looks at once: this answer was given first and came last
                return
        self._answers[view.name] = (view, time.monotonic())
        self.ledger.answered(view.name, view.change)

    @property
    def seen(self) -> list[EdgeView]:
        """Edges that have answered lately."""
        now = time.monotonic()
        return [view for view, when in self._answers.values() if now - when <= self.patience]

    @property
    def silent(self) -> list[str]:
        """URLs of edges that have not."""
        answering = {view.url for view in self.seen}
        return [url for url in self.edges.now() if url not in answering]

    def usage(self) -> dict[str, tuple[int, int]]:
        """What each project has. An edge that is silent keeps what it last said: its sandboxes may live."""
        return self.ledger.usage({name: view.usage for name, (view, _) in self._answers.items()})

    def client(self, name: str) -> httpx.AsyncClient:
        """The connection to an edge. Raises EdgeGone when none of this name has ever answered."""
        if name not in self._answers:
            raise EdgeGone(f"no edge named {name} has answered this gateway: start it again, or list it with --edge")
        return self.clients[self._answers[name][0].url]

    async def close(self) -> None:
        """Hang up."""
        await asyncio.gather(*(client.aclose() for client in self.clients.values()))
