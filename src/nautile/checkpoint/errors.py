"""The one error of this room."""

from __future__ import annotations

__all__ = ["CheckpointError"]


class CheckpointError(Exception):
    """A checkpoint is incomplete, damaged, of another shape, or cannot be fetched or written. The text names what and where."""
