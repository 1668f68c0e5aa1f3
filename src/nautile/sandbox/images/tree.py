"""A layer's metadata: a tree of names, and where in the data each file is. Checked when it is read: stores are not trusted.

The index is one compressed JSON object. Its digest is the layer's; it holds the digest of every chunk of the data, so that any
part of the data can be checked when it comes, whatever it comes from.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nautile.sandbox.errors import ImageRefused

__all__ = ["CHUNK", "DEEPEST", "Inode", "Layer", "digest_of", "steps_of"]

CHUNK = 256 * 1024  # bytes that are fetched and cached at once
DEEPEST = 512  # directories in directories
_FORMAT = "nautile-layer-1"
_MOST_INODES = 4_000_000
_LARGEST_INDEX = 512 * 2**20  # bytes, decompressed
_KINDS = ("directory", "file", "link", "fifo", "whiteout")


@dataclass
class Inode:
    """One file, directory, link, named pipe, or whiteout (a name that hides one of the layers below).

    ``entries``: of a directory, by name, the numbers of inodes; ``opaque``: it hides what the layers below have in it.
    ``offset``: of a file, in the layer's data. Names are text with surrogates for bytes that are not UTF-8, as in os.fsdecode.
    """

    kind: str
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    size: int = 0
    offset: int = 0
    target: str = ""
    attributes: dict[str, str] = field(default_factory=dict)
    entries: dict[str, int] = field(default_factory=dict)
    opaque: bool = False


@dataclass
class Layer:
    """The metadata of a layer. ``inodes[0]`` is its root; ``chunks``: sha256 of each chunk of the data, in hexadecimal."""

    inodes: list[Inode]
    size: int
    data: str
    chunks: list[str]
    machine: str | None = None

    def pack(self) -> bytes:
        """As the bytes of an index."""
        fields = ("kind", "mode", "uid", "gid", "mtime", "size", "offset", "target", "attributes", "entries", "opaque")
        head = {"format": _FORMAT, "chunk": CHUNK, "size": self.size, "data": self.data, "machine": self.machine}
        body = {**head, "chunks": self.chunks, "inodes": [[getattr(one, name) for name in fields] for one in self.inodes]}
        return zlib.compress(json.dumps(body, separators=(",", ":")).encode(), 6)

    @classmethod
    def unpack(cls, data: bytes, name: str) -> Layer:
        """Read an index and check all of it. Raises ImageRefused."""
        try:
            engine = zlib.decompressobj()
            text = engine.decompress(data, _LARGEST_INDEX)
            if engine.unconsumed_tail or not engine.eof:
                raise ValueError("it is cut off or too large")
            body = json.loads(text)
            if body["format"] != _FORMAT or body["chunk"] != CHUNK:
                raise ValueError(f"its format is {body['format']!r}, this version reads {_FORMAT}")
            layer = cls([Inode(*one) for one in body["inodes"]], body["size"], body["data"], body["chunks"], body["machine"])
            _check(layer)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, zlib.error) as error:
            raise ImageRefused(name, f"its index is corrupt: {error}", "build or copy it again") from None
        return layer

    def walk(self) -> Iterator[tuple[str, int]]:
        """(path, number) of everything but the root, directories before what is in them."""
        stack = [("", 0)]
        while stack:
            prefix, number = stack.pop()
            for name, inner in self.inodes[number].entries.items():
                yield prefix + name, inner
                if self.inodes[inner].kind == "directory":
                    stack.append((f"{prefix}{name}/", inner))


def _check(layer: Layer) -> None:
    """Everything that a reader relies on. Raises ValueError, TypeError."""
    if not 0 < len(layer.inodes) <= _MOST_INODES or layer.inodes[0].kind != "directory":
        raise ValueError("it has no root, or too many files")
    if not isinstance(layer.size, int) or layer.size < 0 or len(layer.chunks) != -(-layer.size // CHUNK):
        raise ValueError("the chunks do not make up its size")
    if any(not isinstance(one, str) or len(bytes.fromhex(one)) != 32 for one in layer.chunks):
        raise ValueError("a chunk has no digest")
    if not isinstance(layer.data, str) or len(bytes.fromhex(layer.data)) != 32:
        raise ValueError("its data has no digest")
    for inode in layer.inodes:
        _check_inode(inode, layer.size)
    _check_tree(layer)


def _check_inode(inode: Inode, most: int) -> None:
    numbers = (inode.mode, inode.uid, inode.gid, inode.mtime, inode.size, inode.offset)
    if inode.kind not in _KINDS or any(type(one) is not int for one in numbers) or not 0 <= inode.mode <= 0o7777:
        raise ValueError("an entry is of no known kind")
    if not (0 <= inode.uid < 2**32 and 0 <= inode.gid < 2**32 and abs(inode.mtime) < 2**40):
        raise ValueError("an entry's owner or time is out of range")
    if inode.size < 0 or inode.offset < 0 or inode.offset + inode.size > most:
        raise ValueError("a file lies outside of the data")
    if not isinstance(inode.target, str) or "\0" in inode.target or len(inode.target) > 4096:
        raise ValueError("a link leads nowhere")
    if any(not (isinstance(one, str) and one.startswith("user.")) for one in inode.attributes):
        raise ValueError("an attribute is not a user's")
    if inode.kind != "directory" and inode.entries:
        raise ValueError("something that is not a directory holds names")


def _check_tree(layer: Layer) -> None:
    """Every name is a single step; every directory is reached once, none from below itself."""
    seen, stack = {0}, [(0, 0)]
    while stack:
        number, depth = stack.pop()
        for name, inner in layer.inodes[number].entries.items():
            if not _is_step(name):
                raise ValueError(f"{name!r} is not a name")
            if type(inner) is not int or not 0 <= inner < len(layer.inodes):
                raise ValueError("a name stands for nothing")
            if layer.inodes[inner].kind == "directory":
                if inner in seen or depth >= DEEPEST:
                    raise ValueError("its directories do not form a tree")
                seen.add(inner)
                stack.append((inner, depth + 1))


def _is_step(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\0"} and len(name) <= 255


def steps_of(path: str, image: str) -> list[str]:
    """The steps of a path in an archive. Raises ImageRefused for one that leads out."""
    steps = [step for step in path.split("/") if step not in ("", ".")]
    if len(steps) > DEEPEST or any(not _is_step(step) for step in steps):
        raise ImageRefused(image, f"it holds the name {path[:80]!r}, which leads out of it or is too long", "do not trust it")
    return steps


def digest_of(data: bytes) -> str:
    """sha256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
