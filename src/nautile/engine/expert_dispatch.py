"""Who computes the experts that are not on the card: streamed to it, or the host's cores, so that both finish together.

For every layer of a step the router's choice arrives in the mail. Experts on the card need nothing. Of the others, every
expert goes whole to whichever of the two ends first by the measured seconds an expert: the link to the card, or the host's
cores.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nautile.engine.decode_step import Mail
from nautile.engine.expert_store import ExpertStore
from nautile.kernels.host import ExpertJob, HostTeam

__all__ = ["Dispatch", "DispatchCounts", "Speeds", "divide", "measured_speeds", "open_dispatch"]


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

    @property
    def hit_rate(self) -> float:
        """Share of the chosen experts that were on the card; each counts once a layer and step."""
        return self.on_card / max(1, self.on_card + self.streamed + self.on_host)


def divide(missing: Sequence[tuple[int, int]], speeds: Speeds, room: int | None = None) -> tuple[list[int], list[int]]:
    """(expert, tokens that chose it) -> experts to stream, experts for the host. Each goes where it ends earlier; on the host
    an expert of several tokens is read once. Experts of many tokens are placed first; at most ``room`` are streamed."""
    link, host = 0.0, speeds.start
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
    copied = away[:256]
    began = time.perf_counter()
    if events:
        events[0].record()
    for layer, expert in copied:
        store.stream(layer, [expert])
    if events:
        events[1].record()
    link = time.perf_counter() - began
    two, one = (_host_seconds(store, team, away[-60:], count) if team is not None else math.inf for count in (2, 1))
    if events:
        torch.cuda.synchronize()
        link = events[0].elapsed_time(events[1]) / 1e3
    if team is None:
        return Speeds(link / max(1, len(copied)), math.inf)
    more = max(two - one, 0.0)  # what a second expert adds
    return Speeds(link / max(1, len(copied)), more, max(one - more, 0.0))


def _host_seconds(store: ExpertStore, team: HostTeam, away: list[tuple[int, int]], count: int) -> float:
    """Mean seconds of ``count`` experts of one token on the host."""
    config = store.config
    x, out = torch.randn(1, config.hidden_size).bfloat16(), torch.empty(1, config.hidden_size)
    spent, rounds = 0.0, 0
    for at in range(0, len(away) - count + 1, count):
        jobs = [ExpertJob(store.address(layer, expert), 0, 1.0) for layer, expert in away[at : at + count]]
        start = time.perf_counter()
        team.start(jobs, x, out)
        team.wait()
        spent += time.perf_counter() - start
        rounds += 1
    return spent / max(1, rounds)


def open_dispatch(store: ExpertStore, threads: int, tokens: int) -> Dispatch | None:
    """What serves a store's experts to steps of up to ``tokens`` sequences, its speeds measured; None when all lie on the card.

    ``threads`` of the host compute experts, with 0 all are streamed. Raises NativeUnavailable without a C++ compiler.
    """
    if store.all_on_card:
        return None
    config, team = store.config, None
    if threads:
        sizes = (config.hidden_size, config.moe_intermediate_size, config.swiglu_limit)
        team = HostTeam(threads, *sizes, tokens=tokens, pairs=tokens * config.num_experts_per_tok)
    return Dispatch(store, team, measured_speeds(store, team))


class Dispatch:
    """One store, one team of host threads (None: everything is streamed), one stream for copies."""

    def __init__(self, store: ExpertStore, team: HostTeam | None, speeds: Speeds) -> None:
        self.store, self.team, self.speeds = store, team, speeds
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
        return 1 << 30 if away <= store.placement.staging else store.placement.staging // chosen

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
        missing = [(expert, number) for expert, number in tokens.items() if here[expert] < 0]
        room = self.store.placement.staging
        if self.team is not None:
            streamed, computed = divide(missing, self.speeds, room)
        else:
            streamed, computed = divide(missing, Speeds(self.speeds.link, math.inf))
        self.counts.on_card += len(tokens) - len(missing)
        self.counts.streamed += len(streamed)
        self.counts.on_host += len(computed)
        self._start(layer, mail, rows, weights, computed)
        self._stream(layer, streamed)
        slot_of = {expert: slot for slot, expert in enumerate(streamed)}
        slots, shares = mail.arrays
        slots[:] = [[slot_of.get(expert, 0) for expert in row] for row in rows]
        shares[:] = [
            [weight if expert in slot_of else 0.0 for expert, weight in zip(*pair, strict=True)]
            for pair in zip(rows, weights, strict=True)
        ]

    def _stream(self, layer: int, experts: list[int]) -> None:
        if self.copies is None:
            self.store.stream(layer, experts)
        elif experts:
            with torch.cuda.stream(self.copies):
                self.store.stream(layer, experts)

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
