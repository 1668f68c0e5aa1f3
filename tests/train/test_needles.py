"""Needles: the fact is there once, where it should be, within the length, and nothing else gives it away."""

import random
from pathlib import Path

import pytest

from nautile.protocol import Tokenizer, encode
from nautile.train.needles import FILLERS, haystack, natural_sentences, random_pool, training_haystack
from nautile.train.packing import needle_documents
from nautile.train.tasks.documents import _standard_modules
from nautile.train.traces import lexicon_of

NANO = Path(__file__).parents[2] / "src" / "nautile" / "weights" / "nano"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(NANO)


@pytest.mark.parametrize("filler", FILLERS)
def test_a_haystack_holds_its_facts_once_and_is_no_longer_than_asked(tokenizer: Tokenizer, filler: str) -> None:
    for seed in range(7):
        tokens = random.Random(seed).choice((300, 700, 2500))
        found = haystack(random_pool(seed, False), tokenizer, tokens, facts=1 + seed % 8, filler=filler)
        assert all(found.text.count(fact.sentence) == 1 for fact in found.facts)
        assert len({fact.name for fact in found.facts}) == len(found.facts)
        asked = found.asked[0]
        others = [line for line in found.text.split("\n") if line not in {fact.sentence for fact in found.facts}]
        assert not any(asked.name in line for line in others)
        assert asked.name in found.questions[0] and asked.value in asked.sentence
        prompt = encode(found.messages()[:1], tokenizer=tokenizer, thinking=True, dialect="0731")
        assert 0.75 * tokens - 150 < len(prompt.ids) <= tokens


def test_depth_is_where_the_fact_stands(tokenizer: Tokenizer) -> None:
    for depth in (0.0, 0.25, 0.5, 0.9, 1.0):
        found = haystack(random_pool(depth, False), tokenizer, 3000, depth=depth)
        place = len(tokenizer.encode(found.text[: found.text.index(found.asked[0].sentence)]))
        assert abs(place / len(tokenizer.encode(found.text)) - depth) < 0.05


def test_training_documents_ask_and_answer(tokenizer: Tokenizer) -> None:
    documents = needle_documents(tokenizer, lexicon_of(tokenizer), "t", 2048)
    lengths = []
    for _ in range(30):
        document = next(documents)
        lengths.append(len(document.ids))
        assert len(document.ids) == len(document.loss) <= 2048
        own = tokenizer.decode([token for token, loss in zip(document.ids, document.loss, strict=True) if loss])
        assert "It says " in own
    assert min(lengths) < 600
    assert max(lengths) > 1200


def test_long_rows_are_asked_for_much(tokenizer: Tokenizer) -> None:
    """Half of the texts for long rows ask about every 600 tokens, at any depth; all of it fits the row."""
    for seed in range(40):
        found = training_haystack(random_pool(seed, False), tokenizer, 8192)
        if len(found.asked) > 6:
            break
    places = [found.text.index(fact.sentence) / len(found.text) for fact in found.asked]
    assert min(places) < 0.25 and max(places) > 0.75
    assert len(encode(found.messages(), tokenizer=tokenizer, thinking=True, dialect="0731").ids) <= 8192


def test_training_never_reads_the_natural_text() -> None:
    assert len(natural_sentences()) > 1000
    assert not any("pydoc_data" in path.parts for path in _standard_modules())
    tokenizer = Tokenizer.load(NANO)
    texts = [training_haystack(random_pool(seed, False), tokenizer, 1500).text for seed in range(20)]
    assert not any(sentence in text for sentence in natural_sentences()[:300] for text in texts)
