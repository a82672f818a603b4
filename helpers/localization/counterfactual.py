"""Pairs of prompts for patching: the same question about another subject, token for token as long.

A corrupted prompt differs from its clean prompt in the subject only, which is another known subject of
the same relation with another answer ("resampling", arXiv 2309.16042; the paper uses random tokens or
invented names, spec sections 3 and 3.2, which take the model off the data it knows). Both prompts have
the same length and the same subject span, so that every activation of one has its place in the other.
"""

from __future__ import annotations

import inspect
import random
from collections import defaultdict
from dataclasses import dataclass, replace

import torch

from helpers.facts import Fact, Facts
from helpers.models import Model
from helpers.prompts import FORMATS, Prompt, PromptError, PromptSet, tokenize

TRIES = 30  # partners tried for a fact before it is dropped


@dataclass(frozen=True)
class Pairs:
    """Clean and corrupted prompts, aligned row by row, padded on the left.

    Row by row `clean` and `corrupted` have equal masks, lengths and subject spans. `corrupted.facts`
    are the partners' facts, so `corrupted.answer_ids` are the counterfactual answers; they are also
    `clean.edit_ids`, and `corrupted.edit_ids` are the true ones. `dropped` are facts without a partner.
    """

    clean: PromptSet
    corrupted: PromptSet
    dropped: tuple[Fact, ...] = ()

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, rows) -> Pairs:
        """A subset by slice, list or tensor of row numbers."""
        return replace(self, clean=self.clean[rows], corrupted=self.corrupted[rows])

    @property
    def answers(self) -> torch.Tensor:
        """(n, 2) first tokens of the true and of the counterfactual answer."""
        return self.clean.option_ids[:, :2]


def pairs(
    model: Model,
    facts: Facts,
    format: str = "one_shot",
    partners: Facts | None = None,
    seed: int = 0,
    minimum: int = 4,
    **options,
) -> Pairs:
    """A corrupted prompt for every fact that has a partner, in any format of `helpers.prompts`.

    A partner is drawn (seeded, independently for each fact) from `partners`, by default the facts
    themselves: same relation, another answer, and a subject that takes equally many tokens in this very
    place and leaves the tokens around it as they are. The counterfactual answer is the partner's; it
    takes the place of the fact's edit answer, so an MCQ offers it. Facts without a partner are dropped.

    `options` go to the format (`order=3`, `which=1` …). Raises `PromptError` if fewer than `minimum`
    facts remain, and for `dashed`, whose answers cannot be told apart by their first token.
    """
    if format not in FORMATS:
        raise PromptError(f"unknown format {format!r}; formats are {', '.join(FORMATS)}")
    if format == "dashed":
        raise PromptError("format 'dashed' is scored on whole answers, patching on first tokens: choose another")
    accepted = inspect.signature(FORMATS[format])
    if "pool" in accepted.parameters:
        options = {"pool": facts} | options
    try:
        accepted.bind(facts, **options)
    except TypeError as error:
        raise PromptError(f"format {format!r}: {error}") from None
    clean, corrupted, dropped = [], [], []
    candidates = _Candidates(model.tokenizer, format, partners or facts, options)
    for fact in facts:
        # one fact has several prompts in the format `neighborhood`
        for number, prompt in enumerate(FORMATS[format](Facts((fact,)), **options)):
            found = candidates.partner(fact, prompt, number, seed)
            if found is None:
                dropped.append(fact)
            else:
                clean.append(found[0])
                corrupted.append(found[1])
    if len(clean) < max(minimum, 1):
        raise PromptError(
            f"{len(clean)} of {len(clean) + len(dropped)} prompts have a partner (same relation, another answer, a "
            f"subject of equal token length) in format {format!r}; {max(minimum, 1)} are needed: give more `partners`"
        )
    sets = (tokenize(model.tokenizer, prompts, format, side="left") for prompts in (clean, corrupted))
    return Pairs(*sets, dropped=tuple(dropped))


class _Candidates:
    """Finds partners; remembers how many tokens each subject takes in a relation's prompt."""

    def __init__(self, tokenizer, format: str, facts: Facts, options: dict):
        self.tokenizer, self.format, self.options = tokenizer, format, options
        self.by_relation: dict[str, list[Fact]] = defaultdict(list)
        for fact in facts:
            self.by_relation[fact.relation.name].append(fact)
        self.lengths: dict[str, dict[str, int]] = {}

    def partner(self, fact: Fact, prompt: Prompt, number: int, seed: int) -> tuple[Prompt, Prompt] | None:
        """The clean prompt, with the partner's answer as the alternative, and the corrupted one."""
        name = fact.relation.name
        if name not in self.lengths:
            self.lengths[name] = self._lengths(prompt, [f.subject for f in self.by_relation[name]])
        lengths = self.lengths[name]
        wanted = lengths.get(prompt.subject) or self._lengths(prompt, [prompt.subject])[prompt.subject]
        fitting = [f for f in self.by_relation[name] if f.answer != fact.answer and lengths[f.subject] == wanted]
        random.Random(f"partner-{seed}-{fact.subject}-{name}-{number}").shuffle(fitting)
        for other in fitting[:TRIES]:
            clean = self._clean(fact, other, number)
            corrupted = _about(clean, other)
            if other.subject not in clean.text and self._aligned(clean, corrupted):
                return clean, corrupted
        return None

    def _clean(self, fact: Fact, other: Fact, number: int) -> Prompt:
        """The fact's prompt in this format, with the other's answer in place of the edit answer."""
        wrong = (other.answer, *(d for d in fact.distractors if d != other.answer))
        told = replace(fact, edit=other.answer, distractors=wrong[: max(1, len(fact.distractors))])
        return replace(FORMATS[self.format](Facts((told,)), **self.options)[number], fact=told)

    def _aligned(self, clean: Prompt, corrupted: Prompt) -> bool:
        """Whether the prompts' tokens differ in the subject only; false also where answers share a token."""
        try:
            both = tokenize(self.tokenizer, [clean, corrupted], self.format)
        except PromptError:
            return False
        start, stop = both.subject[0].tolist()
        same = both.tokens[0] == both.tokens[1]
        same[start:stop] = True
        return bool(both.mask.all() and (both.subject[0] == both.subject[1]).all() and same.all())

    def _lengths(self, prompt: Prompt, subjects: list[str]) -> dict[str, int]:
        """How many tokens each subject takes in the place of this prompt's subject."""
        end = prompt.start + len(prompt.subject)
        texts = [prompt.text[: prompt.start] + subject + prompt.text[end:] for subject in subjects]
        offsets = self.tokenizer(texts, return_offsets_mapping=True)["offset_mapping"]
        stops = [prompt.start + len(subject) for subject in subjects]
        return {
            subject: sum(a < stop and b > max(a, prompt.start) for a, b in row)
            for subject, stop, row in zip(subjects, stops, offsets)
        }


def _about(prompt: Prompt, other: Fact) -> Prompt:
    """The prompt with the other's subject; its true answer is the other's, its alternative the prompt's."""
    text = prompt.text[: prompt.start] + other.subject + prompt.text[prompt.start + len(prompt.subject) :]
    true, alternative, *more = prompt.options
    return replace(prompt, fact=other, text=text, subject=other.subject, options=(alternative, true, *more))
