"""Packed shards -> batches on the device, with a cursor that a resumed run continues from."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nautile.train.losses import Batch

__all__ = ["batches", "synthetic_batch"]

_WAIT = 0.2  # seconds between looks for a shard that another process is still writing


def batches(
    directory: Path,
    rows: int,
    device: torch.device,
    start: tuple[int, int] = (0, 0),
    patience: float = 600.0,
) -> Iterator[tuple[Batch, int, int]]:
    """Yield (batch of ``rows`` rows, shard, next row) for ever, in shard order, starting at ``start`` = (shard, row).

    Shards are ``shard-00000.npz`` and so on. When the next one is not there: if ``done`` exists in the directory the first
    shard follows the last, otherwise the next is waited for, ``patience`` seconds at most (then TimeoutError).
    """
    shard, row = start
    while True:
        path = directory / f"shard-{shard:05d}.npz"
        if not path.exists():
            if shard and (directory / "done").exists():
                shard, row = 0, 0
                continue
            _wait_for(path, directory, patience)
            continue
        with np.load(path) as arrays:
            ids, documents, loss = arrays["ids"], arrays["documents"], arrays["loss"]
        while row + rows <= len(ids):
            part = slice(row, row + rows)
            row += rows
            yield Batch(_send(ids[part], device), _send(documents[part], device), _send(loss[part], device).float()), shard, row
        shard, row = shard + 1, 0


def _send(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array.astype(np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _wait_for(path: Path, directory: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while not path.exists() and not (directory / "done").exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear within {patience:.0f} s; is the data builder still running?")
        time.sleep(_WAIT)


def synthetic_batch(rows: int, length: int, vocab_size: int, device: torch.device) -> Batch:
    """Random ids in documents of 512 tokens, for measuring speed: [rows, length]."""
    ids = torch.randint(0, vocab_size, (rows, length), device=device)
    documents = (torch.arange(length, device=device) // 512 * 512).expand(rows, -1).contiguous()
    return Batch(ids, documents, torch.ones(rows, length, device=device))
