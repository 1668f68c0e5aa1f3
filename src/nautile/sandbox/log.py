"""The trajectory log: what was asked of a sandbox and what came back, so that nothing is ever run twice.

A directory, outside of the sandbox and for its owner only: ``log`` holds frames (length, CRC-32, JSON), each with the
SHA-256 of the one before it; ``blobs/`` holds longer bytes by their SHA-256; ``epoch`` fences writers. The intent of an
operation is on the disk before it is carried out, and its result before the caller gets it.

A client that comes back issues its operations again, in order: as long as they match the log (by sequence and request hash)
the recorded results are returned at once. The first that the log does not have is carried out. One whose intent is there
without a result is asked for at the sandbox; who cannot say raises OutcomeUnknown.

A fork is a log that begins with a pointer: how much of its parent's file it continues. A log is only ever appended to, so
what the pointer names stays what it was, and its hash is checked.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nautile.sandbox.errors import InvalidRequest, LogCorrupt, LogFenced, OutcomeUnknown, TrajectoryDiverged

__all__ = ["Contents", "Operation", "TrajectoryLog", "digest_of", "expand", "load", "verify"]

VERSION = 1
_MAGIC = b"nautile trajectory 1\n"
_FRAME = struct.Struct("<II")
_LONGEST = 16 * 2**20  # bytes of one frame
_INLINE = 4096  # bytes of a value that stay in its frame
_START = "0" * 64
_HEAD_MOST = 2**20  # bytes of a log's beginning that hold its head


@dataclass
class Operation:
    """One operation, as the log has it. ``result`` None: begun, and nobody wrote how it ended."""

    sequence: int
    kind: str
    name: str  # unique: the sandbox runs an operation of one name only once
    digest: str
    request: dict[str, Any]
    wall: float
    epoch: int
    result: dict[str, Any] | None = None
    seconds: float = 0.0
    chain: str = ""  # the chain's hash after its last frame


@dataclass
class Contents:
    """All of a log, its parents' part included."""

    head: dict[str, Any]
    operations: list[Operation] = field(default_factory=list)
    epoch: int = 0
    chain: str = _START
    size: int = 0  # bytes of whole frames; what follows was cut off by a crash
    torn: int = 0
    closed: bool = False
    client: int = 0  # how many clients have attached through an edge; the last of them may write
    inherited: int = 0  # operations that are a parent's


def load(place: Path, upto: int | None = None) -> Contents:
    """Read and check a log, or what begins in its first ``upto`` bytes (0: its head). What a crash cut off is passed over.

    Raises LogCorrupt, InvalidRequest.
    """
    try:
        with open(place / "log", "rb") as file:
            data = file.read() if upto is None else file.read(max(upto, _HEAD_MOST))
    except (FileNotFoundError, NotADirectoryError):
        raise InvalidRequest(f"{place} holds no trajectory log") from None
    if not data.startswith(_MAGIC):
        raise LogCorrupt(f"{place}/log is not a trajectory log of this version")
    contents = Contents({})
    for offset, payload in _frames(data, place):
        if upto is not None and offset >= max(upto, len(_MAGIC) + 1):
            break
        record = _checked(payload, contents.chain, place, offset)
        contents.chain = hashlib.sha256(payload).hexdigest()
        contents.size = offset + _FRAME.size + len(payload)
        _apply(contents, record, place)
    contents.size = contents.size or len(_MAGIC)
    contents.torn = len(data) - contents.size
    return contents


def _frames(data: bytes, place: Path) -> Iterator[tuple[int, bytes]]:
    offset = len(_MAGIC)
    while offset + _FRAME.size <= len(data):
        length, check = _FRAME.unpack_from(data, offset)
        payload = data[offset + _FRAME.size : offset + _FRAME.size + length]
        whole = len(payload) == length and 0 < length <= _LONGEST
        if not whole or zlib.crc32(payload) != check:
            if whole and offset + _FRAME.size + length < len(data):
                raise LogCorrupt(f"{place}/log was changed at byte {offset}: the checksum is wrong and more frames follow")
            return
        yield offset, payload
        offset += _FRAME.size + length


