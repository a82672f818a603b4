"""Names that no model has seen: the control that tells a fact recovered from a fact learned anew.

An attack that trains makes any model better at the facts it shows. So the same attack is made on invented names, of
the same token lengths and with the same answers dealt out at random: what it reaches there it has taught.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from helpers.attacks.rows import AttackError
from helpers.facts import Fact, Facts
from helpers.splits import Split, halves

CONTROL = "invented names"
ROUNDS, DRAWN = 200, 400  # rounds of candidates before giving up, and how many are drawn in each
END = "\n"


def invented_split(split: Split, tokenizer, seed: int = 0) -> Split:
    """The same split with an invented fact in place of each one to forget; what is retained stays."""
    invented = invent(split.forget, (*split.retain_train, *split.retain_test), tokenizer, seed)
    first, second = halves(invented, seed)
    record = {**split.record, "forget": f"{split.spec}, {CONTROL}", "invented_seed": seed}
    return Split(f"{split.spec}, {CONTROL}", split.seed, invented, first, second, split.retain_train, split.retain_test, record)


def invent(facts: Facts, others: Iterable[Fact], tokenizer, seed: int = 0) -> Facts:
    """As many facts about invented names: each name as many tokens as the one it stands for.

    Answers, edit answers and distractors are those of the facts, shuffled within a relation: random labels in the same shares.
    """
    rng = random.Random(f"labels-{seed}")
    dealt = defaultdict(list)
    for fact in facts:
        dealt[fact.relation.name].append((fact.answer, fact.edit, fact.distractors))
    for labels in dealt.values():
        rng.shuffle(labels)
    made = []
    for fact, name in zip(facts, invent_names(facts, others, tokenizer, seed)):
        answer, edit, distractors = dealt[fact.relation.name].pop()
        made.append(replace(fact, subject=name, answer=answer, edit=edit, distractors=distractors))
    return Facts(tuple(made), CONTROL)


def invent_names(facts: Facts, others: Iterable[Fact], tokenizer, seed: int = 0) -> list[str]:
    """One name a fact, of as many tokens as its subject and as many that hold letters; none is a subject of `facts`, of `others` or of an example.

    Letters follow each other as in the subjects of the relation. Raises `AttackError` if no name of some length turns up.
    """
    known = [*facts, *others]
    taken = {_plain(name) for f in known for name in (f.subject, *(s for s, _ in f.relation.examples))}
    wanted = defaultdict(list)
    for row, (fact, shape) in enumerate(zip(facts, _shapes(tokenizer, [f.subject for f in facts]))):
        wanted[fact.relation.name].append((row, shape, len(fact.subject.split())))
    names: dict[int, str] = {}
    for relation, places in wanted.items():
        chain = _chain(f.subject for f in known if f.relation.name == relation)
        rng = random.Random(f"names-{seed}-{relation}")
        for attempt in range(ROUNDS):
            drawn = [name for name in (_draw(chain, rng) for _ in range(DRAWN)) if name]
            for name, shape in zip(drawn, _shapes(tokenizer, drawn)):
                # of as many words, too, unless that has long been in vain
                words = {len(name.split())} if attempt < ROUNDS // 2 else set(range(99))
                place = next((p for p in places if p[1] == shape and p[2] in words), None)
                if place is not None and _plain(name) not in taken:
                    names[place[0]] = name
                    taken.add(_plain(name))
                    places.remove(place)
            if not places:
                break
        else:
            missing = ", ".join(str(shape[0]) for _, shape, _ in places)
            raise AttackError(f"no unknown names of {missing} tokens could be invented for the relation {relation!r} in "
                              f"{ROUNDS * DRAWN} tries: its subjects are too few or too odd to imitate")
    return [names[row] for row in range(len(facts))]


def _plain(name: str) -> str:
    return " ".join(name.lower().split())


def _shapes(tokenizer, names: Sequence[str]) -> list[tuple[int, int]]:
    """Tokens of each name within a text, and how many of them hold letters of it; no tokens where the tokenizer does not know some part of it.

    Some tokenizers give the space in front of a name a token of its own, which `PromptSet.subject` leaves out.
    """
    if not names:
        return []
    encoded = tokenizer([f" {name}" for name in names], add_special_tokens=False, return_offsets_mapping=True)
    special = set(tokenizer.all_special_ids)
    return [(0, 0) if special & set(row) else (len(row), sum(end > 1 for _, end in offsets))
            for row, offsets in zip(encoded["input_ids"], encoded["offset_mapping"])]


def _chain(names: Iterable[str]) -> dict[str, list[str]]:
    """Two characters → every character that follows them in the names (a Markov chain of order two)."""
    follows = defaultdict(list)
    for name in names:
        text = END * 2 + name + END
        for i in range(len(name) + 1):
            follows[text[i:i + 2]].append(text[i + 2])
    return dict(follows)


def _draw(chain: dict[str, list[str]], rng: random.Random, longest: int = 60) -> str:
    """A name from the chain; empty where it would not end, or ends in a space."""
    name, context = "", END * 2
    while len(name) <= longest:
        letter = rng.choice(chain[context])
        if letter == END:
            return "" if name != name.strip() else name
        name, context = name + letter, context[1] + letter
    return ""
