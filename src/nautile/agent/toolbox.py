"""The six tools of the agent, in one file that needs only the standard library.

Imported, ``execute`` runs a tool on a directory. Run alone (``python3 -I -S toolbox.py [ROOT]``, as the sandbox does), it
reads one JSON request (see ``answer``) on stdin and writes one JSON ``{"ok", "output"}`` on stdout.
The same code makes training traces and serves the agent: every text below is part of what the model has learnt.

What this file does not know: the model, the sandbox, the user. It streams files, so that a huge one costs time, not memory.
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import ctypes
import difflib
import hashlib
import json
import os
import selectors
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["ToolError", "ToolOutput", "answer", "digest", "execute", "preview_edit", "restore"]

LIST_LIMIT = 200  # entries
READ_LIMIT = 200  # lines, whatever the call asks for
GREP_LIMIT = 20  # matches
LINE_LIMIT = 200  # characters of a line that are shown
RUN_LIMIT = 2000  # characters of a command's output
EDIT_LIMIT = 16 * 2**20  # bytes of a file that edit takes
TIME_LIMIT = 60.0  # seconds for a command, when the request names no limit
_CHUNK = 256 * 1024  # bytes read at a time; also the part of an endless line that is held


class ToolError(Exception):
    """The tool could not do it; the text is what the model sees after ``error: ``."""


class ToolOutput(NamedTuple):
    """What a tool call gives back: ``output`` goes to the model, ``ok`` is False for errors and killed commands."""

    ok: bool
    output: str


def execute(name: str, arguments: Mapping[str, Any], root: Path, time_limit: float = TIME_LIMIT) -> ToolOutput:
    """Run tool ``name`` with ``arguments`` on the directory ``root``; a failure is an output, never an exception.

    ``time_limit`` (seconds) is for ``run`` alone and is the caller's, not the model's.
    """
    if name not in _TOOLS:
        return ToolOutput(False, f"error: unknown tool {name!r}; tools are {', '.join(_TOOLS)}")
    tool, signature = _TOOLS[name]
    try:
        values = _checked(arguments, signature)
        if name == "run":
            return _run(root, values["command"], time_limit)
        return ToolOutput(True, tool(root, **values))
    except ToolError as error:
        return ToolOutput(False, f"error: {error}")
    except OSError as error:
        return ToolOutput(False, f"error: {(error.strerror or type(error).__name__).lower()}")


def _checked(arguments: Mapping[str, Any], signature: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with defaults filled in; a default of ``...`` means required. Digits are taken for an integer."""
    if not isinstance(arguments, Mapping):
        raise ToolError("arguments must be an object")
    for key in arguments:
        if key not in signature:
            raise ToolError(f"unknown argument {key!r}; known are {', '.join(signature)}")
    values: dict[str, Any] = {}
    for key, default in signature.items():
        value = arguments.get(key, default)
        if value is ...:
            raise ToolError(f"missing argument {key!r}")
        if isinstance(default, int):
            if isinstance(value, str) and value.strip().isdecimal():
                value = int(value)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ToolError(f"argument {key!r} must be an integer")
        elif not isinstance(value, str):
            raise ToolError(f"argument {key!r} must be a string")
        values[key] = value
    return values


# Paths and lines


def _resolve(root: Path, path: str) -> Path:
    """The real path of ``path`` inside ``root``; raises ToolError when it leaves it or does not exist."""
    if "\0" in path:
        raise ToolError("a path cannot hold a NUL character")
    real_root = os.path.realpath(root)
    real = os.path.realpath(os.path.join(real_root, path or "."))
    if os.path.isabs(path) or not (real == real_root or real.startswith(real_root.rstrip("/") + "/")):
        raise ToolError(f"{path} is outside the workspace")
    if not os.path.exists(real):
        raise ToolError(f"{path} does not exist")
    return Path(real)


def _shown(name: str) -> str:
    """A file name on one line of valid text."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return text.replace("\n", "\\n").replace("\r", "\\r")


def _open(file: Path) -> Any:
    """A regular file, opened for bytes; a FIFO or device would block or never end, so it is refused."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ToolError(f"{_shown(file.name)} is not a regular file")
    return os.fdopen(descriptor, "rb", buffering=_CHUNK)


def _is_binary(file: Path) -> bool:
    with _open(file) as stream:
        return b"\0" in stream.read(8192)


def _text_file(root: Path, path: str) -> Path:
    file = _resolve(root, path)
    if file.is_dir():
        raise ToolError(f"{path} is a directory")
    if _is_binary(file):
        raise ToolError(f"{path} is a binary file")
    return file


def _lines(file: Path, pattern: bytes) -> Iterator[tuple[bytes, bool]]:
    """For every line: its first bytes, enough to show it, and whether it holds ``pattern``.

    A line longer than one chunk is scanned with an overlap of the pattern's length, and never held whole.
    """
    overlap = max(len(pattern) - 1, 1)
    with _open(file) as stream:
        while part := stream.readline(_CHUNK):
            head, found, tail = part[: 4 * LINE_LIMIT + 8], pattern in part, part[-overlap:]
            while not part.endswith(b"\n") and (part := stream.readline(_CHUNK)):
                found = found or pattern in part or pattern in tail + part[:overlap]
                tail = (tail + part[-overlap:])[-overlap:]
            yield head, found


