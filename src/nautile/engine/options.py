"""Options of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nautile.config import ModelConfig
from nautile.state import PoolOptions
from nautile.state.pages import Pages

__all__ = ["EngineConfig"]

RunnerName = Literal["auto", "native", "numpy", "torch"]


@dataclass(frozen=True)
class EngineConfig:
    """How an engine runs. What it allocates for state is fixed at the start: ``pool_bytes``.

    ``token_budget`` bounds the new tokens of a step, and with them how long a decode waits for a prompt chunk.
    ``snapshot_every`` (a multiple of ``block_tokens``) is the interval at which a prefix can be taken up; the ends of
    conversations can always. ``rows`` is the format of the state: float32, bfloat16 or packed (FP8 and FP4).
    ``runner`` "auto" takes the native kernels where they apply, else NumPy for single tokens, else PyTorch; the engine's
    ``runner_name`` and ``runner_notes`` say which and why. ``precision`` is that of the native kernels' weights (bfloat16 is
    exact for FP8 and FP4 checkpoints). ``speculate`` drafts one token a step with the checkpoint's MTP block. ``cache_dir``
    keeps prefixes on disk between runs.
    """

    device: str = "cpu"
    threads: int | None = None  # None: PyTorch's choice
    runner: RunnerName = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    speculate: bool = False
    max_running: int = 32
    token_budget: int = 512
    pool_bytes: int = 256 << 20
    block_tokens: int = 256
    snapshot_every: int = 256
    snapshot_bytes: int = 128 << 20
    rows: Literal["float32", "bfloat16", "packed"] = "float32"
    prefix_cache: bool = True
    host_bytes: int = 0
    cache_dir: Path | None = None
    disk_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if self.runner not in ("auto", "native", "numpy", "torch"):
            raise ValueError(f'runner is "auto", "native", "numpy" or "torch", got {self.runner!r}')
        if self.speculate and self.runner == "numpy":
            raise ValueError('the NumPy runner cannot draft: speculate with runner="auto", "native" or "torch"')
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f'precision is "float32" or "bfloat16", got {self.precision!r}')
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if self.max_running < 1 or self.pool_bytes < 1:
            raise ValueError("max_running and pool_bytes must be at least 1")

    def pool(self, model: ModelConfig) -> PoolOptions:
        """Sizes of the pool for a model. Raises ValueError when ``pool_bytes`` cannot hold the tails and one block."""
        one = self._pool_options(1, 1)
        pages = Pages(model, one, "meta")
        room = self.pool_bytes - self.max_running * pages.slot_bytes
        longest = -(-model.max_position_embeddings // self.block_tokens)
        blocks = min(room // max(1, pages.block_bytes), longest * self.max_running)
        if blocks < 1:
            least = self.max_running * pages.slot_bytes + pages.block_bytes
            raise ValueError(
                f"pool_bytes={self.pool_bytes:,} cannot hold {self.max_running} tails of {pages.slot_bytes:,} bytes and a "
                f"block of {pages.block_bytes:,}: give at least {least:,}, or lower max_running"
            )
        return self._pool_options(blocks, self.max_running)

    def _pool_options(self, blocks: int, slots: int) -> PoolOptions:
        return PoolOptions(
            blocks=blocks,
            slots=slots,
            block_tokens=self.block_tokens,
            snapshot_every=self.snapshot_every,
            rows=self.rows,
            prefix_cache=self.prefix_cache,
            snapshot_bytes=self.snapshot_bytes,
            host_bytes=self.host_bytes,
            disk=self.cache_dir,
            disk_bytes=self.disk_bytes,
        )
