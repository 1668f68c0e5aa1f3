"""The door of a fleet: knows tokens and quotas, places new sandboxes, passes everything else to the edge that an id names.

It keeps nothing that it could not learn again from the edges: any gateway serves any sandbox, and one that was killed is
replaced by starting another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from nautile.sandbox.errors import EdgeGone, FleetFull, InvalidRequest
from nautile.sandbox.fleet import wire
from nautile.sandbox.fleet.door import guard
from nautile.sandbox.fleet.placement import EdgeView, by_name, order
from nautile.sandbox.fleet.quota import Book
from nautile.sandbox.fleet.watcher import Watcher

__all__ = ["GatewayConfig", "application"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GatewayConfig:
    """``tokens``: the file of ``quota``; it is read again when it changes. ``choices``: the k of power of k choices."""

    tokens: Path
    choices: int = 2
    seed: int | None = None


def application(config: GatewayConfig, watcher: Watcher) -> Starlette:
    """The gateway's HTTP interface; the same paths as an edge's, with a token instead of a secret."""
    service = _Service(config, watcher)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await watcher.look()
        task = asyncio.create_task(watcher.watch())
        yield
        task.cancel()
        await watcher.close()

    routes = [
        Route("/v1/fleet", guard(service.project, service.fleet)),
        Route("/v1/sandboxes", guard(service.project, service.create), methods=["POST"]),
        Route("/v1/sandboxes", guard(service.project, service.listing), methods=["GET"]),
        Route("/v1/sandboxes/{identity}", guard(service.project, service.close), methods=["DELETE"]),
        Route("/v1/sandboxes/{identity}", guard(service.project, service.passed_on), methods=["GET"]),
        Route("/v1/sandboxes/{identity}/fork", guard(service.project, service.fork), methods=["POST"]),
        Route("/v1/sandboxes/{identity}/{op}", guard(service.project, service.passed_on), methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


class _Service:
    def __init__(self, config: GatewayConfig, watcher: Watcher) -> None:
        self.config, self.watcher = config, watcher
        self.chance = random.Random(config.seed)
        self._book, self._read = Book.load(config.tokens), config.tokens.stat().st_mtime_ns

    @property
    def book(self) -> Book:
        """The tokens; a file that has become wrong leaves the last right one in force, and is logged."""
        with contextlib.suppress(OSError):
            if (now := self.config.tokens.stat().st_mtime_ns) != self._read:
                self._read = now
                try:
                    self._book = Book.load(self.config.tokens)
                except InvalidRequest as error:
                    _log.error("%s", error)
        return self._book

    def project(self, request: Request) -> str:
        """Whose token the request has. Raises AccessDenied."""
        return self.book.project_of(request.headers.get("authorization"))

    async def fleet(self, _: Request, __: str) -> Response:
        """The edges, as this gateway sees them."""
        edges = [
            {"name": one.name, "live": one.live, "capacity": one.capacity, "kinds": one.kinds} for one in self.watcher.seen
        ]
        return JSONResponse({"edges": edges, "silent": len(self.watcher.silent)})

    async def listing(self, _: Request, project: str) -> Response:
        """The project's sandboxes on all edges. An edge that does not answer is named."""
        found, silent = list[Any](), list[str]()
        for edge in self.watcher.seen:
            try:
                answer = await self._ask(edge.name, "GET", "/v1/sandboxes", project)
                found += answer.json()["sandboxes"]
            except EdgeGone:
                silent.append(edge.name)
        return JSONResponse({"sandboxes": found, "silent": silent})

    # -- placing

    async def create(self, request: Request, project: str) -> Response:
        """Place a new sandbox, or find the one of a log's name."""
        body = await wire.body_of(request.stream(), wire.CREATE_MOST)
        header, _ = wire.one_frame(body)
        memory = wire.limits_of(header).memory
        edges = await self._candidates(header, project)
        if isinstance(edges, str):  # its log is there: nothing new is made, so no quota is asked
            answer = await self._ask(edges, "POST", "/v1/sandboxes", project, body)
            return Response(answer.content, answer.status_code, media_type="application/json")
        self.book.admit(project, memory, self.watcher.usage())
        number, made, change = self.watcher.ledger.reserve(project, memory), None, 0
        try:
            answer, made = await self._placed(edges, header, project, body)
            change = answer.json().get("change", 0)
        finally:
            self.watcher.ledger.settle(number, made, change)
        return Response(answer.content, answer.status_code, media_type="application/json")

    async def _candidates(self, header: dict[str, Any], project: str) -> list[EdgeView] | str:
        """Edges to ask for a new one, in order; or the name of the one that has what is wanted."""
        kind, image, log = str(header.get("kind", "container")), header.get("image"), header.get("log")
        if not self.watcher.seen:  # this gateway, or all edges, have just been started
            await self.watcher.look()
        if log is not None:
            owner = await self._owner(str(log), project)
            if owner is not None:
                return owner
        seen = self.watcher.seen
        if isinstance(image, str) and "." in image and wire.is_edge_name(image.partition(".")[0]):
            home = [edge for edge in seen if edge.name == wire.edge_of(image)]
            if home:  # a snapshot is where it was made
                return home
        if log is not None:
            return by_name(seen, kind, f"{project}\0{log}")
        return order(seen, kind, self.config.choices, self.chance)

    async def _owner(self, log: str, project: str) -> str | None:
        """The edge that has a trajectory. Raises EdgeGone while an edge that may have it does not answer."""
        if self.watcher.silent:
            await self.watcher.look()
        if silent := self.watcher.silent:
            raise EdgeGone(
                f"{len(silent)} of the fleet's edges do not answer, and one may have the trajectory {log!r}: a second one is "
                "never begun. Start them again, or take them off the gateway's list"
            )
        names = [edge.name for edge in self.watcher.seen]
        answers = await asyncio.gather(*(self._ask(name, "GET", f"/v1/logs/{log}", project) for name in names))
        return next((name for name, answer in zip(names, answers, strict=True) if answer.json().get("here")), None)

    async def _placed(
        self, edges: list[EdgeView], header: dict[str, Any], project: str, body: bytes
    ) -> tuple[httpx.Response, str | None]:
        """Ask one edge after the other until one takes it, or gives an answer that another would give too."""
        asked, refusals = list[str](), list[str]()
        edges = edges or await self._fresh(asked, header)
        while edges:
            for edge in edges:
                asked.append(edge.name)
                try:
                    answer = await self._ask(edge.name, "POST", "/v1/sandboxes", project, body)
                except EdgeGone as error:
                    if header.get("log") is not None:  # it may have begun the log: another edge must not begin a second one
                        raise
                    refusals.append(str(error))
                    continue
                if answer.status_code != wire.status_of({"error": "FleetFull"}):
                    return answer, edge.name if answer.is_success else None
                refusals.append(answer.json()["text"])
            edges = await self._fresh(asked, header)
        if not self.watcher.seen:  # nothing is known of any room: a client tries again for as long as it has patience
            nobody = EdgeGone(f"none of the fleet's {len(self.watcher.edges.now())} edges answers this gateway")
            nobody.untouched = not asked
            raise nobody
        said = f": {refusals[0]}" if refusals else "; none that answers offers this kind and has room"
        raise FleetFull(f"none of {len(asked)} edges takes the sandbox{said}")

    async def _fresh(self, asked: list[str], header: dict[str, Any]) -> list[EdgeView]:
        """Edges not asked yet that have room now: what the last look saw may be a second old, and refuses nobody.

        None for a log or a snapshot, whose candidates do not depend on who has room.
        """
        image = header.get("image")
        if header.get("log") is not None or (isinstance(image, str) and "." in image):
            return []
        await self.watcher.look()
        able = order(self.watcher.seen, str(header.get("kind", "container")), self.config.choices, self.chance)
        return [edge for edge in able if edge.name not in asked]

    # -- passing on

    async def close(self, request: Request, project: str) -> Response:
        """End one, and count it as gone at once."""
        identity = request.path_params["identity"]
        edge = wire.edge_of(identity)
        answer = await self._ask(edge, "DELETE", f"/v1/sandboxes/{identity}", project)
        if answer.is_success and (said := answer.json()).get("closed"):
            self.watcher.ledger.closed(edge, said["project"], said["memory"], said["change"])
        return Response(answer.content, answer.status_code, media_type="application/json")

    async def fork(self, request: Request, project: str) -> Response:
        """A fork counts against the quota like any other new sandbox."""
        identity = request.path_params["identity"]
        edge = wire.edge_of(identity)
        parent = await self._ask(edge, "GET", f"/v1/sandboxes/{identity}", project)
        if not parent.is_success:
            return Response(parent.content, parent.status_code, media_type="application/json")
        owner, memory = parent.json()["project"], int(parent.json()["memory"])
        self.book.admit(owner, memory, self.watcher.usage())
        number, made, change = self.watcher.ledger.reserve(owner, memory), None, 0
        try:
            answer = await self._ask(
                edge, "POST", request.url.path, project, await wire.body_of(request.stream(), wire.CREATE_MOST)
            )
            if answer.is_success and "done" in (header := wire.one_frame(answer.content)[0]):
                made, change = edge, header["done"]["change"]
        finally:
            self.watcher.ledger.settle(number, made, change)
        return Response(answer.content, answer.status_code, media_type="application/octet-stream")

    async def _ask(self, edge: str, method: str, path: str, project: str, body: bytes = b"") -> httpx.Response:
        """One short exchange with an edge. Raises EdgeGone."""
        client = self.watcher.client(edge)
        try:
            return await client.request(method, path, content=body, headers={wire.PROJECT: project}, timeout=120.0)
        except httpx.HTTPError as error:
            raise _gone(edge, error) from None

    async def passed_on(self, request: Request, project: str) -> Response:
        """Anything on a sandbox, streamed both ways."""
        edge = wire.edge_of(request.path_params["identity"])
        client = self.watcher.client(edge)
        content = request.stream() if request.method == "POST" else None
        headers = {wire.PROJECT: project}
        try:
            waits = min(float(request.headers.get(wire.TIMEOUT, "120")), 10.0**6)
        except ValueError:
            raise InvalidRequest(f"{wire.TIMEOUT}: give seconds") from None
        if content is not None and "content-length" in request.headers:
            headers["content-length"] = request.headers["content-length"]
        outgoing = client.build_request(request.method, request.url.path, content=content, headers=headers, timeout=waits)
        try:
            answer = await client.send(outgoing, stream=True)
        except httpx.HTTPError as error:
            raise _gone(edge, error) from None

        async def pieces() -> AsyncIterator[bytes]:
            try:
                async for piece in answer.aiter_raw():
                    yield piece
            except httpx.HTTPError as error:  # the last frame is missing, by which the client sees it
                _log.warning("edge %s broke off: %s %s", edge, type(error).__name__, error)
            finally:
                await answer.aclose()

        return StreamingResponse(pieces(), answer.status_code, media_type=answer.headers.get("content-type"))


def _gone(edge: str, error: httpx.HTTPError) -> EdgeGone:
    return EdgeGone(
        f"edge {edge} does not answer ({type(error).__name__}): what was under way may have happened; its sandboxes live on "
        "for a while and are found again when it is started again"
    )
