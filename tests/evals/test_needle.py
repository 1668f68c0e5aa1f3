"""``nautile eval needle``: reproducible texts, depth in equal parts, strict grading, bad input."""

import json
from pathlib import Path

import pytest

from nautile.cli import main
from nautile.engine import Completion, Engine, EngineConfig
from nautile.evals import needle
from nautile.evals.needle import NeedleConfig, NeedleOutcome, NeedleReport, needle_case, run_needles
from nautile.protocol import texts

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
    assert sorted(int(depth * 5) for depth in depths) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    other = needle_case(NeedleConfig((700,), ("single",), trials=5, first_seed=10_000_001), "single", 700, 0, engine)
    assert other[0] != needle_case(config, "single", 700, 0, engine)[0]


def test_the_report_counts_by_variant_length_and_depth():
    config = NeedleConfig((4096, 8192), ("single",), trials=10)
    outcomes = tuple(
        NeedleOutcome("single", length, trial, trial / 10, length - 5, (length, trial) != (8192, 9), "a", "a", 1.0)
        for length in config.lengths
        for trial in range(10)
    )
    report = NeedleReport(outcomes, config, "m", "native", 3.0, "c")
    cells = report.to_json()["needle"]["single"]
    assert cells["4096"]["by_depth"] == [[2, 2]] * 5 and cells["4096"]["passed"] == 10
    assert cells["8192"]["by_depth"] == [[2, 2]] * 4 + [[1, 2]] and cells["8192"]["total"] == 10
    assert not report.met  # nine of ten are less than 95 %
    assert "bar" not in NeedleReport((), NeedleConfig((4096,), ("ten",)), "m", "native", 3.0, "c").to_json()
    short = NeedleConfig((4096,), ("single",))
    assert NeedleReport(outcomes[:10], short, "m", "native", 3.0, "c").met
    assert not NeedleReport(outcomes[:9], short, "m", "native", 3.0, "c").met  # all right so far, but not all


def test_the_command(tmp_path, capsys):
    out = tmp_path / "needle.json"
    status = main(["eval", "needle", "--lengths", "600", "--variants", "single", "--trials", "2", "--json", "--out", str(out)])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    cell = printed["needle"]["single"]["600"]
    assert cell["total"] == 2 and status == (0 if cell["passed"] == 2 else 1)
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 1 + 2  # what was measured, and the trials


def test_trials_that_share_a_text_hide_other_facts_in_it_and_find_it_computed(engine, monkeypatch):
    config = NeedleConfig((1500,), ("single",), trials=4, texts=2)
    assert [trial for _, _, trial in config.cases()] == [2, 0, 3, 1]
    made = [needle_case(config, "single", 1500, trial, engine)[0] for trial in range(4)]
    assert all(len(needle_case(config, "single", 1500, trial, engine)[1].ids) <= 1500 for trial in range(4))
    lines = [set(found.text.split("\n")) - {found.facts[0].sentence} for found in made]
    assert len(lines[0] & lines[2]) > 0.9 * len(lines[0]) and len(lines[0] & lines[1]) < 5
    assert len({found.facts[0].name for found in made}) == 4
    monkeypatch.setattr(needle, "Engine", lambda *options: engine)
    monkeypatch.setattr(engine, "close", lambda: None)
    outcomes = run_needles(NANO, NeedleConfig((1100,), ("single",), trials=4, texts=2), lambda outcome: None).outcomes
    assert [outcome.trial for outcome in outcomes] == [2, 0, 3, 1]
    last = outcomes[-1]
    assert 256 <= last.reused <= last.depth * 1100  # whole blocks before the fact


def test_ten_facts_of_a_text_are_asked_one_by_one(engine):
    config = NeedleConfig((2000,), ("ten",), trials=20)
    made = [needle_case(config, "ten", 2000, trial, engine) for trial in range(20)]
    for first in (0, 10):
        ten = made[first : first + 10]
        assert len({found.text for found, _, _ in ten}) == 1 and len({found.asked[0].name for found, _, _ in ten}) == 10
        places = [found.text.index(found.asked[0].sentence) / len(found.text) for found, _, _ in ten]
        assert places == sorted(places) and all(
            abs(place - depth) < 0.1 for place, (_, _, depth) in zip(places, ten, strict=True)
        )
        assert all(found.asked[0].thing in found.questions[0] and len(prompt.ids) <= 2000 for found, prompt, _ in ten)
    assert made[0][0].text != made[10][0].text


class KnowsAll:
    """An engine in whose place every answer is right."""

    runner_name = "none"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def generate(self, prompts, sampling):
        case = next(found for found, prompt in self.cases if prompt.ids == prompts[0].ids)
        answer = self.tokenizer.encode(case.asked[0].value)
        ids = [
            *self.tokenizer.encode("So."),
            self.tokenizer.special(texts.THINK_CLOSE),
            *answer,
            self.tokenizer.special(texts.EOS),
        ]
        return [Completion(ids, "stop", len(prompts[0].ids), 0)]

    def close(self):
        pass


def test_a_run_that_is_cut_short_goes_on_and_says_what_it_holds(engine, monkeypatch):
    config, seen = NeedleConfig((600,), ("single",), trials=3), []
    knows = KnowsAll(engine.tokenizer)
    knows.cases = [needle_case(config, *case, engine)[:2] for case in config.cases()]
    monkeypatch.setattr(needle, "Engine", lambda *options: knows)
    part = run_needles(NANO, config, seen.append, seconds=-1)
    assert len(part.outcomes) == 1 and not part.met
    assert part.to_json()["needle"]["single"]["600"]["total"] == 1
    whole = run_needles(NANO, config, seen.append, seen[:])
    assert len(seen) == 3 and whole.met and whole.to_json()["measured_before"] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--variants", "triple"], "unknown variant triple"),
        (["--lengths", "12"], "at least 512"),
        (["--lengths", "many"], "many"),
        (["--trials", "0"], "at least one trial"),
        (["--trials", "2", "--texts", "3"], "texts that trials share"),
        (["--resume"], "give the same --out"),
        (["--dtype", "int4"], "--dtype is float32 or bfloat16"),
    ],
)
def test_bad_input(options, said, capsys):
    assert main(["eval", "needle", *options]) == 1
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
