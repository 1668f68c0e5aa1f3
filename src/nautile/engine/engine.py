"""The engine: one model, one state pool, one thread that batches everything that is asked of it.

``submit`` is for event loops, ``generate`` and ``stream`` for everybody else; all three share the same queue, pool and prefix
cache, and give the same tokens for the same request whatever else is running.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch

from nautile.engine.core import Core, ModelLimits
from nautile.engine.driver import Driver, EventStream
from nautile.engine.memory import check_host_memory, free_host_memory
from nautile.engine.options import EngineConfig
from nautile.engine.request import (
    EngineEvent,
    EngineStats,
    EngineStoppedError,
    Finished,
    Request,
    RequestError,
    TokenSampled,
)
from nautile.engine.runners import computed_by, make_runner
from nautile.engine.sampling import SamplingParams
from nautile.engine.scheduler import Limits, Scheduler
from nautile.model import Transformer
from nautile.protocol import Prompt, Tokenizer
from nautile.state import StatePool
from nautile.state.fingerprint import fingerprint
from nautile.state.pages import HISTORY, TAIL, Pages

if TYPE_CHECKING:
    from nautile.config import ModelConfig

__all__ = ["Completion", "Engine", "EngineConfig", "EngineError"]

Result = TypeVar("Result")


class EngineError(RuntimeError):
    """A request failed inside the engine; the text says how."""


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with. ``ids`` hold the end of sentence when the model produced it."""

    ids: list[int]
    finish_reason: Literal["stop", "length", "cancelled"]
    prompt_tokens: int
    reused_tokens: int  # of the prompt, not computed again
    logprobs: list[TokenSampled] | None = None  # where asked for


