"""Settings for every test: deterministic hypothesis runs, random numbers of its own, one thread a process, ``oracles.*``."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "nautile", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("nautile")


@pytest.fixture(autouse=True)
def _own_random_numbers(request):
    """What torch draws in a test depends on the test's name alone, not on which tests this worker happened to run before."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
