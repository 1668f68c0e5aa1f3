"""The runner for packed weights: single tokens through decode pieces held in CUDA graphs, prompts through ``prefill``.

Between two pieces the host reads which experts were chosen, and sends what the card lacks (``expert_dispatch``). A piece is
captured once for a batch size and a capacity of tokens (powers of two) and replayed from then on: nothing is compiled or
allocated after that. A fault of the card ends the step with an error that names it; no token comes out of a step that failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nautile.engine.decode_step import DecodeStep, Mail, StepOptions
from nautile.engine.expert_dispatch import Dispatch
from nautile.engine.packed_weights import PackedNetwork, PackedWeights, network
from nautile.engine.plan import Piece, Plan
from nautile.engine.prefill import Prefill
from nautile.engine.runner import TorchRunner
from nautile.kernels.decode.linear import MOST_TOKENS
from nautile.state.pool import StatePool

__all__ = ["CardError", "GPURunner", "HostTimes"]

_ALIKE = 32  # sequences of a step up to which the same kernels serve any number of them
_LEAST = 1024  # tokens of the smallest capacity


@dataclass
class HostTimes:
    """Seconds that the host spent between pieces, summed over layers and steps. Written by the runner.

    foresee: until the guess is there, and starting its copies; wait_card: until the router's choice is there; decide: dividing
    experts, starting copies and threads; launch: of the shared expert and the resident ones; wait_host: until the host's own
    experts are done.
    """

    foresee: float = 0.0
    wait_card: float = 0.0
    decide: float = 0.0
    launch: float = 0.0
    wait_host: float = 0.0
    layers: int = 0

    def add(self, foresee: float, wait_card: float, decide: float, launch: float, wait_host: float) -> None:
        """One layer more."""
        self.foresee += foresee
        self.wait_card += wait_card
        self.decide += decide
        self.launch += launch
        self.wait_host += wait_host
        self.layers += 1

    def microseconds_a_layer(self) -> dict[str, float]:
        """Means by part."""
        parts = ("foresee", "wait_card", "decide", "launch", "wait_host")
        return {name: round(getattr(self, name) / max(1, self.layers) * 1e6, 1) for name in parts}


class CardError(RuntimeError):
    """The card, or a kernel that it cannot run, failed in the middle of a step; nothing of the step counts."""


class GPURunner(TorchRunner):
    """Packed weights over a pool of packed rows, on the card that holds both (or, for tests, on the CPU)."""

    def __init__(
        self,
        weights: PackedWeights,
        pool: StatePool,
        dispatch: Dispatch | None = None,
        model: PackedNetwork | None = None,
        *,
        slice_tokens: int = 2048,
        options: StepOptions | None = None,
    ) -> None:
        """``dispatch`` serves experts that are not on the card; ``model`` are the modules over the weights, if they exist;
        ``slice_tokens`` of a prompt go through a layer's attention at once.

        Raises ValueError for rows that are not packed, and without a dispatch when experts are in host memory.
        """
        if pool.options.rows != "packed":
            raise ValueError(f'packed weights run with rows="packed", this pool has {pool.options.rows!r}')
        if dispatch is None and not weights.store.all_on_card:
            raise ValueError("experts are in host memory: give a dispatch")
        self.weights, self.dispatch = weights, None if weights.store.all_on_card else dispatch
        self.device = weights.embed.device
        model = model or network(weights)
        super().__init__(model, pool)
        self._options = options or StepOptions()
        self._prefill = Prefill(model, pool, slice_tokens)
        self._most = min(MOST_TOKENS, self.dispatch.most_tokens()) if self.dispatch is not None else MOST_TOKENS
        if self._options.deterministic:
            if self.dispatch is not None and self.dispatch.team is not None:
                raise ValueError("deterministic steps compute no expert on the host: open the dispatch with 0 threads")
            self._most = min(self._most, _ALIKE)
        if self._most < 1:
            raise ValueError("one token may choose more experts than can be streamed: give the placement more staging slots")
        self._steps: dict[tuple[int, int], _Graphs] = {}

    @torch.inference_mode()
    def step(self, plan: Plan) -> Tensor:
        """See ``Runner.step``."""
        single = [index for index, piece in enumerate(plan.pieces) if len(piece.ids) == 1]
        rows: dict[int, Tensor] = {}
        try:
            for first in range(0, len(single), self._most):
                group = single[first : first + self._most]
                rows.update(zip(group, self._decode([plan.pieces[index] for index in group]).unsqueeze(1), strict=True))
            for index, piece in enumerate(plan.pieces):
                if index not in rows:
                    streams = self._prefill.run(piece)
                    wanted = streams[len(streams) - piece.rows :]
                    rows[index] = self.model.logits(self.model.hidden(wanted)) if piece.rows else self._none()
        except torch.AcceleratorError as error:
            raise CardError(f"the card failed: {error}; the engine must be started again") from error
        except Exception as error:
            if type(error).__module__.startswith("triton"):
                raise CardError(
                    f"a kernel does not compile for this card: {error}; until it does, the modules compute the same without it "
                    "(TorchRunner over packed_weights.network), several times slower"
                ) from error
            raise
        wanted_rows = [rows[index] for index, piece in enumerate(plan.pieces) if piece.rows]
        return torch.cat(wanted_rows) if wanted_rows else self._none()

    def host_times(self, batch: int, tokens: int) -> HostTimes:
        """Of the graphs that serve ``batch`` sequences of up to ``tokens`` tokens."""
        return self._graphs(batch, tokens).times

    def _none(self) -> Tensor:
        return torch.empty(0, self.weights.config.vocab_size, device=self.device)

    def _graphs(self, batch: int, tokens: int) -> _Graphs:
        block = self.pool.options.block_tokens
        capacity = max(_LEAST, block, 1 << (tokens - 1).bit_length())
        capacity = -(-capacity // block) * block
        key = (batch, capacity)
        if key not in self._steps:
            self._steps[key] = _Graphs(self.weights, self.pool, self.dispatch, (batch, capacity), self._options)
        return self._steps[key]

    def _decode(self, pieces: list[Piece]) -> Tensor:
        """Logits [B, V] of one token each."""
        longest = max(piece.sequence.length for piece in pieces) + 1
        graphs = self._graphs(len(pieces), longest)
        per = self.pool.options.block_tokens
        self.pool.pages.changed({piece.sequence.blocks[piece.sequence.length // per] for piece in pieces})
        return graphs.run(pieces)


class _Graphs:
    """One ``DecodeStep``, captured on a card, called directly on the CPU."""

    def __init__(
        self, weights: PackedWeights, pool: StatePool, dispatch: Dispatch | None, size: tuple[int, int], options: StepOptions
    ) -> None:
        """``size``: sequences, and tokens that each may have."""
        batch, capacity = size
        config, self.device, self.dispatch = weights.config, weights.embed.device, dispatch
        on_card = self.device.type == "cuda"
        self.mail = Mail.allocate(batch, config.num_experts_per_tok, config.hidden_size, on_card) if dispatch else None
        self.step = DecodeStep(weights, pool.pages, batch, capacity, self.mail, options)
        width = 3 * batch + self.step.inputs.table.numel()
        self._packed = torch.zeros(width, dtype=torch.int64, pin_memory=on_card)
        self.times = HostTimes()
        self._arrived = torch.cuda.Event() if on_card else None
        self._ahead = torch.cuda.Stream(self.device) if on_card and dispatch is not None and dispatch.ahead else None
        self._guessed = torch.cuda.Event() if on_card else None
        self._enter: list[torch.cuda.CUDAGraph] = []
        self._pieces: list[torch.cuda.CUDAGraph] = []
        self._meanwhile: list[torch.cuda.CUDAGraph] = []
        self._guesses: list[torch.cuda.CUDAGraph] = []

    def run(self, pieces: list[Piece]) -> Tensor:
        """The logits [B, V] of these pieces of one token each."""
        self._write(pieces)
        if self._arrived is not None and not self._pieces:
            self._capture()
        layers = len(self.step.weights.layers)
        for index in range(layers + 1):
            self._run_enter(index)
            if index < layers:
                self._guess(index)
            self._piece(index)
            if index == layers:
                break
            if self.mail is not None and self.dispatch is not None:
                self._serve(index, self.mail, self.dispatch)
            else:
                self._side(index)
        assert self.step.logits is not None
        return self.step.logits.clone()

    def _serve(self, index: int, mail: Mail, dispatch: Dispatch) -> None:
        """What the host does between two pieces, and how long each part takes."""
        began = time.perf_counter()
        if dispatch.ahead:
            if self._ahead is not None and self._guessed is not None:
                self._guessed.synchronize()
            dispatch.foresee(index, mail)
        start = time.perf_counter()
        self._arrive()
        arrived = time.perf_counter()
        dispatch.begin(index, mail)
        decided = time.perf_counter()
        self._side(index)
        launched = time.perf_counter()
        dispatch.end()
        self.times.add(start - began, arrived - start, decided - arrived, launched - decided, time.perf_counter() - launched)

    def _write(self, pieces: list[Piece]) -> None:
        inputs = self.step.inputs
        width = inputs.table.shape[1]
        numbers = [piece.ids[0] for piece in pieces]
        numbers += [piece.sequence.length for piece in pieces]
        numbers += [piece.sequence.slot or 0 for piece in pieces]
        for piece in pieces:
            blocks = piece.sequence.blocks[:width]
            numbers += [*blocks, *[0] * (width - len(blocks))]
        self._packed.copy_(torch.tensor(numbers))
        batch = len(pieces)
        packed = self._packed.to(self.device, non_blocking=True)
        for place, part in zip((inputs.ids, inputs.positions, inputs.slots), packed[: 3 * batch].view(3, batch), strict=True):
            place.copy_(part)
        inputs.table.copy_(packed[3 * batch :].view(batch, width))

    def _arrive(self) -> None:
        """Wait until the router's choice is in the mail."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def _run_enter(self, index: int) -> None:
        if not self._pieces:
            self.step.enter(index)
        elif self._enter:
            self._enter[index].replay()

    def _guess(self, index: int) -> None:
        """Beside the piece, on a stream of its own, what its router will probably choose."""
        if self.dispatch is None or not self.dispatch.ahead:
            return
        if self._ahead is None or self._guessed is None:
            self.step.foresee(index)
            return
        self._ahead.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._ahead):
            self._guesses[index].replay()
            self._guessed.record()

    def _piece(self, index: int) -> None:
        if not self._pieces:
            self.step.piece(index)
        elif index < len(self._pieces):
            self._pieces[index].replay()
            if self._arrived is not None:
                self._arrived.record()

    def _side(self, index: int) -> None:
        if not self._pieces:
            self.step.meanwhile(index)
        elif self._meanwhile:
            self._meanwhile[index].replay()

    def _capture(self) -> None:
        """Run everything once, so that all kernels are compiled, then capture. With nothing for the host to do in between, the
        whole step is one graph. The rows that this writes are those that the real run writes over."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._all()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            if self.mail is None:
                self._pieces = [_captured(self._all, torch.cuda.graph_pool_handle())]
            else:
                self._capture_parts()

    def _capture_parts(self) -> None:
        """Graphs between which the host acts. Guesses run beside pieces, so they share no memory with them."""
        pool, beside = torch.cuda.graph_pool_handle(), torch.cuda.graph_pool_handle()
        layers, enter, pieces, meanwhile, guesses = len(self.step.weights.layers), [], [], [], []
        for index in range(layers + 1):
            if self._ahead is not None:
                enter.append(_captured(partial(self.step.enter, index), pool))
                if index < layers:
                    guesses.append(_captured(partial(self.step.foresee, index), beside))
            pieces.append(_captured(partial(self._enter_and_run, index, self._ahead is None), pool))
            if index < layers:
                meanwhile.append(_captured(partial(self.step.meanwhile, index), pool))
        self._enter, self._pieces, self._meanwhile, self._guesses = enter, pieces, meanwhile, guesses

    def _enter_and_run(self, index: int, enter: bool) -> None:
        """A piece, which nothing keeps apart from its beginning where nothing is guessed between them."""
        if enter:
            self.step.enter(index)
        self.step.piece(index)

    def _all(self) -> None:
        layers = len(self.step.weights.layers)
        for index in range(layers + 1):
            self.step.enter(index)
            if index < layers and self._ahead is not None:
                self.step.foresee(index)
            self.step.piece(index)
            if index < layers:
                self.step.meanwhile(index)


def _captured(call: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """``call`` as a graph. The context manager of PyTorch collects garbage around each capture, which takes longer than all of
    it when there are ninety."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool)
    try:
        call()
    finally:
        graph.capture_end()
    return graph
