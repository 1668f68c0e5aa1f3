"""/v1/sessions: named states that outlive the server, fork, rewind and move. Each key has sessions of its own.

    GET    /v1/sessions                      all of the caller's
    GET    /v1/sessions/NAME                 one
    PUT    /v1/sessions/NAME                 {"prompt": text or ids, "note"}: take it in and save
    POST   /v1/sessions/NAME/resume          {"prompt": more, "max_tokens", sampling fields, "save": true}: go on
    POST   /v1/sessions/NAME/fork            {"name": new}
    POST   /v1/sessions/NAME/rewind          {"length": tokens, "name": new or absent}
    GET    /v1/sessions/NAME/export          the file that import takes
    POST   /v1/sessions/import?name=NAME     the file as the body
    DELETE /v1/sessions/NAME

An answer with status 200 means: it is on the disk.
"""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, Field
from starlette.background import BackgroundTask

from nautile.engine.engine import EngineError
from nautile.engine.request import EngineStoppedError, Finished, RequestError, TokenSampled
from nautile.engine.request import Request as EngineRequest
from nautile.engine.sessions import EngineSessions
from nautile.server.chat_request import Model, Sampled, checked, sampling_of
from nautile.server.errors import ApiError, invalid
from nautile.server.generation import ended, refused
from nautile.server.intake import caller, read_body, read_json, service_of
from nautile.server.prompt import fits
from nautile.server.service import Service
from nautile.server.sse import while_connected
from nautile.state import PoolFull, SessionConflict, SessionError, StoreError, StoreUnavailable

__all__ = ["router"]

_DEFAULT_TOKENS = 256
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {  # options of completions that are not had here, and when they ask for nothing
    "stop": (None, []),
    "n": (None, 1),
    "stream": (None, False),
    "stream_options": (None,),
}
_Result = TypeVar("_Result")
_Prompt = str | list[Annotated[int, Field(ge=0, lt=2**31)]]
router = APIRouter(prefix="/v1/sessions")


class Begin(BaseModel):
    """What a session begins with. Text begins with the beginning of sentence; ids are taken as they are."""

    prompt: _Prompt
    note: Annotated[str, Field(max_length=1000)] | None = None


class Resume(Sampled):
    """How a session goes on. ``save``: its new end replaces the old one."""

    prompt: _Prompt = ""
    save: bool = True


class Fork(BaseModel):
    """A new session that is where this one is."""

    name: str


class Rewind(BaseModel):
    """How many tokens stay; with a name, in a new session."""

    length: int
    name: str | None = None


@router.get("")
async def everything(request: Request) -> JSONResponse:
    """The caller's sessions."""
    store = _sessions(request).store(caller(request)[0])
    infos = await _done(store.list, service_of(request))
    return JSONResponse({"object": "list", "data": [dataclasses.asdict(info) for info in infos]})


@router.get("/{name}")
async def one(name: str, request: Request) -> JSONResponse:
    """One session."""
    store = _sessions(request).store(caller(request)[0])
    return JSONResponse(dataclasses.asdict(await _done(lambda: store.info(name), service_of(request))))


@router.put("/{name}")
async def save(name: str, request: Request) -> JSONResponse:
    """Take in a prompt and save."""
    wanted, service = _wanted(Begin, await read_json(request)), service_of(request)
    ids = _ids(request, wanted.prompt, first=True)
    fits(len(ids), service)
    sessions, partition = _sessions(request), caller(request)[0]
    with service.admitted(partition):
        info = await _done(lambda: sessions.save(name, ids, partition, wanted.note), service)
    return JSONResponse(dataclasses.asdict(info))


@router.post("/{name}/resume")
async def resume(name: str, request: Request) -> JSONResponse:
    """Go on: more text, then the model's continuation."""
    wanted = _wanted(Resume, await read_json(request))
    with service_of(request).admitted(caller(request)[0]):  # until the new end is saved: a server that is leaving waits for it
        return JSONResponse(await _resumed(name, wanted, request))


async def _resumed(name: str, wanted: Resume, request: Request) -> dict[str, Any]:
    sessions, service, (partition, request_id) = _sessions(request), service_of(request), caller(request)
    info, before = await _done(lambda: sessions.load(name, partition), service)
    prompt = (*before, *_ids(request, wanted.prompt, first=False))
    most = min(wanted.max_tokens or _DEFAULT_TOKENS, fits(len(prompt), service))
    sampling = dataclasses.replace(sampling_of(wanted, service), max_tokens=most)
    order = EngineRequest(prompt, sampling, id=request_id, partition=partition)
    new, finished = await while_connected(request, _generate(service, order))
    kept = new[:-1] if new and new[-1] == service.engine.config.eos_token_id else new  # the end stays out of the timeline
    if wanted.save:
        info = await _done(lambda: sessions.save(name, (*prompt, *kept), partition, revision=info.revision), service)
    usage = {
        "prompt_tokens": finished.usage.prompt_tokens,
        "cached_tokens": finished.usage.cached_tokens,
        "completion_tokens": finished.usage.completion_tokens,
    }
    text, session = service.tokenizer.decode(kept), dataclasses.asdict(info)
    return {"text": text, "ids": kept, "finish_reason": finished.reason, "usage": usage, "session": session}


