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
    yield from cpu()
    probe = read("train_throughput_h100.json")
    if probe:
        where = (probe["device"], probe["date"], probe["commit"], "train_throughput_h100.json")
        for name, figures in probe["variants"].items():
            if "tokens_per_second" in figures:
                yield f"training, 32 x 2,048, {name}", f"{figures['tokens_per_second'] / 1000:.0f}k tokens/s", *where
    run = read("train_nano_wordings_h100.json")
    if run:
        where = (run["device"], run["date"], run["commit"], "train_nano_wordings_h100.json")
        rate = run["last_fifth"]
        yield (
            "training of the shipped weights",
            f"{rate['tokens_per_second'] / 1000:.0f}k tokens/s, {rate['mfu']:.1%} MFU",
            *where,
        )
    yield from engine()
    for name, label in (
        ("eval_tools_demo_kinds.json", "pass@1, kinds of the demo"),
        ("eval_tools.json", "pass@1, 14 kinds"),
        ("eval_tools_held_out_wording.json", "pass@1, 14 kinds, wordings never seen"),
        ("eval_tools_renamed_tools.json", "pass@1, 14 kinds, tools renamed"),
    ):
        result = read(name)
        if result:
            where = (result["device"], result["date"][:10], result["commit"], name)
            total = result["total"]
            span = f"{total['passed']}/{total['total']} ({100 * total['low']:.1f}-{100 * total['high']:.1f} %)"
            yield label, f"{100 * result['pass@1']:.1f} %, {span}", *where
            kinds = ", ".join(f"{kind} {score['passed']}" for kind, score in result["kinds"].items())
            yield f"  by kind, of {min(score['total'] for score in result['kinds'].values())}", kinds, *where
    yield from needles()
    yield from flash()


def flash():
    """Flash at full size on one card, and how long its kernels took beside their peers."""
    result = read("flash_decode_h100.json")
    if result:
        where = (result["device"], result["date"][:10], result["commit"], "flash_decode_h100.json")
        for case in result["results"]:
            name = f"V4-Flash, 43 layers, random weights, {case['context']:,} tokens, batch {case['batch']}"
            void = " (void)" if case["void"] else ""
            yield name, f"{case['tokens_per_s']:.1f} tokens/s, experts found on the card {case['hit_rate']:.1%}{void}", *where
    result = read("flash_slice_h100.json")
    if result:
        where = (result["device"], result["date"][:10], result["commit"], "flash_slice_h100.json")
        for case in result["results"]:
            ratio = case["median_ms"] / case["floor_ms"]
            figures = f"{case['median_ms']:.2f} ms, {ratio:.1f} times bytes over bandwidth"
            yield f"V4-Flash, six layers on the card, batch {case['batch']}", figures, *where


def needles():
    """Single needles by length, and what the indexer keeps."""
    result = read("needle.json")
    if result:
        where = (result["device"], result["date"][:10], result["commit"], "needle.json")
        for length, cell in result["needle"]["single"].items():
            figures = f"{cell['passed']}/{cell['total']} ({100 * cell['low']:.0f}-{100 * cell['high']:.0f} %)"
            yield f"one needle in {int(length) // 1024}K tokens", figures, *where


def cpu():
    """Speed of the shipped model on a CPU in both types of the native kernels, beside transformers in the same run."""
    result = read("decode_cpu.json")
    if not result or "roofline" not in result:  # written before the bars were measured in both types
        return
    where = (result["device"], result["date"], result["commit"], "decode_cpu.json")
    decode, long = result["decode_tokens_per_second"], result["long_context"]

    def both(figure):
        return f"{figure('bfloat16')} in bfloat16, {figure('float32')} in float32"

    alone = both(lambda dtype: f"{decode[dtype]:.0f} tokens/s")
    yield "nano decode at 1K, batch 1", f"{alone} (transformers {decode['transformers']:.0f})", *where
    many = both(lambda dtype: f"{decode[dtype + '_batch_16']:.0f} tokens/s")
    yield "nano decode at 1K, batch 16, all together", many, *where
    for length, rates in result["prefill"].items():
        beside = f" (transformers {rates['transformers']:.0f})" if "transformers" in rates else ""
        figures = both(lambda dtype, rates=rates: f"{rates[dtype]:.0f} tokens/s")
        yield f"nano prefill of {length} tokens", figures + beside, *where
    for length in long["bfloat16"]["decode"]:
        if int(length) >= 16384:
            points = {dtype: long[dtype]["decode"][length] for dtype in ("bfloat16", "float32")}
            figures = both(
                lambda dtype, p=points: f"{p[dtype]['tokens_per_second']:.0f} tokens/s, {p[dtype]['ratio_to_1k']:.2f} of 1K"
            )
            yield f"nano decode at {int(length) // 1024}K", figures, *where
    yield "bfloat16 chooses float32's token", f"{100 * result['agreement']['same_choice']:.2f} %", *where
    for dtype, bars in result["bars"].items():
        met = [name for name, bar in bars.items() if bar["met"]]
        missed = ", ".join(f"{name} {bar['measured']:.2f} of {bar['wanted']}" for name, bar in bars.items() if not bar["met"])
        yield f"CPU bars in {dtype}", f"{len(met)} of {len(bars)} met" + (f"; not: {missed}" if missed else ""), *where
    yield from roofline(result, where)


def roofline(result, where):
    """Time by part beside what memory and arithmetic allow."""
    for dtype, cases in result["roofline"].items():
        for case, parts in cases.items():
            cells = [
                f"{part} {value['microseconds']:.0f}"
                + (f" ({value['floor_microseconds']:.0f})" if "floor_microseconds" in value else "")
                for part, value in parts.items()
                if value["microseconds"] >= 1
            ]
            yield f"us a token by part (floor), {dtype}, {case}", ", ".join(cells), *where


def engine():
    """What the engine and the state do over many requests."""
    turns = read("agent_turns.json")
    if turns:
        last = turns["turns"][-1]
        figures = f"{last['computed_tokens']} tokens computed for {last['new_tokens']} new"
        yield "tenth turn of a 32K conversation", figures, turns["device"], turns["date"], turns["commit"], "agent_turns.json"
    load = read("serve_load.json")
    if load:
        figures = f"{load['errors']} errors, {load['different_from_twin']} of {load['streams']} texts differ from their twins"
        yield "64 streaming clients for 60 s", figures, load["device"], load["date"], load["commit"], "serve_load.json"
    for dtype in ("bfloat16", "float32"):
        tasks = read(f"eval_tools_in_process_{dtype}.json")
        if tasks:
            total = tasks["total"]
            figures = f"{total['passed']}/{total['total']} ({100 * total['low']:.1f}-{100 * total['high']:.1f} %)"
            where = (tasks["device"], tasks["date"][:10], tasks["commit"], f"eval_tools_in_process_{dtype}.json")
            yield f"pass@1 in {dtype}, 14 kinds, in process", figures, *where
    kills = read("session_kills.json")
    if kills:
        figures = f"{kills['lost']} lost, {kills['unreadable']} unreadable"
        yield (
            f"sessions, {kills['kills']} random SIGKILLs",
            figures,
            "two cores",
            kills["date"],
            kills["commit"],
            "session_kills.json",
        )


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
