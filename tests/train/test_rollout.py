"""Rollouts: killed anywhere they go on where they were; what is trained on is what was sampled."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautile.train.rollout import RolloutConfig, RolloutError, roll_out, sample_seed
from nautile.train.wal import WalError, WriteAheadLog
from train.scripted_rollout import CONFIG, COUNTED, PLAN, Scripted

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="apt-get install bubblewrap")
needs_crun = pytest.mark.skipif(shutil.which("crun") is None, reason="make setup-sandbox")
PROGRAM = Path(__file__).parent / "scripted_rollout.py"
UNKNOWN = "what came of it is unknown"


def finished(directory, substrate, kills, seed):
    command = [sys.executable, str(PROGRAM), str(directory), substrate, str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def sampled(record):
    """What the policy said in one sample, turn by turn, however many requests it took."""
    return [token for _, ids, _ in record["ids"] for token in ids]


def check_against(whole, killed, directory, substrate):
    """No sample lost, none restarted, no tool run twice; with a container every outcome is known."""
    unknown = 0
    for before, after in zip(whole, killed, strict=True):
        assert sampled(after) == sampled(before)
        assert (after["status"], after["answer"]) == (before["status"], before["answer"])
        outputs = [call["output"] for turn in after["turns"] for call in turn["calls"]]
        left = directory / f"sample-{after['number']:05d}" / "work" / COUNTED
        lines = Counter(left.read_text().split() if left.exists() else [])
        assert all(count == 1 for count in lines.values()), lines
        lost = {str(turn) for turn, output in enumerate(outputs) if UNKNOWN in output}
        assert set(lines) >= {"0", "1", "2"} - lost
        unknown += len(lost)
        assert [lp for _, _, lps in after["ids"] for lp in lps] == [lp for _, _, lps in before["ids"] for lp in lps] or lost
    assert not unknown or substrate == "function"
    log = WriteAheadLog.open(directory / "tokens.wal", json.loads((directory / "tokens.wal").read_text().splitlines()[0])[1])
    log.close()
    return log.restarts, unknown


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody killed."""
    return finished(tmp_path_factory.mktemp("whole") / "run", "function", 0, 0)


@needs_bubblewrap
def test_killed_rollouts_go_on_where_they_were(tmp_path, whole):
    """Ten kills: the lengths of all samples, their tokens and their tool calls are those of the run that nobody killed."""
    killed = finished(tmp_path / "killed", "function", 10, 1)
    restarts, _ = check_against(whole, killed, tmp_path / "killed", "function")
    assert restarts >= 5  # the kills did hit unfinished rollouts
    assert any(len(record["ids"]) > len(record["turns"]) for record in killed)  # and turns in the middle


@pytest.mark.slow
@needs_crun
@pytest.mark.parametrize("seed", range(3))
def test_killed_rollouts_in_containers_know_every_outcome(tmp_path, whole, seed):
    restarts, unknown = check_against(whole, finished(tmp_path, "container", 8, seed), tmp_path, "container")
    assert restarts >= 4 and unknown == 0


@pytest.mark.slow
@needs_bubblewrap
@pytest.mark.parametrize("seed", range(2, 11))
def test_another_ninety_kills(tmp_path, whole, seed):
    check_against(whole, finished(tmp_path, "function", 10, seed), tmp_path, "function")


@needs_bubblewrap
def test_segments_are_the_conversation(tmp_path):
    """Each request's prompt begins with all that came before; sampled ids are never encoded again."""
    engine = Scripted.load()
    sample = roll_out(engine, PLAN[:1], tmp_path, CONFIG, {})[0]
    assert [len(segment.ids) for segment in sample.segments] == [len(segment.logprobs) for segment in sample.segments]
    for before, after in pairwise(sample.segments):
        assert after.prompt[: len(before.prompt) + len(before.ids)] == (*before.prompt, *before.ids)
    seed = sample_seed(CONFIG.seed, PLAN[0])
    assert [segment.ids for segment in sample.segments] == [tuple(engine.reply(seed, turn)) for turn in range(4)]


