"""``nautile eval needle``: reproducible texts, depth in equal parts, strict grading, bad input."""

import json
from pathlib import Path

import pytest

from nautile.cli import main
from nautile.engine import Engine, EngineConfig
from nautile.evals.needle import NeedleConfig, NeedleOutcome, NeedleReport, needle_case

NANO = Path(__file__).parents[2] / "src" / "nautile" / "weights" / "nano"


@pytest.fixture(scope="module")
def engine():
    made = Engine(NANO, EngineConfig(max_running=1))
    yield made
    made.close()


def test_trials_are_reproducible_and_their_depths_fill_the_text(engine):
    config = NeedleConfig((700,), ("single", "eight"), trials=5)
    depths = []
    for variant, length, trial in config.cases():
        found, prompt, depth = needle_case(config, variant, length, trial, engine)
        again = needle_case(config, variant, length, trial, engine)
        assert (found, prompt.ids, depth) == (again[0], again[1].ids, again[2])
        assert len(prompt.ids) <= length
        assert len(found.facts) == (1 if variant == "single" else 8)
        depths.append(depth)
        place = found.text.index(found.asked[0].sentence) / len(found.text)
        assert abs(place - depth) < 0.2
    assert [int(depth * 5) for depth in depths] == [0, 1, 2, 3, 4] * 2
    other = needle_case(NeedleConfig((700,), ("single",), trials=5, first_seed=10_000_001), "single", 700, 0, engine)
    assert other[0] != needle_case(config, "single", 700, 0, engine)[0]


def test_the_report_counts_by_variant_length_and_depth():
    config = NeedleConfig((4096, 8192), ("single",), trials=10)
    outcomes = tuple(
        NeedleOutcome("single", length, trial, trial / 10, length - 5, (length, trial) != (8192, 9), "a", "a", 1.0)
        for _, length, trial in config.cases()
    )
    report = NeedleReport(outcomes, config, "m", "native", 3.0, "c")
    cells = report.to_json()["needle"]["single"]
    assert cells["4096"]["by_depth"] == [[2, 2]] * 5 and cells["4096"]["passed"] == 10
    assert cells["8192"]["by_depth"] == [[2, 2]] * 4 + [[1, 2]] and cells["8192"]["total"] == 10
    assert not report.met  # nine of ten are less than 95 %
    assert NeedleReport(outcomes[:10], NeedleConfig((4096,), ("single",)), "m", "native", 3.0, "c").met


def test_the_command(tmp_path, capsys):
    out = tmp_path / "needle.json"
    status = main(["eval", "needle", "--lengths", "600", "--variants", "single", "--trials", "2", "--json", "--out", str(out)])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    cell = printed["needle"]["single"]["600"]
    assert cell["total"] == 2 and status == (0 if cell["passed"] == 2 else 1)
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--variants", "triple"], "unknown variant triple"),
        (["--lengths", "12"], "at least 512"),
        (["--lengths", "many"], "many"),
        (["--trials", "0"], "at least one trial"),
        (["--dtype", "int4"], "--dtype is float32 or bfloat16"),
    ],
)
def test_bad_input(options, said, capsys):
    assert main(["eval", "needle", *options]) == 1
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
