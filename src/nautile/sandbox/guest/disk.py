"""A read-only disk that is never written: EROFS metadata made here, above file contents that stay where they are on the host.

Copying the host's /usr into an image takes minutes and gigabytes; a 9p or virtio-fs share would put a file server within the
guest's reach and forbids snapshots. Instead the index says which block of the disk is which piece of which file, and
``blocks.py`` reads the piece when the guest asks. A file that has changed since then gives an error, never other content.

Layout of the disk: block 0 with the superblock, then inodes with small directories and links inside, then large directories,
then the files' contents, which exist in the index only. Format: EROFS as Linux 5.4 and newer read it, uncompressed.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nautile.sandbox.errors import InvalidRequest

__all__ = ["Node", "graft", "is_current", "scan", "write_index"]

BLOCK = 4096
_SUPER = 1024  # where the superblock begins
_FIRST = _SUPER + 128  # the first inode, which is the root: its number has 16 bits only
_FLAT, _INLINE = 0, 2  # data layouts: blocks; the last piece behind the inode
_KINDS = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}
_PREFIXES = {"user.": 1, "trusted.": 4}
_MOST = 4_000_000  # files of a disk
_SHARE = 65_536


@dataclass(slots=True)
class Node:
    """A file of the disk. ``data``: a link's target; ``source``: the host file with the content."""

    mode: int
    owner: tuple[int, int] = (0, 0)
    size: int = 0
    mtime: int = 0  # nanoseconds
    data: bytes = b""
    source: bytes = b""
    attributes: dict[str, bytes] = field(default_factory=dict)
    names: dict[bytes, Node] = field(default_factory=dict)  # a directory's
    links: int = 1
    number: int = 0  # where its inode is, in units of 32 bytes; 0: nowhere yet
    address: int = 0  # its first block, if it has blocks

    @property
    def directory(self) -> bool:
        """Whether it holds names."""
        return stat.S_ISDIR(self.mode)


def scan(place: Path, *, public: bool = False, user: int | None = None) -> Node:
    """The tree below a directory of the host, its contents left where they are.

    ``public``: only what everybody may read, owned by root and without setuid, as a system directory is given away.
    ``user``: the host's id that becomes the tenant's; None keeps ids. Raises InvalidRequest for more than four million files.
    """
    links: dict[tuple[int, int], Node] = {}
    count = 0

    def one(path: bytes, found: os.stat_result) -> Node | None:
        nonlocal count
        count += 1
        if count > _MOST:
            raise InvalidRequest(f"image {place}: more than {_MOST:,} files")
        if public and not _is_public(found):
            return None
        key = (found.st_dev, found.st_ino)
        if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode) and key in links:
            links[key].links += 1
            return links[key]
        node = _node(path, found, public, user)
        if found.st_nlink > 1:
            links[key] = node
        if node.directory:
            with os.scandir(path) as entries:
                for entry in entries:
                    below = one(entry.path, entry.stat(follow_symlinks=False))
                    if below is not None:
                        node.names[entry.name] = below
        return node

    root = one(os.fsencode(place), os.stat(place))
    if root is None:
        raise InvalidRequest(f"image {place}: it is not for everybody to read")
    return root


def _is_public(found: os.stat_result) -> bool:
    kind, mode = stat.S_IFMT(found.st_mode), found.st_mode
    if kind == stat.S_IFDIR:
        return mode & 0o005 == 0o005
    return kind == stat.S_IFLNK or (kind == stat.S_IFREG and bool(mode & 0o004))


def _node(path: bytes, found: os.stat_result, public: bool, user: int | None) -> Node:
    mode = found.st_mode & ~(0o6000 if public else 0)
    owner = (0, 0) if public else (_owner(found.st_uid, user), _owner(found.st_gid, user))
    node = Node(mode, owner, 0, found.st_mtime_ns)
    if stat.S_ISREG(mode):
        node.size, node.source = found.st_size, path
    elif stat.S_ISLNK(mode):
        node.data = os.readlink(path)
        node.size = len(node.data)
    elif stat.S_ISCHR(mode) and found.st_rdev != 0:
        node.mode = stat.S_IFCHR | 0o000  # a device of an image becomes the number that opens nothing
    if not public and not stat.S_ISLNK(mode):
        node.attributes = _attributes(path)
    return node


