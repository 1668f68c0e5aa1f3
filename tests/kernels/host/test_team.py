"""Experts on the host's cores against the formula in float64."""

import pytest
import torch

from nautile.kernels.fp4_experts import FP4Experts, fp4_experts_reference
from nautile.kernels.host import ExpertJob, ExpertStream, HostTeam


def experts(count, hidden, inner):
    """Random packed experts, as six tensors and as one run of bytes each."""

    def codes(*shape):
        return torch.randint(0, 256, shape, dtype=torch.uint8)

    def scales(*shape):
        return torch.randint(116, 122, shape, dtype=torch.uint8)

    up = [(codes(count, inner, hidden // 2), scales(count, inner, hidden // 32)) for _ in range(2)]
    parts = (*up[0], *up[1], codes(count, hidden, inner // 2), scales(count, hidden, inner // 32))
    return FP4Experts(*parts, 10.0), [torch.cat([part[e].flatten() for part in parts]) for e in range(count)]


@pytest.mark.parametrize(("hidden", "inner"), [(32, 32), (544, 96), (1024, 512), (96, 1056)])
@pytest.mark.parametrize("threads", [1, 3])
def test_it_is_the_formula(hidden, inner, threads):
    packed, blobs = experts(5, hidden, inner)
    chosen = torch.tensor([[0, 3, 1], [3, 4, 2]])
    weights = torch.rand(2, 3)
    x = torch.randn(2, hidden).bfloat16()
    pairs = sorted((int(chosen[t, k]), t, float(weights[t, k])) for t in range(2) for k in range(3))
    team = HostTeam(threads, hidden, inner, 10.0, tokens=2)
    expected = fp4_experts_reference(x, chosen, weights, packed)
    outs = []
    for _ in range(3):
        out = torch.full((2, hidden), float("nan"))
        team.start([ExpertJob(blobs[e].data_ptr(), t, w) for e, t, w in pairs], x, out)
        team.wait()
        outs.append(out)
    team.close()
    assert (outs[0] - expected).norm() / expected.norm() < 4e-3  # the hidden vector is rounded to bfloat16
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_threads_do_not_change_the_result():
    _, blobs = experts(2, 256, 128)
    x, outs = torch.randn(1, 256).bfloat16(), []
    for threads in (1, 4):
        team, out = HostTeam(threads, 256, 128, 10.0), torch.empty(1, 256)
        team.start([ExpertJob(blobs[0].data_ptr(), 0, 0.5), ExpertJob(blobs[1].data_ptr(), 0, 0.7)], x, out)
        team.wait()
        outs.append(out)
    assert torch.equal(*outs)


def test_nothing_chosen_gives_zeros():
    team, out = HostTeam(2, 64, 32, 10.0), torch.full((1, 64), float("nan"))
    team.start([], torch.zeros(1, 64).bfloat16(), out)
    team.wait()
    assert not out.any()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="multiples of 32"):
        HostTeam(1, 48, 32, 10.0)
    team = HostTeam(1, 64, 32, 10.0)
    with pytest.raises(ValueError, match="this team takes"):
        team.start([], torch.zeros(2, 64).bfloat16(), torch.zeros(2, 64))
    with pytest.raises(ValueError, match="bfloat16"):
        team.start([], torch.zeros(1, 64), torch.zeros(1, 64))


def test_experts_are_copied_into_their_slots():
    sizes = (64, 4, 64, 4, 32, 2)
    arenas = [torch.zeros(6, size, dtype=torch.uint8) for size in sizes]
    blobs = torch.randint(0, 256, (3, sum(sizes)), dtype=torch.uint8)
    ExpertStream(arenas).copy([blobs[2].data_ptr(), blobs[0].data_ptr()], 3)
    for slot, row in ((3, 2), (4, 0)):
        assert torch.equal(torch.cat([arena[slot] for arena in arenas]), blobs[row])
    assert not any(arena[[0, 1, 2, 5]].any() for arena in arenas)
