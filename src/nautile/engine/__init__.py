"""The engine: prompts to tokens, and what they cost."""

from nautile.engine.engine import Completion, Engine, EngineConfig
from nautile.engine.sampling import SamplingParams, sample

__all__ = ["Completion", "Engine", "EngineConfig", "SamplingParams", "sample"]
