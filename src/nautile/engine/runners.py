"""Which runner an engine gets, and what to tell the user about it."""

from __future__ import annotations

import os

import torch

from nautile.engine.native import NativeRunner, NativeUnavailable
from nautile.engine.native_drafts import NativeDraftingRunner
from nautile.engine.numpy_runner import NumpyRunner
from nautile.engine.options import EngineConfig
from nautile.engine.plan import Runner
from nautile.engine.runner import TorchRunner
from nautile.kernels.native import features
from nautile.model import Transformer
from nautile.state import StatePool

__all__ = ["computed_by", "make_runner"]


def make_runner(model: Transformer, pool: StatePool, options: EngineConfig) -> tuple[Runner, tuple[str, ...]]:
    """The runner that the options ask for, and a sentence about every faster one that "auto" passed over.

    Raises ValueError or NativeUnavailable when a runner that was asked for by name cannot run this model.
    """
    if getattr(model, "packed", None) is not None:  # whatever was asked for: nothing else reads packed weights
        return _packed(model, pool, options), ()
    if options.runner == "native":
        return _native(model, pool, options), ()
    if options.runner == "numpy":
        return NumpyRunner(model, pool), ()
    if options.runner == "torch" or model.embed.weight.device.type != "cpu":
        return TorchRunner(model, pool, options.speculate), ()
    return _fastest(model, pool, options)


def computed_by(runner: Runner, options: EngineConfig) -> str:
    """The arithmetic of a runner, for files: states that two runners compute differ in their last bits."""
    if isinstance(runner, NativeRunner):  # bit for bit the same with any threads, batches and drafts
        return f"native {options.precision}, {features()}"
    return f"{type(runner).__name__}, PyTorch {torch.__version__}, {options.device}"


def _packed(model: Transformer, pool: StatePool, options: EngineConfig) -> Runner:
    """The runner of packed weights; threads for experts that are not on the card: all cores but the one that drives it."""
    from nautile.engine.expert_dispatch import open_dispatch  # noqa: PLC0415  # the card's kernels only when they are needed
    from nautile.engine.gpu_runner import GPURunner  # noqa: PLC0415
    from nautile.engine.packed_weights import PackedNetwork  # noqa: PLC0415

    assert isinstance(model, PackedNetwork)
    if options.speculate:
        raise ValueError("packed weights leave the draft block out: run without speculation")
    threads = options.threads or max(1, (os.cpu_count() or 2) - 1)
    return GPURunner(model.packed, pool, open_dispatch(model.packed.store, threads, options.max_running), model)


def _fastest(model: Transformer, pool: StatePool, options: EngineConfig) -> tuple[Runner, tuple[str, ...]]:
    """On a CPU: native, else NumPy, else the modules."""
    try:
        return _native(model, pool, options), ()
    except NativeUnavailable as error:
        note = f"no native kernels: {error}"
    if NumpyRunner.applies(model, pool) and not options.speculate:
        return NumpyRunner(model, pool), (note,)
    return TorchRunner(model, pool, options.speculate), (note,)


def _native(model: Transformer, pool: StatePool, options: EngineConfig) -> NativeRunner:
    kind = NativeDraftingRunner if options.speculate else NativeRunner
    return kind(model, pool.pages, dtype=options.precision, threads=options.threads)
