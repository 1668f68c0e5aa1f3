"""What it costs to compute tokens again, from the steps that have been measured: the worth of cached state per byte."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["RecomputeCost"]

_UNMEASURED = 1e-3  # seconds a token before the first measurement: only ratios matter then


@dataclass
class RecomputeCost:
    """Seconds per token by position, in bins that double: 0 - 1023, 1024 - 2047, 2048 - 4095, ... Written by the pool.

    Old measurements fade (factor 0.9 a step), so the figure follows a machine that gets busier or quieter.
    """

    tokens: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)

    def record(self, position: int, tokens: int, seconds: float) -> None:
        """``tokens`` tokens from ``position`` on took ``seconds``."""
        if tokens < 1 or seconds <= 0:
            return
        where = _bin(position)
        self.tokens[where] = 0.9 * self.tokens.get(where, 0.0) + tokens
        self.seconds[where] = 0.9 * self.seconds.get(where, 0.0) + seconds

    def per_token(self, position: int) -> float:
        """Seconds per token at a position: of its bin, else of the nearest bin that has been measured."""
        if not self.tokens:
            return _UNMEASURED
        where = min(self.tokens, key=lambda measured: (abs(measured - _bin(position)), measured))
        return self.seconds[where] / self.tokens[where]


def _bin(position: int) -> int:
    return max(0, (position >> 10).bit_length())
