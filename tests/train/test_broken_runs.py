"""What goes wrong in a training run is said in a sentence, and never costs more than the steps since the last checkpoint."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nautile.cli import main
from nautile.model import Transformer
from nautile.model.initialise import initialise
from nautile.train.data import batches
from nautile.train.loop import StageConfig, Trainer
from nautile.train.losses import Batch
from nautile.train.packing import BuildConfig, _check_index
from nautile.train.run_state import RunError, read_state, write_state
from nautile.train.stages import run_stage
from nautile.train.vocabulary import check_same, digest, digest_beside, record
from oracles.random_models import tiny_network

NANO = Path(__file__).parents[2] / "src" / "nautile" / "weights" / "nano"
STAGE = StageConfig(steps=4, batch_rows=2, compile=False, warmup_steps=1, save_every=2, log_every=1)


def new_model(schedule=(0, 4)):
    return initialise(Transformer(tiny_network(schedule, seed=1).config.replace(initializer_range=0.02)), seed=3)


def write_shard(directory, number, **changes):
    arrays = {
        "ids": np.full((4, 128), 5, np.uint16),
        "documents": np.zeros((4, 128), np.uint16),
        "loss": np.ones((4, 128), np.uint8),
    }
    np.savez(directory / f"shard-{number:05d}.npz", **{**arrays, **changes})


@pytest.fixture
def shards(tmp_path):
    directory = tmp_path / "data"
    directory.mkdir()
    for number in range(2):
        write_shard(directory, number)
    (directory / "done").touch()
    return directory


def feed(directory, start=(0, 0)):
    return batches(directory, 2, torch.device("cpu"), start)


# Shards


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "flipped", "missing array", "other shape"])
def test_a_damaged_shard_is_named(shards, damage):
    path = shards / "shard-00000.npz"
    data = path.read_bytes()
    if damage == "missing array":
        np.savez(path, ids=np.zeros((4, 128), np.uint16))
    elif damage == "other shape":
        write_shard(shards, 0, loss=np.ones((3, 128), np.uint8))
    else:
        middle = len(data) // 2
        flipped = data[:300] + bytes(byte ^ 255 for byte in data[300:360]) + data[360:]
        path.write_bytes({"cut": data[:middle], "empty": b"", "garbage": b"x" * 5000, "flipped": flipped}[damage])
    with pytest.raises(RunError, match=r"shard-00000\.npz .*run the data builder again"):
        list(zip(range(2), feed(shards), strict=False))


def test_a_run_over_a_damaged_shard_keeps_its_checkpoint(shards, tmp_path):
    (shards / "shard-00001.npz").write_bytes(b"garbage")
    with pytest.raises(RunError, match="shard-00001"):
        run_stage(new_model(), shards, tmp_path / "run", STAGE, lambda row: None)
    write_shard(shards, 1)
    assert run_stage(new_model(), shards, tmp_path / "run", STAGE, lambda row: None).step == 4


# Tokenizers


def test_shards_of_another_tokenizer_are_refused(shards, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    content = json.loads((NANO / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(content, indent=3))
    assert digest(other) == digest(NANO)  # the same, laid out in another way
    content["model"]["merges"] = content["model"]["merges"][::-1]
    (other / "tokenizer.json").write_text(json.dumps(content))
    record(shards, digest(other))
    with pytest.raises(RunError, match="different tokenizers"):
        check_same(shards, NANO)
    command = ["train", "sft", "--data", str(shards), "--out", str(tmp_path / "run"), "--init", str(NANO), "--device", "cpu"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "different tokenizers" in said and "Traceback" not in said and len(said.splitlines()) == 1


def test_a_builder_notes_its_tokenizer(tmp_path):
    _check_index(BuildConfig("sft", 1, 128, 0, str(NANO)), tmp_path)
    assert digest_beside(tmp_path) == digest(NANO)
    assert digest_beside(tmp_path / "weights.safetensors") == digest(NANO)  # of the directory that a file lies in
    assert check_same(tmp_path, NANO) == digest(NANO)
    assert digest_beside(tmp_path.parent / "nowhere") is None
    with pytest.raises(RunError, match="is not a tokenizer"):
        digest(tmp_path)


# The loss


def broken(after):
    """Batches whose weights are no numbers from step ``after`` on: the loss is not either."""
    generator = torch.Generator().manual_seed(0)
    for step in range(100):
        weight = torch.full((2, 128), float("nan") if step >= after else 1.0)
        ids = torch.randint(3, 60, (2, 128), generator=generator)
        yield Batch(ids, torch.zeros(2, 128, dtype=torch.int64), weight), 7, 2 * step + 2


@pytest.mark.parametrize("log_every", [1, 1000])
@pytest.mark.parametrize("after", [2, 3])
def test_a_loss_that_is_no_number_stops_before_anything_is_saved(tmp_path, log_every, after):
    """Also when nothing is printed between the fault and the next checkpoint: the last good one stays, and can be resumed."""
    trainer = Trainer(new_model(), replace(STAGE, log_every=log_every, steps=8), tmp_path)
    with pytest.raises(RunError, match=r"not a number \(step \d, shard 7, row \d+\).*last good one"):
        trainer.fit(broken(after), lambda row: None)
    again = Trainer(new_model(), replace(STAGE, steps=8), tmp_path)
    assert again.resume() and again.progress.step == 2
    assert all(torch.isfinite(parameter).all() for parameter in again.model.parameters())


# Checkpoints


class Full:
    """A file system without room: writing fails after some bytes."""

    def __init__(self, room):
        self.room = room

    def __call__(self, state, file):
        file.write(b"x" * self.room)
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("room", [0, 10_000])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, room):
    trainer = Trainer(new_model(), STAGE, tmp_path)
    trainer.fit(broken(100), lambda row: None, until=2)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    monkeypatch.setattr("nautile.train.run_state.torch.save", Full(room))
    with pytest.raises(RunError, match=r"No space left on device.*untouched"):
        trainer.fit(broken(100), lambda row: None)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    again = Trainer(new_model(), STAGE, tmp_path)
    assert again.resume() and again.progress.step == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_device_that_is_really_full(tmp_path):
    (tmp_path / "checkpoint.tmp").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"No space left|could be written"):
        write_state(tmp_path / "checkpoint.pt", {"x": torch.zeros(100_000)})
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_damaged_checkpoint_is_named(tmp_path, size):
    Trainer(new_model(), STAGE, tmp_path).save()
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RunError, match=r"checkpoint\.pt is damaged"):
        Trainer(new_model(), STAGE, tmp_path).resume()


def test_another_configuration_is_refused(tmp_path):
    Trainer(new_model(), STAGE, tmp_path).save()
    with pytest.raises(RunError, match="another configuration"):
        Trainer(new_model((0, 4, 128)), STAGE, tmp_path).resume()
    for changes in ({"batch_rows": 4}, {"qat": True}):
        with pytest.raises(RunError, match=f"another {next(iter(changes))}"):
            Trainer(new_model(), replace(STAGE, **changes), tmp_path).resume()
    assert Trainer(new_model(), replace(STAGE, steps=9, peak_lr=1.0), tmp_path).resume()  # these may change


def test_checkpoints_from_before_options_were_kept_can_be_read(tmp_path):
    write_state(tmp_path / "c.pt", {"config": {"a": 1}, "x": 1})
    assert read_state(tmp_path / "c.pt", {"a": 1}, {"qat": True}, torch.device("cpu"))["x"] == 1
