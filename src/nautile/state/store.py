"""Files of prefix-tree nodes: one directory, one file a node, named by the tokens it stands for and by whose state it is.

Safe for several processes, models and row formats on one directory: files appear whole under their final name, equal names
mean equal tokens of equal models in an equal layout, and a file that has vanished is a miss.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nautile.state.files import StateFile, StoreError, StoreUnavailable, read_header, sync_directory, write_file
from nautile.state.pages import Pages

__all__ = ["NodeFile", "NodeName", "NodeStore", "StoreError", "StoreUnavailable", "check_layout", "layout"]

_SUFFIX = ".node"


_OPTIONAL = {"computed_by": ""}  # keys that files of the first releases do not have, and what their absence means


class _OtherLayoutError(StoreError):
    """A sound file that means nothing here."""


def layout(pages: Pages, fingerprint: str, computed_by: str = "") -> dict[str, Any]:
    """What must be equal for the bytes of a file to mean the same in a pool: written into every file, compared when read.

    ``computed_by`` names the arithmetic: two runners give values that differ in their last bits.
    """
    return {
        "model": fingerprint,
        "rows": pages.options.rows,
        "block_tokens": pages.options.block_tokens,
        "block_bytes": pages.block_bytes,
        "slot_bytes": pages.slot_bytes,
        "computed_by": computed_by,
    }


def check_layout(path: Path, header: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises StoreError when a file was written for another model or memory layout."""
    for key, value in wanted.items():
        found = header.get(key, _OPTIONAL.get(key))
        if found != value:
            raise _OtherLayoutError(f"{path} was written for another {key}: {found!r}, here {value!r}")


@dataclass(frozen=True)
class NodeName:
    """Which tokens a node stands for: the last ``ids`` of ``length``; digests chain from the partition's."""

    partition: str
    digest: bytes
    parent: bytes
    length: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class NodeFile:
    """A node's file, by what it says about itself."""

    name: NodeName
    has_tail: bool
    path: Path
    file_bytes: int


class NodeStore:
    """One directory. ``writable`` turns False when the system refuses a file; reading goes on. ``aside`` counts the files that
    were set aside."""

    def __init__(self, directory: Path, layout: Mapping[str, Any]) -> None:
        """``layout`` as from the function of that name. Raises StoreUnavailable when the directory cannot be used."""
        self.directory, self.layout, self.writable, self.aside = directory, dict(layout), True, 0
        self._mark = blake2b(json.dumps(self.layout, sort_keys=True).encode(), digest_size=8).hexdigest()
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            next(directory.iterdir(), None)
        except OSError as error:
            raise StoreUnavailable(error.errno, f"cannot use {directory} for state files: {error.strerror}") from error

    def path(self, digest: bytes) -> Path:
        """Where a node's file is written: the name says the tokens and the layout, so that nobody else's has it too."""
        return self.directory / f"{digest.hex()}-{self._mark}{_SUFFIX}"

    def old_path(self, digest: bytes) -> Path:
        """Where the first releases wrote it, for any layout."""
        return self.directory / (digest.hex() + _SUFFIX)

    def has(self, digest: bytes, with_tail: bool) -> bool:
        """Whether a node's file is there, by its header."""
        try:
            path = self._where(digest)
            header = read_header(path)
            check_layout(path, header, self.layout)
            return not with_tail or any(part["name"] == "tail" for part in header["sections"])
        except (OSError, StoreError, KeyError, TypeError):
            return False

    def find(self, digest: bytes) -> tuple[Tensor, Tensor | None]:
        """``read`` of a node wherever it was written."""
        return self.read(self._where(digest), digest)

    def _where(self, digest: bytes) -> Path:
        new, old = self.path(digest), self.old_path(digest)
        return old if old.exists() and not new.exists() else new

    def write(self, name: NodeName, history: Tensor, tail: Tensor | None) -> tuple[Path, int]:
        """Write a node's history [blocks, block_bytes] and tail; gives path and size. Raises StoreUnavailable."""
        fields = {
            **self.layout,
            "partition": name.partition,
            "digest": name.digest.hex(),
            "parent": name.parent.hex(),
            "length": name.length,
        }
        sections = {"ids": torch.tensor(name.ids, dtype=torch.int32), "history": history}
        if tail is not None:
            sections["tail"] = tail
        path = self.path(name.digest)
        return path, write_file(path, "node", fields, sections)

    def read(self, path: Path, digest: bytes, with_tail: bool = True) -> tuple[Tensor, Tensor | None]:
        """History [blocks, block_bytes] and tail, which is larger: most nodes of a hit are read without. Raises StoreError; a
        file that cannot be trusted is set aside then, one that belongs to somebody else, or that the system does not give out,
        is left alone."""
        try:
            with StateFile(path) as file:
                check_layout(path, file.header, self.layout)
                if file.header["digest"] != digest.hex():
                    raise StoreError(f"{path} holds other tokens than its name says")
                blocks = -(-len(file.section("ids", torch.int32)) // self.layout["block_tokens"])
                history = file.section("history").view(blocks, self.layout["block_bytes"])
                return history, file.section("tail") if with_tail and "tail" in file.names() else None
        except FileNotFoundError:
            raise StoreError(f"{path} is gone (another process may have removed it)") from None
        except _OtherLayoutError:
            raise
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}; its tokens are computed again") from error
        except (StoreError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise StoreError(f"{error}; {self.set_aside(path)}, its tokens are computed again") from error

    def scan(self, bad: Callable[[str], None]) -> Iterator[NodeFile]:
        """Every file of this model and layout, shortest prefix first. Others of this format are left alone; what is damaged
        is set aside and told to ``bad``."""
        found = []
        for path in sorted(self.directory.glob(f"*{_SUFFIX}")):
            try:
                with StateFile(path) as file:
                    header = file.header
                    check_layout(path, header, self.layout)
                    ids = tuple(file.section("ids", torch.int32).tolist())
                    digest, parent = bytes.fromhex(header["digest"]), bytes.fromhex(header["parent"])
                    names = file.names()
                name = NodeName(header["partition"], digest, parent, header["length"], ids)
                found.append(NodeFile(name, "tail" in names, path, header["file_bytes"]))
            except (FileNotFoundError, _OtherLayoutError):
                continue
            except OSError as error:
                bad(f"{path} cannot be read: {error.strerror}")
            except (StoreError, KeyError, ValueError, TypeError) as error:
                bad(f"{error}; {self.set_aside(path)}")
        yield from sorted(found, key=lambda file: file.name.length)

    def delete(self, path: Path) -> None:
        """Remove a file; one that is gone already, or may not be removed, is no error."""
        with contextlib.suppress(OSError):
            path.unlink()

    def set_aside(self, path: Path) -> str:
        """Rename a file so that nobody reads it again; says what was done."""
        aside = path.with_name(path.name + ".bad")
        try:
            path.replace(aside)
            sync_directory(path.parent)
        except OSError as error:
            return f"it could not be set aside ({error.strerror})"
        self.aside += 1
        return f"set aside as {aside.name}"
