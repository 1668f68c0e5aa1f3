"""Files of prefix-tree nodes: one directory, one file a node, named by the digest of the tokens it stands for.

Safe for several processes on one directory: files appear whole under their final name, equal names mean equal tokens of
equal models, and a file that has vanished is a miss.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nautile.state.files import StateFile, StoreError, StoreUnavailable, sync_directory, write_file
from nautile.state.pages import Pages
from nautile.state.prefix import Node

__all__ = ["NodeFile", "NodeStore", "StoreError", "StoreUnavailable", "layout"]

_SUFFIX = ".node"


def layout(pages: Pages, fingerprint: str) -> dict[str, Any]:
    """What must be equal for the bytes of a file to mean the same in a pool: written into every file, compared when read."""
    return {
        "model": fingerprint,
        "rows": pages.options.rows,
        "block_tokens": pages.options.block_tokens,
        "block_bytes": pages.block_bytes,
        "slot_bytes": pages.slot_bytes,
    }


@dataclass(frozen=True)
class NodeFile:
    """What a node's file says about itself."""

    partition: str
    digest: bytes
    parent: bytes
    length: int
    ids: tuple[int, ...]
    has_tail: bool
    path: Path
    file_bytes: int


class NodeStore:
    """One directory. ``writable`` turns False when the system refuses a file; reading goes on."""

    def __init__(self, directory: Path, pages: Pages, fingerprint: str) -> None:
        """Raises StoreUnavailable when the directory cannot be made or listed."""
        self.directory, self.pages, self.writable = directory, pages, True
        self.layout = layout(pages, fingerprint)
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            next(directory.iterdir(), None)
        except OSError as error:
            raise StoreUnavailable(error.errno, f"cannot use {directory} for state files: {error.strerror}") from error

    def write(self, node: Node, stored: Tensor, tail: Tensor | None) -> tuple[Path, int]:
        """Write a node's history [blocks, block_bytes] and tail; gives path and size. Raises StoreUnavailable."""
        assert node.parent is not None
        fields = {
            **self.layout,
            "partition": node.partition,
            "digest": node.digest.hex(),
            "parent": node.parent.digest.hex(),
            "length": node.length,
        }
        sections = {"ids": torch.tensor(node.ids, dtype=torch.int32), "history": stored}
        if tail is not None:
            sections["tail"] = tail
        path = self.directory / (node.digest.hex() + _SUFFIX)
        return path, write_file(path, "node", fields, sections)

    def read(self, path: Path, digest: bytes) -> tuple[Tensor, Tensor | None]:
        """History [blocks, block_bytes] and tail. A file that cannot be trusted is set aside. Raises StoreError."""
        try:
            with StateFile(path) as file:
                self._check(path, file.header)
                if file.header["digest"] != digest.hex():
                    raise StoreError(f"{path} holds other tokens than its name says")
                blocks = -(-len(file.section("ids", torch.int32)) // self.pages.options.block_tokens)
                history = file.section("history").view(blocks, self.pages.block_bytes)
                return history, file.section("tail") if "tail" in file.names() else None
        except FileNotFoundError:
            raise StoreError(f"{path} is gone (another process may have removed it)") from None
        except (StoreError, KeyError, TypeError, RuntimeError, OSError) as error:
            raise StoreError(f"{error}; {self.set_aside(path)}, its tokens are computed again") from error

    def scan(self, bad: Callable[[str], None]) -> Iterator[NodeFile]:
        """Every file of this model and layout, shortest prefix first. Others of this format are left alone; what is damaged
        is set aside and told to ``bad``."""
        found = []
        for path in sorted(self.directory.glob(f"*{_SUFFIX}")):
            try:
                with StateFile(path) as file:
                    header = file.header
                    if {key: header.get(key) for key in self.layout} != self.layout:
                        continue
                    ids = tuple(file.section("ids", torch.int32).tolist())
                    digest, parent = bytes.fromhex(header["digest"]), bytes.fromhex(header["parent"])
                    names = file.names()
                found.append(
                    NodeFile(
                        header["partition"], digest, parent, header["length"], ids, "tail" in names, path, header["file_bytes"]
                    )
                )
            except FileNotFoundError:
                continue
            except (StoreError, KeyError, ValueError, TypeError, OSError, json.JSONDecodeError) as error:
                bad(f"{error}; {self.set_aside(path)}")
        yield from sorted(found, key=lambda file: file.length)

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
        return f"set aside as {aside.name}"

    def _check(self, path: Path, header: dict[str, Any]) -> None:
        for key, wanted in self.layout.items():
            if header.get(key) != wanted:
                raise StoreError(f"{path} was written for another {key}: {header.get(key)!r}, here {wanted!r}")
