"""Kernels that start while the one before them ends (programmatic dependent launch, sm_90 and newer).

A chained kernel lets the next one start as soon as all its programs run, and waits for the one before to have ended before
it reads or writes anything but weights. Since every one of them waits so, a kernel that has ended implies that all before it
have. Weights may be read, or brought into the L2, before the wait.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["chain"]


def chain(x: Tensor, chained: bool) -> dict[str, bool]:
    """Options of a launch: chained to the one before it where that was asked for and the GPU can."""
    pdl = chained and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"PDL": pdl, "launch_pdl": pdl}
