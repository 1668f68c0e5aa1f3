"""Packing: aligned documents, exact masks, little padding; shards that resume and do not depend on who wrote them."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nautile.protocol import Tokenizer
from nautile.train import corpus
from nautile.train.packing import ALIGNMENT, BuildConfig, Document, Stage, _watch, build_shards, pack, specialist_documents
from nautile.train.tokenizer import PAD

NANO = Path(__file__).parents[2] / "src" / "nautile" / "weights" / "nano"


def random_documents(seed: int, longest: int) -> Iterator[Document]:
    rng = random.Random(seed)
    while True:
        length = rng.randint(40, longest)
        yield Document(
            [rng.randrange(3, 8192) for _ in range(length)], bytes(rng.randrange(2) for _ in range(length - 1)) + b"\1"
        )


def test_rows_hold_the_documents() -> None:
    rows = pack(random_documents(0, 900), 40, 1024)
    assert rows.ids.shape == rows.documents.shape == rows.loss.shape == (40, 1024)
    assert (rows.ids.dtype, rows.documents.dtype, rows.loss.dtype) == (np.uint16, np.uint16, np.uint8)
    assert not (rows.documents % ALIGNMENT).any()
    assert (rows.documents <= np.arange(1024)).all()
    assert not rows.loss[rows.ids == PAD].any()
    wanted = {tuple(document.ids): document.loss for document in itertools.islice(random_documents(0, 900), 400)}
    found = 0
    for ids, documents, loss in zip(rows.ids, rows.documents, rows.loss, strict=True):
        for start in np.unique(documents):
            inside = (documents == start) & (ids != PAD)
            if inside.any():
                mask = wanted[tuple(ids[inside].tolist())]
                assert loss[inside].tolist() == [0, *mask[1:]]
                assert np.flatnonzero(inside)[0] == start
                found += 1
    assert found > 60
    assert rows.utilisation > 0.85


def test_long_documents_are_cut_and_bad_lengths_refused() -> None:
    long = Document(list(range(3, 3003)), b"\1" * 3000)
    rows = pack(iter([long] * 10), 6, 1024)
    assert rows.ids[0, 0] == 3
    assert rows.ids[1, 0] == 3 + 1024
    for length in (0, 100, 1 << 21):
        with pytest.raises(ValueError, match="multiple of 128"):
            pack(iter([long]), 1, length)


def test_rows_of_more_than_65536_tokens_know_where_documents_begin() -> None:
    first, second = (Document([5] * length, b"\1" * length) for length in (70_000, 50_000))
    rows = pack(iter([first, second, first]), 1, 1 << 17, window=1)
    assert [rows.documents[0, place] for place in (0, 69_999, 70_016, 120_015)] == [0, 0, 70_016, 70_016]


@pytest.mark.parametrize("stage", ["sft", "practice", "pretrain"])
def test_build_resumes_and_is_deterministic(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = corpus.collect(packages=["iniconfig"])[:1]
    monkeypatch.setattr("nautile.train.corpus.collect", lambda: small)
    one, two = tmp_path / "one", tmp_path / "two"
    config = BuildConfig(stage, 3 << 14, 1024, 0, str(NANO), shard_tokens=1 << 14, real_python=False)
    totals = build_shards(config, one)
    assert totals["shards"] == 3
    assert totals["tokens"] == 3 << 14
    assert totals["utilisation"] > 0.6
    assert (one / "done").exists()
    build_shards(replace(config, tokens=1 << 14), two)
    build_shards(config, two)  # continues
    for shard in range(3):
        with np.load(one / f"shard-{shard:05d}.npz") as a, np.load(two / f"shard-{shard:05d}.npz") as b:
            assert set(a) == {"ids", "documents", "loss"}
            assert all((a[name] == b[name]).all() for name in a)
            assert a["ids"].max() < 8192
            assert 0 < a["loss"].mean() < 1
    with pytest.raises(ValueError, match="another recipe"):
        build_shards(replace(config, sequence_length=2048), one)
    if stage == "pretrain":
        assert json.loads((one / "corpus.json").read_text())["total"]["files"] > 0


def test_processes_write_the_same_shards_and_failures_are_reported(tmp_path: Path) -> None:
    config = BuildConfig("sft", 2 << 13, 1024, 0, str(NANO), shard_tokens=1 << 13, real_python=False)
    build_shards(config, tmp_path / "one", processes=1)
    build_shards(config, tmp_path / "two", processes=2)
    for shard in range(2):
        name = f"shard-{shard:05d}.npz"
        with np.load(tmp_path / "one" / name) as a, np.load(tmp_path / "two" / name) as b:
            assert (a["ids"] == b["ids"]).all()
    with pytest.raises(RuntimeError, match="data processes"):
        build_shards(replace(config, tokenizer=str(tmp_path / "nowhere")), tmp_path / "three", processes=2)


def test_a_specialists_conversations_are_its_kinds_and_nothing_that_is_measured() -> None:
    tokenizer = Tokenizer.load(NANO)
    documents = specialist_documents(tokenizer, ["reworded_last_line"], "s", 2048)
    document = next(documents)
    assert document == next(specialist_documents(tokenizer, ["reworded_last_line"], "s", 2048)) != next(documents)
    assert "tail -n 1" in tokenizer.decode([token for token, own in zip(document.ids, document.loss, strict=True) if own])
    for kind in ("fresh_last_line", "follow_chain"):
        with pytest.raises(ValueError, match="for training"):
            next(specialist_documents(tokenizer, [kind], "s", 2048))


@pytest.mark.parametrize("kills", [1, 9])
def test_a_killed_process_is_started_again_and_the_others_go_on(tmp_path: Path, kills: int) -> None:
    def work(index: int) -> None:
        with (tmp_path / f"starts-{index}").open("a") as file:
            file.write("x")
        if index == 0 and (tmp_path / "starts-0").stat().st_size <= kills:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)
        (tmp_path / f"ended-{index}").touch()

    def start(index: int) -> multiprocessing.process.BaseProcess:
        process = multiprocessing.get_context("fork").Process(target=work, args=(index,))
        process.start()
        return process

    if kills > 3:
        with pytest.raises(RuntimeError, match=r"data processes \[0\] failed or were killed"):
            _watch(start, 2)
    else:
        _watch(start, 2)
    assert (tmp_path / "ended-0").exists() == (kills <= 3)
    assert (tmp_path / "ended-1").exists()


def test_a_process_that_is_killed_between_two_looks_is_started_again() -> None:
    class Process:
        """What its exit status is, look by look; the last stays."""

        def __init__(self, *codes: int | None) -> None:
            self.codes = list(codes)

        @property
        def exitcode(self) -> int | None:
            return self.codes.pop(0) if len(self.codes) > 1 else self.codes[0]

        def is_alive(self) -> bool:
            return self.exitcode is None

    made: list[Process] = []

    def start(index: int) -> Process:
        made.append(Process(0) if made else Process(None, None, -signal.SIGKILL))
        return made[-1]

    _watch(start, 1)
    assert len(made) == 2