def _line_text(head: bytes) -> str:
    text = head.rstrip(b"\r\n").decode("utf-8", "replace")
    return text if len(text) <= LINE_LIMIT else text[:LINE_LIMIT] + "..."


def _text_files(root: Path, path: str) -> Iterator[tuple[str, Path]]:
    """(name shown, file) of a file, or of every text file below a directory, sorted; no links, no .git."""
    start = _resolve(root, path)
    if not start.is_dir():
        yield "", _text_file(root, path)
        return
    pending = [start]
    real_root = os.path.realpath(root)
    while pending:
        place = pending.pop()
        if not place.is_dir():
            if not _is_binary(place):
                yield _shown(os.path.relpath(place, real_root)), place
            continue
        with os.scandir(place) as entries:
            found = [entry for entry in entries if entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)]
        names = sorted((entry.name for entry in found if entry.name != ".git"), reverse=True)
        pending += [place / name for name in names]


# The tools


def _list(root: Path, path: str) -> str:
    directory = _resolve(root, path)
    if not directory.is_dir():
        raise ToolError(f"{path} is not a directory")
    with os.scandir(directory) as entries:
        names = sorted((entry.name, entry.is_dir()) for entry in entries)
    shown = [_shown(name) + ("/" if is_directory else "") for name, is_directory in names[:LIST_LIMIT]]
    if len(names) > LIST_LIMIT:
        shown.append(f"... {len(names) - LIST_LIMIT} more")
    return "\n".join(shown) or "(empty)"


def _read(root: Path, path: str, offset: int, limit: int) -> str:
    if offset < 1 or limit < 1:
        raise ToolError("offset and limit start at 1")
    file = _text_file(root, path)
    last = offset + min(limit, READ_LIMIT) - 1
    shown, number = [], 0
    for number, (head, _) in enumerate(_lines(file, b""), start=1):  # the count is used below
        if offset <= number <= last:
            shown.append(f"{number}: {_line_text(head)}")
    if number == 0:
        return "(empty)"
    if not shown:
        raise ToolError(f"{path} has {number} line{'s' if number > 1 else ''}")
    if number > last:
        shown.append(f"... {number - last} more lines")
    return "\n".join(shown)


def _grep(root: Path, pattern: str, path: str) -> str:
    shown, matches = [], 0
    for name, file in _text_files(root, path):
        for number, (head, found) in enumerate(_lines(file, pattern.encode()), start=1):
            if found:
                matches += 1
                if matches <= GREP_LIMIT:
                    shown.append(f"{name + ':' if name else ''}{number}: {_line_text(head)}")
    if matches > GREP_LIMIT:
        shown.append(f"... {matches - GREP_LIMIT} more matches")
    return "\n".join(shown) or "no matches"


def _count(root: Path, pattern: str, path: str) -> str:
    needle = pattern.encode()
    return str(sum(found for _, file in _text_files(root, path) for _, found in _lines(file, needle)))


def _edited(root: Path, path: str, old: str, new: str) -> tuple[Path, bytes, bytes, int]:
    """(file, content before, content after, line of the change); raises ToolError unless ``old`` is there exactly once."""
    file = _text_file(root, path)
    if not old:
        raise ToolError("old text is empty")
    if file.stat().st_size > EDIT_LIMIT:
        raise ToolError(f"{path} is too large to edit")
    before = file.read_bytes()
    found = before.count(old.encode())
    if found != 1:
        raise ToolError("old text not found" if found == 0 else f"old text found {found} times")
    place = before.index(old.encode())
    after = before[:place] + new.encode() + before[place + len(old.encode()) :]
    return file, before, after, before.count(b"\n", 0, place) + 1


def _edit(root: Path, path: str, old: str, new: str) -> str:
    file, _, after, line = _edited(root, path, old, new)
    _replace(file, after)
    return f"edited {path} line {line}"


def _replace(file: Path, content: bytes) -> None:
    """Write all or nothing: a temporary file beside the old one, synced, then renamed over it."""
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=".nautile-")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, stat.S_IMODE(file.stat().st_mode))
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def _run(root: Path, command: str, time_limit: float) -> ToolOutput:
    """``sh -c`` in ``root``; its process group ends with it, or at the time limit. Output is capped as it arrives."""
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        cwd=root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        text, more, in_time = _collected(process, time_limit)
    finally:
        _kill_group(process)
    text = text.rstrip("\n")
    parts = ([text] if text else []) + ([f"... {more} more characters"] if more else [])
    if not in_time:
        parts.append(f"[killed after {time_limit:g} s]")
    elif process.returncode:
        parts.append(f"[exit {process.returncode}]")
    return ToolOutput(in_time, "\n".join(parts) or "(no output)")


