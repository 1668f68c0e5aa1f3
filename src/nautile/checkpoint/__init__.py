"""Checkpoints: the official layout read and written, the transformers layout read and written, Hub ids resolved."""

from nautile.checkpoint.errors import CheckpointError
from nautile.checkpoint.hub import resolve_config, resolve_model
from nautile.checkpoint.load import load_model
from nautile.checkpoint.manifest import manifest
from nautile.checkpoint.reader import Checkpoint, load_state
from nautile.checkpoint.writer import SaveOptions, SaveReport, save_model, write_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "SaveOptions",
    "SaveReport",
    "load_model",
    "load_state",
    "manifest",
    "resolve_config",
    "resolve_model",
    "save_model",
    "write_checkpoint",
]
