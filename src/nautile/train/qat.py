"""Training on the values that the file will hold: every tensor as stored, gradients to the ones that are kept in float32.

The values are those of a checkpoint that was really written and read back: MXFP4 experts, FP8 linears, bfloat16 embeddings,
routers and norms. A rollout on such a copy runs on the real FP4 path, and what is exported at the end gives exactly what the
trained network gave (tests/train/test_qat.py).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from nautile.checkpoint import load_model, save_model
from nautile.model import Transformer

__all__ = ["as_stored", "on_grid"]


def as_stored(model: Transformer) -> Transformer:
    """The network that a checkpoint of this one gives back, on the same device. Raises CheckpointError."""
    with tempfile.TemporaryDirectory(prefix="nautile-stored-") as scratch:
        directory = Path(scratch, "model")
        save_model(model, directory)
        return load_model(directory, device=model.embed.weight.device, dtype=model.embed.weight.dtype)


@contextlib.contextmanager
def on_grid(model: Transformer, stored: Transformer | None = None) -> Iterator[None]:
    """Within this context every parameter has its stored value; gradients computed here are the kept ones' (straight through).

    Run forward and backward inside and the optimizer outside. ``stored`` is what ``as_stored`` gave for these weights, if it is
    there already.
    """
    source = dict((stored or as_stored(model)).named_parameters())
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])
