"""The state of sequences: history (compressed entries, indexer keys) and tail (window, compressor remainders)."""

from nautile.state.files import StoreError, StoreUnavailable
from nautile.state.fingerprint import fingerprint
from nautile.state.pages import Pages, PoolError, PoolFull, PoolOptions, Sequence
from nautile.state.pool import Guard, Part, PoolCorrupted, PoolStats, StatePool
from nautile.state.session import Resumed, SessionConflict, SessionError, SessionInfo, SessionStore
from nautile.state.state import CompressorTail, LayerState, Rows, State, take_rows

__all__ = [
    "CompressorTail",
    "Guard",
    "LayerState",
    "Pages",
    "Part",
    "PoolCorrupted",
    "PoolError",
    "PoolFull",
    "PoolOptions",
    "PoolStats",
    "Resumed",
    "Rows",
    "Sequence",
    "SessionConflict",
    "SessionError",
    "SessionInfo",
    "SessionStore",
    "State",
    "StatePool",
    "StoreError",
    "StoreUnavailable",
    "fingerprint",
    "take_rows",
]
