"""A writer of sessions that is killed again and again, and the bookkeeping of what it was told is safe."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

from nautile.state import SessionStore, StatePool
from state.pools import close, feed, logits_of, new_pool, row


def write_for_ever(directory: Path, journal: Path, seed: int) -> NoReturn:
    """Save, fork, rewind and delete sessions; the journal says what is tried and, when the call has returned, done."""
    store, pool, rng = SessionStore(directory), new_pool(blocks=96, slots=2), random.Random(seed)
    with journal.open("a", buffering=1) as file:
        while True:
            name = rng.choice("abc")
            actions = [_save, _save, _fork, _rewind, _delete] if _exists(store, name) else [_save]
            rng.choice(actions)(store, pool, name, rng, file)


def _exists(store: SessionStore, name: str) -> bool:
    return (store.directory / f"{name}.session").exists()


def _save(store: SessionStore, pool: StatePool, name: str, rng: random.Random, journal: TextIO) -> None:
    seed, length, logits = rng.randrange(3), rng.randrange(1, 400), None
    sequence = pool.open(row(seed)[: length + 1])
    if sequence.length < length:
        logits = feed(pool, sequence, row(seed)[sequence.length : length])[-1]
    print("try", name, "state", seed, length, file=journal)
    store.save(name, pool, sequence, logits)
    print("done", name, "state", seed, length, file=journal)
    pool.release(sequence)


def _fork(store: SessionStore, pool: StatePool, name: str, rng: random.Random, journal: TextIO) -> None:
    new = rng.choice("def")
    if _exists(store, new):
        _delete(store, pool, new, rng, journal)
    print("try", new, "copy", name, file=journal)
    store.fork(name, new)
    print("done", new, "copy", name, file=journal)


def _rewind(store: SessionStore, pool: StatePool, name: str, rng: random.Random, journal: TextIO) -> None:
    length = rng.randrange(1, store.info(name).length + 1)
    print("try", name, "cut", length, file=journal)
    store.rewind(name, length)
    print("done", name, "cut", length, file=journal)


def _delete(store: SessionStore, pool: StatePool, name: str, rng: random.Random, journal: TextIO) -> None:
    print("try", name, "gone", file=journal)
    store.delete(name)
    print("done", name, "gone", file=journal)


def _die(work: Callable[[], None]) -> NoReturn:
    """Run in a forked child, which never comes back into the test runner."""
    try:
        work()
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _lines(journal: Path) -> int:
    return journal.read_text().count("\n") if journal.exists() else 0


def believed(journal: Path) -> dict[str, list[tuple[int, int] | None]]:
    """What each name may stand for, as (seed, length): what was acknowledged last, or what was being done when it ended."""
    known: dict[str, list[tuple[int, int] | None]] = {}

    def after(words: list[str]) -> tuple[int, int] | None:
        kind = words[2]
        if kind == "state":
            return int(words[3]), int(words[4])
        if kind == "gone":
            return None
        source = known[words[3] if kind == "copy" else words[1]][0]
        assert source is not None
        return source if kind == "copy" else (source[0], int(words[3]))

    lines = journal.read_text().splitlines() if journal.exists() else []
    for line in lines:
        words = line.split()
        if words[0] == "found":  # settled by the test after a kill
            known[words[1]] = [None if words[2] == "gone" else (int(words[2]), int(words[3]))]
            continue
        outcome = after(words)
        known[words[1]] = [outcome] if words[0] == "done" else [*known.get(words[1], [None])[:1], outcome]
    return known


def check_after_a_kill(directory: Path, journal: Path) -> None:
    store, found = SessionStore(directory), {}
    for info in store.list():
        assert info.problem is None, info
        resumed = store.resume(info.name, pool := new_pool(blocks=16))
        ids = (*resumed.sequence.ids, *resumed.pending)
        seed = next(seed for seed in range(3) if row(seed)[: len(ids)] == ids)
        assert len(resumed.pending) < 128
        new = (*resumed.pending, row(seed)[len(ids)])
        ours = feed(pool, resumed.sequence, new)  # and it computes what it should
        close(ours[-1], logits_of(row(seed))[len(ids)])
        found[info.name] = (seed, len(ids))
    assert not list(directory.rglob("*.bad"))
    for name, options in believed(journal).items():
        assert any(option == found.get(name) or _same(option, found.get(name)) for option in options), (name, options, found)
    with journal.open("a") as file:
        for name in "abcdef":
            state = found.get(name)
            print("found", name, *(state or ("gone",)), file=file)


def _same(one: tuple[int, int] | None, other: tuple[int, int] | None) -> bool:
    """Rows may begin alike: then the seed of a short one cannot be told."""
    return one is not None and other is not None and row(one[0])[: one[1]] == row(other[0])[: other[1]]


def kill_at_random(directory: Path, kills: int, seed: int) -> dict[str, float]:
    """Run a writer, kill it at a random moment, look at everything it left; again and again on the same directory."""
    rng, journal, operations = random.Random(seed), directory / "journal", 0
    sessions = directory / "sessions"
    began = time.monotonic()
    for _ in range(kills):
        lines = _lines(journal)
        child = os.fork()
        if not child:
            _die(lambda: write_for_ever(sessions, journal, rng.randrange(10**6)))
        rng.random()  # the next child draws others
        first, wanted = 0.0, 1 + int(rng.expovariate(1 / 8))
        while (written := _lines(journal) - lines) < wanted:  # until it has worked for a while
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the writer ended by itself"
            first = first or (time.monotonic() if written > 0 else 0.0)
            time.sleep(0.001)
        each = (time.monotonic() - first) / wanted if first else 0.01  # seconds a line, on this machine now
        time.sleep(2 * each * rng.random())  # anywhere in what it is doing
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the writer ended by itself"
        text = journal.read_text()
        journal.write_text(text[: text.rfind("\n") + 1])  # a line that was cut says nothing
        operations += len(text.splitlines()) - lines
        check_after_a_kill(sessions, journal)
    return {"kills": kills, "journal_lines": operations, "seconds": round(time.monotonic() - began, 1)}
