"""Splits: disjoint, stratified, repeatable, of the published sizes; forget sets that cannot be are refused."""

import csv
import os
import subprocess
import sys

import pytest
from facts_cases import CAPITALS, PUBLISHED, SPORTS, TEMPLATES, assert_sound, athletes, needs_published, own, world

from helpers import facts, splits
from helpers.facts import FactsError, load


@pytest.mark.parametrize("n", [1, 16, 64])
def test_first_n(athletes, n):
    split = facts.split(athletes, f"first-{n}")
    assert split.forget == athletes[:n]
    assert_sound(split, athletes)


def test_one_sport(athletes):
    split = facts.split(athletes, "answer-basketball")
    assert {f.answer for f in split.forget} == {"basketball"}
    assert {f.answer for f in (*split.retain_train, *split.retain_test)} == {"football", "baseball"}
    assert_sound(split, athletes)


def test_slices_tile_the_first_64(athletes):
    slices = [facts.split(athletes, f"slice-{k}-of-16") for k in range(4)]
    assert [f for s in slices for f in s.forget] == list(athletes[:64])
    for split in slices:
        assert_sound(split, athletes)


def test_world_split(world):
    split = facts.split(world, "first-64", seed=5)
    assert_sound(split, world)
    assert (split.attack_train, split.attack_test) == facts.halves(world[:64], 5)


@pytest.mark.parametrize("spec", ["first-16", "first-64", "answer-football", "slice-3-of-16"])
def test_halves_are_stratified_and_equal(athletes, world, spec):
    for data in (athletes,) if spec.startswith("answer") else (athletes, world):
        forget = facts.split(data, spec).forget
        for seed in range(60):
            one, two = facts.halves(forget, seed)
            assert abs(len(one) - len(two)) <= 1
            assert all(abs(one.counts()[a] - two.counts()[a]) <= 1 for a in forget.counts()), seed
            if data is athletes and spec == "first-16":  # the published first half has no basketball player
                assert set(one.counts()) == set(two.counts()) == SPORTS


def test_halves_keep_file_order_and_depend_on_the_seed(athletes):
    order = {f.key: i for i, f in enumerate(athletes)}
    seen = set()
    for seed in range(20):
        for half in facts.halves(athletes[:16], seed):
            places = [order[f.key] for f in half]
            assert places == sorted(places)
        seen.add(facts.halves(athletes[:16], seed)[0].items)
    assert len(seen) > 10


def test_the_seed_also_decides_about_facts_whose_answer_is_alone(world):
    """Most answers of the first world facts stand there once; a fixed rule would give every seed the same halves."""
    alone = [f for f in world[:64] if world[:64].counts()[f.answer] == 1]
    assert len(alone) > 10
    firsts = [set(facts.halves(world[:64], seed)[0].items) for seed in range(40)]
    for fact in alone:
        assert 5 < sum(fact in first for first in firsts) < 35, fact


def test_split_is_recorded_and_repeatable(athletes):
    split = facts.split(athletes, "first-16", seed=3)
    assert split == facts.split(load(), "first-16", seed=3)
    record = split.record
    assert (record["forget"], record["seed"], record["n_forget"], record["n_retain"]) == ("first-16", 3, 16, len(athletes) - 16)
    assert record["facts"] == athletes.digest()
    assert record["attack_train"] == [f.subject for f in split.attack_train]
    assert sum(record["forget_answers"].values()) == 16


def test_nothing_depends_on_the_hash_seed(tmp_path):
    (tmp_path / "mine.csv").write_text(CAPITALS)
    (tmp_path / "mine.yaml").write_text(TEMPLATES)
    code = (
        "import sys; from helpers import facts; data = facts.load(sys.argv[1])\n"
        "print(data.digest(), [f.subject for f in facts.split(data, 'first-9').attack_train],"
        " [f.subject for f in facts.neighbors(data[0], data, 1)])"
    )
    answers = {
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "mine.csv")], capture_output=True, text=True, check=True,
                       env=os.environ | {"PYTHONHASHSEED": seed}).stdout
        for seed in ("0", "1", "2")
    }
    assert len(answers) == 1


@needs_published
def test_split_sizes_are_the_published_ones(own):
    """Spec section 1.1: forget set → retain train / test, on the paper's own 1,559 athletes."""
    with open(PUBLISHED, newline="", encoding="utf-8") as file:
        rows = [f"{row['athlete']},sport,{row['sport']}" for row in csv.DictReader(file)]
    data = own("\n".join(["subject,relation,answer", *rows]), templates=None)
    sizes = {
        "first-16": (16, 1234, 309), "first-64": (64, 1196, 299), "answer-basketball": (490, 855, 214),
        "answer-baseball": (486, 858, 215), "answer-football": (583, 780, 196),
    }
    for spec, expected in sizes.items():
        split = facts.split(data, spec)
        assert (len(split.forget), len(split.retain_train), len(split.retain_test)) == expected, spec


@pytest.mark.parametrize("spec", ["", "16", "first", "first-", "first-x", "first--3", "first-16-of-2", "last-16", "slice-3", "slice-3-16", "answer-", "first-²"])
def test_unknown_forget_spec(athletes, spec):
    with pytest.raises(FactsError, match="use first-<n>, answer-<word> or slice-<k>-of-<n>"):
        facts.split(athletes, spec)


@pytest.mark.parametrize("spec, message", [
    ("first-100000", "needs 100000 facts, but only 960"),
    ("slice-60-of-16", "needs 976 facts, but only 960"),
    ("first-0", "selects no fact"),
    ("answer-cricket", "baseball.*basketball.*football"),
    ("first-957", "leaves 3 to retain"),
])
def test_forget_sets_that_cannot_be(athletes, spec, message):
    with pytest.raises(FactsError, match=message):
        facts.split(athletes[:960], spec)


def test_neighbors_share_relation_and_answer(world):
    for fact in world[:200]:
        near = facts.neighbors(fact, world, 3)
        assert len(near) == len({f.key for f in near}) == 3
        assert {(f.relation.name, f.answer) for f in near} == {(fact.relation.name, fact.answer)}
        assert fact.key not in {f.key for f in near}


def test_splits_are_reached_through_facts():
    assert facts.split is splits.split and facts.Split is splits.Split
    with pytest.raises(AttributeError, match="no attribute 'splitt'"):
        facts.splitt
