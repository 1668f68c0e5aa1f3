"""Five minutes of training on a CPU: a small V4 network learns the agent's conversations from nothing, then says something."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from nautile.config import ModelConfig
from nautile.engine import Engine, EngineConfig, SamplingParams
from nautile.model import Transformer
from nautile.model.initialise import initialise
from nautile.protocol import Tokenizer, encode
from nautile.train.loop import Progress, StageConfig, Trainer
from nautile.train.losses import Batch
from nautile.train.packing import Document, pack, trace_documents
from nautile.train.probe import probe
from nautile.train.stages import save_weights
from nautile.train.tasks import HELD_OUT_START, KINDS
from nautile.train.traces import TraceMaker

__all__ = ["SMALL", "demo_batches", "run_demo"]

SMALL = ModelConfig.preset("nano").replace(
    hidden_size=256,
    num_hidden_layers=6,
    num_attention_heads=4,
    head_dim=64,
    qk_rope_head_dim=16,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=128,
    compress_ratios=(0, 4, 128, 4, 128, 4, 0),
    index_n_heads=4,
    index_head_dim=32,
    index_topk=64,
    n_routed_experts=8,
    num_experts_per_tok=2,
)
_LENGTH = 256
_ROWS = 4
_SHARD = 32  # rows packed at once
_PROBE_K = 16  # entries: rows of 256 tokens have 64
_PROBE_EVERY = 20  # steps


def demo_batches(maker: TraceMaker, start: int = 0) -> Iterator[tuple[Batch, int, int]]:
    """Endless rows of conversations, every token of which counts; the shard number is the cursor, as for files."""
    shard = start
    while True:
        documents = trace_documents(maker, f"demo:{shard}", 1.0, _LENGTH)
        rows = pack((Document(one.ids, b"\1" * len(one.ids)) for one in documents), _SHARD, _LENGTH, window=24)
        shard += 1
        for row in range(0, _SHARD, _ROWS):
            arrays = (rows.ids, rows.documents, rows.loss)
            ids, documents_, loss = (torch.from_numpy(array[row : row + _ROWS].astype("int64")) for array in arrays)
            yield Batch(ids, documents_, loss.float()), shard, row + _ROWS


def run_demo(
    out: Path, tokenizer_dir: Path, seconds: float, report: Callable[[dict[str, float]], None], steps: int = 100_000
) -> tuple[Progress, str]:
    """Train for ``seconds`` in directory ``out``; gives where it came to and one sample. Load and recall are measured."""
    tokenizer = Tokenizer.load(tokenizer_dir)
    model = initialise(Transformer(SMALL))
    schedule = StageConfig(
        steps=steps, peak_lr=6e-3, warmup_steps=10, seconds=seconds, compile=False, dense_experts=False, log_every=5,
        save_every=10_000, decay_fraction=0.5, clip=1.0,
    )  # fmt: skip
    trainer = Trainer(model, schedule, out)

    def watched(row: dict[str, float]) -> None:
        report(row)
        step = int(row["step"])
        if step == 1 or step % _PROBE_EVERY == 0:
            _write_probe(out, model, tokenizer, step)

    with TraceMaker(tokenizer) as maker:
        progress = trainer.fit(demo_batches(maker), watched)
    _write_probe(out, model, tokenizer, progress.step)
    save_weights(model, out / "weights.safetensors")
    (out / "config.json").write_text(json.dumps(SMALL.to_json(), indent=1) + "\n", encoding="utf-8")
    text = sample(model, tokenizer)
    (out / "sample.txt").write_text(text, encoding="utf-8")
    return progress, text


def _write_probe(out: Path, model: Transformer, tokenizer: Tokenizer, step: int) -> None:
    """Measure on conversations of seeds that training does not use."""
    with TraceMaker(tokenizer) as maker:
        ids = [number for index in range(8) for number in maker.make(f"probe:{index}").ids][: 2 * _LENGTH]
    found = probe(model, torch.tensor(ids).view(2, -1), _PROBE_K)
    with (out / "probe.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **found.row()}) + "\n")


def sample(model: Transformer, tokenizer: Tokenizer, tokens: int = 120) -> str:
    """What the model says to a task it has not seen, up to ``tokens`` tokens, likeliest ones."""
    task = KINDS["count_lines"].from_seed(HELD_OUT_START + 1)
    prompt = encode([{"role": "user", "content": task.prompt}], tokenizer=tokenizer, dialect="0731")
    engine = Engine(model, EngineConfig(runner="torch", max_running=1, pool_bytes=64 << 20), tokenizer)
    try:
        ids = engine.generate([prompt], replace(SamplingParams(), max_tokens=tokens))[0].ids
    finally:
        engine.close()
    return f"{tokenizer.decode(list(prompt.ids))}{tokenizer.decode(ids)}"
