"""A read-only file system over a layer, spoken to the kernel through /dev/fuse (protocol 7.31 and later), without a library.

Metadata is all in memory, so only reads of files ever wait for a store. Nothing changes: the kernel may keep every name, those
that are not there too, and every page as long as it likes. Names and owners come from an index that has been checked.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
import traceback
from collections.abc import Callable

from nautile.sandbox.errors import ImageRefused
from nautile.sandbox.images.chunks import Chunks
from nautile.sandbox.images.tree import Inode, Layer

__all__ = ["Server"]

_IN, _OUT = struct.Struct("<IIQQIIIHH"), struct.Struct("<IiQ")
_ATTRIBUTES = struct.Struct("<6Q10I")
_ENTRY = struct.Struct("<4Q2I")
_FOREVER = 10**9  # seconds
_BUFFER = 2**16  # bytes of a request: there are no writes
_READ_SIZE = 256  # pages of one read
_FLAGS = sum(1 << bit for bit in (0, 13, 14, 17, 18, 22, 23, 24))
# ASYNC_READ, DO_READDIRPLUS, READDIRPLUS_AUTO, NO_OPEN_SUPPORT, PARALLEL_DIROPS, MAX_PAGES, CACHE_SYMLINKS, NO_OPENDIR_SUPPORT
_TYPES = {"directory": stat.S_IFDIR, "file": stat.S_IFREG, "link": stat.S_IFLNK, "fifo": stat.S_IFIFO, "whiteout": stat.S_IFCHR}
_SHARE = 65_536


class _NoReply(Exception):  # noqa: N818
    """The kernel expects none."""


class Server:
    """Answers the kernel on ``descriptor``. ``base``: added to every owner, so that they are a container's own ids."""

    def __init__(self, descriptor: int, layer: Layer, chunks: Chunks, base: int = 0) -> None:
        self.descriptor, self.layer, self.chunks, self.base = descriptor, layer, chunks, base
        self.links = [0] * len(layer.inodes)
        for inode in layer.inodes:
            for number in inode.entries.values():
                self.links[number] += 1
        self.handlers: dict[int, Callable[[int, memoryview], bytes]] = {
            1: self._lookup,
            2: self._nothing,  # FORGET
            3: self._getattr,
            5: self._readlink,
            15: self._read,
            17: self._statfs,
            22: self._getxattr,
            23: self._listxattr,
            26: self._init,
            28: lambda node, body: self._readdir(node, body, plus=False),
            36: self._nothing,  # INTERRUPT
            42: self._nothing,  # BATCH_FORGET
            44: lambda node, body: self._readdir(node, body, plus=True),
        }

    def serve(self) -> None:
        """Until the file system is unmounted. Call it from as many threads as may wait for the store at once."""
        while True:
            try:
                request = os.read(self.descriptor, _BUFFER)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                raise
            _, opcode, unique, node, *_ = _IN.unpack_from(request)
            try:
                self._reply(unique, 0, self._answer(opcode, node, memoryview(request)[_IN.size :]))
            except _NoReply:
                continue
            except OSError as error:
                self._reply(unique, error.errno or errno.EIO)
            except Exception:
                traceback.print_exc()
                self._reply(unique, errno.EIO)

    def start(self, threads: int) -> list[threading.Thread]:
        """Serve from some threads; they end when it is unmounted."""
        found = [threading.Thread(target=self.serve, daemon=True) for _ in range(threads)]
        for one in found:
            one.start()
        return found

    def _answer(self, opcode: int, node: int, body: memoryview) -> bytes:
        handler = self.handlers.get(opcode)
        if handler is None:  # also OPEN and OPENDIR: the kernel then asks no more, which saves a round trip a file
            raise OSError(errno.EROFS if opcode in (4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35) else errno.ENOSYS, "")
        if opcode not in (2, 26, 36, 42) and not 0 < node <= len(self.layer.inodes):
            raise OSError(errno.ESTALE, "")
        return handler(node, body)

    def _reply(self, unique: int, error: int, body: bytes = b"") -> None:
        try:
            os.writev(self.descriptor, [_OUT.pack(_OUT.size + len(body), -error, unique), body])
        except OSError as failure:
            if failure.errno not in (errno.ENOENT, errno.ENODEV):  # the one who asked has been killed, or it is unmounted
                raise

    # -- one method an operation; their layouts are those of linux/fuse.h

    def _nothing(self, node: int, body: memoryview) -> bytes:
        raise _NoReply

    def _init(self, node: int, body: memoryview) -> bytes:
        major, minor, ahead, flags = struct.unpack_from("<4I", body)
        if major != 7 or minor < 31:
            raise OSError(errno.EPROTO, "")
        return struct.pack("<4I2H2I2H2I24x", 7, 31, min(ahead, 2**20), flags & _FLAGS, 16, 12, 4096, 1, _READ_SIZE, 0, 0, 0)

    def _inode(self, node: int) -> Inode:
        return self.layer.inodes[node - 1]

    def _attributes(self, node: int) -> bytes:
        inode = self._inode(node)
        size = len(os.fsencode(inode.target)) if inode.kind == "link" else inode.size
        owner, group = ((one if one < _SHARE else _SHARE - 2) + self.base for one in (inode.uid, inode.gid))
        links = 2 if inode.kind == "directory" else max(self.links[node - 1], 1)
        time = max(inode.mtime, 0)
        mode = _TYPES[inode.kind] | (inode.mode & 0o1777)  # no setuid: nothing here honours it
        return _ATTRIBUTES.pack(node, size, -(-size // 512), time, time, time, 0, 0, 0, mode, links, owner, group, 0, 4096, 0)

    def _entry(self, node: int) -> bytes:
        return _ENTRY.pack(node, 0, _FOREVER, _FOREVER, 0, 0) + (self._attributes(node) if node else bytes(_ATTRIBUTES.size))

    def _lookup(self, node: int, body: memoryview) -> bytes:
        name = os.fsdecode(bytes(body).partition(b"\0")[0])
        number = self._inode(node).entries.get(name)
        return self._entry(0 if number is None else number + 1)  # 0: there is no such name, for ever

    def _getattr(self, node: int, body: memoryview) -> bytes:
        return struct.pack("<QII", _FOREVER, 0, 0) + self._attributes(node)

    def _readlink(self, node: int, body: memoryview) -> bytes:
        return os.fsencode(self._inode(node).target)

    def _read(self, node: int, body: memoryview) -> bytes:
        offset, size = struct.unpack_from("<QI", body, 8)
        inode = self._inode(node)
        if inode.kind != "file":
            raise OSError(errno.EINVAL, "")
        try:
            return self.chunks.read(inode.offset + offset, min(size, inode.size - offset)) if offset < inode.size else b""
        except ImageRefused as error:
            print(error, flush=True)
            raise OSError(errno.EIO, "") from None

    def _statfs(self, node: int, body: memoryview) -> bytes:
        return struct.pack("<5Q4I24x", -(-self.layer.size // 4096), 0, 0, len(self.layer.inodes), 0, 4096, 255, 4096, 0)

    def _values(self, node: int) -> dict[bytes, bytes]:
        inode = self._inode(node)
        found = {os.fsencode(key): os.fsencode(value) for key, value in inode.attributes.items()}
        if inode.opaque:
            found |= {b"trusted.overlay.opaque": b"y", b"user.overlay.opaque": b"y"}
        return found

    def _getxattr(self, node: int, body: memoryview) -> bytes:
        size = struct.unpack_from("<I", body)[0]
        value = self._values(node).get(bytes(body[8:]).partition(b"\0")[0])
        if value is None:
            raise OSError(errno.ENODATA, "")
        return _sized(value, size)

    def _listxattr(self, node: int, body: memoryview) -> bytes:
        return _sized(b"".join(name + b"\0" for name in self._values(node)), struct.unpack_from("<I", body)[0])

    def _readdir(self, node: int, body: memoryview, plus: bool) -> bytes:
        offset, size = struct.unpack_from("<QI", body, 8)
        inode = self._inode(node)
        if inode.kind != "directory":
            raise OSError(errno.ENOTDIR, "")
        names = [(".", node), ("..", node), *((name, number + 1) for name, number in inode.entries.items())]
        out = bytearray()
        for cookie, (name, inner) in enumerate(names[offset:], offset + 1):
            text = os.fsencode(name)
            kind = _TYPES[self._inode(inner).kind] >> 12
            record = struct.pack("<QQII", inner, cookie, len(text), kind) + text + bytes(-len(text) % 8)
            if plus:  # "." and ".." must not be looked up by this
                record = self._entry(0 if name in (".", "..") else inner) + record
            if len(out) + len(record) > size:
                break
            out += record
        return bytes(out)


def _sized(value: bytes, size: int) -> bytes:
    """What the kernel wants of an attribute: its length, or all of it."""
    if size == 0:
        return struct.pack("<II", len(value), 0)
    if len(value) > size:
        raise OSError(errno.ERANGE, "")
    return value
