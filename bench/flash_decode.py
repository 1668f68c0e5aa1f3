"""Packed weights of V4-Flash's or Pro's full layout, experts on the card and in host memory: as ``nautile bench model``.

    python bench/flash_decode.py --case 4096x1 4096x8 1000000x1 --ahead 0 1 --out bench/results/flash_decode_h100.json
    python bench/flash_decode.py --layers 6 --case 4096x1 4096x32 --check --profile   # a slice that lies on the card alone
    python bench/flash_decode.py --prefill 4096 65536 1048576 --case

A line of the result is printed, and the file written anew, as soon as it is measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from nautile.engine.measure import WAYS, Case, Machine, Prompt, Run, Subject, fastest_way, run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("flash", "pro", "tiny"), default="flash")
    parser.add_argument("--weights", default="random", help="random, or the directory of an official checkpoint")
    parser.add_argument("--layers", type=int, default=0, help="a slice of the first layers")
    parser.add_argument("--experts", type=int, default=0, help="other than the model's number of routed experts")
    parser.add_argument("--zipf", type=float, default=0, help="popularity of experts about rank^-zipf; 0: uniform")
    parser.add_argument("--case", nargs="*", default=["4096x1"], help="context x batch, each a line of the result")
    parser.add_argument("--ahead", type=int, nargs="+", default=[0], help="experts copied ahead a layer; each case with each")
    ways = f"how steps are computed, each case in each: {', '.join(WAYS)}; or an earlier result, whose fastest is taken"
    parser.add_argument("--ways", nargs="+", default=["plain"], help=ways)
    parser.add_argument("--prefill", type=int, nargs="*", default=[], help="lengths of prompts, each a line of the result")
    parser.add_argument("--chunk", type=int, default=32768, help="tokens of a prompt that go through a layer together")
    parser.add_argument("--samples", type=int, default=5, help="chunks of a prompt that are run, at most")
    parser.add_argument("--slice", type=int, default=2048, help="tokens of a prompt in a layer's attention together")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--warm", type=int, default=8)
    parser.add_argument("--card-gb", type=float, default=0, help="card memory to use; 0: what is free")
    parser.add_argument("--host-gb", type=float, default=120)
    threads = max(1, (os.cpu_count() or 2) - 1)
    parser.add_argument("--threads", type=int, default=threads, help="for host experts; 0: stream all")
    parser.add_argument("--bandwidth", type=float, default=3030, help="GB/s of the card, for floors")
    parser.add_argument("--check", action="store_true", help="compare with the modules first")
    parser.add_argument("--profile", action="store_true", help="the card's time by kernel, at the end")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true", help="add to what --out holds")
    parser.add_argument("--commit", default="unknown")
    return parser.parse_args()


def chosen(way: str) -> str:
    """The name of a way, also where the file of an earlier result stands for its fastest (which is plain without the file)."""
    if way in WAYS:
        return way
    path = Path(way)
    if not path.name.endswith(".json"):
        raise SystemExit(f"--ways: {way!r} is none of {', '.join(WAYS)} and no .json of an earlier result")
    found = fastest_way(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else "plain"
    print(f"of {way}: {found}", flush=True)
    return found


def main() -> None:
    options = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs = [(int(context), int(batch)) for context, batch in (case.split("x") for case in options.case)]
    cases = [
        Case(*pair, ahead, options.steps, options.warm, way)
        for pair, ahead, way in itertools.product(pairs, options.ahead, map(chosen, options.ways))
    ]
    prompts = [Prompt(tokens, options.chunk, options.samples, options.slice) for tokens in options.prefill]
    plan = Run(
        Subject(options.model, options.weights, options.layers, options.experts, options.zipf),
        Machine(int(options.card_gb * 1e9), int(options.host_gb * 1e9), options.threads, options.bandwidth * 1e9),
        tuple(cases), tuple(prompts), options.check, options.profile,
    )  # fmt: skip
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "commit": options.commit,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "command": "python bench/flash_decode.py",
    }  # fmt: skip

    if options.resume and options.out and options.out.exists():
        earlier = json.loads(options.out.read_text(encoding="utf-8"))
        result |= {key: value for key, value in earlier.items() if isinstance(value, list)}

    def keep(key: str, value: Any) -> None:
        print(json.dumps({key: value}), flush=True)
        if key == "built":
            result.update(value)
        else:
            result.setdefault(key, []).append(value)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    run(plan, device, keep, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
