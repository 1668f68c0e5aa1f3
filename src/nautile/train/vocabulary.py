"""Ids mean nothing without their tokenizer: its digest lies beside shards and weights, and is compared where they meet."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from nautile.train.run_state import RunError

__all__ = ["check_same", "digest", "digest_beside", "record"]

_NAME = "tokenizer.sha256"


def digest(tokenizer: Path) -> str:
    """Of a tokenizer's content, however its file is laid out (a directory, or a tokenizer.json). Raises RunError."""
    path = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is not a tokenizer: {error}") from None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def record(directory: Path, value: str) -> None:
    """Note which tokenizer the ids of a directory are of."""
    (directory / _NAME).write_text(f"{value}\n", encoding="utf-8")


def digest_beside(path: Path) -> str | None:
    """The tokenizer of a model directory, of a directory of shards, or of weights in a run's directory; None when unknown."""
    directory = path if path.is_dir() else path.parent
    if (directory / _NAME).is_file():
        return (directory / _NAME).read_text(encoding="utf-8").strip()
    return digest(directory) if (directory / "tokenizer.json").is_file() else None


def check_same(one: Path, other: Path) -> str | None:
    """The tokenizer that both are of, as far as they say. Raises RunError when it is not the same."""
    first, second = digest_beside(one), digest_beside(other)
    if first is not None and second is not None and first != second:
        raise RunError(f"{one} and {other} are of different tokenizers: their ids do not mean the same; build the shards anew")
    return first or second
