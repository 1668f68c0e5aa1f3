"""What a sandbox has changed, as an OCI layer: overlayfs says it with device nodes and attributes, a tar with names."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nautile.sandbox.errors import FileRefused, InvalidRequest
from nautile.sandbox.inside import frames
from nautile.sandbox.state import SHARE, State

__all__ = ["pack", "pack_answer", "unpack"]

_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_DEEPEST = 512


def pack_answer(state: State, request: dict[str, Any], channel: socket.socket) -> None:
    """Freeze, pack, thaw, and answer with the digest. With ``layer`` the result is unpacked there as a layer."""
    upper = state.work / "fs/upper"
    frozen = state.group.tracker is not None
    if frozen:
        state.group.freeze(True)
    try:
        if "target" in request:
            digest = _pack_to(upper, Path(request["target"]), state.base or 0)
        else:
            with tempfile.TemporaryFile(dir=state.place) as file:
                digest = pack(upper, file, state.base or 0)
                file.seek(0)
                unpack(file, Path(request["layer"]), "trusted" if state.base is not None else "user")
    finally:
        if frozen:
            state.group.freeze(False)
    frames.send(channel, {"ok": True, "digest": digest})


def _pack_to(upper: Path, target: Path, base: int) -> str:
    if not target.parent.is_dir():
        raise InvalidRequest(f"{target.parent} is not a directory")
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            digest = pack(upper, file, base)
            file.flush()
            os.fsync(file.fileno())
        os.rename(name, target)
    except BaseException:
        os.unlink(name)
        raise
    return digest


class _Hashed:
    """A file that is written once, and its digest."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.file.tell()


def pack(upper: Path, file: BinaryIO, base: int) -> str:
    """Write the upper directory of an overlay as a tar; ``sha256:`` and its digest. The same content gives the same bytes."""
    hashed = _Hashed(file)
    links: dict[tuple[int, int], str] = {}
    with tarfile.open(fileobj=hashed, mode="w", format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
        for path, relative in _walk(upper, "", 0):
            _add(archive, path, relative, base, links)
    return f"sha256:{hashed.digest.hexdigest()}"


def _walk(directory: Path, prefix: str, depth: int) -> Iterator[tuple[Path, str]]:
    if depth > _DEEPEST:
        raise FileRefused("/" + prefix[:80], f"more than {_DEEPEST} levels cannot be packed")
    for name in sorted(os.listdir(directory)):
        path = directory / name
        relative = f"{prefix}/{name}" if prefix else name
        yield path, relative
        if stat.S_ISDIR(os.lstat(path).st_mode):
            yield from _walk(path, relative, depth + 1)


def _add(archive: tarfile.TarFile, path: Path, relative: str, base: int, links: dict[tuple[int, int], str]) -> None:
    found = os.lstat(path)
    above, _, name = relative.rpartition("/")
    if name.startswith(_WHITEOUT):
        raise FileRefused("/" + relative, "OCI layers cannot hold names that begin with .wh.")
    entry = tarfile.TarInfo(relative)
    entry.mode, entry.mtime = stat.S_IMODE(found.st_mode), int(found.st_mtime)
    entry.uid, entry.gid = (one - base if base <= one < base + SHARE else 65534 for one in (found.st_uid, found.st_gid))
    entry.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in _attributes(path).items()}
    if stat.S_ISCHR(found.st_mode) and found.st_rdev == 0:
        entry.name = f"{above}/{_WHITEOUT}{name}".lstrip("/")
        archive.addfile(entry)
    elif stat.S_ISDIR(found.st_mode):
        entry.type = tarfile.DIRTYPE
        archive.addfile(entry)
        if _is_opaque(path):
            archive.addfile(tarfile.TarInfo(f"{relative}/{_OPAQUE}"))
    elif stat.S_ISLNK(found.st_mode):
        entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(path)
        archive.addfile(entry)
    elif stat.S_ISFIFO(found.st_mode):
        entry.type = tarfile.FIFOTYPE
        archive.addfile(entry)
    elif stat.S_ISREG(found.st_mode):
        earlier = links.setdefault((found.st_dev, found.st_ino), relative)
        if earlier != relative:
            entry.type, entry.linkname = tarfile.LNKTYPE, earlier
            archive.addfile(entry)
            return
        entry.size = found.st_size
        with open(path, "rb") as content:
            archive.addfile(entry, content)
    # Sockets have no meaning without their process, and devices cannot be made by a tenant.


