"""The table of kernel times: its floors, its lines, and what it says without a GPU."""

import pytest
import torch
from typer.testing import CliRunner

from nautile.cli import app
from nautile.cli.bench import _kernel_line
from nautile.kernels.measure import CASES, VARIANTS, Case, Ceilings, Measured, Work, best, measure


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


@pytest.mark.parametrize("cases", [CASES, VARIANTS])
def test_names_are_different(cases):
    assert len({case.name for case in cases}) == len(cases)


def test_the_best_way_is_the_fastest_that_is_right():
    def way(name, us, error):
        return Measured(name, "", us, 1.0, error, None, "" if us else "no memory")

    rows = [way("a | one", 4.0, 1e-3), way("a | two", 2.0, 1e-3), way("a | three", 1.0, 0.5), way("b | one", None, None)]
    found = best([*rows, way("c | one", None, None), way("c | two", 3.0, 1e-3), way("d | one", 1.0, float("nan"))])
    assert found["a"] == {"best": "two", "us": 2.0, "default_us": 4.0, "times_faster": 2.0}
    assert found["b"] == found["d"] == {"best": None}
    assert found["c"]["best"] == "two" and found["c"]["times_faster"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs():
    result = CliRunner().invoke(app, ["bench", "kernels"])
    assert result.exit_code == 1
    assert "needs an NVIDIA GPU" in result.output
