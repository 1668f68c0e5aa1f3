"""The model in the package: transformers reads it with its Auto classes and computes the same logits; it loads fast."""

import time
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nautile import Tokenizer, load_model

NANO = Path(str(files("nautile") / "weights" / "nano"))


def test_transformers_loads_it_and_agrees():
    text = "def dedent(text):\n    return text.strip()\n\nHow many lines of status contain ok? " * 4
    theirs_tokenizer, tokenizer = AutoTokenizer.from_pretrained(NANO), Tokenizer.load(NANO)
    ids = tokenizer.encode(text)
    assert theirs_tokenizer.encode(text, add_special_tokens=False) == ids
    assert theirs_tokenizer.bos_token_id == 0 and theirs_tokenizer.eos_token_id == 1
    theirs = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.bfloat16, attn_implementation="eager").float().eval()
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids]), use_cache=False).logits
        logits = load_model(NANO)(torch.tensor([ids]))
    assert (logits - expected).abs().max() <= 5e-5 * expected.abs().max()


def test_it_loads_in_three_seconds():
    taken = []
    for _ in range(3):  # the first also imports; what others do on the machine does not count
        began = time.process_time()
        load_model(NANO)
        taken.append(time.process_time() - began)
    assert min(taken) < 3.0
    assert sum(file.stat().st_size for file in NANO.iterdir()) <= 32e6
