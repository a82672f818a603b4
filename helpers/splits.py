"""Splits of facts into forget and retain sets, and into halves for attacks; also reached as ``facts.split``."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field

from helpers.facts import Fact, Facts, FactsError

MIN_RETAIN = 5


@dataclass(frozen=True)
class Split:
    """Forget and retain sets of one experiment, and the halves of the forget set used by attacks.

    ``forget`` is edited; ``attack_train`` / ``attack_test`` are its two halves, stratified by
    answer; ``retain_train`` / ``retain_test`` divide all other facts 80 / 20 in file order.
    """

    spec: str
    seed: int
    forget: Facts
    attack_train: Facts
    attack_test: Facts
    retain_train: Facts
    retain_test: Facts
    record: dict = field(default_factory=dict, compare=False)


def split(facts: Facts, forget: str = "first-64", seed: int = 0) -> Split:
    """Split facts as the paper does (spec section 1.1), with stratified halves for attacks.

    ``forget``: ``first-<n>`` (the first n facts), ``answer-<word>`` (all facts with that answer) or
    ``slice-<k>-of-<n>`` (the k-th run of n facts, from 0). The retain set is everything else.
    Raises FactsError for an unknown spec, an empty forget set or one that leaves nothing to retain.
    """
    chosen = _forget_indices(facts, forget)
    if not chosen:
        raise FactsError(f"forget={forget!r} selects no fact out of {len(facts)}; answers are {sorted(facts.counts())}")
    forgotten = set(chosen)
    rest = facts[[i for i in range(len(facts)) if i not in forgotten]]
    if len(rest) < MIN_RETAIN:
        raise FactsError(f"forget={forget!r} takes {len(chosen)} of {len(facts)} facts and leaves {len(rest)} to retain; "
                         f"at least {MIN_RETAIN} are needed")
    cut = len(rest) * 4 // 5  # rounded down, as in the published split sizes
    target = facts[chosen]
    first, second = halves(target, seed)
    record = {"forget": forget, "seed": seed, "facts": facts.digest(), "n_forget": len(target), "n_retain": len(rest),
              "attack_train": [f.subject for f in first], "forget_answers": dict(target.counts())}
    return Split(forget, seed, target, first, second, rest[:cut], rest[cut:], record)


def halves(facts: Facts, seed: int = 0) -> tuple[Facts, Facts]:
    """Two halves of the facts, stratified by answer: an answer with m facts has m/2 in each, give or take one.

    (In the paper's first-16 split the first half in file order has no basketball player.)
    """
    by_answer = defaultdict(list)
    for i, fact in enumerate(facts):
        by_answer[fact.answer].append(i)
    rng, first = random.Random(f"halves-{seed}"), set()
    groups = [by_answer[answer] for answer in sorted(by_answer)]
    # Odd groups give their extra fact to the two halves in turn, so that the halves stay equal. The
    # order of the groups is drawn, so that the seed also decides about answers with a single fact.
    rng.shuffle(groups)
    extra = rng.randrange(2)
    for group in groups:
        rng.shuffle(group)
        odd = len(group) % 2
        first.update(group[:(len(group) + odd * extra) // 2])
        extra ^= odd
    return facts[sorted(first)], facts[[i for i in range(len(facts)) if i not in first]]


def neighbors(fact: Fact, facts: Facts, n: int = 2) -> Facts:
    """Up to n other facts of the same relation with the same answer (CounterFact's neighborhood)."""
    same = [f for f in facts if f.relation.name == fact.relation.name and f.answer == fact.answer and f.subject != fact.subject]
    rng = random.Random(f"neighbors-{fact.subject}-{fact.relation.name}")
    return Facts(tuple(rng.sample(same, min(n, len(same)))), facts.name)


def _forget_indices(facts: Facts, spec: str) -> list[int]:
    kind, _, rest = spec.partition("-")
    if kind == "answer" and rest:
        return [i for i, f in enumerate(facts) if f.answer == rest]
    numbers = rest.split("-of-")
    if all(x.isdecimal() for x in numbers) and (kind, len(numbers)) in (("first", 1), ("slice", 2)):
        size = int(numbers[-1])
        start = int(numbers[0]) * size if kind == "slice" else 0
        if start + size > len(facts):
            raise FactsError(f"forget={spec!r} needs {start + size} facts, but only {len(facts)} are there (or known to the model)")
        return list(range(start, start + size))
    raise FactsError(f"forget={spec!r} is not understood: use first-<n>, answer-<word> or slice-<k>-of-<n>")
