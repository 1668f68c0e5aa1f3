"""Serves a virtual disk to QEMU, read-only, in the NBD protocol over a socket that nobody else has.

Standard library only and few modules: it is part of a machine's start. The other side is a hostile guest's emulator: requests
have a fixed size, and reach nothing but the bytes that the index names.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from array import array
from bisect import bisect_right

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

__all__ = ["Disk", "Export"]

_BLOCK = 4096
_OPEN_FILES = 128
_LONGEST = 32 * 2**20  # bytes of one request, as the protocol allows by default
_EIO, _EINVAL, _EPERM = 5, 22, 1


class Disk:
    """The index that ``disk.write_index`` made, and the files behind it."""

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        length = struct.unpack_from("<I", self._map)[0]
        head = json.loads(self._map[4 : 4 + length])
        self.size: int = head["blocks"] * _BLOCK
        self._begin, self._metadata = 4 + length, head["metadata"]
        at, count = self._begin + self._metadata, head["files"]
        self._tables = []
        for kind in "QQqQ":
            table = array(kind)
            table.frombytes(self._map[at : at + 8 * count])
            self._tables.append(table)
            at += 8 * count
        self._paths = at
        self._open: dict[int, int] = {}
        self.fetched = 0  # bytes of files that were asked for

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``. Raises OSError when a file is not what it was any more."""
        pieces, end = [], offset + length
        if offset < self._metadata:
            stop = min(end, self._metadata)
            pieces.append(self._map[self._begin + offset : self._begin + stop])
            offset = stop
        starts, sizes = self._tables[0], self._tables[1]
        while offset < end:
            number = bisect_right(starts, offset // _BLOCK) - 1
            begin = starts[number] * _BLOCK
            padded = begin + -(-sizes[number] // _BLOCK) * _BLOCK
            stop = min(end, padded)
            if number < 0 or offset >= padded:
                raise OSError(_EINVAL, "between files")
            wanted = max(min(stop, begin + sizes[number]) - offset, 0)  # the rest of its last block is zeros
            data = os.pread(self._file(number), wanted, offset - begin)
            if len(data) < wanted:
                raise OSError(_EIO, "a file became shorter")
            pieces.append(data + bytes(stop - offset - len(data)))
            self.fetched += len(data)
            offset = stop
        return b"".join(pieces)

    def _file(self, number: int) -> int:
        found = self._open.pop(number, None)
        if found is None:
            begin = self._paths + self._tables[3][number]
            path = self._map[begin : self._map.find(b"\0", begin)]
            found = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            now = os.fstat(found)
            if (now.st_size, now.st_mtime_ns) != (self._tables[1][number], self._tables[2][number]):
                os.close(found)
                raise OSError(_EIO, "a file has changed")
            if len(self._open) >= _OPEN_FILES:
                oldest = next(iter(self._open))
                os.close(self._open.pop(oldest))
        self._open[number] = found
        return found


class Export:
    """One connection of QEMU's."""

    def __init__(self, channel: socket.socket, disk: Disk) -> None:
        self.channel, self.disk = channel, disk
        self._greeted = False
        channel.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))

    def serve(self) -> bool:
        """One request, which has begun to arrive; False when the connection is over."""
        if not self._greeted:
            self._greeted = self._greet()
            return self._greeted
        request = self._exactly(28)
        if request is None:
            return False
        magic, _, kind, handle, offset, length = struct.unpack(">IHHQQI", request)
        if magic != 0x25609513 or kind == 2 or (kind == 1 and length > _LONGEST):  # no request, goodbye, or a flood
            return False
        data, error = b"", 0
        if kind == 0:
            try:
                if length > _LONGEST or offset + length > self.disk.size:
                    raise OSError(_EINVAL, "beyond the end")
                data = self.disk.read(offset, length)
            except OSError as failure:
                error = _EINVAL if failure.errno == _EINVAL else _EIO
        elif kind == 3:  # flush
            pass
        else:
            if kind == 1 and self._exactly(length) is None:
                return False
            error = _EPERM
        self.channel.sendall(struct.pack(">IIQ", 0x67446698, error, handle) + data)
        return True

    def _greet(self) -> bool:
        """The client's part of the handshake; options that are not needed are declined."""
        if self._exactly(4) is None:
            return False
        for _ in range(32):
            head = self._exactly(16)
            if head is None:
                return False
            magic, option, length = struct.unpack(">QII", head)
            if magic != 0x49484156454F5054 or length > 4096 or self._exactly(length) is None:
                return False
            if option in (6, 7):  # info, go
                self._reply(option, 3, struct.pack(">HQH", 0, self.disk.size, 1 | 2))  # it has flags, it is read-only
                self._reply(option, 1, b"")
                if option == 7:
                    return True
            else:
                self._reply(option, 0x80000001, b"")
        return False

    def _reply(self, option: int, kind: int, data: bytes) -> None:
        self.channel.sendall(struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data)

    def _exactly(self, length: int) -> bytes | None:
        pieces = bytearray()
        while len(pieces) < length:
            data = self.channel.recv(length - len(pieces))
            if not data:
                return None
            pieces += data
        return bytes(pieces)
