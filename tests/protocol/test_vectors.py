"""The official and the published-algorithm vectors: text and ids, byte for byte."""

import hashlib
import json
from pathlib import Path

import pytest

from nautile.protocol import Tokenizer, encode, texts

VECTORS = Path(__file__).parent / "vectors"


def cases(name):
    return [json.loads(line) for line in (VECTORS / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("deepseek-v4")


def encode_case(case, tokenizer=None):
    return encode(
        case["messages"],
        tokenizer=tokenizer,
        thinking=case["thinking_mode"] == "thinking",
        effort=case.get("reasoning_effort"),
        dialect=case["profile"],
        drop_thinking=case["drop_thinking"],
        context=case.get("context"),
        add_bos=case["add_default_bos_token"],
    )


@pytest.mark.parametrize("case", cases("encoder_cases.jsonl"), ids=lambda case: str(case["id"]))
def test_prompt_equals_the_published_encoding(case, tokenizer):
    prompt = encode_case(case, tokenizer)
    assert prompt.text == case["prompt"]
    ids = prompt.ids
    if not any(special in _typed(case) for special in ("<｜", "think>", texts.DSML)):
        assert len(ids) == case["n_tokens"]
        assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == case["tokens_sha256"]


def _typed(case):
    return json.dumps([case["messages"], case.get("context")], ensure_ascii=False)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_official_vectors(number):
    data = json.loads((VECTORS / f"official/test_input_{number}.json").read_text(encoding="utf-8"))
    messages = data["messages"] if isinstance(data, dict) else data
    if isinstance(data, dict):
        messages = [{**messages[0], "tools": data["tools"]}, *messages[1:]]
    expected = (VECTORS / f"official/test_output_{number}.txt").read_text(encoding="utf-8")
    assert encode(messages, thinking=number != 4).text == expected


@pytest.mark.parametrize("case", cases("tokenizer_cases.jsonl"), ids=lambda case: repr(case["text"][:20]))
def test_plain_text_ids(case, tokenizer):
    ids = tokenizer.encode(case["text"])
    assert tokenizer.decode(ids) == case["text"]
    if any(tokenizer.is_special(token) for token in case["ids"]):  # the reference looked for specials in plain text
        assert not any(tokenizer.is_special(token) for token in ids)
    else:
        assert ids == case["ids"]
