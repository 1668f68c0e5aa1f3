"""Documents -> packed rows -> shards on disk, written by many processes while training already reads the first.

A row has T tokens; every document in it starts at a multiple of 128 (the longest compression ratio), so that compressed
blocks never straddle two documents. Shard k depends on (seed, k) alone: a build that was interrupted continues, and two
machines with the same software write the same shards. What this file does not know: the model and the device.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from nautile.agent.tools import SYSTEM_PROMPT, TOOLS
from nautile.protocol import Tokenizer
from nautile.train import copying, corpus, functions, needles, procedural, vocabulary
from nautile.train.environments import TRAINED, environment
from nautile.train.environments.tool import ToolEnvironment
from nautile.train.tasks import HELD_OUT_START, Lexicon, Pool
from nautile.train.tokenizer import PAD, SPECIALS
from nautile.train.traces import TraceMaker, TraceMix, run_tasks, tokenise

__all__ = [
    "ALIGNMENT",
    "BuildConfig",
    "Document",
    "Rows",
    "Stage",
    "build",
    "build_shards",
    "copying_documents",
    "function_documents",
    "functions_documents",
    "long_documents",
    "needle_documents",
    "pack",
    "practice_documents",
    "pretrain_documents",
    "specialist_documents",
    "stage_named",
    "trace_documents",
]

ALIGNMENT = 128  # documents start at multiples of this
SHARD_TOKENS = 1 << 20
NANO = Path(__file__).parents[1] / "weights" / "nano"
_RESTARTS = 3  # of a data process that was killed
_OFFER = 4096  # longer rows have room for more than eight functions
_SHARD_SECONDS = 120  # a shard takes 15 to 40; one that takes longer hangs
MANIFEST = "corpus.json"  # in a directory of pretraining shards: the files they were made of, with their licences
Stage = Literal["pretrain", "practice", "functions", "sft", "long", "specialist"]


@dataclass(frozen=True)
class Document:
    """Token ids and, for each, whether predicting it counts (1) or not (0)."""

    ids: list[int]
    loss: bytes


@dataclass(frozen=True)
class Rows:
    """Packed rows: ``ids`` uint16 [N, T]; ``documents`` uint16 [N, T], the position in the row at which the token's document
    starts, uint32 in rows over 65,536; ``loss`` uint8 [N, T], the weight of predicting this token as a target."""

    ids: np.ndarray
    documents: np.ndarray
    loss: np.ndarray

    @property
    def utilisation(self) -> float:
        """Share of positions that hold a token of a document, not padding."""
        return float((self.ids != PAD).mean())


@dataclass
class _Row:
    pieces: list[Document]
    used: int  # a multiple of ALIGNMENT


def _blocks(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def pack(documents: Iterator[Document], rows: int, length: int, window: int = 96) -> Rows:
    """Draw documents until ``rows`` rows of ``length`` tokens are full: best fit over a window of open rows.

    A document longer than what is left of a row opens another row, up to ``window`` open ones; then the fullest is closed. A
    document longer than a row is cut into rows' worth; the last token before a cut is the target of nothing, the parts are
    documents of their own. Padding and the first token of a document carry no loss. ``length`` must be a multiple of 128,
    at most 1,048,576.
    """
    if length % ALIGNMENT or not 0 < length <= 1 << 20:
        raise ValueError(f"the row length must be a multiple of {ALIGNMENT} up to 1048576, got {length}")
    done: list[_Row] = []
    open_rows: list[_Row] = []
    while len(done) < rows:
        for piece in _cut(next(documents), length):
            _place(piece, open_rows, length)
        done += [row for row in open_rows if row.used == length]
        open_rows = [row for row in open_rows if row.used < length]
        open_rows.sort(key=lambda row: row.used)
        if len(open_rows) > window:
            done.append(open_rows.pop())
    return _filled(done[:rows], length)


def _cut(document: Document, length: int) -> Iterator[Document]:
    for start in range(0, len(document.ids), length):
        piece = Document(document.ids[start : start + length], document.loss[start : start + length])
        if any(piece.loss):
            yield piece


def _place(document: Document, open_rows: list[_Row], length: int) -> None:
    need = _blocks(len(document.ids))
    fitting = [row for row in open_rows if row.used + need <= length]
    if fitting:
        row = max(fitting, key=lambda row: row.used)
        row.pieces.append(document)
        row.used += need
    else:
        open_rows.append(_Row([document], need))


def _filled(rows: list[_Row], length: int) -> Rows:
    ids = np.full((len(rows), length), PAD, np.uint16)
    documents = np.zeros((len(rows), length), np.uint16 if length <= 1 << 16 else np.uint32)
    loss = np.zeros((len(rows), length), np.uint8)
    for index, row in enumerate(rows):
        start = 0
        for piece in row.pieces:
            end = start + len(piece.ids)
            ids[index, start:end] = piece.ids
            loss[index, start + 1 : end] = np.frombuffer(piece.loss, np.uint8)[1:]
            following = start + _blocks(len(piece.ids))
            documents[index, start:following] = start
            start = following
        # The rest of the row is padding: a document of its own, block by block, so that it costs no attention to others.
        for block in range(start, length, ALIGNMENT):
            documents[index, block : block + ALIGNMENT] = block
    return Rows(ids, documents, loss)


# ---------------------------------------------------------------------------------------------------------------- documents


def trace_documents(maker: TraceMaker, seed: str, without_system: float, longest: int) -> Iterator[Document]:
    """Endless conversations with loss on the model's own tokens, cut off after ``longest`` tokens.

    In a share ``without_system`` the system prompt with its tools is left out (the text starts with BOS and the first user
    turn): such conversations cost half the tokens and teach the same.
    """
    rng = random.Random(f"{seed}:system")
    number = 0
    while True:
        trace = maker.make(f"{seed}:{number}")
        number += 1
        if rng.random() < without_system and not trace.needs_system:
            bos = maker.tokenizer.special(SPECIALS[0])
            ids, loss = [bos, *trace.ids[trace.system :]], b"\0" + bytes(trace.loss[trace.system :])
        else:
            ids, loss = trace.ids, bytes(trace.loss)
        yield Document(ids[:longest], loss[:longest])


def _all_but_system(maker: TraceMaker, seed: str, without_system: float, longest: int) -> Iterator[Document]:
    """The same conversations with loss on everything after the system prompt, users and tool results included."""
    user = maker.tokenizer.special("<｜User｜>")
    for document in trace_documents(maker, seed, without_system, longest):
        start = document.ids.index(user)
        yield Document(document.ids, bytes(start) + b"\1" * (len(document.ids) - start))


def _text_documents(tokenizer: Tokenizer, texts: Iterator[str], longest: int) -> Iterator[Document]:
    """Plain texts between BOS and EOS, cut into documents of at most ``longest`` tokens."""
    bos, eos = tokenizer.special(SPECIALS[0]), tokenizer.special(SPECIALS[1])
    for text in texts:
        ids = [*tokenizer.encode(text), eos]
        for start in range(0, len(ids), longest - 1):
            part = [bos, *ids[start : start + longest - 1]]
            if len(part) > ALIGNMENT // 2:
                yield Document(part, b"\1" * len(part))


def _procedural_texts(seed: int, shard: int) -> Iterator[str]:
    rng = random.Random(f"procedural:{seed}:{shard}")
    while True:
        yield procedural.document(rng)


def copying_documents(tokenizer: Tokenizer, lexicon: Lexicon, seed: str, longest: int) -> Iterator[Document]:
    """Endless copying exercises with loss on the copies alone."""
    rng = random.Random(f"copying:{seed}")
    bos, eos = tokenizer.special(SPECIALS[0]), tokenizer.special(SPECIALS[1])
    sizes = [len(tokenizer.decode_bytes([number])) for number in range(tokenizer.vocab_size)]
    while True:
        pool = Pool(rng, lexicon=replace(lexicon, share=rng.uniform(0.3, 1.0)))
        passages = copying.document(pool, rng.choice((1000, 2000, 4000)))
        text = "".join(passage.text for passage in passages)
        counts = b"".join(bytes([passage.copied]) * len(passage.text.encode()) for passage in passages)
        ids, loss, place = tokenizer.encode(text), bytearray(), 0
        for number in ids:
            loss.append(counts[place])  # a token counts when its first byte is part of a copy
            place += sizes[number]
        yield Document([bos, *ids, eos][:longest], (b"\0" + bytes(loss) + b"\0")[:longest])


def specialist_documents(tokenizer: Tokenizer, kinds: Sequence[str], seed: str, longest: int) -> Iterator[Document]:
    """Endless conversations of one task each, of environments that wrap a tool task, done by their expert."""
    rng, chosen = random.Random(f"specialist:{seed}"), [environment(kind) for kind in kinds]
    if not all(issubclass(kind, ToolEnvironment) and kind.kind in TRAINED for kind in chosen):
        raise ValueError(f"a specialist is made of tool tasks that are for training, not of {', '.join(kinds)}")
    while True:
        task = rng.choice(chosen)(rng.randrange(HELD_OUT_START)).task  # type: ignore[attr-defined]
        with tempfile.TemporaryDirectory(prefix="nautile-") as root:
            turns = run_tasks([task], Path(root))
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, *turns.messages]
        ids, loss, _ = tokenise(messages, TOOLS, tokenizer)
        yield Document(ids[:longest], bytes(loss)[:longest])


def needle_documents(tokenizer: Tokenizer, lexicon: Lexicon, seed: str, longest: int) -> Iterator[Document]:
    """Endless texts of up to ``longest`` tokens with facts that are asked for at the end; loss on the model's own tokens."""
    rng = random.Random(f"needles:{seed}")
    while True:
        wide = replace(lexicon, share=rng.uniform(0.15, 0.85)) if rng.random() < 0.6 else None
        found = needles.training_haystack(Pool(rng, lexicon=wide), tokenizer, longest)
        ids, loss, _ = tokenise(found.messages(), (), tokenizer)
        yield Document(ids[:longest], bytes(loss)[:longest])


