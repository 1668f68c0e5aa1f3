"""Copying exercises: what carries loss can be known from what stands above it."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from nautile.protocol import Tokenizer
from nautile.train import copying
from nautile.train.packing import copying_documents
from nautile.train.tasks import Pool
from nautile.train.traces import lexicon_of

NANO = Path(__file__).parents[2] / "src" / "nautile" / "weights" / "nano"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(NANO)


def test_copies_are_copies(tokenizer: Tokenizer) -> None:
    """Every copied passage, less the signs that end it, stands above it, as it is or as JSON writes it."""
    pool = Pool(random.Random(0), lexicon=replace(lexicon_of(tokenizer), share=0.7))
    checked = 0
    for _ in range(40):
        above = ""
        for passage in copying.document(pool):
            if passage.copied:
                checked += 1
                bare = passage.text.rstrip("\n").removeprefix(" ")  # a name in a command comes with the space before it
                ends = (
                    bare,
                    bare.removesuffix("."),
                    bare.removesuffix('"'),
                    bare.removesuffix('".'),
                    bare.removesuffix("</path>"),
                )
                assert any(end in above for end in ends) or known_as_json(passage.text, above), (passage, above[-400:])
            above += passage.text
    assert checked > 400


def known_as_json(text: str, above: str) -> bool:
    arguments = json.loads('{"pattern": "' + text)
    return all(value in above for value in arguments.values())


def test_documents_put_loss_on_copies_alone(tokenizer: Tokenizer) -> None:
    lexicon = lexicon_of(tokenizer)
    for document in itertools.islice(copying_documents(tokenizer, lexicon, "x", 4096), 30):
        assert len(document.ids) == len(document.loss) <= 4096
        assert 0.1 < sum(document.loss) / len(document.loss) < 0.8
    first = next(copying_documents(tokenizer, lexicon, "x", 1024))
    assert first == next(copying_documents(tokenizer, lexicon, "x", 1024))
    assert first != next(copying_documents(tokenizer, lexicon, "y", 1024))


def test_the_mask_follows_the_text(tokenizer: Tokenizer) -> None:
    """The bytes under loss are the bytes of the copied passages, up to tokens that straddle an edge."""
    lexicon = lexicon_of(tokenizer)
    document = next(copying_documents(tokenizer, lexicon, "z", 1 << 16))
    rng = random.Random("copying:z")
    pool = Pool(rng, lexicon=replace(lexicon, share=rng.uniform(0.3, 1.0)))
    passages = copying.document(pool, rng.choice((1000, 2000, 4000)))
    assert tokenizer.decode(document.ids[1:-1]) == "".join(passage.text for passage in passages)
    learnt = sum(len(tokenizer.decode_bytes([number])) for number, own in zip(document.ids, document.loss, strict=True) if own)
    wanted = sum(len(passage.text.encode()) for passage in passages if passage.copied)
    assert abs(learnt - wanted) < 0.06 * wanted
