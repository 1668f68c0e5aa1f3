"""One answer: full, chunked, decoded, batched, cached, preempted, rewound, forked, resumed and speculated give the same tokens.

The oracle is the network without a state: one full pass over prompt and output, and the sampling rule at every position. Each
way to an output is held to it token for token, greedy and seeded, at lengths around every multiple of 4, 128 and the block.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nautile
from nautile import load_model
from nautile.engine import Engine, EngineConfig, Finished, Request, SamplingParams, TokenSampled
from nautile.engine.plan import Piece, Plan
from nautile.engine.runners import make_runner
from nautile.engine.sampling import choose
from nautile.engine.sessions import EngineSessions, Live
from nautile.state import StatePool
from oracles.random_models import random_ids, tiny_network

BLOCK = 256
RUNNERS = ("native", "numpy", "torch")
GREEDY = SamplingParams(max_tokens=10, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, top_p=0.9, seed=11, max_tokens=10, ignore_eos=True)
BASE = EngineConfig(pool_bytes=24 << 20, block_tokens=BLOCK, snapshot_every=BLOCK, max_running=8, token_budget=512)
FEW = (1, 4, 129, 255, 256, 257, 513)  # for the runners whose steps take long; all lengths with -m slow
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 126, 127, 128, 129, 130, 254, 255, 256, 257, 258, 383, 384, 385, 510, 511, 512, 513, 514)


def network():
    return tiny_network((0, 4, 128, 4), seed=3)


def prompts(model):
    """By length: the ends of one text."""
    whole = tuple(random_ids(model.config, max(LENGTHS), seed=1).tolist())
    return {length: whole[-length:] for length in LENGTHS}


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def answers(model):
    """By kind of sampling and prompt: one prompt at a time, nothing cached. Held to the oracle by the first test."""
    engine = Engine(model, replace(BASE, runner="native", max_running=1, prefix_cache=False))
    found = {
        name: {prompt: engine.generate([prompt], by_name(name))[0].ids for prompt in prompts(model).values()}
        for name in ("greedy", "seeded")
    }
    engine.close()
    return found


def by_name(name):
    return {"greedy": GREEDY, "seeded": SEEDED}[name]


def check(engine, answers, name, lengths):
    """The engine gives the answers, all prompts at once."""
    prompts = [prompt for prompt in answers[name] if len(prompt) in lengths]
    found = engine.generate(prompts, by_name(name))
    assert [completion.ids for completion in found] == [answers[name][prompt] for prompt in prompts]
    pool = engine.with_pool(lambda pool: pool.stats())
    assert pool.missed_snapshots == 0 and pool.sequences == 0
    return found


def runners(*names):
    """(options, lengths) of each runner: the slower ones with few lengths, and with all of them among the slow tests."""
    cases = []
    for name in names:
        cases.append(pytest.param((replace(BASE, runner=name), LENGTHS if name == "native" else FEW), id=name))
        if name != "native":
            case = (replace(BASE, runner=name), LENGTHS)
            cases.append(pytest.param(case, id=f"{name}-all", marks=pytest.mark.slow))
    return pytest.mark.parametrize("case", cases)


@torch.inference_mode()
def test_the_answers_are_those_of_full_passes(model, answers):
    for name, found in answers.items():
        for prompt, answer in found.items():
            ids = torch.tensor([[*prompt, *answer]])
            logits = model(ids)[0]
            for position in range(len(prompt), ids.shape[1]):
                assert choose(logits[position - 1], by_name(name), position).token == ids[0, position]


@runners(*RUNNERS)
@pytest.mark.parametrize("name", ["greedy", "seeded"])
def test_batched_and_chunked_anyhow(model, answers, case, name):
    config, lengths = case
    for budget in (37, 512):
        engine = Engine(model, replace(config, token_budget=budget))
        check(engine, answers, name, lengths)
        engine.close()


@runners(*RUNNERS)
def test_continued_from_the_cache(model, answers, case):
    config, lengths = case
    engine, fresh = Engine(model, config), Engine(model, replace(config, prefix_cache=False))
    check(engine, answers, "greedy", lengths)
    conversations = [[*p, *answer, 3, 1, 4] for p, answer in answers["greedy"].items() if len(p) in lengths]
    cached, computed = (each.generate(conversations, SEEDED) for each in (engine, fresh))
    assert [c.ids for c in cached] == [c.ids for c in computed]
    assert all(c.reused_tokens >= c.prompt_tokens - 4 for c in cached) and not any(c.reused_tokens for c in computed)
    again = check(engine, answers, "greedy", lengths)
    assert all(c.reused_tokens >= (c.prompt_tokens - 1) // BLOCK * BLOCK for c in again)
    engine.close()
    fresh.close()


def each_at_the_first_token_of_the_last(engine, group):
    """Events of requests of rising priority. Each comes in while the step that gave the last one's first token still runs:
    from another thread that would be a race with the engine, which may be done by then."""
    queues, begun = [SimpleQueue() for _ in group], set()

    def begin(number):
        begun.add(number)

        def take(event):
            if isinstance(event, TokenSampled) and number + 1 < len(group) and number + 1 not in begun:
                begin(number + 1)
            queues[number].put(event)

        request = Request(group[number], SEEDED, priority=number)
        engine._running()._tell(lambda: engine._core.submit(request, take))

    begin(0)
    return [[*itertools.takewhile(lambda event: not isinstance(event, Finished), iter(one.get, None))] for one in queues]


@runners(*RUNNERS)
def test_preempted_for_somebody_else(model, answers, case):
    """One slot; while a request runs, two more of rising priority take the slot from it."""
    config, lengths = case
    engine = Engine(model, replace(config, max_running=1))
    prompts, before = [prompt for prompt in answers["seeded"] if len(prompt) in lengths], 0
    for group in zip(prompts[::3], prompts[1::3], prompts[2::3], strict=False):
        for ids, events in zip(group, each_at_the_first_token_of_the_last(engine, group), strict=True):
            assert [event.token for event in events if isinstance(event, TokenSampled)] == answers["seeded"][ids]
        assert engine.stats().preemptions >= (before := before + len(group) - 1)
    engine.close()


@runners(*RUNNERS)
@torch.inference_mode()
def test_several_choices_share_the_prompt(model, answers, case):
    config, lengths = case
    prompts = [prompt for prompt in answers["seeded"] if len(prompt) in lengths]
    engine = Engine(model, config)
    shared = engine.generate(prompts, replace(SEEDED, n=3))
    for index, prompt in enumerate(prompts):
        choices = [choice.ids for choice in shared[3 * index : 3 * index + 3]]
        assert choices[0] == answers["seeded"][prompt]
        logits = model(torch.tensor([[*prompt, *ids] for ids in choices]))
        for number, ids in enumerate(choices):
            for position, token in enumerate(ids, start=len(prompt)):
                assert choose(logits[number, position - 1], SEEDED, position, choice=number).token == token
    assert engine.stats().prompt_tokens == sum(map(len, prompts))
    engine.close()


@runners("native", "torch")
@pytest.mark.parametrize("name", ["greedy", "seeded"])
def test_speculated(model, answers, case, name):
    config, lengths = case
    engine = Engine(model, replace(config, speculate=True))
    check(engine, answers, name, lengths)
    again = check(engine, answers, name, lengths)  # drafts and hits go together
    assert all(c.reused_tokens >= (c.prompt_tokens - 1) // BLOCK * BLOCK for c in again)
    assert engine.stats().drafted_tokens > 50
    engine.close()


@runners("native", "torch")
@pytest.mark.parametrize("name", ["greedy", "seeded"])
def test_speculated_with_drafts_that_are_often_right(model, answers, case, name, monkeypatch):
    """A random MTP block guesses wrongly; here two of three guesses are the answer itself, so that both outcomes are met."""
    config, lengths = case
    engine = Engine(model, replace(config, speculate=True, token_budget=100))
    draft = engine.runner.draft

    def knowing(plan, following):
        guesses = draft(plan, following)
        for index, (piece, after) in enumerate(zip(plan.pieces, following, strict=True)):
            so_far = [*piece.sequence.ids, *piece.ids[: len(after)], *after[-1:]]
            for prompt, answer in answers[name].items():
                whole = [*prompt, *answer]
                if len(prompt) <= len(so_far) < len(whole) and whole[: len(so_far)] == so_far and len(so_far) % 3:
                    guesses[index] = whole[len(so_far)]
        return guesses

    monkeypatch.setattr(engine.runner, "draft", knowing)
    check(engine, answers, name, lengths)
    stats = engine.stats()
    assert 0.3 < stats.accepted_tokens / stats.drafted_tokens < 0.9
    engine.close()


@runners("native")
def test_served_from_host_memory_and_from_disk(model, answers, case, tmp_path):
    config, lengths = case
    tiers = replace(config, max_running=2, pool_bytes=1_000_000, host_bytes=1 << 20, cache_dir=tmp_path)
    engine, fresh = Engine(model, tiers), Engine(model, replace(config, prefix_cache=False))
    check(engine, answers, "greedy", lengths)
    first, second = ([[*p, *ids, token] for p, ids in answers["greedy"].items() if len(p) in lengths] for token in (7, 8))
    expected = [[c.ids for c in fresh.generate(prompts, SEEDED)] for prompts in (first, second)]
    assert [c.ids for c in engine.generate(first, SEEDED)] == expected[0]
    stats = engine.with_pool(lambda pool: pool.stats())
    assert stats.demotions and stats.promotions
    engine.close()
    restarted = Engine(model, tiers)
    again = restarted.generate(second, SEEDED)
    assert [c.ids for c in again] == expected[1]
    assert sum(c.reused_tokens > 0 for c in again) > len(again) // 2
    restarted.close()
    fresh.close()


_SAVES = """
import itertools, sys
sys.path.insert(0, {tests!r})
from engine.test_one_answer import *
model = network()
engine = Engine(model, replace(BASE, runner="native", cache_dir=Path(sys.argv[1]) / "cache"))
sessions = EngineSessions(engine, Path(sys.argv[1]) / "sessions")
beside = engine.submit_sync(Request((1, 2), replace(SEEDED, max_tokens=4000)))
for length in itertools.cycle(map(int, sys.argv[2:])):
    sessions.save(f"at{{length}}", prompts(model)[length])
    print(length, flush=True)
