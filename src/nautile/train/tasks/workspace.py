"""The directory a task works on, held in memory: documents by relative path, changed as a conversation's tasks change it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from nautile.train.tasks.documents import MAKERS, Document, python_slice
from nautile.train.tasks.words import Pool

__all__ = ["Workspace"]


@dataclass
class Workspace:
    """Documents by path. Every task mirrors what its tools will do to the real directory."""

    documents: dict[str, Document]

    @classmethod
    def random(cls, pool: Pool, needs: tuple[str, ...], real_python: bool = False) -> Workspace:
        """3 to 10 files in 0 to 3 directories, at least one of each kind in ``needs`` (keys of ``MAKERS`` or "any")."""
        rng = pool.rng
        folders = [""] * rng.choice((1, 2, 3)) + [f"{pool.word()}/" for _ in range(rng.choice((0, 1, 1, 2)))]
        if len(folders) > 2 and rng.random() < 0.2:
            folders.append(f"{folders[-1]}{pool.word()}/")
        kinds = [kind for kind in needs if kind != "any"]
        kinds += rng.choices(("settings", "python", "table", "text"), (3, 2, 1, 4), k=rng.choice((2, 3, 3, 4, 5)))
        documents: dict[str, Document] = {}
        for kind in kinds:
            real = kind == "python" and real_python and rng.random() < 0.4
            document = python_slice(pool) if real else MAKERS[kind](pool)
            path = rng.choice(folders) + document.name
            clash = any(other.startswith(f"{path}/") or path.startswith(f"{other}/") for other in documents)
            if path not in documents and not clash:
                documents[path] = document
        return cls(documents) if cls(documents)._covers(needs) else cls.random(pool, needs, real_python)

    def _covers(self, needs: tuple[str, ...]) -> bool:
        kinds = {document.kind for document in self.documents.values()}
        return bool(kinds) and all(need == "any" or need in kinds for need in needs)

    def paths(self, kind: str = "any") -> list[str]:
        """Paths of the documents of one kind, sorted."""
        return sorted(path for path, document in self.documents.items() if kind in ("any", document.kind))

    def folders(self) -> list[str]:
        """Directories that hold a file, directly or deeper, sorted; "." comes first."""
        found = {path[:index] for path in self.documents for index, letter in enumerate(path) if letter == "/"}
        return [".", *sorted(found)]

    def under(self, folder: str) -> list[str]:
        """Paths of the files in a directory and below it."""
        return [path for path in self.paths() if folder == "." or path.startswith(f"{folder}/")]

    def entries(self, folder: str) -> list[str]:
        """Names in one directory, directories with a slash at the end."""
        prefix = "" if folder == "." else f"{folder}/"
        names = {path[len(prefix) :].partition("/") for path in self.under(folder)}
        return sorted({head + slash for head, slash, _ in names})

    def grep(self, path: str, pattern: str) -> list[int]:
        """Lines (from 0) of one file that contain a string."""
        return [number for number, line in enumerate(self.documents[path].lines) if pattern in line]

    def grep_under(self, folder: str, pattern: str) -> Iterator[tuple[str, int]]:
        """(path, line) of every match below a directory."""
        for path in self.under(folder):
            for number in self.grep(path, pattern):
                yield path, number

    def content(self, path: str) -> bytes:
        """The bytes of one file: its lines, each ended by a newline."""
        return "".join(f"{line}\n" for line in self.documents[path].lines).encode()

    def files(self) -> dict[str, bytes]:
        """Every file of the directory as it is now."""
        return {path: self.content(path) for path in self.paths()}

    def misspelt(self, pool: Pool, path: str) -> str | None:
        """A wrong name that still points to one entry of the directory only; None when nothing safe comes to mind."""
        folder, _, name = path.rpartition("/")
        stem, dot, extension = name.rpartition(".")
        if not dot or len(stem) < 3:
            return None
        other = pool.rng.choice([".txt", ".conf", ".py", ".log", ".md"])
        wrong = pool.rng.choice([stem, stem + other, name.capitalize(), stem + "s" + dot + extension, name.replace("_", "-")])
        names = self.entries(folder or ".")
        if wrong in names or f"{wrong}/" in names or difflib.get_close_matches(wrong, names, 2, 0.55) != [name]:
            return None
        if wrong.lower() == name.lower():
            return None  # a file system that ignores case would find it
        return f"{folder}/{wrong}" if folder else wrong
