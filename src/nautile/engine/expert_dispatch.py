"""Who computes the experts that are not on the card: streamed to it, or the host's cores, so that both finish together.

For every layer of a step the router's choice arrives in the mail. Experts on the card need nothing. Of the others, every
expert goes whole to whichever of the two ends first by the measured seconds an expert: the link to the card, or the host's
cores. While a layer's attention runs neither has anything to do; with ``ahead`` the link then brings experts that the layer's
router will probably choose. A wrong guess costs time on the link and nothing else: what is computed is what was chosen.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nautile.engine.decode_step import Mail
from nautile.engine.expert_store import ExpertStore
from nautile.kernels.host import ExpertJob, HostTeam

__all__ = ["Dispatch", "DispatchCounts", "Speeds", "divide", "fitted", "measured_speeds", "open_dispatch"]


@dataclass(frozen=True)
class Speeds:
    """Seconds an expert takes: over the link, and on the host's cores (infinite: not used), which need ``start`` seconds more
    for the first."""

    link: float
    host: float
    start: float = 0.0


@dataclass
class DispatchCounts:
    """What became of the chosen (layer, expert) of all steps so far. Written by ``Dispatch``."""

    on_card: int = 0
    streamed: int = 0
    on_host: int = 0
    foreseen: int = 0  # of the streamed ones, those that were on their way before they were chosen
    in_vain: int = 0  # copied ahead, and not chosen

    @property
    def hit_rate(self) -> float:
        """Share of the chosen experts that were on the card; each counts once a layer and step."""
        return self.on_card / max(1, self.on_card + self.streamed + self.on_host)


def divide(
    missing: Sequence[tuple[int, int]], speeds: Speeds, room: int | None = None, busy: float = 0.0
) -> tuple[list[int], list[int]]:
    """(expert, tokens that chose it) -> experts to stream, experts for the host. Each goes where it ends earlier; on the host
    an expert of several tokens is read once. Experts of many tokens are placed first; at most ``room`` are streamed. The
    link is ``busy`` for so many seconds yet."""
    link, host = busy, speeds.start
    streamed: list[int] = []
    computed: list[int] = []
    for expert, tokens in sorted(missing, key=lambda item: (-item[1], item[0])):
        slower = speeds.host * (1 + 0.25 * (tokens - 1))  # more arithmetic on the same bytes
        if link + speeds.link <= host + slower and (room is None or len(streamed) < room):
            link += speeds.link
            streamed.append(expert)
        else:
            host += slower
            computed.append(expert)
    return streamed, computed


def measured_speeds(store: ExpertStore, team: HostTeam | None) -> Speeds:
    """Seconds an expert takes over the link and on the host's cores, measured while both are busy (they share memory)."""
    away = [(layer, int(e)) for layer in range(len(store.row)) for e in (store.row[layer] >= 0).nonzero().flatten()]
    random.Random(0).shuffle(away)
    on_card = store.device.type == "cuda"
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_card else []
    copied = away[:_COPIES]
    began = time.perf_counter()
    if events:
        events[0].record()
    for layer, expert in copied:
        store.stream(layer, [expert])
    if events:
        events[1].record()
    link = time.perf_counter() - began
    host = _host_seconds(store, team, away[_COPIES:] or away) if team is not None else {}
    if events:
        torch.cuda.synchronize()
        link = events[0].elapsed_time(events[1]) / 1e3
    each, start = fitted(host) if host else (math.inf, 0.0)
    return Speeds(link / max(1, len(copied)), each, start)


def _host_seconds(store: ExpertStore, team: HostTeam, away: list[tuple[int, int]]) -> dict[int, float]:
    """Median seconds of one to four experts of one token on the host, by their number."""
    config = store.config
    x, out = torch.randn(1, config.hidden_size).bfloat16(), torch.empty(1, config.hidden_size)
    spent: dict[int, list[float]] = {}
    at = 0
    for turn in range(_ROUNDS * _TOGETHER):
        count = turn % _TOGETHER + 1
        if count > len(away):
            continue
        at = at if at + count <= len(away) else 0
        jobs = [ExpertJob(store.address(layer, expert), 0, 1.0) for layer, expert in away[at : at + count]]
        at += count
        start = time.perf_counter()
        team.start(jobs, x, out)
        team.wait()
        spent.setdefault(count, []).append(time.perf_counter() - start)
    return {count: statistics.median(times) for count, times in spent.items()}


def fitted(seconds: dict[int, float]) -> tuple[float, float]:
    """(seconds an expert, seconds before the first): the line through these times by number of experts, least squares; neither
    is negative."""
    mean_count, mean_time = statistics.fmean(seconds), statistics.fmean(seconds.values())
    spread = sum((count - mean_count) ** 2 for count in seconds)
    slope = sum((count - mean_count) * (time_ - mean_time) for count, time_ in seconds.items()) / spread if spread else math.inf
    through_zero = mean_time / mean_count
    each = min(max(slope, 0.0), through_zero)
    return each, mean_time - each * mean_count


_COPIES = 256  # experts whose copying is timed
_TOGETHER, _ROUNDS = 4, 12  # most experts on the host at once when it is timed, and how often each number is


def open_dispatch(store: ExpertStore, threads: int, tokens: int, ahead: int = 0) -> Dispatch | None:
    """What serves a store's experts to steps of up to ``tokens`` sequences, its speeds measured; None when all lie on the card.

    ``threads`` of the host compute experts, with 0 all are streamed. ``ahead``: see ``Dispatch``. Raises NativeUnavailable
    without a C++ compiler, ValueError for more copies ahead than there is room for.
    """
    if store.all_on_card:
        return None
    config, team = store.config, None
    if threads:
        sizes = (config.hidden_size, config.moe_intermediate_size, config.swiglu_limit)
        team = HostTeam(threads, *sizes, tokens=tokens, pairs=tokens * config.num_experts_per_tok)
    return Dispatch(store, team, measured_speeds(store, team), ahead)


