"""Harder forms of the tool tasks: nothing in them is kept for evaluation, and what is measured is not practised."""

import re

import pytest

from nautile.train.environments import ENVIRONMENTS, FRESH_KINDS, TRAINED
from nautile.train.environments.rewordings import FRESH, PRACTISED, UNDECIDED
from nautile.train.grpo import GRPOConfig
from nautile.train.run_state import RunError
from nautile.train.tasks import KINDS
from nautile.train.tasks.wording import grams

KNOWN = {run for kind in KINDS.values() for text in kind.templates for run in grams(text)}
KEPT = {run for kind in KINDS.values() for text in kind.held_out_templates for run in grams(text)} - KNOWN


@pytest.mark.parametrize("name", KINDS)
def test_sentences_name_everything_once_and_share_nothing(name):
    slots = sorted(set(re.findall(r"\{(\w+)\}", " ".join(KINDS[name].templates))))
    for text in (*PRACTISED[name], *FRESH[name]):
        assert sorted(re.findall(r"\{(\w+)\}", text)) == slots, text
        assert not grams(text) & KEPT, text
    practised = {run for text in PRACTISED[name] for run in grams(text)} - KNOWN
    assert not any(grams(text) & practised for text in FRESH[name])


def test_a_variant_asks_in_its_own_words():
    task, usual = ENVIRONMENTS["reworded_last_line"](5), ENVIRONMENTS["last_line"](5)
    words = grams(task.prompt, 3)
    assert any(words & grams(text, 3) for text in PRACTISED["last_line"])
    assert not any(grams(usual.prompt, 4) & grams(text, 4) for text in PRACTISED["last_line"])


def test_undecided_sentences_are_practised_ones():
    task = ENVIRONMENTS["undecided_find_file"](3)
    chosen = [PRACTISED["find_file"][place] for place in UNDECIDED["find_file"]]
    assert task.source.templates == tuple(chosen) and "undecided_find_file" in TRAINED
    assert all(0 <= place < len(PRACTISED[name]) for name, places in UNDECIDED.items() for place in places)


def test_words_for_measuring_are_refused_for_training():
    assert not set(FRESH_KINDS) & set(TRAINED)
    with pytest.raises(RunError, match="measured, never trained on"):
        GRPOConfig(("fresh_last_line",))
