"""Images: named lists of layers in a store, built from what one has, and brought to a sandbox lazily or whole."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nautile.sandbox.errors import ImageRefused, SubstrateUnavailable
from nautile.sandbox.image import Image
from nautile.sandbox.images import oci
from nautile.sandbox.images.blobs import Blobs, Credentials, checked_name, open_blobs
from nautile.sandbox.images.chunks import Chunks, Fetched
from nautile.sandbox.images.tree import Inode, Layer, digest_of
from nautile.sandbox.images.write import LayerWriter, add_directory, add_tar, debian

__all__ = ["ROLES", "Description", "ImageStore", "Part"]

ROLES = ("base", "workspace", "toolkit")
MODES = ("lazy", "directory", "erofs", "squashfs")
_FORMAT = "nautile-image-1"
_LARGEST_MANIFEST = 2**22
_LARGEST_INDEX = 64 * 2**20
_MOST_LAYERS = 120


@dataclass(frozen=True)
class Part:
    """A layer of an image: what it is for, digest and size of its index and of its data, its processor if it has programs."""

    role: str
    index: str
    index_size: int
    data: str
    size: int
    machine: str | None


@dataclass(frozen=True)
class Description:
    """An image as it is stored."""

    name: str
    digest: str
    parts: tuple[Part, ...]
    host_usr: bool

    @property
    def size(self) -> int:
        """Bytes of data and metadata."""
        return sum(part.size + part.index_size for part in self.parts)


class ImageStore:
    """A store and this machine's cache for it.

    ``where``: a directory or an ``http(s)://`` URL of an S3-compatible bucket. ``cache``: indices, chunks, unpacked layers.
    """

    def __init__(
        self, where: str | Path | None = None, cache: Path | None = None, credentials: Credentials | None = None
    ) -> None:
        home = Path(os.path.expanduser("~"))
        self.where = str(where) if where is not None else str(home / ".local/share/nautile/images")
        self.blobs: Blobs = open_blobs(self.where, credentials)
        self.cache, self.credentials = cache or home / ".cache/nautile/images", credentials

    # -- making

    def build(
        self, name: str, sources: Sequence[tuple[str, str | Path]], *, base: str | None = None, host_usr: bool = False
    ) -> Description:
        """Make an image of layers, lowest first, each (role, source), on top of the layers of ``base``.

        A source is a directory, a tar, an OCI layout, or ``debian:SUITE[+PACKAGE...]``. Raises ImageRefused.
        """
        checked_name(name)
        below = None if base is None else self.describe(base)
        parts = list(below.parts) if below else []
        for role, source in sources:
            if role not in ROLES:
                raise ImageRefused(name, f"{role!r} is no role of a layer", f"choose one of {', '.join(ROLES)}")
            parts += [self._write(role, fill, str(source)) for fill in _readers(source)]
        if not 0 < len(parts) <= _MOST_LAYERS:
            raise ImageRefused(name, f"it has {len(parts)} layers", f"1 to {_MOST_LAYERS} can be")
        return self._describe(name, parts, host_usr or bool(below and below.host_usr))

    def _describe(self, name: str, parts: list[Part], host_usr: bool) -> Description:
        machines = {part.machine for part in parts if part.machine}
        if len(machines) > 1:
            raise ImageRefused(name, f"its layers are for {' and '.join(sorted(machines))}", "build it from layers of one kind")
        manifest = json.dumps({"format": _FORMAT, "host_usr": host_usr, "layers": [asdict(part) for part in parts]}).encode()
        digest = self._put(manifest)
        self.blobs.name(name, digest)
        return Description(name, digest, tuple(parts), host_usr)

    def _write(self, role: str, fill: Callable[[LayerWriter], None], source: str) -> Part:
        self.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.cache, prefix=".building-") as file:
            writer = LayerWriter(file, source)  # type: ignore[arg-type]
            fill(writer)
            layer = writer.finish()
            file.flush()
            index = layer.pack()
            Layer.unpack(index, source)  # what was made can be read again, whatever the source held
            self.blobs.put(layer.data, Path(file.name))
        return Part(role, self._put(index), len(index), layer.data, layer.size, layer.machine)

    def _put(self, data: bytes) -> str:
        digest = digest_of(data)
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            self.blobs.put(digest, Path(file.name))
        return digest

    # -- looking

    def list(self) -> list[Description]:
        """Every named image that can be read."""
        return [self.describe(name) for name in self.blobs.names()]

    def describe(self, name: str) -> Description:
        """An image by its name. Raises ImageRefused."""
        digest = self.blobs.names().get(checked_name(name))
        if digest is None:
            raise ImageRefused(name, f"it is not in {self.where}", "nautile sandbox image list shows what is")
        data = self._whole(digest, _LARGEST_MANIFEST, name)
        try:
            body = json.loads(data)
            parts = tuple(Part(**part) for part in body["layers"])
            if body["format"] != _FORMAT or not 0 < len(parts) <= _MOST_LAYERS:
                raise ValueError("it is of another format")
            for part in parts:
                _check_part(part)
            return Description(name, digest, parts, bool(body["host_usr"]))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ImageRefused(name, f"its manifest is corrupt: {error}", "build or copy it again") from None

    def _whole(self, digest: str, most: int, name: str) -> bytes:
        """A small blob, checked."""
        size = self.blobs.size(digest)
        if size > most:
            raise ImageRefused(name, f"its metadata has {size:,} bytes", "build or copy it again")
        data = self.blobs.read(digest, 0, size)
        if digest_of(data) != digest:
            raise ImageRefused(name, "its metadata is not what its name says", "build or copy it again")
        return data

    def layer(self, part: Part, name: str) -> tuple[Layer, Path]:
        """A layer's metadata, and its index in the cache."""
        place = self.cache / "indices" / part.index
        data = place.read_bytes() if place.exists() else b""
        if digest_of(data) != part.index:
            data = self._whole(part.index, _LARGEST_INDEX, name)
            _write_whole(place, data)
        layer = Layer.unpack(data, name)
        if layer.data != part.data or layer.size != part.size:
            raise ImageRefused(name, "its manifest and its index do not agree", "build or copy it again")
        return layer, place

    def remove(self, name: str) -> int:
        """Forget a name, and delete what no other image needs; the bytes that this frees."""
        self.describe(name)
        self.blobs.name(name, None)
        needed = set()
        for other in self.list():
            needed |= {other.digest, *(digest for part in other.parts for digest in (part.index, part.data))}
        freed = 0
        for digest in list(self.blobs.digests()):
            if digest not in needed:
                freed += self.blobs.size(digest)
                self.blobs.delete(digest)
        return freed

    # -- using

    def image(self, name: str, mode: str = "lazy") -> Image:
        """For ``Sandbox.create(image=...)``. Raises ImageRefused, SubstrateUnavailable.

        ``lazy``: read from the store when it is needed, through FUSE. ``directory``: unpacked. ``erofs``, ``squashfs``: one
        file, mounted.
        """
        if mode not in MODES:
            raise ImageRefused(name, f"{mode!r} is no way to use it", f"choose one of {', '.join(MODES)}")
        found = self.describe(name)
        machines = {part.machine for part in found.parts} - {None}
        if machines - {platform.machine()}:
            raise ImageRefused(name, f"it is for {machines.pop()}, and this machine is {platform.machine()}", "build it here")
        return Image(tuple(self._place(part, name, mode) for part in found.parts), found.host_usr)

    def fetched(self, name: str) -> Fetched:
        """What sandboxes of this cache have fetched lazily of an image so far, its metadata included."""
        found = self.describe(name)
        total = Fetched(found.size)
        for part in found.parts:
            place = self.cache / "layers" / f"{part.index}.fetched"
            noted = json.loads(place.read_text()) if place.exists() else {}
            total.bytes += noted.get("bytes", 0) + part.index_size
            for key in ("requests", "cached", "failures"):
                setattr(total, key, getattr(total, key) + noted.get(key, 0))
        return total

    def _place(self, part: Part, name: str, mode: str) -> Path:
        """Where a layer is on this machine, in this mode."""
        layers = self.cache / "layers"
        layers.mkdir(parents=True, exist_ok=True)
        layer, index = self.layer(part, name)
        if mode == "lazy":
            told: dict[str, Any] = {"format": "nautile-lazy-1", "index": str(index.absolute()), "digest": part.index}
            told |= {"store": self.where, "chunks": str((self.cache / "chunks").absolute())}
            told |= {"notes": str((layers / f"{part.index}.fetched").absolute())}
            told["credentials"] = asdict(self.credentials) if self.credentials else None
            place = layers / f"{part.index}.lazy"
            _write_whole(place, json.dumps(told).encode())
            return place.absolute()
        place = layers / (part.index if mode == "directory" else f"{part.index}.{mode}")
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=layers, prefix=".unpacking-") as above:
                made = Path(above, "layer")
                materialise(layer, Chunks(layer, self.blobs, self.cache / "chunks"), made)
                if mode != "directory":
                    made = _packed(made, Path(above, "image"), mode)
                with contextlib.suppress(FileExistsError):
                    os.rename(made, place)
        return place.absolute()


