"""Which model a state belongs to, as a short text: the state of one model means nothing to another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from nautile.config import ModelConfig

__all__ = ["fingerprint"]

_WHOLE = 1 << 20  # bytes of a tensor that are hashed entirely; of larger ones as many, evenly spread
_RUNS = 64


def fingerprint(config: ModelConfig, tensors: Mapping[str, Tensor]) -> str:
    """32 hexadecimal digits over the configuration and the weights (``model.state_dict()``).

    Names, shapes, types and all bytes of tensors up to 1 MiB; of larger tensors 64 runs of 16 KiB spread evenly, so that a
    model of any size takes well under a minute. Training changes nearly every element, so different weights differ there.
    """
    shape = {key: value for key, value in config.to_json().items() if key != "dialect"}
    digest = hashlib.blake2b(json.dumps(shape, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.contiguous().flatten().view(torch.uint8)
        if flat.numel() <= _WHOLE:
            runs = [flat]
        else:
            size = _WHOLE // _RUNS
            runs = [flat[int(run * (flat.numel() - size) / (_RUNS - 1)) :][:size] for run in range(_RUNS)]
        for run in runs:
            digest.update(run.cpu().numpy().tobytes())
    return digest.hexdigest()
