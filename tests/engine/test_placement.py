"""Which experts lie on the card: nothing is placed twice or nowhere, and what does not fit is said before it is tried."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.flash_models import budget, flash_config, packed
from nautile.config import ModelConfig
from nautile.engine.placement import (
    Budget,
    PlacementError,
    dense_bytes,
    expert_bytes,
    load_counts,
    place_experts,
    save_counts,
)


@given(st.integers(0, 64), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_every_expert_has_one_place(on_card, staging):
    config = flash_config()
    placement = place_experts(config, budget(config, on_card, staging))
    assert placement.on_card == on_card and placement.in_host == 64 - on_card
    sizes = [len(row) for row in placement.resident]
    assert max(sizes) - min(sizes) <= 1 and all(list(row) == sorted(set(row)) for row in placement.resident)
    assert placement.fraction == on_card / 64


@given(st.lists(st.integers(0, 1000), min_size=64, max_size=64), st.integers(1, 63))
@settings(max_examples=40, deadline=None)
def test_the_most_used_lie_on_the_card(counts, on_card):
    config = flash_config()
    used = torch.tensor(counts).view(4, 16)
    placement = place_experts(config, budget(config, on_card), used)
    mask = torch.zeros_like(used, dtype=torch.bool)
    for layer, row in enumerate(placement.resident):
        mask[layer, list(row)] = True
    assert int(mask.sum()) == on_card and used[mask].min() >= used[~mask].max()


def test_flash_on_a_card_of_80_gb():
    flash = ModelConfig.preset("flash")
    assert expert_bytes(flash) == 13_369_344
    placement = place_experts(flash, Budget(int(79e9), int(120e9), int(0.1e9)))
    assert 0.42 < placement.fraction < 0.48
    assert placement.in_host * expert_bytes(flash) < 90e9
    whole = place_experts(flash, Budget(int(200e9), 0))
    assert whole.fraction == 1 and whole.staging == 0


@pytest.mark.parametrize(
    ("card", "host", "text"), [(5e9, 200e9, "the card has 5.00 GB"), (79e9, 40e9, "host memory of 40.00 GB")]
)
def test_too_little_memory_says_what_is_missing(card, host, text):
    with pytest.raises(PlacementError, match=text):
        place_experts(ModelConfig.preset("flash"), Budget(int(card), int(host)))


def test_dense_weights_are_what_is_allocated():
    config = flash_config()
    assert packed(config).nbytes == pytest.approx(dense_bytes(config), rel=0.05)


def test_counts_survive_and_other_files_are_refused(tmp_path):
    counts = torch.randint(1000, (4, 16))
    save_counts(tmp_path / "new" / "counts.json", counts)
    assert torch.equal(load_counts(tmp_path / "new" / "counts.json"), counts)
    for text in ("", "{}", '{"format": "nautile routing counts", "counts": [[1], [2, 3]]}'):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(PlacementError, match="delete it"):
            load_counts(tmp_path / "bad")
    with pytest.raises(PlacementError, match="do not belong"):
        place_experts(flash_config(), budget(flash_config(), 10), torch.zeros(3, 16))
