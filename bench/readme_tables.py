"""Rewrite the table of README.md from bench/results/*.json, so that no figure in it was typed by hand.

python bench/readme_tables.py [--check]
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


def read(name):
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def rows():
    """(what, figure, device, date, commit, file) of every result that is there."""
    decode = read("decode_cpu.json")
    if decode:
        rates = decode["decode_tokens_per_second"]
        where = (decode["device"], decode["date"], decode["commit"], "decode_cpu.json")
        yield "nano decode at 1K context, batch 1", f"{rates['numpy']:.0f} tokens/s (modules: {rates['modules']:.0f})", *where
        yield "nano prefill of 1K", f"{decode['prefill_tokens_per_second']:.0f} tokens/s", *where
        yield "nano load", f"{decode['load_seconds']:.1f} s", *where
    probe = read("train_throughput_h100.json")
    if probe:
        where = (probe["device"], probe["date"], probe["commit"], "train_throughput_h100.json")
        for name, figures in probe["variants"].items():
            if "tokens_per_second" in figures:
                yield f"training, 32 x 2,048, {name}", f"{figures['tokens_per_second'] / 1000:.0f}k tokens/s", *where
    for name, label in (("eval_tools_demo_kinds.json", "pass@1, kinds of the demo"), ("eval_tools.json", "pass@1, 14 kinds")):
        result = read(name)
        if result:
            where = (result["device"], result["date"][:10], result["commit"], name)
            total = result["total"]
            span = f"{total['passed']}/{total['total']} ({100 * total['low']:.1f}-{100 * total['high']:.1f} %)"
            yield label, f"{100 * result['pass@1']:.1f} %, {span}", *where
            for kind, score in result["kinds"].items():
                yield f"  {kind}", f"{score['passed']}/{score['total']}", *where


def table():
    """The table as markdown."""
    lines = ["| what | measured | device | date | commit | result |", "|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows()]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 when the README is not up to date")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    new = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if check:
        sys.exit(new != text)
    path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
