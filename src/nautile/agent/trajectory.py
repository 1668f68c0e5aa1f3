"""The log of a run: what was decided before it is done, what came of it after, each line on disk before anything follows.

One JSON object a line. A line that was cut by a crash is dropped when the log is opened again; every whole line is true.
The file holds old contents of edited files, so its directory is the user's alone.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from nautile.agent.client import Reply
from nautile.agent.workbench import Edit
from nautile.protocol import ToolCall

__all__ = [
    "Begun", "Called", "Ended", "Journal", "JournalError", "Record", "Replied", "Returned", "Status", "Trajectory", "Undone",
    "default_state", "journals",
]  # fmt: skip

_VERSION = 1
_HANDING_OVER = 2.0  # seconds in which the log of a killed run must be free

Status = Literal["answered", "no_answer", "reply_budget", "step_budget", "token_budget", "interrupted"]


class JournalError(RuntimeError):
    """A log is missing, damaged, in use, or not what was asked for; the text says which and what to do."""


@dataclass(frozen=True)
class Begun:
    """The first line: what was asked, of which model, on which directory."""

    task: str
    directory: str
    model: str
    at: float  # seconds since the epoch
    version: int = _VERSION


@dataclass(frozen=True)
class Replied:
    """The model took turn ``step``."""

    step: int
    reply: Reply


@dataclass(frozen=True)
class Called:
    """Call ``index`` of turn ``step`` is about to run; ``edit`` is what it will change, for undo."""

    step: int
    index: int
    name: str
    edit: Edit | None = None


@dataclass(frozen=True)
class Returned:
    """What that call gave."""

    step: int
    index: int
    ok: bool
    output: str


@dataclass(frozen=True)
class Ended:
    """The run stopped. Nothing follows unless it is resumed."""

    status: Status
    answer: str


@dataclass(frozen=True)
class Undone:
    """The edits of this run have been taken back."""

    at: float


Record = Begun | Replied | Called | Returned | Ended | Undone
_KINDS: dict[str, type[Record]] = {kind.__name__.lower(): kind for kind in (Begun, Replied, Called, Returned, Ended, Undone)}


@dataclass(frozen=True)
class Trajectory:
    """What a run came to. ``note`` says in a sentence why it stopped, when it did not answer."""

    task: str
    status: Status
    answer: str
    note: str
    replies: tuple[Reply, ...]
    results: tuple[Returned, ...]
    tokens: int  # length of the conversation at the end
    path: Path  # the log


class Journal:
    """An append-only log file, locked while it is open. Use ``create`` or ``open``, then ``close`` or ``with``."""

    def __init__(self, path: Path, descriptor: int, records: list[Record]) -> None:
        self.path, self.records, self._descriptor = path, records, descriptor

    @classmethod
    def create(cls, state: Path, begun: Begun) -> Self:
        """Start a log in directory ``state``, which is made if it is missing. Raises JournalError."""
        try:
            state.mkdir(parents=True, exist_ok=True, mode=0o700)
            moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
            path = state / f"{moment}-{time.time_ns() % 10**9:09d}-{secrets.token_hex(2)}.jsonl"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise JournalError(f"cannot keep a log in {state}: {error.strerror}; give another directory with --state") from None
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        journal = cls(path, descriptor, [])
        journal.append(begun)
        return journal

    @classmethod
    def open(cls, path: Path) -> Self:
        """Take up a log again; a last line that is not whole is cut off. Raises JournalError."""
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        try:
            _lock(descriptor)
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            records = list(_parsed(path, data[:whole]))
            if whole < len(data):
                os.ftruncate(descriptor, whole)
            return cls(path, descriptor, records)
        except BlockingIOError:
            os.close(descriptor)
            raise JournalError(f"the run of {path.name} is still going on in another process") from None
        except BaseException:
            os.close(descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def append(self, record: Record) -> None:
        """Write a record; it is on disk when this returns."""
        fields = {"kind": type(record).__name__.lower(), **dataclasses.asdict(record)}
        line = json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        written = 0
        while written < len(line):
            written += os.write(self._descriptor, line[written:])
        os.fsync(self._descriptor)
        self.records.append(record)

    def close(self) -> None:
        """Unlock and close; closing twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def begun(self) -> Begun:
        """The first record."""
        first = self.records[0] if self.records else None
        if not isinstance(first, Begun):
            raise JournalError(f"{self.path} does not begin with a task: it is damaged")
        return first

    @property
    def ended(self) -> Ended | None:
        """How the run stopped, if it did and has not been resumed since; Undone does not count."""
        last = next((record for record in reversed(self.records) if not isinstance(record, Undone)), None)
        return last if isinstance(last, Ended) else None


def _lock(descriptor: int) -> None:
    """Lock a log. One whose run was killed while it started a tool is held until that program has begun: a moment longer."""
    deadline = time.monotonic() + _HANDING_OVER
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _parsed(path: Path, data: bytes) -> Iterator[Record]:
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            yield _record(json.loads(line.decode("utf-8", "surrogatepass")))
        except (ValueError, KeyError, TypeError) as error:
            raise JournalError(f"{path}, line {number}, is damaged or from another version: {error}") from None


def _record(fields: dict[str, Any]) -> Record:
    kind = _KINDS[fields.pop("kind")]
    if kind is Begun and fields.get("version") != _VERSION:
        raise ValueError(f"log version {fields.get('version')}, this Nautile writes {_VERSION}")
    if kind is Replied:
        reply = fields["reply"]
        calls = tuple(ToolCall(**{**call, "flags": tuple(call["flags"])}) for call in reply["calls"])
        fields["reply"] = Reply(**{**reply, "calls": calls, "ids": tuple(reply["ids"])})
    if kind is Called and fields["edit"] is not None:
        fields["edit"] = Edit(**fields["edit"])
    return kind(**fields)


def default_state() -> Path:
    """Where logs are kept unless the caller says otherwise."""
    return Path.home() / ".local" / "state" / "nautile" / "agent"


def journals(state: Path, directory: Path) -> Iterator[Path]:
    """Logs of runs on ``directory``, newest first. Reads only first lines; skips logs whose first line is damaged."""
    for path in sorted(state.glob("*.jsonl"), reverse=True):
        with path.open("rb") as stream:
            try:
                first = _record(json.loads(stream.readline()))
            except (ValueError, KeyError, TypeError):
                continue
        if isinstance(first, Begun) and first.directory == str(directory):
            yield path
