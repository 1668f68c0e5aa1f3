"""Sessions: named timelines on disk that survive a restart, fork, rewind, and move between machines.

A directory holds one small file a session (its tokens, the state after the last snapshot, the tail, the logits of the next
token) and, shared between sessions that begin alike, one file for every k tokens before that. A fork costs one small file.
When ``save`` returns, the session is on the disk: node files first, then the session's own by rename. A lock on the
directory keeps writers apart; readers need none, because files only appear and vanish whole.

Listing, forking, rewinding and moving need no model. ``docs/state.md`` describes the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nautile.state.files import StateFile, StoreError, StoreUnavailable, read_header, sync_directory, write_file
from nautile.state.pages import PoolError, Sequence
from nautile.state.pool import Part, StatePool
from nautile.state.session_file import (
    SessionContents,
    check_fields,
    node_layout,
    read_contents,
    read_span,
    sections,
    spans,
)
from nautile.state.store import NodeName, NodeStore, check_layout, layout

__all__ = ["Captured", "CapturedStep", "Fetched", "Resumed", "SessionConflict", "SessionError", "SessionInfo", "SessionStore"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SUFFIX = ".session"
_LOCK_SECONDS = 10.0


class SessionError(ValueError):
    """There is no such session, its name is taken or impossible, or it belongs to another model; the text says which."""


class SessionConflict(SessionError):  # noqa: N818  # says what has happened
    """Somebody else saved the session since it was read, or holds the directory's lock."""


@dataclass(frozen=True)
class SessionInfo:
    """What a session's file says. ``state_length`` of the ``length`` tokens have state; the rest is computed on resuming.

    ``snapshots`` are the lengths that can be rewound to without computing. ``problem`` says why a file cannot be used.
    """

    name: str
    length: int = 0
    state_length: int = 0
    revision: int = 0
    created: str = ""
    updated: str = ""
    note: str = ""
    forked_from: str | None = None
    model: str = ""
    bytes: int = 0
    snapshots: tuple[int, ...] = ()
    has_logits: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class Resumed:
    """A live sequence. ``pending`` tokens are still to be fed; ``logits`` [V] of the next token when there are none."""

    sequence: Sequence
    pending: tuple[int, ...]
    logits: Tensor | None
    info: SessionInfo


@dataclass(frozen=True)
class CapturedStep:
    """One step of a session to be saved; without ``history`` its file is there already."""

    name: NodeName
    has_tail: bool
    history: Tensor | None = None
    tail: Tensor | None = None


@dataclass(frozen=True)
class Captured:
    """What ``put`` writes: copies, so that the sequence may go on meanwhile."""

    contents: SessionContents
    steps: tuple[CapturedStep, ...]


@dataclass(frozen=True)
class Fetched:
    """What ``start`` puts into a pool: copies of the files' sections."""

    info: SessionInfo
    contents: SessionContents
    parts: tuple[Part, ...]


