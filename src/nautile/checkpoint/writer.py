"""Writing checkpoints: the official layout (FP8, FP4, BF16, F32, I64) or transformers' names in bf16.

Writing ROUNDS what the format cannot hold: matrices to FP8 or FP4, embeddings, norms and routers to BF16. The report says
by how much, per format; a model that was trained on the grid (or came from such a checkpoint) is written exactly. Values
that no format can hold (NaN, infinity) are refused. Nothing of the target changes until every file is on the disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nautile.checkpoint.configuration import official_config, transformers_config
from nautile.checkpoint.errors import CheckpointError
from nautile.checkpoint.layout import Entry, StoredTensor, entries, locate, stored_tensors, target_shapes
from nautile.checkpoint.reader import Progress
from nautile.checkpoint.shards import ShardWriter
from nautile.config import ModelConfig
from nautile.model.transformer import Transformer
from nautile.quant import fp8, mxfp4

__all__ = ["SaveOptions", "SaveReport", "fetch_from", "save_model", "write_checkpoint"]

Fetch = Callable[[Entry], Tensor]

COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja",
)  # fmt: skip
_INDEX = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


@dataclass(frozen=True)
class SaveOptions:
    """How to write. ``expert_dtype`` None: what the configuration says. ``companions``: directory whose tokenizer files are
    copied along."""

    layout: Literal["official", "transformers"] = "official"
    expert_dtype: Literal["fp4", "fp8"] | None = None
    max_shard_bytes: int = 5_000_000_000
    companions: Path | None = None


@dataclass
class SaveReport:
    """What was written. ``rounding``: per format, the largest |written - given| of a tensor relative to its largest value;
    0.0 is exact. ``left_out``: blocks that the layout has no place for."""

    path: Path
    files: list[str] = field(default_factory=list)
    tensors: int = 0
    nbytes: int = 0
    rounding: dict[str, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Piece:
    """Tensors that are written together, and the entries they are made of."""

    tensors: tuple[StoredTensor, ...]
    parts: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def save_model(
    model: Transformer,
    path: str | Path,
    *,
    tokenizer_dir: str | Path | None = None,
    max_shard_bytes: int = SaveOptions.max_shard_bytes,
    expert_dtype: Literal["fp4", "fp8"] | None = None,
    progress: Progress | None = None,
) -> SaveReport:
    """Write a model to a directory in the official layout, ``config.json`` included.

    Args: tokenizer_dir, whose tokenizer files are copied; max_shard_bytes, size above which another file is begun.
    Raises CheckpointError when a value is not finite, a shape does not fit the format, or the disk is full or read-only.
    """
    options = SaveOptions(
        expert_dtype=expert_dtype,
        max_shard_bytes=max_shard_bytes,
        companions=None if tokenizer_dir is None else Path(tokenizer_dir),
    )
    return write_checkpoint(fetch_from(model.state_dict(), model.config), model.config, path, options, progress)


def fetch_from(state: Mapping[str, Tensor], config: ModelConfig) -> Fetch:
    """Entries of a state dict. Raises CheckpointError at once when a tensor is missing or of the wrong shape."""
    for name, shape in target_shapes(config).items():
        if name not in state:
            raise CheckpointError(f"the state dict lacks {name!r}, which the configuration calls for")
        if tuple(state[name].shape) != shape:
            raise CheckpointError(f"{name!r} has shape {list(state[name].shape)}; the configuration calls for {list(shape)}")
    return lambda entry: state[entry.target] if entry.expert is None else state[entry.target][entry.expert]


def write_checkpoint(
    fetch: Fetch, config: ModelConfig, path: str | Path, options: SaveOptions | None = None, progress: Progress | None = None
) -> SaveReport:
    """Write the entries of ``config``, each obtained from ``fetch`` when its turn comes, one in memory at a time.

    Existing weight files of the directory are replaced, everything else in it stays. Raises CheckpointError as
    ``save_model`` does; the directory is then as it was.
    """
    options, directory = options or SaveOptions(), Path(path)
    config = config.replace(expert_dtype=options.expert_dtype or config.expert_dtype or "fp4")
    report = SaveReport(directory)
    if options.layout == "transformers":
        report.left_out = tuple(f"mtp.{index}" for index in range(config.num_nextn_predict_layers))
        config = config.replace(num_nextn_predict_layers=0)
    pieces = list(_official(config) if options.layout == "official" else _transformers(config))
    shards = _cut(pieces, options.max_shard_bytes)
    documents = _documents(config, options, shards)
    try:
        with _Staging(directory) as staging:
            _require_space(staging.directory, sum(piece.nbytes for piece in pieces))
            count = 0
            for name, members in shards.items():
                writer = ShardWriter(staging.new(name), [tensor for piece in members for tensor in piece.tensors])
                try:
                    for piece in members:
                        for stored, value in _encode(piece, fetch, options, report):
                            writer.write(stored.name, value)
                        count += 1
                        if progress is not None:
                            progress(count, len(pieces))
                except BaseException:
                    writer.close(complete=False)
                    raise
                writer.close()
            for name, data in documents.items():
                staging.write(name, data)
            report.files = staging.commit()
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written ({error.strerror or error}); nothing was changed") from None
    report.tensors = sum(len(piece.tensors) for piece in pieces)
    report.nbytes = sum(piece.nbytes for piece in pieces)
    return report


# What goes into the files -------------------------------------------------------------------------------------------


def _official(config: ModelConfig) -> Iterator[_Piece]:
    for entry in entries(config):
        yield _Piece(stored_tensors(entry), (entry,))


def _transformers(config: ModelConfig) -> Iterator[_Piece]:
    """One tensor per name; the experts of a layer become two stacked tensors. Quantised tensors become BF16, exactly."""
    stacks: dict[str, list[Entry]] = {}
    for entry in entries(config):
        at = locate(entry, "transformers")
        if at.index is not None:
            stacks.setdefault(at.name, []).append(entry)
            continue
        dtype = {"f32": "F32", "i64": "I64"}.get(entry.storage, "BF16")
        yield _Piece((StoredTensor(at.name, dtype, entry.shape),), (entry,))
    for name, parts in stacks.items():
        rows = parts[0].shape[0] * (2 if locate(parts[0], "transformers").rows else 1)
        yield _Piece((StoredTensor(name, "BF16", (config.n_routed_experts, rows, parts[0].shape[1])),), tuple(parts))


def _cut(pieces: list[_Piece], limit: int) -> dict[str, list[_Piece]]:
    """Files of at most ``limit`` bytes (one piece at least), in order. A single file needs no index."""
    if limit < 1:
        raise CheckpointError(f"max_shard_bytes must be positive, got {limit}")
    groups: list[list[_Piece]] = [[]]
    size = 0
    for piece in pieces:
        if groups[-1] and size + piece.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": group for number, group in enumerate(groups, start=1)}


def _documents(config: ModelConfig, options: SaveOptions, shards: dict[str, list[_Piece]]) -> dict[str, bytes]:
    """The small files beside the weights; ``config.json`` comes last, so a directory that has one is complete."""
    found: dict[str, bytes] = {}
    if options.companions is not None:
        found = {name: (options.companions / name).read_bytes() for name in COMPANIONS if (options.companions / name).is_file()}
        if "tokenizer.json" not in found:
            raise CheckpointError(f"{options.companions} holds no tokenizer.json")
    if len(shards) > 1:
        placed = {tensor.name: name for name, members in shards.items() for piece in members for tensor in piece.tensors}
        total = sum(piece.nbytes for members in shards.values() for piece in members)
        found[_INDEX] = _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))})
    is_official = options.layout == "official"
    found["config.json"] = _json(official_config(config) if is_official else transformers_config(config, "bfloat16"))
    return found


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def _encode(piece: _Piece, fetch: Fetch, options: SaveOptions, report: SaveReport) -> list[tuple[StoredTensor, Tensor]]:
    entry = piece.parts[0]
    if options.layout == "official":
        values = _checked(entry, fetch)
        encoded, decoded = _stored(values, entry.storage)
        _note(report, entry.storage, values, decoded)
        return list(zip(piece.tensors, encoded, strict=True))
    stored = piece.tensors[0]
    if len(piece.parts) == 1 and locate(entry, "transformers").index is None:
        values = _checked(entry, fetch)
        kind = {"F32": "f32", "I64": "i64"}.get(stored.dtype, "bf16")
        encoded, decoded = _stored(values, kind)
        _note(report, kind, values, decoded)
        return [(stored, encoded[0])]
    stack = torch.empty(stored.shape, dtype=torch.bfloat16)
    for part in piece.parts:
        at = locate(part, "transformers")
        start, stop = at.rows or (0, part.shape[0])
        values = _checked(part, fetch)
        target = stack[at.index, start:stop]
        target.copy_(values)
        _note(report, "bf16", values, target)
    return [(stored, stack)]


def _checked(entry: Entry, fetch: Fetch) -> Tensor:
    values = fetch(entry).detach().cpu()
    if values.is_floating_point() and not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"{entry.name} holds NaN or infinity; a checkpoint of it would be useless")
    return values


def _stored(values: Tensor, kind: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """(what the file holds, what it will be read as)."""
    if kind == "fp8":
        eight = fp8.encode_blocks(values)
        return eight, fp8.decode_blocks(*eight)
    if kind == "fp4":
        four = mxfp4.encode(values)
        return four, mxfp4.decode(*four)
    out = values.to({"bf16": torch.bfloat16, "f32": torch.float32, "i64": torch.int64}[kind])
    return (out,), out


def _note(report: SaveReport, kind: str, given: Tensor, written: Tensor) -> None:
    if not given.is_floating_point() or not given.numel():
        return
    wide = given.double() if given.dtype == torch.float64 else given.float()
    largest = wide.abs().max()
    error = (written.to(wide.dtype) - wide).abs().max() / largest if largest > 0 else largest
    report.rounding[kind] = max(report.rounding.get(kind, 0.0), float(error))


# All or nothing ------------------------------------------------------------------------------------------------------


class _Staging:
    """Files written under temporary names beside their targets, and given their names together at the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, Path] = {}

    def __enter__(self) -> _Staging:
        self._created = not self.directory.exists()
        self.directory.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._files.values():
            path.unlink(missing_ok=True)
        if self._created and not any(self.directory.iterdir()):
            self.directory.rmdir()

    def new(self, name: str) -> Path:
        """The temporary path of a file."""
        self._files[name] = self.directory / f".{name}.{os.getpid()}.partial"
        return self._files[name]

    def write(self, name: str, data: bytes) -> None:
        """A small file."""
        with self.new(name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def commit(self) -> list[str]:
        """Rename everything into place and remove weight files of an earlier checkpoint. Returns the names."""
        names = list(self._files)
        for name, path in self._files.items():
            path.replace(self.directory / name)
        self._files.clear()
        for path in self.directory.iterdir():
            if _WEIGHTS.fullmatch(path.name) and path.name not in names:
                path.unlink()
        handle = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        return names


def _require_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(
            f"{directory}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free; nothing was written"
        )