@needs_bubblewrap
def test_finished_rollouts_are_read_not_made(tmp_path):
    engine = Scripted.load()
    first = roll_out(engine, PLAN[:2], tmp_path, CONFIG, {})
    engine.submit_sync = None  # nothing may be asked
    assert roll_out(engine, PLAN[:2], tmp_path, CONFIG, {}) == first


@needs_bubblewrap
def test_another_runs_directory_is_refused(tmp_path):
    roll_out(Scripted.load(), PLAN[:1], tmp_path, CONFIG, {"weights": "a"})
    for plan, config, head in (
        (PLAN[:1], CONFIG, {"weights": "b"}),
        (PLAN[:2], CONFIG, {"weights": "a"}),
        (PLAN[:1], replace(CONFIG, seed=1), {"weights": "a"}),
    ):
        with pytest.raises(WalError, match="another run"):
            roll_out(Scripted.load(), plan, tmp_path, config, head)


@needs_bubblewrap
def test_limits_end_a_sample(tmp_path):
    for name, changes, status in (
        ("reply", {"reply_tokens": 5}, "reply_budget"),
        ("tokens", {"tokens": 600}, "token_budget"),
        ("turns", {"turns": 2}, "turn_budget"),
    ):
        sample = roll_out(Scripted.load(), PLAN[:1], tmp_path / name, replace(CONFIG, **changes), {})[0]
        assert (sample.status, sample.reward) == (status, 0.0)


def test_a_temperature_whose_probabilities_nobody_keeps_is_refused():
    with pytest.raises(RolloutError, match="temperature 1"):
        RolloutConfig(temperature=0.7)


# The log


def test_a_log_in_use_and_damaged_ones_say_so(tmp_path):
    path = tmp_path / "tokens.wal"
    log = WriteAheadLog.open(path, {"a": 1})
    with pytest.raises(WalError, match="in use"):
        WriteAheadLog.open(path, {"a": 1})
    log.close()
    path.write_bytes(path.read_bytes() + b'["token",0,0,1,-1.0]\n')
    with pytest.raises(WalError, match="line 2, is damaged"):
        WriteAheadLog.open(path, {"a": 1})
    path.write_bytes(b"something else\n")
    with pytest.raises(WalError, match="line 1"):
        WriteAheadLog.open(path, {})
    path.write_bytes(b'["restart"]\n')
    with pytest.raises(WalError, match="does not begin"):
        WriteAheadLog.open(path, {})


@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.tuples(st.integers(0, 9), st.floats(-9, 0)), max_size=4)), max_size=8),
    st.integers(0, 400),
)
def test_a_log_cut_anywhere_is_a_prefix(tmp_path_factory, turns, cut):
    """Whatever byte a crash ends at, what is read back is the beginning of what was written, and writing goes on."""
    path = tmp_path_factory.mktemp("wal") / "tokens.wal"
    log = WriteAheadLog.open(path, {})
    for sample, tokens in turns:
        turn = len(log.samples[sample].turns)
        log.context(sample, turn, (turn,))
        for token, logprob in tokens:
            log.token(sample, turn, token, logprob)
    log.close()
    head = path.read_bytes().index(b"\n") + 1
    path.write_bytes(path.read_bytes()[: max(head, path.stat().st_size - cut)])
    again = WriteAheadLog.open(path, {})
    again.close()
    for sample, found in again.samples.items():
        whole = log.samples[sample].turns
        assert len(found.turns) <= len(whole)
        for short, full in zip(found.turns, whole, strict=False):
            assert short.context == full.context and full.tokens[: len(short.tokens)] == short.tokens
            assert full.logprobs[: len(short.logprobs)] == short.logprobs
    WriteAheadLog.open(path, {}).close()
