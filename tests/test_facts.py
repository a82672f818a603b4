"""Facts: what the bundled files claim, and how a set of facts behaves as a sequence."""

import csv
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from facts_cases import CAPITALS, PUBLISHED, SPORTS, TEMPLATES, athletes, needs_published, own, world

from helpers.facts import load, row_numbers

# The bundled files --------------------------------------------------------------------------------


def test_athletes_are_many_and_balanced(athletes):
    assert len(athletes) >= 900
    counts = athletes.counts()
    assert set(counts) == SPORTS
    assert all(0.3 < n / len(athletes) < 0.37 for n in counts.values()), counts
    assert len({f.subject for f in athletes}) == len(athletes)


def test_athletes_have_fixed_edit_answers(athletes):
    golf = load(edit="edit_answer_golf")
    assert [f.key for f in golf] == [f.key for f in athletes]
    for plain, wider in zip(athletes, golf):
        assert plain.edit in SPORTS - {plain.answer}
        assert wider.edit in (SPORTS | {"golf"}) - {wider.answer}
        assert set(plain.distractors) == set(wider.distractors) == (SPORTS | {"golf"}) - {plain.answer}
    # both columns use every choice they have, about evenly, whatever the true sport
    for sport in SPORTS:
        for data, choices in ((athletes, 2), (golf, 3)):
            edits = Counter(f.edit for f in data if f.answer == sport)
            assert len(edits) == choices
            assert min(edits.values()) > 0.6 * sum(edits.values()) / choices, (sport, edits)


def test_golfers_are_examples_and_no_facts(athletes):
    examples = dict(athletes[0].relation.examples)
    assert athletes[0].relation.examples[0] == ("Tiger Woods", "golf")
    assert set(examples.values()) == {"golf"}
    assert len(examples) >= 5
    assert not set(examples) & {f.subject for f in athletes}


@needs_published
def test_sports_agree_with_the_published_list(athletes):
    with open(PUBLISHED, newline="", encoding="utf-8") as file:
        published = {row["athlete"]: row["sport"] for row in csv.DictReader(file)}
    shared = [f for f in athletes if f.subject in published]
    assert len(shared) > 100
    assert [f.subject for f in shared if published[f.subject] != f.answer] == []


def test_world_facts_are_many_to_one(world):
    assert len(world) >= 800
    by_relation = defaultdict(Counter)
    for fact in world:
        by_relation[fact.relation.name][fact.answer] += 1
    assert len(by_relation) >= 16
    for relation, counts in by_relation.items():
        assert 4 <= len(counts) <= 40, relation  # four for MCQ
        assert min(counts.values()) >= 4, (relation, counts)
    assert len({f.key for f in world}) == len(world)


def test_world_facts_have_false_answers_of_the_same_type(world):
    for fact in world:
        assert fact.distractors[0] == fact.edit
        assert len({fact.answer, *fact.distractors}) == 4, fact
        assert set(fact.distractors) <= set(world.answers(fact.relation.name)), fact


def test_no_subject_gives_its_answer_away(athletes, world):
    for fact in (*athletes, *world):
        assert fact.answer.lower() not in fact.subject.lower(), fact.key
        assert fact.edit.lower() not in fact.subject.lower(), fact.key


def test_relations_can_be_asked_in_every_way(athletes, world):
    for relation in {f.relation for f in (*athletes, *world)}:
        assert len(relation.paraphrases) >= 2
        assert relation.question.endswith("?")
        assert len({relation.cloze, *relation.paraphrases}) == 1 + len(relation.paraphrases)


def test_examples_are_true_and_are_no_facts(world):
    subjects = {f.key for f in world}
    for fact in world:
        for subject, answer in fact.relation.examples:
            assert (subject, fact.relation.name) not in subjects
            assert answer in world.answers(fact.relation.name)


@pytest.mark.parametrize("name", ["athletes", "world"])
def test_answers_are_spread_over_the_file(name):
    """Facts are taken from the start of the file: it must be shuffled, or first-64 would be one relation."""
    data = load(name)
    head = Counter(f.answer if name == "athletes" else f.relation.name for f in data[:64])
    kinds = Counter(f.answer if name == "athletes" else f.relation.name for f in data)
    assert max(head.values()) < 64 * (0.5 if name == "athletes" else 0.2)
    assert len(head) > 0.7 * len(kinds)


# Facts as a sequence ------------------------------------------------------------------------------


def test_indexing(athletes):
    assert athletes[5:8].items == athletes.items[5:8]
    assert athletes[[7, 3]].items == (athletes.items[7], athletes.items[3])
    assert athletes[torch.tensor([7, 3])] == athletes[np.array([7, 3])] == athletes[[7, 3]]
    assert athletes[2] is athletes.items[2]
    assert athletes[-1] is athletes.items[-1]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_mask_selects_and_is_not_read_as_row_numbers(athletes, kind):
    three = athletes[:3]
    assert three[kind([True, False, True])].items == (three[0], three[2])
    assert len(three[kind([False, False, False])]) == 0
    with pytest.raises(IndexError, match="mask of 2 rows"):
        three[kind([True, False])]


def test_row_numbers():
    assert row_numbers(slice(None, None, 2), 5) == [0, 2, 4]
    assert row_numbers([], 5) == []
    assert row_numbers([-1, 0], 5) == [-1, 0]


def test_digest_follows_the_content(athletes, own):
    assert athletes.digest() == load().digest()
    assert athletes.digest() != load(edit="edit_answer_golf").digest()
    assert athletes[:4].digest() != athletes[[1, 0, 2, 3]].digest()
    first = own(CAPITALS).digest()
    assert first == own("\ufeff" + CAPITALS.replace("\n", "\r\n")).digest()  # as a spreadsheet saves it
    assert first != own(CAPITALS, TEMPLATES.replace("a city", "a town")).digest()
