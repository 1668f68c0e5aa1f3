"""Exact top-k with a defined answer: ties go to the lowest index.

ReLU gives the lightning indexer many scores of exactly zero, so "the k largest" is not one set until ties are ordered;
``torch.topk`` leaves that order to the device. Every path of Nautile selects through this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["topk_indices", "topk_mask"]


def topk_indices(scores: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the k largest of scores [..., n], in descending order of score, ties to the lowest index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """Boolean [..., n]: True at the k largest scores, ties to the lowest index. Entries of -inf are never selected."""
    if k >= scores.shape[-1]:
        return scores > -torch.inf
    threshold = scores.topk(k, dim=-1).values[..., -1:]  # which of the tied ones topk takes does not change the value
    above = scores > threshold
    tied = (scores == threshold) & (scores > -torch.inf)
    room = k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))
