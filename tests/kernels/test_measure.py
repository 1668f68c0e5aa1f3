"""The table of kernel times: its floors, its lines, and what it says without a GPU."""

import json
from dataclasses import asdict

import pytest
import torch
from typer.testing import CliRunner

from nautile.cli import app
from nautile.kernels import measure as kernels
from nautile.kernels.measure import CASES, VARIANTS, Case, Ceilings, Measured, Work, best, measure


def test_the_floor_is_the_larger_of_bytes_and_operations():
    card = Ceilings(copy=2e12, product=5e14)
    assert card.floor(flops=0, read=2e6) == pytest.approx(1.0)
    assert card.floor(flops=5e9, read=2e6) == pytest.approx(10.0)


def test_lines():
    line = kernels._line(Measured("a case", "<= 1.0 x peer", 20.0, 5.0, 1e-3, 10.0))
    assert "20.0 us" in line
    assert "25% of floor" in line
    assert "2.00 x" in line
    assert "FAILED no memory" in kernels._line(Measured("a case", "", None, None, None, None, "no memory"))


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


def test_a_run_goes_on_behind_what_an_earlier_one_hung_in(tmp_path, monkeypatch):
    """Its rows are kept, the case it ended in is a failure, the rest is measured; a card that is lost ends the process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(kernels, "ceilings", lambda: Ceilings(1e12, 1e12))
    seen = []

    def measured(case, card):
        seen.append(case.name)
        ours = None if len(seen) == 2 else 1.0
        return Measured(case.name, "", ours, 1.0, 0.0, None, "" if ours else "a fault")

    monkeypatch.setattr(kernels, "measure", measured)
    monkeypatch.setattr(kernels, "_card_lives", lambda: False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    cases = tuple(Case(name, "", lambda: None) for name in "abcde")
    monkeypatch.setattr(kernels, "CASES", cases)
    out = tmp_path / "kernels.json"
    out.write_text(json.dumps({"rows": [asdict(Measured("a", "", 2.0, 1.0, 0.0, None))], "running": {"name": "b", "bar": ""}}))
    words = ["bench", "kernels", "--resume", "--out", str(out)]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 3 and "--resume" in answer.output and seen == ["c", "d"]
    assert CliRunner().invoke(app, words).exit_code == 0 and seen == ["c", "d", "e"]
    found = json.loads(out.read_text())
    assert [(row["name"], row["ours"]) for row in found["rows"]] == [
        ("a", 2.0),
        ("b", None),
        ("c", 1.0),
        ("d", None),
        ("e", 1.0),
    ]
    assert "running" not in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs():
    result = CliRunner().invoke(app, ["bench", "kernels"])
    assert result.exit_code == 1
    assert "needs an NVIDIA GPU" in result.output