def _checked(payload: bytes, chain: str, place: Path, offset: int) -> dict[str, Any]:
    record = json.loads(payload)
    if record["prev"] != chain:
        raise LogCorrupt(f"{place}/log was changed before byte {offset}: the hash chain is broken")
    return dict(record)


def _apply(contents: Contents, record: dict[str, Any], place: Path) -> None:
    match record["record"]:
        case "head":
            contents.head = record
            if (parent := record.get("parent")) is not None:
                above = load((place / parent["path"]).resolve(), parent["size"])
                if above.chain != parent["chain"] or len(above.operations) < parent["operations"]:
                    raise LogCorrupt(f"{place}: its parent {parent['path']} is not what it was when this log was forked")
                contents.operations += above.operations[: parent["operations"]]
                contents.inherited = parent["operations"]
        case "epoch":
            contents.epoch = record["epoch"]
        case "intent":
            if record["sequence"] != len(contents.operations):
                raise LogCorrupt(f"{place}: operation {record['sequence']} is out of order")
            names = ("sequence", "kind", "name", "digest", "request", "wall", "epoch")
            contents.operations.append(Operation(**{name: record[name] for name in names}, chain=contents.chain))
        case "result":
            operation = contents.operations[record["sequence"]]
            operation.result, operation.seconds, operation.chain = record["result"], record["seconds"], contents.chain
        case "client":
            contents.client = record["number"]
        case "sandbox":  # rebuilt after the first one was lost
            contents.head = {**contents.head, "sandbox": record["sandbox"]}
        case "closed":
            contents.closed = True


