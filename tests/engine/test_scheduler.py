"""Continuous batching over a pool without a network: whatever arrives, is cancelled or preempted, every request gets the tokens
it would get alone, the budget holds, nothing waits for ever and every block comes back."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.fakes import EOS, FakePool, HashRunner, solo
from nautile.engine.core import Core, ModelLimits
from nautile.engine.request import Finished, Prefilled, Request, TokenSampled
from nautile.engine.sampling import SamplingParams
from nautile.engine.scheduler import Limits, Scheduler

EOS_SHARE = 0.03
BLOCK, SNAPSHOT = 4, 8


def make_core(blocks=40, slots=4, *, speculate=False, budget=16, longest=400, running=None):
    pool = FakePool(blocks, slots, BLOCK)
    limits = Limits(budget, running or slots, SNAPSHOT, reserve=6, patience=20, drafts=int(speculate))
    return Core(Scheduler(pool, limits), HashRunner(pool, EOS_SHARE), ModelLimits(EOS, longest), speculate)


class Collector:
    """The events of every request, by id."""

    def __init__(self) -> None:
        self.events = defaultdict(list)

    def sink(self, request):
        return self.events[request.id].append

    def tokens(self, request, choice=0):
        return [e.token for e in self.events[request.id] if isinstance(e, TokenSampled) and e.choice == choice]

    def chosen(self, request, choice=0):
        """Tokens with their log-probabilities."""
        events = [e for e in self.events[request.id] if isinstance(e, TokenSampled) and e.choice == choice]
        return [(e.token, e.logprob, e.top) for e in events]

    def ends(self, request):
        return [e for e in self.events[request.id] if isinstance(e, Finished)]


def run(core, collector, requests, *, limit=3000):
    for request in requests:
        core.submit(request, collector.sink(request))
    for _ in range(limit):
        if core.idle:
            break
        core.step()
        core.pool.check()
    assert core.idle, "something waits for ever"


def expected(request, choice=0):
    return [chosen.token for chosen in expected_chosen(request, choice)]


def expected_chosen(request, choice=0):
    return solo(request.prompt_ids, request.sampling, choice, EOS_SHARE)


PROMPTS = st.lists(st.integers(1, 3), min_size=1, max_size=30).map(tuple)  # few tokens: prefixes are often shared
SAMPLINGS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 5]),
    seed=st.integers(0, 5),
    max_tokens=st.integers(1, 25),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    logit_bias=st.sampled_from([{}, {}, {5: 3.0, 7: -2.0}]),
    logprobs=st.sampled_from([None, None, 0, 3]),
    n=st.sampled_from([1, 1, 1, 3]),
    ignore_eos=st.booleans(),
)
REQUESTS = st.builds(
    Request,
    prompt_ids=PROMPTS,
    sampling=SAMPLINGS,
    partition=st.sampled_from(["", "other"]),
    priority=st.sampled_from([0, 0, 0, 1, 2]),
)


@given(
    arrivals=st.lists(
        st.tuples(REQUESTS, st.integers(0, 6), st.sampled_from([None, None, None, 0, 3])), min_size=1, max_size=9
    ),
    blocks=st.sampled_from([14, 20, 60]),
    slots=st.integers(1, 5),
    speculate=st.booleans(),
)
@settings(max_examples=110)
def test_every_request_gets_the_tokens_it_would_get_alone(arrivals, blocks, slots, speculate):
    core, collector = make_core(blocks, slots, speculate=speculate), Collector()
    cancelled = {}
    for request, gap, cancel_after in arrivals:
        core.submit(request, collector.sink(request))
        for step in range(gap):
            core.step()
            core.pool.check()
            if step == cancel_after:
                core.cancel(request.id)
                cancelled[request.id] = True
    run(core, collector, [])
    for request, _, _ in arrivals:
        ends = collector.ends(request)
        assert sorted(end.choice for end in ends) == list(range(request.sampling.n))
        for end in ends:
            found, whole = collector.chosen(request, end.choice), expected_chosen(request, end.choice)
            tokens = [token for token, _, _ in found]
            assert end.usage.completion_tokens == len(tokens)
            if end.reason == "cancelled":
                assert request.id in cancelled and found == whole[: len(tokens)]
            else:
                assert found == whole
                stopped = tokens[-1] == EOS and not request.sampling.ignore_eos
                assert end.reason == ("stop" if stopped else "length")
    assert not core.pool.live and core.pool.free_slots == slots


@given(
    arrivals=st.lists(
        st.tuples(PROMPTS, st.integers(1, 6), st.sampled_from([1, 1, 3]), st.integers(0, 3)), min_size=1, max_size=9
    ),
    blocks=st.sampled_from([11, 14, 20]),
    slots=st.integers(1, 4),
    speculate=st.booleans(),
)
@settings(max_examples=40)
def test_what_was_admitted_has_its_memory(arrivals, blocks, slots, speculate):
    """While answers keep within the reserve, admission has counted everything: no running task ever lacks a block, and none is
    set back."""
    core, collector = make_core(blocks, slots, speculate=speculate), Collector()
    for prompt, tokens, n, gap in arrivals:
        request = Request(prompt, SamplingParams(max_tokens=tokens, n=n, ignore_eos=True))
        core.submit(request, collector.sink(request))
        for _ in range(gap):
            core.step()
    run(core, collector, [])
    assert core.pool.refusals == 0 and core.stats().preemptions == 0
    assert all(event.error is None for events in collector.events.values() for event in events if isinstance(event, Finished))


@given(st.lists(REQUESTS, min_size=2, max_size=10), st.booleans())
@settings(max_examples=60)
def test_steps_keep_to_the_budget_and_leave_no_decode_out(requests, speculate):
    core, collector = make_core(80, 5, speculate=speculate, budget=16), Collector()
    for request in requests:
        core.submit(request, collector.sink(request))
    for _ in range(3000):
        if core.idle:
            break
        before = [task for task in core.scheduler.running if task.pending == 1]
        parked = core.scheduler.preemptions
        core.step()
        plan = core.runner.plans[-1]
        assert plan.tokens <= 16
        assert len({id(piece.sequence) for piece in plan.pieces}) == len(plan.pieces)
        if core.scheduler.preemptions == parked:
            assert all(task.stepped == core.scheduler.step for task in before)
        for piece in plan.pieces:
            start = piece.sequence.length
            assert len(piece.ids) <= SNAPSHOT or start == 0
    assert core.idle, "something waits for ever"


def test_choices_begin_from_a_prompt_without_a_draft_of_the_first():
    """The last token of a prompt may be a step of its own, with a guess of what follows already there."""
    core, collector = make_core(60, 5, speculate=True), Collector()
    requests = [
        Request(tuple([1 + seed % 3, 1, 2, 3] * 8)[: SNAPSHOT * chunks + 1], SamplingParams(seed=seed, n=3, max_tokens=6))
        for seed in range(6)
        for chunks in (1, 2)
    ]
    for request in requests:
        run(core, collector, [request])
        assert [collector.tokens(request, choice) for choice in range(3)] == [expected(request, choice) for choice in range(3)]


def test_chunks_end_at_snapshot_boundaries():
    core, collector = make_core(budget=40), Collector()
    run(core, collector, [Request(tuple([1, 2, 3] * 11), SamplingParams(max_tokens=12, ignore_eos=True))])
    position = 0
    for plan in core.runner.plans:
        (piece,) = plan.pieces
        assert position // SNAPSHOT == (position + len(piece.ids) - 1) // SNAPSHOT
        position += len(piece.ids)


def test_a_short_prompt_is_not_held_up_by_a_long_one():
    core, collector = make_core(100, 2, budget=8), Collector()
    long, short = Request(tuple([1] * 200)), Request((2, 3, 1))
    core.submit(long, collector.sink(long))
    for _ in range(3):
        core.step()
    core.submit(short, collector.sink(short))
    for _ in range(3):
        core.step()
    assert collector.tokens(short)
    assert not collector.tokens(long)


def test_the_prompt_reports_its_progress_and_what_was_cached():
    core, collector = make_core(), Collector()
    first = Request(tuple([1, 2] * 12), SamplingParams(max_tokens=1))
    run(core, collector, [first])
    again = Request(first.prompt_ids, SamplingParams(max_tokens=1))
    run(core, collector, [again])
    done = [event.done for event in collector.events[first.id] if isinstance(event, Prefilled)]
    assert done == [8, 16, 24]
    (progress,) = [event for event in collector.events[again.id] if isinstance(event, Prefilled)]
    assert progress == Prefilled(24, 24, 20)
    assert collector.ends(again)[0].usage.cached_tokens == 20
    assert core.stats().cached_tokens == 20 and core.stats().prompt_tokens == 48
    other = Request(first.prompt_ids, SamplingParams(max_tokens=1), partition="other key")
    run(core, collector, [other])
    assert collector.ends(other)[0].usage.cached_tokens == 0


def test_a_higher_priority_takes_the_slot_and_loses_nothing_of_the_lower():
    core, collector = make_core(60, 1), Collector()
    params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    low, high = Request((1, 2, 3, 1, 2), params), Request((3, 2, 1), params, priority=1)
    core.submit(low, collector.sink(low))
    for _ in range(4):
        core.step()
    fed = sum(plan.tokens for plan in core.runner.plans)
    core.submit(high, collector.sink(high))
    run(core, collector, [])
    order = [request for request in (low, high) if collector.ends(request)]
    assert len(order) == 2 and core.stats().preemptions == 1
    assert collector.tokens(low) == expected(low) and collector.tokens(high) == expected(high)
    total = sum(plan.tokens for plan in core.runner.plans)
    assert fed and total == len(low.prompt_ids) + len(high.prompt_ids) + 2 * 19  # nothing was computed twice


def test_low_priority_is_not_starved_by_a_stream_of_high_priority():
    core, collector = make_core(60, 1), Collector()
    low = Request((1, 1), SamplingParams(max_tokens=3, ignore_eos=True))
    core.submit(low, collector.sink(low))
    for _ in range(200):
        high = Request((2, 3), SamplingParams(max_tokens=3, ignore_eos=True), priority=1)
        core.submit(high, collector.sink(high))
        core.step()
        core.step()
    assert collector.ends(low)


def test_partitions_share_the_slots():
    core, collector = make_core(200, 2), Collector()
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    flood = [Request((1, index % 3 + 1), params, partition="flood") for index in range(20)]
    for request in flood:
        core.submit(request, collector.sink(request))
    core.step()
    guest = Request((3, 3), params, partition="guest")
    core.submit(guest, collector.sink(guest))
    for _ in range(20):
        core.step()
    assert collector.ends(guest)
    assert sum(bool(collector.ends(request)) for request in flood) < 6


def test_a_sequence_that_outgrows_the_pool_ends_with_a_reason_and_the_rest_goes_on():
    core, collector = make_core(6, 2), Collector()
    endless = Request((1, 2), SamplingParams(max_tokens=300, ignore_eos=True))
    other = Request((3, 1), SamplingParams(max_tokens=4, ignore_eos=True))
    run(core, collector, [endless, other])
    (end,) = collector.ends(endless)
    assert end.reason == "length" and "pool_bytes" in (end.error or "")
    assert collector.tokens(endless) == expected(endless)[: end.usage.completion_tokens]
    assert end.usage.completion_tokens >= 6 * BLOCK - 3
    assert collector.tokens(other) == expected(other)


def test_a_runner_that_fails_ends_that_step_only():
    core, collector = make_core(), Collector()
    working = core.runner.step
    request, later = Request((1, 2, 3)), Request((1, 2, 3, 2))

    def fail(plan):
        raise RuntimeError("no luck")

    core.runner.step = fail
    run(core, collector, [request])
    (end,) = collector.ends(request)
    assert end.reason == "error" and "no luck" in end.error
    core.runner.step = working
    run(core, collector, [later])
    assert collector.tokens(later) == expected(later)


class Alternating:
    """A constraint: ids of alternating parity, starting odd."""

    def __init__(self, parity=1):
        self.parity = parity

    def mask(self):
        import torch  # noqa: PLC0415

        return torch.arange(24) % 2 == self.parity

    def accept(self, token):
        assert token % 2 == self.parity
        self.parity = 1 - self.parity

    def fork(self):
        return Alternating(self.parity)


@pytest.mark.parametrize("speculate", [False, True])
def test_constraints_hold_for_every_choice_speculated_or_not(speculate):
    core, collector = make_core(80, 4, speculate=speculate), Collector()
    params = SamplingParams(temperature=1.0, max_tokens=15, n=3, ignore_eos=True)
    request = Request((2, 1, 3), params, constraint=Alternating)
    run(core, collector, [request])
    texts = [collector.tokens(request, choice) for choice in range(3)]
    assert all([token % 2 for token in tokens] == [1 - index % 2 for index in range(15)] for tokens in texts)
    assert len({tuple(tokens) for tokens in texts}) == 3


def test_a_constraint_that_breaks_ends_its_own_request_only():
    class Broken(Alternating):
        def mask(self):
            raise ValueError("grammar has no way on")

    core, collector = make_core(), Collector()
    bad, good = Request((1, 2), constraint=Broken), Request((1, 3))
    run(core, collector, [bad, good])
    assert collector.ends(bad)[0].reason == "error" and "no way on" in collector.ends(bad)[0].error
    assert collector.tokens(good) == expected(good)


def test_drafts_are_counted_and_save_steps():
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    steps = {}
    for speculate in (False, True):
        core, collector = make_core(80, 1, speculate=speculate), Collector()
        request = Request((1, 2, 3), params)
        run(core, collector, [request])
        usage = collector.ends(request)[0].usage
        steps[speculate] = core.stats().steps
        assert collector.tokens(request) == expected(request)
    assert 0 < usage.accepted_tokens <= usage.drafted_tokens
    assert core.stats().accepted_tokens == usage.accepted_tokens
    assert steps[True] == steps[False] - usage.accepted_tokens


def test_limits_are_checked():
    for wrong in ({"running": 0}, {"reserve": 0}, {"token_budget": 16, "running": 16}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Limits(**wrong)