def _readers(source: str | Path) -> Iterator[Callable[[LayerWriter], None]]:
    """What fills the layers that a source has."""
    text = str(source)
    if text.startswith("debian:"):
        suite, *packages = text.removeprefix("debian:").split("+")
        yield lambda writer: debian(writer, suite, packages)
        return
    place = Path(source)
    if (place / "oci-layout").is_file():
        yield from oci.layers(place)
    elif place.is_dir():
        yield lambda writer: add_directory(writer, place)
    elif place.is_file():

        def fill(writer: LayerWriter) -> None:
            with open(place, "rb") as file:
                add_tar(writer, file)

        yield fill
    else:
        raise ImageRefused(text, "there is nothing", "name a directory, a tar, an OCI layout, or debian:SUITE+PACKAGE")


def _check_part(part: Part) -> None:
    if any(len(bytes.fromhex(one)) != 32 for one in (part.index, part.data)) or min(part.size, part.index_size) < 0:
        raise ValueError("a layer is not described")


def _write_whole(place: Path, data: bytes) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=place.parent, prefix=".new-")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.rename(name, place)


def materialise(layer: Layer, chunks: Chunks, target: Path) -> None:
    """Unpack a layer as overlayfs has it. Its names have been checked to be single steps of a tree, so nothing leads out."""
    target.mkdir()
    places: dict[int, Path] = {0: target}
    owner = os.geteuid() == 0
    for path, number in layer.walk():
        inode, place = layer.inodes[number], target / path
        if number in places:
            os.link(places[number], place, follow_symlinks=False)
            continue
        places[number] = place
        _make(inode, place, chunks)
    for number, place in reversed(places.items()):
        inode = layer.inodes[number]
        if owner:
            os.chown(place, inode.uid, inode.gid, follow_symlinks=False)
        if inode.kind in ("directory", "file", "fifo"):
            os.chmod(place, inode.mode & 0o1777)  # no setuid: nothing here honours it
            for key, value in inode.attributes.items():
                os.setxattr(place, key, os.fsencode(value))
            if inode.opaque:
                os.setxattr(place, "trusted.overlay.opaque" if owner else "user.overlay.opaque", b"y")
        os.utime(place, (inode.mtime, inode.mtime), follow_symlinks=False)