def function_documents(tokenizer: Tokenizer, lexicon: Lexicon, seed: str, longest: int) -> Iterator[Document]:
    """Endless conversations about functions that were never seen before; loss on the model's own tokens. One that is longer
    than ``longest`` tokens is left out: its request would be cut off."""
    rng = random.Random(f"functions:{seed}")
    while True:
        wide = replace(lexicon, share=rng.uniform(0.1, 0.6)) if rng.random() < 0.5 else None
        talk = functions.random_talk(Pool(rng, lexicon=wide), 8 if longest <= _OFFER else 24)
        ids, loss, _ = tokenise(talk.messages, talk.tools, tokenizer, talk.thinking)
        if len(ids) <= longest:
            yield Document(ids, bytes(loss))


def functions_documents(maker: TraceMaker, seed: str, longest: int) -> Iterator[Document]:
    """Unknown functions, traces, copying exercises and needles, 40 to 46 to 6 to 8 by tokens."""
    yield from _mixed(
        (
            (function_documents(maker.tokenizer, maker.lexicon, seed, longest), 0.40),
            (trace_documents(maker, f"functions:{seed}", 0.65, longest), 0.46),
            (copying_documents(maker.tokenizer, maker.lexicon, f"functions:{seed}", longest), 0.06),
            (needle_documents(maker.tokenizer, maker.lexicon, f"functions:{seed}", longest), 0.08),
        )
    )


