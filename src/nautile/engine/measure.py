"""Speed of packed weights: decode steps and prompts, with the official layout's bytes or random ones of the same shape.

Every decode step is fed fresh random ids, because greedy text of random weights collapses onto few tokens and would flatter the
cache of experts. With uniform routing a figure is void when the measured hit rate is further than 2 points from the share of
experts on the card. The state of a sequence is filled with random rows instead of by a prompt.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

from nautile.config import ModelConfig, RopeScaling
from nautile.engine.costs import weight_bytes
from nautile.engine.decode_step import StepOptions
from nautile.engine.expert_dispatch import Dispatch, open_dispatch
from nautile.engine.gpu_runner import GPURunner
from nautile.engine.packed import card_memory, load_packed, random_packed
from nautile.engine.packed_weights import PackedWeights
from nautile.engine.placement import Budget, expert_bytes
from nautile.engine.plan import Piece, Plan
from nautile.engine.runner import TorchRunner
from nautile.state import PoolOptions, StatePool
from nautile.state.pages import Pages, Sequence

__all__ = ["WAYS", "Case", "Machine", "Prompt", "Run", "Subject", "build", "check", "decode", "fastest_way", "prefill", "run"]

WAYS = {  # how a decode step may be computed
    "plain": StepOptions(),
    "chained": StepOptions(chained=True),
    "vector": StepOptions(vector=True),
    "direct": StepOptions(direct=True),
    "all": StepOptions(chained=True, vector=True, direct=True),
}
_CHECKED = (3072, 2)  # tokens and sequences of the pool that a comparison with the modules uses
WORKSPACE = 5 << 30  # bytes of the card for a step, its graphs, and the stacks of kernels that spill
TINY: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 128, "num_attention_heads": 16, "head_dim": 128, "q_lora_rank": 128, "o_groups": 2,
    "o_lora_rank": 64, "sliding_window": 16, "index_n_heads": 16, "index_head_dim": 64, "index_topk": 64,
    "n_routed_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 128, "num_hash_layers": 1,
    "num_hidden_layers": 4, "compress_ratios": (0, 4, 128, 4, 0),
    "rope_scaling": RopeScaling(original_max_position_embeddings=256),
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What is measured. ``weights``: random, or the directory of an official checkpoint. ``layers`` 0: all, else the first of
    them; ``experts`` 0: the model's number. ``zipf`` 0: routing as it comes, uniform with random weights; else experts are made
    about as popular as rank^-zipf, in an order of its own for each layer, and the most popular lie on the card."""

    model: str = "flash"
    weights: str = "random"
    layers: int = 0
    experts: int = 0
    zipf: float = 0.0

    def configuration(self) -> ModelConfig:
        """Of the checkpoint, or of the preset with the changes that were asked for."""
        if self.weights != "random":
            return ModelConfig.from_json(self.weights).replace(num_nextn_predict_layers=0)
        config = ModelConfig(**TINY) if self.model == "tiny" else ModelConfig.preset(self.model)
        config = config.replace(num_nextn_predict_layers=0)
        if self.layers:
            hashed = min(self.layers, config.num_hash_layers)
            config = config.replace(num_hidden_layers=self.layers, num_hash_layers=hashed)
        return config.replace(n_routed_experts=self.experts) if self.experts else config


@dataclass(frozen=True)
class Machine:
    """Memory in bytes (``card`` 0: what is free), host threads for experts (0: all are streamed), the card's bytes a second."""

    card: int = 0
    host: int = 120_000_000_000
    threads: int = 1
    bandwidth: float = 3.03e12
    workspace: int = WORKSPACE


@dataclass(frozen=True)
class Case:
    """A decode step of ``batch`` sequences of ``context`` tokens, ``ahead`` experts a layer copied before they are chosen,
    computed in one of ``WAYS``."""

    context: int
    batch: int
    ahead: int = 0
    steps: int = 48
    warm: int = 8
    way: str = "plain"


@dataclass(frozen=True)
class Prompt:
    """A prompt of ``tokens``, taken in by ``chunk`` tokens. Of more chunks than ``samples`` only so many are run, evenly spread
    over the prompt, and the time of those between is interpolated; the result says so."""

    tokens: int
    chunk: int = 32768
    samples: int = 5
    slice_tokens: int = 2048


