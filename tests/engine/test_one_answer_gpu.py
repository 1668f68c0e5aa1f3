"""One answer on a card: what ``test_one_answer.py`` holds the CPU's runners to, for the modules on a GPU and each row format.

Without a GPU the same code runs on the CPU with few lengths, so that it is known to work before a card is at hand:
``pytest tests/engine/test_one_answer_gpu.py`` on a machine with one is the whole matrix.
"""

from dataclasses import replace

import pytest
import torch

from nautile.engine import Engine, EngineConfig, Request, SamplingParams, TokenSampled
from nautile.engine.sampling import choose
from oracles.random_models import random_ids, tiny_network

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_CARD = DEVICE == "cuda"
LENGTHS = (1, 3, 4, 5, 127, 128, 129, 255, 256, 257, 384, 511, 512, 513) if ON_CARD else (4, 129, 257)
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, top_p=0.9, seed=11, max_tokens=8, ignore_eos=True)
BASE = EngineConfig(device=DEVICE, runner="torch", pool_bytes=48 << 20, max_running=8, token_budget=512)
QUANTISED = {"fake_quant_kv": True, "fake_quant_indexer": True, "head_dim": 128, "qk_rope_head_dim": 64, "index_head_dim": 64}
KINDS = {"greedy": GREEDY, "seeded": SEEDED}
ROWS = [
    pytest.param(name, marks=() if ON_CARD or name == "packed" else pytest.mark.slow)
    for name in ("float32", "bfloat16", "packed")
]


@pytest.fixture(scope="module", params=ROWS)
def case(request):
    """A model, options, and the answers to one prompt at a time with nothing cached."""
    model = tiny_network((0, 4, 128, 4), seed=3, **(QUANTISED if request.param == "packed" else {})).to(DEVICE)
    options = replace(BASE, rows=request.param)
    engine = Engine(model, replace(options, max_running=1, prefix_cache=False))
    whole = random_ids(model.config, max(LENGTHS), seed=1).tolist()
    prompts = [tuple(whole[-length:]) for length in LENGTHS]
    answers = {name: [engine.generate([p], kind)[0].ids for p in prompts] for name, kind in KINDS.items()}
    engine.close()
    return model, options, prompts, answers


@torch.inference_mode()
def test_the_answers_are_those_of_full_passes(case):
    model, options, prompts, answers = case
    if options.rows != "float32":
        pytest.skip("a full pass keeps its rows in float32")
    for name, found in answers.items():
        for prompt, answer in zip(prompts, found, strict=True):
            logits = model(torch.tensor([[*prompt, *answer]], device=DEVICE))[0]
            for position, token in enumerate(answer, start=len(prompt)):
                assert choose(logits[position - 1], KINDS[name], position).token == token


@pytest.mark.parametrize("kind", ["greedy", "seeded"])
def test_batched_chunked_and_cached(case, kind):
    model, options, prompts, answers = case
    for budget in (37, 512) if ON_CARD else (100,):
        engine = Engine(model, replace(options, token_budget=budget))
        for _ in range(2):
            found = engine.generate(prompts, KINDS[kind])
            assert [completion.ids for completion in found] == answers[kind]
        assert found[-1].reused_tokens >= 256
        pool = engine.with_pool(lambda pool: pool.stats())
        assert pool.missed_snapshots == 0 and pool.sequences == 0
        engine.close()


def test_preempted_for_somebody_else(case):
    model, options, prompts, answers = case
    engine = Engine(model, replace(options, max_running=1))
    first, second = (engine.submit_sync(Request(prompts[at], GREEDY, priority=at)) for at in (0, 1))
    tokens = [[e.token for e in stream if isinstance(e, TokenSampled)] for stream in (first, second)]
    assert tokens == answers["greedy"][:2]
    engine.close()


def test_speculated(case):
    model, options, prompts, answers = case
    engine = Engine(model, replace(options, speculate=True))
    assert [completion.ids for completion in engine.generate(prompts, GREEDY)] == answers["greedy"]
    assert engine.stats().drafted_tokens > 0
    engine.close()


def test_from_host_memory_and_disk(case, tmp_path):
    model, options, prompts, answers = case
    tiers = replace(options, max_running=2, host_bytes=4 << 20, cache_dir=tmp_path)
    for _ in range(2):  # the second engine starts from the first one's files
        engine = Engine(model, tiers)
        assert [completion.ids for completion in engine.generate(prompts, GREEDY)] == answers["greedy"]
        engine.close()