def _attributes(path: Path) -> dict[str, str]:
    names = [name for name in os.listxattr(path, follow_symlinks=False) if name.startswith("user.")]
    values = {name: os.getxattr(path, name, follow_symlinks=False) for name in names if not name.startswith("user.overlay.")}
    return {name: value.decode("utf-8", "surrogateescape") for name, value in values.items()}


def _is_opaque(path: Path) -> bool:
    for name in ("trusted.overlay.opaque", "user.overlay.opaque"):
        try:
            if os.getxattr(path, name) == b"y":
                return True
        except OSError:
            continue
    return False


def unpack(file: BinaryIO, target: Path, attributes: str = "trusted") -> None:
    """Make an overlay layer of a tar. Every name is checked, links are made and never followed. Raises FileRefused.

    ``attributes``: where overlayfs looks for its marks: ``trusted``, or ``user`` for an ordinary user's mounts.
    """
    target.mkdir(exist_ok=True)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for entry in archive:
            steps = [step for step in entry.name.split("/") if step not in ("", ".")]
            if ".." in steps or "\0" in entry.name or len(steps) > _DEEPEST + 1:
                raise FileRefused(entry.name, "the layer holds a name that leads out of it")
            if steps:
                _extract(archive, entry, target, steps, attributes)


def _extract(archive: tarfile.TarFile, entry: tarfile.TarInfo, target: Path, steps: list[str], attributes: str) -> None:
    above = target
    for step in steps[:-1]:
        above /= step
        if above.is_symlink() or (above.exists() and not above.is_dir()):
            raise FileRefused(entry.name, "the layer writes through a link or below a file")
        above.mkdir(exist_ok=True)
    place = above / steps[-1]
    if steps[-1] == _OPAQUE:
        os.setxattr(above, f"{attributes}.overlay.opaque", b"y")
        return
    if steps[-1].startswith(_WHITEOUT):
        os.mknod(above / steps[-1][len(_WHITEOUT) :], stat.S_IFCHR, 0)
        return
    if entry.isdir():
        if not place.is_symlink():
            place.mkdir(exist_ok=True)
    elif os.path.lexists(place):
        raise FileRefused(entry.name, "the layer holds the same name twice")
    elif entry.islnk():
        os.link(_linked(entry, target), place, follow_symlinks=False)
        return
    else:
        _make(archive, entry, place)
    _finish(entry, place)


def _linked(entry: tarfile.TarInfo, target: Path) -> Path:
    """The plain file of this layer that a hard link names."""
    steps = [step for step in entry.linkname.split("/") if step not in ("", ".")]
    other = target.joinpath(*steps)
    through = any(target.joinpath(*steps[:count]).is_symlink() for count in range(1, len(steps)))
    if ".." in steps or through or not os.path.lexists(other) or not stat.S_ISREG(os.lstat(other).st_mode):
        raise FileRefused(entry.name, "the layer links to something outside of it")
    return other


def _make(archive: tarfile.TarFile, entry: tarfile.TarInfo, place: Path) -> None:
    if entry.issym():
        place.symlink_to(entry.linkname)
    elif entry.isfifo():
        os.mkfifo(place)
    elif entry.isreg():
        content = archive.extractfile(entry)
        assert content is not None
        with open(place, "xb") as out:
            while data := content.read(2**20):
                out.write(data)
    else:
        raise FileRefused(entry.name, "the layer holds a device")


def _finish(entry: tarfile.TarInfo, place: Path) -> None:
    if os.geteuid() == 0 and entry.uid < SHARE and entry.gid < SHARE:
        os.chown(place, entry.uid, entry.gid, follow_symlinks=False)
    if entry.issym():
        return
    os.chmod(place, entry.mode & 0o1777)  # no setuid: nothing here honours it
    for name, value in entry.pax_headers.items():
        if name.startswith("SCHILY.xattr.user."):
            os.setxattr(place, name.removeprefix("SCHILY.xattr."), value.encode("utf-8", "surrogateescape"))
    os.utime(place, (entry.mtime, entry.mtime))
