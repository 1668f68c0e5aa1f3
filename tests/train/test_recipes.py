"""The scripts of runs/ parse, and every command of the whole recipe has options that exist and kinds that may be trained on."""

import shlex
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from nautile.cli import app
from nautile.train.environments import TRAINED

RUNS = Path(__file__).parents[2] / "runs"
PROGRAM = get_command(app)


@pytest.mark.parametrize("script", sorted(RUNS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def parsed(words):
    """The options of a command line, checked by the command itself; nothing is run."""
    command, context = PROGRAM, None
    while hasattr(command, "resolve_command"):
        context = command.make_context("nautile", list(words), parent=context, resilient_parsing=True)
        name, command, words = command.resolve_command(context, list(words))
    return name, command.make_context(name, list(words), parent=context).params


def test_every_stage_of_the_recipe_is_a_command(tmp_path):
    listed = subprocess.run(
        ["bash", str(RUNS / "nano.sh"), "--list", str(tmp_path)], check=True, capture_output=True, text=True
    )
    stages = [line.partition(": ")[::2] for line in listed.stdout.splitlines()]
    commands = [shlex.split(text) for _, text in stages if text.startswith("nautile ")]
    found = [parsed(words[1:]) for words in commands]
    names = [name for name, _ in found]
    assert [name for name in names if name not in ("export", "page")] == [
        "pretrain", "practice", "sft", "long", "long", "long", "long", "grpo", "grpo", "grpo", "distill", "tools",
    ]  # fmt: skip
    assert names.count("export") == 5
    for name, options in found:
        if name == "grpo":
            assert set(options["kinds"].split(",")) <= set(TRAINED)


def test_an_unknown_option_is_found():
    with pytest.raises(Exception, match="No such option"):
        parsed(["train", "grpo", "--init", "a", "--out", "b", "--speed", "9"])
