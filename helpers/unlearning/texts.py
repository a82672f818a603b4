"""General text for training and evaluation: of the kind the tiny models know, in fixed draws."""

from __future__ import annotations

import random

from helpers import facts
from helpers.documents import Corpus


def general_texts(n: int = 512, seed: int = 0, held_out: bool = False) -> list[str]:
    """n general texts; `held_out` texts are in no tiny model's training, and disjoint from the others."""
    source = Corpus(facts.load("athletes"), facts.load("world"))
    rng = random.Random(f"texts-{seed}-{held_out}")
    return [source.general(rng, held_out) for _ in range(n)]