def digest_of(kind: str, request: dict[str, Any]) -> str:
    """The hash by which a client's request is recognised."""
    return hashlib.sha256(json.dumps([kind, request], sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class TrajectoryLog:
    """The one writer of a log. Opening it fences every earlier writer."""

    def __init__(self, place: Path, contents: Contents, epoch: int) -> None:
        self.place, self.contents, self.epoch = place, contents, epoch
        self.position = 0  # the next operation that a client issues
        self._lock = threading.RLock()
        self._file = os.open(place / "log", os.O_RDWR | os.O_CLOEXEC)
        self._fence = os.open(place / "epoch", os.O_RDONLY | os.O_CLOEXEC)

    @classmethod
    def open(cls, place: Path, head: dict[str, Any]) -> TrajectoryLog:
        """Open a log, or begin one with ``head`` (sandbox, kind, ...). Raises LogCorrupt."""
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (place / "log").exists():
            _begin(place, head)
        with _fenced(place) as epoch_file:
            contents = load(place)
            epoch = int(os.pread(epoch_file, 20, 0) or b"0") + 1
            os.pwrite(epoch_file, b"%020d" % epoch, 0)
            os.fsync(epoch_file)
            if contents.torn:
                os.truncate(place / "log", contents.size)
        log = cls(place, contents, epoch)
        log._append({"record": "epoch", "epoch": epoch, "wall": time.time()})
        return log

    @property
    def replaying(self) -> bool:
        """Whether the next operation is in the log already."""
        return self.position < len(self.contents.operations)

    def perform(
        self,
        kind: str,
        request: dict[str, Any],
        execute: Callable[[str], dict[str, Any]],
        recover: Callable[[str], dict[str, Any] | str],
        *,
        idempotent: bool = False,
    ) -> dict[str, Any]:
        """One operation: its recorded result, or carry it out and record that.

        ``execute(name)`` carries it out; ``recover(name)`` asks the sandbox what became of it: a result, ``never`` or
        ``unknown``. Raises TrajectoryDiverged, OutcomeUnknown, LogFenced.
        """
        with self._lock:
            digest = digest_of(kind, request)
            sequence, fresh = self.position, not self.replaying
            if fresh:
                name = f"{os.urandom(8).hex()}"
                self._intend(Operation(sequence, kind, name, digest, request, time.time(), self.epoch))
            operation = self.contents.operations[sequence]
            if operation.digest != digest:
                raise TrajectoryDiverged(sequence, _brief(operation.kind, operation.request), _brief(kind, request))
            self.position += 1
        if operation.result is not None:
            return self._expanded(operation.result)
        began = time.monotonic()
        result: dict[str, Any] | str = "never" if fresh else recover(operation.name)
        if result == "unknown" and not idempotent:
            raise OutcomeUnknown(kind, sequence, "the sandbox that ran it cannot say")
        if isinstance(result, str):
            result = execute(operation.name)
        self._conclude(operation, result, time.monotonic() - began)
        return result

    def _intend(self, operation: Operation) -> None:
        names = ("sequence", "kind", "name", "digest", "request", "wall", "epoch")
        self._append({"record": "intent", **{name: getattr(operation, name) for name in names}, "mono": time.monotonic()})
        operation.chain = self.contents.chain
        self.contents.operations.append(operation)

    def _conclude(self, operation: Operation, result: dict[str, Any], seconds: float) -> None:
        compact = {key: self.compact(value) for key, value in result.items()}  # blobs are on the disk before the frame
        record = {
            "record": "result",
            "sequence": operation.sequence,
            "result": compact,
            "wall": time.time(),
            "seconds": seconds,
        }
        with self._lock:
            self._append(record)
            operation.result, operation.seconds, operation.chain = compact, seconds, self.contents.chain

    def close(self) -> None:
        """Stop writing; the log stays."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                os.close(self._fence)
                self._file = self._fence = -1

    def end(self) -> None:
        """Note that the sandbox was closed on purpose, then ``close``."""
        with contextlib.suppress(LogFenced):
            self._append({"record": "closed", "wall": time.time()})
        self.close()

    def fork(self, target: Path, head: dict[str, Any], operations: int | None = None) -> None:
        """Begin a log at ``target`` that continues from here; it points to this one instead of copying it.

        ``operations``: how many of this log's it has; all that were issued unless told otherwise.
        """
        with self._lock:
            count = self.position if operations is None else operations
            parent = {"path": os.path.relpath(self.place, target), "operations": count}
            parent |= {"size": self.contents.size, "chain": self.contents.chain}
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        _begin(target, {**head, "parent": parent})

    def attach(self) -> int:
        """Let another client issue operations from the first on: its number. The one before is fenced by its number."""
        with self._lock:
            self.position = 0
            self._append({"record": "client", "number": self.contents.client + 1, "wall": time.time()})
            self.contents.client += 1
            return self.contents.client

    def seek(self, sequence: int, client: int) -> None:
        """The next operation is ``sequence``, issued by ``client``. Raises LogFenced, InvalidRequest."""
        if client != self.contents.client:
            raise LogFenced(f"another client has taken over this trajectory (number {client} is past)")
        if not 0 <= sequence <= len(self.contents.operations):
            raise InvalidRequest(f"operation {sequence} would leave a gap: the log has {len(self.contents.operations)}")
        self.position = sequence

    def _append(self, record: dict[str, Any]) -> None:
        """One frame, on the disk before this returns. Raises LogFenced when a later writer has opened the log."""
        with self._lock:
            payload = json.dumps({**record, "prev": self.contents.chain}, separators=(",", ":")).encode()
            if len(payload) > _LONGEST:
                raise InvalidRequest(f"an operation of {len(payload):,} bytes is too long for the log")
            if self._file < 0:
                raise LogFenced("this log is closed")
            fcntl.flock(self._fence, fcntl.LOCK_EX)
            try:
                if int(os.pread(self._fence, 20, 0)) != self.epoch:
                    raise LogFenced(f"{self.place}: another writer has taken over (epoch {self.epoch} is past)")
                frame = _FRAME.pack(len(payload), zlib.crc32(payload)) + payload
                os.pwrite(self._file, frame, self.contents.size)
                os.fdatasync(self._file)
            finally:
                fcntl.flock(self._fence, fcntl.LOCK_UN)
            self.contents.size += len(frame)
            self.contents.chain = hashlib.sha256(payload).hexdigest()

    def moved(self, sandbox: str) -> None:
        """Note that another sandbox has taken the place of the first."""
        self._append({"record": "sandbox", "sandbox": sandbox, "wall": time.time()})

    def compact(self, value: Any) -> Any:
        """Bytes as the log keeps them: short ones in place, long ones as a blob; anything else as it is."""
        if not isinstance(value, bytes):
            return value
        if len(value) <= _INLINE:
            return {"bytes": base64.b64encode(value).decode()}
        digest = hashlib.sha256(value).hexdigest()
        (self.place / "blobs").mkdir(mode=0o700, exist_ok=True)
        target = self.place / "blobs" / digest
        if not target.exists():
            temporary = target.with_suffix(f".{os.urandom(4).hex()}")
            with open(temporary, "xb") as file:
                file.write(value)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, target)
        return {"blob": digest, "length": len(value)}

    def _expanded(self, result: dict[str, Any]) -> dict[str, Any]:
        return expand(self.place, self.contents.head, result)


def expand(place: Path, head: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """A recorded result with its bytes, from this log's blobs or its parents'. Raises LogCorrupt."""
    return {key: _bytes(place, head, value) if isinstance(value, dict) else value for key, value in result.items()}


def _bytes(place: Path, head: dict[str, Any], value: dict[str, Any]) -> Any:
    if "bytes" in value:
        return base64.b64decode(value["bytes"])
    if "blob" not in value:
        return value
    path = place / "blobs" / value["blob"]
    if not path.exists() and (parent := head.get("parent")) is not None:
        above = (place / parent["path"]).resolve()
        return _bytes(above, load(above, 0).head, value)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise LogCorrupt(f"{place}: the blob {value['blob']} is missing") from None
    if hashlib.sha256(data).hexdigest() != value["blob"]:
        raise LogCorrupt(f"{place}: the blob {value['blob']} was changed")
    return data


def _begin(place: Path, head: dict[str, Any]) -> None:
    payload = json.dumps({"record": "head", "version": VERSION, "wall": time.time(), **head, "prev": _START}).encode()
    temporary = place / f".log.{os.urandom(4).hex()}"
    with open(temporary, "xb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(_MAGIC + _FRAME.pack(len(payload), zlib.crc32(payload)) + payload)
        file.flush()
        os.fsync(file.fileno())
    with contextlib.suppress(FileExistsError):  # two clients begin at once: one of them wins
        os.link(temporary, place / "log")
    temporary.unlink()
    directory = os.open(place, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


@contextlib.contextmanager
def _fenced(place: Path) -> Iterator[int]:
    descriptor = os.open(place / "epoch", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _brief(kind: str, request: dict[str, Any]) -> str:
    given = request.get("argv") or request.get("path") or request.get("python") or ""
    text = " ".join(given) if isinstance(given, list) else str(given)
    return f"{kind} {text[:120]!r}" if text else kind


def verify(place: Path) -> tuple[int, int]:
    """Check every frame, the chain, the parents and the blobs: (operations, those without a result). Raises LogCorrupt."""
    contents = load(place)
    for operation in contents.operations:
        if operation.digest != digest_of(operation.kind, operation.request):
            raise LogCorrupt(f"{place}: operation {operation.sequence} does not match its request hash")
        if operation.result is not None:
            expand(place, contents.head, operation.result)
    return len(contents.operations), sum(operation.result is None for operation in contents.operations)
