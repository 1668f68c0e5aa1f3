"""Tools under other names: there and back, nothing twice, and evaluation's names are not training's."""

import random

from nautile.agent.tools import TOOLS
from nautile.train import renaming
from nautile.train.renaming import HELD_OUT_RENAMING, random_renaming, system_prompt
from nautile.train.tasks import Pool

ARGUMENTS = {tool["function"]["name"]: list(tool["function"]["parameters"]["properties"]) for tool in TOOLS}


def test_calls_go_there_and_back() -> None:
    for seed in range(100):
        found = random_renaming(Pool(random.Random(seed)), TOOLS)
        for name, keys in ARGUMENTS.items():
            arguments = dict.fromkeys(keys, "x")
            assert found.original(*found.call(name, arguments)) == (name, arguments)


def test_specifications_name_everything_once() -> None:
    for seed in range(100):
        tools = random_renaming(Pool(random.Random(seed)), TOOLS).specifications(TOOLS)
        assert len({tool["function"]["name"] for tool in tools}) == len(TOOLS)
        for tool, original in zip(tools, TOOLS, strict=True):
            parameters, before = tool["function"]["parameters"], original["function"]["parameters"]
            assert len(parameters["properties"]) == len(before["properties"])
            assert set(parameters["required"]) <= set(parameters["properties"])
            assert len(parameters["required"]) == len(before["required"])
    assert TOOLS[0]["function"]["name"] == "list"  # the originals are left alone


def test_old_words_are_unknown_after_renaming() -> None:
    name, arguments = HELD_OUT_RENAMING.original("grep", {"pattern": "x"})
    assert name not in ARGUMENTS
    assert HELD_OUT_RENAMING.original("locate_string", {"pattern": "x"}) == ("grep", {"pattern ": "x"})
    assert HELD_OUT_RENAMING.original("locate_string", {"phrase": "x", "document": "f"}) == (
        "grep",
        {"pattern": "x", "path": "f"},
    )
    assert arguments == {"pattern": "x"}


def test_names_of_evaluation_are_not_among_those_of_training() -> None:
    usual = {name for names in (*renaming._NAMES.values(), *renaming._PARAMETERS.values()) for name in names}
    assert not usual & {*HELD_OUT_RENAMING.tools.values(), *HELD_OUT_RENAMING.parameters.values()}


def test_system_prompts_differ() -> None:
    prompts = {system_prompt(random.Random(seed)) for seed in range(200)}
    assert len(prompts) > 60
    assert all(prompt.endswith(".") and "[" not in prompt for prompt in prompts)
