"""Muon for matrices, AdamW for the rest, under one learning rate (tech report section 2.6).

Muon: M = mu M + G; O = HybridNS(mu M + G); W = W (1 - lr wd) - lr O sqrt(max(rows, columns)) gamma. With gamma = 0.18 the
root-mean-square of an update matches AdamW's, so one schedule serves both. Matrices of one shape (the experts of all layers,
say) go through Newton-Schulz as one batch: on small models the optimizer would otherwise be launch-bound.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Muon", "OptimizerConfig", "Optimizers", "newton_schulz", "split_parameters"]

# Eight steps that converge fast, then two that settle on singular values of one.
_COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2


@dataclass(frozen=True)
class OptimizerConfig:
    """V4's values; ``adam_scale`` multiplies the learning rate of everything Muon does not train."""

    momentum: float = 0.95
    weight_decay: float = 0.1
    gamma: float = 0.18
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-20
    adam_scale: float = 0.5


def newton_schulz(matrices: Tensor) -> Tensor:
    """Nearest (semi-)orthogonal matrix of each of [count, rows, columns], by HybridNS; bfloat16 on CUDA."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()  # bfloat16 products crawl on most CPUs
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.transpose(-1, -2)
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-20).to(x.dtype)
    for a, b, c in _COEFFICIENTS:
        gram = x @ x.transpose(-1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    result: Tensor = x.transpose(-1, -2) if tall else x
    return result


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(Muon's, AdamW's). AdamW takes the embedding, the head, compressor biases, and every vector; Muon all other matrices.

    Frozen parameters (``requires_grad`` False) are in neither: not even weight decay moves them.
    """
    muon: list[nn.Parameter] = []
    adam: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        vector_like = parameter.dim() < 2 or name.endswith("ape") or name in ("embed.weight", "head.weight")
        (adam if vector_like else muon).append(parameter)
    return muon, adam


class Muon(torch.optim.Optimizer):
    """Muon over 2-D parameters and stacks of matrices [count, rows, columns]."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, config: OptimizerConfig) -> None:
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            shapes.setdefault(tuple(parameter.shape[-2:]), []).append(parameter)
        super().__init__([{"params": group} for group in shapes.values()], {"lr": lr})
        self.settings = config

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply one update; gradients must be there for every parameter."""
        for group in self.param_groups:
            self._step_group(group["params"], group["lr"])

    def _step_group(self, parameters: list[nn.Parameter], lr: float) -> None:
        config = self.settings
        rows, columns = parameters[0].shape[-2:]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if len(gradients) != len(parameters):
            raise RuntimeError(f"Muon needs a gradient for every [{rows}, {columns}] matrix")
        momenta = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            momenta.append(state["momentum"])
        torch._foreach_mul_(momenta, config.momentum)
        torch._foreach_add_(momenta, gradients)
        ahead = torch._foreach_add(gradients, momenta, alpha=config.momentum)
        stacked = torch.cat([update.reshape(-1, rows, columns) for update in ahead])
        orthogonal = newton_schulz(stacked).to(stacked.dtype) * (max(rows, columns) ** 0.5 * config.gamma)
        sizes = [parameter.numel() // (rows * columns) for parameter in parameters]
        updates = [part.view(p.shape) for part, p in zip(orthogonal.split(sizes), parameters, strict=True)]
        tensors: list[Tensor] = list(parameters)
        torch._foreach_mul_(tensors, 1 - lr * config.weight_decay)
        torch._foreach_add_(tensors, updates, alpha=-lr)


class Optimizers:
    """The pair as one object with one learning rate."""

    def __init__(self, model: nn.Module, config: OptimizerConfig | None = None) -> None:
        self.config = config or OptimizerConfig()
        muon, adam = split_parameters(model)
        self.muon = Muon(muon, 0.0, self.config)
        vectors = [parameter for parameter in adam if parameter.dim() < 2]  # norms, sinks, gates: decay would only bias them
        tables = [parameter for parameter in adam if parameter.dim() >= 2]
        self.adam = torch.optim.AdamW(
            [{"params": tables, "weight_decay": self.config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=0.0,
            betas=(self.config.beta1, self.config.beta2),
            eps=self.config.adam_eps,
            fused=bool(adam) and adam[0].is_cuda,
        )

    def step(self, lr: float) -> None:
        """Update every parameter at this learning rate and clear the gradients."""
        for group in self.muon.param_groups:
            group["lr"] = lr
        for group in self.adam.param_groups:
            group["lr"] = lr * self.config.adam_scale
        self.muon.step()
        self.adam.step()
        self.muon.zero_grad(set_to_none=True)
        self.adam.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """State of both, for a checkpoint."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
