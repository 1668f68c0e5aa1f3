"""Who may have how much: tokens name projects, projects nest by slashes, and each level's limits hold for all below it.

A file of JSON, which holds no token, only their hashes:

    {"projects": {"lab": {"sandboxes": 100, "memory": 68719476736}, "lab/anna": {"sandboxes": 10}},
     "tokens": {"SHA-256 OF A TOKEN": "lab/anna"}}
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nautile.sandbox.errors import AccessDenied, InvalidRequest, QuotaExceeded

__all__ = ["Book", "Ledger", "Quota", "belongs", "is_project", "issue"]

_PROJECT = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}(/[a-z0-9][a-z0-9._-]{0,39}){0,7}\Z")


def is_project(name: str) -> bool:
    """Up to eight steps of lower-case letters, digits, ``.``, ``_`` and ``-``, between slashes."""
    return _PROJECT.match(name) is not None


def belongs(project: str, owner: str) -> bool:
    """Whether what belongs to ``project`` belongs to ``owner`` too: the same one, or one below it."""
    return project == owner or project.startswith(owner + "/")


@dataclass(frozen=True)
class Quota:
    """Of one project and all below it. None: no limit of its own. ``memory`` is the sum of the sandboxes' memory limits."""

    sandboxes: int | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Book:
    """The tokens and the projects."""

    projects: Mapping[str, Quota]
    tokens: Mapping[str, str]

    @classmethod
    def load(cls, file: Path) -> Book:
        """Raises InvalidRequest with what is wrong in it."""
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            projects = {str(name): Quota(**limits) for name, limits in data["projects"].items()}
            tokens = {str(key): str(name) for key, name in data["tokens"].items()}
        except FileNotFoundError:
            raise InvalidRequest(f"{file} is missing: nautile sandbox token PROJECT --file {file}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(f"{file} is no file of tokens and projects: {type(error).__name__} {error}") from None
        for name, quota in projects.items():
            numbers = [value for value in (quota.sandboxes, quota.memory) if value is not None]
            if not is_project(name) or any(not isinstance(value, int) or value < 0 for value in numbers):
                raise InvalidRequest(f"{file}: project {name!r} needs a name of a-z, 0-9, . _ - and whole limits from 0 on")
        if unknown := sorted(set(tokens.values()) - set(projects)):
            raise InvalidRequest(f"{file}: a token is of {unknown[0]!r}, which is no project there")
        return cls(projects, tokens)

    def project_of(self, authorization: str | None) -> str:
        """The project of an ``Authorization`` header. Raises AccessDenied."""
        scheme, _, token = (authorization or "").partition(" ")
        found = self.tokens.get(hashlib.sha256(token.strip().encode("utf-8", "replace")).hexdigest())
        if scheme.lower() != "bearer" or found is None:
            raise AccessDenied("the fleet does not know this token: pass token=, one that `nautile sandbox token` printed")
        return found

    def admit(self, project: str, memory: int, usage: Mapping[str, tuple[int, int]]) -> None:
        """Check one more sandbox against the project's limits and those above it. Raises QuotaExceeded."""
        steps = project.split("/")
        for depth in range(1, len(steps) + 1):
            level = "/".join(steps[:depth])
            quota = self.projects.get(level)
            if quota is None:
                continue
            below = [value for name, value in usage.items() if belongs(name, level)]
            count, total = sum(one[0] for one in below), sum(one[1] for one in below)
            if quota.sandboxes is not None and count + 1 > quota.sandboxes:
                raise QuotaExceeded(f"project {level} has {count} sandboxes of {quota.sandboxes}: close some")
            if quota.memory is not None and total + memory > quota.memory:
                have, most, want = (f"{value / 2**20:,.0f}" for value in (total, quota.memory, memory))
                raise QuotaExceeded(f"project {level} has {have} MiB of {most} in limits, {want} more do not fit: close some")


def issue(file: Path, project: str, quota: Quota) -> str:
    """A new token of ``project``, whose limits become ``quota``'s where that has any; the file is made or changed at once."""
    if not is_project(project):
        raise InvalidRequest(f"project {project!r}: up to eight steps of a-z, 0-9, . _ - between slashes")
    book = Book.load(file) if file.exists() else Book({}, {})
    token = secrets.token_urlsafe(32)
    limits: dict[str, Any] = {name: vars(one) for name, one in book.projects.items()}
    wanted = {name: value for name, value in vars(quota).items() if value is not None}
    limits[project] = {**limits.get(project, {}), **wanted}
    tokens = {**book.tokens, hashlib.sha256(token.encode()).hexdigest(): project}
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as new:
        json.dump({"projects": limits, "tokens": tokens}, new, indent=1)
        new.flush()
        os.fsync(new.fileno())
    os.rename(name, file)
    return token


@dataclass
class Ledger:
    """What this gateway did since each edge was last asked: their answers are old by then, and quotas must not be.

    An edge numbers its changes, and says with every answer how far it had got: what an answer has is not counted twice.
    """

    pending: dict[int, tuple[str, int]] = field(default_factory=dict)  # being made: project, memory
    done: list[tuple[str, str, int, int, int]] = field(default_factory=list)  # edge, project, sandboxes, memory, change
    answers: dict[str, int] = field(default_factory=dict)  # by edge: the last change that its answer has
    _next: int = 0

    def usage(self, seen: Mapping[str, Mapping[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
        """By project: what the edges said (``seen``, by edge), and what has happened since."""
        total: dict[str, tuple[int, int]] = {}

        def add(project: str, count: int, memory: int) -> None:
            before = total.get(project, (0, 0))
            total[project] = (before[0] + count, before[1] + memory)

        for by_project in seen.values():
            for project, (count, memory) in by_project.items():
                add(project, count, memory)
        for project, memory in self.pending.values():
            add(project, 1, memory)
        for _, project, count, memory, _ in self.done:
            add(project, count, memory)
        return total

    def reserve(self, project: str, memory: int) -> int:
        """One is about to be made; the number for ``settle``."""
        self._next += 1
        self.pending[self._next] = (project, memory)
        return self._next

    def settle(self, number: int, edge: str | None = None, change: int = 0) -> None:
        """It was made, by ``edge`` as its ``change``; or not, without an edge."""
        project, memory = self.pending.pop(number)
        if edge is not None:
            self._note((edge, project, 1, memory, change))

    def closed(self, edge: str, project: str, memory: int, change: int) -> None:
        """One was closed."""
        self._note((edge, project, -1, -memory, change))

    def _note(self, entry: tuple[str, str, int, int, int]) -> None:
        if entry[4] > self.answers.get(entry[0], -1):
            self.done.append(entry)

    def answered(self, edge: str, change: int) -> None:
        """An edge said what it has, ``change`` included."""
        self.answers[edge] = change
        self.done = [one for one in self.done if one[0] != edge or one[4] > change]
