"""What the state costs: snapshots for several intervals k, rewinds, prefix hits from every tier, sessions; on nano.

    python bench/state_costs.py [--context 4096] [--out bench/results/state_costs.json]

Times are medians; those of single copies are the best of twenty, which others on the machine do not disturb. Bytes of Flash
and Pro are those of tensors of their shape on the meta device, at one million tokens.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from nautile import ModelConfig
from nautile.checkpoint import load_model
from nautile.cli.agent import shipped_model
from nautile.engine import EngineConfig
from nautile.engine.costs import gqa8_kv_bytes, kv_bytes
from nautile.engine.plan import Piece, Plan
from nautile.engine.runners import make_runner
from nautile.state import Pages, PoolOptions, SessionStore, StatePool, fingerprint

REWINDS = 9


def timed(action, repeats=5, over=statistics.median):
    """Median (or best) milliseconds, and the last result."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = action()
        times.append(1000 * (time.perf_counter() - began))
    return over(times), result


class Bench:
    """The model, and the tokens of one long context."""

    def __init__(self, context):
        self.model = load_model(shipped_model()).requires_grad_(False)
        self.name = fingerprint(self.model.config, self.model.state_dict())
        self.ids = torch.randint(0, 8192, (context,), generator=torch.Generator().manual_seed(0)).tolist()

    def pool(self, k=256, **options):
        blocks = len(self.ids) // 256 + 8
        sizes = PoolOptions(blocks=blocks, slots=2, snapshot_every=k, snapshot_bytes=1 << 30, **options)
        return StatePool(self.model.config, sizes, fingerprint=self.name)

    def feed(self, pool, sequence, ids):
        """Prefill in chunks of at most 512 tokens that end at multiples of k."""
        runner, _ = make_runner(self.model, pool, EngineConfig())
        self.runner = type(runner).__name__
        while ids:
            size = min(len(ids), 512, pool.options.snapshot_every - sequence.length % pool.options.snapshot_every)
            pool.ensure(sequence, size)
            began = time.perf_counter()
            logits = runner.step(Plan((Piece(sequence, tuple(ids[:size])),)))
            pool.append(sequence, ids[:size], time.perf_counter() - began)
            ids = ids[size:]
        return logits[0]

    def interval(self, k):
        """Snapshots every k tokens: their size, the time to take one, and what a rewind to a random token costs."""
        pool = self.pool(k)
        sequence = pool.open(self.ids)
        self.feed(pool, sequence, self.ids)
        take, tail = timed(lambda: pool.pages.read_tail(sequence.slot, len(self.ids)), 20, min)
        put, _ = timed(lambda: pool.pages.write_tail(sequence.slot, len(self.ids), tail), 20, min)
        rng, restore, recompute, tokens = random.Random(0), [], [], []
        for target in sorted(rng.sample(range(len(self.ids) // 8, len(self.ids)), REWINDS), reverse=True):
            began = time.perf_counter()
            reached = pool.rewind(sequence, target)
            restored = time.perf_counter()
            if target > reached:
                self.feed(pool, sequence, self.ids[reached:target])
            recompute.append(1000 * (time.perf_counter() - restored))
            restore.append(1000 * (restored - began))
            tokens.append(target - reached)
        pool.check()
        return {
            "k": k,
            "snapshot_bytes": tail.nbytes,
            "snapshot_bytes_per_token": tail.nbytes / k,
            "share_of_history": tail.nbytes / (k / 256 * pool.pages.block_bytes),
            "snapshot_ms": take,
            "load_ms": put,
            "rewind_restore_ms": statistics.median(restore),
            "rewind_recomputed_tokens": statistics.median(tokens),
            "rewind_recompute_ms": statistics.median(recompute),
        }

    def tiers(self, directory):
        """A prefix of the whole context: computed, and found again in each tier."""
        found = {}
        for tier, options in (("device", {}), ("host", {"host_bytes": 1 << 30}), ("disk", {"disk": directory})):
            pool = self.pool(**options)
            sequence = pool.open(self.ids)
            began = time.perf_counter()
            self.feed(pool, sequence, self.ids)
            found.setdefault("computed_ms", 1000 * (time.perf_counter() - began))
            pool.release(sequence)
            if tier != "device":
                pool.cache.make_room(pool.options.blocks)
                assert pool.stats().nodes["device"] == 0
            began = time.perf_counter()
            again = pool.open([*self.ids, 1])
            found[f"{tier}_hit_ms"] = 1000 * (time.perf_counter() - began)
            assert again.cached == len(self.ids)
        return found

    def sessions(self, directory):
        """Save (everything on the disk), save again after one token, fork, resume."""
        store, pool = SessionStore(directory), self.pool()
        sequence = pool.open(self.ids)
        logits = self.feed(pool, sequence, self.ids)
        first, _ = timed(lambda: store.save("a", pool, sequence, logits), 1)
        logits = self.feed(pool, sequence, [1])
        return {
            "first_save_ms": first,
            "next_save_ms": timed(lambda: store.save("a", pool, sequence, logits))[0],
            "fork_ms": timed(lambda: (store.fork("a", "b"), store.delete("b")))[0],
            "resume_ms": timed(lambda: pool.release(store.resume("a", pool).sequence, keep=False))[0],
            "bytes": sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file()),
        }


def shapes():
    """Bytes of the big models with packed rows: at a million tokens, and of one snapshot."""
    result = {}
    for name in ("flash", "pro"):
        config, blocks = ModelConfig.preset(name), -(-1_000_000 // 256)
        pages = Pages(config, PoolOptions(blocks=blocks, slots=1, rows="packed"), "meta")
        total = sum(pages.bytes_by_kind.values())
        result[name] = {
            "bytes_by_kind": pages.bytes_by_kind,
            "bytes": total,
            "plan_bytes": int(kv_bytes(config, 1_000_000).total),
            "share_of_gqa8": total / gqa8_kv_bytes(1_000_000, config.num_hidden_layers),
            "snapshot_bytes": pages.tail_bytes(1 << 20),
            "block_bytes": pages.block_bytes,
        }
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.context < 4096:
        parser.error("--context must be at least 4096: the longest interval is 2048")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    bench = Bench(arguments.context)
    with tempfile.TemporaryDirectory() as directory:
        result = {
            "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit,
            "model": "nano, float32 rows",
            "context": arguments.context,
            "intervals": [bench.interval(k) for k in (256, 512, 1024, 2048)],
            "tiers": bench.tiers(Path(directory) / "tier"),
            "sessions": bench.sessions(Path(directory) / "sessions"),
            "million_tokens": shapes(),
            "runner": bench.runner,
        }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
