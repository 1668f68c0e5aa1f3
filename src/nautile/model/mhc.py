"""Manifold-constrained hyper-connections: four residual streams, mixed per token by a nearly doubly stochastic matrix.

Around each sublayer F (tech report section 2.2): with X [n, d] the streams of one token,
    x = sum_j pre_j X_j        y = F(norm(x))        X'_k = post_k y + sum_j M_jk X_j
where pre, post and M come from one small linear map of the token's own streams (``hc_*_fn``), and M from Sinkhorn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nautile.config import ModelConfig
from nautile.kernels.sinkhorn import sinkhorn

__all__ = ["collapse", "distribute", "head_collapse", "mixing"]


def _projection(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    """z = (F v) / rms(v) with v = vec(X), stream-major. [..., n, d] -> [..., rows of F], at least float32."""
    v = streams.flatten(-2)
    return _wide(F.linear(v, fn)) * torch.rsqrt(_wide(v).square().mean(-1, keepdim=True) + eps)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def mixing(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The three mappings of one site from streams [..., n, d]: pre [..., n], post [..., n], M [..., n, n] (M[j, k]: j to k).

    pre = sigmoid(s0 z + b) + eps; post = 2 sigmoid(s1 z + b); M = Sinkhorn(s2 z + b). ``fn`` is [(2 + n) n, n d].
    """
    n = config.hc_mult
    z = _projection(streams, fn, config.rms_norm_eps)
    pre = torch.sigmoid(scale[0] * z[..., :n] + base[:n]) + config.hc_eps
    post = 2 * torch.sigmoid(scale[1] * z[..., n : 2 * n] + base[n : 2 * n])
    logits = (scale[2] * z[..., 2 * n :] + base[2 * n :]).unflatten(-1, (n, n))
    return pre, post, sinkhorn(logits, config.hc_sinkhorn_iters, config.hc_eps)


def collapse(streams: Tensor, pre: Tensor) -> Tensor:
    """x = sum_j pre_j X_j: [..., n, d] and [..., n] -> [..., d]."""
    if streams.is_cuda:  # a compiler fuses the broadcast form; a batch of 1 x 4 products would be one launch per token
        return (pre.unsqueeze(-1) * streams).sum(-2).to(streams.dtype)
    return torch.matmul(pre.unsqueeze(-2), streams.to(pre.dtype)).squeeze(-2).to(streams.dtype)


def distribute(streams: Tensor, y: Tensor, post: Tensor, matrix: Tensor) -> Tensor:
    """X'_k = post_k y + sum_j M_jk X_j: streams [..., n, d], y [..., d] -> [..., n, d]."""
    if streams.is_cuda:
        mixed = (matrix.unsqueeze(-1) * streams.unsqueeze(-2)).sum(-3)
    elif y.numel() == y.shape[-1] and streams.dtype == matrix.dtype:  # one token: two small products, no broadcasting
        n = streams.shape[-2]
        added = torch.outer(post.reshape(n), y.reshape(-1))
        return torch.addmm(added, matrix.reshape(n, n).t(), streams.reshape(n, -1)).view(streams.shape)
    else:
        mixed = torch.matmul(matrix.transpose(-1, -2), streams.to(matrix.dtype))
    return (post.unsqueeze(-1) * y.unsqueeze(-2) + mixed).to(streams.dtype)


def head_collapse(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: ModelConfig) -> Tensor:
    """h = sum_j (sigmoid(scale z_j + base_j) + eps) X_j, no Sinkhorn: [..., n, d] -> [..., d]."""
    z = _projection(streams, fn, config.rms_norm_eps)
    return collapse(streams, torch.sigmoid(scale * z + base) + config.hc_eps)
