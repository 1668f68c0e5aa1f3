"""Traces: they change no logit, and they say what a second look at the network says."""

from __future__ import annotations

import base64
import json
import re

import pytest
import torch

from nautile.engine.tracing import page, record
from nautile.model.transformer import Trace
from oracles.random_models import random_ids, tiny_network

SCHEDULE = (0, 4, 128, 4)
LENGTH = 140


@pytest.fixture(scope="module")
def model():
    return tiny_network(SCHEDULE, seed=3)


@pytest.fixture(scope="module")
def ids(model):
    return random_ids(model.config, LENGTH, seed=1).tolist()


@pytest.mark.parametrize("kinds", [(True, True, True), (False, False, False), (True, False, True)])
def test_tracing_changes_no_logit_and_keeps_what_was_asked_for(model, ids, kinds):
    row, trace = torch.tensor([ids]), Trace(*kinds)
    state, other = model.new_state(1), model.new_state(1)
    assert torch.equal(model(row, trace=trace), model(row))
    assert torch.equal(model(row, state=state, trace=Trace(*kinds)), model(row, state=other))
    indexer, experts, mhc = kinds
    for layer, ratio in zip(trace.layers, SCHEDULE, strict=True):
        assert (layer.attention.selected is not None) == (indexer and ratio == 4)
        assert (layer.routing is not None) == experts
        assert (layer.mixing is not None) == mhc


def test_a_record_says_what_each_layer_decided(model, ids):
    found = record(model, ids, 100, Trace(mhc=True))
    config = model.config
    assert json.loads(json.dumps(found)) == found and found["prompt_length"] == 100
    logs = model(torch.tensor([ids]))[0].detach().log_softmax(-1)
    for position, token in enumerate(found["tokens"]):
        if position:
            assert token["logprob"] == pytest.approx(float(logs[position - 1, ids[position]]), abs=1e-3)
    for layer, ratio in zip(found["layers"], SCHEDULE, strict=True):
        assert layer["ratio"] == ratio and ("picked" in layer) == (ratio == 4)
        assert all(len(set(chosen)) == config.num_experts_per_tok for chosen in layer["experts"])
        for site in layer["mixing"]:
            matrix = torch.tensor(site["matrix"])
            assert matrix.shape == (LENGTH, config.hc_mult, config.hc_mult)
            torch.testing.assert_close(matrix.sum(-1), torch.ones(LENGTH, config.hc_mult), atol=0.02, rtol=0)
        for position, ranges in enumerate(layer.get("picked", [])):
            entries = [entry for first, last in ranges for entry in range(first, last + 1)]
            assert len(entries) == min(config.index_topk, (position + 1) // 4)
            assert entries == sorted(entries) and all(entry < (position + 1) // 4 for entry in entries)
    assert [draft["position"] for draft in found["drafts"]] == list(range(2, LENGTH))
    for draft in found["drafts"]:
        assert draft["right"] == (draft["draft"] == ids[draft["position"]])


def test_the_page_holds_the_record_and_nothing_from_elsewhere(model, ids):
    found = record(model, ids[:20], 15, Trace())
    found["tokens"][3]["text"] = "</script><script>alert(1)</script>"
    html = page(found)
    (data,) = re.findall(r'<script id="data" type="application/octet-stream">(.*?)</script>', html)
    assert json.loads(base64.b64decode(data)) == found
    assert "alert(1)" not in html
    assert not re.search(r"(?:src|href)\s*=|@import|url\(|https?://", html)
