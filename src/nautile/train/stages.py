"""The stages of nano's recipe as functions: data and weights in, a checkpoint out. The commands are thin wrappers.

Each stage reads packed shards that other processes may still be writing, trains, and leaves ``checkpoint.pt`` (everything a
resumed run needs) and ``weights.safetensors`` (bfloat16, for the next stage or machine) in its directory.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nautile.checkpoint import load_model
from nautile.config import ModelConfig
from nautile.model import Transformer
from nautile.model.initialise import initialise
from nautile.train import packing
from nautile.train.data import batches
from nautile.train.loop import Progress, StageConfig, Trainer

__all__ = ["DENSE", "STAGES", "build_in_background", "configuration", "load_weights", "run_stage", "save_weights"]

DENSE = 1 << 20  # an index_topk that leaves no entry out

STAGES: dict[str, StageConfig] = {
    "pretrain": StageConfig(steps=3600, peak_lr=4e-3, end_lr_fraction=0.02, decay_fraction=0.55, qat=True),
    # Continues from weights that are trained already: copying exercises and traces, then traces alone, over one long decay.
    "practice": StageConfig(
        steps=12_000, peak_lr=3e-3, end_lr_fraction=0.01, decay_fraction=0.65, warmup_steps=100, qat=True, save_every=1000
    ),
    # The indexer alone, by KL to dense attention over long rows; the model gives ``DENSE`` as index_topk. A row of 16,384 is
    # one micro batch: eager, because another shape would cost two minutes of compilation.
    "indexer": StageConfig(
        steps=2000,
        peak_lr=3e-3,
        end_lr_fraction=0.05,
        decay_fraction=0.5,
        warmup_steps=10,
        batch_rows=1,
        micro_batches=2,
        qat=True,
        indexer_weight=1.0,
        compile=False,
        only="indexer",
        save_every=100,
        log_every=10,
    ),
    # Everything, on long rows, sparse: the indexer by KL within what it chose, the rest by the language loss.
    "long": StageConfig(
        steps=2000,
        peak_lr=6e-4,
        end_lr_fraction=0.02,
        decay_fraction=0.8,
        warmup_steps=10,
        batch_rows=1,
        micro_batches=2,
        qat=True,
        indexer_weight=1.0,
        compile=False,
        save_every=40,
        log_every=10,
    ),
    "sft": StageConfig(steps=4000, peak_lr=3e-3, end_lr_fraction=0.02, decay_fraction=0.6, warmup_steps=50, qat=True),
}


def build_in_background(
    directory: Path, stage: packing.Stage, tokens: int, length: int, processes: int, seed: int = 0
) -> multiprocessing.process.BaseProcess:
    """Start writing a stage's shards; training can begin when the first is there. Few tokens make one small shard."""
    shard = min(packing.SHARD_TOKENS, max(tokens, length))
    config = packing.BuildConfig(stage, tokens, length, seed, str(packing.NANO), shard)
    arguments = (config, directory, processes)
    process = multiprocessing.get_context("spawn").Process(target=packing.build_shards, args=arguments)
    process.start()
    return process


def run_stage(
    model: Transformer,
    data: Path,
    out: Path,
    config: StageConfig,
    report: Callable[[dict[str, float]], None],
    first_shard: int = 0,
) -> Progress:
    """Train ``model`` (in place) on the shards of ``data``, from ``first_shard`` on; resumes when ``out`` holds a checkpoint of
    this stage."""
    trainer = Trainer(model, config, out)
    trainer.progress.shard = first_shard
    resumed = trainer.resume()
    out.joinpath("config.json").write_text(json.dumps(model.config.to_json(), indent=1) + "\n", encoding="utf-8")
    progress = trainer.progress
    if resumed:
        report({"step": progress.step, "tokens": progress.tokens})
    device = model.embed.weight.device
    feed = batches(data, config.batch_rows, device, (progress.shard, progress.row))
    trainer.fit(feed, report)
    save_weights(model, out / "weights.safetensors")
    return trainer.progress


def save_weights(model: Transformer, path: Path) -> None:
    """Parameters and buffers, floating ones as bfloat16 (norms, biases and vectors stay float32)."""
    state: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        keep = not tensor.is_floating_point() or tensor.dim() < 2
        state[name] = (tensor if keep else tensor.bfloat16()).contiguous().cpu()
    temporary = path.with_suffix(".tmp")
    save_file(state, temporary)
    temporary.replace(path)


def configuration(name: str) -> ModelConfig:
    """A preset, or what a config.json says. Raises ConfigError."""
    return ModelConfig.from_json(Path(name)) if name.endswith(".json") else ModelConfig.preset(name)


def load_weights(config: ModelConfig, path: Path | None, device: str, seed: int = 0) -> Transformer:
    """A model with the weights of a ``weights.safetensors``, a ``checkpoint.pt`` or a model directory; fresh ones when ``path``
    is None.

    A model trained quantisation-aware lies on the grid of the formats, so its directory continues exactly.
    """
    model = initialise(Transformer(config), seed)
    if path is not None and path.is_dir():
        model.load_state_dict(load_model(path).state_dict())
    elif path is not None:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)["model"]
        )
        model.load_state_dict(
            {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        )
    return model.to(device)


def stage_config(stage: str, **changes: Any) -> StageConfig:
    """The recipe's settings for a stage, with those that are not None changed."""
    return replace(STAGES[stage], **{key: value for key, value in changes.items() if value is not None})