class Dispatch:
    """One store, one team of host threads (None: everything is streamed), one stream for copies.

    ``ahead`` experts a layer at most are copied before they are chosen. They have staging slots of their own, two sets of
    them in turn: a layer's copies begin while the card may still read those of the layer before.
    """

    def __init__(self, store: ExpertStore, team: HostTeam | None, speeds: Speeds, ahead: int = 0) -> None:
        """Raises ValueError for a negative ``ahead``, or when half of the staging slots would serve it."""
        self._room = store.placement.staging - 2 * ahead
        if ahead < 0 or (ahead and self._room < store.placement.staging // 2):
            raise ValueError(f"{ahead} experts ahead take {2 * ahead} of {store.placement.staging} staging slots: give fewer")
        self.store, self.team, self.speeds, self.ahead = store, team, speeds, ahead
        self._coming: dict[int, int] = {}  # expert -> staging slot of what was copied ahead for the layer that comes
        self._link_free = 0.0  # when the link has brought it, by perf_counter and the measured speed
        self.counts = DispatchCounts()
        self.used = torch.zeros_like(store.slot).numpy()  # [layers, E]: how often each was chosen, for the next placement
        self._local = [row.tolist() for row in store.local]
        self.copies = torch.cuda.Stream(store.device) if store.device.type == "cuda" else None
        self._working = False

    def most_tokens(self) -> int:
        """Tokens of a step whose experts can be served whatever they choose."""
        store, chosen = self.store, self.store.config.num_experts_per_tok
        away = store.config.n_routed_experts - min(map(len, store.placement.resident))
        if self.team is not None:
            return min(self.team.most[0], self.team.most[1] // chosen)
        return 1 << 30 if away <= self._room else self._room // chosen

    def foresee(self, layer: int, mail: Mail) -> None:
        """Start copying experts that the mail says layer ``layer`` will probably choose: of those that are not on the card the
        ones that most tokens are thought to choose, among equals those that the router likes best."""
        here = self._local[layer]
        tokens: dict[int, int] = {}
        for choice in zip(*mail.ahead.tolist(), strict=True):
            for expert in choice:
                if here[expert] < 0:
                    tokens[expert] = tokens.get(expert, 0) + 1
        experts = sorted(tokens, key=lambda expert: -tokens[expert])[: self.ahead]
        first = self._room + layer % 2 * self.ahead
        self._coming = {expert: first + place for place, expert in enumerate(experts)}
        self._stream(layer, experts, first)
        self._link_free = max(time.perf_counter(), self._link_free) + len(experts) * self.speeds.link

    def begin(self, layer: int, mail: Mail) -> None:
        """Read the router's choice, start copies and host work, and write slots and shares."""
        rows, weights = mail.experts.tolist(), mail.weights.tolist()
        here = self._local[layer]
        tokens: dict[int, int] = {}
        for row in rows:
            for expert in row:
                tokens[expert] = tokens.get(expert, 0) + 1
        for expert, number in tokens.items():
            self.used[layer, expert] += number
        slot_of = {expert: slot for expert, slot in self._coming.items() if expert in tokens}
        away = [(expert, number) for expert, number in tokens.items() if here[expert] < 0]
        missing = [(expert, number) for expert, number in away if expert not in slot_of]
        busy = max(0.0, self._link_free - time.perf_counter()) if self._coming else 0.0
        speeds = self.speeds if self.team is not None else Speeds(self.speeds.link, math.inf)
        streamed, computed = divide(missing, speeds, self._room if self.team is not None else None, busy)
        self.counts.on_card += len(tokens) - len(away)
        self.counts.streamed += len(streamed) + len(slot_of)
        self.counts.on_host += len(computed)
        self.counts.foreseen += len(slot_of)
        self.counts.in_vain += len(self._coming) - len(slot_of)
        self._coming = {}
        self._start(layer, mail, rows, weights, computed)
        self._stream(layer, streamed, 0)
        slot_of |= {expert: slot for slot, expert in enumerate(streamed)}
        slots, shares = mail.arrays
        slots[:] = [[slot_of.get(expert, 0) for expert in row] for row in rows]
        shares[:] = [
            [weight if expert in slot_of else 0.0 for expert, weight in zip(*pair, strict=True)]
            for pair in zip(rows, weights, strict=True)
        ]

    def _stream(self, layer: int, experts: list[int], first: int) -> None:
        if self.copies is None:
            self.store.stream(layer, experts, first)
        elif experts:
            with torch.cuda.stream(self.copies):
                self.store.stream(layer, experts, first)

    def _start(self, layer: int, mail: Mail, rows: list[list[int]], weights: list[list[float]], away: list[int]) -> None:
        if self.team is None or not away:
            mail.sums.zero_()
            return
        jobs = [
            ExpertJob(self.store.address(layer, expert), token, weights[token][row.index(expert)])
            for expert in away
            for token, row in enumerate(rows)
            if expert in row
        ]
        self.team.start(jobs, mail.x, mail.sums)
        self._working = True

    def end(self) -> None:
        """Wait for the host's work; let the card wait for the copies."""
        if self._working and self.team is not None:
            self.team.wait()
            self._working = False
        if self.copies is not None:
            torch.cuda.current_stream().wait_stream(self.copies)
