"""A directory of the caller's in a guest: a guest shares no files with the host, so they are copied in and changes copied out.

Before a command what has changed on the host goes in, after it what the tenant has changed comes out. Plain files and
directories only: links stay where they are. What comes out is written beneath the directory, without following a link.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from nautile.sandbox import kernel
from nautile.sandbox.errors import FileRefused, InvalidRequest, SandboxError
from nautile.sandbox.function import ENVIRONMENT
from nautile.sandbox.guest import link as wire
from nautile.sandbox.guest import transfer
from nautile.sandbox.guest.link import Link
from nautile.sandbox.guest.transfer import Known

__all__ = ["Workspace"]

_INSIDE = "workspace"
_MOST = 100_000  # files


class Workspace:
    """The directory ``place``, kept equal with /workspace. ``limit``: bytes of one file that comes out."""

    def __init__(self, place: Path, limit: int) -> None:
        self._place, self._limit = place, limit
        self._owner = (place.stat().st_uid, place.stat().st_gid)
        self._here: dict[str, Known] = {}
        self._there: dict[str, Known] = {}

    def give(self, link: Link) -> None:
        """Copy in what has changed on the host. Raises InvalidRequest when it does not fit."""
        now = dict(self._scan())
        gone = [path for path in self._here if path not in now]
        changed = [path for path, known in now.items() if self._here.get(path) != known]
        if gone:
            self._remove(link, gone)
        if changed:
            try:
                transfer.upload(link, ((path, self._place / path) for path in changed), _INSIDE)
            except FileRefused as error:
                why = f"{self._place} does not go into the sandbox ({error.why}): raise Limits(disk=, inodes=)"
                raise InvalidRequest(why) from None
        self._here = now
        if gone or changed or not self._there:
            self._there = transfer.walk(link, _INSIDE)

    def take(self, link: Link) -> None:
        """Copy out what the tenant has changed."""
        now = transfer.walk(link, _INSIDE)
        root = os.open(self._place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for path in sorted((path for path in self._there if path not in now), reverse=True):
                self._unlink(root, path)
            for path, known in sorted(now.items()):
                if self._there.get(path) != known:
                    self._store(root, link, path, known)
        finally:
            os.close(root)
        self._there, self._here = now, dict(self._scan())

    def _scan(self) -> Iterator[tuple[str, Known]]:
        count = 0
        for above, directories, files in os.walk(self._place):
            for name in (*directories, *files):
                found = os.lstat(os.path.join(above, name))
                if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):
                    count += 1
                    if count > _MOST:
                        raise InvalidRequest(f"{self._place} has more than {_MOST:,} files: give a smaller directory")
                    directory = stat.S_ISDIR(found.st_mode)  # its size and time say nothing that its names do not
                    stamp = (0, 0) if directory else (found.st_size, found.st_mtime_ns)
                    yield os.path.relpath(os.path.join(above, name), self._place), Known(found.st_mode, *stamp)

    @staticmethod
    def _remove(link: Link, paths: list[str]) -> None:
        for at in range(0, len(paths), 200):
            words = ["/bin/rm", "-rf", "--", *(f"/{_INSIDE}/{path}" for path in paths[at : at + 200])]
            stream = link.spawn(wire.EXECUTE, words, ENVIRONMENT)
            stream.end_input()
            deadline = time.monotonic() + 60.0
            while stream.ended is None:
                event = stream.next(deadline)
                if (event is None and time.monotonic() > deadline) or (event is not None and event[0] == wire.FAILED):
                    raise SandboxError("files that were removed on the host could not be removed inside")

    def _above(self, root: int, steps: list[str], *, make: bool) -> int:
        current = os.dup(root)
        for step in steps:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(step, 0o755, dir_fd=current)
                    os.chown(step, *self._owner, dir_fd=current, follow_symlinks=False)
            following = kernel.open_beneath(current, step, os.O_PATH | os.O_DIRECTORY)
            os.close(current)
            current = following
        return current

    def _unlink(self, root: int, path: str) -> None:
        """Remove what the tenant has removed; what is something else here by now stays."""
        *steps, name = transfer.checked(path)
        with contextlib.suppress(OSError):
            above = self._above(root, steps, make=False)
            try:
                if stat.S_ISDIR(self._there[path].mode):
                    os.rmdir(name, dir_fd=above)
                elif stat.S_ISREG(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
                    os.unlink(name, dir_fd=above)
            finally:
                os.close(above)

    def _store(self, root: int, link: Link, path: str, known: Known) -> None:
        *steps, name = transfer.checked(path)
        try:
            if stat.S_ISDIR(known.mode):
                os.close(self._above(root, [*steps, name], make=True))
            elif stat.S_ISREG(known.mode):
                data = transfer.read(link, f"{_INSIDE}/{path}", self._limit)
                above = self._above(root, steps, make=True)
                try:
                    self._write(above, name, data, stat.S_IMODE(known.mode) & 0o777)
                finally:
                    os.close(above)
        except OSError as error:
            raise FileRefused(path, f"it cannot be copied to {self._place} ({error.strerror})") from None

    def _write(self, above: int, name: str, data: bytes, mode: int) -> None:
        temporary = f".nautile-{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o600, dir_fd=above)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                os.fchown(file.fileno(), *self._owner)
                os.fchmod(file.fileno(), mode)
            os.rename(temporary, name, src_dir_fd=above, dst_dir_fd=above)
        except BaseException:
            os.unlink(temporary, dir_fd=above)
            raise
