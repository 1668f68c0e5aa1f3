"""Every kernel compiles for three generations of GPUs, on any machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .compile_all import KERNELS


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_ahead_of_time(capability, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_all.py")
    done = subprocess.run(
        [sys.executable, script, str(capability)], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(f"sm_{capability}: ") == sum(capability in row[-1] for row in KERNELS)
