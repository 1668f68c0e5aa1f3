"""Environments: experts are rewarded, tricks are not, held-out kinds are in no training data."""

import py_compile
import shutil
from pathlib import Path

import pytest

from nautile.train.environment import Outcome, write_files
from nautile.train.environment_check import check, play
from nautile.train.environments import ENVIRONMENTS, HELD_OUT, TRAINED, environment
from nautile.train.environments.repository import FixBug
from nautile.train.environments.terminal import StatusReport
from nautile.train.tasks import KINDS
from nautile.train.traces import TraceMix

OWN = [kind for kind in ENVIRONMENTS if not kind.startswith(("reworded_", "undecided_", "fresh_"))]  # the others only ask anew

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is missing: apt-get install bubblewrap")


@pytest.mark.parametrize("kind", [*HELD_OUT, "edit_value", "largest_file", "reworded_count_files"])
def test_only_the_expert_is_rewarded(kind):
    checked = list(check([ENVIRONMENTS[kind]], [11]))
    assert len(checked) >= 5
    assert [one for one in checked if not one.right] == []


@pytest.mark.slow
def test_every_environment_over_seeds():
    assert [one for one in check([ENVIRONMENTS[kind] for kind in OWN], range(100, 106)) if not one.right] == []


def test_held_out_kinds_are_in_no_training_data():
    assert len(TRAINED) >= 10 and len(HELD_OUT) == 4
    assert {ENVIRONMENTS[kind].shape for kind in HELD_OUT} >= {"terminal", "repository", "mcp"}
    assert not set(HELD_OUT) & (set(KINDS) | set(TraceMix().kinds))


@pytest.mark.parametrize("kind", [*sorted(OWN), "undecided_rename_file"])
def test_a_seed_is_a_task(kind):
    one, same, other = (ENVIRONMENTS[kind](seed) for seed in (5, 5, 6))
    assert (one.prompt, dict(one.files()), one.expert()) == (same.prompt, dict(same.files()), same.expert())
    assert (one.prompt, dict(one.files()), one.expert()) != (other.prompt, dict(other.files()), other.expert())


def test_stale_or_forged_bytecode_does_not_count(tmp_path):
    """The hidden tests see the source: a compiled file left in its place gets nothing."""
    task = FixBug(3)
    task.set_up(tmp_path)
    cache = tmp_path / f"src/{task.package}/__pycache__"
    cache.mkdir()
    fixed = Path(tmp_path, task.path).read_text().replace(task.bug.wrong, task.bug.right)
    (tmp_path / "fixed.py").write_text(fixed)
    py_compile.compile(
        str(tmp_path / "fixed.py"),
        str(cache / f"{task.bug.module}.cpython-311.pyc"),
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    assert task.grade(Outcome(tmp_path, "")).reward == 0


def test_a_link_out_of_the_workspace_is_not_a_file(tmp_path):
    (tmp_path / "passwd").symlink_to("/etc/passwd")
    assert Outcome(tmp_path, "").files() == {}


def test_wrong_names_say_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="choose from count_lines"):
        environment("nothing")
    with pytest.raises(ValueError, match="not a path inside"):
        write_files(tmp_path, {"../x": b""})


def test_a_grader_that_would_pass_the_trick_is_found_out(tmp_path):
    """The check itself can fail: with the hidden logs taken out, the trick that prints the shown report passes."""

    class Careless(StatusReport):
        def __init__(self, seed):
            super().__init__(seed)
            self.hidden = [self.log]

    trick = next(script for script in Careless(1).adversaries() if "shown" in script.name)
    assert play(Careless(1), trick, tmp_path).reward == 1
    assert any(not one.right for one in check([Careless], [1]))
