"""Prompts in, tokens out: chunked prefill, one-token decode, and reuse of states whose tokens are a prefix of the next prompt.

This is the small engine: one sequence at a time. What it keeps between calls is exact, because a kept state is the state
after precisely the tokens it is filed under.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from nautile.engine.interim import Interim
from nautile.engine.request import EngineEvent, EngineStats, Request
from nautile.engine.sampling import SamplingParams, sample
from nautile.model import Transformer
from nautile.model.decode import TokenDecoder, can_decode
from nautile.protocol import Prompt, Tokenizer
from nautile.state import State

if TYPE_CHECKING:
    from nautile.config import ModelConfig

__all__ = ["Completion", "Engine", "EngineConfig"]


@dataclass(frozen=True)
class EngineConfig:
    """Options of an engine. ``kept_states`` bounds the memory of prefix reuse; ``threads`` None leaves PyTorch's choice."""

    prefill_chunk: int = 512
    kept_states: int = 6
    threads: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.prefill_chunk < 1 or self.kept_states < 0:
            raise ValueError("prefill_chunk must be positive and kept_states not negative")


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with. ``ids`` hold the end of sentence when the model produced it."""

    ids: list[int]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    reused_tokens: int  # of the prompt, not computed again


@dataclass
class _Kept:
    """A state and the tokens it has taken in. Written by the engine, in order of use."""

    ids: list[int]
    state: State
    logits: Tensor | None = None  # of the token after ``ids``


@dataclass
class _Statistics:
    """Counters for reports. Written by the engine."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0


_SHORTEST_KEPT = 64  # tokens; a shorter common prefix is cheaper to compute again than to keep


class Engine:
    """Runs one model. Not thread-safe."""

    def __init__(
        self, path_or_model: str | Path | Transformer, config: EngineConfig | None = None, tokenizer: Tokenizer | None = None
    ) -> None:
        """Load a model directory (or take a model and, if the caller has text, its tokenizer)."""
        self.options = config or EngineConfig()
        if self.options.threads is not None:
            torch.set_num_threads(self.options.threads)
        if isinstance(path_or_model, Transformer):
            self.model, self.tokenizer = path_or_model, tokenizer
        else:
            from nautile.checkpoint import load_model, resolve_model  # noqa: PLC0415  # checkpoint code only when needed

            path = resolve_model(path_or_model)
            self.model = load_model(path, device=self.options.device)
            self.tokenizer = tokenizer or Tokenizer.load(path)
        self.model.eval().requires_grad_(False)
        self._decoder = TokenDecoder(self.model) if can_decode(self.model) else None
        self.statistics = _Statistics()
        self._live: _Kept | None = None  # the last sequence
        self._prefixes: list[_Kept] = []  # copies at points where prompts parted, least recently used first
        self._interim: Interim | None = None

    @property
    def config(self) -> ModelConfig:
        """The model's configuration; ``config.dialect`` is the prompt dialect it was trained on."""
        return self.model.config

    def generate(self, prompts: Sequence[Prompt | Sequence[int]], sampling: SamplingParams | None = None) -> list[Completion]:
        """Continue each prompt until the end of sentence or ``max_tokens``."""
        params = sampling or SamplingParams()
        completions = []
        for prompt in prompts:
            ids = prompt.ids if isinstance(prompt, Prompt) else list(prompt)
            before = self.statistics.reused_tokens
            out = list(self.stream(ids, params))
            stopped = bool(out) and out[-1] == self.config.eos_token_id
            reused = self.statistics.reused_tokens - before
            completions.append(Completion(out, "stop" if stopped else "length", len(ids), reused))
        return completions

    @torch.inference_mode()
    def stream(self, prompt_ids: Sequence[int], sampling: SamplingParams | None = None) -> Iterator[int]:
        """Yield new token ids, the end of sentence included. Raises ValueError for an empty prompt or one that does not fit.

        Closing the iterator early is safe; the tokens taken in so far are kept for a prompt that continues them.
        """
        params, ids = sampling or SamplingParams(), list(prompt_ids)
        room = self.config.max_position_embeddings - len(ids)
        if room < 1:
            raise ValueError(f"the prompt has {len(ids)} tokens; this model takes {self.config.max_position_embeddings - 1}")
        kept = self._prefill(ids)
        for _ in range(min(params.max_tokens, room)):
            assert kept.logits is not None
            token = sample(kept.logits[0], params, len(kept.ids))
            self.statistics.new_tokens += 1
            yield token
            if token == self.config.eos_token_id:
                return
            self._feed(kept, [token])

    def submit(self, request: Request) -> AsyncIterator[EngineEvent]:
        """See ``AsyncEngine.submit``."""
        if self._interim is None:
            self._interim = Interim(self)
        return self._interim.submit(request)

    def cancel(self, request_id: str) -> None:
        """See ``AsyncEngine.cancel``."""
        if self._interim is not None:
            self._interim.cancel(request_id)

    def stats(self) -> EngineStats:
        """See ``AsyncEngine.stats``."""
        return self._interim.stats() if self._interim is not None else EngineStats()

    def close(self) -> None:
        """Forget every kept state."""
        if self._interim is not None:
            self._interim.close()
        self._live = None
        self._prefixes.clear()

    def _prefill(self, ids: list[int]) -> _Kept:
        """The state after ``ids``, continuing the longest kept one. Where this prompt parts from the last, a copy is kept."""
        if not ids:
            raise ValueError("the prompt is empty: at least one token is needed")
        previous = self._live.ids if self._live else []
        kept = self._longest(ids)
        reused = len(kept.ids)
        shared = _common(ids, previous)
        if self.options.kept_states and max(reused, _SHORTEST_KEPT) < shared < len(ids):
            self._feed(kept, ids[reused:shared])
            self._prefixes.append(_Kept(list(kept.ids), kept.state.fork()))
            del self._prefixes[: -self.options.kept_states]
        self._feed(kept, ids[len(kept.ids) :])
        self.statistics.prompt_tokens += len(ids)
        self.statistics.reused_tokens += reused
        self._live = kept
        return kept

    def _longest(self, ids: list[int]) -> _Kept:
        """The live sequence if the prompt continues it, else a copy of the longest kept prefix, else an empty state."""
        live = self._live
        if live is not None and len(live.ids) < len(ids) and ids[: len(live.ids)] == live.ids:
            return live
        fitting = [kept for kept in self._prefixes if len(kept.ids) < len(ids) and ids[: len(kept.ids)] == kept.ids]
        if not fitting:
            return _Kept([], self.model.new_state(1))
        best = max(fitting, key=lambda kept: len(kept.ids))
        self._prefixes.append(self._prefixes.pop(self._prefixes.index(best)))  # most recently used last
        return _Kept(list(best.ids), best.state.fork())

    def _feed(self, kept: _Kept, ids: list[int]) -> None:
        if len(ids) == 1 and self._decoder is not None:
            kept.logits = self._decoder.step(ids[0], kept.state)
            kept.ids = kept.ids + ids
            return
        device = self.model.embed.weight.device
        for start in range(0, len(ids), self.options.prefill_chunk):
            part = ids[start : start + self.options.prefill_chunk]
            kept.logits = self.model(torch.tensor([part], device=device), state=kept.state, logits="last")
            kept.ids = kept.ids + part


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
