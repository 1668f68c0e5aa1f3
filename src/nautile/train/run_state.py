"""One file that holds all a run needs to go on: it appears whole or not at all, and says when it is of another run."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["RunError", "clip_gradients", "read_state", "weights_digest", "write_state"]


class RunError(RuntimeError):
    """A run cannot start or go on; the text says why and what to do."""


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Replace ``path`` by ``state``. Raises RunError when the disk is full or read-only; the old file is untouched then."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # PyTorch's writer wraps what the system said
        temporary.unlink(missing_ok=True)
        why = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise RunError(f"no checkpoint could be written to {path.parent} ({why}): the last one is untouched") from None


def read_state(path: Path, model: dict[str, Any], options: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """The state at ``path``; None when there is none. ``model`` and ``options`` must be what it was written with.

    Raises RunError when they are not, or when the file is damaged.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        found, made_with = state["config"], state.get("options", {})
    except Exception as error:  # whatever is wrong with a file that was cut or changed
        raise RunError(f"{path} is damaged ({type(error).__name__}): remove it to start anew, or put a copy back") from None
    if found != model:
        raise RunError(f"{path} belongs to another configuration of a model: choose another --out directory")
    changed = [key for key, value in options.items() if key in made_with and made_with[key] != value]
    if changed:
        raise RunError(f"{path} was made with another {changed[0]}: use the options of that run, or another --out")
    return state


def weights_digest(model: nn.Module) -> str:
    """A name for exactly these weights."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:32]


def clip_gradients(model: nn.Module, limit: float, step: int) -> float:
    """Scale the gradients so that their norm over all parameters is at most ``limit`` -> the norm before.

    A parameter that nothing reached gets zeros, since the optimisers want all. Raises RunError in ``step`` when the norm is no
    number; no parameter has been changed then.
    """
    parameters = list(model.parameters())
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    if not torch.isfinite(norm):
        raise RunError(f"the gradient is not a number in step {step}; the last checkpoint is untouched")
    return float(norm)
