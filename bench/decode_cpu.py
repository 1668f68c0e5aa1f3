"""Speed of the shipped model on a CPU against transformers, one command: decode, batches, prefill, long contexts, agreement.

    python bench/decode_cpu.py --out bench/results/decode_cpu.json          # about seven minutes on two quiet cores
    python bench/decode_cpu.py --longest 16384 --no-reference-8k            # one minute

All paths run the same weights in one process and take turns; figures are medians over rounds, so noise hits them alike.
"native" is the C++ path in float32, "native_bfloat16" the one with bfloat16 weights and rows; transformers and the modules
run in float32, eager. The commit is read before anything else.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

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

CONTEXT, ROUNDS, CHUNK = 1024, 7, 4096
BLOCK = 256


class Native:
    """One native runner with a pool of its own."""

    def __init__(self, packed, dtype, threads, blocks, slots=1):
        self.packed, self.dtype, self.threads = packed, dtype, threads
        self.pages = Pages(packed.config, PoolOptions(blocks=blocks, slots=slots, rows=dtype))
        self.runner = NativeRunner(packed, self.pages, threads=threads)

    def open(self, tokens):
        return Sequence(blocks=self.pages.allocate(-(-tokens // BLOCK)), slot=self.pages.allocate_slot())

    def close(self, sequence):
        self.pages.drop(sequence.blocks)
        self.pages.drop_slot(sequence.slot)

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
    sequences = {name: run.open(CONTEXT + BLOCK) for name, run in native.items()}
    for name, run in native.items():
        run.feed(sequences[name], ids[:CONTEXT])
    batch = Native(native["native_bfloat16"].packed, "bfloat16", native["native_bfloat16"].threads, 16 * 5, 16)
    many = [batch.open(CONTEXT + BLOCK) for _ in range(16)]
    for number, sequence in enumerate(many):
        batch.feed(sequence, ids[number : number + CONTEXT])
    plan = Plan(tuple(Piece(sequence, (token,)) for sequence, token in zip(many, tokens, strict=False)))

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

    seconds = {name: [] for name in ("transformers", "modules", "numpy", *native, "batch_16")}
    for _ in range(ROUNDS):
        for name, path, count in (("transformers", transformers, 12), ("modules", modules, 12), ("numpy", numpy, 24)):
            seconds[name].append(timed(path) / count)
        for name, run in native.items():
            seconds[name].append(run.decode(sequences[name], tokens))
        seconds["batch_16"].append(timed(lambda: [batch.runner.step(plan) for _ in range(16)]) / 256)
    for name, run in native.items():
        run.close(sequences[name])
    return {name: 1 / statistics.median(values) for name, values in seconds.items()}


def prefill(model, theirs, native, ids, length, rounds):
    """Tokens a second of each path over ``length`` tokens; ``rounds`` by path (0 leaves it out)."""
    prompt = torch.tensor([ids[:length]])

    def run_native(name):
        sequence = native[name].open(length)
        seconds = timed(lambda: native[name].feed(sequence, ids[:length]))
        native[name].close(sequence)
        return seconds

    paths = {
        "transformers": lambda: timed(lambda: theirs(prompt, use_cache=True, logits_to_keep=1)),
        "modules": lambda: timed(lambda: model(prompt, state=model.new_state(1), logits="last")),
        **{name: (lambda name=name: run_native(name)) for name in native},
    }
    for name in native:
        run_native(name)  # the first pass allocates
    seconds = {name: [] for name in paths}
    for turn in range(max(rounds.values())):
        for name, path in paths.items():
            if turn < rounds.get(name, 0):
                seconds[name].append(path())
    return {name: length / statistics.median(values) for name, values in seconds.items() if values}


def long_context(packed, threads, ids, longest):
    """One prefill up to ``longest`` with the time at every doubling; decode at each of them beside decode at 1K."""
    run = Native(packed, "bfloat16", threads, longest // BLOCK + 8, 2)
    short, long = run.open(CONTEXT + 1), run.open(longest + 1)
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
    return {
        "prefill_seconds": points,
        "prefill_tokens_per_second": {length: length / seconds for length, seconds in points.items()},
        "time_ratio_of_doubling": {length: points[length] / points[length // 2] for length in at[1:]},
        "decode": decode,
    }


def agreement(native, tokenizer, traces=16):
    """How often bfloat16 and float32 choose the same token, along conversations of held-out tasks."""
    same = total = 0
    with TraceMaker(tokenizer) as maker:
        for number in range(traces):
            ids, best = maker.make(HELD_OUT_START + number).ids[:4096], {}
            for name, run in native.items():
                sequence = run.open(len(ids))
                best[name] = run.feed(sequence, ids, "all").argmax(-1)
                run.close(sequence)
            same += int((best["native"] == best["native_bfloat16"]).sum())
            total += len(ids)
    return {"tokens": total, "same_choice": same / total}


def active_bytes(model):
    """Bytes of weights that one decoded token reads with bfloat16 weights (mHC and router stay float32)."""
    config, total = model.config, 0
    for name, weight in model.state_dict().items():
        if name.startswith("mtp.") or name == "embed.weight":
            continue
        share = config.num_experts_per_tok / config.n_routed_experts if ".experts." in name and "shared" not in name else 1
        wide = "hc_" in name or "gate.weight" in name or weight.dim() == 1
        total += 0 if "tid2eid" in name else weight.numel() * share * (4 if wide else 2)
    return int(total + model.embed.weight.numel() * 2)  # the head


def bars(result):
    """Each bar of the CPU path: what is wanted, what was measured."""
    decode, long = result["decode_tokens_per_second"], result["long_context"]
    pairs = {
        "decode_vs_transformers_at_1k": (8, decode["native_bfloat16"] / decode["transformers"]),
        "batch_16_vs_batch_1": (5, decode["batch_16"] / decode["native_bfloat16"]),
        "same_choice_as_float32": (0.99, result["agreement"]["same_choice"]),
    }
    for length, wanted in ((1024, 4), (8192, 20)):
        rates = result["prefill"][str(length)]
        if "transformers" in rates:
            pairs[f"prefill_vs_transformers_at_{length}"] = (wanted, rates["native_bfloat16"] / rates["transformers"])
    if 131072 in long["decode"]:
        pairs["decode_at_128k_vs_1k"] = (0.7, long["decode"][131072]["ratio_to_1k"])
    out = {name: {"wanted": wanted, "measured": value, "met": value >= wanted} for name, (wanted, value) in pairs.items()}
    worst = max(long["time_ratio_of_doubling"].values())
    return {**out, "prefill_time_ratio_of_doubling": {"wanted": 2.2, "measured": worst, "met": worst <= 2.2}}


def commit():
    text = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return text or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--longest", type=int, default=262144, help="tokens of the long prefill")
    parser.add_argument("--no-reference-8k", action="store_true", help="leave out transformers' prefill of 8K")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = {"commit": commit(), "date": time.strftime("%Y-%m-%d")}
    torch.set_num_threads(arguments.threads)

    def say(text):
        print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)

    path = shipped_model()
    began = time.perf_counter()
    model = load_model(path).eval().requires_grad_(False)
    loaded = time.perf_counter() - began
    tokenizer = Tokenizer.load(path)
    sources = sorted(Path(torch.__file__).parent.glob("*.py"))[:12]
    ids = tokenizer.encode("".join(file.read_text(encoding="utf-8") for file in sources))
    native = {}
    for name, dtype in (("native", "float32"), ("native_bfloat16", "bfloat16")):
        native[name] = Native(pack(model, dtype), dtype, arguments.threads, 48)
    with torch.inference_mode():
        say("machine")
        result["machine"] = machine()
        theirs = reference(path)
        say("decode at 1K")
        result["decode_tokens_per_second"] = decode_at_1k(model, theirs, native, ids)
        say("prefill of 1K and 8K")
        rounds = {"transformers": 3, "modules": 3, "native": 5, "native_bfloat16": 5}
        result["prefill"] = {"1024": prefill(model, theirs, native, ids, 1024, rounds)}
        rounds = {"transformers": 0 if arguments.no_reference_8k else 1, "modules": 1, "native": 3, "native_bfloat16": 3}
        result["prefill"]["8192"] = prefill(model, theirs, native, ids, 8192, rounds)
        say("agreement")
        result["agreement"] = agreement(native, tokenizer)
        say(f"long context to {arguments.longest}")
        result["long_context"] = long_context(native["native_bfloat16"].packed, arguments.threads, ids, arguments.longest)
    result |= {
        "device": f"{platform.processor() or platform.machine()}, {arguments.threads} threads, {features()}",
        "dtype": "native: float32; native_bfloat16: bfloat16 weights and rows; transformers, modules, numpy: float32",
        "context": CONTEXT,
        "load_seconds": loaded,
        "active_bytes_bfloat16": active_bytes(model),
        "prefill_tokens_per_second": result["prefill"]["1024"]["native_bfloat16"],
    }
    result["bars"] = bars(result)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
