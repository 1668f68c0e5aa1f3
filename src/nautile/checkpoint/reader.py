"""A checkpoint directory, checked as a whole before the first weight is read, then read tensor by tensor.

Opening compares every name, dtype and shape in the headers with what the configuration calls for, so a damaged or foreign
directory is refused in a second and not after minutes. Reading decodes one tensor at a time: the memory needed is the model
plus the largest single tensor.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nautile.checkpoint.configuration import CheckpointConfig, read_config
from nautile.checkpoint.errors import CheckpointError
from nautile.checkpoint.layout import (
    Entry,
    Layout,
    Location,
    StoredTensor,
    detect_layout,
    entries,
    locate,
    scale_location,
    stored_tensors,
    target_shapes,
)
from nautile.checkpoint.shards import Shard
from nautile.config import ModelConfig
from nautile.quant import fp8, mxfp4

__all__ = ["Checkpoint", "Progress", "load_state"]

Progress = Callable[[int, int], None]  # (done, total) in tensors

_INDEX = "model.safetensors.index.json"
_FLOATS = ("BF16", "F16", "F32", "F64")
_MTP_INPUTS = ("mtp.0.enorm.weight", "mtp.0.hnorm.weight", "mtp.0.e_proj.weight")  # what DSpark's mtp.* lacks
_AGAIN = "download or copy the checkpoint again"


@dataclass(frozen=True)
class _Source:
    """Where an entry's values are, and in which format. Written while opening, read by ``read``."""

    format: Literal["fp8", "fp4", "plain"]
    payload: Location
    scales: Location | None = None


