"""The table of kernel times: its floors, its lines, and what it says without a GPU."""

import pytest
import torch
from typer.testing import CliRunner

from nautile.cli import app
from nautile.cli.bench import _kernel_line
from nautile.kernels.measure import CASES, Case, Ceilings, Measured, Work, measure


def test_the_floor_is_the_larger_of_bytes_and_operations():
    card = Ceilings(copy=2e12, product=5e14)
    assert card.floor(flops=0, read=2e6) == pytest.approx(1.0)
    assert card.floor(flops=5e9, read=2e6) == pytest.approx(10.0)


def test_lines():
    line = _kernel_line(Measured("a case", "<= 1.0 x peer", 20.0, 5.0, 1e-3, 10.0))
    assert "20.0 us" in line
    assert "25% of floor" in line
    assert "2.00 x" in line
    assert "FAILED no memory" in _kernel_line(Measured("a case", "", None, None, None, None, "no memory"))


def test_a_failing_case_is_a_line_of_the_table():
    def broken() -> Work:
        raise RuntimeError("no such kernel")

    row = measure(Case("broken", "", broken), Ceilings(1e12, 1e12))
    assert row.ours is None
    assert "no such kernel" in row.failure


def test_names_are_different():
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs():
    result = CliRunner().invoke(app, ["bench", "kernels"])
    assert result.exit_code == 1
    assert "needs an NVIDIA GPU" in result.output