def practice_documents(maker: TraceMaker, seed: str, longest: int) -> Iterator[Document]:
    """Traces, copying exercises and needles, 74 to 12 to 14 by tokens; loss on the model's own tokens and on copies."""
    yield from _mixed(
        (
            (trace_documents(maker, f"practice:{seed}", 0.65, longest), 0.74),
            (copying_documents(maker.tokenizer, maker.lexicon, seed, longest), 0.12),
            (needle_documents(maker.tokenizer, maker.lexicon, seed, longest), 0.14),
        )
    )


def long_documents(maker: TraceMaker, seed: str, longest: int) -> Iterator[Document]:
    """Needles and conversations of many tasks, by tokens 60 to 40, and 80 to 20 in rows of more than 16,384, which few
    conversations reach; loss on the model's own tokens."""
    share = 0.60 if longest <= 16_384 else 0.80
    yield from _mixed(
        (
            (needle_documents(maker.tokenizer, maker.lexicon, f"long:{seed}", longest), share),
            (trace_documents(maker, f"long:{seed}", 0.3, longest), 1 - share),
        )
    )


def _mixed(streams: Sequence[tuple[Iterator[Document], float]]) -> Iterator[Document]:
    """Documents of several streams, each with its share of the tokens."""
    written = [0] * len(streams)
    while True:
        behind = min(range(len(streams)), key=lambda index: written[index] / streams[index][1])
        document = next(streams[behind][0])
        written[behind] += len(document.ids)
        yield document


