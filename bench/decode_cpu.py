"""Speed of the shipped model on a CPU against transformers, one command: decode, batches, prefill, long contexts, agreement.

    python bench/decode_cpu.py --out bench/results/decode_cpu.json          # about twelve minutes on two quiet cores
    python bench/decode_cpu.py --longest 16384 --no-reference-8k            # one minute

Every bar is measured in both types of the native kernels, float32 and bfloat16 (weights and rows of that type). All paths run
the same weights in one process and take turns; figures are medians over rounds, so noise hits them alike. transformers and
the modules run in float32, eager. The commit is read before anything else.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import cpu_parts
import torch

from nautile.checkpoint import load_model
from nautile.cli.agent import shipped_model
from nautile.engine.native import NativeRunner, pack
from nautile.engine.plan import Piece, Plan
from nautile.kernels.native import features
from nautile.model.decode import TokenDecoder
from nautile.protocol import Tokenizer
from nautile.state.pages import Pages, PoolOptions, Sequence
from nautile.train.tasks import HELD_OUT_START
from nautile.train.traces import TraceMaker

CONTEXT, ROUNDS, CHUNK, NATIVE_ROUNDS = 1024, 7, 4096, 5
BLOCK = 256
DTYPES = ("float32", "bfloat16")
SECTIONS = ("decode", "parts", "prefill", "agreement", "long")
IDLE = 0.3  # seconds until the threads of the path before have stopped spinning


class Native:
    """One native runner with a pool of its own."""

    def __init__(self, packed, dtype, threads, blocks, slots=1):
        self.packed, self.dtype, self.threads = packed, dtype, threads
        self.pages = Pages(packed.config, PoolOptions(blocks=blocks, slots=slots, rows=dtype))
        self.runner = NativeRunner(packed, self.pages, threads=threads)
        self.sequences = []

    def open(self, tokens):
        self.sequences.append(Sequence(blocks=self.pages.allocate(-(-tokens // BLOCK)), slot=self.pages.allocate_slot()))
        return self.sequences[-1]

    def close_all(self):
        for sequence in self.sequences:
            self.pages.drop(sequence.blocks)
            self.pages.drop_slot(sequence.slot)
        self.sequences = []

    def feed(self, sequence, ids, logits="last"):
        rows = self.runner.step(Plan((Piece(sequence, tuple(ids), logits),)))
        sequence.ids += ids
        return rows

    def decode(self, sequence, tokens):
        """Seconds a token, each at the same position: nothing is appended, so the context stays as long as it is."""
        began = time.perf_counter()
        for token in tokens:
            self.runner.step(Plan((Piece(sequence, (token,)),)))
        return (time.perf_counter() - began) / len(tokens)


def timed(action):
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def machine():
    """What the hardware allows, measured with torch: bytes read a second, and products in both types."""
    x = torch.ones(1 << 27)
    read = min(timed(x.sum) for _ in range(4))
    rates = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a = torch.randn(1536, 1536).to(dtype)
        rates[name] = 2 * 1536**3 / min(timed(lambda a=a: a @ a) for _ in range(5)) / 1e9
    return {"read_gigabytes_per_second": x.nbytes / read / 1e9, "gflops": rates}


def reference(path):
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  # slow to import

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="eager").float().eval()


def decode_at_1k(model, theirs, native, ids):
    """Tokens a second of every path, in turns, and of 16 sequences at once."""
    prompt, tokens = torch.tensor([ids[:CONTEXT]]), ids[CONTEXT : CONTEXT + 64]
    cache = theirs(prompt, use_cache=True).past_key_values
    state, decoder = model.new_state(1), TokenDecoder(model)
    model(prompt, state=state, logits="none")

    def transformers():
        for token in tokens[:12]:
            theirs(torch.tensor([[token]]), past_key_values=cache, use_cache=True)

    def modules():
        fork = state.fork()
        for token in tokens[:12]:
            model(torch.tensor([[token]]), state=fork, logits="last")

    def numpy():
        fork = state.fork()
        for token in tokens[:24]:
            decoder.step(token, fork)

    paths = {
        "transformers": lambda: timed(transformers) / 12,
        "modules": lambda: timed(modules) / 12,
        "numpy": lambda: timed(numpy) / 24,
    }
    for name, run in native.items():
        alone, batch = batches(run, ids)
        paths[name] = lambda run=run, alone=alone: run.decode(alone, tokens)
        paths[f"{name}_batch_16"] = lambda run=run, batch=batch: (
            timed(lambda: [run.runner.step(batch) for _ in range(16)]) / 256
        )
    seconds = {name: [] for name in paths}
    for _ in range(ROUNDS):
        for name, path in paths.items():
            time.sleep(IDLE)
            seconds[name].append(path())
    for run in native.values():
        run.close_all()
    return {name: 1 / statistics.median(values) for name, values in seconds.items()}


def batches(run, ids):
    """A sequence of 1K tokens, and a plan of one token for each of 16 others, whose prompts differ."""
    alone = run.open(CONTEXT + BLOCK)
    run.feed(alone, ids[:CONTEXT])
    many = [run.open(CONTEXT + BLOCK) for _ in range(16)]
    for number, sequence in enumerate(many):
        run.feed(sequence, ids[number * 64 : number * 64 + CONTEXT])
    return alone, Plan(tuple(Piece(sequence, (ids[CONTEXT + 97 * number],)) for number, sequence in enumerate(many)))


def prefill(model, theirs, native, ids, length, rounds):
    """Tokens a second of each path over ``length`` tokens; ``rounds`` by path (0 leaves it out)."""
    prompt = torch.tensor([ids[:length]])

    def run_native(run):
        sequence = run.open(length)
        seconds = timed(lambda: run.feed(sequence, ids[:length]))
        run.close_all()
        return seconds

    paths = {
        "transformers": lambda: timed(lambda: theirs(prompt, use_cache=True, logits_to_keep=1)),
        "modules": lambda: timed(lambda: model(prompt, state=model.new_state(1), logits="last")),
        **{name: (lambda run=run: run_native(run)) for name, run in native.items()},
    }
    for run in native.values():
        run_native(run)  # the first pass allocates
    seconds = {name: [] for name in paths}
    for turn in range(max(rounds.values())):
        for name, path in paths.items():
            if turn < rounds.get(name, NATIVE_ROUNDS):
                time.sleep(IDLE)
                seconds[name].append(path())
    return {name: length / statistics.median(values) for name, values in seconds.items() if values}


def long_context(run, ids, longest):
    """One prefill up to ``longest`` with the time at every doubling; decode at each of them beside decode at 1K."""
    short, long = run.open(CONTEXT + 1), run.open(longest + CHUNK)
    run.feed(short, ids[:CONTEXT])
    spent, points, decode = 0.0, {}, {}
    at = [CONTEXT << i for i in range(20) if CONTEXT << i <= longest]
    stream = [ids[i % len(ids)] for i in range(longest)]
    for until in at:
        while long.length < until:
            chunk = stream[long.length : min(until, long.length + CHUNK)]
            spent += timed(lambda chunk=chunk: run.feed(long, chunk, "none"))
        points[until] = spent
        pairs = [(run.decode(long, ids[:24]), run.decode(short, ids[:24])) for _ in range(ROUNDS)]
        decode[until] = {
            "tokens_per_second": 1 / statistics.median(pair[0] for pair in pairs),
            "ratio_to_1k": statistics.median(pair[1] / pair[0] for pair in pairs),
        }
    parts = {
        f"prefill at {longest}": prefill_parts(run, long, stream[:CHUNK]),
        f"decode at {longest}": cpu_parts.measured(run, lambda: run.decode(long, ids[:24]), 24),
    }
    run.close_all()
    return {
        "parts": parts,
        "prefill_seconds": points,
        "prefill_tokens_per_second": {length: length / seconds for length, seconds in points.items()},
        "time_ratio_of_doubling": {length: points[length] / points[length // 2] for length in at[1:]},
        "decode": decode,
    }


def prefill_parts(run, sequence, ids):
    """Parts of prefilling ``ids`` at the end of a sequence, which stays as long as it is."""
    return cpu_parts.measured(run, lambda: run.runner.step(Plan((Piece(sequence, tuple(ids), "none"),))), len(ids), rounds=1)


def parts_at_1k(run, ids):
    """Parts of decoding at 1K, alone and 16 together, and of prefilling 4K."""
    alone, batch = batches(run, ids)
    empty = run.open(CHUNK)
    found = {
        "decode at 1024": cpu_parts.measured(run, lambda: run.decode(alone, ids[:64]), 64),
        "decode at 1024, 16 together": cpu_parts.measured(run, lambda: [run.runner.step(batch) for _ in range(8)], 128),
        f"prefill of {CHUNK}": prefill_parts(run, empty, ids[:CHUNK]),
    }
    run.close_all()
    return found


def roofline(result, config, dtype):
    """Every part that was timed, beside what the machine allows; see cpu_parts.py."""
    found = {**result.get("parts", {}).get(dtype, {}), **result.get("long_context", {}).get(dtype, {}).get("parts", {})}
    out = {}
    for case, parts in found.items():
        length = int(case.split(",")[0].rsplit(" ", 1)[1])
        together = 16 if "together" in case else 256 if "prefill" in case else 1  # the native kernels' slices hold 256 tokens
        length = length // 2 if "prefill of" in case else length
        work = cpu_parts.work(config, dtype, length, together, together)
        out[case] = cpu_parts.table(parts, work, result["machine"], dtype)
    return out


def agreement(native, tokenizer, traces=16):
    """How often bfloat16 and float32 choose the same token, along conversations of held-out tasks."""
    same = total = 0
    with TraceMaker(tokenizer) as maker:
        for number in range(traces):
            ids, best = maker.make(HELD_OUT_START + number).ids[:4096], {}
            for name, run in native.items():
                best[name] = run.feed(run.open(len(ids)), ids, "all").argmax(-1)
                run.close_all()
            same += int((best["float32"] == best["bfloat16"]).sum())
            total += len(ids)
    return {"tokens": total, "same_choice": same / total}


def bars(result, dtype):
    """Each bar of the CPU path for one type: what is wanted, what was measured. Bars whose part did not run are not there."""
    decode, long = result.get("decode_tokens_per_second"), result.get("long_context", {}).get(dtype)
    least = {}
    if decode:
        least["decode_vs_transformers_at_1k"] = (8, decode[dtype] / decode["transformers"])
        least["batch_16_vs_batch_1"] = (5, decode[f"{dtype}_batch_16"] / decode[dtype])
    if long and 131072 in long["decode"]:
        least["decode_at_128k_vs_1k"] = (0.7, long["decode"][131072]["ratio_to_1k"])
    for length, wanted in (("1024", 4), ("8192", 20)):
        rates = result.get("prefill", {}).get(length, {})
        if "transformers" in rates:
            least[f"prefill_vs_transformers_at_{length}"] = (wanted, rates[dtype] / rates["transformers"])
    if dtype == "bfloat16" and "agreement" in result:
        least["same_choice_as_float32"] = (0.99, result["agreement"]["same_choice"])
    out = {name: {"wanted": wanted, "measured": value, "met": value >= wanted} for name, (wanted, value) in least.items()}
    if long:
        worst = max(long["time_ratio_of_doubling"].values())
        out["prefill_time_ratio_of_doubling"] = {"wanted": 2.2, "measured": worst, "met": worst <= 2.2}
    return out


def commit():
    text = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return text or "unknown"


def say(text):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--longest", type=int, default=262144, help="tokens of the long prefill")
    parser.add_argument("--no-reference-8k", action="store_true", help="leave out transformers' prefill of 8K")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections to run")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="native types to run")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def measure(arguments, model, path, native):
    """The sections that were asked for."""
    tokenizer = Tokenizer.load(path)
    sources = sorted(Path(torch.__file__).parent.glob("*.py"))[:12]
    ids = tokenizer.encode("".join(file.read_text(encoding="utf-8") for file in sources))
    result, theirs = {"machine": machine()}, None
    if {"decode", "prefill"} & set(arguments.only):
        theirs = reference(path)
    if "decode" in arguments.only:
        say("decode at 1K")
        result["decode_tokens_per_second"] = decode_at_1k(model, theirs, native, ids)
    if "parts" in arguments.only:
        say("parts")
        result["parts"] = {name: parts_at_1k(run, ids) for name, run in native.items()}
    if "prefill" in arguments.only:
        say("prefill of 1K and 8K")
        few = {"transformers": 0 if arguments.no_reference_8k else 1, "modules": 1}
        result["prefill"] = {
            "1024": prefill(model, theirs, native, ids, 1024, {"transformers": 3, "modules": 3}),
            "8192": prefill(model, theirs, native, ids, 8192, few),
        }
    if "agreement" in arguments.only and len(native) == len(DTYPES):
        say("agreement")
        result["agreement"] = agreement(native, tokenizer)
    if "long" in arguments.only:
        result["long_context"] = {}
        for name, run in native.items():
            say(f"long context to {arguments.longest} in {name}")
            whole = Native(run.packed, name, arguments.threads, (arguments.longest + CHUNK) // BLOCK + 8, 2)
            result["long_context"][name] = long_context(whole, ids, arguments.longest)
    return result


def main() -> None:
    arguments = options()
    result = {"commit": commit(), "date": time.strftime("%Y-%m-%d")}
    torch.set_num_threads(arguments.threads)
    path = shipped_model()
    began = time.perf_counter()
    model = load_model(path).eval().requires_grad_(False)
    loaded = time.perf_counter() - began
    native = {name: Native(pack(model, name), name, arguments.threads, 17 * 5 + 48, 18) for name in arguments.dtypes}
    with torch.inference_mode():
        result |= measure(arguments, model, path, native)
    result |= {
        "device": f"{platform.processor() or platform.machine()}, {arguments.threads} threads, {features()}",
        "dtype": "float32, bfloat16: native, weights and rows of that type; transformers, modules, numpy: float32",
        "context": CONTEXT,
        "load_seconds": loaded,
        "active_weight_bytes": cpu_parts.active_bytes(model.config),
        "packed_weight_bytes": {name: run.packed.weight_bytes for name, run in native.items()},
        "bars": {name: bars(result, name) for name in native},
        "roofline": {name: roofline(result, model.config, name) for name in native},
    }
    result.pop("parts", None)
    for figures in result.get("long_context", {}).values():
        figures.pop("parts")
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