def _owner(number: int, user: int | None) -> int:
    if user is not None:
        return 1000 if number == user else 0
    return number if number < _SHARE else 65534


def _attributes(path: bytes) -> dict[str, bytes]:
    """The user's attributes, and overlayfs's marks under the name that the guest's overlayfs looks for."""
    kept = {}
    for name in os.listxattr(path, follow_symlinks=False):
        if name in ("trusted.overlay.opaque", "user.overlay.opaque"):
            kept["trusted.overlay.opaque"] = os.getxattr(path, name, follow_symlinks=False)
        elif name.startswith("user.") and not name.startswith("user.overlay."):
            kept[name] = os.getxattr(path, name, follow_symlinks=False)
    return kept


def graft(root: Node, path: str, node: Node) -> None:
    """Put a node at an absolute path of a tree; the directories above it are made."""
    steps = [step.encode() for step in path.split("/") if step]
    for step in steps[:-1]:
        root = root.names.setdefault(step, Node(stat.S_IFDIR | 0o755))
    root.names[steps[-1]] = node


class _Writer:
    """Gives every node its place, then writes inodes and directories."""

    def __init__(self, root: Node) -> None:
        self.root = root
        self.nodes: list[Node] = []
        self.parents: dict[int, Node] = {}
        self.at = _FIRST
        self._place(root)

    def _place(self, root: Node) -> None:
        """Inodes in breadth-first order: a directory and what it holds are near each other."""
        self.parents[id(root)] = root
        queue = [root]
        while queue:
            following: list[Node] = []
            for node in queue:
                if node.number:
                    continue
                self._put(node)
                for name in sorted(node.names):
                    below = node.names[name]
                    if below.directory:
                        self.parents[id(below)] = node
                    following.append(below)
            queue = following

    def _put(self, node: Node) -> None:
        fixed = 64 + len(_packed_attributes(node))
        if node.directory:
            node.size = _directory_size(node)
            node.links = 2 + sum(below.directory for below in node.names.values())
        inline = node.size if self.inline(node) else 0
        if self.at % BLOCK + fixed + inline > BLOCK:  # what is behind an inode stays in its block
            self.at += -self.at % BLOCK
        node.number = self.at // 32
        self.at += (fixed + inline + 31) // 32 * 32
        self.nodes.append(node)

    def inline(self, node: Node) -> bool:
        """Whether its content is behind its inode."""
        room = BLOCK - 64 - len(_packed_attributes(node))
        return (node.directory or stat.S_ISLNK(node.mode)) and 0 < node.size <= room - 32

    def image(self) -> tuple[bytearray, int]:
        """(the metadata, blocks of the whole disk); files get their addresses."""
        block = -(-self.at // BLOCK)
        for node in self.nodes:
            if (node.directory or stat.S_ISLNK(node.mode)) and not self.inline(node):
                node.address = block
                block += -(-node.size // BLOCK)
        out = bytearray(block * BLOCK)
        for node in self.nodes:
            if node.source:
                node.address = block
                block += -(-node.size // BLOCK)
        for node in self.nodes:
            self._write(out, node)
        _superblock(out, self.root.number, len(self.nodes), block)
        return out, block

    def _write(self, out: bytearray, node: Node) -> None:
        inline, attributes = self.inline(node), _packed_attributes(node)
        layout = _INLINE if inline else _FLAT
        count = 0 if not attributes else (len(attributes) - 12) // 4 + 1
        address = node.address if node.size and not inline else 0
        at = node.number * 32
        struct.pack_into(
            "<HHHHQIIIIqII", out, at,
            1 | layout << 1, count, node.mode & 0xFFFF, 0, node.size, address, node.number & 0xFFFFFFFF,
            node.owner[0], node.owner[1], node.mtime // 10**9, node.mtime % 10**9, node.links,
        )  # fmt: skip
        out[at + 64 : at + 64 + len(attributes)] = attributes
        if node.directory:
            data = self._directory(node)
        elif stat.S_ISLNK(node.mode):
            data = node.data
        else:
            return
        start = at + 64 + len(attributes) if inline else node.address * BLOCK
        out[start : start + len(data)] = data

    def _directory(self, node: Node) -> bytes:
        """Blocks of records and, behind them, names; sorted, so that the kernel can search."""
        numbers = {b".": (node.number, 2), b"..": (self.parents[id(node)].number, 2)}
        numbers |= {name: (below.number, _KINDS[stat.S_IFMT(below.mode)]) for name, below in node.names.items()}
        out = bytearray()
        for names in _directory_blocks(node):
            offset = 12 * len(names)
            block = bytearray()
            for name in names:
                block += struct.pack("<QHBB", numbers[name][0], offset, numbers[name][1], 0)
                offset += len(name)
            out += bytes(-len(out) % BLOCK) + block + b"".join(names)
        return bytes(out)


def _directory_blocks(node: Node) -> Iterator[list[bytes]]:
    names: list[bytes] = []
    used = 0
    for name in sorted([b".", b"..", *node.names]):
        if used + 12 + len(name) > BLOCK:
            yield names
            names, used = [], 0
        names.append(name)
        used += 12 + len(name)
    yield names


def _directory_size(node: Node) -> int:
    sizes = [sum(12 + len(name) for name in names) for names in _directory_blocks(node)]
    return (len(sizes) - 1) * BLOCK + sizes[-1]


def _packed_attributes(node: Node) -> bytes:
    if not node.attributes:
        return b""
    out = bytearray(12)
    for name, value in sorted(node.attributes.items()):
        prefix = next(one for one in _PREFIXES if name.startswith(one))
        short = name.removeprefix(prefix).encode("utf-8", "surrogateescape")
        out += struct.pack("<BBH", len(short), _PREFIXES[prefix], len(value)) + short + value
        out += bytes(-len(out) % 4)
    if len(out) > 2048:
        raise InvalidRequest("image: a file has more than 2,000 bytes of extended attributes")
    return bytes(out)


def _superblock(out: bytearray, root: int, inodes: int, blocks: int) -> None:
    if blocks >= 2**32:
        raise InvalidRequest("image: more than 16 TiB")
    struct.pack_into(
        "<IIIBBHQQIIII16s16sIH", out, _SUPER,
        0xE0F5E1E2, 0, 0, 12, 0, root, inodes, 0, 0, blocks, 0, 0, bytes(16), b"nautile", 0, 0,
    )  # fmt: skip


# -- the index: what blocks.py reads


def write_index(root: Node, target: Path, watched: list[Path]) -> None:
    """Write metadata and the table of contents to ``target``. ``watched``: directories whose change makes it stale."""
    writer = _Writer(root)
    metadata, blocks = writer.image()
    starts, sizes, times, places = array("Q"), array("Q"), array("q"), array("Q")
    paths = bytearray()
    for node in writer.nodes:
        if node.source and node.size:
            starts.append(node.address)
            sizes.append(node.size)
            times.append(node.mtime)
            places.append(len(paths))
            paths += node.source + b"\0"
    stamps = [[str(one), os.stat(one).st_mtime_ns] for place in watched for one in _directories(place)]
    head = json.dumps({"metadata": len(metadata), "blocks": blocks, "files": len(starts), "paths": len(paths)}).encode()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as file:
        file.write(struct.pack("<I", len(head)) + head)
        for piece in (metadata, starts, sizes, times, places, paths, json.dumps(stamps).encode()):
            file.write(piece)
    os.rename(temporary, target)


def _directories(place: Path) -> Iterator[str]:
    if not place.is_dir():
        yield str(place)
    for above, names, _ in os.walk(place):
        yield above
        names[:] = [name for name in names if not os.path.islink(os.path.join(above, name))]


def is_current(index: Path) -> bool:
    """Whether no directory below the watched ones has got, lost or renamed a file since the index was written."""
    try:
        with open(index, "rb") as file:
            head = json.loads(file.read(struct.unpack("<I", file.read(4))[0]))
            file.seek(head["metadata"] + 32 * head["files"] + head["paths"], os.SEEK_CUR)
            stamps = json.loads(file.read())
        return all(os.stat(place).st_mtime_ns == stamp for place, stamp in stamps)
    except (OSError, ValueError, KeyError, struct.error):
        return False
