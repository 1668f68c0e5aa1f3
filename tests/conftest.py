"""Settings for every test: deterministic hypothesis runs, one thread a process, helpers importable as ``oracles.*``."""

from __future__ import annotations

import sys
from pathlib import Path

import hypothesis
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "nautile", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("nautile")