class Engine:
    """Runs one model. Every method may be called from any thread."""

    def __init__(
        self, path_or_model: str | Path | Transformer, config: EngineConfig | None = None, tokenizer: Tokenizer | None = None
    ) -> None:
        """Load a model directory (or take a model and, if the caller has text, its tokenizer).

        Raises ValueError when the options do not fit the model.
        """
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
        self.pool = self._make_pool()
        self.runner, self.runner_notes = make_runner(self.model, self.pool, self.options)
        self.pool.computed_by = computed_by(self.runner, self.options)
        if self.options.cache_dir is not None:
            self.pool.open_disk(self.options.cache_dir)
        kinds = self.pool.pages.bytes_by_kind
        self._block_kinds = {name: kinds[name] for name in HISTORY}
        self._slot_kinds = {name: kinds[name] for name in TAIL}
        self._planned = self._planned_bytes()
        self._core = self._make_core()
        self._driver: Driver | None = None
        self._lock = threading.Lock()
        self._closed = False

    # What it is ---------------------------------------------------------------------------------------------------

    @property
    def config(self) -> ModelConfig:
        """The model's configuration; ``config.dialect`` is the prompt dialect it was trained on."""
        return self.model.config

    @property
    def runner_name(self) -> str:
        """Which implementation runs the network."""
        return type(self.runner).__name__

    def stats(self) -> EngineStats:
        """Counters and gauges as of the last step."""
        return self._driver.stats() if self._driver is not None else self._described(self._core.stats())

    # Asking -------------------------------------------------------------------------------------------------------

    async def submit(self, request: Request) -> AsyncIterator[EngineEvent]:
        """See ``AsyncEngine.submit``."""
        self.check(request)
        stream = self._running().stream(request)
        try:
            async for event in stream:
                yield event
        finally:
            await stream.aclose()  # type: ignore[attr-defined]  # at once, not when the collector comes by

    def submit_sync(self, request: Request) -> EventStream:
        """``submit`` for a caller without an event loop; closing the stream cancels."""
        self.check(request)
        return self._running().stream_sync(request)

    def cancel(self, request_id: str) -> None:
        """End a request before the next step; unknown or finished ids are ignored."""
        if self._driver is not None:
            self._driver.cancel(request_id)

    def generate(
        self,
        prompts: Sequence[Prompt | Sequence[int]],
        sampling: SamplingParams | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Continue every prompt until the end of sentence or ``max_tokens``, all of them batched.

        Gives the choices of each prompt in order. ``progress`` is told (finished, of how many) choices. Raises RequestError
        for a prompt that cannot run (nothing is started then), EngineError when a step fails.
        """
        params = sampling or SamplingParams()
        requests = [Request(_ids(prompt), params) for prompt in prompts]
        for request in requests:
            self.check(request)
        streams = self._running().streams_sync(requests)
        total, done = len(requests) * params.n, 0
        completions: list[Completion] = []
        for request, stream in _started(requests, streams):
            collected = _Collected(params)
            for event in stream:
                if collected.take(event) and progress is not None:
                    done += 1
                    progress(done, total)
            completions += collected.completions(request)
        return completions

    def stream(self, prompt_ids: Sequence[int], sampling: SamplingParams | None = None) -> Iterator[int]:
        """Yield new token ids (of the first choice), the end of sentence included. Raises as ``generate``.

        Closing the iterator early is safe; the tokens taken in so far are kept for a prompt that continues them.
        """
        params = replace(sampling or SamplingParams(), n=1)
        events = self.submit_sync(Request(tuple(prompt_ids), params))
        try:
            for event in events:
                if isinstance(event, TokenSampled):
                    yield event.token
                elif isinstance(event, Finished) and event.reason == "error":
                    raise EngineError(event.error or "the request failed")
        finally:
            events.close()

    def check(self, request: Request) -> None:
        """Raises RequestError when the request cannot run on this model and pool."""
        config, ids = self.config, request.prompt_ids
        if not ids:
            raise RequestError("the prompt is empty: at least one token is needed")
        if min(ids) < 0 or max(ids) >= config.vocab_size:
            raise RequestError(f"token ids must lie in 0..{config.vocab_size - 1}, got {min(ids)}..{max(ids)}")
        if max(request.sampling.logit_bias, default=0) >= config.vocab_size:
            most = max(request.sampling.logit_bias)
            raise RequestError(f"logit_bias maps token ids in 0..{config.vocab_size - 1}, got {most}")
        if len(ids) >= config.max_position_embeddings:
            most = config.max_position_embeddings - 1
            raise RequestError(f"the prompt has {len(ids):,} tokens; this model takes {most:,}: shorten it")
        capacity = (self.pool.options.blocks - 1) * self.options.block_tokens
        if len(ids) >= capacity:
            raise RequestError(
                f"the prompt has {len(ids):,} tokens; the state pool holds {capacity:,}: shorten it or raise pool_bytes"
            )

    # Ending -------------------------------------------------------------------------------------------------------

    def with_pool(self, action: Callable[[StatePool], Result]) -> Result:
        """Run something on the pool between two steps, in the engine's thread."""
        results: list[Result] = []
        self._running().run(lambda: results.append(action(self.pool)))
        return results[0]

    def close(self) -> None:
        """Cancel what runs, end the thread, write the disk tier if there is one, forget the state. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._driver is not None:
                self._driver.close()
        self.pool.close()

    # Parts --------------------------------------------------------------------------------------------------------

    def _running(self) -> Driver:
        with self._lock:
            if self._closed:
                raise EngineStoppedError("the engine is closed: make a new one")
            if self._driver is None:
                self._driver = Driver(self._core, self._described)
            return self._driver

    def _make_pool(self) -> StatePool:
        name = fingerprint(self.config, self.model.state_dict()) if self.options.cache_dir is not None else ""
        sizes = replace(self.options.pool(self.config), disk=None)  # opened when it is known who computes
        wanted = sizes.snapshot_bytes + sizes.host_bytes
        if torch.device(self.options.device).type == "cpu":  # a GPU gives all of its memory at once, or says no
            pages = Pages(self.config, sizes, "meta")
            wanted += sizes.blocks * pages.block_bytes + sizes.slots * pages.slot_bytes
        check_host_memory(wanted, "pool_bytes, snapshot_bytes and host_bytes", free_host_memory())
        return StatePool(self.config, sizes, self.options.device, name)

    def _planned_bytes(self) -> float:
        """Bytes of history a token, by the formula of ``nautile plan``."""
        from nautile.engine.costs import history_bytes  # noqa: PLC0415  # as above

        size = self.options.block_tokens
        return history_bytes(self.config, size, self.options.rows) / size

    def _make_core(self) -> Core:
        options = self.options
        limits = Limits(
            options.token_budget,
            options.max_running,
            options.snapshot_every,
            reserve=options.block_tokens,
            drafts=int(options.speculate),
        )
        model = ModelLimits(self.config.eos_token_id, self.config.max_position_embeddings)
        return Core(Scheduler(self.pool, limits), self.runner, model, options.speculate)

    def _described(self, stats: EngineStats) -> EngineStats:
        kinds = self._bytes_used()
        limit = self.options.pool_bytes + self.options.snapshot_bytes
        return replace(
            stats,
            bytes_by_kind=kinds,
            bytes_total=sum(kinds.values()),
            bytes_limit=limit,
            bytes_per_token=self._planned,
            block_tokens=self.options.block_tokens,
        )

    def _bytes_used(self) -> dict[str, int]:
        """Bytes of the blocks and slots that are not free, by kind, and of the snapshots."""
        pages = self.pool.pages
        blocks, slots = pages.options.blocks - len(pages.free_blocks), pages.options.slots - len(pages.free_slots)
        used = {name: size * blocks // pages.options.blocks for name, size in self._block_kinds.items()}
        used |= {name: size * slots // pages.options.slots for name, size in self._slot_kinds.items()}
        return used | {"snapshots": self.pool.cache.bytes["device"]}


class _Collected:
    """The events of one request, sorted by choice."""

    def __init__(self, params: SamplingParams) -> None:
        self.tokens: list[list[TokenSampled]] = [[] for _ in range(params.n)]
        self.ends: list[Finished | None] = [None] * params.n
        self.wants_logprobs = params.logprobs is not None

    def take(self, event: EngineEvent) -> bool:
        """Note an event; says whether a choice has ended. Raises EngineError when one has failed."""
        if isinstance(event, TokenSampled):
            self.tokens[event.choice].append(event)
        if not isinstance(event, Finished):
            return False
        if event.reason == "error":
            raise EngineError(event.error or "the request failed")
        self.ends[event.choice] = event
        return True

    def completions(self, request: Request) -> list[Completion]:
        """One for each choice."""
        made = []
        for tokens, end in zip(self.tokens, self.ends, strict=True):
            assert end is not None and end.reason != "error"
            ids = [event.token for event in tokens]
            logprobs = tokens if self.wants_logprobs else None
            made.append(Completion(ids, end.reason, len(request.prompt_ids), end.usage.cached_tokens, logprobs))
        return made


def _started(requests: list[Request], streams: list[EventStream]) -> Iterator[tuple[Request, EventStream]]:
    """Each request with its events; all of them are cancelled when the caller stops early."""
    try:
        yield from zip(requests, streams, strict=True)
    finally:
        for stream in streams:
            stream.close()


def _ids(prompt: Prompt | Sequence[int]) -> tuple[int, ...]:
    return tuple(prompt.ids if isinstance(prompt, Prompt) else prompt)