class Checkpoint:
    """An open checkpoint directory in any of the three layouts. Close it, or use it as a context manager."""

    def __init__(self, path: str | Path, config: ModelConfig | None = None) -> None:
        """Open and check everything. ``config`` replaces the directory's own ``config.json``.

        Raises ConfigError for a configuration Nautile does not run, CheckpointError for files that do not hold it. Warns
        when a drafter is left out; ``self.config.num_nextn_predict_layers`` is 0 then.
        """
        self.path = Path(path)
        found = read_config(self.path) if config is None else CheckpointConfig(config, False, True)
        with ExitStack() as stack:
            self._shards = _open_shards(self.path, stack)
            self._owner = {name: shard for shard in self._shards for name in shard.tensors}
            self._tensors = {name: shard.tensors[name] for name, shard in self._owner.items()}
            self.layout: Layout = detect_layout(self._tensors)
            drafter = self._left_out(found)
            self.config = found.model.replace(num_nextn_predict_layers=0) if drafter else found.model
            self.entries = list(entries(self.config))
            self._sources = self._check(drafter)
            if not found.states_expert_dtype:
                self.config = self.config.replace(expert_dtype=self._expert_dtype())
            self._stack = stack.pop_all()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def read(self, entry: Entry) -> Tensor:
        """The values of one entry on the CPU: float32 where they were quantised, else as stored (tables int64).

        Raises CheckpointError for scales that are not numbers and tables that name experts there are none of.
        """
        source = self._sources[entry.name]
        payload = self._fetch(source.payload)
        if source.scales is not None:
            scales = self._fetch(source.scales)
            if bool((scales.view(torch.uint8) == 255).any()):
                raise CheckpointError(f"{self.path}: {source.scales.name!r} has scales that are not numbers; {_AGAIN}")
            return fp8.decode_blocks(payload, scales) if source.format == "fp8" else mxfp4.decode(payload, scales)
        if entry.storage == "i64":
            low, high = int(payload.min()), int(payload.max())
            if low < 0 or high >= self.config.n_routed_experts:
                raise CheckpointError(
                    f"{self.path}: {source.payload.name!r} names experts {low} to {high}; "
                    f"there are {self.config.n_routed_experts}"
                )
            return payload.to(torch.int64)
        return payload

    def stored(self, name: str) -> Tensor:
        """One tensor of the files as it is stored there, by its name there. Raises CheckpointError when there is none."""
        if name not in self._owner:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r}; the checkpoint stores this weight in another way")
        return self._fetch(Location(name))

    def in_file_order(self) -> Iterable[Entry]:
        """The entries, those of one file together."""
        order = {id(shard): number for number, shard in enumerate(self._shards)}
        return sorted(self.entries, key=lambda entry: order[id(self._owner[self._sources[entry.name].payload.name])])

    def _fetch(self, at: Location) -> Tensor:
        return self._owner[at.name].read(at.name, at.index, at.rows)

    def _expert_dtype(self) -> str | None:
        first = next(entry for entry in self.entries if entry.expert is not None)
        found = self._sources[first.name].format
        return None if found == "plain" else found

    def _left_out(self, found: CheckpointConfig) -> bool:
        """Whether the checkpoint has no MTP block to run; warns when that leaves something behind."""
        drafts = [name for name in self._tensors if name.startswith("mtp.")]
        if found.drafter or (drafts and not any(name in self._tensors for name in _MTP_INPUTS)):
            blocks = sorted({".".join(name.split(".")[:2]) for name in drafts})
            warnings.warn(
                f"{self.path}: the DSpark drafter ({', '.join(blocks) or 'no tensors'}; {len(drafts)} tensors) is left out: "
                "Nautile runs the trunk of this checkpoint, without drafts",
                stacklevel=4,
            )
            return True
        if self.layout != "official" and found.model.num_nextn_predict_layers and not drafts:
            warnings.warn(
                f"{self.path}: config.json announces an MTP block and the files hold none (transformers leaves it out): "
                "the model has no drafts",
                stacklevel=4,
            )
            return True
        return False

    def _check(self, drafter: bool) -> dict[str, _Source]:
        """Find the source of every entry, and refuse a missing, misshapen or unexpected tensor."""
        missing: list[str] = []
        sources: dict[str, _Source] = {}
        for entry in self.entries:
            source = self._source(entry)
            wanted = (source.payload, *((source.scales,) if source.scales else ()))
            absent = [at.name for at in wanted if at.name not in self._tensors]
            missing += absent
            sources[entry.name] = source
            if not absent:
                self._check_shapes(entry, source)
        if missing:
            missing = list(dict.fromkeys(missing))
            hint = " (or set tie_word_embeddings if the head shares the embedding)" if "head.weight" in missing else ""
            raise CheckpointError(f"{self.path}: missing {_named(missing)}; the checkpoint is incomplete: {_AGAIN}{hint}")
        used = {at.name for source in sources.values() for at in (source.payload, source.scales) if at is not None}
        extra = [name for name in self._tensors if name not in used and not (drafter and name.startswith("mtp."))]
        if extra:
            raise CheckpointError(
                f"{self.path}: unexpected {_named(extra)}; config.json describes a network without: "
                "the two do not belong together"
            )
        return sources

    def _source(self, entry: Entry) -> _Source:
        payload = locate(entry, self.layout)
        stored = self._tensors.get(payload.name)
        dtype = stored.dtype if stored is not None else None
        plain = dtype in (("I64", "I32") if entry.storage == "i64" else _FLOATS)
        quantised = entry.storage in ("fp8", "fp4")
        if plain or (dtype is None and not quantised):
            return _Source("plain", payload)
        scales = scale_location(entry, self.layout)
        if scales is None or dtype not in ("F8_E4M3", "I8", None):
            raise CheckpointError(
                f"{self.path}: tensor {payload.name!r} has dtype {dtype}, which Nautile does not read there; convert the "
                "checkpoint with the program that wrote it, or get the official files"
            )
        form = {"F8_E4M3": "fp8", "I8": "fp4", None: entry.storage}[dtype]
        return _Source("fp4" if form == "fp4" else "fp8", payload, scales)

    def _check_shapes(self, entry: Entry, source: _Source) -> None:
        expected: tuple[StoredTensor, ...]
        if source.format == "plain":
            expected = (StoredTensor(source.payload.name, "", self._stacked_shape(entry, source.payload)),)
        else:
            expected = stored_tensors(replace(entry, storage=source.format))
        places = (source.payload,) if source.scales is None else (source.payload, source.scales)
        for at, wanted in zip(places, expected, strict=True):
            found = self._tensors[at.name]
            if found.shape != wanted.shape:
                raise CheckpointError(
                    f"{self.path}: tensor {at.name!r} has shape {list(found.shape)}; config.json calls for {list(wanted.shape)}"
                )
            if wanted.dtype and found.dtype != wanted.dtype:
                raise CheckpointError(f"{self.path}: tensor {at.name!r} has dtype {found.dtype}, expected {wanted.dtype}")

    def _stacked_shape(self, entry: Entry, at: Location) -> tuple[int, ...]:
        if at.index is None:
            return entry.shape
        rows = entry.shape[0] if at.rows is None else 2 * entry.shape[0]
        return (self.config.n_routed_experts, rows, *entry.shape[1:])


