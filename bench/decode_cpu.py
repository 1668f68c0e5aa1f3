"""Speed of the shipped model on the CPU: load, prefill, one-token decode at 1K context, through the NumPy path and the modules.

    python bench/decode_cpu.py [--threads 2] [--out bench/results/decode_cpu.json]

The two decode paths alternate in rounds of 30 tokens; figures are medians of 10 rounds.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

from nautile.checkpoint import load_model
from nautile.cli.agent import shipped_model
from nautile.model.decode import TokenDecoder

CONTEXT, TOKENS, ROUNDS = 1024, 30, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    model = load_model(shipped_model()).requires_grad_(False)
    loaded = time.perf_counter() - began
    ids = torch.randint(0, model.config.vocab_size, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    decoder, prefills, rates = TokenDecoder(model), [], {"numpy": [], "modules": []}
    with torch.inference_mode():
        for _ in range(3):
            state = model.new_state(1)
            began = time.perf_counter()
            model(ids, state=state, logits="last")
            prefills.append(CONTEXT / (time.perf_counter() - began))
        for _ in range(ROUNDS):
            for path, rate in rates.items():
                fork = state.fork()
                began = time.perf_counter()
                for token in range(TOKENS):
                    if path == "numpy":
                        decoder.step(token, fork)
                    else:
                        model(torch.tensor([[token]]), state=fork, logits="last")
                rate.append(TOKENS / (time.perf_counter() - began))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "device": f"{platform.processor() or platform.machine()}, {arguments.threads} threads",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "context": CONTEXT,
        "load_seconds": loaded,
        "prefill_tokens_per_second": statistics.median(prefills),
        "decode_tokens_per_second": {path: statistics.median(rate) for path, rate in rates.items()},
        "decode_range": {path: [min(rate), max(rate)] for path, rate in rates.items()},
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
