"""Train the nano tokenizer: byte-level BPE of 8,192 with V4's pre-tokenizer (digits one by one) and its special tokens.

A small model lives by copying, and copying is easy when a string has the same tokens wherever it stands. Plain BPE breaks
that: ``hello`` after a space, after ``=`` and alone may be cut differently. So merges are learnt in two steps. First on words
without what leads them (a space, a dot, an underscore); then, of lowest priority, merges of a lead and a word's first token,
by frequency. " hello" and "hello" then differ in their first token only, by a fixed map; and after ``=``, quotes and
brackets, which never merge with letters, a value has exactly the tokens it has alone.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nautile.train.corpus import collect, documents, scan
from nautile.train.procedural import document
from nautile.train.traces import Conversations

__all__ = ["PAD", "SPECIALS", "texts", "train", "train_to_file", "write"]

# Ids 0, 1, 2 as in V4; the others keep V4's order without its placeholders. The flag is tokenizers' "special" (skipped on
# decoding), which V4 sets for the first three only.
SPECIALS = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>",
    "<｜User｜>", "<｜Assistant｜>", "<|EOT|>", "<think>", "</think>", "｜DSML｜", "<｜begin▁sys｜>", "<｜end▁sys｜>",
    "<｜latest_reminder｜>", "<｜action｜>", "<｜query｜>", "<｜authority｜>", "<｜domain｜>", "<｜title｜>",
    "<｜extracted_url｜>", "<｜read_url｜>",
)  # fmt: skip
PAD = 2
_SKIPPED_ON_DECODE = 3

_DIGIT = r"\p{N}"
_CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
_WORDS = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
_LEAD = r"\A[^\p{L}\p{M}](?=[\p{L}\p{M}])"  # what stands before the letters of a pre-token
_LEADS = " _.-("  # leads that may merge with letters


def _pre_tokenizer(split_leads: bool) -> Any:
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (_DIGIT, _CJK, _WORDS)]
    if split_leads:
        steps.append(pre_tokenizers.Split(Regex(_LEAD), "isolated"))
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _counted(texts: Iterable[str], counts: Counter[str]) -> Iterator[str]:
    """Pass texts on, counting their pre-tokens (byte-level characters, leads included)."""
    pre_tokenizer = _pre_tokenizer(split_leads=False)
    for text in texts:
        counts.update(piece for piece, _ in pre_tokenizer.pre_tokenize_str(text))
        yield text


def train(source: Iterable[str], vocab_size: int = 8192, lead_share: float = 0.33) -> dict[str, Any]:
    """The content of a ``tokenizer.json`` with exactly ``vocab_size`` entries, ``lead_share`` of them for leads and words.

    Raises ValueError when the texts are too few for so many entries.
    """
    lead_count = int((vocab_size - len(SPECIALS) - 256) * lead_share)
    counts: Counter[str] = Counter()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer(split_leads=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - lead_count,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_counted(source, counts), trainer)
    data: dict[str, Any] = json.loads(tokenizer.to_str())
    vocabulary, merges = data["model"]["vocab"], [list(merge) for merge in data["model"]["merges"]]
    for lead, first in _lead_merges(tokenizer, counts, lead_count):
        vocabulary[lead + first] = len(vocabulary)
        merges.append([lead, first])
    if len(vocabulary) != vocab_size:
        raise ValueError(f"only {len(vocabulary)} of {vocab_size} tokens could be learnt; give more text")
    return _document(vocabulary, merges)


def _lead_merges(tokenizer: Tokenizer, counts: Counter[str], number: int) -> list[tuple[str, str]]:
    """The most frequent pairs of a lead and the first token of the letters behind it."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    leads = {byte_level.pre_tokenize_str(lead)[0][0] for lead in _LEADS}
    pairs: Counter[tuple[str, str]] = Counter()
    model = tokenizer.model
    for piece, count in counts.items():
        if len(piece) > 1 and piece[0] in leads and piece[1].isalpha() and piece[1] not in leads:
            pairs[piece[0], model.tokenize(piece[1:])[0].value] += count
    new = ((pair, count) for pair, count in pairs.items() if tokenizer.token_to_id("".join(pair)) is None)
    return [pair for pair, _ in sorted(new, key=lambda item: (-item[1], item[0]))[:number]]


def _document(vocabulary: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer(split_leads=False)
    tokenizer.decoder = decoders.ByteLevel()
    data: dict[str, Any] = json.loads(tokenizer.to_str())
    data["model"]["vocab"], data["model"]["merges"] = vocabulary, merges
    data["added_tokens"] = [
        {
            "id": number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": number < _SKIPPED_ON_DECODE,
        }
        for number, text in enumerate(SPECIALS)
    ]
    return data


def write(data: dict[str, Any], directory: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, which transformers' AutoTokenizer reads too."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[0],
        "eos_token": SPECIALS[1],
        "pad_token": SPECIALS[PAD],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1048576,
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (("tokenizer.json", data), ("tokenizer_config.json", config)):
        temporary = directory / f"{name}.tmp"
        temporary.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
        temporary.replace(directory / name)


def texts(characters: int, seed: int = 0) -> Iterator[str]:
    """About so many characters of the mix the model will see: 50 % code and documents, 30 % traces, 20 % procedural text."""
    sources = collect()
    natural = documents(sources, scan(sources), seed)
    written = natural_characters = 0
    with Conversations() as conversations:
        number = 0
        while written < characters:
            number += 1
            if natural_characters < written / 2:
                text = next(natural)
                natural_characters += len(text)
            elif number % 5 < 3:
                text = "\n".join(_spoken(conversations.make(f"{seed}:{number}").messages))
            else:
                text = document(random.Random(f"tokenizer:{seed}:{number}"))
            written += len(text)
            yield text


def _spoken(messages: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The texts of a conversation as they stand between special tokens."""
    for message in messages:
        yield message.get("reasoning_content") or ""
        yield message["content"]
        for call in message.get("tool_calls", ()):
            function = call["function"]
            yield f'invoke name="{function["name"]}">'
            for key, value in json.loads(function["arguments"]).items():
                yield f'parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">{value}</'


def train_to_file(directory: Path, megabytes: int = 24, seed: int = 0, vocab_size: int = 8192) -> dict[str, Any]:
    """Train on the mix the model will see and write it to ``directory``: traces, procedural text, code and documents."""
    data = train(texts(megabytes * 1_000_000, seed), vocab_size)
    write(data, directory)
    return data
