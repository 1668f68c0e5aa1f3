"""Tasks: reproducible, solvable by their expert through the real tools, graded strictly, worded in many ways."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from nautile.agent.toolbox import execute
from nautile.train.tasks import DEMO_KINDS, HELD_OUT_START, KINDS, Pool, Workspace
from nautile.train.tasks.base import fill, quote
from nautile.train.tasks.documents import FORMATS, definitions
from nautile.train.tasks.words import HELD_OUT_WORDS, TRAIN_WORDS

NAMES = sorted(KINDS)


def solve(task, root: Path) -> str:
    """Run the expert; the output of its last tool call."""
    task.write(root)
    output = ""
    for step in task.expert():
        output = execute(step.tool, dict(step.arguments), root).output
        assert step.shows in output, (task.prompt, step, output)
    return output


@pytest.mark.parametrize("name", NAMES)
def test_expert_solves_and_grader_agrees(name: str, tmp_path: Path) -> None:
    for seed in range(12):
        task = KINDS[name].from_seed(seed if seed % 2 else HELD_OUT_START + seed)
        root = tmp_path / str(seed)
        root.mkdir()
        output = solve(task, root)
        assert task.grade(root, task.final)
        if task.answer is not None:
            assert not task.grade(root, task.answer + "1")
            assert task.answer == "none" or task.answer in output  # the answer is a copy of what the tool showed


@pytest.mark.parametrize("name", NAMES)
def test_untouched_directory_fails_editing_kinds_and_any_stray_change_fails_all(name: str, tmp_path: Path) -> None:
    task = KINDS[name].from_seed(3)
    task.write(tmp_path)
    assert task.grade(tmp_path, task.final) == (task.answer is not None)
    solve(task, tmp_path)
    (tmp_path / "stray.txt").write_text("x")
    assert not task.grade(tmp_path, task.final)


def test_grader_forgives_quotes_and_a_full_stop_only(tmp_path: Path) -> None:
    task = replace(KINDS["count_lines"].from_seed(1), answer="17")
    task.write(tmp_path)
    for given in ("17", " 17\n", "17.", '"17"', "`17`"):
        assert task.grade(tmp_path, given), given
    for given in ("", "170", "7", "The count is 17", "17 18", "-17"):
        assert not task.grade(tmp_path, given), given


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_is_a_task_and_seeds_differ(name: str) -> None:
    kind = KINDS[name]
    assert kind.from_seed(5) == kind.from_seed(5)
    assert len({str(kind.from_seed(seed).files) for seed in range(20)}) == 20
    assert len({kind.from_seed(seed).prompt for seed in range(20)}) > 15


def test_evaluation_tasks_are_the_same_on_every_machine() -> None:
    # The first characters of a few prompts: a change here changes what published numbers mean.
    task = KINDS["lookup_value"].from_seed(HELD_OUT_START)
    assert task == KINDS["lookup_value"].from_seed(HELD_OUT_START, real_python=False)
    assert all(len(KINDS[name].from_seed(HELD_OUT_START + 1).files) >= 1 for name in DEMO_KINDS)


@pytest.mark.parametrize("name", NAMES)
def test_wording(name: str) -> None:
    kind = KINDS[name]
    assert len(kind.templates) >= 30
    assert len(kind.held_out_templates) >= 4
    assert len(set(kind.templates)) == len(kind.templates)
    assert not set(kind.templates) & set(kind.held_out_templates)
    assert kind.from_seed(1, held_out_wording=True).prompt != kind.from_seed(1).prompt


def test_vocabulary_is_split() -> None:
    assert not set(TRAIN_WORDS) & set(HELD_OUT_WORDS)
    assert len(TRAIN_WORDS) > 600
    assert len(HELD_OUT_WORDS) > 60
    drawn = {word for word in Pool(random.Random(0), held_out=True).words(2000)}
    assert drawn & set(HELD_OUT_WORDS) or drawn & set(TRAIN_WORDS)
    assert not {word for _ in range(50) for word in Pool(random.Random(_)).words(20)} & set(HELD_OUT_WORDS)


def test_quoting_never_hides_the_text() -> None:
    pool = Pool(random.Random(1))
    for text in ("alpha", "a b", 'say "x"', "it's", "`x`", "a/b.txt"):
        assert all(text in quote(pool, text, 0.3) for _ in range(50))
    assert fill(pool, "{file}: {text}", {"file": "{text}", "text": "x"}).count("{text}") == 1  # values are not templates


def test_misspelt_names_point_to_one_file() -> None:
    found = 0
    for seed in range(200):
        pool = Pool(random.Random(seed))
        workspace = Workspace.random(pool, ("settings",))
        for path in workspace.paths():
            wrong = workspace.misspelt(pool, path)
            if wrong is not None:
                found += 1
                assert wrong not in workspace.documents
    assert found > 50


def test_settings_lines_hold_their_values() -> None:
    for seed in range(60):
        workspace = Workspace.random(Pool(random.Random(seed)), ("settings",))
        for path in workspace.paths("settings"):
            document = workspace.documents[path]
            assert document.format in FORMATS
            for setting in document.settings:
                assert document.lines[setting.line] == document.format.line(setting.key, setting.value)


def test_definitions_are_found() -> None:
    lines = ["class A(B):", "    def f(self):", "async def g():", "# def h():", "class_ = 1", "    class C:"]
    assert [(one.what, one.name, one.line) for one in definitions(lines)] == [
        ("class", "A", 0),
        ("method", "f", 1),
        ("function", "g", 2),
        ("class", "C", 5),
    ]


class FewWords(Pool):
    """Words that are file names too, so that what is rare happens often."""

    def word(self):
        return self.rng.choice(("control", "Makefile", "README", ".env", "NOTES", "messages"))


def test_no_name_is_both_a_file_and_a_directory():
    """A data worker once died on a directory that could not be written."""
    for seed in range(1500):
        paths = Workspace.random(FewWords(random.Random(f"clash:{seed}")), ("any",)).paths()
        folders = {"/".join(path.split("/")[:depth]) for path in paths for depth in range(1, path.count("/") + 1)}
        assert not folders & set(paths), seed
