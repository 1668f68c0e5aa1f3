"""What the network decided in a rollout, kept by prefix, and the same decisions taken again in training (R3).

A tenth of all router picks differ between two correct implementations, and each such pick is another network. So a rollout's
runner notes, for every token it takes in, the experts of every score-routed layer and the entries that every indexer picked;
training routes by these notes. Notes are kept by prefix, as the engine's cache keeps states: two samples that begin alike
share them. Hash layers route by token id and need none.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from nautile.model import Transformer
from nautile.model.block import Block
from nautile.model.moe import Gate, Routing
from nautile.model.transformer import Trace
from nautile.state.pages import Sequence as PoolSequence

__all__ = ["Decision", "Decisions", "Recorder", "agreement", "decisions_of", "replayed"]

_PRIME = (1 << 61) - 1
_BASE = 1_000_003


def _blocks(model: Transformer) -> list[Block]:
    return list(model.layers)  # type: ignore[arg-type]


def _extend(value: int, token: int) -> int:
    return (value * _BASE + token + 1) % _PRIME


@dataclass(frozen=True)
class Decision:
    """Of one token. ``experts`` [layers, k] int16; ``picks``: for each CSA layer the entries picked, as packed bits, or None
    where every complete entry was."""

    experts: np.ndarray
    picks: tuple[tuple[int, bytes] | None, ...]


class Recorder:
    """Decisions by prefix. Written by the rollout's runner, read by training; with a file they survive a kill."""

    def __init__(self) -> None:
        self.decisions: dict[int, Decision] = {}
        self._reached: WeakKeyDictionary[PoolSequence, tuple[int, int]] = WeakKeyDictionary()
        self._file: BinaryIO | None = None

    @classmethod
    def at(cls, path: Path, model: Transformer) -> Self:
        """A recorder that keeps its notes in ``path`` too, and begins with those that are there; a half-written one is cut."""
        routed = sum(block.ffn.gate.bias is not None for block in _blocks(model))
        shape = (routed, model.config.num_experts_per_tok)
        recorder = cls()
        path.parent.mkdir(parents=True, exist_ok=True)
        data, offset = path.read_bytes() if path.exists() else b"", 0
        while (found := _unpacked(data, offset, shape)) is not None:
            value, decision, offset = found
            recorder.decisions[value] = decision
        file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        file.truncate(offset)
        file.seek(offset)
        recorder._file = file
        return recorder

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def take(self, sequence: PoolSequence, ids: Sequence[int], decisions: Sequence[Decision]) -> None:
        """Note what was decided for ``ids``, which follow what ``sequence`` has taken in. The first note of a prefix stays:
        it is the one whose state others may continue from."""
        value, new = self._value(sequence), list[bytes]()
        for token, decision in zip(ids, decisions, strict=True):
            value = _extend(value, token)
            if value not in self.decisions:
                self.decisions[value] = decision
                new.append(_record(value, decision))
        self._reached[sequence] = (sequence.length + len(ids), value)
        if self._file is not None and new:
            self._file.write(b"".join(new))

    def _value(self, sequence: PoolSequence) -> int:
        length, value = self._reached.get(sequence, (-1, 0))
        if length == sequence.length:
            return value
        value = 0
        for token in sequence.ids[: sequence.length]:
            value = _extend(value, token)
        return value

    def of(self, ids: Sequence[int]) -> list[Decision | None]:
        """The notes of each token of a sequence; None where there is none (the last sampled token is never taken in)."""
        value, found = 0, list[Decision | None]()
        for token in ids:
            value = _extend(value, token)
            found.append(self.decisions.get(value))
        return found


def _record(value: int, decision: Decision) -> bytes:
    """Length, prefix, experts, and for each CSA layer the number of entries (0: all) and its packed bits."""
    parts = [struct.pack("<QB", value, len(decision.picks)), decision.experts.tobytes()]
    for packed in decision.picks:
        parts.append(struct.pack("<I", packed[0] if packed else 0) + (packed[1] if packed else b""))
    body = b"".join(parts)
    return struct.pack("<I", len(body)) + body


