"""What a seat's fork is told to become: numbers, strings and a filter of system calls, as seat.c and Python read them."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Orders"]

_HEAD = struct.Struct("<IIQQIIIIII")  # seat.c: struct orders
_PTY, _BACKGROUND = 1, 2


@dataclass(frozen=True)
class Orders:
    """``places``: of a command, its working directory; of crun, its log and where each tree that it is given goes."""

    argv: tuple[str, ...]
    places: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    tenant: int = 0
    open_files: int = 0
    file_size: int = 0
    pty: bool = False
    background: bool = False  # may wait while others compute
    filter: bytes = b""

    def pack(self) -> bytes:
        """As bytes."""
        words = [*self.places, *self.argv, *(f"{name}={value}" for name, value in self.environment.items())]
        text = b"".join(word.encode("utf-8", "surrogateescape") + b"\0" for word in words)
        text += bytes(-len(text) % 8)  # the filter is read in place
        flags = self.pty * _PTY | self.background * _BACKGROUND
        counts = (len(self.places), len(self.argv), len(self.environment), len(self.filter), len(text), 0)
        return _HEAD.pack(self.tenant, flags, self.open_files, self.file_size, *counts) + text + self.filter

    @classmethod
    def unpack(cls, data: bytes) -> Orders:
        """What was packed. Raises ValueError when it is cut off."""
        if len(data) < _HEAD.size:
            raise ValueError("the orders are cut off")
        tenant, flags, open_files, file_size, places, argc, envc, filtered, strings, _ = _HEAD.unpack_from(data)
        end = _HEAD.size + strings
        total = places + argc + envc
        words = [word.decode("utf-8", "surrogateescape") for word in data[_HEAD.size : end].split(b"\0")[:total]]
        if len(data) != end + filtered or len(words) != total:
            raise ValueError("the orders are cut off")
        pairs = (word.partition("=") for word in words[places + argc :])
        return cls(
            tuple(words[places : places + argc]),
            tuple(words[:places]),
            {name: value for name, _, value in pairs},
            tenant,
            open_files,
            file_size,
            bool(flags & _PTY),
            bool(flags & _BACKGROUND),
            data[end:],
        )

    def write(self) -> int:
        """A file in memory that holds them; its descriptor."""
        file = os.memfd_create("orders")
        try:
            view = memoryview(self.pack())
            while view:
                view = view[os.write(file, view) :]
        except BaseException:
            os.close(file)
            raise
        return file

    @classmethod
    def read(cls, file: int) -> Orders:
        """From such a file. Raises ValueError, OSError."""
        return cls.unpack(os.pread(file, os.fstat(file).st_size, 0))
