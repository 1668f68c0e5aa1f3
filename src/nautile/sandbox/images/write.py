"""A layer in the making: names go into a tree in memory, contents into one file. Nothing is made where a source says."""

from __future__ import annotations

import collections
import hashlib
import os
import stat
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from nautile.sandbox.errors import ImageRefused, SubstrateUnavailable
from nautile.sandbox.images.tree import CHUNK, Inode, Layer, steps_of

__all__ = ["LayerWriter", "add_directory", "add_tar", "debian"]

_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_MACHINES = {62: "x86_64", 183: "aarch64", 243: "riscv64", 40: "armv7l", 3: "i686", 22: "s390x", 21: "ppc64le"}
_MOST_BYTES = 64 * 2**30
_MOST_INODES = 2_000_000


class LayerWriter:
    """Takes what a layer holds, in any order but directories' content after hard links' targets; ``finish`` gives the layer."""

    def __init__(self, data: BinaryIO, image: str, most: int = _MOST_BYTES) -> None:
        self.data, self.image, self.most = data, image, most
        self.inodes = [Inode("directory")]
        self.left_out = 0  # device nodes of /dev, sockets
        self.size = 0
        self._digest, self._chunks, self._chunk = hashlib.sha256(), [], hashlib.sha256()  # type: tuple[Any, list[str], Any]
        self._machines: collections.Counter[str] = collections.Counter()

    def add(self, path: str, inode: Inode, content: BinaryIO | None = None) -> None:
        """Something at a path; directories above it are made if need be. A later one takes the place of an earlier."""
        steps = steps_of(path, self.image)
        if not steps:  # the root itself
            if inode.kind == "directory":
                self.inodes[0] = self._merged(self.inodes[0], inode)
            return
        if len(self.inodes) >= _MOST_INODES:
            self._refuse(f"it holds more than {_MOST_INODES:,} files")
        above = self._above(path, steps)
        if inode.kind == "directory" and (there := self._at(above, steps[-1])) is not None and there.kind == "directory":
            self.inodes[above.entries[steps[-1]]] = self._merged(there, inode)
            return
        if content is not None:
            self._take(path, inode, content)
        above.entries[steps[-1]] = len(self.inodes)
        self.inodes.append(inode)

    def link(self, path: str, other: str) -> None:
        """Another name of a file that is in the layer already."""
        found: Inode | None = self.inodes[0]
        number = 0
        for step in steps_of(other, self.image):
            number = found.entries.get(step, -1) if found is not None and found.kind == "directory" else -1
            found = self.inodes[number] if number >= 0 else None
        if found is None or found.kind == "directory":
            self._refuse(f"{path[:80]!r} is another name of {other[:80]!r}, which is not a file in it")
        steps = steps_of(path, self.image)
        self._above(path, steps).entries[steps[-1]] = number

    def opaque(self, path: str) -> None:
        """Hide what the layers below have in this directory."""
        steps = steps_of(path, self.image)
        self._above(path, [*steps, ""]).opaque = True

    def _above(self, path: str, steps: list[str]) -> Inode:
        found = self.inodes[0]
        for step in steps[:-1]:
            number = found.entries.get(step)
            if number is None:
                number = found.entries[step] = len(self.inodes)
                self.inodes.append(Inode("directory"))
            found = self.inodes[number]
            if found.kind != "directory":
                self._refuse(f"{path[:80]!r} lies below something that is not a directory: through a link, or in a file")
        return found

    def _at(self, above: Inode, name: str) -> Inode | None:
        number = above.entries.get(name)
        return None if number is None else self.inodes[number]

    @staticmethod
    def _merged(old: Inode, new: Inode) -> Inode:
        new.entries, new.opaque = old.entries, old.opaque
        return new

    def _take(self, path: str, inode: Inode, content: BinaryIO) -> None:
        inode.offset, first = self.size, b""
        left = inode.size
        if left < 0 or self.size + left > self.most:
            self._refuse(f"it holds more than {self.most:,} bytes")
        while left:
            data = content.read(min(left, 2**20))
            if not data:
                self._refuse(f"{path[:80]!r} is shorter than it says")
            first = first or data[:20]
            left -= len(data)
            self._append(data)
        if inode.mode & 0o111 and first[:4] == b"\x7fELF" and len(first) == 20:
            self._machines[_MACHINES.get(int.from_bytes(first[18:20], "little"), "unknown")] += 1

    def _append(self, data: bytes) -> None:
        self.data.write(data)
        self._digest.update(data)
        view = memoryview(data)
        while view:
            room = CHUNK - self.size % CHUNK
            self._chunk.update(view[:room])
            self.size += len(view[:room])
            if self.size % CHUNK == 0:
                self._end_chunk()
            view = view[room:]

    def _end_chunk(self) -> None:
        self._chunks.append(self._chunk.hexdigest())
        self._chunk = hashlib.sha256()

    def finish(self) -> Layer:
        """The layer; its data has been written."""
        if self.size % CHUNK:
            self._end_chunk()
        common = self._machines.most_common(1)
        return Layer(self.inodes, self.size, self._digest.hexdigest(), self._chunks, common[0][0] if common else None)

    def _refuse(self, why: str) -> Any:
        raise ImageRefused(self.image, why, "build it again from a source that you trust")


