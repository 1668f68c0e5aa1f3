"""Rewrite the tables of README.md and docs/measured.md from bench/results/*.json, so that no figure in them was typed by hand.

    python bench/readme_tables.py [--check]

docs/measured.md has every row; README.md those that `HEADLINES` names.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
HEADLINES = (  # how the label of a row begins that a newcomer should see
    "nano decode at 1K",
    "nano decode at 128K",
    "nano prefill",
    "bfloat16 chooses",
    "us a token by part (floor), bfloat16, decode at 1024",
    "us a token by part (floor), bfloat16, prefill of",
    "training of the shipped weights",
    "tenth turn",
    "64 streaming clients",
    "sessions,",
    "pass@1, ",
    "one needle",
    "function call",
    "container, create to first run",
    "microvm, from a snapshot",
    "idle containers",
    "SIGKILLs of",
    "V4-Flash",
)


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
        ("eval_tools_200.json", "pass@1, 14 kinds, 200 tasks each, in process"),
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
    yield from bfcl()
    yield from sandboxes()
    yield from flash()
    yield from kernels()


def kernels():
    """The GPU kernels beside their bars and peers."""
    result = read("kernels_h100.json")
    if result:
        where = (result["device"], result["date"][:10], result["commit"].split()[0], "kernels_h100.json")
        for row in result["rows"]:
            if row["ours"] is not None:
                peer = f", the peer's {row['peer']:.1f}" if row["peer"] else ""
                bar = f" (bar {row['bar']})" if row["bar"] else ""
                yield f"kernel: {row['name']}", f"{row['ours']:.1f} us{peer}{bar}", *where


def sandboxes():
    """Latencies, density and losses of sandboxes."""
    result = read("sandbox_latency.json")
    if result:
        where = (result["device"], result["date"], result["commit"], "sandbox_latency.json")
        for name, label in (
            ("function_python", "function call, warm (bar 2, 5)"),
            ("container_create_run", "container, create to first run (bar 25)"),
            ("container_cold_create_run", "container, the same with nothing made ahead"),
            ("container_pooled_run", "container, pooled (bar 5)"),
            ("runsc_create", "gVisor, create (bar 200)"),
            ("runsc_run", "gVisor, a run in a sandbox that is there"),
            ("runsc_restore", "gVisor, the first restore, at once after the snapshot (bar 150)"),
            ("runsc_restore_again", "gVisor, the next restore (bar 150)"),
            ("podman", "podman run, the same command"),
        ):
            if name in result["milliseconds"]:
                found = result["milliseconds"][name]
                yield label, f"p50 {found['p50_ms']:.1f} ms, p99 {found['p99_ms']:.1f} ms", *where
        yield "function calls, two workers (bar 1,200)", f"{result['function_calls_per_second_two_workers']} a second", *where
    result = read("sandbox_vms.json")
    if result:
        where = ("two cores, emulated (TCG)", result["date"], result["commit"], "sandbox_vms.json")
        for name, label in (
            ("microvm_cold", "microvm, cold"),
            ("microvm_from_snapshot", "microvm, from a snapshot"),
            ("vm_cold", "vm, cold"),
        ):
            found = result["first_run_done"][name]
            yield (
                f"{label} (bar {result['aims_ms'][name]:,})",
                f"p50 {found['p50_ms']:,} ms, worst {found['max_ms']:,} ms",
                *where,
            )
    result = read("sandbox_fleet_density.json")
    if result:
        where = (result["device"], result["date"], result["commit"], "sandbox_fleet_density.json")
        yield (
            "idle containers at once",
            f"{result['live_at_once']:,}, {result['failures']} failures, {result['mib_each']} MiB each",
            *where,
        )
    result = read("sandbox_chaos.json")
    if result:
        where = (result["device"], result["date"], result["commit"], "sandbox_chaos.json")
        total = result["total"]
        figures = f"{total['acknowledged_and_lost']} operations lost, {total['run_twice']} run twice"
        yield f"SIGKILLs of client, edge, gateway, agent: {total['kills_in_all']:,}", figures, *where


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
    """Single needles by length, ten facts asked one by one, and what the indexer keeps."""
    known = set()
    for name in ("needle.json", "needle_sample.json", *(f"needle_ten_{length}.json" for length in (8192, 16384, 32768, 65536))):
        result = read(name)
        for variant, label in (("single", "one needle"), ("ten", "one needle of ten, asked one by one,")):
            for length, cell in ((result or {"needle": {}})["needle"].get(variant) or {}).items():
                figures = f"{cell['passed']}/{cell['total']} ({100 * cell['low']:.0f}-{100 * cell['high']:.0f} %)"
                if cell["total"] and (variant, length) not in known:
                    known.add((variant, length))
                    where = (result["device"], result["date"][:10], result["commit"], name)
                    yield f"{label} in {int(length) // 1024}K tokens", figures, *where
    result = read("recall.json")
    for length, layers in result["lengths"].items() if result else ():
        shares = ", ".join(f"{layer['recall']:.1%} (mass {layer['mass']:.1%})" for layer in layers)
        where = (result["device"], result["date"][:10], result["commit"], "recall.json")
        yield (
            f"indexer's recall of full attention's top {result['index_topk']}, {int(length) // 1024}K, by layer",
            shares,
            *where,
        )


def bfcl():
    """The leaderboard's tasks, by its own checkers."""
    for name, label in (
        ("bfcl.json", "BFCL"),
        ("bfcl_constrained.json", "BFCL, constrained"),
        ("bfcl_multi_turn.json", "BFCL"),
    ):
        result = read(name)
        if result:
            cells = [f"{category} {cell['passed']}/{cell['total']}" for category, cell in result["categories"].items()]
            yield f"{label}, right by category", ", ".join(cells), result["device"], result["date"][:10], result["commit"], name


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


def table(found, columns):
    """Rows as markdown."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in found]
    return "\n".join(lines)


def main():
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 when a page is not up to date")
    check = parser.parse_args().check
    every = list(rows())
    short = [(label, figures, device, file) for label, figures, device, _, _, file in every if label.startswith(HEADLINES)]
    pages = (
        (ROOT / "README.md", table(short, ("what", "measured", "device", "result"))),
        (ROOT / "docs" / "measured.md", table(every, ("what", "measured", "device", "date", "commit", "result"))),
    )
    for path, found in pages:
        text = path.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        new = f"{before}{BEGIN}\n{found}\n{END}{after}"
        if check and new != text:
            sys.exit(f"{path.name} is not up to date: python bench/readme_tables.py")
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