"""


@pytest.mark.parametrize("lengths", [FEW, pytest.param(LENGTHS, marks=pytest.mark.slow)], ids=["few", "all"])
def test_resumed_after_the_process_was_killed(model, answers, tmp_path, lengths):
    """Sessions of every length, saved under load by a process that dies of SIGKILL while it saves; each goes on as it would
    have: from its logits at once, and as an ordinary request beside others."""
    code = _SAVES.format(tests=str(Path(__file__).parents[1]))
    command = [sys.executable, "-c", code, str(tmp_path), *map(str, lengths)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    acknowledged = [int(child.stdout.readline()) for _ in range(len(lengths) + 2)]
    child.kill()
    child.wait()
    child.stdout.close()
    assert set(acknowledged) == set(lengths)
    engine = Engine(model, replace(BASE, runner="native", cache_dir=tmp_path / "cache"))
    sessions = EngineSessions(engine, tmp_path / "sessions")
    store = sessions.store("")
    assert all(info.problem is None for info in store.list()) and not list(tmp_path.rglob("*.bad"))
    for length, prompt in prompts(model).items():
        if length not in lengths:
            continue
        for params, expected in ((GREEDY, answers["greedy"]), (SEEDED, answers["seeded"])):
            live = Live.resume(engine, store.resume(f"at{length}", engine.pool))
            tokens = [token for token, _ in zip(live.generate(params), expected[prompt], strict=False)]
            assert live.recomputed == 0 and tokens == expected[prompt][: len(tokens)] and len(tokens) > 2
            engine.pool.release(live.sequence)
    loaded = [sessions.load(f"at{length}")[1] for length in lengths]
    assert loaded == [prompts(model)[length] for length in lengths]
    check(engine, answers, "greedy", lengths)
    assert all(c.reused_tokens >= (c.prompt_tokens - 1) // BLOCK * BLOCK for c in check(engine, answers, "seeded", lengths))
    engine.close()


@pytest.mark.parametrize("name", RUNNERS)
def test_rewound_and_forked_at_any_token(model, name):
    """A timeline of 600 tokens, rewound and forked here and there; what is computed again gives the logits it gave before."""
    options = replace(BASE, runner=name)
    pool = StatePool(model.config, options.pool(model.config))
    runner, _ = make_runner(model, pool, options)
    ids = random_ids(model.config, 600, seed=5).tolist()

    def feed(sequence, until):
        logits = []
        while sequence.length < until:
            count = min(until, (sequence.length // BLOCK + 1) * BLOCK) - sequence.length
            piece = Piece(sequence, tuple(ids[sequence.length : sequence.length + count]), "all")
            pool.ensure(sequence, count)
            logits.append(runner.step(Plan((piece,))))
            pool.append(sequence, piece.ids)
        return torch.cat(logits)

    sequence = pool.open(ids)
    whole = feed(sequence, 600)
    for target in (599, 513, 512, 511, 400, 257, 256, 255, 130, 128, 5):
        fork = pool.fork(sequence)
        reached = pool.rewind(fork, target)
        assert reached <= target and target - reached < BLOCK
        again = feed(fork, 600)
        torch.testing.assert_close(again, whole[reached:], atol=1e-5, rtol=0)
        if name == "native":
            assert torch.equal(again, whole[reached:])
        pool.release(fork)
        pool.check()
    pool.release(sequence)


def test_the_shipped_model_at_every_residue():
    """Long prompts of each length mod 4: the native engine in chunks, batched and from the cache against full passes."""
    model = load_model(Path(nautile.__file__).parent / "weights" / "nano")
    whole = random_ids(model.config, 1027, seed=3).tolist()
    prompts = [whole[:length] for length in (1024, 1025, 1026, 1027)]
    engine = Engine(model, replace(BASE, runner="native", token_budget=300))
    for _ in range(2):
        found = engine.generate(prompts, GREEDY)
    assert all(c.reused_tokens >= 768 for c in found)
    with torch.inference_mode():
        for prompt, completion in zip(prompts, found, strict=True):
            logits = model(torch.tensor([prompt + completion.ids[:-1]]))[0, len(prompt) - 1 :]
            assert logits.argmax(-1).tolist() == completion.ids
    engine.close()


def test_native_drafts_are_those_of_the_modules(model):
    """Both draft from the same streams: prompts longer and shorter than the MTP block's window, then decodes."""
    prompts = [random_ids(model.config, length, seed=length).tolist() for length in (3, 15, 16, 17, 40, 300)]
    guesses = {}
    for name in ("native", "torch"):
        engine, seen = Engine(model, replace(BASE, runner=name, speculate=True)), []
        draft = engine.runner.draft

        def noting(plan, following, draft=draft, seen=seen):
            found = draft(plan, following)
            seen += [(tuple(piece.sequence.ids), piece.ids, guess) for piece, guess in zip(plan.pieces, found, strict=True)]
            return found

        engine.runner.draft = noting
        engine.generate(prompts, GREEDY)
        engine.close()
        guesses[name] = sorted(seen)
    assert guesses["native"] == guesses["torch"] and len(guesses["native"]) > 40


