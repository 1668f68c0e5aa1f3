"""An edge over HTTP: one frame in, frames out. It speaks to gateways that know its secret, or over a Unix socket of its own."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import tempfile
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from nautile.sandbox.archive import pack_tree, unpack_tree
from nautile.sandbox.driver import Terminal, Watch
from nautile.sandbox.errors import AccessDenied, InvalidRequest, SandboxError, SandboxLost
from nautile.sandbox.fleet import wire
from nautile.sandbox.fleet.door import guard
from nautile.sandbox.fleet.edge import Edge, Held, Wish
from nautile.sandbox.recorded import RecordedSession
from nautile.sandbox.records import error_record, result_record
from nautile.sandbox.sandbox import Sandbox

__all__ = ["application"]

_log = logging.getLogger(__name__)
_THREADS = 512  # requests that are carried out at once; the rest wait
_STREAMED = 4 * 2**20  # bytes of output that wait for a slow reader; what is more is left out, the result has head and tail
_LONGEST = 30.0  # seconds that one reading of a session waits


def application(edge: Edge, secret: str | None) -> Starlette:
    """The edge's HTTP interface. ``secret`` None: whoever reaches it may use it, which a Unix socket's mode decides."""
    service = _Service(edge, secret)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(service.every(1.0, edge.maintain))]
        tasks += [asyncio.create_task(service.every(edge.config.orphan / 3, edge.keep_alive))]
        yield
        for task in tasks:
            task.cancel()
        service.threads.shutdown(wait=False, cancel_futures=True)

    routes = [
        Route("/v1/status", guard(service.trusted, service.status)),
        Route("/v1/logs/{name:path}", guard(service.project, service.log)),
        Route("/v1/sandboxes", guard(service.project, service.create), methods=["POST"]),
        Route("/v1/sandboxes", guard(service.project, service.listing), methods=["GET"]),
        Route("/v1/sandboxes/{identity}", guard(service.project, service.describe), methods=["GET"]),
        Route("/v1/sandboxes/{identity}", guard(service.project, service.close), methods=["DELETE"]),
        Route("/v1/sandboxes/{identity}/{op}", guard(service.project, service.operate), methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


class _Service:
    def __init__(self, edge: Edge, secret: str | None) -> None:
        self.edge, self.secret = edge, secret
        self.threads = ThreadPoolExecutor(_THREADS, "edge")

    def trusted(self, request: Request) -> None:
        """Whether it comes from a gateway that knows the secret. Raises AccessDenied."""
        given = request.headers.get(wire.SECRET, "")
        if self.secret is not None and not hmac.compare_digest(given.encode(), self.secret.encode()):
            raise AccessDenied("this edge serves gateways that know its secret; ask a gateway")

    def project(self, request: Request) -> str:
        """Whom the gateway has found the token to belong to. Raises AccessDenied."""
        self.trusted(request)
        found = request.headers.get(wire.PROJECT)
        if not found:
            raise AccessDenied("the request names no project; ask a gateway")
        return found

    async def every(self, seconds: float, action: Callable[[], None]) -> None:
        """Until cancelled; what fails is logged and tried again."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.thread(action)
            except Exception:
                _log.exception("maintenance")

    async def thread(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Carry out something that waits, beside the loop."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, action, *arguments)

    async def status(self, _: Request, __: None) -> Response:
        """What gateways place by."""
        return JSONResponse(await self.thread(self.edge.status))

    async def log(self, request: Request, project: str) -> Response:
        """Whether a trajectory of this name is here."""
        here = await self.thread(self.edge.has_log, project, request.path_params["name"])
        return JSONResponse({"here": here})

    async def create(self, request: Request, project: str) -> Response:
        """A new sandbox, or the one of a log's name."""
        header, _ = wire.one_frame(await wire.body_of(request.stream(), wire.CREATE_MOST))
        wish = Wish.of(project, header, self.edge.config)
        return JSONResponse(await self.thread(self.edge.create, wish))

    async def listing(self, _: Request, project: str) -> Response:
        """The project's sandboxes."""
        return JSONResponse({"sandboxes": await self.thread(self.edge.listing, project)})

    async def describe(self, request: Request, project: str) -> Response:
        """One sandbox."""
        held = self.edge.find(request.path_params["identity"], project)
        return JSONResponse(self.edge.describe(held))

    async def close(self, request: Request, project: str) -> Response:
        """End one."""
        return JSONResponse(await self.thread(self.edge.close, request.path_params["identity"], project))

    async def operate(self, request: Request, project: str) -> Response:
        """One operation; its answer is the last frame, before it there may be pieces of output."""
        held, sandbox = self.edge.living(request.path_params["identity"], project)
        header, body = wire.one_frame(await wire.body_of(request.stream()))
        operation = _Operation(self.edge, held, sandbox, request.path_params["op"], header, body)
        if not header.get("watch"):
            return Response(await self.thread(operation.answer, None), media_type="application/octet-stream")
        return StreamingResponse(self._streamed(operation), media_type="application/octet-stream")

    async def _streamed(self, operation: _Operation) -> AsyncIterator[bytes]:
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[bytes]()
        waiting = 0  # touched by the loop's thread only

        def put(frame: bytes) -> None:
            nonlocal waiting
            if waiting + len(frame) <= _STREAMED:  # nobody waits for a reader that does not read
                waiting += len(frame)
                pieces.put_nowait(frame)

        def watch(stream: str, data: bytes) -> None:
            loop.call_soon_threadsafe(put, wire.pack({"stream": stream}, bytes(data)))

        answer = asyncio.ensure_future(self.thread(operation.answer, watch))
        while not answer.done() or not pieces.empty():
            getter = asyncio.ensure_future(pieces.get())
            await asyncio.wait([answer, getter], return_when=asyncio.FIRST_COMPLETED)
            if not getter.done():
                getter.cancel()
                continue
            frame = getter.result()
            waiting -= len(frame)
            yield frame
        yield answer.result()


class _Operation:
    """One request on one sandbox, carried out in a thread. What a client sends is checked again: it may be anybody's."""

    def __init__(self, edge: Edge, held: Held, sandbox: Sandbox, op: str, header: dict[str, Any], body: bytes) -> None:
        self.edge, self.held, self.sandbox, self.op, self.header, self.body = edge, held, sandbox, op, header, body

    def answer(self, watch: Watch | None) -> bytes:
        """The last frame. An error of the operation is one too: the log's next position comes with it."""
        action = getattr(self, f"do_{self.op}", None)
        if action is None:
            return wire.pack(error_record(InvalidRequest(f"{self.op[:40]!r} is no operation of a sandbox")))
        with self.edge.working(self.held):
            try:
                return self._carried_out(lambda: action(watch) if self.op == "run" else action())
            except SandboxError as error:
                return wire.pack({**error_record(error), **self._position()})
            except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
                _log.exception("operation %s", self.op)
                return wire.pack({**error_record(error), **self._position()})

    def _carried_out(self, action: Callable[[], tuple[dict[str, Any], bytes]]) -> bytes:
        recorded = self.held.recorded
        if recorded is None:
            header, body = action()
            return wire.pack({"done": header}, body)
        with self.held.lock:  # a client that asks again while the first request is under way waits for its result
            sequence, client = self.header.get("sequence"), self.header.get("client")
            if not isinstance(sequence, int) or not isinstance(client, int):
                raise InvalidRequest("an operation of a recorded sandbox names its client and its sequence number")
            recorded.log.seek(sequence, client)
            header, body = action()
            return wire.pack({"done": header, **self._position()}, body)

    def _position(self) -> dict[str, int]:
        recorded = self.held.recorded
        return {} if recorded is None else {"position": recorded.log.position}

    def _path(self) -> str:
        path = self.header["path"]
        return path if path.startswith("/") else f"/{path}"  # clients send steps from the root

    def do_run(self, watch: Watch | None) -> tuple[dict[str, Any], bytes]:
        """A command, or for a function sandbox a program."""
        given = self.header
        timeout, python = float(given["timeout"]), given.get("python")
        if python is not None:
            result = self.sandbox.python(python, given["argv"], timeout=timeout, stdin=self.body)
        else:
            result = self.sandbox.run(
                given["argv"],
                timeout,
                self.body,
                cwd=given.get("cwd"),
                env=given.get("environment"),
                on_output=watch,
                idempotent=bool(given.get("idempotent")),
            )
        return result_record(result)

    def do_read(self) -> tuple[dict[str, Any], bytes]:
        """A file."""
        return {}, self.sandbox.read(self._path(), limit=min(int(self.header["limit"]), wire.TRANSFER_MOST))

    def do_write(self) -> tuple[dict[str, Any], bytes]:
        """A file."""
        self.sandbox.write(self._path(), self.body, mode=int(self.header["mode"]))
        return {}, b""

    def do_list(self) -> tuple[dict[str, Any], bytes]:
        """A directory."""
        return {"entries": [vars(entry) for entry in self.sandbox.list(self._path())]}, b""

    def do_upload(self) -> tuple[dict[str, Any], bytes]:
        """Files, as a tar of plain files and directories."""
        with tempfile.TemporaryDirectory(prefix="nautile-edge-") as scratch:
            unpack_tree(self.body, Path(scratch, "tree"))
            self.sandbox.upload(Path(scratch, "tree"), self._path())
        return {}, b""

    def do_download(self) -> tuple[dict[str, Any], bytes]:
        """Files, as such a tar."""
        with tempfile.TemporaryDirectory(prefix="nautile-edge-") as scratch:
            target = Path(scratch, "tree")
            self.sandbox.download(self._path(), target, limit=min(int(self.header["limit"]), wire.TRANSFER_MOST))
            tree = pack_tree(target, wire.TRANSFER_MOST)
        if tree is None:
            raise InvalidRequest(
                f"more than {wire.TRANSFER_MOST:,} bytes do not fit into one download of a fleet: fetch parts of it"
            )
        return {}, tree

    def do_pack_diff(self) -> tuple[dict[str, Any], bytes]:
        """What changed, as a layer."""
        with tempfile.TemporaryDirectory(prefix="nautile-edge-") as scratch:
            target = Path(scratch, "diff.tar")
            digest = self.sandbox.pack_diff(target)
            if target.stat().st_size > wire.TRANSFER_MOST:
                raise InvalidRequest(
                    f"a difference of more than {wire.TRANSFER_MOST:,} bytes does not fit into one answer of a fleet"
                )
            return {"digest": digest}, target.read_bytes()

    def do_pause(self) -> tuple[dict[str, Any], bytes]:
        """Stop."""
        self.sandbox.pause()
        return {}, b""

    def do_resume(self) -> tuple[dict[str, Any], bytes]:
        """Continue."""
        self.sandbox.resume()
        return {}, b""

    def do_policy(self) -> tuple[dict[str, Any], bytes]:
        """Change which hosts may be reached."""
        self.sandbox.set_policy(self.header["rules"] or None)
        return {}, b""

    def do_snapshot(self) -> tuple[dict[str, Any], bytes]:
        """An image that this edge keeps; its name."""
        return {"image": self.edge.add_image(self.held, self.sandbox.snapshot())}, b""

    def do_fork(self) -> tuple[dict[str, Any], bytes]:
        """Another sandbox of this edge."""
        return self.edge.add_fork(self.held, self.sandbox.fork()), b""

    # -- sessions: the edge holds the terminal, so that they outlive their client and any gateway

    def do_session(self) -> tuple[dict[str, Any], bytes]:
        """Begin one."""
        terminal = self.sandbox.session(self.header["argv"], pty=bool(self.header["pty"]))
        if isinstance(terminal, RecordedSession):
            return {"session": terminal.number}, b""
        with self.held.lock:
            number = max(self.held.terminals, default=0) + 1
            self.held.terminals[number] = terminal
        return {"session": number}, b""

    def _terminal(self) -> Terminal:
        number, recorded = int(self.header["session"]), self.held.recorded
        if recorded is not None:
            return RecordedSession(recorded, number)
        if number not in self.held.terminals:
            raise SandboxLost(
                f"the sandbox has no session {number}: it was closed, or its edge was started again; open another"
            )
        return self.held.terminals[number]

    def do_session_send(self) -> tuple[dict[str, Any], bytes]:
        """Type."""
        self._terminal().send(self.body)
        return {}, b""

    def do_session_read(self) -> tuple[dict[str, Any], bytes]:
        """What has been written."""
        return {}, self._terminal().read(min(float(self.header["timeout"]), _LONGEST))

    def do_session_until(self) -> tuple[dict[str, Any], bytes]:
        """Wait for a text."""
        return {}, self._terminal().until(self.header["text"], float(self.header["timeout"])).encode()

    def do_session_close(self) -> tuple[dict[str, Any], bytes]:
        """Kill it."""
        code = self._terminal().close()
        self.held.terminals.pop(int(self.header["session"]), None)
        return {"exit_code": code}, b""
