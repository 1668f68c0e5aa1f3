"""The tokenizer file: what is read, what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautile.protocol import Tokenizer, TokenizerError, texts
from protocol.completions import SPECIALS, byte_tokenizer

TOKENIZER = byte_tokenizer()


@given(st.text(max_size=40) | st.lists(st.sampled_from([*SPECIALS, "<", "｜", "a"]), max_size=5).map("".join))
def test_plain_text_comes_back_and_is_never_special(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert not any(TOKENIZER.is_special(token) for token in ids)


def test_specials_by_name():
    token = TOKENIZER.special(texts.DSML)
    assert TOKENIZER.is_special(token) and TOKENIZER.decode([token]) == texts.DSML
    assert TOKENIZER.vocab_size == max(TOKENIZER.special(name) for name in SPECIALS) + 1
    with pytest.raises(TokenizerError, match="nothing"):
        TOKENIZER.special("nothing")


def test_specials_that_are_vocabulary_entries_are_not_reached_by_text(tmp_path):
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3}, "merges": []}
    data = {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": None, "decoder": None, "normalizer": None}
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**data, "added_tokens": [{"id": 2, "content": "ab", **flags}]}))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.encode("ab"), tokenizer.special("ab"), tokenizer.vocab_size) == ([0, 1], 2, 4)
    model["merges"] = [["a", "b"]]
    with pytest.raises(TokenizerError, match="byte-level BPE"):
        Tokenizer({**data, "added_tokens": [{"id": 2, "content": "ab", **flags}]})


def test_cut_characters():
    ids = TOKENIZER.encode("é😀")
    assert TOKENIZER.decode_bytes(ids) == "é😀".encode()
    assert TOKENIZER.decode(ids[:-1]).startswith("é\ufffd")
    with pytest.raises(ValueError, match="outside the vocabulary"):
        TOKENIZER.decode([TOKENIZER.vocab_size])


def test_files_that_are_not_tokenizers(tmp_path):
    with pytest.raises(TokenizerError, match="does not exist"):
        Tokenizer.load(tmp_path)
    for content in ("", "{", "[]", "{}", '{"model": {}}', '{"model": {"vocab": {}}}', '{"added_tokens": [1]}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