@dataclass(frozen=True)
class Run:
    """All that is measured in one process. ``check`` compares with the modules first; ``profile`` adds the card's time by
    kernel of the first two cases."""

    subject: Subject
    machine: Machine
    cases: tuple[Case, ...]
    prompts: tuple[Prompt, ...] = ()
    check: bool = False
    profile: bool = False


def build(
    subject: Subject, machine: Machine, cases: tuple[Case, ...], prompts: tuple[Prompt, ...], device: torch.device
) -> PackedWeights:
    """Allocate and fill. Raises PlacementError before anything is allocated, when it does not fit."""
    config = subject.configuration()
    sizes = [(case.context, case.batch) for case in cases] + [(prompt.tokens, 1) for prompt in prompts]
    state = max(_state_bytes(config, *size) for size in sizes or [_CHECKED])
    on_card = device.type == "cuda"
    card = machine.card or (card_memory(device) if on_card else 1 << 30)
    budget = Budget(card, machine.host, state, machine.workspace if on_card else 0)
    counts = _popularity(config, subject.zipf) if subject.zipf else None
    if subject.weights != "random":
        return load_packed(subject.weights, budget, device, counts=counts)
    weights = random_packed(config, budget, device, counts=counts)
    if counts is not None:
        _skew(weights, counts)
    return weights


def run(plan: Run, device: torch.device, keep: Callable[[str, Any], None], told: Callable[[str], None]) -> None:
    """Measure everything. ``keep`` gets (key, value) as soon as there is one: what was built, the comparisons, and under
    "results" one line after the other. What fails becomes a line that says so, and the rest goes on. ``told`` hears of
    progress. Raises PlacementError before anything is allocated, when it does not fit."""
    began = time.perf_counter()
    weights = build(plan.subject, plan.machine, plan.cases, plan.prompts, device)
    placement = weights.store.placement
    dispatch = open_dispatch(weights.store, plan.machine.threads, max([2, *(case.batch for case in plan.cases)]))
    keep("built", {
        **asdict(plan.subject), "threads": plan.machine.threads, "resident_fraction": placement.fraction,
        "experts_on_card": placement.on_card, "experts_in_host": placement.in_host, "dense_gb": weights.nbytes / 1e9,
        "host_gb": placement.in_host * expert_bytes(weights.config) / 1e9, "seconds": time.perf_counter() - began,
        "seconds_an_expert": asdict(dispatch.speeds) if dispatch else None,
    })  # fmt: skip
    if plan.check:
        for ahead, way in dict.fromkeys((case.ahead, case.way) for case in plan.cases) or [(0, "plain")]:
            found = _tried(_checked, weights, _ahead(dispatch, ahead), way)
            keep("check", {"ahead": ahead, "way": way, **found})
    for prompt in plan.prompts:
        found = _tried(prefill, weights, dispatch, prompt, told)
        keep("results", {"prefill": prompt.tokens, "layers": len(weights.layers), **found})
    for case in plan.cases:
        found = _tried(_decode_row, weights, plan.machine, _ahead(dispatch, case.ahead), case, plan.subject.zipf)
        keep("results", {"layers": len(weights.layers), **asdict(case), **found})
    for case in plan.cases[:2] if plan.profile else ():
        kernels = _tried(profile, weights, _ahead(dispatch, case.ahead), case)
        keep("profile", {**asdict(case), **kernels})


