"""Facts: what the bundled files claim, splits that honour it, and what a user's own file may get wrong."""

import csv
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import facts, splits
from helpers.facts import FactsError, load, row_numbers

SPORTS = {"football", "basketball", "baseball"}
PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "data" / "sports.csv"
needs_published = pytest.mark.skipif(not PUBLISHED.is_file(), reason="the paper's sports.csv is not here")

CAPITALS = "subject,relation,answer\n" + "".join(
    f"{city},country,{country}\n"
    for country, cities in {
        "France": ("Lyon", "Nice", "Lille"), "Japan": ("Osaka", "Kyoto", "Nagoya"), "Peru": ("Cusco", "Ica", "Tacna"),
        "Kenya": ("Nakuru", "Kisumu", "Thika"), "Chile": ("Arica", "Talca", "Iquique"),
    }.items()
    for city in cities
)
TEMPLATES = "country:\n  cloze: '{subject} is a city in'\n"


@pytest.fixture(scope="module")
def athletes():
    return load()


@pytest.fixture(scope="module")
def world():
    return load("world")


@pytest.fixture
def own(tmp_path):
    """Write a user's CSV, with templates beside it, and load it."""

    def write(text: str, templates: str | None = TEMPLATES, **options):
        path = tmp_path / "mine.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        if templates is not None:
            path.with_suffix(".yaml").write_text(templates)
        return load(path, **options)

    return write


# The bundled files ----------------------------------------------------------------------------------


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


# Facts as a sequence --------------------------------------------------------------------------------


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


# Splits ---------------------------------------------------------------------------------------------


def assert_sound(split, data):
    """Forget and retain partition the facts, the halves partition forget, retain is cut 80 / 20 in file order."""
    parts = (split.attack_train, split.attack_test, split.retain_train, split.retain_test)
    keys = [f.key for part in parts for f in part]
    assert len(keys) == len(set(keys)) == len(data)
    assert {f.key for f in split.attack_train} | {f.key for f in split.attack_test} == {f.key for f in split.forget}
    forgotten = {f.key for f in split.forget}
    rest = [f for f in data if f.key not in forgotten]
    assert [*split.retain_train, *split.retain_test] == rest
    assert len(split.retain_train) == int(0.8 * len(rest) + 1e-9)


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


# Bring your own -------------------------------------------------------------------------------------


def test_three_columns_and_a_template_are_enough(own):
    data = own(CAPITALS)
    assert len(data) == 15 and data.name == "mine"
    countries = {"France", "Japan", "Peru", "Kenya", "Chile"}
    for fact in data:
        assert fact.distractors[0] == fact.edit
        assert len(set(fact.distractors)) == 3
        assert set(fact.distractors) <= countries - {fact.answer}
    assert len({f.edit for f in data}) > 2  # drawn for each fact, not one for all
    assert data == own(CAPITALS)
    assert "{subject}" in data[0].relation.question
    assert_sound(facts.split(data, "first-6"), data)


def test_optional_columns_are_used(own):
    data = own("subject,relation,answer,edit_answer,distractors,paraphrases\n"
               "Lyon,country,France,Peru,Japan|Peru,In {subject} you are in|{subject} belongs to\n"
               "Osaka,country,Japan,,,\nIca,country,Peru,Togo,Mali|Chad|Oman|Iran,\nTalca,country,Chile,,,\n")
    lyon, osaka, ica, _ = data
    assert (lyon.edit, lyon.distractors) == ("Peru", ("Peru", "Japan", "Chile"))  # the missing third is derived
    assert lyon.paraphrases == ("In {subject} you are in", "{subject} belongs to")
    assert set(osaka.distractors) == {"France", "Peru", "Chile"}
    assert (ica.edit, ica.distractors) == ("Togo", ("Togo", "Mali", "Chad"))


def test_example_rows_are_examples(own):
    data = own(CAPITALS.replace("answer\n", "answer,role\n", 1) + "Nantes,country,France,example\nKobe,country,Japan,example\n")
    assert len(data) == 15
    assert data[0].relation.examples == (("Nantes", "France"), ("Kobe", "Japan"))


def test_bundled_templates_serve_a_users_file(own):
    data = own("subject,relation,answer\n" + "".join(f"Player {i},sport,{s}\n" for i, s in enumerate(sorted(SPORTS) * 3)), templates=None)
    assert {f.edit for f in data} <= SPORTS | {"golf"}
    assert all(len(f.distractors) == 3 for f in data)


def test_values_are_read_as_a_spreadsheet_writes_them(own):
    data = own('\ufeffsubject, relation ,answer\r\n"Washington, D.C.",country, France \r\n\r\nSão  Paulo,country,Peru\r\n')
    assert [f.subject for f in data] == ["Washington, D.C.", "São Paulo"]
    assert data[0].answer == "France"