def _make(inode: Inode, place: Path, chunks: Chunks) -> None:
    if inode.kind == "directory":
        place.mkdir()
    elif inode.kind == "link":
        place.symlink_to(inode.target)
    elif inode.kind == "fifo":
        os.mkfifo(place)
    elif inode.kind == "whiteout":
        os.mknod(place, stat.S_IFCHR, 0)
    else:
        with open(place, "xb") as file:
            for offset in range(0, inode.size, 2**20):
                file.write(chunks.read(inode.offset + offset, min(2**20, inode.size - offset)))


def _packed(source: Path, target: Path, mode: str) -> Path:
    """A directory as an EROFS or squashfs file."""
    if mode == "erofs":
        argv, package = ["mkfs.erofs", "-zlz4hc", "--quiet", str(target), str(source)], "erofs-utils"
        argv.remove("--quiet")
    else:
        argv, package = ["mksquashfs", str(source), str(target), "-comp", "zstd", "-quiet", "-no-progress"], "squashfs-tools"
    try:
        done = subprocess.run(argv, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SubstrateUnavailable("image", f"{argv[0]} is missing", f"apt-get install {package}") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ImageRefused(source.name, f"{argv[0]} failed: {said[-1] if said else done.returncode}", "use another mode")
    shutil.rmtree(source)
    return target
