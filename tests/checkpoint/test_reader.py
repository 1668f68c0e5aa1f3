"""Round trips, memory, and one clear error for each way in which a checkpoint can be wrong."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from checkpoint.models import change_config, change_tensors, header_of, legal_config, written
from nautile import ConfigError
from nautile.checkpoint import Checkpoint, CheckpointError, load_model, load_state, manifest
from nautile.checkpoint.layout import StoredTensor
from nautile.checkpoint.shards import Shard, ShardWriter
from nautile.quant import fp8, mxfp4
from oracles.random_models import random_ids

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("one-file")
    written(path)
    return path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    written(path, max_shard_bytes=600_000)
    return path


@pytest.fixture
def copy(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


@pytest.fixture
def sharded_copy(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "copy"))


def test_values_are_those_of_the_formats(tmp_path: Path) -> None:
    config = legal_config()
    tensors = written(tmp_path, config)
    state = load_state(tmp_path)
    fp8_names = ("layers.0.attn.wq_a.weight", "layers.1.attn.indexer.wq_b.weight", "mtp.0.h_proj.weight")
    assert set(state) == set(tensors)
    for name in fp8_names:
        assert torch.equal(state[name], fp8.decode_blocks(*fp8.encode_blocks(tensors[name])))
    for leaf in ("w1", "w2", "w3"):
        name = f"layers.2.ffn.experts.{leaf}"
        assert torch.equal(state[name], mxfp4.decode(*mxfp4.encode(tensors[name])))
    for name in ("embed.weight", "norm.weight", "layers.1.attn.compressor.wgate.weight"):
        assert torch.equal(state[name], tensors[name].bfloat16().float())
    for name in ("hc_head_fn", "layers.1.attn.attn_sink", "layers.1.ffn.gate.bias", "layers.0.ffn.gate.tid2eid"):
        assert torch.equal(state[name], tensors[name])


def test_model_with_everything_runs(pristine: Path) -> None:
    model = load_model(pristine)
    ids = random_ids(model.config, 130, seed=0).unsqueeze(0)
    with torch.no_grad():
        assert model(ids).isfinite().all()
        chunk = model.new_chunk(ids)
        drafts, _ = model.forward_mtp(model.streams(ids, chunk), ids)
    assert drafts.isfinite().all()
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))


def test_one_file_and_many_hold_the_same(pristine: Path, sharded: Path) -> None:
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 3 and (sharded / INDEX).exists()
    one, many = load_state(pristine), load_state(sharded)
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_files_agree_with_the_manifest_and_the_library(sharded: Path) -> None:
    listed = {tensor.name: tensor for tensor in manifest(legal_config())}
    index = json.loads((sharded / INDEX).read_text())
    assert set(index["weight_map"]) == set(listed)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in listed.values())
    for file in sharded.glob("*.safetensors"):
        header = header_of(file)
        with safe_open(file, framework="pt") as library, Shard(file) as ours:
            assert set(library.keys()) == set(header) == set(ours.tensors)
            for name, stored in header.items():
                assert (stored["dtype"], tuple(stored["shape"])) == (listed[name].dtype, listed[name].shape)
                assert index["weight_map"][name] == file.name
                theirs = library.get_tensor(name)
                assert ours.read(name).dtype == theirs.dtype
                assert torch.equal(ours.read(name).view(torch.uint8), theirs.view(torch.uint8))


def test_narrow_dtype_keeps_routers_and_float32_tensors(pristine: Path) -> None:
    wide, narrow = load_state(pristine), load_state(pristine, dtype=torch.bfloat16)
    for name in ("layers.1.ffn.gate.weight", "hc_head_fn", "layers.1.attn.attn_sink", "layers.1.ffn.gate.bias"):
        assert narrow[name].dtype == torch.float32 and torch.equal(narrow[name], wide[name])
    for name in ("embed.weight", "layers.1.attn.wkv.weight", "layers.1.ffn.experts.w2"):
        assert narrow[name].dtype == torch.bfloat16 and torch.equal(narrow[name].float(), wide[name])
    assert narrow["layers.0.ffn.gate.tid2eid"].dtype == torch.int64
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model = load_model(pristine, dtype=torch.bfloat16)
        assert model(torch.arange(9).unsqueeze(0)).isfinite().all()


def test_one_tensor_at_a_time(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of everything read from the files, at most a payload and its scales are alive at once."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    original = Shard.read

    def watched(self: Shard, *arguments: Any) -> torch.Tensor:
        nonlocal most
        value = original(self, *arguments)
        alive[:] = [reference for reference in alive if reference() is not None] + [weakref.ref(value)]
        most = max(most, len(alive))
        return value

    monkeypatch.setattr(Shard, "read", watched)
    with Checkpoint(sharded) as checkpoint:
        assert most == 0  # opening reads headers only
        load_state(checkpoint)
    assert most <= 2


def test_progress_counts_to_the_end(pristine: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_model(pristine, progress=lambda done, total: seen.append((done, total)))
    assert seen[0][0] == 1 and seen[-1][0] == seen[-1][1] == len(seen)


# what can be wrong ---------------------------------------------------------------------------------------------------


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (drop("layers.1.attn.wkv.weight"), r"missing tensor 'layers\.1\.attn\.wkv\.weight'; .* incomplete: download"),
        (drop("layers.1.attn.wkv.scale"), r"missing tensor 'layers\.1\.attn\.wkv\.scale'"),
        (drop("layers.2.ffn.experts.3.w2.weight"), r"missing tensor 'layers\.2\.ffn\.experts\.3\.w2\.weight'"),
        (drop("mtp.0.enorm.weight"), r"missing tensor 'mtp\.0\.enorm\.weight'"),
        (drop("head.weight"), r"missing tensor 'head\.weight'.*tie_word_embeddings"),
        (put("layers.7.extra", torch.ones(2)), r"unexpected tensor 'layers\.7\.extra'"),
        (put("norm.weight", torch.ones(64)), r"'norm\.weight' has shape \[64\]; config\.json calls for \[128\]"),
        (put("layers.0.attn.wo_b.weight", torch.ones(128, 64)), r"wo_b\.weight' has shape \[128, 64\]; .* \[128, 128\]"),
        (put("layers.0.attn.wo_b.scale", torch.ones(2, 1).to(torch.float8_e8m0fnu)), r"wo_b\.scale' has shape \[2, 1\]"),
        (put("layers.0.attn.wo_b.scale", torch.ones(1, 1)), r"wo_b\.scale' has dtype F32, expected F8_E8M0"),
        (put("norm.weight", torch.ones(128, dtype=torch.int8)), r"'norm\.weight' has dtype I8, which Nautile does not read"),
        (put("layers.0.ffn.gate.tid2eid", torch.full((96, 2), 4)), r"names experts 4 to 4; there are 4"),
        (
            put("layers.0.attn.wkv.scale", torch.full((1, 1), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)),
            r"'layers\.0\.attn\.wkv\.scale' has scales that are not numbers",
        ),
    ],
)  # fmt: skip
def test_wrong_tensors(copy: Path, change: Callable[[dict[str, torch.Tensor]], object], text: str) -> None:
    change_tensors(copy, change)
    with pytest.raises(CheckpointError, match=text):
        load_model(copy)


def test_many_missing_are_counted(copy: Path) -> None:
    change_tensors(copy, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".experts." in name])
    with pytest.raises(CheckpointError, match=r"and \d+ more \(96 in all\)"):
        load_model(copy)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.7, 0.999])
def test_truncated_files(copy: Path, share: float) -> None:
    file = copy / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*(truncated: tensor '|cut inside its header).*again"):
        load_model(copy)


def test_a_file_cut_after_it_was_opened(copy: Path) -> None:
    with Checkpoint(copy) as checkpoint:
        with (copy / "model.safetensors").open("r+b") as file:
            file.truncate(200_000)
        with pytest.raises(CheckpointError, match="the file ends inside tensor"):
            load_state(checkpoint)


@pytest.mark.parametrize("damage", [b"not json", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}'])
def test_damaged_headers(copy: Path, damage: bytes) -> None:
    (copy / "model.safetensors").write_bytes(len(damage).to_bytes(8, "little") + damage + bytes(64))
    with pytest.raises(CheckpointError, match="damaged safetensors header"):
        load_model(copy)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 23_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_to_a_header_is_a_clear_error(flips: list[tuple[int, int]]) -> None:
    """Whatever bytes change, the file opens and reads, or a CheckpointError says what is wrong."""
    stored = [StoredTensor(f"layers.{i}.weight", dtype, (3, 8)) for i, dtype in enumerate(("F32", "BF16", "I8", "F8_E8M0"))]
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "x.safetensors"
        ShardWriter(file, stored).close(complete=False)
        data = bytearray(file.read_bytes())
        for position, value in flips:
            data[position % (len(data) - 24 * 8)] = value
        file.write_bytes(data)
        try:
            with Shard(file) as shard:
                for name in shard.tensors:
                    shard.read(name)
        except CheckpointError as error:
            assert str(file) in str(error)


def test_a_missing_shard_is_named(sharded_copy: Path) -> None:
    next(iter(sorted(sharded_copy.glob("model-*")))).unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-\d+\.safetensors: cannot be opened"):
        load_model(sharded_copy)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda index: "garbage", r"index\.json: corrupt index \(JSONDecodeError"),
        (lambda index: json.dumps({"metadata": {}}), "corrupt index .KeyError"),
        (lambda index: json.dumps({"weight_map": []}), "weight_map is not an object"),
        (lambda index: json.dumps({"weight_map": {**index, "norm.weight": "../x.safetensors"}}), "is said to be in '../x"),
        (lambda index: json.dumps({"weight_map": {**index, "ghost": index["norm.weight"]}}), "'ghost' is not in model-"),
        (lambda index: json.dumps({"weight_map": {k: v for k, v in index.items() if k != "hc_head_fn"}}), "listed nowhere"),
        (
            lambda index: json.dumps({"weight_map": {**index, "norm.weight": index["embed.weight"]}}),
            r"'norm\.weight' is in model-\d+-of-\d+\.safetensors, listed in model-00001",
        ),
    ],
)
def test_corrupt_index(sharded_copy: Path, change: Callable[[dict[str, str]], str], text: str) -> None:
    file = sharded_copy / INDEX
    file.write_text(change(json.loads(file.read_text())["weight_map"]))
    with pytest.raises(CheckpointError, match=text):
        load_model(sharded_copy)


def test_the_same_tensor_twice(copy: Path) -> None:
    shutil.copy(copy / "model.safetensors", copy / "again.safetensors")
    with pytest.raises(CheckpointError, match=r"is in two files, again\.safetensors and model\.safetensors"):
        load_model(copy)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="no JSON object"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(legal_config().to_json()))
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors files"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        load_state(tmp_path / "config.json", legal_config())


def test_v41_is_refused_by_its_config(copy: Path) -> None:
    change_config(copy, model_type="deepseek_v41")
    with pytest.raises(ConfigError, match=r"DeepSeek-V4\.1"):
        load_model(copy)


def test_config_of_another_size(copy: Path) -> None:
    change_config(copy, num_attention_heads=4)
    with pytest.raises(CheckpointError, match=r"has shape \[2\]; config\.json calls for \[4\]"):
        load_model(copy)


# DSpark --------------------------------------------------------------------------------------------------------------


def to_dspark(tensors: dict[str, torch.Tensor]) -> None:
    """Three draft blocks without the inputs of classic MTP, with a Markov head."""
    for name in [name for name in tensors if name.startswith("mtp.0.")]:
        value = tensors.pop(name)
        if not name.startswith(("mtp.0.enorm", "mtp.0.hnorm", "mtp.0.e_proj", "mtp.0.h_proj")):
            for block in range(3):
                tensors[name.replace("mtp.0.", f"mtp.{block}.")] = value.clone()
    tensors["mtp.2.markov_head.weight"] = torch.ones(4, 4)


@pytest.mark.parametrize("keys", [{"dspark_block_size": 5, "dspark_markov_rank": 256, "num_nextn_predict_layers": 3}, {}])
def test_dspark_trunk_loads_without_its_drafter(pristine: Path, copy: Path, keys: dict[str, int]) -> None:
    change_tensors(copy, to_dspark)
    change_config(copy, **keys)
    with pytest.warns(UserWarning, match=r"DSpark drafter \(mtp\.0, mtp\.1, mtp\.2; \d+ tensors\) is left out"):
        model = load_model(copy)
    assert model.config.num_nextn_predict_layers == 0
    original = load_model(pristine)
    ids = random_ids(model.config, 20, seed=0).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids), original(ids))
        streams = model.streams(ids, model.new_chunk(ids))
        with pytest.raises(ConfigError, match="no MTP block"):
            model.forward_mtp(streams, ids)


def test_an_incomplete_mtp_block_is_not_taken_for_dspark(copy: Path) -> None:
    change_tensors(copy, drop("mtp.0.hnorm.weight"))
    with pytest.raises(CheckpointError, match=r"missing tensor 'mtp\.0\.hnorm\.weight'"):
        load_model(copy)
