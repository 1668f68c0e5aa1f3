"""Which number format a command gets: what it asked for, or what this CPU is fast in; never one that cannot run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nautile.cli.agent import SetupError, computes_in, open_client
from nautile.engine import Engine, EngineConfig
from nautile.engine import fast as fast_module
from nautile.engine.fast import choose_dtype, with_dtype
from nautile.engine.native import NativeRunner
from nautile.kernels.native import NativeUnavailable
from oracles.random_models import tiny_network


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_what_is_asked_for_is_given(name, monkeypatch):
    monkeypatch.setattr(fast_module, "features", lambda: pytest.fail("nothing needs to be looked up"))
    options = with_dtype(EngineConfig(max_running=3), choose_dtype(name))
    assert (options.precision, options.rows, options.max_running) == (name, name, 3)


@pytest.mark.parametrize(
    ("found", "dtype"),
    [("AVX-512 with bfloat16", "bfloat16"), ("AVX-512", "float32"), ("AVX2", "float32"), ("generic", "float32")],
)
def test_by_itself_it_takes_what_the_cpu_multiplies(found, dtype, monkeypatch):
    monkeypatch.setattr(fast_module, "features", lambda: found)
    assert choose_dtype().dtype == dtype


def test_without_a_compiler_it_says_so(monkeypatch):
    def features():
        raise NativeUnavailable("no compiler")

    monkeypatch.setattr(fast_module, "features", features)
    choice = choose_dtype()
    assert choice.dtype == "float32" and "no compiler" in choice.why


def test_an_engine_says_what_it_really_computes_in():
    """Packed rows go through the modules, whatever the native kernels were told."""
    model = tiny_network((0, 4), head_dim=72, index_head_dim=32, fake_quant_kv=True, fake_quant_indexer=True)
    packed = EngineConfig(precision="bfloat16", rows="packed", pool_bytes=8 << 20, max_running=2)
    for options, expected in ((packed, "float32"), (replace(packed, rows="bfloat16"), "bfloat16")):
        engine = Engine(model, options)
        try:
            assert fast_module.computes_in(engine) == expected
        finally:
            engine.close()


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="float32, bfloat16; not 'fp8'"):
        choose_dtype("fp8")
    with pytest.raises(SetupError, match="not 'fp8'"):
        open_client(dtype="fp8")


def test_a_model_that_the_kernels_cannot_run_is_opened_in_float32(monkeypatch):
    def refuse(*_, **__):
        raise NativeUnavailable("not for this shape")

    monkeypatch.setattr(fast_module, "features", lambda: "AVX-512 with bfloat16")
    monkeypatch.setattr(NativeRunner, "__init__", refuse)
    client = open_client(dtype="auto")
    try:
        assert computes_in(client) == "float32" and client.engine.options.rows == "float32"
        assert "not for this shape" in client.engine.runner_notes[0]
    finally:
        client.engine.close()
