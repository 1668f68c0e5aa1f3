"""What an official checkpoint of a configuration consists of, from the configuration alone."""

from __future__ import annotations

from nautile.checkpoint.layout import StoredTensor, entries, stored_tensors
from nautile.config import ModelConfig

__all__ = ["manifest"]


def manifest(config: ModelConfig, expert_dtype: str | None = None) -> list[StoredTensor]:
    """Every tensor of the official files with its dtype, shape and bytes, scales included (file headers are not).

    ``expert_dtype`` "fp4" or "fp8" overrides the configuration's. Raises CheckpointError when a format cannot hold a shape.
    """
    return [tensor for entry in entries(config, expert_dtype) for tensor in stored_tensors(entry)]
