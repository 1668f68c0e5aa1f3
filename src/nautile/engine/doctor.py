"""Checks of a live engine for the failures that nobody notices: a cache that never hits, drafts that are never accepted, memory
that grows after warm-up, a wrong digit at one prompt length in four, state that is larger than it should be.

Each check measures, gives a verdict and says what to do. What this file does not know: HTTP, terminals.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from nautile.engine.costs import history_bytes
from nautile.engine.engine import Engine
from nautile.engine.fast import choose_dtype, computes_in
from nautile.engine.options import EngineConfig
from nautile.engine.sampling import SamplingParams
from nautile.model import Transformer
from nautile.protocol import Tokenizer
from nautile.state import StatePool

__all__ = ["GROWTH", "Finding", "examine", "needle_text", "resident_bytes"]

Verdict = Literal["ok", "warn", "bad", "n/a"]
GROWTH = 16 << 20  # bytes of resident memory that repeated work may add: allocators round up
_ANSWER = SamplingParams(max_tokens=12, ignore_eos=True)


@dataclass(frozen=True)
class Finding:
    """One check: what was measured, whether that is right, and what to do if not."""

    name: str
    verdict: Verdict
    measured: str
    fix: str = ""
    figures: dict[str, Any] | None = None


def examine(model: Transformer, tokenizer: Tokenizer | None, options: EngineConfig) -> Iterator[Finding]:
    """Run every check on a model, one after another."""
    engine = Engine(model, replace(options, speculate=False), tokenizer)
    try:
        yield _runner(engine)
        yield _number_format(engine)
        yield _prefix_hits(engine)
        yield _residues(engine)
        yield _state_bytes(engine)
        yield _steady(engine)
    finally:
        engine.close()
    yield _drafts(model, tokenizer, options)


def needle_text(lines: int, number: int) -> str:
    """Text of ``lines`` settings and one to be found; it ends where the value of ``secret_key`` (``number``) comes next."""
    rows = [f"value_{(i * 7919) % 10007} = {(i * 104729) % 99991}" for i in range(lines)]
    rows.insert(lines // 2, f"secret_key = {number}")
    return "\n".join(rows) + "\nsecret_key ="


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


# Checks ---------------------------------------------------------------------------------------------------------------


def _runner(engine: Engine) -> Finding:
    if engine.runner_notes:
        return Finding("runner", "warn", f"{engine.runner_name}; {'; '.join(engine.runner_notes)}", "install g++ (make setup)")
    return Finding("runner", "ok", engine.runner_name)


def _number_format(engine: Engine) -> Finding:
    """What this engine computes in, and what would be faster here."""
    using = computes_in(engine)
    best = choose_dtype()
    figures = {"dtype": using, "rows": engine.options.rows, "fastest": best.dtype}
    text = f"{using}, rows of the state in {engine.options.rows}"
    if using == best.dtype:
        return Finding("number format", "ok", f"{text} ({best.why})", "", figures)
    python = f"EngineConfig(precision={best.dtype!r}, rows={best.dtype!r})"
    fix = f"nothing is wrong: chat, agent, demo and serve take {best.dtype} here; in Python {python}"
    return Finding("number format", "ok", text, fix, figures)


def _prefix_hits(engine: Engine) -> Finding:
    """The same prompt twice, then a conversation that continues it."""
    k = engine.options.snapshot_every
    prompt = _ids(engine, 2 * k + 40)
    first = engine.generate([prompt], _ANSWER)[0]
    again = engine.generate([prompt], _ANSWER)[0]
    longer = [*prompt, *again.ids, *prompt[:9]]
    continued = engine.generate([longer], _ANSWER)[0]
    rate, rest = again.reused_tokens / len(prompt), len(longer) - continued.reused_tokens
    figures = {"prompt": len(prompt), "cached": again.reused_tokens, "rate": round(rate, 4), "continued_recomputed": rest}
    text = f"{rate:.1%} of a repeated {len(prompt)}-token prompt; a continued conversation computes {rest} tokens of 9 new"
    if first.ids != again.ids:
        return Finding("prefix cache", "bad", "a hit changes the answer", "report this: cached state is not exact", figures)
    if again.reused_tokens < 2 * k or rest > 9 + k:
        fix = "raise pool_bytes or snapshot_bytes, leave prefix_cache on, lower snapshot_every"
        return Finding("prefix cache", "bad", text, fix, figures)
    return Finding("prefix cache", "ok", text, "", figures)


def _residues(engine: Engine) -> Finding:
    """At each prompt length mod 4: the engine's greedy tokens against one full pass of the network's modules."""
    number, right, differing = 48213, [], []
    prompts = [_needle(engine, number, residue) for residue in range(4)]
    found = engine.generate(prompts, _ANSWER)
    for prompt, completion in zip(prompts, found, strict=True):
        if engine.tokenizer is not None:
            right.append(engine.tokenizer.decode(completion.ids).strip().startswith(str(number)))
        if _full_pass(engine.model, prompt, completion.ids) != completion.ids:
            differing.append(len(prompt) % 4)
    figures = {"lengths": [len(prompt) for prompt in prompts], "right": right, "differing_residues": differing}
    if differing:
        text = f"at prompt lengths of residue {differing} mod 4 the engine's tokens are not those of a full pass"
        return Finding("needle", "bad", text, 'report this; runner="torch" may be right meanwhile', figures)
    text = f"tokens equal full passes at all residues mod 4 (lengths {len(prompts[0])} to {len(prompts[-1])})"
    if any(right) and not all(right):
        text += f"; the needle is found at residues {[r for r, good in enumerate(right) if good]}"
        return Finding("needle", "warn", text, "the model itself is unsure of this needle: not the engine's fault", figures)
    if right:
        text += "; the needle is found" if all(right) else "; this model does not find the needle at any"
    return Finding("needle", "ok", text, "", figures)


def _state_bytes(engine: Engine) -> Finding:
    """What a sequence of four blocks takes in the pool, against the planner's formula."""
    tokens = 4 * engine.options.block_tokens

    def taken_by_one(pool: StatePool) -> int:
        before = pool.available_blocks
        sequence = pool.open([0] * tokens, "doctor")
        pool.ensure(sequence, tokens - sequence.length)
        blocks = before - pool.available_blocks
        pool.release(sequence, keep=False)
        return blocks * pool.pages.block_bytes

    planned = history_bytes(engine.config, tokens, engine.options.rows)
    taken = engine.with_pool(taken_by_one)
    each = taken / tokens
    figures = {"tokens": tokens, "bytes": taken, "formula": planned, "tail_bytes": engine.pool.pages.slot_bytes}
    text = f"{each:,.1f} bytes a token, formula {planned / tokens:,.1f}; {engine.pool.pages.slot_bytes:,} a live sequence"
    if taken != planned:
        return Finding("state bytes", "bad", text, "report this: the pool and `nautile plan` disagree", figures)
    return Finding("state bytes", "ok", text, "", figures)


