"""The k best of a stream of scores, ties to the lowest index, against a stable sort: lengths, ties, orders, signs, streams."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nautile.kernels import native

SHAPES = {
    "normal": lambda draw, n: draw.standard_normal(n),
    "grid": lambda draw, n: np.round(2 * draw.standard_normal(n)) / 2,
    "alike": lambda draw, n: np.full(n, draw.standard_normal()),
    "two values": lambda draw, n: draw.integers(0, 2, n) - 3.0,
    "ascending": lambda draw, n: np.sort(draw.standard_normal(n)),
    "descending": lambda draw, n: -np.sort(draw.standard_normal(n)),
    "mostly zero": lambda draw, n: np.maximum(draw.standard_normal(n) - 2, 0),
    "many sizes": lambda draw, n: np.exp(20 * draw.standard_normal(n)) * draw.choice([-1, 1], n),
    "one is far away": lambda draw, n: np.where(np.arange(n) == draw.integers(n), 3e38, draw.standard_normal(n)),
}


@pytest.fixture(scope="module")
def select(tmp_path_factory):
    """The harness beside this file, compiled as the kernels are."""
    target = tmp_path_factory.mktemp("select") / "select.so"
    here, kernels = Path(__file__).with_name("select_harness.cpp"), Path(native.__file__).parent
    flags = ("-std=c++20", "-O1", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-psabi")
    subprocess.run(["g++", *flags, f"-I{kernels}", "-o", str(target), str(here)], check=True, timeout=300)
    function = ctypes.CDLL(str(target)).select_best
    function.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 4, ctypes.c_void_p]

    def run(scores: np.ndarray, k: int, tiles: int, parts: int) -> np.ndarray:
        chosen = np.empty(k, np.int32)
        function(scores.ctypes.data, len(scores), k, tiles, parts, chosen.ctypes.data)
        return chosen

    return run


@settings(max_examples=150)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    seed=st.integers(0, 2**31),
    k=st.sampled_from([1, 2, 63, 64, 300, 1024]),
    more=st.sampled_from([0, 1, 15, 17, 63, 200, 1100, 5000]),
    tiles=st.sampled_from([1, 2, 4]),
    parts=st.sampled_from([1, 1, 2, 3]),
)
def test_the_best_are_those_of_a_stable_sort(select, shape, seed, k, more, tiles, parts):
    scores = (SHAPES[shape](np.random.default_rng(seed), k + more) + 0.0).astype(np.float32)
    best = np.sort(np.argsort(-scores, kind="stable")[:k])
    assert np.array_equal(select(scores, k, tiles, parts), best)
