"""Files in a gVisor sandbox, by way of commands that the tenant could run as well: sh, cat, stat, find, tar of its image.

They run as the tenant, inside, so they reach what it reaches and nothing else. A path with a symbolic link in it is refused; a
tenant that swaps one in at that moment leads its own rights astray. Only bytes come out: they are counted, and an archive is
unpacked as one of a stranger's.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from nautile.sandbox.archive import unpack_tree, write_tree
from nautile.sandbox.errors import FileRefused, InvalidRequest, SandboxLost
from nautile.sandbox.filing import WHY
from nautile.sandbox.result import Entry

__all__ = ["Files"]

_PATIENCE = 60.0  # seconds without a byte
_MOST = 100_000  # entries of one directory
_LIST_LIMIT = 64 * 2**20  # bytes
_KINDS = {b"f": "file", b"d": "directory", b"l": "link"}
_MEANT = {os.strerror(number): why for number, why in WHY.items()}
# $1 is the path, a step after the other; $p is it from the root.
_START = r"""
set -f
refuse() { echo "$1" >&2; exit 90; }
p=
walk() {
  IFS=/
  for step in $1; do
    p=$p/$step
    [ ! -L "$p" ] || refuse 'its path leads through a symbolic link, which is not followed'
  done
  unset IFS
}
there() { walk "$1"; p=${p:-/}; [ -e "$p" ] || refuse 'it does not exist'; }
"""
_READ = r"""
there "$1"
[ ! -d "$p" ] || refuse 'it is a directory'
[ -f "$p" ] || refuse 'it is not a plain file'
exec cat "$p"
"""
_WRITE = r"""
walk "$1"
[ "$p" ] && [ "$p" != / ] && [ "$p" != /. ] || refuse 'it is the root directory'
[ ! -d "$p" ] || refuse 'it is a directory'
above=${p%/*}
mkdir -p "${above:-/}" 2>&1 >/dev/null | sed 's/.*: //' >&2
new=${above:-}/.new-$$
(umask 077 && cat > "$new" && chmod "$2" "$new" && mv -f "$new" "$p") || { rm -f "$new"; exit 90; }
"""
_LIST = r"""
there "$1"
[ -d "$p" ] || refuse 'a part of its path is not a directory'
[ -r "$p" ] && [ -x "$p" ] || refuse "the sandbox's user may not"
cd "$p" || exit 90
find . -mindepth 1 -maxdepth 1 -printf '%y %s %m %f\0'
"""
_PUT = r"""
walk "$1"
mkdir -p "${p:-/}" && exec tar -x -f - --no-same-owner -C "${p:-/}"
"""
_GET = r"""
there "$1"
[ -d "$p" ] && { cd "$p" || exit 90; echo directory; find . \( -type d -o -type f \) -print0 |
  exec tar -c -f - --format=pax --null --no-recursion --hard-dereference -T -; exit; }
[ -f "$p" ] || refuse 'it is not a plain file'
stat -c 'file %a' "$p" && exec cat "$p"
"""


class Files:
    """The file operations of one sandbox. ``command(argv)`` is how a command is started in it as the tenant."""

    def __init__(self, command: Callable[[Sequence[str]], list[str]]) -> None:
        self._command = command

    def read(self, path: str, limit: int) -> bytes:
        """A plain file's content. Raises FileRefused."""
        with tempfile.TemporaryFile() as file:
            self._fetch(_READ, path, file, limit)
            return file.read()

    def write(self, path: str, data: bytes, mode: int) -> None:
        """Make or replace a plain file. Raises FileRefused."""
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.seek(0)
            self._give(_WRITE, path, file, f"{mode:o}")

    def list(self, path: str) -> list[Entry]:
        """What a directory holds, by name. Raises FileRefused."""
        with tempfile.TemporaryFile() as file:
            self._fetch(_LIST, path, file, _LIST_LIMIT)
            records = file.read().split(b"\0")[:-1]
        if len(records) > _MOST:
            raise FileRefused(f"/{path}", f"it has more than {_MOST:,} entries")
        entries = []
        for record in records:
            kind, size, mode, name = record.split(b" ", 3)
            entries.append(Entry(os.fsdecode(name), _KINDS.get(kind, "other"), int(size), int(mode, 8)))
        return sorted(entries, key=lambda entry: entry.name)

    def upload(self, source: Path, path: str) -> None:
        """Copy a file or a directory of the host in. Raises FileRefused, also for links in it."""
        if source.is_file() and not source.is_symlink():
            with open(source, "rb") as file:
                return self._give(_WRITE, path, file, f"{source.stat().st_mode & 0o777:o}")
        with tempfile.TemporaryFile() as file:
            write_tree(source, file)
            file.seek(0)
            return self._give(_PUT, path, file)

    def download(self, path: str, target: Path, limit: int) -> None:
        """Copy a file or a directory out, to ``target``, which must not exist. Raises FileRefused, InvalidRequest."""
        if target.exists() or target.is_symlink():
            raise InvalidRequest(f"{target} exists: name a target that does not")
        with tempfile.TemporaryFile() as file:
            self._fetch(_GET, path, file, limit, headers=_MOST * 2048)
            kind, _, mode = file.readline(64).decode("ascii", "replace").strip().partition(" ")
            if kind == "directory":
                with tempfile.TemporaryFile() as archive:  # which must begin at its beginning
                    while piece := file.read(2**20):
                        archive.write(piece)
                    archive.seek(0)
                    return unpack_tree(archive, target, limit)
            if kind != "file" or not mode.isdigit():
                raise FileRefused(f"/{path}", "the sandbox sent something else than a file")
            if os.fstat(file.fileno()).st_size - file.tell() > limit:
                raise FileRefused(f"/{path}", f"it has more than {limit:,} bytes: raise limit=")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(target, flags, int(mode, 8) & 0o777), "wb") as made:
                while piece := file.read(2**20):
                    made.write(piece)

    # -- commands

    @contextlib.contextmanager
    def _started(self, script: str, words: Sequence[str], given: BinaryIO | int) -> Iterator[subprocess.Popen[bytes]]:
        argv = self._command(["/bin/sh", "-c", _START + script, "sh", *words])
        process = subprocess.Popen(argv, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()

    def _fetch(self, script: str, path: str, file: BinaryIO, limit: int, headers: int = 0) -> None:
        """What a script writes, into ``file``, which is then at its beginning. ``headers``: bytes that do not count."""
        total = 0
        with self._started(script, [path], subprocess.DEVNULL) as process:
            for data in _output(process):
                total += len(data)
                if total > limit + headers:
                    raise FileRefused(f"/{path}", f"it has more than {limit:,} bytes: raise limit=")
                file.write(data)
            _check(process, path)
        file.seek(0)

    def _give(self, script: str, path: str, file: BinaryIO, *words: str) -> None:
        with self._started(script, [path, *words], file) as process:
            for _ in _output(process):
                pass
            _check(process, path)


def _output(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """What it writes to stdout, as it comes. Raises SandboxLost when nothing comes for too long."""
    assert process.stdout is not None
    descriptor, poll = process.stdout.fileno(), select.poll()
    poll.register(descriptor, select.POLLIN)
    while True:
        if not poll.poll(_PATIENCE * 1000):
            raise SandboxLost(f"the sandbox sent nothing of a file for {_PATIENCE:g} s")
        data = os.read(descriptor, 2**18)
        if not data:
            return
        yield data


def _check(process: subprocess.Popen[bytes], path: str) -> None:
    """Raises FileRefused with the script's reason."""
    assert process.stderr is not None
    deadline = time.monotonic() + _PATIENCE
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(deadline - time.monotonic(), 0))
    if process.returncode != 0:
        os.set_blocking(process.stderr.fileno(), False)
        said = (process.stderr.read(4000) or b"").decode("utf-8", "replace").strip().splitlines()
        why = said[-1].rpartition(": ")[2] if said else f"it ended with {process.returncode}"
        raise FileRefused(f"/{path}", _MEANT.get(why, why))