def _steady(engine: Engine) -> Finding:
    """The same work again and again: memory must stay, and no step may suddenly compile something."""
    prompts = [_ids(engine, 200, seed) for seed in range(4)]

    def work() -> float:
        began = time.perf_counter()
        engine.generate(prompts, _ANSWER)
        return time.perf_counter() - began

    for _ in range(3):
        work()
    before, seconds = resident_bytes(), [work() for _ in range(6)]
    growth, slowest = resident_bytes() - before, max(seconds) / sorted(seconds)[len(seconds) // 2]
    figures = {"growth_bytes": growth, "slowest_over_median": round(slowest, 2)}
    text = f"{growth / 2**20:+.1f} MiB after warm-up; slowest round {slowest:.1f} times the median"
    if growth > GROWTH:
        return Finding("after warm-up", "bad", text, "memory grows with repeated work: report this with the model", figures)
    if slowest > 5:
        return Finding("after warm-up", "warn", text, "something compiles or the machine is busy: run again", figures)
    return Finding("after warm-up", "ok", text, "", figures)


def _drafts(model: Transformer, tokenizer: Tokenizer | None, options: EngineConfig) -> Finding:
    """Acceptance of the MTP block's drafts, and that they change no token."""
    if not len(model.mtp):
        text = "the checkpoint has no MTP block (DSpark drafters are recognised, not run)"
        return Finding("drafts", "n/a", text, "", {"mtp": False})
    engines = [Engine(model, replace(options, runner="auto", speculate=speculate), tokenizer) for speculate in (True, False)]
    try:
        prompts = [_ids(engines[0], 120, seed) for seed in range(2)]
        params = replace(_ANSWER, max_tokens=40)
        found = [[completion.ids for completion in engine.generate(prompts, params)] for engine in engines]
        stats = engines[0].stats()
    finally:
        for engine in engines:
            engine.close()
    share = stats.accepted_tokens / max(1, stats.drafted_tokens)
    figures = {"drafted": stats.drafted_tokens, "accepted": stats.accepted_tokens, "acceptance": round(share, 4)}
    text = f"{stats.accepted_tokens} of {stats.drafted_tokens} accepted ({share:.0%})"
    if found[0] != found[1]:
        return Finding("drafts", "bad", "speculation changes the answer", "leave speculate off, and report this", figures)
    if not stats.accepted_tokens:
        fix = "leave speculate off: this MTP block was not trained with this trunk, or its weights were lost"
        return Finding("drafts", "bad", text, fix, figures)
    return Finding("drafts", "ok" if share > 0.3 else "warn", text, "" if share > 0.3 else "leave speculate off", figures)


# Parts ----------------------------------------------------------------------------------------------------------------


def _ids(engine: Engine, length: int, seed: int = 0) -> list[int]:
    """A prompt of exactly this length: text where there is a tokenizer, else numbers."""
    if engine.tokenizer is None:
        high = engine.config.vocab_size
        return torch.randint(high, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    lines = (f"def function_{seed}_{i}(value):\n    return value * {i * 37 % 101}\n" for i in range(length))
    ids: list[int] = []
    for line in lines:
        ids += engine.tokenizer.encode(line)
        if len(ids) >= length:
            break
    return ids[:length]


def _needle(engine: Engine, number: int, residue: int) -> list[int]:
    """The needle prompt, cut at its front to a length of this residue mod 4."""
    ids = engine.tokenizer.encode(needle_text(40, number)) if engine.tokenizer is not None else _ids(engine, 523)
    return ids[(len(ids) - residue) % 4 :]


@torch.inference_mode()
def _full_pass(model: Transformer, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    ids = torch.tensor([[*prompt, *answer[:-1]]], device=model.embed.weight.device)
    logits = model(ids)
    best: list[int] = logits[0, len(prompt) - 1 :].argmax(-1).tolist()
    return best
