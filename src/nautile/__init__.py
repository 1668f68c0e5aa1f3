"""Nautile: DeepSeek-V4 end to end, in code that can be read in an evening."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nautile.config import ConfigError, ModelConfig

if TYPE_CHECKING:
    from nautile.checkpoint import load_model
    from nautile.engine import Engine, EngineConfig
    from nautile.model import Transformer
    from nautile.protocol import Tokenizer
    from nautile.state import State

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "Engine",
    "EngineConfig",
    "ModelConfig",
    "State",
    "Tokenizer",
    "Transformer",
    "__version__",
    "load_model",
]

# Names whose modules import torch: resolved on first use, so that `nautile --help` answers at once.
_LAZY = {
    "Engine": "nautile.engine",
    "EngineConfig": "nautile.engine",
    "State": "nautile.state",
    "Tokenizer": "nautile.protocol",
    "Transformer": "nautile.model",
    "load_model": "nautile.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'nautile' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
