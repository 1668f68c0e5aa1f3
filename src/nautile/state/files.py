"""The container of every state file: a readable header, then checksummed sections. docs/state.md describes each byte.

    0   8   magic  8e 4e 54 4c 53 0d 0a 1a  (8e NTLS CR LF SUB: text-mode copies and truncation at SUB are noticed)
    8   4   format version, little-endian
    12  4   length H of the header
    16  16  BLAKE2b-128 of bytes 0 - 15 and the header
    32  H   header, JSON in UTF-8: "kind", "file_bytes", "sections" [name, offset, bytes, blake2b], and the kind's own keys
    then the sections, each at a multiple of 64, gaps filled with zeros

Writing: a temporary file in the same directory, fsync, rename, fsync of the directory. Reading: memory-mapped, and every
section is checked before it is used.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import secrets
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "FORMAT_VERSION",
    "MAGIC",
    "StateFile",
    "StoreError",
    "StoreUnavailable",
    "read_header",
    "sync_directory",
    "write_file",
]

MAGIC = b"\x8eNTLS\r\n\x1a"
FORMAT_VERSION = 1
_START = struct.Struct("<8sII16s")
_ALIGN = 64
_LONGEST_HEADER = 64 << 20


class StoreError(ValueError):
    """A state file cannot be used: damaged, of another model, or of another format. The text names it and says why."""


class StoreUnavailable(OSError):  # noqa: N818  # says what has happened
    """The directory does not take files: full, read-only, gone. The text names it and says what to do."""


def write_file(path: Path, kind: str, fields: Mapping[str, Any], sections: Mapping[str, Tensor]) -> int:
    """Write a file whole or not at all; on return it is on the disk. Gives its size.

    Raises StoreUnavailable when the system refuses; nothing is left behind then.
    """
    views = {name: memoryview(_host_bytes(tensor)) for name, tensor in sections.items()}
    header, offsets, total = _header(kind, fields, views)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(header)
            for name, view in views.items():
                file.write(b"\0" * (offsets[name] - file.tell()))
                file.write(view)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StoreUnavailable(error.errno, _advice(path, error)) from error
    return total


def sync_directory(directory: Path) -> None:
    """Make a rename or unlink in this directory last."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_header(path: Path) -> dict[str, Any]:
    """The checked header of a file. Raises StoreError when it is no state file of this version, or is cut short.

    A file that is not there any more raises FileNotFoundError.
    """
    with path.open("rb") as file:
        start = file.read(_START.size)
        size = os.fstat(file.fileno()).st_size
        if len(start) < _START.size:
            raise StoreError(f"{path} is cut short: {size} bytes")
        magic, version, length, digest = _START.unpack(start)
        if magic != MAGIC:
            raise StoreError(f"{path} is not a Nautile state file")
        if version != FORMAT_VERSION:
            raise StoreError(f"{path} has format version {version}; this Nautile reads version {FORMAT_VERSION}")
        header = file.read(min(length, _LONGEST_HEADER))
    if len(header) != length or hashlib.blake2b(start[:16] + header, digest_size=16).digest() != digest:
        raise StoreError(f"{path} is damaged: its header does not match its checksum")
    data: dict[str, Any] = _fields(path, header)
    if data["file_bytes"] != size:
        raise StoreError(f"{path} is damaged: {size} bytes of {data['file_bytes']}")
    return data


def _fields(path: Path, header: bytes) -> dict[str, Any]:
    """What a header says, as far as every kind of file has it. Raises StoreError for what no Nautile has written."""
    try:
        data = json.loads(header)
        shaped = isinstance(data, dict) and isinstance(data["kind"], str) and isinstance(data["file_bytes"], int)
        for part in data["sections"] if shaped else ():
            shaped &= isinstance(part["name"], str) and isinstance(part["blake2b"], str)
            shaped &= all(isinstance(part[key], int) and part[key] >= 0 for key in ("offset", "bytes"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(f"{path} is no state file of Nautile's making: {type(error).__name__} in its header") from None
    if not shaped:
        raise StoreError(f"{path} is no state file of Nautile's making: its header lacks what every file says")
    return dict(data)


class StateFile:
    """A file that has been opened for reading. Sections are views of the mapped file until ``close``."""

    def __init__(self, path: Path) -> None:
        """Raises StoreError or FileNotFoundError, as ``read_header``."""
        self.path, self.header = path, read_header(path)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._sections = {part["name"]: part for part in self.header["sections"]}

    def section(self, name: str, dtype: torch.dtype = torch.uint8) -> Tensor:
        """A checked copy of one section, as a flat tensor. Raises StoreError when it is damaged or missing."""
        if name not in self._sections:
            raise StoreError(f"{self.path} has no section {name!r}")
        part = self._sections[name]
        with memoryview(self._map) as whole, whole[part["offset"] : part["offset"] + part["bytes"]] as data:
            if len(data) != part["bytes"] or hashlib.blake2b(data, digest_size=16).hexdigest() != part["blake2b"]:
                raise StoreError(f"{self.path} is damaged: section {name!r} does not match its checksum")
            if len(data) % dtype.itemsize:
                raise StoreError(f"{self.path}: section {name!r} of {len(data)} bytes is no list of {dtype}")
            return torch.frombuffer(bytearray(data), dtype=dtype) if len(data) else torch.empty(0, dtype=dtype)

    def names(self) -> list[str]:
        """The sections, in order."""
        return list(self._sections)

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()

    def __enter__(self) -> StateFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _header(kind: str, fields: Mapping[str, Any], views: Mapping[str, memoryview]) -> tuple[bytes, dict[str, int], int]:
    """Start and header, offsets of the sections, size of the file. Offsets depend on the header's length and the header on
    them, so the header is padded with spaces to a length that is settled first."""
    digests = {name: hashlib.blake2b(view, digest_size=16).hexdigest() for name, view in views.items()}
    room = 256
    while True:
        at, offsets = _START.size + room, {}
        for name, view in views.items():
            at = -(-at // _ALIGN) * _ALIGN
            offsets[name] = at
            at += view.nbytes
        parts = [
            {"name": name, "offset": offsets[name], "bytes": view.nbytes, "blake2b": digests[name]}
            for name, view in views.items()
        ]
        text = json.dumps({"kind": kind, **fields, "file_bytes": at, "sections": parts}, ensure_ascii=False).encode()
        if len(text) <= room:
            break
        room = -(-len(text) // 256) * 256
    text = text.ljust(room)
    start = struct.pack("<8sII", MAGIC, FORMAT_VERSION, room)
    return start + hashlib.blake2b(start + text, digest_size=16).digest() + text, offsets, at


def _host_bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _advice(path: Path, error: OSError) -> str:
    what = {
        errno.ENOSPC: "the disk is full: free some space",
        errno.EDQUOT: "the disk quota is used up: free some space",
        errno.EROFS: "the file system is read-only: choose another directory",
        errno.EACCES: "no permission to write there: choose another directory",
        errno.ENOENT: "the directory is gone",
    }.get(error.errno or 0, str(error))
    return f"cannot write {path}: {what}"