def _unpacked(data: bytes, offset: int, shape: tuple[int, int]) -> tuple[int, Decision, int] | None:
    """The record at ``offset``: (prefix, decision, where the next begins); None when it is not whole."""
    if offset + 4 > len(data):
        return None
    end = offset + 4 + struct.unpack_from("<I", data, offset)[0]
    if end > len(data):
        return None
    value, layers = struct.unpack_from("<QB", data, offset + 4)
    place = offset + 13
    experts = np.frombuffer(data, np.int16, shape[0] * shape[1], place).reshape(shape)
    place += experts.nbytes
    picks: list[tuple[int, bytes] | None] = []
    for _ in range(layers):
        count = struct.unpack_from("<I", data, place)[0]
        size = -(-count // 8)
        picks.append((count, data[place + 4 : place + 4 + size]) if count else None)
        place += 4 + size
    return value, Decision(experts, tuple(picks)), end


def decisions_of(model: Transformer, trace: Trace, lengths: Sequence[int], width: int) -> list[list[Decision]]:
    """One pass of B sequences padded to ``width`` -> for each sequence the decision of each of its real tokens."""
    routed = [
        layer.routing.experts.view(len(lengths), width, -1).to(torch.int16).cpu().numpy()
        for block, layer in zip(_blocks(model), trace.layers, strict=True)
        if block.ffn.gate.bias is not None and layer.routing is not None
    ]
    picked = [
        layer.attention.selected.expand(len(lengths), width, -1).cpu().numpy()
        for ratio, layer in zip(model.config.layer_ratios, trace.layers, strict=True)
        if ratio == 4 and layer.attention.selected is not None
    ]
    limit = model.config.index_topk
    found = []
    for row, length in enumerate(lengths):
        found.append(
            [
                Decision(
                    np.stack([experts[row, token] for experts in routed]) if routed else np.zeros((0, 0), np.int16),
                    tuple(_packed(bits[row, token], limit) for bits in picked),
                )
                for token in range(length)
            ]
        )
    return found


def _packed(bits: np.ndarray, limit: int) -> tuple[int, bytes] | None:
    """Packed bits of a selection that left something out; None for "all that were complete"."""
    return (len(bits), np.packbits(bits).tobytes()) if len(bits) > limit else None


@dataclass(frozen=True)
class Decisions:
    """Of a batch of rows, in the shape that training needs; -1 and None stand for "decide anew".

    ``experts``: for each score-routed layer [B, T, k] int64. ``picks``: for each CSA layer {(row, token): bool [n]}.
    """

    experts: list[Tensor]
    picks: list[dict[tuple[int, int], Tensor]]
    missing: int  # tokens without a note

    @classmethod
    def of(cls, model: Transformer, rows: Sequence[Sequence[Decision | None]], width: int) -> Decisions:
        """Rows of notes, padded to ``width`` tokens."""
        routed = sum(block.ffn.gate.bias is not None for block in _blocks(model))
        sparse = sum(ratio == 4 for ratio in model.config.layer_ratios)
        experts = np.full((routed, len(rows), width, model.config.num_experts_per_tok), -1, np.int64)
        picks: list[dict[tuple[int, int], Tensor]] = [{} for _ in range(sparse)]
        missing = 0
        for row, notes in enumerate(rows):
            for token, note in enumerate(notes[:width]):
                if note is None:
                    missing += 1
                    continue
                experts[:, row, token] = note.experts
                for layer, packed in enumerate(note.picks):
                    if packed is not None:
                        bits = np.unpackbits(np.frombuffer(packed[1], np.uint8))[: packed[0]]
                        picks[layer][row, token] = torch.from_numpy(bits.astype(bool))
        return cls([torch.from_numpy(layer) for layer in experts], picks, missing)


@contextlib.contextmanager
def replayed(model: Transformer, decisions: Decisions) -> Iterator[None]:
    """Within this context a pass of the trunk over the rows routes, and picks entries, as ``decisions`` say."""
    routed, sparse = iter(decisions.experts), iter(decisions.picks)
    undo: list[Any] = []
    for block in _blocks(model):
        if block.ffn.gate.bias is not None:
            undo.append(block.ffn.gate.register_forward_hook(_Rerouted(next(routed))).remove)
        if block.attn.indexer is not None:
            undo.append(_repicked(block.attn.indexer, next(sparse)))
    try:
        yield
    finally:
        for action in undo:
            action()


class _Rerouted:
    """A forward hook of a gate: the experts that were noted, with weights from the scores of now."""

    def __init__(self, experts: Tensor) -> None:
        self.experts = experts.flatten(0, 1)

    def __call__(self, gate: Gate, arguments: Any, routing: Routing) -> Routing:
        noted = self.experts.to(routing.experts.device)
        experts = torch.where(noted >= 0, noted, routing.experts)
        weights = routing.scores.gather(-1, experts)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * gate.config.routed_scaling_factor
        return Routing(routing.scores, experts, weights)


def _repicked(indexer: Any, picks: dict[tuple[int, int], Tensor]) -> Any:
    """Let an indexer score the noted entries above all others; gives what takes that back."""
    scores = indexer.scores

    def noted(*arguments: Any) -> Tensor:
        found: Tensor = scores(*arguments)
        if not picks:
            return found
        found = found.clone()
        for (row, token), bits in picks.items():
            if token < found.shape[1]:
                count = min(len(bits), found.shape[2])
                found[row, token] = -torch.inf
                found[row, token, :count] = torch.where(bits[:count].to(found.device), 0.0, -torch.inf)
        return found

    indexer.scores = noted
    return lambda: delattr(indexer, "scores")


def agreement(noted: Sequence[Decision | None], computed: Sequence[Decision]) -> tuple[int, int]:
    """(expert picks that differ, expert picks compared) between a rollout's notes and what training decides by itself."""
    differing = compared = 0
    for one, other in zip(noted, computed, strict=False):
        if one is not None:
            for left, right in zip(one.experts, other.experts, strict=True):
                compared += len(left)
                differing += len(set(left.tolist()) - set(right.tolist()))
    return differing, compared
