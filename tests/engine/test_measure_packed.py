"""Measuring packed weights: the same path that runs on a card, on a tiny shape."""

import json
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from engine.flash_models import measure_and_forget
from nautile.cli import app
from nautile.engine import measure
from nautile.engine.measure import Case, Machine, Prompt, Run, Subject, fastest_way, run
from nautile.engine.placement import dense_bytes, expert_bytes

CPU = torch.device("cpu")


def room(experts, staging=32):
    """A card for so many experts of the tiny shape."""
    config = Subject("tiny").configuration()
    return Machine(card=dense_bytes(config) + 200_000 + (experts + staging) * expert_bytes(config), threads=1)


def lines(plan):
    found = []
    run(plan, CPU, lambda key, value: found.append((key, json.loads(json.dumps(value)))), lambda _: None)
    return found


def test_every_part_is_measured_and_one_that_fails_is_a_line(monkeypatch):
    calls = iter(range(3))

    def sometimes(runner, pool, case):
        if next(calls) == 0:
            raise RuntimeError("not this time")
        return decode(runner, pool, case)

    decode = measure.decode
    measure_and_forget(monkeypatch)
    monkeypatch.setattr(measure, "decode", sometimes)
    monkeypatch.setattr(measure, "check", partial(measure.check, prompt=20, steps=2))
    cases = (Case(40, 1, 0, 2, 1), Case(40, 2, 0, 2, 1), Case(40, 1, 2, 2, 1))
    found = lines(Run(Subject("tiny", zipf=1.5), room(20), cases, (Prompt(70, 20, 3, 16),), check=True))
    assert [key for key, _ in found] == ["built", "check", "check", "results", "results", "results", "results"]
    built, *_, prompt, failed, pair, ahead = (value for _, value in found)
    assert built["experts_in_host"] > 0 and all(value["same_argmax"] == 1 for key, value in found if key == "check")
    assert prompt["chunks"] == 4 and prompt["chunks_run"] == 3 and prompt["interpolated"] and prompt["seconds"] > 0
    assert "not this time" in failed["failure"]
    assert pair["hit_rate"] > built["resident_fraction"] and not pair["void"]  # the popular ones lie on the card
    assert ahead["foreseen"] > 0


def test_no_shape_is_measured_that_does_not_fit():
    answer = CliRunner().invoke(app, ["bench", "model", "--shape", "flash", "--card-memory", "4GB"])
    assert answer.exit_code == 1 and "the card has 4.00 GB" in answer.output and "Traceback" not in answer.output
    for wrong in (["--case", "4096"], ["--prefill", "many"], ["--shape", "huge"], ["--host-memory", "lots"]):
        assert CliRunner().invoke(app, ["bench", "model", *wrong]).exit_code == 2


def test_the_command_writes_what_it_measured(tmp_path):
    out = tmp_path / "result.json"
    words = ["bench", "model", "--shape", "tiny", "--case", "30x1", "--steps", "2", "--prefill", "30", "--out", str(out)]
    assert CliRunner().invoke(app, words).exit_code == 0
    result = json.loads(out.read_text())
    assert [row.get("prefill", row.get("context")) for row in result["results"]] == [30, 30]
    assert all(row["tokens_per_s"] > 0 for row in result["results"])


@given(st.integers(1, 40), st.integers(2, 9))
def test_chunks_are_spread_and_the_rest_interpolated(count, samples):
    chosen = measure._spread(count, samples)
    assert chosen[0] == 0 and len(chosen) <= min(count, samples) and (count - 1 <= samples or len(chosen) == samples)
    seconds = {number: 3.0 + 2 * number for number in chosen}
    found = [measure._between(seconds, number) for number in range(count)]
    last = max(chosen)
    assert found[: last + 1] == pytest.approx([3.0 + 2 * number for number in range(last + 1)])
    assert set(found[last:]) == {found[last]}


def test_the_fastest_way_is_one_that_was_checked():
    def of(*ways):
        return {
            "check": [{"way": way, "same_argmax": same, "relative_error": 0.01} for way, _, same in ways],
            "results": [{"way": way, "batch": 1, "median_ms": ms} for way, ms, _ in ways] + [{"prefill": 9}],
        }

    assert fastest_way(of(("plain", 3.0, 1.0), ("all", 2.0, 1.0), ("vector", 1.0, 0.5))) == "all"
    assert fastest_way({"results": [{"way": "all", "batch": 1, "median_ms": 1.0}]}) == "plain" == fastest_way({})
