"""The number format that a command computes in on this machine: bfloat16 where the CPU multiplies it, else float32.

bfloat16 keeps weights on FP8 and FP4 grids as they are and chooses float32's token in more than 99 of 100 places; docs/cpu.md
has pass@1 in both. float32 is for parity with the modules.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from nautile.engine.engine import Engine
from nautile.engine.native import NativeRunner
from nautile.engine.options import EngineConfig
from nautile.kernels.native import NativeUnavailable, features

__all__ = ["Dtype", "DtypeChoice", "choose_dtype", "computes_in", "with_dtype"]

Dtype = Literal["auto", "float32", "bfloat16"]
_FAST = "AVX-512 with bfloat16"


@dataclass(frozen=True)
class DtypeChoice:
    """What will be computed in, and why, for people."""

    dtype: Literal["float32", "bfloat16"]
    why: str


def choose_dtype(wanted: str = "auto") -> DtypeChoice:
    """``wanted``, or with "auto" the fastest format of this CPU. Raises ValueError for any other name.

    The first call builds the native kernels, which takes some ten seconds once.
    """
    if wanted not in get_args(Dtype):
        raise ValueError(f"--dtype is {', '.join(get_args(Dtype))}; not {wanted!r}")
    if wanted != "auto":
        return DtypeChoice("float32" if wanted == "float32" else "bfloat16", "as asked for")
    try:
        found = features()
    except NativeUnavailable as error:
        return DtypeChoice("float32", f"no native kernels: {error}")
    if found == _FAST:
        return DtypeChoice("bfloat16", "this CPU multiplies it; --dtype float32 for parity with the modules")
    return DtypeChoice("float32", f"this CPU has {found}")


def with_dtype(options: EngineConfig, choice: DtypeChoice) -> EngineConfig:
    """The options with weights and rows of that format."""
    return replace(options, precision=choice.dtype, rows=choice.dtype)


def computes_in(engine: Engine) -> str:
    """The number format of an engine's products: its ``precision`` is that of the native kernels only."""
    if isinstance(engine.runner, NativeRunner):
        return engine.options.precision
    return str(engine.model.embed.weight.dtype).removeprefix("torch.")
