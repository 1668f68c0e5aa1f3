"""A file or a directory as bytes and back: plain files and directories only, the same content always the same bytes."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from nautile.sandbox.errors import FileRefused, InvalidRequest

__all__ = ["pack_tree", "unpack_tree", "write_tree"]


def pack_tree(source: Path, most: int) -> bytes | None:
    """``source`` as a tar whose root is ``.``; None if it holds more than ``most`` bytes. Raises FileRefused for links."""
    file = io.BytesIO()
    return file.getvalue() if write_tree(source, file, most) else None


def write_tree(source: Path, file: BinaryIO, most: int | None = None) -> bool:
    """As ``pack_tree``, into a file. False as soon as there are more than ``most`` bytes. Raises FileRefused for links."""
    total = 0
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for relative, path in _walk(source):
            entry = tarfile.TarInfo(relative)
            entry.mode = path.stat().st_mode & 0o777
            if path.is_dir():
                entry.type = tarfile.DIRTYPE
                archive.addfile(entry)
                continue
            entry.size = path.stat().st_size
            total += entry.size + 1024
            if most is not None and total > most:
                return False
            with open(path, "rb") as content:
                archive.addfile(entry, content)
    return True


def _walk(source: Path) -> Iterator[tuple[str, Path]]:
    pending = [(".", source)]
    while pending:
        relative, path = pending.pop()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise FileRefused(str(path), "not a plain file or a directory" if os.path.lexists(path) else "it does not exist")
        yield relative, path
        if path.is_dir():
            pending += [(f"{relative}/{name}", path / name) for name in sorted(os.listdir(path), reverse=True)]


def unpack_tree(data: bytes | BinaryIO, target: Path, limit: int | None = None) -> None:
    """Make ``target``, which must not exist, of what ``pack_tree`` gave; the bytes may come from anywhere.

    ``limit``: bytes that its files may have. Raises FileRefused, InvalidRequest; what was made until then stays.
    """
    made: list[tuple[Path, int]] = []
    total = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data) if isinstance(data, bytes) else data, mode="r:") as archive:
            for entry in archive:
                total += entry.size
                if limit is not None and total > limit:
                    raise FileRefused(str(target), f"it has more than {limit:,} bytes: raise limit=")
                steps = entry.name.split("/")
                if steps[0] != "." or any(step in ("", ".", "..") or "\0" in step for step in steps[1:]):
                    raise FileRefused(entry.name, "the archive holds a name that leads elsewhere")
                _make(archive, entry, target.joinpath(*steps[1:]), made)
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise InvalidRequest(f"this is no archive of files: {error}") from None
    except OSError as error:
        raise FileRefused(str(target), error.strerror or str(error)) from None
    for place, mode in reversed(made):
        place.chmod(mode)


def _make(archive: tarfile.TarFile, entry: tarfile.TarInfo, place: Path, made: list[tuple[Path, int]]) -> None:
    if entry.isdir():
        place.mkdir(mode=0o700)
        made.append((place, entry.mode & 0o777 | 0o700))
        return
    if not entry.isreg():
        raise FileRefused(entry.name, "the archive holds something that is no plain file")
    content = archive.extractfile(entry)
    assert content is not None
    with os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, entry.mode & 0o777), "wb") as file:
        while piece := content.read(2**20):
            file.write(piece)
