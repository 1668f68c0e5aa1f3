"""Packed weights: the decode pieces against the modules, on the card or on the CPU, wherever experts lie."""

import json
from contextlib import nullcontext, suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.flash_models import budget, flash_config, measure_and_forget, packed
from nautile.checkpoint import load_model
from nautile.checkpoint.errors import CheckpointError
from nautile.checkpoint.layout import entries, scale_name, stored_tensors
from nautile.checkpoint.shards import ShardWriter
from nautile.engine import Engine, EngineConfig, EngineError, SamplingParams, gpu_runner
from nautile.engine.decode_step import DecodeStep
from nautile.engine.expert_dispatch import Dispatch, Speeds, divide, fitted
from nautile.engine.expert_prefill import ExpertGroups
from nautile.engine.fill import fill_from_checkpoint
from nautile.engine.gpu_runner import GPURunner
from nautile.engine.packed import load_packed
from nautile.engine.packed_weights import network
from nautile.engine.plan import Piece, Plan
from nautile.engine.request import EngineStoppedError
from nautile.engine.runner import TorchRunner
from nautile.kernels.host import HostTeam
from nautile.state import PoolOptions, StatePool

OPTIONS = PoolOptions(blocks=24, slots=4, rows="packed", prefix_cache=False)
STEPS = 7  # from 250 tokens across the end of a block of 256
STARTS = (2, 127, 250, 383)  # tokens taken in as a prompt; four sequences then decode together across ends of blocks
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture(scope="module")
def config():
    return flash_config()


@pytest.fixture(scope="module")
def weights(config):
    return packed(config)


@pytest.fixture(scope="module")
def ids(config):
    return torch.randint(config.vocab_size, (len(STARTS), 420), generator=torch.Generator().manual_seed(5)).tolist()


def feed(runner, pool, ids, steps, starts=STARTS):
    """Logits [steps, sequences, V] of tokens that are given, not sampled."""
    sequences = []
    ids = ids[: len(starts)]
    for row, count in zip(ids, starts, strict=True):
        sequence = pool.open(row)
        pool.ensure(sequence, count)
        runner.step(Plan((Piece(sequence, tuple(row[:count])),)))
        pool.append(sequence, row[:count])
        sequences.append(sequence)
    out = []
    for _ in range(steps):
        for sequence in sequences:
            pool.ensure(sequence, 1)
        plan = Plan(tuple(Piece(s, (row[s.length],)) for s, row in zip(sequences, ids, strict=True)))
        out.append(runner.step(plan).cpu())
        for sequence, piece in zip(sequences, plan.pieces, strict=True):
            pool.append(sequence, piece.ids)
    return torch.stack(out)


@pytest.fixture(scope="module")
def expected(config, weights, ids):
    pool = StatePool(config, OPTIONS)
    return feed(TorchRunner(network(weights, torch.float32), pool), pool, ids, STEPS)


def copied(weights, config, on_card, device):
    """The same weights with so many experts on the card."""
    other = packed(config, on_card, device=device)
    for (name, target), (same, source) in zip(other.destinations(), weights.destinations(), strict=True):
        assert name == same
        target.copy_(source)
    return other


def agree(found, expected, device, exact, limit=0.01):
    """Argmax nearly everywhere, and logits: in float32 up to values that fall on the other side of a border of FP4 or FP8;
    with bfloat16 activations up to their rounding."""
    error = (found - expected).norm() / expected.norm()
    assert error < (limit if exact and device == "cpu" else 0.1), float(error)
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("on_card", "host"), [(64, False), (26, False), (26, True), (0, False), (0, True)])
def test_the_pieces_are_the_modules(config, weights, ids, expected, device, on_card, host):
    own = copied(weights, config, on_card, device)
    team = HostTeam(2, config.hidden_size, config.moe_intermediate_size, config.swiglu_limit, tokens=4) if host else None
    dispatch = Dispatch(own.store, team, Speeds(1.0, 1.0))
    pool = StatePool(config, OPTIONS, device)
    found = feed(GPURunner(own, pool, dispatch), pool, ids, STEPS)
    agree(found, expected, device, exact=not host or on_card == 64)
    counts = dispatch.counts
    assert (counts.on_host > 0) == (host and on_card < 64) and (counts.streamed > 0) == (on_card < 64)
    if on_card < 64:
        assert abs(counts.hit_rate - own.store.placement.fraction) < 0.1
        assert dispatch.used.sum() == STEPS * 4 * 4 * config.num_experts_per_tok


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("guess", ["the router's", "wrong"])
def test_copies_ahead_change_no_number(config, ids, device, guess, monkeypatch):
    """Experts that are copied before they are chosen are used where the guess was right, and else do no harm."""
    logits, dispatches = [], []
    own = packed(config, 26, staging=12, device=device)
    if guess == "wrong":
        random = torch.Generator().manual_seed(3)

        def foresee(self, index):
            self.mail.ahead.copy_(torch.randint(config.n_routed_experts, self.mail.ahead.shape, generator=random))

        monkeypatch.setattr(DecodeStep, "foresee", foresee)
    for ahead in (0, 2):
        dispatches.append(Dispatch(own.store, None, Speeds(1.0, 1.0), ahead))
        pool = StatePool(config, OPTIONS, device)
        logits.append(feed(GPURunner(own, pool, dispatches[-1]), pool, ids, 3, (2, 30)))
    # a card adds a token's experts in the order of its choices; the reference on the CPU in the order of their slots
    agree(*logits, device, exact=True) if device == "cpu" else torch.testing.assert_close(*logits, rtol=0, atol=0)
    plain, counts = (dispatch.counts for dispatch in dispatches)
    assert (plain.foreseen, plain.in_vain) == (0, 0) and counts.streamed == plain.streamed
    ahead = counts.foreseen + counts.in_vain
    assert ahead > 3 * 4 and counts.in_vain > 0  # steps x layers
    if guess != "wrong":
        assert counts.foreseen > 0.6 * ahead


