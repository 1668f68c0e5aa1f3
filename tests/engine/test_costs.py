"""Costs against published figures, against a real state, and against torch's own FLOP counter."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from nautile import ModelConfig
from nautile.checkpoint import manifest
from nautile.checkpoint.layout import target_shapes
from nautile.cli.plan import plan
from nautile.engine import costs
from nautile.engine.costs import PlanOptions
from nautile.state import State
from oracles.random_models import tiny_config, tiny_network

FLASH, PRO, NANO = (ModelConfig.preset(name) for name in ("flash", "pro", "nano"))
MILLION, TWO_20 = 1_000_000, 1 << 20


def ratios(config: ModelConfig, context: int) -> dict[str, float]:
    kv = costs.kv_bytes(config, context).total
    return {
        "kv_of_v32": kv / costs.v32_kv_bytes(context),
        "kv_of_gqa8": kv / costs.gqa8_kv_bytes(context, config.num_hidden_layers),
        "flops_of_v32": costs.decode_flops(config, context).weighted / costs.v32_decode_flops(context).weighted,
    }


@pytest.mark.parametrize(
    ("config", "kv", "gqa", "flops"), [(FLASH, 0.0734, 0.0200, 0.102), (PRO, 0.1052, 0.0202, 0.271)], ids=["flash", "pro"]
)
def test_published_percentages_at_a_million(config: ModelConfig, kv: float, gqa: float, flops: float) -> None:
    """7.3 % and 10.5 % of V3.2's KV, 2.0 % of GQA-8, 10.2 % and 27.1 % of V3.2's FLOPs."""
    found = ratios(config, MILLION)
    assert round(found["kv_of_v32"], 4) == kv
    assert round(found["kv_of_gqa8"], 4) == gqa
    assert round(found["flops_of_v32"], 3) == flops


@pytest.mark.parametrize(
    ("config", "curve"),
    [
        (PRO, {4096: (0.81, 0.22), 65536: (0.63, 0.11), 131072: (0.53, 0.108), 524288: (0.33, 0.106), TWO_20: (0.267, 0.105)}),
        (FLASH, {4096: (0.22, 0.15), 65536: (0.18, 0.078), TWO_20: (0.101, 0.073)}),
    ],
    ids=["pro", "flash"],
)
def test_curve_over_the_context(config: ModelConfig, curve: dict[int, tuple[float, float]]) -> None:
    for context, (flops, kv) in curve.items():
        found = ratios(config, context)
        assert found["flops_of_v32"] == pytest.approx(flops, abs=0.006)
        assert found["kv_of_v32"] == pytest.approx(kv, abs=0.005)


def test_published_terms() -> None:
    """Bytes a token, and the components of the FLOPs at a million tokens."""
    for config, per_token, total in ((FLASH, 3514, 3.530e9), (PRO, 5031, 5.055e9)):
        kv = costs.kv_bytes(config, MILLION)
        assert kv.history / MILLION == pytest.approx(per_token, abs=0.5)
        assert kv.total == pytest.approx(total, rel=2e-4)
    assert costs.v32_kv_bytes(1) == 48_068 and costs.gqa8_kv_bytes(1, 43) == 43 * 4096
    v32 = costs.v32_decode_flops(MILLION)
    assert v32.weighted == pytest.approx(1146.1e9, rel=1e-4)
    assert v32.linear_fp8 + v32.linear_bf16 == pytest.approx(2 * 37.5e9, rel=2e-3)
    for config, linear, core, index in ((FLASH, 28.4, 45.2, 43.0), (PRO, 101.6, 147.2, 61.4)):
        flops = costs.decode_flops(config, MILLION)
        rest = flops.weighted - 2 * flops.core - 0.5 * flops.index_scores
        found = (rest / 1e9, 2 * flops.core / 1e9, 0.5 * flops.index_scores / 1e9)
        assert found == pytest.approx((linear, core, index), abs=0.12)


@pytest.mark.parametrize(("config", "total", "active"), [(FLASH, 284.33, 13.27), (PRO, 1573.0, 48.85)], ids=["flash", "pro"])
def test_parameter_counts(config: ModelConfig, total: float, active: float) -> None:
    flops = costs.decode_flops(config, 1)
    linear = flops.total - flops.core - flops.index_scores - flops.stream_mixing
    assert linear / 2e9 == pytest.approx(active, abs=0.006)
    trunk = config.replace(num_nextn_predict_layers=0)
    shapes = {name: shape for name, shape in target_shapes(trunk).items() if not name.endswith("tid2eid")}
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e9 == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("config", [FLASH, NANO], ids=["flash", "nano"])
def test_weight_bytes_are_the_files(config: ModelConfig) -> None:
    stored = costs.weight_bytes(config)
    assert stored.total == sum(tensor.nbytes for tensor in manifest(config))
    wide = costs.weight_bytes(config, "fp32")
    shapes = target_shapes(config)
    expected = sum(torch.Size(shape).numel() * (8 if name.endswith("tid2eid") else 4) for name, shape in shapes.items())
    assert wide.total == expected
    assert wide.embedding == 2 * costs.weight_bytes(config, "bf16").embedding
    assert stored.mtp and (stored.head == 0) == config.tie_word_embeddings


@pytest.mark.parametrize("schedule", [(0, 0, 4, 128, 4), (128,), (4, 4), (0,)])
@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
def test_state_allocates_what_the_formula_says(schedule: tuple[int, ...], dtype: torch.dtype, name: Any) -> None:
    config = tiny_config(schedule)
    for tokens in (2048, 2049, 5000):
        state = State(config, 3, dtype)
        state.reserve(tokens)
        kv = costs.kv_bytes(config, tokens, 3, name)
        assert kv.total == state.nbytes
        windows = sum(layer.window.buffer.nbytes for layer in state.layers)
        assert sum(layer.entries.nbytes for layer in state.layers if layer.entries is not None) == kv.entries
        assert sum(layer.index_keys.nbytes for layer in state.layers if layer.index_keys is not None) == kv.index_keys
        assert kv.window < windows < kv.window + kv.spare or not kv.tails


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "index_topk": 4, "num_hash_layers": 0}])
def test_decode_flops_against_the_counter(changes: dict[str, Any]) -> None:
    """One token of two sequences, counted by torch, against the formula of a path that masks instead of gathering."""
    model = tiny_network((0, 4, 128, 4), **changes)
    config = model.config
    state = model.new_state(2)
    context = 300
    ids = torch.randint(config.vocab_size, (2, context), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids[:, :-1], state=state, logits="none")
        with FlopCounterMode(display=False) as counter:
            model(ids[:, -1:], state=state)
    expected = costs.decode_flops(config, context, gathered=False)
    assert counter.get_total_flops() == 2 * expected.total
    assert costs.decode_flops(config, context).core < expected.core


def test_training_flops_by_summing_positions() -> None:
    """The closed form against a sum of decode costs over the positions, and its order of magnitude: 6 per parameter."""
    config = tiny_config((0, 4, 128, 4), num_nextn_predict_layers=0, index_topk=8)
    for length in (200, 257):
        by_position = [costs.decode_flops(config, context).total for context in range(1, length + 1)]
        assert costs.train_flops_per_token(config, length) == pytest.approx(3 * sum(by_position) / length, rel=1e-12)
    active = costs.decode_flops(NANO, 1).total / 2
    assert 6 * active < costs.train_flops_per_token(NANO, 2048) < 12 * active
    with_drafts = costs.train_flops_per_token(config.replace(num_nextn_predict_layers=1), 200)
    assert with_drafts > costs.train_flops_per_token(config, 200)
    short = tiny_config((4,), index_topk=8, num_nextn_predict_layers=0)
    free = costs.decode_flops(short, 1)
    assert costs.train_flops_per_token(short, 32) < 3 * (free.total + free.core * 40)


def test_placement_adds_up() -> None:
    result = costs.make_plan(FLASH, PlanOptions(gpu_memory=80 * 10**9, host_memory=128 * 10**9))
    rows = {row.kind: row for row in result.placement}
    assert result.fits
    assert sum(row.total for row in result.placement) == result.total_bytes
    assert all(row.gpu + row.host + row.missing == row.total for row in result.placement)
    assert sum(row.gpu for row in result.placement) <= 80 * 10**9
    assert rows["experts"].gpu % result.expert_bytes == 0 and rows["experts"].gpu > 60 * 10**9
    assert rows["KV history"].host == 0 and rows["embedding table"].gpu == 0
    assert result.expert_bytes * 43 * 256 == rows["experts"].total
    small = costs.make_plan(PRO, PlanOptions(gpu_memory=80 * 10**9))
    assert not small.fits and sum(row.missing for row in small.placement) > 700 * 10**9
    assert costs.make_plan(NANO, PlanOptions()).fits is None


def test_long_contexts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2,000,000 tokens: this model takes 1 to 1,048,576"):
        costs.make_plan(FLASH, PlanOptions(context=2_000_000))
    with pytest.raises(ValueError, match="batch at least 1"):
        costs.kv_bytes(FLASH, 1, 0)


def test_amounts_are_parsed() -> None:
    assert [costs.parse_tokens(text) for text in ("1M", "128k", "1,000,000", "0.5M")] == [TWO_20, 131072, MILLION, 524288]
    assert [costs.parse_bytes(text) for text in ("80GB", "80 GiB", "1.5T", "512")] == [80 * 10**9, 80 << 30, 1.5e12, 512]
    for wrong in ("", "much", "-1", "1Q"):
        with pytest.raises(ValueError, match="write"):
            costs.parse_tokens(wrong)
        with pytest.raises(ValueError, match="write 80GB"):
            costs.parse_bytes(wrong)


# the command ---------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(plan)
    return CliRunner().invoke(app, arguments)


def test_command_json() -> None:
    found = run("--model", "pro", "--context", "1M", "--gpu-memory", "80GB", "--host-memory", "1TB", "--json")
    assert found.exit_code == 0, found.output
    data = json.loads(found.output)
    for row in data["baselines"]:
        assert {name: row[name] for name in ratios(PRO, row["context"])} == ratios(PRO, row["context"])
    assert data["context"] == TWO_20 and [row["context"] for row in data["baselines"]] == [MILLION, TWO_20]
    assert round(data["baselines"][0]["flops_of_v32"], 3) == 0.271
    assert set(data["bytes"]) == {"total", "weights", "kv_history", "kv_tail", "workspace"}
    assert data["flops_per_token"]["terms"]["index_scores"]["precision"] == "fp4 x fp4"
    assert data["fits"] is True and data["precision_weights"].startswith("inferred")


def test_command_tables() -> None:
    found = run("--model", "flash", "--gpu-memory", "80GB", "--host-memory", "64GB")
    assert found.exit_code == 0, found.output
    for text in (
        "at 1,000,000",
        "at 1,048,576",
        "7.3%",
        "10.2%",
        "2.0%",
        "inferred",
        "KV history",
        "workspace",
        "does not fit",
    ):
        assert text in found.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--model", "flash", "--context", "lots"), "no number of tokens"),
        (("--model", "flash", "--context", "2M"), "this model takes 1 to"),
        (("--model", "flash", "--gpu-memory", "big"), "no amount of memory"),
        (("--model", "flash", "--weights", "int4"), "stored, bf16 or fp32"),
        (("--model", "flash", "--batch", "0"), "at least 1"),
    ],
)
def test_command_refuses(arguments: tuple[str, ...], text: str) -> None:
    found = run(*arguments)
    assert found.exit_code != 0
    assert text in " ".join(found.output.replace("│", " ").split())


def test_every_term_has_a_formula_and_a_weight() -> None:
    for cost in (costs.WeightBytes, costs.KVBytes, costs.WorkspaceBytes, costs.DecodeFlops, costs.V32Flops):
        names = {field.name for field in dataclasses.fields(cost)}
        assert set(cost.FORMULAS) == names
        assert set(getattr(cost, "WEIGHTS", cost.FORMULAS)) == names