WORDS = st.lists(st.integers(2, 5), min_size=1, max_size=4).map(tuple)
ARRIVALS = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 100, 130, 260]),  # tokens of a shared beginning
        WORDS,  # and of its own end
        st.integers(0, 2),  # priority
        st.integers(1, 14),  # new tokens
        st.sampled_from([1, 1, 2]),  # choices
        st.integers(0, 5),  # events read before the next arrives
        st.booleans(),  # given up by then
    ),
    min_size=2,
    max_size=8,
)


@pytest.fixture(scope="module")
def crowded(model, tmp_path_factory):
    """A pool of few blocks and slots with drafts and all tiers, kept between examples so that what they leave behind is met
    again."""
    sizes = replace(BASE, max_running=3, pool_bytes=1_900_000, token_budget=60, snapshot_bytes=200_000, host_bytes=200_000)
    engine = Engine(model, replace(sizes, runner="native", speculate=True, cache_dir=tmp_path_factory.mktemp("cache")))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def alone(model):
    engine = Engine(model, replace(BASE, runner="native", max_running=1, prefix_cache=False))
    yield engine
    engine.close()


@given(ARRIVALS)
@settings(max_examples=25)
def test_in_any_order_of_arrival(model, crowded, alone, arrivals):
    shared = random_ids(model.config, 260, seed=9).tolist()
    jobs = []
    for common, words, priority, tokens, n, reads, given_up in arrivals:
        ids = (*shared[:common], *words)
        params = SamplingParams(temperature=0.8, seed=common + tokens, max_tokens=tokens, n=n, ignore_eos=True)
        stream = crowded.submit_sync(Request(ids, params, priority=priority))
        events = list(itertools.islice(stream, reads))
        if given_up:
            stream.close()
        jobs.append((ids, params, stream, events, given_up))
    for ids, params, stream, events, given_up in jobs:
        events += list(stream)
        expected = [completion.ids for completion in alone.generate([ids], params)]
        for choice in range(params.n):
            tokens = [e.token for e in events if isinstance(e, TokenSampled) and e.choice == choice]
            assert tokens == (expected[choice][: len(tokens)] if given_up else expected[choice])
        if not given_up:
            assert sum(isinstance(event, Finished) for event in events) == params.n
    crowded.with_pool(lambda pool: pool.check())
