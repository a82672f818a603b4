"""Facts in the vocabulary of the tiny random families, and what the localization tests share.

A subject has one to four words of that vocabulary, the answers are single words, and the two relations
differ in length before and after the subject.
"""

from __future__ import annotations

import copy

import families
import torch

from helpers.facts import Fact, Facts, Relation
from helpers.models import Model
from helpers.prompts import build

FIRST = Relation("first", "{subject} w3 w4 w5 w6 w7", ("w8 {subject} w9", "w8 w9 w10 w11 {subject}"), "w12 {subject} w13", "w14")
SECOND = Relation("second", "w15 w16 w17 {subject} w18", ("{subject} w9",), "w19 {subject}", "w14")
ANSWERS = ("w50", "w51", "w52", "w53")


def facts(n: int = 12, lengths: tuple[int, ...] = (2, 3, 1, 4)) -> Facts:
    """n facts, alternately of the two relations; the k-th two of them have subjects of lengths[k % 4] words."""
    made = []
    for i in range(n):
        words = [f"w{22 + (7 * i + 3 * k) % 27}" for k in range(lengths[i // 2 % len(lengths)])]
        answer, *wrong = (ANSWERS[(i // 2 + i // 8 + k) % 4] for k in range(4))
        made.append(Fact(" ".join(words), SECOND if i % 2 else FIRST, answer, wrong[0], tuple(wrong)))
    return Facts(tuple(made), "words")


def model(family: str, dtype: torch.dtype = torch.float32, **changes) -> Model:
    """A tiny random model of a family."""
    hf = families.build(family, **changes).to(dtype)
    return Model.of(hf, families.tokenizer(), family)


def prompts(n: int = 6, side: str = "right", format: str = "cloze"):
    return build(families.tokenizer(), facts(n), format, side)


def untouched(family: str):
    """A copy of the transformers model of `model(family)`, for references that share nothing with the helpers."""
    return copy.deepcopy(families.build(family))
