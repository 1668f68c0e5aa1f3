"""Heads, experts and prompts divided over processes give the logits and tokens of one process."""

import pytest

from model.parallel_ranks import rank_main
from nautile.model.parallel import prompt_slices
from ranks import run_ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree_with_one_process(ranks, tmp_path):
    run_ranks(rank_main, ranks, str(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("done*")) == [f"done{rank}" for rank in range(ranks)]


@pytest.mark.parametrize(("tokens", "ranks"), [(256, 2), (651, 4), (1025, 3), (5, 1), (4096, 4)])
def test_slices_cover_the_prompt(tokens, ranks):
    slices = prompt_slices(tokens, ranks, 128)
    assert [token for part in slices for token in part] == list(range(tokens))
    assert all(part.start % 128 == 0 for part in slices)


def test_a_prompt_too_short_for_its_ranks_is_refused():
    with pytest.raises(ValueError, match="use fewer ranks"):
        prompt_slices(500, 4, 128)
