"""Needles judged in one pass: what counts is what greedy decoding would write."""

from pathlib import Path

import torch

from nautile.checkpoint import load_model
from nautile.protocol import Tokenizer
from nautile.train.far import right_tokens
from nautile.train.needles import haystack, random_pool
from nautile.train.traces import tokenise

NANO = Path(__file__).parents[2] / "src" / "nautile" / "weights" / "nano"


def test_a_trial_counts_what_the_whole_pass_would_choose() -> None:
    model, tokenizer = load_model(NANO).eval(), Tokenizer.load(NANO)
    text = haystack(random_pool("far", True), tokenizer, 260, depth=0.2)
    ids, own, _ = tokenise(text.messages(), (), tokenizer)
    places = [place for place, one in enumerate(own) if one]
    with torch.no_grad():
        chosen = model(torch.tensor([ids]))[0].argmax(-1)
    right = sum(int(chosen[place - 1]) == ids[place] for place in places)
    assert right_tokens(model, ids, own, 128) == (right, len(places))
    assert right == len(places)  # the shipped model reads this far
    ids[places[-3]] = (ids[places[-3]] + 1) % 8000
    assert right_tokens(model, ids, own, 128)[0] < len(places)
