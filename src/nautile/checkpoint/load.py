"""A model from a checkpoint directory."""

from __future__ import annotations

from pathlib import Path

import torch

from nautile.checkpoint.reader import Checkpoint, Progress, load_state
from nautile.model.rope import inverse_frequencies
from nautile.model.transformer import Transformer

__all__ = ["load_model"]


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Transformer:
    """The network of a checkpoint in the official or the transformers layout, its quantised tensors decoded to ``dtype``.

    Args: path, a directory (see ``resolve_model`` for Hub ids); dtype of the floating parameters; progress, called with
    tensors done and in all.
    Raises ConfigError for a configuration that is not V4's (V4.1 included), CheckpointError for a missing, unexpected,
    misshapen or truncated tensor or a corrupt index. Warns when a DSpark drafter is left out.
    """
    with Checkpoint(path) as checkpoint:
        config = checkpoint.config
        with torch.device("meta"):
            model = Transformer(config)
        model.load_state_dict(load_state(checkpoint, device=device, dtype=dtype, progress=progress), strict=True, assign=True)
    model.window_frequencies = inverse_frequencies(config, compressed=False).to(device)  # not in a checkpoint: computed
    model.compressed_frequencies = inverse_frequencies(config, compressed=True).to(device)
    return model.eval()
