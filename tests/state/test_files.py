"""State files: whole or not at all, checked before use, set aside once when they cannot be trusted."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nautile.state import PoolOptions, StatePool, fingerprint
from nautile.state.files import MAGIC, StateFile, StoreError, StoreUnavailable, read_header, write_file
from ranks import clean_context
from state.pools import close, feed, logits_of, model, row

SECTIONS = {"first": torch.arange(100, dtype=torch.int32), "none": torch.empty(0), "second": torch.rand(7, 3)}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    size = write_file(tmp_path / "a", "test", {"name": "naïve", "n": 3}, SECTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").stat().st_size == size
    with StateFile(tmp_path / "a") as file:
        assert file.header["name"] == "naïve" and file.header["kind"] == "test" and file.names() == list(SECTIONS)
        assert torch.equal(file.section("first", torch.int32), SECTIONS["first"])
        assert file.section("none").numel() == 0
        assert torch.equal(file.section("second", torch.float32).view(7, 3), SECTIONS["second"])
        with pytest.raises(StoreError, match="no section 'third'"):
            file.section("third")
    assert oct((tmp_path / "a").stat().st_mode)[-3:] == "600"


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    """Read with nothing but struct, json and hashlib."""
    import hashlib  # noqa: PLC0415

    write_file(tmp_path / "a", "test", {}, SECTIONS)
    data = (tmp_path / "a").read_bytes()
    assert data[:8] == b"\x8eNTLS\r\n\x1a" == MAGIC
    version, length = struct.unpack("<II", data[8:16])
    assert version == 1
    header = data[32 : 32 + length]
    assert data[16:32] == hashlib.blake2b(data[:16] + header, digest_size=16).digest()
    for part in json.loads(header)["sections"]:
        section = data[part["offset"] : part["offset"] + part["bytes"]]
        assert part["offset"] % 64 == 0
        assert hashlib.blake2b(section, digest_size=16).hexdigest() == part["blake2b"]
    assert struct.unpack("<100i", data[json.loads(header)["sections"][0]["offset"] :][:400]) == tuple(range(100))


@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_any_changed_byte_and_any_cut_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, at: float, flip: int, cut: bool
) -> None:
    directory = tmp_path_factory.mktemp("files")
    write_file(directory / "a", "test", {}, {"first": torch.arange(64), "second": torch.arange(9)})
    data = bytearray((directory / "a").read_bytes())
    place = int(at * len(data))
    parts = read_header(directory / "a")["sections"]
    end_of_header = 32 + struct.unpack("<I", data[12:16])[0]
    padding = place >= end_of_header and not any(part["offset"] <= place < part["offset"] + part["bytes"] for part in parts)
    if cut:
        del data[place:]
    else:
        data[place] ^= flip
    (directory / "a").write_bytes(data)
    if padding and not cut:
        return  # bytes between sections mean nothing
    with pytest.raises(StoreError, match="a "), StateFile(directory / "a") as file:
        for name in file.names():
            file.section(name)


def test_another_version_says_so(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(struct.pack("<8sII16s", MAGIC, 99, 0, b""))
    with pytest.raises(StoreError, match="version 99; this Nautile reads version 1"):
        read_header(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"#!/bin/sh\n" * 10)
    with pytest.raises(StoreError, match="not a Nautile state file"):
        read_header(tmp_path / "b")
    (tmp_path / "c").write_bytes(b"")
    with pytest.raises(StoreError, match="cut short"):
        read_header(tmp_path / "c")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_file(tmp_path / "a", "test", {}, {"x": torch.zeros(3)})
    before = (tmp_path / "a").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreUnavailable, match="disk is full: free some space"):
        write_file(tmp_path / "a", "test", {}, {"x": torch.ones(3)})
    assert (tmp_path / "a").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_really_full_device() -> None:
    with pytest.raises(StoreUnavailable, match="cannot write /dev/full/a"):
        write_file(Path("/dev/full/a"), "test", {}, {})


def test_a_write_that_the_system_stops_half_way(tmp_path: Path) -> None:
    """A real refusal (the limit on file sizes) in the middle of a file: nothing is left, and afterwards it works."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(StoreUnavailable, match="cannot write"):
            write_file(tmp_path / "a", "test", {}, {"x": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    write_file(tmp_path / "a", "test", {}, {"x": torch.zeros(10_000)})


# the disk tier ------------------------------------------------------------------------------------------------------


def filled(directory: Path, **options: object) -> list[str]:
    """Leave the prefix of 300 tokens of row 0 in the directory; gives the reports."""
    reports: list[str] = []
    pool = disk_pool(directory, reports, **options)
    sequence = pool.open(row(0))
    feed(pool, sequence, row(0)[:300])
    pool.close()
    return reports


def disk_pool(directory: Path, reports: list[str], **options: object) -> StatePool:
    settings = {"blocks": 24, "slots": 4, "block_tokens": 128, "snapshot_every": 128, **options}
    return StatePool(model().config, PoolOptions(disk=directory, **settings), fingerprint="tiny", report=reports.append)  # type: ignore[arg-type]


def test_a_restart_finds_everything(tmp_path: Path) -> None:
    assert filled(tmp_path) == []
    reports: list[str] = []
    pool = disk_pool(tmp_path, reports)
    assert pool.stats().nodes == {"device": 0, "host": 0, "disk": 3}
    sequence = pool.open(row(0))
    assert sequence.cached == 300
    close(feed(pool, sequence, row(0)[300:400]), logits_of(row(0))[300:400])
    pool.check()
    assert not reports


def flipped(data: bytearray) -> bytearray:
    data[len(data) // 4] ^= 1  # in the history; a tail is read when a sequence starts there
    return data


DAMAGE: dict[str, Callable[[bytearray], bytearray]] = {
    "flipped bit": flipped,
    "cut short": lambda data: data[:-1],
    "empty": lambda data: data[:0],
    "foreign": lambda data: bytearray(b"{}" * 100),
}


@pytest.mark.parametrize("late", [False, True], ids=["before the start", "while it runs"])
@pytest.mark.parametrize("damage", sorted(DAMAGE))
@pytest.mark.parametrize("which", [128, 256, 300])
def test_a_damaged_file_is_computed_again(tmp_path: Path, damage: str, which: int, late: bool) -> None:
    """Reported once, set aside, never served; what does not depend on it still is."""
    filled(tmp_path)
    reports: list[str] = []
    pool = disk_pool(tmp_path, reports) if late else None
    file = next(path for path in tmp_path.glob("*.node") if read_header(path)["length"] == which)
    file.write_bytes(DAMAGE[damage](bytearray(file.read_bytes())))
    pool = pool or disk_pool(tmp_path, reports)
    before = {128: 0, 256: 128, 300: 256}[which]
    for expected in (before, 310):
        sequence = pool.open(row(0))
        assert sequence.cached == expected
        close(feed(pool, sequence, row(0)[sequence.cached : 310]), logits_of(row(0))[sequence.cached : 310])
        pool.release(sequence)
        pool.check()
    assert len(reports) == 1 and "set aside" in reports[0] and str(file) in reports[0]
    assert [path.name for path in tmp_path.glob("*.bad")] == [file.name + ".bad"]
    assert pool.stats().set_aside == 1
    pool.close()
    again: list[str] = []
    assert disk_pool(tmp_path, again).open(row(0)).cached == 310 and not again


def test_a_damaged_tail_is_noticed_when_a_sequence_would_start_there(tmp_path: Path) -> None:
    filled(tmp_path)
    file = next(path for path in tmp_path.glob("*.node") if read_header(path)["length"] == 256)
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    reports: list[str] = []
    pool = disk_pool(tmp_path, reports)
    sequence = pool.open(row(0))
    assert sequence.cached == 300 and not reports  # the history is sound
    close(feed(pool, sequence, row(0)[300:310]), logits_of(row(0))[300:310])
    pool.release(sequence, keep=False)
    ids = (*row(0)[:290], *row(1)[:9])
    sequence = pool.open(ids)
    assert sequence.cached == 128 and len(reports) == 1 and "section 'tail'" in reports[0]
    close(feed(pool, sequence, ids[128:]), logits_of(ids)[128:])
    pool.check()


def test_files_of_another_model_or_layout_are_left_alone(tmp_path: Path) -> None:
    filled(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    reports: list[str] = []
    for pool in (
        StatePool(model().config, PoolOptions(disk=tmp_path, block_tokens=128), fingerprint="other", report=reports.append),
        disk_pool(tmp_path, reports, rows="bfloat16"),
        disk_pool(tmp_path, reports, block_tokens=256, snapshot_every=256),
    ):
        assert pool.open(row(0)).cached == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == files and not reports


def test_several_models_on_one_directory_keep_their_files(tmp_path: Path) -> None:
    """The same tokens in one directory: nobody writes over, sets aside or serves another's, while both run and afterwards."""
    reports: list[str] = []
    options = PoolOptions(blocks=24, slots=4, block_tokens=128, snapshot_every=128, disk=tmp_path)

    def start(model_name: str, computed_by: str) -> StatePool:
        pool = StatePool(model().config, dataclasses.replace(options, disk=None), fingerprint=model_name, report=reports.append)
        pool.computed_by = computed_by
        pool.open_disk(tmp_path)
        return pool

    who = [("tiny", ""), ("other", ""), ("tiny", "another runner")]
    for round_ in range(2):
        pools = [start(*one) for one in who]
        for pool in pools:
            sequence = pool.open(row(0))
            assert sequence.cached == (300 if round_ else 0)
            feed(pool, sequence, row(0)[sequence.cached : 300])
            pool.release(sequence)
            assert pool.cache.make_room(24) and pool.stats().nodes["disk"] == 3
        for pool in pools:
            assert pool.open(row(0)).cached == 300
            pool.close()
    assert not reports and len(list(tmp_path.iterdir())) == 9


def test_a_file_that_cannot_be_opened_now_is_not_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many open files, say: a miss, reported, and the file is there again for the next start."""
    filled(tmp_path)
    reports: list[str] = []
    pool, opened = disk_pool(tmp_path, reports), Path.open

    def refuse(path: Path, *rest: object) -> object:
        if path.suffix == ".node":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return opened(path, *rest)  # type: ignore[call-overload]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        assert pool.open(row(0)).cached == 0
    assert reports and all("cannot be read" in text for text in reports) and pool.stats().set_aside == 0
    pool.check()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == pool.cache.bytes["disk"]
    assert disk_pool(tmp_path, reports).open(row(0)).cached == 300


def test_another_interval_is_a_miss(tmp_path: Path) -> None:
    filled(tmp_path)
    reports: list[str] = []
    pool = disk_pool(tmp_path, reports, snapshot_every=256)
    sequence = pool.open(row(0))
    close(feed(pool, sequence, row(0)[sequence.cached : 310]), logits_of(row(0))[sequence.cached : 310])
    pool.check()
    assert not reports


@pytest.mark.parametrize("trouble", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_refuses_is_reported_once_and_service_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: int
) -> None:
    def refuse(_: int) -> None:
        raise OSError(trouble, os.strerror(trouble))

    reports: list[str] = []
    pool = disk_pool(tmp_path, reports, blocks=5)
    monkeypatch.setattr(os, "fsync", refuse)
    for seed in (0, 1, 2, 0):
        sequence = pool.open(row(seed))
        close(feed(pool, sequence, row(seed)[sequence.cached : 500]), logits_of(row(seed))[sequence.cached : 500])
        pool.release(sequence)
        pool.check()
    assert len(reports) == 1 and "goes on without" in reports[0]
    assert not pool.stats().disk_writable and not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    reports: list[str] = []
    pool = disk_pool(tmp_path / "file" / "cache", reports)
    assert len(reports) == 1 and "cannot use" in reports[0]
    close(feed(pool, pool.open(row(0)), row(0)[:130]), logits_of(row(0))[:130])


def test_another_process_takes_files_away(tmp_path: Path) -> None:
    filled(tmp_path)
    reports: list[str] = []
    pool = disk_pool(tmp_path, reports)
    for path in tmp_path.glob("*.node"):
        if read_header(path)["length"] != 128:
            path.unlink()
    sequence = pool.open(row(0))
    assert sequence.cached == 128
    close(feed(pool, sequence, row(0)[128:310]), logits_of(row(0))[128:310])
    pool.check()


def use_for_a_while(directory: Path) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    reports: list[str] = []
    pool = disk_pool(directory, reports, blocks=6, disk_bytes=400_000)
    for turn in range(6):
        seed = turn % 3
        sequence = pool.open(row(seed)[:450])
        close(feed(pool, sequence, row(seed)[sequence.cached : 450]), logits_of(row(seed))[:450][sequence.cached :])
        pool.release(sequence)
        pool.check()
    pool.close()
    assert all("is gone" in text for text in reports), reports


def test_two_processes_on_one_directory(tmp_path: Path) -> None:
    """Both write, read and evict the same names at the same time; neither ever computes something wrong."""
    both = [clean_context().Process(target=use_for_a_while, args=(tmp_path,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
        assert process.exitcode == 0  # a traceback is above
    assert not list(tmp_path.glob(".*.tmp")) and not list(tmp_path.glob("*.bad"))


def test_fingerprints_tell_weights_and_configurations_apart() -> None:
    ours = fingerprint(model().config, model().state_dict())
    assert ours == fingerprint(model().config, {name: tensor.clone() for name, tensor in model().state_dict().items()})
    assert ours == fingerprint(model().config.replace(dialect="0731"), model().state_dict())
    other = {name: tensor.clone() for name, tensor in model().state_dict().items()}
    other["norm.weight"][3] += 1e-6
    assert ours != fingerprint(model().config, other)
    assert ours != fingerprint(model().config.replace(rope_theta=1e5), model().state_dict())
