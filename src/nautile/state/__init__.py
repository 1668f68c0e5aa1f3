"""The state of sequences: history (compressed entries, indexer keys) and tail (window, compressor remainders)."""

from nautile.state.pages import Pages, PoolError, PoolFull, PoolOptions, Sequence
from nautile.state.state import CompressorTail, LayerState, Rows, State, take_rows

__all__ = [
    "CompressorTail",
    "LayerState",
    "Pages",
    "PoolError",
    "PoolFull",
    "PoolOptions",
    "Rows",
    "Sequence",
    "State",
    "take_rows",
]
