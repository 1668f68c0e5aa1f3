"""Safetensors files, read and written one tensor at a time.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data. The library reads the
same files; this module exists for what it does not offer: errors that name the damaged tensor, rows of a stacked tensor
without the rest, and writing a shard without holding it in memory.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nautile.checkpoint.errors import CheckpointError
from nautile.checkpoint.layout import ITEM_BYTES, StoredTensor

__all__ = ["Shard", "ShardWriter"]

_LONGEST_HEADER = 100_000_000  # bytes; the library's own limit
_TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True)
class _Place:
    tensor: StoredTensor
    start: int  # byte in the file

    @property
    def end(self) -> int:
        return self.start + self.tensor.nbytes


class Shard:
    """One safetensors file, open for reading: ``tensors`` is what its header lists. Close it, or use it as a context
    manager."""

    def __init__(self, path: Path) -> None:
        """Read and check the header. Raises CheckpointError when the file is missing, cut or damaged."""
        self.path = path
        try:
            self._file: BufferedReader = path.open("rb")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened ({error.strerror}); download or copy it again") from None
        try:
            self._places = self._read_header()
            self.tensors = {name: place.tensor for name, place in self._places.items()}
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str, index: int | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor on the CPU; or element ``index`` of its first dimension, or rows ``start .. stop`` of that element."""
        place = self._places[name]
        shape, start = place.tensor.shape, place.start
        item = ITEM_BYTES[place.tensor.dtype]
        for cut in (None if index is None else (index, index + 1), rows):
            if cut is None:
                continue
            if cut[1] > shape[0]:
                raise CheckpointError(f"{self.path}: tensor {name!r} has only {shape[0]} of the {cut[1]} rows needed")
            inner = item * _product(shape[1:])
            start += cut[0] * inner
            shape = shape[1:] if cut is not rows else (cut[1] - cut[0], *shape[1:])
        return self._read_bytes(name, start, item * _product(shape)).view(_TORCH[place.tensor.dtype]).view(shape)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_bytes(self, name: str, start: int, size: int) -> Tensor:
        data = torch.empty(size, dtype=torch.uint8)
        self._file.seek(start)
        if self._file.readinto(data.numpy().data) != size:
            raise CheckpointError(f"{self.path}: the file ends inside tensor {name!r}; download or copy it again")
        return data

    def _read_header(self) -> dict[str, _Place]:
        size = os.fstat(self._file.fileno()).st_size
        prefix = self._file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, _LONGEST_HEADER):
            raise CheckpointError(
                f"{self.path}: not a safetensors file, or cut inside its header ({size} bytes); download or copy it again"
            )
        try:
            header = json.loads(self._file.read(length))
            header.pop("__metadata__", None)
            places = {name: _place(name, value, 8 + length) for name, value in header.items()}
            _refuse_overlaps(places)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: damaged safetensors header ({error}); download or copy it again") from None
        for place in places.values():
            if place.end > size:
                raise CheckpointError(
                    f"{self.path}: truncated: tensor {place.tensor.name!r} ends at byte {place.end}, the file has {size}; "
                    "download or copy it again"
                )
        return places


class ShardWriter:
    """One safetensors file being written: the header first, then its tensors in any order, each once."""

    def __init__(self, path: Path, tensors: Sequence[StoredTensor]) -> None:
        """Create the file for these tensors, widest dtype first so that every tensor starts at a multiple of its items."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        self._path = path
        self._starts: dict[str, int] = {}
        self._tensors = {tensor.name: tensor for tensor in tensors}
        for tensor in sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype]):
            end = offset + tensor.nbytes
            header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
            self._starts[tensor.name] = offset
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(self._data + offset)

    def write(self, name: str, value: Tensor) -> None:
        """Put the data of one tensor in its place. Raises ValueError when dtype or shape is not what was announced."""
        tensor = self._tensors.pop(name)
        if value.dtype != _TORCH[tensor.dtype] or tuple(value.shape) != tensor.shape:
            raise ValueError(f"{name}: announced {tensor.dtype} {tensor.shape}, got {value.dtype} {tuple(value.shape)}")
        self._file.seek(self._data + self._starts[name])
        self._file.write(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def close(self, *, complete: bool = True) -> None:
        """Flush to the disk and close. Raises ValueError when a tensor was announced and never written."""
        with self._file:
            if complete and self._tensors:
                raise ValueError(f"{self._path}: never written: {', '.join(sorted(self._tensors))}")
            self._file.flush()
            os.fsync(self._file.fileno())


def _place(name: str, value: dict[str, Any], data: int) -> _Place:
    tensor = StoredTensor(name, value["dtype"], tuple(int(size) for size in value["shape"]))
    start, end = value["data_offsets"]
    if not isinstance(start, int) or not isinstance(end, int):
        raise ValueError(f"tensor {name!r} has the data offsets {start!r} and {end!r}")
    if tensor.dtype not in ITEM_BYTES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {tensor.dtype}")
    if start < 0 or end - start != tensor.nbytes or any(size < 0 for size in tensor.shape):
        raise ValueError(f"tensor {name!r} of shape {tensor.shape} does not fill bytes {start} to {end}")
    return _Place(tensor, data + start)


def _refuse_overlaps(places: dict[str, _Place]) -> None:
    ordered = sorted(places.values(), key=lambda place: (place.start, place.end))
    for one, other in itertools.pairwise(ordered):
        if other.start < one.end:
            raise ValueError(f"tensors {one.tensor.name!r} and {other.tensor.name!r} overlap")


def _product(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
