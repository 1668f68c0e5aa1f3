"""The engine on a network: sync and async use, reuse, limits, threads. Token-for-token equality is in test_one_answer.py."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from dataclasses import replace

import pytest

from nautile.engine import (
    Engine,
    EngineConfig,
    EngineError,
    Finished,
    Prefilled,
    Request,
    RequestError,
    SamplingParams,
    TokenSampled,
)
from oracles.random_models import random_ids, tiny_network
from waiting import soon

HOT = SamplingParams(temperature=1.0, top_p=0.95, seed=7, max_tokens=24)
SMALL = EngineConfig(pool_bytes=4 << 20, block_tokens=128, snapshot_every=128, max_running=4, token_budget=64)


@pytest.fixture(scope="module")
def model():
    return tiny_network((0, 4, 128), seed=3)


@pytest.fixture
def engine(model):
    engine = Engine(model, SMALL)
    yield engine
    engine.with_pool(lambda pool: pool.check())
    engine.close()


class Steps:
    """Lets an engine end as many steps as a test allows: however slow the test is, the engine is no further."""

    def __init__(self, engine, allowed):
        self.step, self.allowed = engine.runner.step, threading.Semaphore(allowed)
        engine.runner.step = self

    def __call__(self, plan):
        assert self.allowed.acquire(timeout=60)
        return self.step(plan)

    def allow_all(self):
        self.allowed.release(10_000)


def prompt(model, length, seed):
    return random_ids(model.config, length, seed=seed).tolist()


def test_a_continued_conversation_computes_only_what_is_new(model, engine):
    ids = prompt(model, 100, 4)
    out = engine.generate([ids], HOT)[0]
    again = engine.generate([ids + out.ids + [5, 6]], HOT)[0]
    assert again.reused_tokens >= len(ids) + len(out.ids) - 1


def test_a_hit_is_never_what_another_arithmetic_computed(model, tmp_path):
    """Rows of one format, computed in two: both keep their prefixes in one directory, and each finds its own only."""
    ids = prompt(model, 300, 5)
    found = []
    for precision in ("float32", "bfloat16", "float32", "bfloat16"):
        engine = Engine(model, replace(SMALL, runner="native", precision=precision, cache_dir=tmp_path))
        found.append(engine.generate([ids], SamplingParams(max_tokens=2))[0].reused_tokens)
        engine.close()
    assert found == [0, 0, 256, 256]


def test_closing_a_stream_early_is_safe(model, engine):
    ids = prompt(model, 60, 5)
    stream = engine.stream(ids, HOT)
    begun = [next(stream) for _ in range(3)]
    stream.close()
    assert engine.generate([ids], HOT)[0].ids[:3] == begun


def test_limits_and_bad_input(model, engine):
    with pytest.raises(RequestError, match="empty"):
        engine.generate([[]])
    with pytest.raises(RequestError, match="token ids"):
        engine.generate([[5], [model.config.vocab_size]])
    with pytest.raises(RequestError, match="logit_bias"):
        engine.generate([[5]], SamplingParams(logit_bias={3: 1.0, model.config.vocab_size: 1.0}))
    with pytest.raises(RequestError, match="this model takes"):
        engine.generate([[5] * model.config.max_position_embeddings])
    tiny = Engine(model, EngineConfig(pool_bytes=600_000, block_tokens=128, snapshot_every=128, max_running=1))
    with pytest.raises(RequestError, match="pool_bytes"):
        tiny.generate([[5] * 4000])
    tiny.close()
    out = engine.generate([prompt(model, 10, 6)], SamplingParams(max_tokens=3))[0]
    assert len(out.ids) <= 3 and (out.finish_reason == "length") == (out.ids[-1] != model.config.eos_token_id)
    assert engine.stats().running == 0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pool_bytes": 1000}, "pool_bytes"),
        ({"token_budget": 3}, "token_budget"),
        ({"runner": "fast"}, "runner"),
        ({"snapshot_every": 100}, "snapshot_every"),
        ({"max_running": 0}, "max_running"),
        ({"threads": 0}, "threads"),
    ],
)
def test_options_that_cannot_work_say_so(model, changes, text):
    with pytest.raises(ValueError, match=text):
        Engine(model, EngineConfig(**{"max_running": 4, **changes}))


def test_choices_come_in_order_and_progress_is_told(model, engine):
    seen = []
    params = SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=6, ignore_eos=True, logprobs=2)
    prompts = [prompt(model, 20, 1), prompt(model, 30, 2)]
    out = engine.generate(prompts, params, lambda done, total: seen.append((done, total)))
    assert [completion.prompt_tokens for completion in out] == [20, 20, 30, 30]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len({tuple(completion.ids) for completion in out}) == 4
    for completion in out:
        assert completion.logprobs is not None and len(completion.logprobs) == 6
        for token in completion.logprobs:
            assert token.logprob is not None and token.logprob <= token.top[0][1]
            assert token.top[0][1] >= token.top[1][1]


def test_prompts_of_one_call_are_in_the_first_batch_together(model, engine, monkeypatch):
    """However slowly they are handed over: batches, and with them the last bits of some runners, are the same every time."""

    class Slow(queue.SimpleQueue):
        def __init__(self):
            time.sleep(0.02)

    monkeypatch.setattr("nautile.engine.driver.queue.SimpleQueue", Slow)
    step, sizes = engine.runner.step, []
    monkeypatch.setattr(engine.runner, "step", lambda plan: [sizes.append(len(plan.pieces)), step(plan)][1])
    engine.generate([prompt(model, 9, seed) for seed in range(4)], SamplingParams(max_tokens=3, ignore_eos=True))
    assert sizes == [4, 4, 4]


def test_a_seed_is_drawn_where_none_is_given(model, engine):
    params = SamplingParams(temperature=1.0, seed=None, max_tokens=12, ignore_eos=True)
    first, second = (engine.generate([prompt(model, 9, 1)], params)[0].ids for _ in range(2))
    assert first != second


async def collect(engine, request):
    return [event async for event in engine.submit(request)]


def test_events_come_in_order_from_any_event_loop(model, engine):
    request = Request(tuple(prompt(model, 150, 8)), HOT)
    events = asyncio.run(collect(engine, request))
    kinds = [type(event) for event in events]
    assert kinds == sorted(kinds, key=[Prefilled, TokenSampled, Finished].index)
    assert [event.done for event in events if isinstance(event, Prefilled)] == [64, 128, 150]
    tokens = [event.token for event in events if isinstance(event, TokenSampled)]
    assert tokens == engine.generate([list(request.prompt_ids)], HOT)[0].ids
    assert events[-1].usage.completion_tokens == len(tokens)


def test_leaving_an_async_stream_frees_the_sequence_within_one_step(model, engine):
    long, steps = SamplingParams(max_tokens=2000, ignore_eos=True), Steps(engine, 3)

    async def leave():
        stream = engine.submit(Request(tuple(prompt(model, 20, 1)), long))
        async for event in stream:
            if isinstance(event, TokenSampled):
                break
        await stream.aclose()

    asyncio.run(leave())
    steps.allow_all()
    soon(lambda: not engine.stats().running)
    assert engine.stats().steps <= 4  # three had ended, or could have; one may have been under way
    assert engine.with_pool(lambda pool: pool.free_slots) == 4


def test_cancel_ends_a_request_with_what_it_has(model, engine):
    long = SamplingParams(max_tokens=2000, ignore_eos=True)
    request, steps = Request(tuple(prompt(model, 20, 1)), long), Steps(engine, 3)

    async def run():
        events = []
        async for event in engine.submit(request):
            events.append(event)
            if isinstance(event, TokenSampled):
                engine.cancel(request.id)
                steps.allow_all()
        return events

    events = asyncio.run(run())
    assert events[-1].reason == "cancelled"
    assert events[-1].usage.completion_tokens == len([e for e in events if isinstance(e, TokenSampled)])
    engine.cancel("nobody")


def test_a_request_waits_while_somebody_else_holds_the_slots(model, engine):
    held = engine.with_pool(lambda pool: [pool.open([1, 2, 3]) for _ in range(4)])
    request = Request(tuple(prompt(model, 12, 1)), SamplingParams(max_tokens=3, ignore_eos=True))
    stream = engine.submit_sync(request)
    soon(lambda: engine.stats().waiting)
    assert engine.stats().waiting == 1 and engine.stats().steps == 0
    engine.with_pool(lambda pool: [pool.release(sequence) for sequence in held])
    assert sum(isinstance(event, TokenSampled) for event in stream) == 3


def test_many_threads_ask_at_once(model, engine):
    prompts = [prompt(model, 10 + 7 * index, index) for index in range(6)]
    alone = [engine.generate([ids], HOT)[0].ids for ids in prompts]
    together: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda i=index: together.update({i: list(engine.stream(prompts[i], HOT))}))
        for index in range(len(prompts))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[index] for index in range(len(prompts))] == alone


def test_a_closed_engine_says_so_and_ends_what_ran(model):
    engine = Engine(model, SMALL)
    steps, closing = Steps(engine, 3), threading.Thread(target=engine.close)
    stream = engine.submit_sync(Request(tuple(prompt(model, 20, 1)), SamplingParams(max_tokens=2000, ignore_eos=True)))
    while not isinstance(next(stream), TokenSampled):
        pass
    closing.start()
    soon(lambda: engine._driver._closing)
    steps.allow_all()
    closing.join(60)
    rest = list(stream)
    assert rest[-1].reason == "cancelled"
    with pytest.raises(RequestError, match="closed"):
        engine.generate([[1, 2]])
    engine.close()


def test_a_command_that_was_run_while_the_engine_ended_is_no_failure(model):
    """Whoever waits for it looks whether the thread lives: between two looks the command may be done and the thread gone."""
    engine = Engine(model, SMALL)
    engine.with_pool(lambda pool: None)  # from here on it has a thread
    driver, thread, looked = engine._driver, engine._driver._thread, threading.Event()

    class Late:
        def is_alive(self):
            looked.set()
            driver.close()
            return thread.is_alive()

        def join(self):
            thread.join(60)

    driver._thread = Late()
    assert engine.with_pool(lambda pool: looked.wait(60))


def test_a_failing_step_is_an_error_for_its_requests_only(model, engine, monkeypatch):
    step = engine.runner.step
    monkeypatch.setattr(engine.runner, "step", lambda plan: step(plan) * float("nan"))
    with pytest.raises(EngineError, match="NaN"):
        engine.generate([prompt(model, 10, 1)], HOT)
    monkeypatch.undo()
    assert engine.generate([prompt(model, 10, 1)], HOT)[0].ids


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_broken_pool_stops_the_engine_and_leaves_nobody_waiting(model):
    engine = Engine(model, SMALL)
    ids = prompt(model, 10, 1)
    engine.generate([ids], HOT)
    engine.with_pool(lambda pool: pool.pages.references.__setitem__(0, 99))
    engine._driver._thread.join(60)
    with pytest.raises(RequestError, match="stopped"):
        engine.generate([ids], HOT)


def test_bytes_are_counted_by_kind_while_something_runs(model, engine):
    stats = engine.stats()
    assert stats.bytes_limit == SMALL.pool_bytes + SMALL.snapshot_bytes and stats.bytes_total == 0
    engine.generate([prompt(model, 200, 1)], HOT)
    used = engine.stats()
    assert used.bytes_by_kind["csa"] > 0 and used.bytes_by_kind["snapshots"] > 0 and used.bytes_by_kind["window"] == 0
    assert used.bytes_total == sum(used.bytes_by_kind.values()) <= used.bytes_limit