def load_state(
    path: str | Path | Checkpoint,
    config: ModelConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The state dict of a checkpoint: floating tensors in ``dtype`` on ``device``, quantised ones decoded, tables int64.

    With a ``dtype`` narrower than float32, what decides (routers) and what the official files keep in float32 (stream
    mappings, sinks, biases, positional biases) stays float32.

    Streams tensor by tensor into targets allocated once. Raises CheckpointError and ConfigError as ``Checkpoint`` does.
    """
    if not isinstance(path, Checkpoint):
        with Checkpoint(path, config) as checkpoint:
            return load_state(checkpoint, device=device, dtype=dtype, progress=progress)
    dtypes = {entry.target: _target_dtype(entry, dtype) for entry in path.entries}
    shapes = target_shapes(path.config)
    state = {name: torch.empty(shape, dtype=dtypes[name], device=device) for name, shape in shapes.items()}
    with torch.no_grad():
        for done, entry in enumerate(path.in_file_order(), start=1):
            target = state[entry.target] if entry.expert is None else state[entry.target][entry.expert]
            target.copy_(path.read(entry))
            if progress is not None:
                progress(done, len(path.entries))
    return state


def _target_dtype(entry: Entry, dtype: torch.dtype) -> torch.dtype:
    if entry.storage == "i64":
        return torch.int64
    wide = entry.storage == "f32" or entry.target.endswith(".ffn.gate.weight")
    return torch.promote_types(dtype, torch.float32) if wide else dtype


def _open_shards(path: Path, stack: ExitStack) -> list[Shard]:
    """Open every file of the checkpoint; each tensor lies in exactly the file that the index names."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; give the directory that holds config.json and *.safetensors")
    index = _read_index(path)
    files = sorted(set(index.values())) if index is not None else sorted(file.name for file in path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} holds no *.safetensors files: {_AGAIN}")
    shards = [stack.enter_context(Shard(path / file)) for file in files]
    seen: dict[str, Shard] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in seen:
                raise CheckpointError(f"{path}: tensor {name!r} is in two files, {seen[name].path.name} and {shard.path.name}")
            seen[name] = shard
            if index is not None and index.get(name) != shard.path.name:
                raise CheckpointError(
                    f"{path / _INDEX}: corrupt index: tensor {name!r} is in {shard.path.name}, listed "
                    f"{'in ' + index[name] if name in index else 'nowhere'}; {_AGAIN}"
                )
    for name, file in (index or {}).items():
        if name not in seen:
            raise CheckpointError(f"{path / _INDEX}: corrupt index: tensor {name!r} is not in {file}, which it names; {_AGAIN}")
    return shards


def _read_index(path: Path) -> dict[str, str] | None:
    file = path / _INDEX
    if not file.exists():
        return None
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: corrupt index ({type(error).__name__}: {error}); {_AGAIN}") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: corrupt index: weight_map is not an object with names; {_AGAIN}")
    for name, value in weight_map.items():
        if not isinstance(value, str) or Path(value).name != value or not value.endswith(".safetensors"):
            raise CheckpointError(f"{file}: corrupt index: {name!r} is said to be in {value!r}; {_AGAIN}")
    return weight_map


def _named(names: list[str], most: int = 4) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    plural = "tensor" if len(names) == 1 else "tensors"
    more = f" and {len(names) - most:,} more ({len(names):,} in all)" if len(names) > most else ""
    return f"{plural} {shown}{more}"