@router.post("/{name}/fork")
async def fork(name: str, request: Request) -> JSONResponse:
    """A second session that is where this one is."""
    wanted = _wanted(Fork, await read_json(request))
    store = _sessions(request).store(caller(request)[0])
    return JSONResponse(dataclasses.asdict(await _done(lambda: store.fork(name, wanted.name), service_of(request))))


@router.post("/{name}/rewind")
async def rewind(name: str, request: Request) -> JSONResponse:
    """Back to fewer tokens."""
    wanted = _wanted(Rewind, await read_json(request))
    store = _sessions(request).store(caller(request)[0])
    return JSONResponse(
        dataclasses.asdict(await _done(lambda: store.rewind(name, wanted.length, wanted.name), service_of(request)))
    )


@router.delete("/{name}")
async def delete(name: str, request: Request) -> JSONResponse:
    """Remove a session."""
    store = _sessions(request).store(caller(request)[0])
    await _done(lambda: store.delete(name), service_of(request))
    return JSONResponse({"name": name, "deleted": True})


@router.get("/{name}/export")
async def export(name: str, request: Request) -> Response:
    """One file with all of a session."""
    store, path = _sessions(request).store(caller(request)[0]), _temporary()
    try:
        await _done(lambda: store.export(name, path), service_of(request))
    except ApiError:
        path.unlink(missing_ok=True)
        raise
    return FileResponse(path, filename=f"{name}.nautile", background=BackgroundTask(path.unlink, missing_ok=True))


@router.post("/import")
async def import_(request: Request, name: str | None = None) -> JSONResponse:
    """Take up an exported session."""
    store, path = _sessions(request).store(caller(request)[0]), _temporary()
    try:
        body = await read_body(request)
        await asyncio.to_thread(path.write_bytes, body)
        return JSONResponse(dataclasses.asdict(await _done(lambda: store.import_(path, name), service_of(request))))
    finally:
        path.unlink(missing_ok=True)


async def _generate(service: Service, order: EngineRequest) -> tuple[list[int], Finished]:
    """The tokens of a turn that ended by itself. Raises ApiError for any other, so that half a turn is never saved."""
    tokens = list[int]()
    try:
        async for event in service.engine.submit(order):
            if isinstance(event, TokenSampled):
                tokens.append(event.token)
            elif isinstance(event, Finished):
                ended(event)
                return tokens, event
    except RequestError as error:
        raise refused(error, service) from None
    raise ApiError(500, "the engine ended the request without a result; send it again")


def _wanted(kind: type[Model], body: Mapping[str, Any]) -> Model:
    """The body as a request of one kind, with nothing in it that would be passed over in silence. Raises ApiError."""
    taken = [name for name in kind.model_fields if name not in _WITHOUT_EFFECT]
    for name, value in body.items():
        if name not in taken and not any(value is none or value == none for none in _WITHOUT_EFFECT.get(name, ())):
            raise invalid(f"{name[:100]} cannot be asked for here; this endpoint takes {', '.join(taken)}", name[:100])
    return checked(kind, body)


def _sessions(request: Request) -> EngineSessions:
    service = service_of(request)
    found = service.sessions
    if found is None:
        raise ApiError(404, "this server keeps no sessions: start it with --sessions DIRECTORY")
    if service.draining:
        raise ApiError(503, "the server is shutting down: send the request again in a moment", retry_after=5)
    return found


def _ids(request: Request, prompt: str | list[int], first: bool) -> tuple[int, ...]:
    service = service_of(request)
    if isinstance(prompt, list):
        return tuple(prompt)
    ids = tuple(service.tokenizer.encode(prompt))
    return (service.engine.config.bos_token_id, *ids) if first else ids


async def _done(action: Callable[[], _Result], service: Service) -> _Result:
    """The result of something that blocks, with its errors as the API's. Raises ApiError."""
    try:
        return await asyncio.to_thread(action)
    except SessionConflict as error:
        raise ApiError(503, str(error), retry_after=1) from None
    except SessionError as error:
        missing = "there is no session" in str(error)
        raise ApiError(404 if missing else 400, str(error)) from None
    except EngineStoppedError as error:
        raise refused(error, service) from None
    except EngineError as error:
        raise ApiError(500, str(error)) from None
    except (StoreError, RequestError) as error:
        raise ApiError(400, str(error)) from None
    except PoolFull as error:
        raise ApiError(503, f"the engine is full: {error}", retry_after=2) from None
    except StoreUnavailable as error:
        raise ApiError(503, str(error.strerror or error)) from None


def _temporary() -> Path:
    """A private file that is in nobody's way."""
    with tempfile.NamedTemporaryFile(prefix="nautile-session-", delete=False) as file:
        return Path(file.name)
