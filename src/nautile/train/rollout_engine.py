"""The serving engine as the rollout engine: the same scheduler, pool and modules, plus notes of what the network decided.

``deterministic`` gives every sequence passes of its own, in chunks that do not depend on what else is running, so that
training can go through exactly the same products (``nautile.train.unrolled``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nautile.engine import Engine, EngineConfig
from nautile.engine.core import Core
from nautile.engine.plan import Piece, Plan
from nautile.engine.runner import TorchRunner
from nautile.model import Transformer
from nautile.model.transformer import Trace
from nautile.protocol import Tokenizer
from nautile.state.pool import StatePool
from nautile.train.replay import Recorder, decisions_of

__all__ = ["SNAPSHOT_EVERY", "RolloutEngine", "RolloutRunner", "engine_options"]

SNAPSHOT_EVERY = 256  # tokens; prompt chunks end at multiples of it


@dataclass(frozen=True)
class _Mode:
    recorder: Recorder | None
    deterministic: bool


class RolloutRunner(TorchRunner):
    """The portable runner that notes experts and picks, and can keep sequences apart."""

    def __init__(self, model: Transformer, pool: StatePool, recorder: Recorder | None, deterministic: bool) -> None:
        super().__init__(model, pool)
        self.recorder, self.deterministic = recorder, deterministic

    @torch.inference_mode()
    def step(self, plan: Plan) -> Tensor:
        """See ``Runner.step``."""
        if not self.deterministic:
            return super().step(plan)
        return torch.cat([self._alone(piece) for piece in plan.pieces])

    def _alone(self, piece: Piece) -> Tensor:
        return super().step(Plan((piece,)))

    def _pass(self, pieces: list[Piece]) -> list[Tensor]:
        with torch.set_grad_enabled(self.deterministic):  # no gradient is kept; the modules take the path that training takes
            return super()._pass(pieces) if self.recorder is None else self._noted_pass(pieces, self.recorder)

    def _noted_pass(self, pieces: list[Piece], recorder: Recorder) -> list[Tensor]:
        device, lengths = self.model.embed.weight.device, [len(piece.ids) for piece in pieces]
        padded = [(*piece.ids, *[0] * (max(lengths) - len(piece.ids))) for piece in pieces]
        ids = torch.tensor(padded, dtype=torch.int64, device=device)
        state, trace = self.pool.batch([piece.sequence for piece in pieces]), Trace()
        streams = self.model.streams(ids, self.model.new_chunk(ids, state, torch.tensor(lengths)), state, trace)
        noted = decisions_of(self.model, trace, lengths, ids.shape[1])
        for piece, decisions in zip(pieces, noted, strict=True):
            recorder.take(piece.sequence, piece.ids, decisions)
        return [row[:length] for row, length in zip(streams, lengths, strict=True)]


class RolloutEngine(Engine):
    """An engine over one set of weights: make a new one after every update, for its cached prefixes are of these."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, options: EngineConfig, recorder: Recorder | None, deterministic: bool
    ) -> None:
        if deterministic and (options.prefix_cache or options.token_budget < model.config.max_position_embeddings):
            raise ValueError("a deterministic rollout runs without a prefix cache and with whole chunks: use engine_options")
        self._mode = _Mode(recorder, deterministic)
        super().__init__(model, options, tokenizer)

    def _make_core(self) -> Core:
        self.runner = RolloutRunner(self.model, self.pool, self._mode.recorder, self._mode.deterministic)
        return super()._make_core()


def engine_options(model: Transformer, running: int, deterministic: bool, pool_bytes: int = 256 << 20) -> EngineConfig:
    """How a rollout engine runs ``running`` sequences at once."""
    device = model.embed.weight.device.type
    budget = model.config.max_position_embeddings + running + 1 if deterministic else 512 + running
    return EngineConfig(
        device=device,
        runner="torch",
        max_running=running,
        token_budget=budget,
        pool_bytes=pool_bytes,
        snapshot_every=SNAPSHOT_EVERY,
        prefix_cache=not deterministic,
    )
