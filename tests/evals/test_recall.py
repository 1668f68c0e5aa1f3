"""Recall of the indexer: one when it scores as attention does, k / n when it knows nothing, and the state changes nothing."""

import dataclasses
from pathlib import Path

import pytest
import torch

from nautile.evals import recall
from nautile.evals.recall import indexer_recall
from nautile.model import Transformer
from nautile.model.indexer import Indexer
from nautile.model.initialise import initialise
from nautile.train.probe import probe
from oracles.random_models import tiny_network

NANO = Path(__file__).parents[2] / "src" / "nautile" / "weights" / "nano"
TOKENS = 600


def model(topk: int) -> Transformer:
    config = dataclasses.replace(tiny_network((0, 4, 128), seed=1).config, index_topk=topk)
    return initialise(Transformer(config.replace(initializer_range=0.02)), seed=3)


def ids() -> list[int]:
    return torch.randint(3, 60, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()


def test_nothing_left_out_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to choose"):
        indexer_recall(model(400), ids())


def test_it_agrees_with_a_pass_over_the_whole_row() -> None:
    """With a dense first layer before it, the one CSA layer sees the same inputs with and without a state."""
    network = model(20)
    [found] = indexer_recall(network, ids(), queries=TOKENS - 4 * 21)
    whole = probe(network, torch.tensor([ids()]), 20).recall[0]
    assert found.layer == 1
    assert whole is not None
    assert abs(found.recall - whole) < 0.02  # the probe begins where more than k entries are seen, to the query


def test_the_command_says_what_it_measured_after_each_text(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny network in nano's place, whose tokens are nano's modulo its vocabulary."""
    network, kept = model(20), []
    monkeypatch.setattr(recall, "load_model", lambda directory: network)
    measured = recall.indexer_recall
    monkeypatch.setattr(recall, "indexer_recall", lambda m, ids, queries: measured(m, [i % 60 for i in ids], queries))
    report = recall.recall_report(NANO, (600, 700), 2, 50, lambda result: kept.append(result["texts"]))
    assert kept == [{"600": 1}, {"600": 2}, {"600": 2, "700": 1}, {"600": 2, "700": 2}]
    [row] = report["lengths"]["700"]
    assert row["layer"] == 1 and row["lowest"] <= row["recall"] <= 1 and 20 / 175 < row["chance"] < 20 / 140


def test_a_perfect_indexer_and_one_that_knows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    network = model(20)
    monkeypatch.setattr(Indexer, "scores", lambda self, x, low, keys, chunk: torch.rand(1, x.shape[1], keys.shape[1]))
    [blind] = indexer_recall(network, ids(), queries=100)
    assert abs(blind.recall - 20 / 150) < 0.06 and abs(blind.recall - blind.chance) < 0.06
    assert blind.recall_top == blind.recall  # of the 64 with most attention k are looked at when k is less
    assert 0.05 < blind.mass < 0.3
