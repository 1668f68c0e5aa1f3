"""Files into and out of a guest: the agent opens them as the tenant, we check everything that it sends."""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nautile.sandbox.errors import FileRefused, InvalidRequest, SandboxLost
from nautile.sandbox.filing import WHY
from nautile.sandbox.guest import link as wire
from nautile.sandbox.guest.link import Link, Stream
from nautile.sandbox.result import Entry

__all__ = ["Known", "download", "entries", "pack", "read", "upload", "walk", "write"]

_OWN = {1001: "it is not a plain file", 1002: "it is the root directory"}
_OWN |= {1003: "it has too many entries", 1004: "it has too many levels"}
_PATIENCE = 60.0  # seconds without a byte
_PIECE = 2**18
_MOST = 100_000
_ENTRY = struct.Struct("<cIQI")
_CHANGE = struct.Struct("<IIIIQQqIIII")
_ENVIRONMENT = {"PATH": "/usr/bin:/bin"}
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}


class _Incoming:
    """The output of one of the agent's programs as a stream of bytes; ``with`` kills it unless it has ended."""

    def __init__(self, stream: Stream, path: str, budget: int | None = None) -> None:
        self.stream, self.path, self._budget = stream, path, budget
        self._buffer, self._said, self._code = bytearray(), bytearray(), -1

    def __enter__(self) -> _Incoming:
        return self

    def __exit__(self, *_: object) -> None:
        if self.stream.ended is None and self.stream.link.lost is None:
            self.stream.kill(discard=True)

    def _more(self) -> bool:
        """Receive; False at the end. Raises FileRefused, SandboxLost."""
        deadline = time.monotonic() + _PATIENCE
        while (event := self.stream.next(deadline)) is None:
            if time.monotonic() > deadline:
                raise SandboxLost("the guest sent nothing of a file for a minute")
        kind, data = event
        if kind == wire.OUT:
            self._buffer += data
        elif kind == wire.ERR:
            self._said = (self._said + data)[:200]
        elif kind == wire.FAILED:
            raise FileRefused("/" + self.path, data.decode("utf-8", "replace")[:200])
        else:
            assert self.stream.ended is not None
            self._code = self.stream.ended.code
            return False
        return True

    def exactly(self, length: int) -> bytes:
        """The next ``length`` bytes. Raises SandboxLost when they do not come."""
        while len(self._buffer) < length:
            if not self._more():
                self.check()
                raise SandboxLost("the guest ended in the middle of a file")
        data = bytes(self._buffer[:length])
        del self._buffer[:length]
        return data

    def some(self) -> bytes:
        """What is there, empty at the end."""
        while not self._buffer:
            if not self._more():
                return b""
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    def finish(self) -> None:
        """Wait for the end. Raises FileRefused."""
        while self._more():
            if len(self._buffer) > _PIECE:
                raise SandboxLost("the guest sent more than was asked for")
        self.check()

    def check(self) -> None:
        """Raises FileRefused with the reason that the agent gave."""
        if self._code == 0:
            return
        said = self._said.decode("ascii", "replace")
        number = int(said) if said.isdigit() else 0
        why = _OWN.get(number) or WHY.get(number) or (os.strerror(number) if 0 < number < 200 else f"the guest said {said!a}")
        raise FileRefused("/" + self.path, why)

    def chunks(self) -> Iterator[bytes]:
        """A file's pieces, up to the one of length 0."""
        while length := int.from_bytes(self.exactly(4), "little"):
            if length > _PIECE:
                raise SandboxLost("the guest announced a piece that is too long")
            yield self.exactly(length)


def _ask(link: Link, kind: int, path: str, *more: str) -> _Incoming:
    return _Incoming(link.spawn(kind, [path, *more], _ENVIRONMENT), path)


def read(link: Link, path: str, limit: int) -> bytes:
    """See ``Sandbox.read``."""
    out = bytearray()
    with _ask(link, wire.READ_FILE, path) as incoming:
        incoming.stream.end_input()
        while data := incoming.some():
            out += data
            if len(out) > limit:
                raise FileRefused("/" + path, f"it has more than {limit:,} bytes: raise limit=")
        incoming.check()
    return bytes(out)


def write(link: Link, path: str, data: bytes, mode: int) -> None:
    """See ``Sandbox.write``."""
    with _ask(link, wire.WRITE_FILE, path, f"{mode:o}") as incoming:
        incoming.stream.feed_all(data)
        incoming.stream.end_input()
        incoming.finish()


