"""What one session's file holds, in memory: read, checked, written. Knows no directory and no pool.

A file may come from anybody (``import``): a checksum says that it is as somebody wrote it, not that it makes sense, so every
field is checked before one is used.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nautile.state.files import StateFile, StoreError
from nautile.state.store import NodeName

__all__ = ["LAYOUT", "SessionContents", "check_fields", "node_layout", "read_contents", "read_span", "sections", "spans"]

LAYOUT = ("model", "rows", "block_tokens", "block_bytes", "slot_bytes")
_ROOT = blake2b(b"", digest_size=16).digest()
_NUMBERS = {  # the least of each
    "length": 1,
    "state_length": 0,
    "revision": 1,
    "spans": 0,
    "snapshot_every": 1,
    "block_tokens": 1,
    "block_bytes": 1,
    "slot_bytes": 0,
}
_TEXTS = ("model", "rows", "created", "updated", "note")


@dataclass(frozen=True)
class SessionContents:
    """Everything in a session's file. Spans are the k-token steps before the last part, with the tail lengths known."""

    fields: dict[str, Any]
    ids: tuple[int, ...]
    history: Tensor  # [blocks, block_bytes] after the last span
    tail: Tensor | None
    logits: Tensor | None

    @property
    def spans(self) -> list[NodeName]:
        """The steps, in order."""
        return spans(self.ids, self.fields["spans"], self.fields["snapshot_every"])


def node_layout(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The layout of the step files that a session refers to; sessions of the first releases do not say ``computed_by``."""
    return {**{key: fields[key] for key in LAYOUT}, "computed_by": fields.get("computed_by", "")}


def check_fields(path: Path, fields: Mapping[str, Any]) -> None:
    """Raises StoreError unless a header's fields are of the right kinds and agree with each other."""

    def wrong(what: str) -> StoreError:
        return StoreError(f"{path} is not as a session is written: {what}")

    for key, least in _NUMBERS.items():
        if type(fields.get(key)) is not int or fields[key] < least:
            raise wrong(f"{key} is {str(fields.get(key))[:40]}")
    for key in _TEXTS:
        if not isinstance(fields.get(key), str):
            raise wrong(f"{key} is no text")
    if not isinstance(fields.get("forked_from", 0), str | None) or not isinstance(fields.get("computed_by", ""), str):
        raise wrong("forked_from or computed_by is no text")
    k, before = fields["snapshot_every"], fields["spans"] * fields["snapshot_every"]
    if k % fields["block_tokens"] or fields["state_length"] > fields["length"]:
        raise wrong("its lengths do not agree")
    if before and before >= fields["state_length"]:
        raise wrong(f"{fields['spans']} steps of {k} tokens do not end before its {fields['state_length']} tokens with state")
    snapshots = fields.get("snapshots")
    if not isinstance(snapshots, list) or any(type(at) is not int or at % k or not 0 < at <= before for at in snapshots):
        raise wrong("its snapshots are not the ends of its steps")


def read_contents(file: StateFile) -> SessionContents:
    """Raises StoreError when anything in the file is not as it was written, or makes no sense."""
    names = file.names()
    fields = {key: value for key, value in file.header.items() if key not in ("kind", "file_bytes", "sections", "name")}
    check_fields(file.path, fields)
    ids = file.section("ids", torch.int32)
    tail = file.section("tail") if "tail" in names else None
    logits = file.section("logits", torch.float32) if "logits" in names else None
    if len(ids) != fields["length"] or int(ids.min()) < 0:
        raise StoreError(f"{file.path} says {fields['length']} tokens and holds {len(ids)}, or some that are negative")
    rest = fields["state_length"] - fields["spans"] * fields["snapshot_every"]
    history = _history(file, "history", -(-rest // fields["block_tokens"]), fields["block_bytes"])
    return SessionContents(fields, tuple(ids.tolist()), history, tail, logits)


def read_span(file: StateFile, index: int, fields: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """History and tail of one step in an exported session. Raises StoreError."""
    blocks = fields["snapshot_every"] // fields["block_tokens"]
    history = _history(file, f"span/{index}/history", blocks, fields["block_bytes"])
    return history, file.section(f"span/{index}/tail") if f"span/{index}/tail" in file.names() else None


def sections(contents: SessionContents) -> dict[str, Tensor]:
    """What the file of a session is made of."""
    found = {"ids": torch.tensor(contents.ids, dtype=torch.int32), "history": contents.history}
    if contents.tail is not None:
        found["tail"] = contents.tail
    if contents.logits is not None:
        found["logits"] = contents.logits.detach().float().flatten()
    return found


def spans(ids: Many[int], count: int, k: int) -> list[NodeName]:
    """The first ``count`` steps of k tokens, as the nodes of a prefix tree are named."""
    found, parent = [], _ROOT
    for index in range(count):
        own = tuple(ids[index * k : (index + 1) * k])
        digest = blake2b(parent + array("I", own).tobytes(), digest_size=16).digest()
        found.append(NodeName("", digest, parent, (index + 1) * k, own))
        parent = digest
    return found


def _history(file: StateFile, name: str, blocks: int, block_bytes: int) -> Tensor:
    data = file.section(name)
    if data.numel() != blocks * block_bytes:
        raise StoreError(f"{file.path}: section {name!r} holds {data.numel()} bytes, not {blocks} blocks of {block_bytes}")
    return data.view(blocks, block_bytes)
