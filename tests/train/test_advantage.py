"""The arithmetic of GRPO, against sums over every possible sample."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nautile.train.advantage import clipped_loss, group_advantages, off_policy, unbiased_kl

VOCAB = 7


def policies(seed):
    """Over a small vocabulary: current logits (with gradient), behaviour and reference log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, VOCAB, generator=generator, dtype=torch.float64)
    return logits[0].requires_grad_(True), logits[1].log_softmax(-1), logits[2].log_softmax(-1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=16))
def test_advantages_add_up_to_nothing_and_flat_groups_are_dropped(rewards):
    group = group_advantages(rewards)
    assert group.dropped == (len(set(rewards)) == 1)
    assert abs(sum(group.advantages)) < 1e-9
    for value, reward in zip(group.advantages, rewards, strict=False):
        assert value == reward - group.mean


def test_an_empty_group_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        group_advantages([])


@pytest.mark.parametrize("seed", range(6))
def test_the_kl_and_its_gradient_are_unbiased_off_policy(seed):
    """Over all tokens, weighted by the behaviour policy, the estimate is KL(current || reference) and so is its gradient."""
    logits, behaviour, reference = policies(seed)
    current = logits.log_softmax(-1)
    estimate = (behaviour.exp() * unbiased_kl(current, behaviour, reference)).sum()
    exact = (current.exp() * (current - reference)).sum()
    assert abs(estimate - exact) < 1e-12
    one = torch.autograd.grad(estimate, logits, retain_graph=True)[0]
    other = torch.autograd.grad(exact, logits)[0]
    assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_plain_estimate_would_be_biased(seed):
    """The same without the ratio: what is avoided is real."""
    logits, behaviour, reference = policies(seed)
    current = logits.log_softmax(-1)
    difference = reference - current
    biased = (behaviour.exp() * (difference.exp() - difference - 1)).sum()
    assert abs(biased - (current.exp() * (current - reference)).sum()) > 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_on_policy_the_gradient_is_the_policy_gradient(seed):
    logits, _, _ = policies(seed)
    current, advantage = logits.log_softmax(-1), torch.linspace(-1, 1, VOCAB, dtype=torch.float64)
    losses, clipped = clipped_loss(current, current.detach(), advantage, 0.2, 0.28)
    assert not clipped.any()
    got = torch.autograd.grad((current.detach().exp() * losses).sum(), logits, retain_graph=True)[0]
    wanted = torch.autograd.grad(-(current.exp() * advantage).sum(), logits)[0]
    assert torch.allclose(got, wanted, atol=1e-12)


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(-1, 1))
def test_a_clipped_token_has_no_gradient(new, old, advantage):
    current = torch.tensor([new], dtype=torch.float64, requires_grad=True)
    losses, clipped = clipped_loss(current, torch.tensor([old], dtype=torch.float64), advantage, 0.2, 0.28)
    losses.sum().backward()
    ratio = torch.tensor(new - old, dtype=torch.float64).exp()
    outside = (advantage > 0 and ratio > 1.28) or (advantage < 0 and ratio < 0.8)
    if outside:
        assert bool(clipped) and current.grad.item() == 0
    else:
        assert abs(losses.item() + ratio * advantage) < 1e-9


def test_only_bad_sequences_far_off_are_masked():
    near, far = torch.full((4,), -1.0), torch.full((4,), -3.0)
    assert off_policy(far, near, -0.5, 0.5)
    assert not off_policy(far, near, 0.5, 0.5)
    assert not off_policy(near, near, -0.5, 0.5)
