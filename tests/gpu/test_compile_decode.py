"""The fused operations of a decode step compile for every generation of GPUs that runs packed weights, on any machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("capability", "kernels"), [(90, 18), pytest.param(100, 18, marks=pytest.mark.slow)])
def test_decode_kernels_compile_ahead_of_time(capability, kernels, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_decode.py")
    done = subprocess.run(
        [sys.executable, script, str(capability)], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(f"sm_{capability}: ") == kernels