def pretrain_documents(maker: TraceMaker, natural: Iterator[str], seed: int, shard: int, longest: int) -> Iterator[Document]:
    """35 % code and documents (``natural``), 35 % procedural, 30 % traces, by tokens; loss on all but the system prompt."""
    yield from _mixed(
        (
            (_text_documents(maker.tokenizer, natural, longest), 0.35),
            (_text_documents(maker.tokenizer, _procedural_texts(seed, shard), longest), 0.35),
            (_all_but_system(maker, f"pretrain:{seed}:{shard}", 0.5, longest), 0.30),
        )
    )


# --------------------------------------------------------------------------------------------------------------- the builder


@dataclass(frozen=True)
class BuildConfig:
    """What a directory of shards holds. Written to ``index.json``; a directory with another one is refused."""

    stage: Stage
    tokens: int  # rounded up to whole shards
    sequence_length: int
    seed: int
    tokenizer: str  # directory or file, as for Tokenizer.load
    shard_tokens: int = SHARD_TOKENS
    without_system: float = 0.3  # share of SFT conversations without the system prompt
    real_python: bool = True
    kinds: str = ""  # environments of a specialist, separated by commas

    @property
    def shards(self) -> int:
        """How many shards there will be."""
        return -(-self.tokens // (self.rows * self.sequence_length))

    @property
    def rows(self) -> int:
        """Rows of one shard."""
        return max(1, self.shard_tokens // self.sequence_length)


def shard_path(directory: Path, shard: int) -> Path:
    """Where shard ``shard`` lies."""
    return directory / f"shard-{shard:05d}.npz"


def stage_named(name: str) -> Stage:
    """The stage called ``name``. Raises ValueError for another word."""
    for stage in get_args(Stage):
        if name == stage:
            return stage  # type: ignore[no-any-return]
    raise ValueError(f"there is no stage {name!r}; choose one of {', '.join(get_args(Stage))}")


class _Writer:
    """Writes shards; one per process, so that tokenizer, caches and the list of files are made once."""

    def __init__(self, config: BuildConfig, directory: Path) -> None:
        self.config, self.directory = config, directory
        mix = TraceMix(real_python=config.real_python)
        if config.stage == "long":
            mix = replace(mix, chained=0.9, longest=40)
        self.maker = TraceMaker(Tokenizer.load(config.tokenizer), mix)
        self.sources = corpus.collect() if config.stage == "pretrain" else []
        self.files = corpus.load_manifest(directory / MANIFEST) if config.stage == "pretrain" else []

    def write(self, shard: int) -> dict[str, float]:
        """Write one shard, whole or not at all. Returns its statistics."""
        config, path = self.config, shard_path(self.directory, shard)
        began = time.perf_counter()
        if config.stage == "sft":
            seed = f"sft:{config.seed}:{shard}"
            documents = trace_documents(self.maker, seed, config.without_system, config.sequence_length)
        elif config.stage == "practice":
            documents = practice_documents(self.maker, f"{config.seed}:{shard}", config.sequence_length)
        elif config.stage == "functions":
            documents = functions_documents(self.maker, f"{config.seed}:{shard}", config.sequence_length)
        elif config.stage == "long":
            documents = long_documents(self.maker, f"{config.seed}:{shard}", config.sequence_length)
        elif config.stage == "specialist":
            seed = f"{config.seed}:{shard}"
            documents = specialist_documents(self.maker.tokenizer, config.kinds.split(","), seed, config.sequence_length)
        else:
            natural = corpus.documents(self.sources, self.files, f"{config.seed}:{shard}")
            documents = pretrain_documents(self.maker, natural, config.seed, shard, config.sequence_length)
        rows = pack(documents, config.rows, config.sequence_length, min(96, max(8, config.rows // 5)))
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, ids=rows.ids, documents=rows.documents, loss=rows.loss)
        temporary.replace(path)
        return {
            "shard": shard,
            "tokens": rows.ids.size,
            "utilisation": rows.utilisation,
            "loss_share": float(rows.loss.mean()),
            "seconds": time.perf_counter() - began,
            "rejected": self.maker.conversations.rejected,
        }

    def close(self) -> None:
        """Remove the scratch directory."""
        self.maker.conversations.close()


def _work(config: BuildConfig, directory: Path, process: int, processes: int, log: Path, time_limit: int = 0) -> None:
    """Write the missing ones among shards process, process + processes, ...: the first shards appear first."""
    writer, parent = _Writer(config, directory), os.getppid()
    try:
        for shard in range(process, config.shards, processes):
            if os.getppid() != parent:
                return  # the builder was killed: nobody wants the rest
            if not shard_path(directory, shard).exists():
                _write_or_mark(writer, shard, directory, log, time_limit)
    finally:
        writer.close()


def _write_or_mark(writer: _Writer, shard: int, directory: Path, log: Path, time_limit: int) -> None:
    """Write a shard; if that fails leave its traceback in ``shard-N.failed``, which readers skip and ``build`` reports."""
    failed = shard_path(directory, shard).with_suffix(".failed")
    try:
        if time_limit:
            signal.alarm(time_limit)
        row = writer.write(shard)
        signal.alarm(0)
    except Exception:
        signal.alarm(0)
        failed.write_text(traceback.format_exc(), encoding="utf-8")
        return
    failed.unlink(missing_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _too_long(*_: object) -> None:
    raise TimeoutError(f"a shard took more than {_SHARD_SECONDS} s")


def _work_alone(config: BuildConfig, directory: Path, process: int, processes: int, log: Path) -> None:
    """``_work`` as a process of its own: when it is terminated it still removes its scratch directory."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGALRM, _too_long)
    _work(config, directory, process, processes, log, _SHARD_SECONDS)


def build(
    directory: Path,
    stage: Stage,
    tokens: int,
    sequence_length: int = 2048,
    processes: int = 1,
    seed: int = 0,
    tokenizer: str | Path = NANO,
) -> dict[str, float]:
    """Write shards of packed rows to ``directory`` until it holds ``tokens`` positions; continues what is there.

    Shards appear in order, so training may start when the first is there; an empty file ``done`` ends the directory. Returns
    totals (tokens, utilisation, loss_share, seconds, tokens_per_second_per_process). Raises ValueError when the directory
    was begun with another recipe, RuntimeError when a process fails.
    """
    return build_shards(BuildConfig(stage, tokens, sequence_length, seed, str(tokenizer)), directory, processes)


def build_shards(config: BuildConfig, directory: Path, processes: int = 1) -> dict[str, float]:
    """``build`` for a whole recipe."""
    directory.mkdir(parents=True, exist_ok=True)
    _check_index(config, directory)
    began, log = time.perf_counter(), directory / "log.jsonl"
    count = max(1, min(processes, config.shards))
    if config.stage == "pretrain" and not (directory / MANIFEST).exists():
        corpus.write_manifest(corpus.scan(corpus.collect(), processes), directory / MANIFEST)
    if count == 1:
        _work(config, directory, 0, 1, log)
    else:
        _run_processes(config, directory, count, log)
    (directory / "done").touch()
    return _totals(log, time.perf_counter() - began)


def _check_index(config: BuildConfig, directory: Path) -> None:
    index = directory / "index.json"
    recipe = asdict(config)
    if index.exists():
        found = json.loads(index.read_text(encoding="utf-8"))
        if {**found, "tokens": 0} != {**recipe, "tokens": 0}:
            raise ValueError(f"{directory} holds shards of another recipe ({found}); choose another directory")
    temporary = index.with_suffix(".tmp")
    temporary.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    temporary.replace(index)
    if (known := vocabulary.digest_beside(Path(config.tokenizer))) is not None:
        vocabulary.record(directory, known)
    (directory / "done").unlink(missing_ok=True)


def _run_processes(config: BuildConfig, directory: Path, count: int, log: Path) -> None:
    context = multiprocessing.get_context("spawn")  # the caller may hold threads and a device, which must not be forked

    def start(index: int) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=_work_alone, args=(config, directory, index, count, log))
        process.start()
        return process

    _watch(start, count)


def _watch(start: Callable[[int], multiprocessing.process.BaseProcess], count: int) -> None:
    """Start ``count`` workers and wait for them. One that is killed (memory ran out, say) is started again and goes on with the
    shards that are missing; an error of one ends all. Raises RuntimeError for errors, and when one is killed over and over."""
    workers, restarts, wrong = [start(index) for index in range(count)], [0] * count, False
    while True:
        codes = [worker.exitcode for worker in workers]  # one look a round: what ends behind it is for the next
        wrong = wrong or any((code or 0) > 0 for code in codes)
        for index, code in enumerate(codes):
            if wrong:
                workers[index].terminate()
            elif (code or 0) < 0 and restarts[index] < _RESTARTS:
                restarts[index] += 1
                workers[index], codes[index] = start(index), None
        if None not in codes:
            break
        time.sleep(0.2)
    failed = [index for index, code in enumerate(codes) if (code or 0) > 0 or (code and not wrong)]
    if failed:
        raise RuntimeError(
            f"data processes {failed} failed or were killed; a traceback is above if there was one. What is written stays; run "
            "again to continue, with fewer processes if memory is short"
        )


def _totals(log: Path, seconds: float) -> dict[str, float]:
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    rows = list({row["shard"]: row for row in rows}.values())
    count, tokens = max(len(rows), 1), sum(row["tokens"] for row in rows)
    return {
        "shards": len(rows),
        "tokens": tokens,
        "utilisation": sum(row["utilisation"] for row in rows) / count,
        "loss_share": sum(row["loss_share"] for row in rows) / count,
        "seconds": seconds,
        "tokens_per_second_per_process": tokens / max(sum(row["seconds"] for row in rows), 1e-9),
    }


def main() -> None:
    """``python -m nautile.train.packing DIRECTORY STAGE TOKENS``: build without the rest of the program."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("stage", choices=get_args(Stage))
    parser.add_argument("tokens", type=int)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS)
    parser.add_argument("--kinds", default="", help="environments of the stage specialist, separated by commas")
    options = parser.parse_args()
    config = BuildConfig(
        options.stage,
        options.tokens,
        options.sequence_length,
        options.seed,
        str(NANO),
        options.shard_tokens,
        kinds=options.kinds,
    )
    totals = build_shards(config, options.directory, options.processes)
    print(json.dumps(totals))


if __name__ == "__main__":
    main()