def entries(link: Link, path: str) -> list[Entry]:
    """See ``Sandbox.list``."""
    found = []
    with _ask(link, wire.LIST, path) as incoming:
        incoming.stream.end_input()
        while first := _first(incoming):
            _, mode, size, name = _entry(incoming, first)
            found.append(Entry(name, _KINDS.get(stat.S_IFMT(mode), "other"), size, stat.S_IMODE(mode)))
            if len(found) > _MOST:
                raise FileRefused("/" + path, f"it has more than {_MOST:,} entries")
        incoming.check()
    return sorted(found, key=lambda entry: entry.name)


def _first(incoming: _Incoming) -> bytes:
    """One byte, or nothing at the end of the stream."""
    data = incoming.some()
    incoming._buffer[:0] = data[1:]
    return data[:1]


def _entry(incoming: _Incoming, first: bytes) -> tuple[bytes, int, int, str]:
    kind, mode, size, length = _ENTRY.unpack(first + incoming.exactly(_ENTRY.size - 1))
    if length > 65_536 or size >= 2**62:
        raise SandboxLost("the guest sent an entry that cannot be")
    return kind, mode, size, incoming.exactly(length).decode("utf-8", "surrogateescape")


def upload(link: Link, files: Iterator[tuple[str, Path]], path: str) -> None:
    """Copy (relative path, place) into the guest, in this order."""
    with _ask(link, wire.UPLOAD, path) as incoming:
        feed = incoming.stream.feed_all
        for relative, place in files:
            found = place.stat()
            name = os.fsencode(relative)
            kind = b"d" if stat.S_ISDIR(found.st_mode) else b"f"
            feed(kind + struct.pack("<II", found.st_mode & 0o777, len(name)) + name)
            if kind == b"f":
                with open(place, "rb") as file:
                    while data := file.read(_PIECE):
                        feed(struct.pack("<I", len(data)) + data)
                feed(bytes(4))
            if incoming.stream.ended is not None:
                break
        incoming.stream.end_input()
        incoming.finish()


def download(link: Link, path: str, target: Path, limit: int) -> int:
    """Build what the guest sends below ``target``, whose names are checked; how many entries were left out."""
    left = limit
    left_out = count = 0
    made: list[tuple[Path, int]] = []
    with _ask(link, wire.DOWNLOAD, path) as incoming:
        incoming.stream.end_input()
        while (first := incoming.exactly(1)) != b"z":
            kind, mode, _, relative = _entry(incoming, first)
            count += 1
            if count > _MOST:
                raise FileRefused("/" + path, f"it has more than {_MOST:,} entries")
            if kind == b"l":
                left_out += 1
                continue
            place = target.joinpath(*checked(relative))
            try:
                if kind == b"d":
                    place.mkdir(mode=0o700)
                    made.append((place, mode))
                    continue
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                descriptor = os.open(place, flags, mode & 0o777)
            except OSError as error:
                raise FileRefused(relative, f"it cannot be made here ({error.strerror})") from None
            with os.fdopen(descriptor, "wb") as file:
                for piece in incoming.chunks():
                    left -= len(piece)
                    if left < 0:
                        raise FileRefused("/" + path, f"it has more than {limit:,} bytes: raise limit=")
                    file.write(piece)
        incoming.finish()
    for place, mode in reversed(made):
        place.chmod(mode & 0o777 | 0o700)
    return left_out


def checked(relative: str) -> list[str]:
    """The steps of a relative path that a guest has named. Raises FileRefused."""
    steps = [] if relative == "" else relative.split("/")
    if any(step in ("", ".", "..") or "\0" in step for step in steps) or len(steps) > 128:
        raise FileRefused(relative[:80], "the sandbox sent a name that leads elsewhere")
    return steps


@dataclass(frozen=True)
class Known:
    """What tells whether a file in the guest has changed."""

    mode: int
    size: int
    stamp: int


def walk(link: Link, path: str) -> dict[str, Known]:
    """Everything below a directory of the guest, by relative path."""
    found: dict[str, Known] = {}
    with _ask(link, wire.WALK, path) as incoming:
        incoming.stream.end_input()
        while (first := incoming.exactly(1)) != b"z":
            _, mode, size, relative = _entry(incoming, first)
            checked(relative)
            found[relative] = Known(mode, size, int.from_bytes(incoming.exactly(8), "little", signed=True))
            if len(found) > _MOST:
                raise FileRefused("/" + path, f"it has more than {_MOST:,} entries")
        incoming.finish()
    return found


# -- what has changed, as an OCI layer