def _collected(process: subprocess.Popen[bytes], time_limit: float) -> tuple[str, int, bool]:
    """(first characters, number of characters left out, ended in time) of the output until the command itself ends."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, more, deadline, ended = "", 0, time.monotonic() + time_limit, False
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (now := time.monotonic()) < deadline:
            selector.select(min(0.02, deadline - now))
            data = process.stdout.read(_CHUNK)
            piece = decoder.decode(data or b"", final=data == b"")
            text, more = text + piece[: RUN_LIMIT - len(text)], more + max(0, len(text) + len(piece) - RUN_LIMIT)
            if data == b"" or (ended and data is None):
                break
            # Ended but the pipe is open: something in the background holds it. What is already written is read, no more.
            ended = ended or process.poll() is not None
    if process.poll() is None and time.monotonic() < deadline:  # closed its output, still running
        try:
            process.wait(deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            return text, more, False
    return text, more, process.poll() is not None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # every member has ended already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


_Tool = Callable[..., str]
_TOOLS: dict[str, tuple[_Tool, dict[str, Any]]] = {
    "list": (_list, {"path": "."}),
    "read": (_read, {"path": ..., "offset": 1, "limit": 40}),
    "grep": (_grep, {"pattern": ..., "path": "."}),
    "count": (_count, {"pattern": ..., "path": "."}),
    "edit": (_edit, {"path": ..., "old": ..., "new": ...}),
    "run": (str, {"command": ...}),  # _run: it has a time limit and a verdict of its own
}


# What the agent asks for around an edit; the model cannot call these


def preview_edit(arguments: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """What ``edit`` would do, without doing it.

    Gives ``ok``, ``output`` (the error), and when ok ``path`` (relative to root), ``diff`` (unified), ``before`` (base64 of
    the file), ``after_sha256``.
    """
    try:
        values = _checked(arguments, _TOOLS["edit"][1])
        file, before, after, _ = _edited(root, **values)
    except (ToolError, OSError) as error:
        return {"ok": False, "output": f"error: {error}"}
    name = _shown(values["path"])
    old, new = (text.decode("utf-8", "replace").splitlines() for text in (before, after))
    diff = difflib.unified_diff(old, new, f"a/{name}", f"b/{name}", lineterm="")
    return {
        "ok": True,
        "output": "",
        "path": os.path.relpath(file, os.path.realpath(root)),
        "diff": "\n".join(diff),
        "before": base64.b64encode(before).decode(),
        "after_sha256": hashlib.sha256(after).hexdigest(),
    }


def digest(arguments: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """SHA-256 of a text file that an edit could have written: ``ok`` and ``output`` (hexadecimal, or the error)."""
    try:
        return {"ok": True, "output": _digest(_text_file(root, arguments["path"]), arguments["path"])}
    except (ToolError, OSError) as error:
        return {"ok": False, "output": f"error: {error}"}


def _digest(file: Path, path: str) -> str:
    if file.stat().st_size > 2 * EDIT_LIMIT:
        raise ToolError(f"{path} is too large to edit")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def restore(arguments: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Put the pre-image ``before`` (base64) of ``path`` back; refuses when the file is not what the edit left."""
    path = arguments["path"]
    try:
        file = _text_file(root, path)
        if _digest(file, path) != arguments["after_sha256"]:
            raise ToolError(f"{path} has changed since the edit")
        _replace(file, base64.b64decode(arguments["before"]))
    except (ToolError, OSError) as error:
        return {"ok": False, "output": f"error: {error}"}
    return {"ok": True, "output": f"restored {path}"}


# Run alone


def _adopt_orphans() -> None:
    """Become the parent of processes that a command leaves behind (Linux's child subreaper), to end them too."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def _end_children() -> None:
    """Kill every process below this one, those that left the process group included."""
    me = os.getpid()
    children = Path(f"/proc/{me}/task/{me}/children")
    while pids := children.read_text().split():
        for pid in pids:
            try:
                os.kill(int(pid), signal.SIGKILL)
                os.waitpid(int(pid), 0)
            except (ProcessLookupError, ChildProcessError):
                continue


def answer(request: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """One request -> one answer with at least ``ok`` and ``output``.

    A call of the model is ``{"tool", "arguments", "time_limit"}``; what the agent asks for itself is ``{"operation",
    "arguments"}``, so that no tool name reaches it.
    """
    arguments = request["arguments"]
    if "operation" in request:
        return _OPERATIONS[request["operation"]](arguments, root)
    return dict(execute(request["tool"], arguments, root, float(request.get("time_limit", TIME_LIMIT)))._asdict())


_OPERATIONS: dict[str, Callable[[Mapping[str, Any], Path], dict[str, Any]]] = {
    "preview_edit": preview_edit,
    "digest": digest,
    "restore": restore,
}


def main(root: Path) -> None:
    """One request on stdin, one answer on stdout; nothing that a command started outlives it."""
    _adopt_orphans()
    result = answer(json.load(sys.stdin), root)
    _end_children()
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
