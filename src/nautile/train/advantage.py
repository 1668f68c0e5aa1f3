"""The arithmetic of GRPO: advantages of a group, the clipped loss, an unbiased KL, and which sequences count.

Everything here is a function of log-probabilities of the sampled tokens under three policies: the one that is trained
(``current``), the one that sampled (``behaviour``), and the one to stay near (``reference``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GroupAdvantages", "clipped_loss", "group_advantages", "off_policy", "unbiased_kl"]


@dataclass(frozen=True)
class GroupAdvantages:
    """Of one group. ``advantages`` is empty when every reward is the same: nothing can be learnt from such a group."""

    advantages: tuple[float, ...]
    mean: float

    @property
    def dropped(self) -> bool:
        """Whether the group has no variance."""
        return not self.advantages


def group_advantages(rewards: Sequence[float]) -> GroupAdvantages:
    """A_i = r_i - mean(r): not divided by the deviation, which would weigh easy and hard tasks more than others.

    Raises ValueError for an empty group.
    """
    if not rewards:
        raise ValueError("a group needs at least one sample")
    mean = sum(rewards) / len(rewards)
    if max(rewards) == min(rewards):
        return GroupAdvantages((), mean)
    return GroupAdvantages(tuple(reward - mean for reward in rewards), mean)


def clipped_loss(
    current: Tensor, behaviour: Tensor, advantage: Tensor | float, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) of each token with rho = exp(current - behaviour); and where it was clipped.

    current, behaviour [n]; advantage a number or [n]. Gradients pass through ``current`` only.
    """
    ratio = (current - behaviour.detach()).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    plain, held = ratio * advantage, clipped * advantage
    return -torch.minimum(plain, held), (held < plain).detach()


def unbiased_kl(current: Tensor, behaviour: Tensor, reference: Tensor) -> Tensor:
    """rho (e^d - d - 1) with d = reference - current and rho = exp(current - behaviour), [n]: its mean over samples of the
    behaviour policy is KL(current || reference), and so is its gradient; without rho both are biased off policy (V3.2)."""
    ratio = (current - behaviour.detach()).exp()
    difference = reference.detach() - current
    return ratio * (difference.exp() - difference - 1)


def off_policy(current: Tensor, behaviour: Tensor, advantage: float, limit: float) -> bool:
    """Whether a sequence must not count: a bad one (A < 0) that the current policy has already moved away from, by more than
    ``limit`` nats a token (mean of behaviour - current)."""
    return advantage < 0 and float((behaviour - current.detach()).mean()) > limit