class _Content:
    """A file's pieces as tarfile reads them; exactly as many bytes as were announced."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._buffer = pieces, b""

    def read(self, size: int) -> bytes:
        while len(self._buffer) < size:
            piece = next(self._pieces, None)
            if piece is None:
                raise SandboxLost("a file became shorter while it was packed")
            self._buffer += piece
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def end(self) -> None:
        if self._buffer or next(self._pieces, None) is not None:
            raise SandboxLost("a file became longer while it was packed")


class _Hashed:
    def __init__(self, file: BinaryIO, limit: int) -> None:
        self.file, self.digest, self.left = file, hashlib.sha256(), limit

    def write(self, data: bytes) -> int:
        self.left -= len(data)
        if self.left < 0:
            raise FileRefused("/", "what has changed is larger than the sandbox's disk")
        self.digest.update(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.file.tell()


def pack(link: Link, file: BinaryIO, limit: int) -> str:
    """Write what the tenant has changed as a tar with whiteouts, ``limit`` bytes at most; ``sha256:`` and its digest."""
    hashed = _Hashed(file, limit)
    links: dict[int, str] = {}
    with _ask(link, wire.PACK, "") as incoming:
        incoming.stream.end_input()
        with tarfile.open(fileobj=hashed, mode="w", format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
            while (first := incoming.exactly(1)) != b"z":
                if first != b"c":
                    raise SandboxLost("the guest sent a change that is none")
                _add(archive, incoming, links)
        incoming.finish()
    return f"sha256:{hashed.digest.hexdigest()}"


def _add(archive: tarfile.TarFile, incoming: _Incoming, links: dict[int, str]) -> None:
    mode, uid, gid, device, size, inode, mtime, count, name, target, extra = _CHANGE.unpack(incoming.exactly(_CHANGE.size))
    if max(name, target) > 65_536 or extra > 65_536 or size >= 2**62:
        raise SandboxLost("the guest sent a change that cannot be")
    relative = incoming.exactly(name).decode("utf-8", "surrogateescape")
    aim = incoming.exactly(target).decode("utf-8", "surrogateescape")
    attributes = _attributes(incoming.exactly(extra))
    steps = checked(relative)
    if not steps or steps[-1].startswith(_WHITEOUT):
        raise FileRefused("/" + relative, "OCI layers cannot hold names that begin with .wh.")
    entry = tarfile.TarInfo(relative)
    entry.mode, entry.mtime = stat.S_IMODE(mode), mtime
    entry.uid, entry.gid = (one if one < 65_536 else 65_534 for one in (uid, gid))
    user = {key: value for key, value in attributes.items() if key.startswith("user.") and not key.startswith("user.overlay.")}
    entry.pax_headers = {f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape") for key, value in user.items()}
    kind = stat.S_IFMT(mode)
    if kind == stat.S_IFCHR and device == 0:
        entry.name = "/".join([*steps[:-1], _WHITEOUT + steps[-1]])
        archive.addfile(entry)
    elif kind == stat.S_IFDIR:
        entry.type = tarfile.DIRTYPE
        archive.addfile(entry)
        if attributes.get("trusted.overlay.opaque") == b"y":
            archive.addfile(tarfile.TarInfo(f"{relative}/{_OPAQUE}"))
    elif kind == stat.S_IFLNK:
        entry.type, entry.linkname = tarfile.SYMTYPE, aim
        archive.addfile(entry)
    elif kind == stat.S_IFIFO:
        entry.type = tarfile.FIFOTYPE
        archive.addfile(entry)
    elif kind == stat.S_IFREG:
        _add_file(archive, entry, incoming, size, links.setdefault(inode, relative) if count > 1 else relative)


def _add_file(archive: tarfile.TarFile, entry: tarfile.TarInfo, incoming: _Incoming, size: int, earlier: str) -> None:
    content = _Content(incoming.chunks())
    if earlier != entry.name:
        entry.type, entry.linkname = tarfile.LNKTYPE, earlier
        archive.addfile(entry)
        while size:
            size -= len(content.read(min(size, _PIECE)))
    else:
        entry.size = size
        archive.addfile(entry, content)  # type: ignore[arg-type]
    content.end()


def _attributes(data: bytes) -> dict[str, bytes]:
    found = {}
    while data:
        name, separator, rest = data.partition(b"\0")
        length = int.from_bytes(rest[:4], "little")
        if not separator or len(rest) < 4 + length:
            raise SandboxLost("the guest sent attributes that are none")
        found[name.decode("utf-8", "surrogateescape")] = rest[4 : 4 + length]
        data = rest[4 + length :]
    return found


def target_of(path: Path) -> Path:
    """A place for something that comes out. Raises InvalidRequest when it is taken."""
    if path.exists() or path.is_symlink():
        raise InvalidRequest(f"{path} exists: name a target that does not")
    return path