class Played:
    """A stream, an event or a graph of a card that is not there: a graph calls what it captured."""

    def __init__(self, call=None):
        self.replay = call

    def record(self):
        pass

    synchronize = record

    def wait_stream(self, other):
        pass


@pytest.mark.parametrize(("on_card", "ahead"), [(64, 0), (26, 2)])
def test_what_is_captured_is_replayed_in_order(config, ids, on_card, ahead, monkeypatch):
    """The graphs of a card, played by calls: the same numbers as without them."""
    own, logits = packed(config, on_card, staging=12), []
    for captured in (False, True):
        if captured:
            monkeypatch.setattr(gpu_runner, "_captured", lambda call, pool: Played(call))
            for name in ("Stream", "current_stream", "synchronize", "graph_pool_handle"):
                monkeypatch.setattr(torch.cuda, name, lambda *_: Played())
            monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
            begin = gpu_runner._Graphs.__init__

            def as_on_a_card(self, *arguments, begin=begin):
                begin(self, *arguments)
                self._arrived, self._guessed = Played(), Played()
                self._ahead = Played() if ahead else None

            monkeypatch.setattr(gpu_runner._Graphs, "__init__", as_on_a_card)
        pool = StatePool(config, OPTIONS)
        runner = GPURunner(own, pool, Dispatch(own.store, None, Speeds(1.0, 1.0), ahead))
        logits.append(feed(runner, pool, ids, 3, (2, 9)))
    assert torch.equal(*logits)


def test_hash_layers_are_foreseen_exactly(ids):
    """Their experts depend on the token alone."""
    hashed = flash_config(num_hash_layers=4)
    own, pool = packed(hashed, 26), StatePool(hashed, OPTIONS)
    dispatch = Dispatch(own.store, None, Speeds(1.0, 1.0), 2)
    feed(GPURunner(own, pool, dispatch), pool, ids, 2, (2, 3))
    assert dispatch.counts.foreseen > 0 and dispatch.counts.in_vain == 0


def test_more_copies_ahead_than_room_are_refused(config):
    with pytest.raises(ValueError, match="give fewer"):
        Dispatch(packed(config, 26).store, None, Speeds(1.0, 1.0), ahead=3)


def test_speeds_are_a_line_through_what_was_measured():
    assert fitted({1: 3.0, 2: 4.0, 3: 5.0}) == pytest.approx((1.0, 2.0))
    assert fitted({1: 1.0, 2: 3.0}) == pytest.approx((4 / 3, 0.0))  # never a negative start
    assert fitted({2: 3.0}) == pytest.approx((1.5, 0.0))
    assert fitted({1: 3.0, 2: 2.0}) == pytest.approx((0.0, 2.5))


def test_the_indexer_selects(ids):
    """With fewer entries to choose than there are, decode pieces and modules choose the same."""
    config = flash_config(index_topk=16)
    weights, pools = packed(config, seed=1), [StatePool(config, OPTIONS) for _ in range(2)]
    modules = feed(TorchRunner(network(weights, torch.float32), pools[0]), pools[0], ids, 4)
    agree(feed(GPURunner(weights, pools[1]), pools[1], ids, 4), modules, "cpu", exact=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("on_card", "slice_tokens", "staging"), [(64, 512, 8), (20, 37, 2)])
