"""Sessions: what was saved is there after a restart, bit for bit; timelines are independent; damage is never served."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nautile.state import (
    PoolFull,
    PoolOptions,
    Sequence,
    SessionConflict,
    SessionError,
    SessionStore,
    StatePool,
    StoreError,
    StoreUnavailable,
)
from nautile.state import session as session_module
from nautile.state.files import MAGIC, StateFile, read_header, write_file
from state.kills import kill_at_random
from state.pools import close, feed, logits_of, new_pool, row

FIXTURES = Path(__file__).parent / "fixtures"
LENGTHS = [1, 3, 4, 5, 127, 128, 129, 255, 256, 257, 300]


def saved(store: SessionStore, name: str, length: int, seed: int = 0) -> tuple[StatePool, Sequence, torch.Tensor]:
    pool = new_pool()
    sequence = pool.open(row(seed))
    logits = feed(pool, sequence, row(seed)[:length])[-1]
    store.save(name, pool, sequence, logits)
    return pool, sequence, logits


@pytest.mark.parametrize("length", LENGTHS)
def test_a_session_survives_a_restart_bit_for_bit(tmp_path: Path, length: int) -> None:
    """No decode step is needed, and the next one gives the same bits as in the process that saved it."""
    pool, sequence, logits = saved(SessionStore(tmp_path), "a", length)
    expected = feed(pool, sequence, row(1)[:150])
    fresh = new_pool()
    resumed = SessionStore(tmp_path).resume("a", fresh)
    assert resumed.pending == () and resumed.logits is not None and torch.equal(resumed.logits, logits)
    assert tuple(resumed.sequence.ids) == row(0)[:length] and resumed.info.length == length
    assert torch.equal(feed(fresh, resumed.sequence, row(1)[:150]), expected)
    fresh.check()


@settings(max_examples=15)
@given(st.integers(1, 600), st.floats(0, 1), st.floats(0, 1))
def test_rewinding_computes_fewer_than_k_tokens(
    tmp_path_factory: pytest.TempPathFactory, length: int, one: float, two: float
) -> None:
    store = SessionStore(tmp_path_factory.mktemp("sessions"))
    saved(store, "a", length)
    for part in (one, two):
        wanted = 1 + int(part * (store.info("a").length - 1))
        info = store.rewind("a", wanted)
        assert info.length == wanted and 0 <= wanted - info.state_length < 128
        pool = new_pool()
        resumed = store.resume("a", pool)
        assert (*resumed.sequence.ids, *resumed.pending) == row(0)[:wanted]
        ours = feed(pool, resumed.sequence, (*resumed.pending, *row(2)[:9]))[len(resumed.pending) :]
        close(ours, logits_of((*row(0)[:wanted], *row(2)[:9]))[wanted:])
        pool.check()


def test_a_resumed_session_can_be_rewound_and_shares_with_the_cache(tmp_path: Path) -> None:
    store = SessionStore(tmp_path)
    saved(store, "a", 300)
    pool = new_pool()
    first, second = store.resume("a", pool), store.resume("a", pool)
    assert first.sequence.blocks[:2] == second.sequence.blocks[:2]  # the steps are the same; what follows is each one's own
    assert pool.rewind(first.sequence, 200) == 128
    close(feed(pool, first.sequence, row(0)[128:220]), logits_of(row(0))[128:220])
    assert pool.open(row(0)).cached == 256
    pool.check()


def test_forks_are_independent_and_share_files(tmp_path: Path) -> None:
    store = SessionStore(tmp_path)
    pool, sequence, logits = saved(store, "a", 300)
    nodes = len(list(store.nodes.iterdir()))
    info = store.fork("a", "b")
    assert info.forked_from == "a" and len(list(store.nodes.iterdir())) == nodes == 2
    feed(pool, sequence, row(1)[:100])
    store.save("a", pool, sequence)
    resumed = store.resume("b", new_pool())
    assert resumed.info.length == 300 and resumed.logits is not None and torch.equal(resumed.logits, logits)
    assert store.info("a").length == 400 and store.info("a").revision == 2 and not store.info("a").has_logits
    assert [info.name for info in store.list()] == ["a", "b"]
    with pytest.raises(SessionError, match="already"):
        store.fork("a", "b")


def test_a_rewind_as_a_new_session_leaves_the_old_one(tmp_path: Path) -> None:
    store = SessionStore(tmp_path)
    saved(store, "a", 300)
    assert store.rewind("a", 290, new="b").state_length == 256
    assert store.info("a").length == 300 and store.info("b").length == 290
    assert store.resume("b", new_pool()).pending == row(0)[256:290]
    assert store.rewind("b", 280).state_length == 256  # the state it has serves again


def test_deleting_removes_what_nobody_needs(tmp_path: Path) -> None:
    store = SessionStore(tmp_path)
    saved(store, "a", 300)
    saved(store, "b", 200)
    assert len(list(store.nodes.iterdir())) == 2
    store.delete("a")
    assert len(list(store.nodes.iterdir())) == 1
    assert store.resume("b", new_pool()).pending == ()
    store.delete("b")
    assert not list(store.nodes.iterdir()) and store.list() == []
    with pytest.raises(SessionError, match="there are none"):
        store.delete("b")


def test_export_and_import(tmp_path: Path) -> None:
    here, there = SessionStore(tmp_path / "here"), SessionStore(tmp_path / "there")
    pool, sequence, logits = saved(here, "a", 300)
    size = here.export("a", tmp_path / "a.nautile")
    assert (tmp_path / "a.nautile").stat().st_size == size
    assert there.import_(tmp_path / "a.nautile").name == "a"
    resumed = there.resume("a", fresh := new_pool())
    assert resumed.logits is not None and torch.equal(resumed.logits, logits) and resumed.pending == ()
    assert torch.equal(feed(fresh, resumed.sequence, row(1)[:30]), feed(pool, sequence, row(1)[:30]))
    assert there.rewind("a", 200).state_length == 128
    with pytest.raises(SessionError, match="already"):
        there.import_(tmp_path / "a.nautile")
    assert there.import_(tmp_path / "a.nautile", "b").length == 300
    data = bytearray((tmp_path / "a.nautile").read_bytes())
    data[-5] ^= 4
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(StoreError, match="damaged"):
        there.import_(tmp_path / "bad", "c")
    with pytest.raises(StoreError, match="no exported session"):
        there.import_(there.directory / "a.session", "c")
    with pytest.raises(SessionError, match="does not exist"):
        there.import_(tmp_path / "nothing")
    assert [info.name for info in there.list()] == ["a", "b"]


# trouble ------------------------------------------------------------------------------------------------------------


def test_names(tmp_path: Path) -> None:
    store = SessionStore(tmp_path)
    for name in ("", ".", "../a", "a/b", "-a", "a" * 101, "a\n", "ä"):
        with pytest.raises(SessionError, match="no name for a session"):
            saved(store, name, 3)
    saved(store, "A-1_b.c", 3)
    with pytest.raises(SessionError, match=r"no session 'x'; there is A-1_b\.c"):
        store.info("x")
    with pytest.raises(SessionError, match="no session 'x'"):
        store.resume("x", new_pool())
    for length in (0, 4):
        with pytest.raises(SessionError, match="has 3 tokens"):
            store.rewind("A-1_b.c", length)


def test_a_session_of_another_model_or_layout_is_refused(tmp_path: Path) -> None:
    store = SessionStore(tmp_path)
    saved(store, "a", 10)
    other = new_pool()
    other.fingerprint = "other"
    with pytest.raises(SessionError, match="another model"):
        store.resume("a", other)
    with pytest.raises(SessionError, match="another rows"):
        store.resume("a", new_pool(rows="bfloat16"))
    with pytest.raises(SessionError, match="another block_tokens"):
        store.resume("a", new_pool(block_tokens=256, snapshot_every=256))
    with pytest.raises(PoolFull):
        saved(store, "b", 300)
        store.resume("b", new_pool(blocks=2))


def test_another_interval_resumes(tmp_path: Path) -> None:
    """k is an option of the pool, not of the session."""
    store = SessionStore(tmp_path)
    saved(store, "a", 600)
    pool = new_pool(snapshot_every=256)
    resumed = store.resume("a", pool)
    assert resumed.sequence.length == 600
    assert pool.rewind(resumed.sequence, 520) == 512
    close(feed(pool, resumed.sequence, row(0)[512:560]), logits_of(row(0))[512:560])
    store.save("a", pool, resumed.sequence)
    assert store.resume("a", new_pool()).sequence.length == 560
    pool.check()


@pytest.mark.parametrize("which", [128, 256])
def test_a_damaged_step_is_computed_again(tmp_path: Path, which: int) -> None:
    store = SessionStore(tmp_path)
    saved(store, "a", 300)
    path = next(path for path in store.nodes.iterdir() if read_header(path)["length"] == which)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    pool, reports = new_pool(), list[str]()
    store = SessionStore(tmp_path, reports.append)
    resumed = store.resume("a", pool)
    assert len(reports) == 1 and "session 'a'" in reports[0] and "set aside" in reports[0]
    assert resumed.logits is None and resumed.sequence.length == which - 128
    assert resumed.pending == row(0)[which - 128 : 300]
    assert path.with_name(path.name + ".bad").exists() and not path.exists()
    close(feed(pool, resumed.sequence, resumed.pending), logits_of(row(0))[which - 128 : 300])
    store.save("a", pool, resumed.sequence)
    assert store.resume("a", new_pool()).pending == ()


def test_a_damaged_session_file_is_reported_and_kept(tmp_path: Path) -> None:
    store = SessionStore(tmp_path)
    saved(store, "a", 300)
    saved(store, "b", 140)
    path = tmp_path / "a.session"
    path.write_bytes(path.read_bytes()[:-1])
    assert "damaged" in (store.list()[0].problem or "") and store.list()[1].problem is None
    for call in (lambda: store.info("a"), lambda: store.resume("a", new_pool()), lambda: store.fork("a", "c")):
        with pytest.raises(StoreError, match="damaged"):
            call()
    store.rewind("b", 130)
    assert len(list(store.nodes.iterdir())) == 2  # what the damaged one may need is not collected
    saved(store, "a", 20)
    assert (tmp_path / "a.session.bad").exists() and store.info("a").length == 20


@pytest.mark.parametrize("trouble", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_keeps_the_old_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: int) -> None:
    store = SessionStore(tmp_path)
    pool, sequence, _ = saved(store, "a", 100)
    feed(pool, sequence, row(0)[100:300])

    def refuse(_: int) -> None:
        raise OSError(trouble, os.strerror(trouble))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(StoreUnavailable, match=r"free some space|another directory"):
            store.save("a", pool, sequence)
    assert store.resume("a", new_pool()).info.length == 100
    store.save("a", pool, sequence)
    assert store.resume("a", new_pool()).sequence.length == 300


def test_a_save_that_fails_leaves_no_files_that_only_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SessionStore(tmp_path)
    saved(store, "a", 300, seed=1)
    other = SessionStore(tmp_path / "other")
    saved(other, "c", 500, seed=3)
    other.export("c", tmp_path / "c.nautile")
    before = {path.name for path in store.nodes.glob("*")}
    real = session_module.write_file

    def full(path: Path, kind: str, *rest: object) -> int:
        if kind == "session":
            raise StoreUnavailable(28, "the disk is full")
        return real(path, kind, *rest)

    monkeypatch.setattr(session_module, "write_file", full)
    with pytest.raises(StoreUnavailable, match="full"):
        saved(store, "b", 500, seed=2)
    assert {path.name for path in store.nodes.glob("*")} == before
    with pytest.raises(StoreUnavailable, match="full"):
        store.import_(tmp_path / "c.nautile")
    assert {path.name for path in store.nodes.glob("*")} == before
    monkeypatch.undo()
    assert store.resume("a", new_pool()).sequence.length == 300


def test_a_save_over_somebody_elses_is_a_conflict(tmp_path: Path) -> None:
    store = SessionStore(tmp_path)
    pool, sequence, _ = saved(store, "a", 10)
    revision = store.info("a").revision
    feed(pool, sequence, row(0)[10:12])
    store.save("a", pool, sequence, revision=revision)
    with pytest.raises(SessionConflict, match="revision 2, not 1"):
        store.save("a", pool, sequence, revision=revision)
    with pytest.raises(SessionConflict, match="revision 2, not 0"):
        store.save("a", pool, sequence, revision=0)
    with pytest.raises(SessionError, match="no state"):
        store.save("b", pool, pool.open(row(0)[:3]))


def test_the_directory_is_locked_for_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nautile.state.session._LOCK_SECONDS", 0.05)
    store = SessionStore(tmp_path)
    saved(store, "a", 10)
    with store._lock(), pytest.raises(SessionConflict, match="locked"):
        SessionStore(tmp_path).fork("a", "b")
    assert SessionStore(tmp_path).info("a").length == 10  # readers need no lock


def test_sessions_of_several_models_in_one_directory_keep_their_steps(tmp_path: Path) -> None:
    """The same tokens, four states: another model, other rows, other arithmetic. Each is resumed, bit for bit its own."""
    store, states, bits = SessionStore(tmp_path), {}, {}
    for name, model, computed_by, rows in (
        ("a", "tiny", "", "float32"),
        ("b", "other", "", "float32"),
        ("c", "tiny", "", "bfloat16"),
        ("d", "tiny", "another runner", "float32"),
    ):
        states[name] = pool = new_pool(rows=rows)
        pool.fingerprint, pool.computed_by = model, computed_by
        sequence = pool.open(row(0))
        feed(pool, sequence, row(0)[:300])
        for tensor in (pool.pages.csa, pool.pages.hca):  # what another computed is never quite the same
            tensor.add_(len(states))
        pool.cache.forget_all()
        store.save(name, pool, sequence)
        bits[name] = pool.read_history(sequence, 0, 300)
    assert len(list(store.nodes.iterdir())) == 8
    store.delete("b")
    for name in "acd":
        pool = new_pool(rows=states[name].options.rows)
        resumed = store.resume(name, pool)
        assert resumed.pending == () and torch.equal(pool.read_history(resumed.sequence, 0, 300), bits[name]), name
    assert len(list(store.nodes.iterdir())) == 6 and not list(tmp_path.rglob("*.bad"))


def test_a_damaged_step_is_no_reason_not_to_rewind_or_to_export_later(tmp_path: Path) -> None:
    store, reports = SessionStore(tmp_path), list[str]()
    saved(store, "a", 400)
    store.fork("a", "b")
    path = next(path for path in store.nodes.iterdir() if read_header(path)["length"] == 256)
    path.write_bytes(path.read_bytes()[:-1])
    store = SessionStore(tmp_path, reports.append)
    with pytest.raises(StoreError, match="nautile session resume a --max-tokens 0"):
        store.export("a", tmp_path / "out")
    assert path.with_name(path.name + ".bad").exists()
    assert store.rewind("a", 300).state_length == 128 and len(reports) == 1
    pool = new_pool()
    resumed = store.resume("a", pool)
    close(feed(pool, resumed.sequence, resumed.pending), logits_of(row(0))[128:300])
    resumed = store.resume("b", pool)
    feed(pool, resumed.sequence, resumed.pending)
    store.save("b", pool, resumed.sequence)
    store.export("b", tmp_path / "out")
    assert store.import_(tmp_path / "out", "c").length == 400 and store.resume("c", new_pool()).pending == ()


JUNK = [None, -1, 0, 1, 2**40, 1.5, True, "x", "../../x", [], {}, [1, "x"], [999]]


def test_what_others_send_is_a_session_or_an_error_that_says_so(tmp_path: Path) -> None:
    """A file with sound checksums and any field or section replaced: refused, or a session that everything works with."""
    store = SessionStore(tmp_path / "here")
    saved(store, "a", 300)
    store.export("a", tmp_path / "good")
    with StateFile(tmp_path / "good") as file:
        fields = {key: value for key, value in file.header.items() if key not in ("kind", "file_bytes", "sections")}
        parts = {name: file.section(name) for name in file.names()}
    cases = [({**fields, key: junk}, parts) for key in fields for junk in JUNK]
    cases += [({k: v for k, v in fields.items() if k != key}, parts) for key in fields]
    cases += [(fields, {k: v for k, v in parts.items() if k != name}) for name in parts]
    cases += [(fields, {**parts, name: change(parts[name])}) for name in parts for change in (_shorter, _twice, _ones)]
    there, accepted, pool = SessionStore(tmp_path / "there", lambda _: None), 0, new_pool()
    for header, sections in cases:
        write_file(tmp_path / "sent", "session-export", header, sections)
        try:
            there.import_(tmp_path / "sent", "z")
        except (SessionError, StoreError):
            continue
        accepted += 1
        assert [info.problem for info in there.list()] == [None]
        for call in (lambda: pool.release(there.resume("z", pool).sequence), lambda: there.fork("z", "y"),
                     lambda: there.rewind("z", 130), lambda: there.export("z", tmp_path / "out")):  # fmt: skip
            with contextlib.suppress(SessionError, StoreError):
                call()
        for name in [info.name for info in there.list()]:
            there.delete(name)
    assert 20 < accepted < len(cases) / 2 and not list(there.nodes.iterdir())
    pool.check()


def _shorter(section: torch.Tensor) -> torch.Tensor:
    return section[:-1]


def _twice(section: torch.Tensor) -> torch.Tensor:
    return torch.cat((section, section))


def _ones(section: torch.Tensor) -> torch.Tensor:
    return torch.full_like(section, 255)


@pytest.mark.parametrize("text", [b"[]", b"null", b"no json", b"\xff", b"[" * 5000, b'{"kind": "session"}', b'{"kind": 1}'])
def test_a_header_that_says_nothing_spoils_nothing_else(tmp_path: Path, text: bytes) -> None:
    store = SessionStore(tmp_path)
    saved(store, "a", 130)
    start = struct.pack("<8sII", MAGIC, 1, len(text))
    (tmp_path / "b.session").write_bytes(start + hashlib.blake2b(start + text, digest_size=16).digest() + text)
    (tmp_path / "c.session").mkdir()
    assert [info.problem is None for info in store.list()] == [True, False, False]
    for call in (lambda: store.info("b"), lambda: store.import_(tmp_path / "b.session"), lambda: store.fork("b", "d")):
        with pytest.raises(StoreError, match="Nautile's making"):
            call()
    store.rewind("a", 129)
    assert store.resume("a", new_pool()).sequence.length == 128 and len(list(store.nodes.iterdir())) == 1


# files of version 1 -------------------------------------------------------------------------------------------------


def test_files_of_format_version_1_load(tmp_path: Path) -> None:
    """Written once by ``python tests/state/make_fixture.py`` and kept: whatever comes later must read them."""
    expected = json.loads((FIXTURES / "session_v1.json").read_text())
    store = SessionStore(tmp_path)
    info = store.import_(FIXTURES / "session_v1.nautile")
    assert (info.name, info.length, list(info.snapshots), info.note) == ("fixture", 300, [128, 256], "format version 1")
    pool = new_pool()
    pool.fingerprint = expected["model"]  # weights differ in the last bits between machines, and with them the fingerprint
    resumed = store.resume("fixture", pool)
    assert resumed.logits is not None
    close(resumed.logits, torch.tensor(expected["logits"]), 1e-6)
    ours = feed(pool, resumed.sequence, tuple(expected["next_ids"]))
    close(ours[-1], torch.tensor(expected["next_logits"]), 1e-4)
    with StateFile(FIXTURES / "session_v1.nautile") as file:
        assert file.header["kind"] == "session-export"


def test_a_directory_of_format_version_1_loads(tmp_path: Path) -> None:
    """The session with its steps, and the same steps as a prefix cache."""
    expected = json.loads((FIXTURES / "session_v1.json").read_text())
    shutil.copytree(FIXTURES / "sessions_v1", tmp_path / "sessions")
    store, pool = SessionStore(tmp_path / "sessions"), new_pool()
    pool.fingerprint, pool.computed_by = expected["model"], "a runner that says its name, which version 1 did not"
    resumed = store.resume("fixture", pool)
    assert resumed.pending == () and resumed.sequence.length == 300
    close(feed(pool, resumed.sequence, tuple(expected["next_ids"]))[-1], torch.tensor(expected["next_logits"]), 1e-4)
    assert store.rewind("fixture", 200, "back").state_length == 128
    store.save("fixture", pool, resumed.sequence)
    store.delete("back")
    assert store.resume("fixture", pool).pending == ()
    shutil.copytree(FIXTURES / "sessions_v1" / "nodes", tmp_path / "nodes")
    options = PoolOptions(blocks=24, block_tokens=128, snapshot_every=128, disk=tmp_path / "nodes")
    cache = StatePool(pool.config, options, fingerprint=expected["model"])
    assert cache.open(row(0)).cached == 256 and not list(tmp_path.rglob("*.bad"))


def test_a_file_of_a_later_version_says_so(tmp_path: Path) -> None:
    data = bytearray((FIXTURES / "session_v1.nautile").read_bytes())
    data[8] = 2
    (tmp_path / "later").write_bytes(data)
    with pytest.raises(StoreError, match="format version 2; this Nautile reads version 1"):
        SessionStore(tmp_path / "s").import_(tmp_path / "later")


# SIGKILL ------------------------------------------------------------------------------------------------------------


def test_nothing_acknowledged_is_lost_when_the_process_is_killed(tmp_path: Path) -> None:
    result = kill_at_random(tmp_path, kills=20, seed=1)
    assert result["journal_lines"] > 60


@pytest.mark.slow
def test_two_hundred_kills(tmp_path: Path) -> None:
    result = kill_at_random(tmp_path, kills=200, seed=2)
    out = Path(__file__).parents[2] / "bench" / "results" / "session_kills.json"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {"date": time.strftime("%Y-%m-%d"), "commit": commit, **result, "lost": 0, "unreadable": 0}
    out.write_text(json.dumps(result, indent=1) + "\n")