def _tried(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What it measured, or how it failed; graphs and pools are gone then."""
    try:
        return measure(*arguments)
    except Exception as error:  # a line of the result: the others still count
        return {"failure": f"{type(error).__name__}: {error}"[:500]}
    finally:
        _free()


def _ahead(dispatch: Dispatch | None, ahead: int) -> Dispatch | None:
    """The same with so many experts copied ahead, and counts of its own."""
    return dispatch and Dispatch(dispatch.store, dispatch.team, dispatch.speeds, ahead)


def _checked(weights: PackedWeights, dispatch: Dispatch | None, way: str) -> dict[str, Any]:
    pool = StatePool(weights.config, PoolOptions(blocks=12, slots=2, rows="packed", prefix_cache=False), weights.embed.device)
    return dict(check(GPURunner(weights, pool, dispatch, options=WAYS[way]), pool))


def fastest_way(measured: dict[str, Any]) -> str:
    """Of an earlier run's result: the way of least median for a single sequence, of those whose logits were checked against
    the modules and agree; "plain" where none was."""
    right = {
        row["way"]
        for row in measured.get("check", ())
        if row.get("same_argmax", 0) > 0.8 and row.get("relative_error", 1) < 0.03
    }
    found = [row for row in measured.get("results", ()) if row.get("batch") == 1 and row["way"] in right and "median_ms" in row]
    return str(min(found, key=lambda row: row["median_ms"])["way"]) if found else "plain"


def _free() -> None:
    """Graphs and pools of the last case."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _decode_row(weights: PackedWeights, machine: Machine, dispatch: Dispatch | None, case: Case, zipf: float) -> dict[str, Any]:
    pool = StatePool(weights.config, _pool_options(case.context, case.batch), weights.embed.device)
    _fill_state(pool.pages)
    runner = GPURunner(weights, pool, dispatch, options=WAYS[case.way])
    row: dict[str, Any] = dict(decode(runner, pool, case))
    row["floor_ms"] = floor_bytes(weights.config, case.context, case.batch) / machine.bandwidth * 1e3
    if dispatch is not None:
        counts, placement = dispatch.counts, weights.store.placement
        row |= {**asdict(counts), "hit_rate": counts.hit_rate, "foreseen_share": _share(counts.foreseen, counts.in_vain)}
        row["void"] = not zipf and abs(counts.hit_rate - placement.fraction) > 0.02
    return row


def _share(part: int, rest: int) -> float:
    return part / max(1, part + rest)


# Decode -------------------------------------------------------------------------------------------------------------


def decode(runner: GPURunner, pool: StatePool, case: Case) -> dict[str, float]:
    """Milliseconds of a step, fresh random ids in each. Raises RuntimeError when the logits are not finite."""
    vocabulary, rng = runner.weights.config.vocab_size, random.Random(case.batch)
    sequences = [_opened(pool, case.context, rng, vocabulary) for _ in range(case.batch)]
    times, dispatch = [], runner.dispatch
    for number in range(case.warm + case.steps):
        for sequence in sequences:
            pool.ensure(sequence, 1)
        plan = Plan(tuple(Piece(sequence, (rng.randrange(vocabulary),)) for sequence in sequences))
        if number == case.warm and dispatch is not None:
            dispatch.counts = type(dispatch.counts)()
        start = time.perf_counter()
        logits = runner.step(plan)
        if logits.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        for sequence, piece in zip(sequences, plan.pieces, strict=True):
            pool.append(sequence, piece.ids)
    if not bool(torch.isfinite(logits).all()):
        raise RuntimeError("the logits are not finite: this measurement is void")
    parts = runner.host_times(case.batch, case.context).microseconds_a_layer() if dispatch is not None else {}
    for sequence in sequences:
        pool.release(sequence)
    timed = sorted(times[case.warm :])
    return {
        "median_ms": statistics.median(timed) * 1e3, "mean_ms": statistics.fmean(timed) * 1e3,
        "p90_ms": timed[int(len(timed) * 0.9)] * 1e3, "first_ms": times[0] * 1e3,
        "tokens_per_s": case.batch / statistics.fmean(timed),
        **{f"host_{name}_us_a_layer": value for name, value in parts.items()},
    }  # fmt: skip


def _opened(pool: StatePool, length: int, rng: random.Random, vocabulary: int) -> Sequence:
    """A sequence that believes it has taken in so many random tokens."""
    sequence = pool.open([0])
    pool.ensure(sequence, length)
    pool.append(sequence, [rng.randrange(vocabulary) for _ in range(length)])
    return sequence


def check(runner: GPURunner, pool: StatePool, prompt: int = 300, steps: int = 6) -> dict[str, float]:
    """Prompt and decode pieces against the modules on the same device and weights: two sequences of the same tokens."""
    rng, modules = random.Random(7), TorchRunner(runner.model, pool)
    ids = [rng.randrange(runner.weights.config.vocab_size) for _ in range(prompt + steps)]
    sequences: list[Sequence] = []
    errors: list[float] = []
    same, at = 0, 0
    for _ in range(2):
        sequences.append(pool.open([0]))
    for count in (prompt, *[1] * steps):
        logits = []
        for sequence, one in zip(sequences, (runner, modules), strict=True):
            pool.ensure(sequence, count)
            logits.append(one.step(Plan((Piece(sequence, tuple(ids[at : at + count])),)))[0].double())
            pool.append(sequence, ids[at : at + count])
        at += count
        errors.append(float((logits[0] - logits[1]).norm() / logits[1].norm()))
        same += int(logits[0].argmax() == logits[1].argmax())
    for sequence in sequences:
        pool.release(sequence)
    return {
        "relative_error_of_the_prompt": errors[0], "relative_error": statistics.median(errors[1:]),
        "worst": max(errors), "same_argmax": same / (steps + 1),
    }  # fmt: skip


def profile(weights: PackedWeights, dispatch: Dispatch | None, case: Case) -> dict[str, Any]:
    """Card time by kernel of one step: "kernels" are (name, microseconds, launches). Raises RuntimeError without a GPU."""
    if not weights.embed.is_cuda:
        raise RuntimeError("kernels can be profiled on a GPU only")
    pool = StatePool(weights.config, _pool_options(case.context, case.batch), weights.embed.device)
    _fill_state(pool.pages)
    runner = GPURunner(weights, pool, dispatch, options=WAYS[case.way])
    decode(runner, pool, replace(case, steps=1, warm=1))
    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        decode(runner, pool, replace(case, steps=1, warm=0))
    found = [(event.key[:48], event.self_device_time_total, event.count) for event in recorded.key_averages()]
    return {"kernels": sorted(found, key=lambda row: -row[1])[:32]}


# Prompts ------------------------------------------------------------------------------------------------------------


def prefill(
    weights: PackedWeights, dispatch: Dispatch | None, prompt: Prompt, told: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Seconds of a prompt. ``told`` hears of every chunk. Raises RuntimeError when logits are not finite."""
    pool = StatePool(weights.config, _pool_options(prompt.tokens, 1), weights.embed.device)
    _fill_state(pool.pages)
    runner = GPURunner(weights, pool, dispatch, slice_tokens=prompt.slice_tokens)
    starts = list(range(0, prompt.tokens, prompt.chunk))
    ends = [min(start + prompt.chunk, prompt.tokens) for start in starts]
    run = _spread(len(starts), prompt.samples)
    _chunk(runner, pool, 0, ends[0])  # compiles what is compiled
    seconds = {}
    for number in run:
        seconds[number] = _chunk(runner, pool, starts[number], ends[number])
        told(f"tokens {starts[number]:,} to {ends[number]:,}: {seconds[number]:.2f} s")
    total = sum(_between(seconds, number) for number in range(len(starts)))
    return {
        "chunk": prompt.chunk, "chunks": len(starts), "chunks_run": len(run), "interpolated": len(run) < len(starts),
        "seconds": total, "tokens_per_s": prompt.tokens / total,
        "seconds_of_chunks": {str(starts[number]): value for number, value in seconds.items()},
    }  # fmt: skip


def _chunk(runner: GPURunner, pool: StatePool, start: int, end: int) -> float:
    rng, vocabulary = random.Random(start), runner.weights.config.vocab_size
    sequence = _opened(pool, start, rng, vocabulary)
    pool.ensure(sequence, end - start)
    ids = tuple(rng.randrange(vocabulary) for _ in range(end - start))
    if runner.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    logits = runner.step(Plan((Piece(sequence, ids),))).cpu()
    spent = time.perf_counter() - began
    pool.release(sequence)
    if not bool(torch.isfinite(logits).all()):
        raise RuntimeError("the logits are not finite: this measurement is void")
    return spent


def _spread(count: int, samples: int) -> list[int]:
    """First, last, and evenly between them; the last but one instead of a last chunk that may be short."""
    if count <= samples:
        return list(range(count))
    last = count - 2 if count > 2 else count - 1
    return sorted({round(index * last / max(1, samples - 1)) for index in range(samples)})


def _between(seconds: dict[int, float], number: int) -> float:
    """Of chunk ``number``: measured, or on the line through its neighbours that were."""
    if number in seconds:
        return seconds[number]
    below = max((n for n in seconds if n < number), default=min(seconds))
    above = min((n for n in seconds if n > number), default=below)
    if above == below:
        return seconds[below]
    return seconds[below] + (seconds[above] - seconds[below]) * (number - below) / (above - below)


# State, floors, routing ---------------------------------------------------------------------------------------------


def _pool_options(context: int, batch: int) -> PoolOptions:
    blocks = batch * (-(-(context + 512) // 256))
    return PoolOptions(blocks=blocks, slots=batch, rows="packed", prefix_cache=False)


def _state_bytes(config: ModelConfig, context: int, batch: int) -> int:
    """Bytes of the pool of a case."""
    options = _pool_options(context, batch)
    one = Pages(config, PoolOptions(blocks=1, slots=1, rows="packed"), "meta")
    return options.blocks * one.block_bytes + options.slots * one.slot_bytes


def _fill_state(pages: Pages) -> None:
    """Random rows that are all numbers: payload below 2, powers of two near one."""
    for rows_, row in ((pages.csa, None), (pages.hca, None), (pages.window, None), (pages.index, "key")):
        if not rows_.numel():
            continue
        rows_.view(-1).random_(0, 256)
        if row == "key":
            half = pages.config.index_head_dim // 2
            rows_[..., half:] = 126
            continue
        plain = pages.config.head_dim - pages.config.qk_rope_head_dim
        rows_[..., :plain].bitwise_and_(0xBF)
        rows_[..., plain : plain + 2 * pages.config.qk_rope_head_dim].bitwise_and_(0x3F)
        rows_[..., plain + 2 * pages.config.qk_rope_head_dim :] = 127


def floor_bytes(config: ModelConfig, context: int, batch: int) -> float:
    """Bytes that a step must read: dense weights once, each chosen expert once (uniform routing), the state that is seen."""
    dense = weight_bytes(config, "stored").resident
    unique = config.n_routed_experts * (1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch)
    experts = config.num_hidden_layers * unique * expert_bytes(config)
    row = config.head_dim + config.qk_rope_head_dim + 8
    per = {0: 0, 4: min(config.index_topk, context // 4) * row + context // 4 * 68, 128: context // 128 * row}
    seen = sum(config.sliding_window * row + per[ratio] for ratio in config.layer_ratios)
    return dense + experts + batch * seen


def _popularity(config: ModelConfig, exponent: float) -> Tensor:
    """rank^-exponent of every expert [layers, E], ranks in a random order for each layer."""
    generator = torch.Generator().manual_seed(1)
    count = config.n_routed_experts
    ranks = torch.stack([torch.randperm(count, generator=generator) for _ in range(config.num_hidden_layers)]) + 1
    return ranks.double() ** -exponent


def _skew(weights: PackedWeights, popularity: Tensor) -> None:
    """Make random weights route by it: tables of hash layers are drawn so, and a router's bias is what makes the largest of
    scores with Gumbel's spread be drawn so (its scores have another shape: hence "about")."""
    generator = torch.Generator().manual_seed(2)
    for layer, wanted in zip(weights.layers, popularity, strict=True):
        if layer.bias is not None:
            layer.bias.copy_(wanted.log() * (_SCORES / _GUMBEL))
        elif layer.table is not None:
            draws = torch.multinomial(wanted.expand(1 << 12, -1), layer.table.shape[1], generator=generator)
            layer.table.copy_(draws.repeat(-(-len(layer.table) // len(draws)), 1)[: len(layer.table)])


_SCORES = 0.30  # standard deviation of sqrt(softplus(z)) for a normal z: a random router's scores
_GUMBEL = 1.28  # of Gumbel's distribution