def test_a_prompt_is_the_modules(ids, device, on_card, slice_tokens, staging):
    """Every row of the prompt, in chunks that begin and end anywhere, slices within them, groups of experts in turn."""
    config = flash_config(index_topk=16)
    weights = packed(config, on_card, staging=staging, device=device)
    dispatch = Dispatch(weights.store, HostTeam(1, 128, 128, config.swiglu_limit), Speeds(1.0, 1.0))
    logits = []
    for kind in ("modules", "slices"):
        pool = StatePool(config, OPTIONS, device)
        model = network(weights)
        runner = (
            TorchRunner(model, pool)
            if kind == "modules"
            else GPURunner(weights, pool, dispatch, model, slice_tokens=slice_tokens)
        )
        sequence, found = pool.open([0]), []
        for part in (300,) if kind == "modules" else (2, 127, 171):
            row = tuple(ids[0][sequence.length : sequence.length + part])
            pool.ensure(sequence, part)
            found.append(runner.step(Plan((Piece(sequence, row, "all"),))).cpu())
            pool.append(sequence, row)
        logits.append(torch.cat(found))
    # a value beside a border of FP4, or a tie of the indexer, changes single rows, as it does between chunks of the modules
    error = (logits[1] - logits[0]).norm(dim=1) / logits[0].norm(dim=1)
    assert error.median() < (1e-3 if device == "cpu" else 0.02) and error.quantile(0.95) < (0.01 if device == "cpu" else 0.1)
    assert (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean() > 0.95


@given(st.integers(1, 24), st.integers(1, 4), st.sampled_from([0, 5, 12, 16]), st.integers(0, 2**31))
@settings(max_examples=8, deadline=None)
def test_groups_of_experts_are_the_formula(tokens, chosen, on_card, seed):
    """Whatever is chosen and wherever it lies; what one token gets does not depend on the others."""
    torch.manual_seed(seed)
    config = flash_config((0,), num_experts_per_tok=chosen)
    store = packed(config, on_card, staging=4).store
    x, shares = torch.randn(tokens, 128), torch.rand(tokens, chosen)
    experts = torch.stack([torch.randperm(16)[:chosen] for _ in range(tokens)])
    groups = ExpertGroups(store)
    groups.begin_chunk()
    groups.begin_layer(0, tokens)
    out = groups.run(0, x, experts, shares)
    torch.testing.assert_close(out, store.run(0, x, experts, shares))
    torch.testing.assert_close(groups.run(0, x[-1:], experts[-1:], shares[-1:])[0], out[-1])


def test_each_expert_goes_where_it_ends_first():
    assert divide([(3, 1), (1, 1), (2, 1)], Speeds(1.0, 1.0)) == ([1, 3], [2])
    assert divide([(3, 1), (1, 1), (2, 1)], Speeds(1.0, 10.0)) == ([1, 2, 3], [])
    assert divide([(3, 1), (1, 4), (2, 1)], Speeds(1.0, 0.4)) == ([2], [1, 3])
    assert divide([(e, 1) for e in range(9)], Speeds(1.0, 100.0), room=2) == ([0, 1], [2, 3, 4, 5, 6, 7, 8])
    with_start = Speeds(0.28, 0.18, 0.17)  # one expert alone is faster over the link, of five the host takes three
    assert divide([(1, 1)], with_start) == ([1], [])
    assert divide([(e, 1) for e in range(5)], with_start) == ([0, 3], [1, 2, 4])
    assert divide([], Speeds(1.0, 1.0)) == ([], [])
    assert divide([(1, 1), (2, 1), (3, 1)], Speeds(1.0, 1.0), busy=1.5) == ([3], [1, 2])


@given(st.lists(st.integers(1, 8), max_size=20), st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0, 3), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_every_missing_expert_is_served_once(tokens, link, host, start, room):
    missing = list(enumerate(tokens))
    streamed, computed = divide(missing, Speeds(link, host, start), room)
    assert sorted(streamed + computed) == list(range(len(tokens))) and len(streamed) <= room
    if tokens and room >= len(tokens):  # never slower than leaving it all to the link
        work = dict(missing)
        on_host = start + sum(host * (1 + 0.25 * (work[expert] - 1)) for expert in computed)
        assert max(link * len(streamed), on_host if computed else 0.0) <= link * len(tokens) + 1e-9


class Uncompilable(Exception):  # noqa: N818  # stands for one of Triton's
    __module__ = "triton.compiler.errors"


@pytest.mark.parametrize(
    ("fault", "text"), [(torch.AcceleratorError("an illegal address"), "started again"), (Uncompilable("_kernel"), "_kernel")]
)
def test_a_fault_ends_requests_with_an_error(weights, monkeypatch, fault, text):
    """The text names what failed, and no token comes out of the step; requests after it fail or are right, never wrong."""
    engine = Engine(network(weights), EngineConfig(rows="packed", pool_bytes=24 << 20, threads=1))
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    good = engine.generate([[1, 2, 3]], params)[0].ids

    def broken(self, index):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(DecodeStep, "piece", broken)
        with pytest.raises(EngineError, match=text):
            engine.generate([[1, 2, 3]], params)
    with suppress(EngineError, EngineStoppedError):
        assert engine.generate([[1, 2, 3]], params)[0].ids == good
    engine.close()


def write_official(path, weights):
    """A checkpoint directory of these weights, tensor by tensor."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(weights.config.to_json()))
    values = dict(weights.destinations())
    stored = [tensor for entry in entries(weights.config) for tensor in stored_tensors(entry)]
    writer = ShardWriter(path / "model.safetensors", stored)
    for tensor in stored:
        wanted = {"BF16": torch.bfloat16, "F32": torch.float32}.get(tensor.dtype)
        writer.write(tensor.name, values[tensor.name].to(wanted) if wanted else values[tensor.name])
    writer.close()


@pytest.fixture(scope="module")
def directory(tmp_path_factory, weights):
    path = tmp_path_factory.mktemp("official") / "model"
    write_official(path, weights)
    return path


def test_an_official_checkpoint_is_loaded_into_place(config, weights, directory):
    loaded = load_packed(directory, budget(config, 26), "cpu")
    for (name, target), (_, source) in zip(loaded.destinations(), weights.destinations(), strict=True):
        if target.dtype.itemsize == 1 or target.dtype == torch.int64:
            assert torch.equal(target.view(torch.uint8), source.view(torch.uint8)), name
        else:
            expected = source.to(torch.bfloat16) if name.endswith("weight") else source
            torch.testing.assert_close(target.float(), expected.float())
    decoded = load_model(directory)
    pool, ids = StatePool(config, OPTIONS), torch.arange(140)[None] % config.vocab_size
    sequence = pool.open([0])
    pool.ensure(sequence, 140)
    dispatch = Dispatch(loaded.store, None, Speeds(1.0, 1.0))
    logits = GPURunner(loaded, pool, dispatch).step(Plan((Piece(sequence, tuple(ids[0].tolist()), "all"),)))
    with torch.inference_mode():
        # the full pass keeps in float32 what packed rows hold in bfloat16
        agree(logits, decoded(ids)[0], "cpu", exact=True, limit=0.03)


def test_damaged_and_foreign_checkpoints_are_refused(config, weights, directory, tmp_path):
    data = (directory / "model.safetensors").read_bytes()
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_text((directory / "config.json").read_text())
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        load_packed(cut, budget(config, 26), "cpu")
    with pytest.raises(CheckpointError, match="allocated for"):
        fill_from_checkpoint(packed(flash_config(index_topk=16)), directory)
    assert scale_name("a.weight") == "a.scale"


def test_what_cannot_run_says_so(config, weights):
    with pytest.raises(ValueError, match="packed"):
        GPURunner(weights, StatePool(config, PoolOptions(blocks=4, slots=1)))
    with pytest.raises(ValueError, match="dispatch"):
        GPURunner(packed(config, 26), StatePool(config, OPTIONS))
    with pytest.raises(ValueError, match="draft block"):
        Engine(network(weights), EngineConfig(rows="packed", pool_bytes=24 << 20, speculate=True))
    with pytest.raises(ValueError, match="fake_quant"):
        packed(flash_config(fake_quant_kv=False))


@pytest.mark.parametrize("on_card", [64, 26], ids=["all on the card", "some"])
def test_the_engine_serves_packed_weights(config, weights, on_card, monkeypatch):
    """Greedy text through the engine, batched and with cached prefixes, is what the modules say token by token."""
    measure_and_forget(monkeypatch)
    own = copied(weights, config, on_card, "cpu")
    options = EngineConfig(rows="packed", pool_bytes=24 << 20, max_running=4, token_budget=64, threads=1)
    engine = Engine(network(own), options)
    assert engine.runner_name == "GPURunner"
    prompts = [
        [(7 * index + shift) % config.vocab_size for index in range(length)] for shift, length in ((1, 9), (2, 130), (3, 260))
    ]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    first, again = engine.generate(prompts, params), engine.generate(prompts, params)
    assert [one.ids for one in first] == [one.ids for one in again] and again[2].reused_tokens
    pool = StatePool(config, OPTIONS)
    modules = TorchRunner(network(weights), pool)
    for prompt, completion in zip(prompts, first, strict=True):
        sequence, ids = pool.open(prompt), list(prompt)
        for token in completion.ids:
            new = ids[sequence.length :]
            pool.ensure(sequence, len(new))
            assert int(modules.step(Plan((Piece(sequence, tuple(new)),))).argmax()) == token
            pool.append(sequence, new)
            ids.append(token)
        pool.release(sequence)
    engine.close()
