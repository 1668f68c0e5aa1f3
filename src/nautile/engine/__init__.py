"""The engine: prompts to tokens, and what they cost."""

from nautile.engine.engine import Completion, Engine, EngineError
from nautile.engine.options import EngineConfig
from nautile.engine.request import (
    EngineEvent,
    EngineStats,
    Finished,
    Prefilled,
    Request,
    RequestError,
    TokenConstraint,
    TokenSampled,
    Usage,
)
from nautile.engine.sampling import SamplingParams, sample

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineEvent",
    "EngineStats",
    "Finished",
    "Prefilled",
    "Request",
    "RequestError",
    "SamplingParams",
    "TokenConstraint",
    "TokenSampled",
    "Usage",
    "sample",
]
