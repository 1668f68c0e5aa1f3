"""The nano tokenizer: V4's specials and pre-tokenizer, exact round trips, the same tokens wherever a value stands."""

import json
import random
from pathlib import Path

import pytest

from nautile.config import ModelConfig
from nautile.protocol import Tokenizer
from nautile.train import procedural
from nautile.train.tasks import Pool
from nautile.train.tokenizer import PAD, SPECIALS, train, write

NANO = Path(__file__).parents[2] / "src" / "nautile" / "weights" / "nano"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(NANO)


def test_ids_and_size(tokenizer: Tokenizer) -> None:
    config = ModelConfig.preset("nano")
    assert tokenizer.vocab_size == config.vocab_size
    assert tokenizer.special(SPECIALS[0]) == config.bos_token_id
    assert tokenizer.special(SPECIALS[1]) == config.eos_token_id
    assert tokenizer.special("<｜▁pad▁｜>") == PAD
    assert [tokenizer.special(text) for text in SPECIALS] == list(range(len(SPECIALS)))


def test_round_trip(tokenizer: Tokenizer) -> None:
    texts = ["", " ", "\n\n  x\t", "naïve café 中文かな 🙂", "a\r\nb", "</think><｜User｜>", "0123456789", "\x00\x7f"]
    texts += [procedural.document(random.Random(seed)) for seed in range(20)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not any(tokenizer.is_special(token) for token in ids)


def test_digits_are_single(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("1234567890")) == 10


def test_a_value_has_the_same_tokens_wherever_it_stands(tokenizer: Tokenizer) -> None:
    pool = Pool(random.Random(0))
    for _ in range(300):
        word = pool.invented()
        alone = tokenizer.encode(word)
        for before in (' "', " `", "=", '"', "'", '">', "[", "{", "/", ":", "</", '("', "<"):
            assert tokenizer.encode(before + word)[-len(alone) :] == alone, (before, word)
        for before in (" ", "_", ".", "(", "-"):  # at most the first token differs, joined with what leads it
            ids = tokenizer.encode(before + word)
            assert ids[-len(alone) + 1 :] == alone[1:] or len(alone) == 1
            assert tokenizer.decode(ids[: len(ids) - len(alone) + 1]) == before + tokenizer.decode(alone[:1])


def test_transformers_loads_it(tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(NANO)
    assert (other.bos_token_id, other.eos_token_id, other.pad_token_id) == (0, 1, PAD)
    for text in ("def f(x): return 1", "How many lines of a.txt contain `x`?", " Ünï 12"):
        assert other.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert other.decode(tokenizer.encode(text)) == text
    assert other.encode("<｜User｜>hi", add_special_tokens=False)[0] == tokenizer.special("<｜User｜>")


def test_training_makes_exactly_the_size_asked_for(tmp_path: Path) -> None:
    texts = [procedural.document(random.Random(seed)) for seed in range(60)]
    data = train(texts, 700)
    write(data, tmp_path)
    small = Tokenizer.load(tmp_path)
    assert small.vocab_size == 700
    assert len(set(data["model"]["vocab"].values())) == 700
    assert all(small.decode(small.encode(text)) == text for text in texts)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == SPECIALS[1]
    with pytest.raises(ValueError, match="more text"):
        train(["ab"], 700)
