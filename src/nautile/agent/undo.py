"""Taking back the edits of a run: every file is checked before the first one is touched."""

from __future__ import annotations

import hashlib
import time
from base64 import b64decode
from dataclasses import dataclass
from pathlib import Path

from nautile.agent.trajectory import Called, Journal, Returned, Undone, journals
from nautile.agent.workbench import Edit, Workbench
from nautile.sandbox import ToolSandbox

__all__ = ["UndoError", "undo"]


class UndoError(RuntimeError):
    """There is nothing to take back, or a file is no longer what the run left; the text says which."""


def undo(state: Path, sandbox: ToolSandbox) -> tuple[str, ...]:
    """Restore the files that the newest run with edits on the sandbox's directory changed; gives their paths.

    Raises UndoError, and then no file has been changed. Only edits are known exactly: what a command did stays.
    """
    for path in journals(state, sandbox.root):
        with Journal.open(path) as journal:
            edits = _applied(journal)
            if not edits or any(isinstance(record, Undone) for record in journal.records):
                continue
            workbench = Workbench(sandbox)
            due = [edit for chain in _by_file(edits) if (edit := _whole(workbench, chain)) is not None]
            for edit in due:
                output = workbench.restore(edit)
                if not output.ok:
                    raise UndoError(f"stopped half-way: {output.output.removeprefix('error: ')}")
            journal.append(Undone(time.time()))
            return tuple(edit.path for edit in due)
    raise UndoError(f"no run on {sandbox.root} has edits to take back")


@dataclass(frozen=True)
class _Attempt:
    """An edit of the journal; ``certain`` when its tool said that it was done."""

    edit: Edit
    certain: bool


def _applied(journal: Journal) -> list[_Attempt]:
    done = {(record.step, record.index) for record in journal.records if isinstance(record, Returned) and record.ok}
    return [
        _Attempt(record.edit, (record.step, record.index) in done)
        for record in journal.records
        if isinstance(record, Called) and record.edit is not None
    ]


def _by_file(attempts: list[_Attempt]) -> list[list[_Attempt]]:
    """The attempts on each file, in order."""
    chains: dict[str, list[_Attempt]] = {}
    for attempt in attempts:
        chains.setdefault(attempt.edit.path, []).append(attempt)
    return list(chains.values())


def _whole(workbench: Workbench, chain: list[_Attempt]) -> Edit | None:
    """One edit from before the first attempt on a file to after the last; None when the file is as it was before.

    Raises UndoError when something else has written to the file.
    """
    path = chain[0].edit.path
    found = workbench.digest(path)
    if not found.ok:
        raise UndoError(f"{found.output.removeprefix('error: ')}; nothing has been taken back")
    # An attempt without a result was not applied if what follows it starts from the same content.
    following = [*(_sha256(attempt.edit.before) for attempt in chain[1:]), found.output]
    edits = [
        attempt.edit
        for attempt, content in zip(chain, following, strict=True)
        if attempt.certain or content != _sha256(attempt.edit.before)
    ]
    if not edits or found.output == _sha256(edits[0].before):
        return None
    contents = [*(_sha256(edit.before) for edit in edits[1:]), found.output]
    if any(edit.after_sha256 != content for edit, content in zip(edits, contents, strict=True)):
        raise UndoError(f"{path} has changed since the edit; nothing has been taken back")
    return Edit(path, edits[-1].diff, edits[0].before, edits[-1].after_sha256)


def _sha256(content: str) -> str:
    return hashlib.sha256(b64decode(content)).hexdigest()
