"""The state of sequences: history (compressed entries, indexer keys) and tail (window, compressor remainders)."""

from nautile.state.fingerprint import fingerprint
from nautile.state.pages import Pages, PoolError, PoolFull, PoolOptions, Sequence
from nautile.state.pool import Guard, PoolCorrupted, PoolStats, StatePool
from nautile.state.state import CompressorTail, LayerState, Rows, State, take_rows

__all__ = [
    "CompressorTail",
    "Guard",
    "LayerState",
    "Pages",
    "PoolCorrupted",
    "PoolError",
    "PoolFull",
    "PoolOptions",
    "PoolStats",
    "Rows",
    "Sequence",
    "State",
    "StatePool",
    "fingerprint",
    "take_rows",
]
