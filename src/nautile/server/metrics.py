"""Figures for Prometheus: counted here per request, read from the engine when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nautile.engine.request import EngineStats
from nautile.server.memory import MemoryStats

__all__ = ["Metrics"]

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)


class Metrics:
    """The figures of one server, in a registry of their own."""

    def __init__(self, stats: Callable[[], EngineStats], memory: Callable[[], MemoryStats]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("nautile_requests", "HTTP requests", ["path", "status"], registry=self.registry)
        self.finished = Counter("nautile_finished", "Turns by how they ended", ["reason"], registry=self.registry)
        self.tokens = Counter("nautile_tokens", "Tokens by kind", ["kind"], registry=self.registry)
        self.first = Histogram(
            "nautile_time_to_first_token_seconds", "From the request to its first token", buckets=_FIRST, registry=self.registry
        )
        self.each = Histogram(
            "nautile_time_per_output_token_seconds", "Mean between tokens of a turn", buckets=_EACH, registry=self.registry
        )
        self.registry.register(_EngineFigures(stats))
        ProcessCollector(registry=self.registry)  # resident memory, among others
        self.registry.register(_MemoryFigures(memory))

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self.registry)


class _EngineFigures(Collector):
    """The engine's own counters, read at every scrape."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Every figure of ``EngineStats``."""
        stats = self._stats()
        gauges = {
            "nautile_running": ("Sequences in the batch", stats.running),
            "nautile_waiting": ("Requests that wait for the engine", stats.waiting),
            "nautile_state_bytes_total": ("Bytes of all state", stats.bytes_total),
            "nautile_state_bytes_limit": ("Bytes that state may take", stats.bytes_limit),
            "nautile_state_plan_bytes_per_token": ("Bytes of history a token, by the planner", stats.bytes_per_token),
            "nautile_state_block_tokens": ("Tokens of a block of history", stats.block_tokens),
            "nautile_cache_hit_rate": ("Prompt tokens not computed again", stats.cached_tokens / max(stats.prompt_tokens, 1)),
            "nautile_draft_acceptance": ("Drafted tokens accepted", stats.accepted_tokens / max(stats.drafted_tokens, 1)),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        counters = {
            "nautile_engine_prompt_tokens": ("Prompt tokens taken in", stats.prompt_tokens),
            "nautile_engine_cached_tokens": ("Prompt tokens not computed again", stats.cached_tokens),
            "nautile_engine_completion_tokens": ("Tokens sampled", stats.completion_tokens),
            "nautile_engine_drafted_tokens": ("Tokens drafted", stats.drafted_tokens),
            "nautile_engine_accepted_tokens": ("Drafts accepted", stats.accepted_tokens),
            "nautile_engine_steps": ("Steps of the engine", stats.steps),
            "nautile_engine_preemptions": ("Sequences that had to give way", stats.preemptions),
        }
        for name, (text, count) in counters.items():
            yield CounterMetricFamily(name, text, value=count)
        kinds = GaugeMetricFamily("nautile_state_bytes", "Bytes of state by kind", labels=["kind"])
        for kind, size in stats.bytes_by_kind.items():
            kinds.add_metric([kind], size)
        yield kinds


class _MemoryFigures(Collector):
    """What the memory of reasoning gave back, and what it could not: a prompt without it is another prompt."""

    def __init__(self, stats: Callable[[], MemoryStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Every figure of ``MemoryStats``."""
        stats = self._stats()
        yield GaugeMetricFamily("nautile_reasoning_bytes", "Bytes of remembered reasoning", value=stats.nbytes)
        yield GaugeMetricFamily("nautile_reasoning_answers", "Answers whose reasoning is remembered", value=stats.answers)
        counters = {
            "restored": ("Assistant turns whose reasoning was put back", stats.restored),
            "missing": ("Assistant turns that came without reasoning that is not remembered", stats.missing),
            "evicted": ("Answers whose reasoning had to give way", stats.evicted),
        }
        for name, (text, count) in counters.items():
            yield CounterMetricFamily(f"nautile_reasoning_{name}", text, value=count)