def add_directory(writer: LayerWriter, place: Path) -> None:
    """Everything below a directory of the host; links are taken as links. Raises ImageRefused, OSError."""
    if not place.is_dir():
        raise ImageRefused(str(place), "it is not a directory", "name a directory, a tar, or an OCI layout")
    links: dict[tuple[int, int], str] = {}
    stack = [(place, "")]
    writer.add("", _described(os.lstat(place), "directory", place))
    while stack:
        directory, prefix = stack.pop()
        for entry in sorted(os.scandir(directory), key=lambda one: one.name):
            path = f"{prefix}{entry.name}"
            found = entry.stat(follow_symlinks=False)
            if entry.is_dir(follow_symlinks=False):
                writer.add(path, _described(found, "directory", entry.path))
                if _is_opaque(entry.path):
                    writer.opaque(path)
                stack.append((Path(entry.path), f"{path}/"))
            elif stat.S_ISREG(found.st_mode):
                earlier = links.setdefault((found.st_dev, found.st_ino), path)
                if earlier != path:
                    writer.link(path, earlier)
                    continue
                with open(os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as content:
                    writer.add(path, _described(found, "file", entry.path), content)
            else:
                _add_special(writer, path, found, entry.path)


def _add_special(writer: LayerWriter, path: str, found: os.stat_result, place: str) -> None:
    if stat.S_ISLNK(found.st_mode):
        inode = _described(found, "link", None)
        inode.target = os.readlink(place)
        writer.add(path, inode)
    elif stat.S_ISFIFO(found.st_mode):
        writer.add(path, _described(found, "fifo", None))
    elif stat.S_ISCHR(found.st_mode) and found.st_rdev == 0:
        writer.add(path, Inode("whiteout", mode=0))
    else:  # sockets have no meaning without their process; every sandbox has a /dev of its own
        writer.left_out += 1


def _described(found: os.stat_result, kind: str, place: str | Path | None) -> Inode:
    attributes = {}
    if place is not None:
        for name in os.listxattr(place, follow_symlinks=False):
            if name.startswith("user.") and not name.startswith("user.overlay."):
                attributes[name] = os.getxattr(place, name, follow_symlinks=False).decode("utf-8", "surrogateescape")
    size = found.st_size if kind == "file" else 0
    mode = stat.S_IMODE(found.st_mode)
    return Inode(kind, mode, found.st_uid, found.st_gid, int(found.st_mtime), size, attributes=attributes)


def _is_opaque(place: str) -> bool:
    names = set(os.listxattr(place, follow_symlinks=False)) & {"trusted.overlay.opaque", "user.overlay.opaque"}
    return any(os.getxattr(place, name, follow_symlinks=False) == b"y" for name in names)


def add_tar(writer: LayerWriter, file: BinaryIO) -> None:
    """Everything in a tar, plain or compressed (gzip, bzip2, xz, zstd), with OCI's whiteouts. Raises ImageRefused."""
    try:
        with _decompressed(file) as plain, tarfile.open(fileobj=plain, mode="r|", errorlevel=2) as archive:
            for entry in archive:
                _add_entry(writer, archive, entry)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ImageRefused(writer.image, f"it is not a complete tar ({error})", "copy it again") from None


@contextmanager
def _decompressed(file: BinaryIO) -> Iterator[IO[bytes]]:
    """The plain stream; external programs do what Python's library cannot read as a stream."""
    head = file.read(6)
    file.seek(0)
    tools = {b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}
    tool = next((name for magic, name in tools.items() if head.startswith(magic)), None)
    if tool is None:
        yield file
        return
    os.lseek(file.fileno(), 0, os.SEEK_SET)  # a buffered reader may have left it anywhere
    try:
        process = subprocess.Popen([tool, "-dc"], stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SubstrateUnavailable("image", f"{tool} is missing", f"apt-get install {tool}") from None
    assert process.stdout is not None
    try:
        yield process.stdout
        process.stdout.read()
        if process.wait(60) != 0:
            raise tarfile.ReadError(f"{tool} cannot decompress it")
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def _add_entry(writer: LayerWriter, archive: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
    above, _, name = entry.name.rstrip("/").rpartition("/")
    if name == _OPAQUE:
        return writer.opaque(above)
    if name.startswith(_WHITEOUT):
        return writer.add(f"{above}/{name.removeprefix(_WHITEOUT)}", Inode("whiteout", mode=0))
    if entry.islnk():
        return writer.link(entry.name, entry.linkname)
    kinds = {tarfile.DIRTYPE: "directory", tarfile.SYMTYPE: "link", tarfile.FIFOTYPE: "fifo"}
    kind = "file" if entry.isreg() else kinds.get(entry.type)
    if kind is None:
        steps = steps_of(entry.name, writer.image)
        if steps[:1] != ["dev"]:
            raise ImageRefused(writer.image, f"it holds a device at {entry.name[:80]!r}", "only /dev may, where it is left out")
        writer.left_out += 1
        return None
    inode = Inode(
        kind, entry.mode & 0o7777, entry.uid, entry.gid, int(entry.mtime), target=entry.linkname if kind == "link" else ""
    )
    for key, value in entry.pax_headers.items():
        if key.startswith("SCHILY.xattr.user."):
            inode.attributes[key.removeprefix("SCHILY.xattr.")] = value
    content = None
    if kind == "file":
        inode.size, content = entry.size, archive.extractfile(entry)
    return writer.add(entry.name, inode, content)  # type: ignore[arg-type]


def debian(writer: LayerWriter, suite: str, packages: list[str], mirror: str | None = None) -> None:
    """A Debian system made by mmdebstrap, of the smallest variant, with these packages. Raises SubstrateUnavailable."""
    argv = ["mmdebstrap", "--quiet", "--variant=minbase", "--format=tar"]
    argv += [f"--include={','.join(packages)}"] if packages else []
    argv += [suite, "-", *([mirror] if mirror else [])]
    try:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError:
        raise SubstrateUnavailable("image", "mmdebstrap is missing", "apt-get install mmdebstrap") from None
    assert process.stdout is not None and process.stderr is not None
    try:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for entry in archive:
                _add_entry(writer, archive, entry)
    except tarfile.TarError:
        pass  # what mmdebstrap says is the better reason
    finally:
        if process.stdout.read(1):
            process.kill()
        said = process.stderr.read().decode("utf-8", "replace").strip().splitlines()
        status = process.wait()
    if status != 0:
        raise ImageRefused(suite, f"mmdebstrap failed: {said[-1] if said else status}", "see mmdebstrap --help and its mirrors")