class SessionStore:
    """The sessions of one directory."""

    def __init__(self, directory: Path, report: Callable[[str], None] | None = None) -> None:
        """``report`` is told of every step that was found damaged and set aside; without it that is a warning.

        Raises StoreUnavailable when the directory cannot be made.
        """
        self.directory, self.nodes, self.report = Path(directory), Path(directory) / "nodes", report or _warn
        try:
            self.nodes.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StoreUnavailable(error.errno, f"cannot use {directory} for sessions: {error.strerror}") from error

    # Looking ------------------------------------------------------------------------------------------------------

    def list(self) -> list[SessionInfo]:
        """Every session, by name; damaged ones with their ``problem``."""
        return [self._info_or_problem(path.name.removesuffix(_SUFFIX)) for path in sorted(self.directory.glob(f"*{_SUFFIX}"))]

    def info(self, name: str) -> SessionInfo:
        """Raises SessionError when there is none of that name, StoreError when its file is damaged."""
        path = self._path(name)
        try:
            header = read_header(path)
        except FileNotFoundError:
            raise SessionError(self._missing(name)) from None
        check_fields(path, header)
        return _info(name, header)

    def check_name(self, name: str) -> None:
        """Raises SessionError when no session can be called that."""
        self._path(name)

    # Live sequences -----------------------------------------------------------------------------------------------

    def save(
        self,
        name: str,
        pool: StatePool,
        sequence: Sequence,
        logits: Tensor | None = None,
        *,
        note: str | None = None,
        revision: int | None = None,
    ) -> SessionInfo:
        """Put the state of a sequence on the disk under a name, in place of what the name stood for. It is safe on return.

        ``logits`` [V] of the next token let a resumed session go on without computing anything. ``revision``: of the session
        that is continued (0: a new one); raises SessionConflict when somebody else has saved it meanwhile. Raises SessionError
        for an empty sequence or an impossible name, StoreUnavailable when the disk refuses: the old session stays then.
        """
        self._path(name)
        return self.put(name, self.capture(pool, sequence, logits), note=note, revision=revision)

    def capture(self, pool: StatePool, sequence: Sequence, logits: Tensor | None = None) -> Captured:
        """The first half of ``save``, which needs the pool: copies what is not on the disk yet, and writes nothing.

        Raises SessionError for an empty sequence.
        """
        if not sequence.length:
            raise SessionError("an empty sequence has no state to save")
        if not pool.fingerprint:
            raise SessionError("saving needs a pool that knows its model's fingerprint")
        k = pool.options.snapshot_every
        count = (sequence.length - 1) // k
        fields = {
            **layout(pool.pages, pool.fingerprint, pool.computed_by),
            "snapshot_every": k,
            "length": sequence.length,
            "state_length": sequence.length,
            "spans": count,
        }
        store = NodeStore(self.nodes, node_layout(fields))
        steps = tuple(self._captured(pool, sequence, span, store) for span in spans(tuple(sequence.ids), count, k))
        history = pool.read_history(sequence, count * k, sequence.length)
        return Captured(SessionContents(fields, tuple(sequence.ids), history, pool.read_tail(sequence), logits), steps)

    def put(self, name: str, captured: Captured, *, note: str | None = None, revision: int | None = None) -> SessionInfo:
        """The second half of ``save``: it is on the disk on return. Raises as ``save``; SessionConflict, too, when another
        process has removed files meanwhile that were counted upon: capture again."""
        path, contents = self._path(name), captured.contents
        with self._lock():
            old = self._old(path)
            if revision is not None and revision != (old["revision"] if old else 0):
                raise SessionConflict(f"session {name!r} is at revision {old['revision'] if old else 0}, not {revision}")
            fields = {
                **contents.fields,
                **_dates(old),
                "revision": (old["revision"] if old else 0) + 1,
                "note": note if note is not None else (old["note"] if old else ""),
                "forked_from": old["forked_from"] if old else None,
            }
            with self._all_or_nothing():
                fields["snapshots"] = self._write_steps(captured)
                return self._write(name, _replace(contents, fields))

    def resume(self, name: str, pool: StatePool, partition: str = "") -> Resumed:
        """A live sequence that is where the session was, in a partition of the pool.

        Parts that are damaged are reported, set aside and come back as ``pending`` tokens to be computed. Raises SessionError
        for an unknown name or a session of another model, StoreError for a damaged file, PoolFull.
        """
        return self.start(self.fetch(name, pool), pool, partition)

    def fetch(self, name: str, pool: StatePool) -> Fetched:
        """The first half of ``resume``: reads and checks everything for such a pool, which it does not touch."""
        info, contents = self.info(name), self._read(name)
        self._check_model(name, contents.fields, pool)
        store, parts = self._steps(contents), list[Part]()
        try:
            for span in contents.spans:
                parts.append(Part(span.length, *store.find(span.digest)))
            if contents.tail is not None:
                parts.append(Part(contents.fields["state_length"], contents.history, contents.tail))
        except StoreError as error:
            self.report(f"session {name!r}: {error}")
        return Fetched(info, contents, tuple(parts))

    def start(self, fetched: Fetched, pool: StatePool, partition: str = "") -> Resumed:
        """The second half of ``resume``, which changes the pool. Raises PoolFull, StoreError for state of wrong sizes."""
        contents = fetched.contents
        try:
            sequence = pool.load(contents.ids, fetched.parts, partition)
        except PoolError as error:
            raise StoreError(f"{self._path(fetched.info.name)} is not as a session is written: {error}") from None
        pending = contents.ids[sequence.length :]
        return Resumed(sequence, pending, None if pending else contents.logits, fetched.info)

    # Timelines ----------------------------------------------------------------------------------------------------

    def fork(self, name: str, new: str) -> SessionInfo:
        """A second session that is where this one is; from here on they are independent. Raises SessionError."""
        with self._lock():
            contents = self._read(name)
            self._check_free(new)
            fields = {**contents.fields, **_dates(None), "revision": 1, "forked_from": name}
            return self._write(new, _replace(contents, fields=fields))

    def rewind(self, name: str, length: int, new: str | None = None) -> SessionInfo:
        """Go back to the first ``length`` tokens (as ``new``, if given: then the session itself stays as it is).

        Fewer than k tokens have to be computed again on resuming, as long as every snapshot was saved. Raises SessionError.
        """
        with self._lock():
            contents = self._read(name)
            if not 1 <= length <= contents.fields["length"]:
                raise SessionError(
                    f"session {name!r} has {contents.fields['length']} tokens: rewind to 1 .. that, not {length}"
                )
            if new is not None:
                self._check_free(new)
            fields = {**contents.fields, "revision": contents.fields["revision"] + 1, **_dates(contents.fields)}
            if new is not None:
                fields |= {**_dates(None), "revision": 1, "forked_from": name}
            back = self._back_to(name, contents, length)
            info = self._write(new or name, _replace(back, fields={**fields, **_moved(back.fields)}))
            self._collect()
            return info

    def delete(self, name: str) -> None:
        """Remove a session, and node files that no other session needs. Raises SessionError."""
        with self._lock():
            path = self._path(name)
            if not path.exists():
                raise SessionError(self._missing(name))
            path.unlink()
            sync_directory(self.directory)
            self._collect()

    # Moving -------------------------------------------------------------------------------------------------------

    def export(self, name: str, target: Path) -> int:
        """Write all of a session into one file that ``import_`` reads anywhere; gives its size.

        Raises SessionError, StoreError when a part is damaged (resuming and saving the session computes it again),
        StoreUnavailable.
        """
        contents = self._read(name)
        store, parts = self._steps(contents), sections(contents)
        for index, span in enumerate(contents.spans):
            try:
                history, tail = store.find(span.digest)
            except StoreError as error:
                cure = f"nautile session resume {name} --max-tokens 0"
                raise StoreError(f"{error}: `{cure}` does that, then export again") from None
            parts[f"span/{index}/history"] = history
            if tail is not None:
                parts[f"span/{index}/tail"] = tail
        return write_file(target, "session-export", {**contents.fields, "name": name}, parts)

    def import_(self, source: Path, name: str | None = None) -> SessionInfo:
        """Take up an exported session, under its own name or another. Every byte is checked before anything is written.

        Raises SessionError when the name is taken, StoreError when the file is damaged or something else.
        """
        try:
            with StateFile(source) as file:
                if file.header["kind"] != "session-export":
                    raise StoreError(f"{source} is no exported session (it is a {file.header['kind']} file)")
                contents = read_contents(file)
                parts = [read_span(file, index, contents.fields) for index in range(contents.fields["spans"])]
                own = str(file.header.get("name"))
        except FileNotFoundError:
            raise SessionError(f"{source} does not exist") from None
        name = name or own
        with self._lock():
            self._check_free(name)
            store = self._steps(contents)
            with self._all_or_nothing():
                for span, (history, tail) in zip(contents.spans, parts, strict=True):
                    if not store.has(span.digest, tail is not None):
                        store.write(span, history, tail)
                return self._write(name, _replace(contents, fields={**contents.fields, "revision": 1}))

    # Parts --------------------------------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise SessionError(f"{name!r} is no name for a session: letters, digits, '.', '_' and '-', at most 100")
        return self.directory / (name + _SUFFIX)

    def _missing(self, name: str) -> str:
        names = sorted(path.name.removesuffix(_SUFFIX) for path in self.directory.glob(f"*{_SUFFIX}"))
        return f"there is no session {name!r}; there {'is' if len(names) == 1 else 'are'} {', '.join(names) or 'none'}"

    def _check_free(self, name: str) -> None:
        if self._path(name).exists():
            raise SessionError(f"there is a session {name!r} already: choose another name or delete it first")

    def _check_model(self, name: str, fields: Mapping[str, Any], pool: StatePool) -> None:
        wanted = layout(pool.pages, pool.fingerprint)
        del wanted["computed_by"]  # a session moves between machines: it goes on from the values that it has
        if fields["model"] != wanted["model"]:
            raise SessionError(f"session {name!r} belongs to another model: its state means nothing to this one")
        try:
            check_layout(self._path(name), fields, wanted)
        except StoreError as error:
            raise SessionError(f"{error}; use a pool with these options") from None

    def _info_or_problem(self, name: str) -> SessionInfo:
        try:
            return self.info(name)
        except (SessionError, StoreError, OSError) as error:
            return SessionInfo(name, problem=str(error))

    def _old(self, path: Path) -> dict[str, Any] | None:
        """Header of the file that a save replaces; a damaged one is moved aside, never overwritten."""
        try:
            return read_header(path)
        except FileNotFoundError:
            return None
        except StoreError:
            path.replace(path.with_name(path.name + ".bad"))
            return None

    def _read(self, name: str) -> SessionContents:
        path = self._path(name)
        try:
            with StateFile(path) as file:
                if file.header["kind"] != "session":
                    raise StoreError(f"{path} is no session (it is a {file.header['kind']} file)")
                return read_contents(file)
        except FileNotFoundError:
            raise SessionError(self._missing(name)) from None

    def _steps(self, contents: SessionContents) -> NodeStore:
        """Where the steps of a session are."""
        return NodeStore(self.nodes, node_layout(contents.fields))

    def _write(self, name: str, contents: SessionContents) -> SessionInfo:
        parts = sections(contents)
        size = write_file(self._path(name), "session", {**contents.fields, "name": name}, parts)
        return _info(name, {**contents.fields, "file_bytes": size, "sections": [{"name": key} for key in parts]})

    def _captured(self, pool: StatePool, sequence: Sequence, span: NodeName, store: NodeStore) -> CapturedStep:
        """One step, as far as the disk lacks it."""
        if store.has(span.digest, with_tail=True):
            return CapturedStep(span, has_tail=True)
        tail = pool.snapshot(sequence, span.length)
        if tail is None and store.has(span.digest, with_tail=False):
            return CapturedStep(span, has_tail=False)
        history = pool.read_history(sequence, span.length - pool.options.snapshot_every, span.length)
        return CapturedStep(span, tail is not None, history, tail)

    def _write_steps(self, captured: Captured) -> Many[int]:
        """Node files of the steps that are not there yet; gives the lengths that have a tail."""
        store = self._steps(captured.contents)
        for step in captured.steps:
            if step.history is not None:
                store.write(step.name, step.history, step.tail)
            elif not store.has(step.name.digest, step.has_tail):
                raise SessionConflict(f"another process has removed steps in {self.nodes}: try again")
        return [step.name.length for step in captured.steps if step.has_tail]

    def _back_to(self, name: str, contents: SessionContents, length: int) -> SessionContents:
        """The last snapshot at or before ``length`` that can be read, and the tokens up to there to be computed again."""
        if length >= contents.fields["state_length"]:
            logits = contents.logits if length == contents.fields["length"] else None
            return SessionContents(
                {**contents.fields, "length": length}, contents.ids[:length], contents.history, contents.tail, logits
            )
        k, store, steps = contents.fields["snapshot_every"], self._steps(contents), contents.spans
        known = [at for at in contents.fields["snapshots"] if at <= length]
        base, history, tail = 0, torch.empty(0, contents.fields["block_bytes"], dtype=torch.uint8), None
        for at in reversed(known):
            try:
                (history, tail), base = store.find(steps[at // k - 1].digest), at
                break
            except StoreError as error:
                self.report(f"session {name!r}: {error}")
        before = max(0, base // k - 1)
        kept = [at for at in known if at <= before * k]
        fields = {**contents.fields, "length": length, "state_length": base, "spans": before, "snapshots": kept}
        return SessionContents(fields, contents.ids[:length], history, tail, None)

    def _collect(self) -> None:
        """Remove node files that no session refers to. While a session cannot be read, nothing is removed."""
        needed = set[Path]()
        for path in self.directory.glob(f"*{_SUFFIX}"):
            try:
                contents = self._read(path.name.removesuffix(_SUFFIX))
            except (StoreError, SessionError, OSError):
                return
            store = self._steps(contents)
            for span in contents.spans:
                needed |= {store.path(span.digest), store.old_path(span.digest)}
        for path in self.nodes.glob("*.node"):
            if path not in needed:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """When the disk refuses a session, nodes that only it would have needed go too: they would fill the disk for good."""
        try:
            yield
        except StoreUnavailable:
            with contextlib.suppress(OSError):
                self._collect()
            raise

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One writer at a time, in this process and others. Raises SessionConflict after ten seconds."""
        try:
            file = (self.directory / ".lock").open("a")
        except OSError as error:
            raise StoreUnavailable(error.errno, f"cannot write in {self.directory}: {error.strerror}") from error
        with file:
            deadline = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise SessionConflict(f"{self.directory} is locked by another process: try again") from None
                    time.sleep(0.01)
            for left in (*self.directory.glob(".*.tmp"), *self.nodes.glob(".*.tmp")):
                left.unlink(missing_ok=True)  # of a writer that was killed: nobody else writes now
            yield


def _info(name: str, header: Mapping[str, Any]) -> SessionInfo:
    return SessionInfo(
        name=name,
        length=header["length"],
        state_length=header["state_length"],
        revision=header["revision"],
        created=header["created"],
        updated=header["updated"],
        note=header["note"],
        forked_from=header["forked_from"],
        model=header["model"],
        bytes=header["file_bytes"],
        snapshots=tuple(header["snapshots"]),
        has_logits=any(part["name"] == "logits" for part in header["sections"]),
    )


def _dates(old: Mapping[str, Any] | None) -> dict[str, str]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"created": old["created"] if old else now, "updated": now}


def _moved(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: fields[key] for key in ("length", "state_length", "spans", "snapshots")}


def _replace(contents: SessionContents, fields: dict[str, Any]) -> SessionContents:
    return dataclasses.replace(contents, fields=fields)


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)
