"""Facts and tokenizers of every kind, for tests of prompts."""

import random

import pytest
from facts_cases import athletes, world

from helpers.documents import Corpus
from helpers.facts import Facts
from helpers.vocabulary import build_tokenizer


@pytest.fixture(scope="module")
def with_bos(athletes, world):
    """The tiny models' kind: a name in several pieces, an answer whole, a BOS in front."""
    return build_tokenizer(sorted({f.subject for f in (*athletes, *world)}), Corpus(athletes, world).templates(), 300)


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(ids).strip()


def sample(data: Facts, n=40) -> Facts:
    return data[random.Random(0).sample(range(len(data)), n)]
