"""Building, caching, refusing: everything around the kernels that can go wrong on somebody else's machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nautile.engine.native import NativeRunner, NativeUnavailable
from nautile.engine.plan import Piece, Plan
from nautile.kernels import native
from nautile.kernels.native import NativeModel, features, library_path
from nautile.state.pages import Pages, PoolOptions, Sequence
from oracles.random_models import tiny_network


def test_no_compiler_is_said_plainly(tmp_path):
    with pytest.raises(NativeUnavailable, match="was not found; install one"):
        library_path("no-such-compiler", tmp_path)


def test_a_compiler_that_fails_is_said_plainly(tmp_path):
    fake = tmp_path / "g++"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x.cpp:1: error: no such header" >&2\nexit 1\n')
    fake.chmod(0o755)
    with pytest.raises(NativeUnavailable, match="no such header"):
        library_path(str(fake), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_two_processes_build_at_once(tmp_path):
    """A compiler that takes its time writes only to its own file; both processes end with the same whole library."""
    fake = tmp_path / "g++"
    fake.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\nwhile [ "$1" != -o ]; do shift; done\n'
        'case "$2" in *.part) ;; *) exit 1;; esac\nprintf half > "$2"; sleep 1; printf whole > "$2"\n'
    )
    fake.chmod(0o755)
    code = (  # the module alone: it needs nothing of the package, and the two come to the compiler at about the same time
        "import sys, pathlib, runpy; build = runpy.run_path(sys.argv[1])\n"
        "print(build['library_path'](sys.argv[2], pathlib.Path(sys.argv[3])))"
    )
    builder = Path(native.__file__).with_name("build.py")
    command = [sys.executable, "-c", code, str(builder), str(fake), str(tmp_path / "c")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=300)[0].strip() for process in processes}
    assert len(paths) == 1
    assert Path(paths.pop()).read_text() == "whole"
    assert len(list((tmp_path / "c").iterdir())) == 1


def test_the_cache_is_used(tmp_path):
    """The compiler notes its builds. (In the user's own cache another process of the tests may be building at this moment.)"""
    fake, notes = tmp_path / "g++", tmp_path / "notes"
    fake.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit 0\nwhile [ "$1" != -o ]; do shift; done\necho built >> {notes}\necho > "$2"\n'
    )
    fake.chmod(0o755)
    built = library_path(str(fake), tmp_path / "cache")
    assert built.exists() and library_path(str(fake), tmp_path / "cache") == built and notes.read_text() == "built\n"
    assert features() in ("AVX-512 with bfloat16", "AVX-512", "AVX2", "generic")


def test_sources_that_change_under_a_running_process_are_refused(monkeypatch, tmp_path):
    """New C++ must not be loaded behind the Python that knew the old structures."""
    monkeypatch.setattr("nautile.kernels.native.build._IMPORTED", b"older")
    with pytest.raises(NativeUnavailable, match="start it again"):
        library_path(cache=tmp_path)


def test_an_unwritable_cache_is_said_plainly(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(NativeUnavailable, match="cannot be written"):
        library_path(cache=blocked / "inside")


def test_the_generic_code_agrees(tmp_path):
    """The same sources for the oldest x86-64 (or without -march at all): no AVX, the plain meaning of every vector."""
    target = tmp_path / "generic.so"
    source = Path(native.__file__).with_name("nautile.cpp")
    march = ["-march=x86-64"] if os.uname().machine == "x86_64" else []
    command = ["g++", "-std=c++20", "-O1", *march, "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-Wno-psabi"]
    subprocess.run([*command, "-o", str(target), str(source)], check=True, timeout=300)
    model = tiny_network((4, 128), seed=2)
    ids = tuple(range(90)) * 2
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.02)):
        out = []
        for library in (None, target):
            pages = Pages(model.config, PoolOptions(blocks=2, slots=1, rows=dtype))
            runner = NativeRunner(model, pages, dtype=dtype, threads=1, library=library)
            out.append(runner.step(Plan((Piece(Sequence(blocks=[0], slot=0), ids, "all"),))))
        assert (out[0] - out[1]).abs().max() <= tolerance * out[0].abs().max()
    assert features(target) == "generic"


def test_what_it_cannot_do_is_refused():
    model = tiny_network((0, 4), seed=1)
    pages = Pages(model.config, PoolOptions(blocks=2, slots=1))
    runner = NativeRunner(model, pages, threads=1)
    sequence = Sequence(blocks=[0], slot=0)
    for piece, text in (
        (Piece(sequence, (0, model.config.vocab_size)), "token ids"),
        (Piece(sequence, (0,) * 257), "pool.ensure"),
        (Piece(sequence, ()), "at least one"),
        (Piece(Sequence(blocks=[0], slot=None), (0,)), "parked"),
        (Piece(Sequence(blocks=[7], slot=0), (0,)), "another pool"),
        (Piece(Sequence(blocks=[-1], slot=0), (0,)), "another pool"),
        (Piece(Sequence(blocks=[0], slot=3), (0,)), "another pool"),
    ):
        with pytest.raises(ValueError, match=text):
            runner.step(Plan((piece,)))
    with pytest.raises(ValueError, match="once"):
        runner.step(Plan((Piece(sequence, (0,)), Piece(sequence, (1,)))))
    with pytest.raises(ValueError, match="another configuration"):
        NativeRunner(tiny_network((4, 4)), pages)
    packed_rows = tiny_network((0, 4), head_dim=72, index_head_dim=32, fake_quant_kv=True, fake_quant_indexer=True)
    with pytest.raises(NativeUnavailable, match="uint8"):
        NativeRunner(packed_rows, Pages(packed_rows.config, PoolOptions(blocks=1, slots=1, rows="packed")))
    with pytest.raises(NativeUnavailable, match="hc_mult"):
        wide = tiny_network((0,), hc_mult=9)
        NativeModel(wide.config, {}, native.Kinds())


def test_the_weights_may_go(bench):
    """Packed weights and the few tensors that are kept are all it needs: the model can be freed."""
    model = tiny_network((0, 4, 128), seed=3)
    ids = list(range(60))
    with torch.inference_mode():
        expected = model(torch.tensor([ids]))[0]
    run = bench(model)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    assert (run.feed(run.open(60), ids, [60]) - expected).abs().max() <= 1e-4