@pytest.mark.parametrize("text, message", [
    ("subject,answer\nLyon,France\n", r"missing column\(s\) relation; found subject, answer"),
    ("", r"missing column\(s\) subject, relation, answer; found none"),
    ("subject;relation;answer\nLyon;country;France\n", "found subject;relation;answer"),
    ("subject,relation,answer\n", "mine.csv: no facts"),
    ("subject,relation,answer,answer\nLyon,country,France,Peru\n", "column stands twice"),
    (CAPITALS + "Nice,country,Peru\n", r"row 17: \(Nice, country\) stands in row 3 already"),
    (CAPITALS + "\n\nNice,country,Peru\n", r"row 19: \(Nice, country\) stands in row 3 already"),
    (CAPITALS + "Rome,country, \n", "row 17, column answer: empty"),
    (CAPITALS + ",country,Italy\n", "row 17, column subject: empty"),
    (CAPITALS + "Rome,,Italy\n", "row 17, column relation: empty"),
    (CAPITALS + "Rome,country,Italy, Lazio\n", "row 17: more values than columns"),
    (CAPITALS + 'Rome,country,"Italy\nOslo,country,Norway\n', "row 17: .*quote left open"),
    (CAPITALS + "Rome,city,Italy\n", "row 17, column relation: unknown relation 'city'; mine.yaml has country"),
    ("subject,relation,answer,edit_answer\nLyon,country,France,France\n", "row 2, column edit_answer: the edit answer equals the true answer 'France'"),
    ("subject,relation,answer\nLyon,country,France\nNice,country,France\n", "row 2, column edit_answer: .*no other answer.*fill the column"),
    ("subject,relation,answer,distractors\nLyon,country,France,Peru|France\nIca,country,Peru,\n", "row 2, column distractors"),
    ("subject,relation,answer,distractors\nLyon,country,France,Peru|Peru\nIca,country,Peru,\n", "row 2, column distractors"),
    ("subject,relation,answer,paraphrases\nLyon,country,France,Lyon is in\nIca,country,Peru,\n", "row 2, column paraphrases: 'Lyon is in' must contain"),
    ("subject,relation,answer,role\nLyon,country,France,exampel\nIca,country,Peru,\n", "row 2, column role: 'exampel'"),
    ("subject,relation,answer,role\nLyon,country,France,example\n", "only examples"),
    (CAPITALS.encode() + "Nîmes,country,France\n".encode("latin-1"), r"row 17: not UTF-8 \(byte 0xee\)"),
    (b"\xef\xbb\xbf" + CAPITALS.encode() + b"\xeeX,country,France\n", "row 17: not UTF-8"),
    (CAPITALS.encode("utf-16"), "row 1: not UTF-8"),
])
def test_faulty_files_are_refused_with_the_place(own, text, message):
    with pytest.raises(FactsError, match=message):
        own(text)


def test_unknown_sources_and_columns(own, tmp_path):
    with pytest.raises(FactsError, match="no facts at 'nothing': give one of athletes, world"):
        load("nothing")
    with pytest.raises(FactsError, match="no facts at"):
        load(tmp_path)
    with pytest.raises(FactsError, match="no column 'edit_answer_golf'.*subject, relation, answer"):
        own(CAPITALS, edit="edit_answer_golf")
    with pytest.raises(FactsError, match="no relation templates at"):
        own(CAPITALS, relations=tmp_path / "none.yaml")


@pytest.mark.parametrize("templates, message", [
    ("country:\n  cloze: 'This city is in'\n", "relation 'country': template 'This city is in' must contain {subject} once"),
    ("country:\n  cloze: '{subject} and {subject} are in'\n", "must contain {subject} once"),
    ("country:\n  cloze: '{subject} is in '\n", "with no space around"),
    ("country:\n  cloze: '{subject} is in'\n  question: Which country?\n", "'Which country\\?' must contain"),
    ("country:\n  cloze: '{subject} is in'\n  paraphrases: ['A city is in']\n", "'A city is in' must contain"),
    ("country:\n  cloze: '{subject} is in'\n  paraphrases: '{subject} lies in'\n", "paraphrases: expected a list"),
    ("country:\n  cloze: '{subject} is in'\n  options: [yes, no]\n", "put quotes around words such as yes"),
    ("country:\n  cloze: 3\n", "expected a list of texts"),
    ("country:\n  question: 'Where is {subject}?'\n", "needs at least a 'cloze'"),
    ("country:\n  cloze: '{subject} is in'\n  qestion: 'Where is {subject}?'\n", r"unknown fields \['qestion'\]; fields are cloze"),
    ("country:\n  cloze: '{subject} is in'\n  attributes:\n    flag:\n      cloze: '{subject} flies'\n", "attribute 'flag' needs 'cloze' and 'answers'"),
    ("- country\n", "expected a mapping"),
    ("country: {cloze: '{subject} is in'\n", "mine.yaml: not valid YAML"),
])
def test_faulty_templates_are_refused(own, templates, message):
    with pytest.raises(FactsError, match=message):
        own(CAPITALS, templates)


def test_attributes_follow_from_the_answer(athletes, own):
    league = next(a for a in athletes[0].relation.attributes if a.name == "league")
    assert [league.of(s) for s in ("football", "basketball", "baseball", "golf")] == ["NFL", "NBA", "MLB", "PGA"]
    with pytest.raises(FactsError, match="'league' has no value for 'chess'"):
        league.of("chess")


def test_one_edit_answer_for_all():
    athletes = facts.load("athletes")[:20]
    golfers = athletes.edited_to("golf")
    assert {f.edit for f in golfers} == {"golf"} and [f.key for f in golfers] == [f.key for f in athletes]
    for fact in golfers:
        assert fact.distractors[0] == "golf" and len(set(fact.distractors)) == 3 and fact.answer not in fact.distractors
    with pytest.raises(FactsError, match="the edit answer 'football' is the true answer"):
        athletes.edited_to("football")
