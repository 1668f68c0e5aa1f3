"""The load generator: what it sends is what was asked for, what it reports is what happened."""

from __future__ import annotations

import asyncio
import json

import pytest
from typer.testing import CliRunner

from nautile.cli import app
from nautile.engine import Engine, EngineConfig
from nautile.engine.load import EngineTarget, Load, Outcome, jobs, run_load, summary
from oracles.random_models import tiny_network


def test_prompts_share_what_their_group_has_in_common():
    load = Load(requests=40, input_tokens=100, shared=0.6, groups=3, rate=5.0)
    made = jobs(load)
    assert made == jobs(load) and len(made) == 40
    assert len({job.prompt[:60] for job in made}) == 3 and len({job.prompt for job in made}) == 40
    assert {len(job.prompt) for job in made} == {100}
    times = [job.at for job in made]
    assert times == sorted(times) and 0.5 < times[-1] * 5.0 / 40 < 2


class Scripted:
    """Tokens at fixed intervals; counts how many run at once."""

    def __init__(self, gap=0.002, fail=()):
        self.gap, self.fail, self.running, self.most, self.asked = gap, fail, 0, 0, 0

    async def ask(self, prompt, output_tokens):
        self.asked += 1
        number = self.asked
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for _ in range(output_tokens):
                await asyncio.sleep(self.gap)
                yield None
            if number in self.fail:
                raise RuntimeError("broken")
            yield len(prompt), len(prompt) // 2
        finally:
            self.running -= 1


def test_clients_wait_for_their_answers_and_failures_are_counted():
    load, target, seen = Load(requests=9, clients=3, input_tokens=10, output_tokens=4), Scripted(fail=(2,)), []
    outcomes, seconds = asyncio.run(run_load(load, target, seen.append))
    assert target.most == 3 and seen == list(range(1, 10))
    result = summary(load, outcomes, seconds)
    assert result["errors"] == 1 and "broken" in result["first_error"] and result["hit_rate"] == 0.5
    assert result["output_tokens_per_second"] == pytest.approx(9 * 4 / seconds, abs=0.01)
    assert result["ttft_ms"]["p50"] >= 2 and result["tpot_ms"]["p50"] >= 2


def test_percentiles_are_those_of_the_times():
    outcomes = [Outcome(0.0, (index / 1000, index / 1000 + 0.01), 10, 0) for index in range(1, 101)]
    result = summary(Load(), outcomes, 2.0)
    assert result["ttft_ms"] == {"mean": 50.5, "p50": 51.0, "p90": 91.0, "p99": 100.0, "max": 100.0}
    assert result["tpot_ms"]["p99"] == 10.0 and result["output_tokens_per_second"] == 100.0


def test_an_engine_as_target():
    model = tiny_network((0, 4), seed=1)
    engine = Engine(model, EngineConfig(pool_bytes=4 << 20, block_tokens=128, snapshot_every=128, max_running=4))
    load = Load(requests=6, clients=2, input_tokens=300, output_tokens=5, shared=0.9, groups=1)
    outcomes, seconds = asyncio.run(run_load(load, EngineTarget(engine), lambda ended: None))
    engine.close()
    assert [len(outcome.token_times) for outcome in outcomes] == [5] * 6
    assert summary(load, outcomes, seconds)["hit_rate"] >= 4 * 256 / (6 * 300)


@pytest.mark.parametrize("wrong", [{"requests": 0}, {"shared": 1.5}, {"rate": -1.0}])
def test_loads_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Load(**wrong)


def test_the_command_writes_json_and_a_plot(tmp_path):
    out, plot = tmp_path / "load.json", tmp_path / "load.svg"
    arguments = ["bench", "serve", "--requests", "3", "--clients", "2", "--input", "20", "--output", "4", "--json", "--out"]
    result = CliRunner().invoke(app, [*arguments, str(out), "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(out.read_text())
    assert json.loads(out.read_text())["errors"] == 0 and plot.read_text().startswith("<?xml")
