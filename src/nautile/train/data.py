"""Packed shards -> batches on the device, with a cursor that a resumed run continues from."""

from __future__ import annotations

import time
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nautile.train.losses import Batch
from nautile.train.run_state import RunError

__all__ = ["batches", "synthetic_batch"]

_WAIT = 0.2  # seconds between looks for a shard that another process is still writing


def batches(
    directory: Path,
    rows: int,
    device: torch.device,
    start: tuple[int, int] = (0, 0),
    patience: float = 30.0,
) -> Iterator[tuple[Batch, int, int]]:
    """Yield (batch of ``rows`` rows, shard, next row) for ever, in shard order, starting at ``start`` = (shard, row).

    Shards are ``shard-00000.npz`` and so on. When the next one is not there: if ``done`` exists in the directory the first
    shard follows the last, otherwise it is waited for, ``patience`` seconds at most; then it is passed over with a warning
    if later ones are there (its builder hangs), else TimeoutError. A shard whose builder failed (``shard-N.failed`` holds the
    traceback) is passed over too. Raises RunError for a damaged one.
    """
    shard, row = start
    while True:
        path = directory / f"shard-{shard:05d}.npz"
        if path.with_suffix(".failed").exists():
            shard, row = shard + 1, 0
            continue
        if not path.exists():
            if shard and (directory / "done").exists():
                shard, row = shard + 1, 0
                if not any(shard_number(file) >= shard for file in directory.glob("shard-*.npz")):
                    shard = 0
            elif not _appears(path, directory, patience):
                warnings.warn(f"{path.name} did not appear within {patience:.0f} s: passed over", stacklevel=2)
                shard, row = shard + 1, 0
            continue
        ids, documents, loss = _read_shard(path)
        while row + rows <= len(ids):
            part = slice(row, row + rows)
            row += rows
            yield Batch(_send(ids[part], device), _send(documents[part], device), _send(loss[part], device).float()), shard, row
        shard, row = shard + 1, 0


def _read_shard(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, documents, loss of one shard, [N, T] each. Raises RunError when the file is not what a builder writes."""
    again = "remove it and run the data builder again, which writes it anew"
    try:
        with np.load(path) as arrays:
            ids, documents, loss = arrays["ids"], arrays["documents"], arrays["loss"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise RunError(f"{path} is damaged ({type(error).__name__}): {again}") from None
    if ids.ndim != 2 or not ids.shape == documents.shape == loss.shape:
        raise RunError(f"{path} holds arrays of shapes {ids.shape}, {documents.shape} and {loss.shape}: {again}")
    return ids, documents, loss


def _send(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array.astype(np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def shard_number(path: Path) -> int:
    """The number in the name of a shard."""
    return int(path.stem.removeprefix("shard-"))


def _appears(path: Path, directory: Path, patience: float) -> bool:
    """Wait for a shard. False when only later ones appeared in time; TimeoutError when nothing did."""
    deadline = time.monotonic() + patience
    while not any(file.exists() for file in (path, path.with_suffix(".failed"), directory / "done")):
        if time.monotonic() > deadline:
            if any(shard_number(file) > shard_number(path) for file in directory.glob("shard-*.npz") if file.exists()):
                return False
            raise TimeoutError(f"{path} did not appear within {patience:.0f} s; is the data builder still running?")
        time.sleep(_WAIT)
    return True


def synthetic_batch(rows: int, length: int, vocab_size: int, device: torch.device) -> Batch:
    """Random ids in documents of 512 tokens, for measuring speed: [rows, length]."""
    ids = torch.randint(0, vocab_size, (rows, length), device=device)
    documents = (torch.arange(length, device=device) // 512 * 512).expand(rows, -1).contiguous()
    return Batch(ids, documents, torch.ones(rows, length, device=device))
