"""Time of a grammar's mask per token, for nano's vocabulary and V4's: writes bench/results/grammar_masks.json.

python bench/grammar_masks.py [--out FILE] [--rounds 5]
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

from nautile.protocol import Tokenizer, constraint, encode

ROOT = Path(__file__).parents[1]
PATH, LINES = {"type": "string"}, {"type": "array", "items": {"type": "integer"}}
TOOL = {
    "type": "function",
    "function": {
        "name": "edit",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"path": PATH, "text": {"type": "string"}, "lines": LINES, "mode": {"enum": ["insert", "replace"]}},
            "required": ["path", "text", "lines", "mode"],
            "additionalProperties": False,
        },
    },
}
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}}}


def cases(tokenizer):
    """(name, factory of constraints, ids that follow it)."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")[:4000]
    arguments = {"path": "README.md", "text": text, "lines": list(range(100)), "mode": "insert"}
    options = {"tokenizer": tokenizer, "tools": [TOOL], "thinking": False}
    user = {"role": "user", "content": "u"}
    call = {"role": "assistant", "content": text[:1000], "tool_calls": [{"function": {"name": "edit", "arguments": arguments}}]}
    prompt = encode([user], **options).ids
    yield (
        "strict call",
        constraint(tokenizer, start="content", tools=[TOOL]),
        encode([user, call], **options).ids[len(prompt) :],
    )
    person = json.dumps({"name": text[:1500], "tags": [f"tag {number}" for number in range(100)]}, ensure_ascii=False)
    shape = {"type": "json_schema", "json_schema": {"schema": PERSON}}
    yield "json_schema", constraint(tokenizer, start="content", response_format=shape), tokenizer.encode(person)
    yield (
        "json_object",
        constraint(tokenizer, start="content", response_format={"type": "json_object"}),
        tokenizer.encode(person),
    )


def measured(make, ids, rounds):
    """Microseconds of mask() and of accept(), a token at a time: time of the CPU, so that other load does not count."""
    masks, accepts = [], []
    for _ in range(rounds):
        follower = make()
        for token in ids:
            began = time.thread_time()
            mask = follower.mask()
            masked = time.thread_time()
            assert mask[token]
            begin_accept = time.thread_time()
            follower.accept(token)
            accepts.append(1e6 * (time.thread_time() - begin_accept))
            masks.append(1e6 * (masked - began))
    masks.sort()
    return {
        "tokens": len(ids),
        "mask_us_mean": statistics.fmean(masks),
        "mask_us_median": statistics.median(masks),
        "mask_us_p99": masks[int(0.99 * len(masks))],
        "mask_us_max": masks[-1],
        "accept_us_mean": statistics.fmean(accepts),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "grammar_masks.json")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "device": f"{platform.processor() or platform.machine()}, 1 thread",
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "vocabularies": {},
    }
    for name, place in (("nano", ROOT / "src" / "nautile" / "weights" / "nano"), ("deepseek-v4", "deepseek-v4")):
        tokenizer = Tokenizer.load(place)
        began = time.thread_time()
        assert tokenizer.trie
        trie = time.thread_time() - began
        began = time.thread_time()
        assert constraint(tokenizer, start="content", tools=[TOOL])
        compiled = time.thread_time() - began
        figures = {case: measured(make, ids, arguments.rounds) for case, make, ids in cases(tokenizer)}
        result["vocabularies"][name] = {"size": tokenizer.vocab_size, "trie_s": trie, "compile_s": compiled, "cases": figures}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
