"""The doctor: it passes a sound engine, and each check fails on an engine that has the fault it is for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nautile.engine import Engine, EngineConfig, doctor
from oracles.random_models import tiny_network

OPTIONS = EngineConfig(runner="torch", pool_bytes=8 << 20, block_tokens=128, snapshot_every=128, max_running=4)


@pytest.fixture(scope="module")
def model():
    return tiny_network((0, 4, 128), seed=3)


@pytest.fixture
def engine(model):
    engine = Engine(model, replace(OPTIONS, runner="auto"))
    yield engine
    engine.close()


def test_a_sound_engine_passes_every_check_but_random_drafts(model):
    found = {finding.name: finding for finding in doctor.examine(model, None, replace(OPTIONS, runner="auto"))}
    assert set(found) == {"runner", "number format", "prefix cache", "needle", "state bytes", "after warm-up", "drafts"}
    for name in ("prefix cache", "needle", "state bytes"):
        assert found[name].verdict == "ok", found[name]
    assert found["after warm-up"].verdict in ("ok", "warn")  # a busy machine may make one round slow
    assert found["drafts"].verdict in ("warn", "bad")  # a random MTP block guesses nothing
    assert "leave speculate off" in found["drafts"].fix


def test_a_cache_that_never_hits_is_noticed(model):
    engine = Engine(model, replace(OPTIONS, prefix_cache=False))
    finding = doctor._prefix_hits(engine)
    engine.close()
    assert finding.verdict == "bad" and "prefix_cache" in finding.fix


def test_a_wrong_token_at_one_residue_is_noticed(engine, monkeypatch):
    step = engine.runner.step

    def wrong(plan):
        logits = step(plan)
        if any((piece.sequence.length + len(piece.ids)) % 4 == 3 and piece.rows for piece in plan.pieces):
            logits = -logits
        return logits

    monkeypatch.setattr(engine.runner, "step", wrong)
    finding = doctor._residues(engine)
    assert finding.verdict == "bad" and finding.figures["differing_residues"]


def test_state_that_is_too_large_is_noticed(engine, monkeypatch):
    ensure = engine.pool.ensure
    monkeypatch.setattr(engine.pool, "ensure", lambda sequence, tokens: ensure(sequence, tokens + 128))
    finding = doctor._state_bytes(engine)
    assert finding.verdict == "bad" and finding.figures["bytes"] > finding.figures["formula"]


def test_memory_that_grows_is_noticed(engine, monkeypatch):
    step, kept = engine.runner.step, []

    def leaking(plan):
        kept.append(bytearray(b"x" * (4 << 20)))
        return step(plan)

    monkeypatch.setattr(engine.runner, "step", leaking)
    assert doctor._steady(engine).verdict == "bad"


def test_a_checkpoint_without_mtp_is_not_blamed():
    model = tiny_network((0, 4), seed=1, num_nextn_predict_layers=0, compress_ratios=(0, 4))
    assert doctor._drafts(model, None, OPTIONS).verdict == "n/a"
