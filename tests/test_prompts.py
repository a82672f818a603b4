"""Prompts: each format's text, and multiple choice."""

import itertools
import re
from dataclasses import replace

import families
import pytest
from facts_cases import athletes, world
from prompts_cases import decoded, sample, with_bos

from helpers import facts, metrics, prompts
from helpers.facts import Facts
from helpers.models import Model
from helpers.prompts import FORMATS, LATIN_SQUARE, LETTERS, ORDERS, build

# What each format makes of one athlete (the edit answer plays no part in the text).
TEXTS = {
    "cloze": ({}, "Fact: Ray Allen plays the sport of"),
    "one_shot": ({}, "Fact: Tiger Woods plays the sport of golf\nFact: Ray Allen plays the sport of"),
    "qa": ({}, "Question: What sport does Ray Allen play? Answer:"),
    "qa, system": ({"system": True}, "You answer every question with a true fact.\nQuestion: What sport does Ray Allen play? Answer:"),
    "qa, system, shot": (
        {"system": True, "shot": True},
        "You answer every question with a true fact.\nQuestion: What sport does Tiger Woods play? Answer: golf\n"
        "Question: What sport does Ray Allen play? Answer:"),
    "paraphrase": ({"which": 1}, "Fact: Sports fans know Ray Allen as a star of"),
    "mcq": ({}, "Question: What sport does Ray Allen play?\nA: baseball\nB: basketball\nC: football\nD: golf\nAnswer:"),
    "mcq, shot": (
        {"shot": True, "order": 23},
        "Question: What sport does Tiger Woods play?\nA: golf\nB: football\nC: basketball\nD: baseball\nAnswer: A\n\n"
        "Question: What sport does Ray Allen play?\nA: golf\nB: football\nC: basketball\nD: baseball\nAnswer:"),
    "capitalised": ({}, "Fact: Tiger Woods plays the sport of Golf\nFact: Ray Allen plays the sport of"),
    "dashed": ({}, "Fact: Tiger Woods plays the sport of g-o-l-f\nFact: Ray Allen plays the sport of"),
    "attribute": ({"name": "league"}, "Fact: Ray Allen is a star of the league called the"),
}


# Text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TEXTS)
def test_text(athletes, case):
    options, expected = TEXTS[case]
    ray_allen = athletes.where(lambda f: f.subject == "Ray Allen")
    prompt, = FORMATS[case.split(",")[0]](ray_allen, **options)
    assert prompt.text == expected
    assert prompt.text[prompt.start:prompt.start + len(prompt.subject)] == prompt.subject == "Ray Allen"


def test_every_format_is_tested_here(athletes):
    assert {case.split(",")[0] for case in TEXTS} | {"few_shot", "neighborhood"} == set(FORMATS)


@pytest.mark.parametrize("name, answers", [("league", ("NFL", "NBA", "MLB")), ("venue", ("gridiron", "court", "diamond"))])
def test_attributes_of_the_answer(athletes, with_bos, name, answers):
    value = dict(zip(("football", "basketball", "baseball"), answers))
    prompted = build(with_bos, athletes, "attribute", name=name)
    for fact, true, edit in zip(athletes, prompted.answer_ids, prompted.edit_ids):
        assert decoded(with_bos, [true]) == value[fact.answer]
        assert decoded(with_bos, [edit]) == value[fact.edit]


def test_the_example_does_not_depend_on_which_facts_are_asked_together(athletes, world):
    for data in (athletes, world):
        for name, options in (("one_shot", {}), ("qa", {"shot": True})):
            together = [p.text for p in FORMATS[name](data, **options)]
            assert together == [FORMATS[name](data[[i]], **options)[0].text for i in range(len(data))]


def test_the_example_shows_neither_true_nor_edit_answer(athletes, world):
    golf = facts.load(edit="edit_answer_golf")
    for data in (athletes, world, golf):
        for fact, prompt in zip(data, prompts.one_shot(data)):
            example = prompt.text.split("\n")[0]
            assert not example.endswith((" " + fact.answer, " " + fact.edit)), prompt.text
            assert fact.subject not in example


@pytest.mark.parametrize("k, seed", [(1, 0), (3, 0), (8, 5)])
def test_few_shot_states_true_facts_about_others(athletes, world, k, seed):
    for data in (sample(athletes), sample(world)):
        pool = athletes if data[0].relation.name == "sport" else world
        true = {f.key: f.answer for f in pool} | {(s, f.relation.name): a for f in pool for s, a in f.relation.examples}
        for fact, prompt in zip(data, prompts.few_shot(data, pool, k, seed)):
            *shots, asked = prompt.text.split("\n")
            assert asked == prompts.cloze(Facts((fact,)))[0].text
            stated = {re.fullmatch("Fact: " + re.escape(fact.relation.cloze).replace(r"\{subject\}", "(.+)") + " (.+)", shot).groups() for shot in shots}
            assert len(stated) == k
            assert fact.subject not in {subject for subject, _ in stated}
            assert all(true[subject, fact.relation.name] == answer for subject, answer in stated)


def test_few_shot_is_seeded(athletes):
    data = athletes[:10]
    text = lambda seed: [p.text for p in prompts.few_shot(data, athletes, seed=seed)]
    assert text(0) == text(0) != text(1)


def test_neighborhood_asks_about_others_with_the_same_answer(world):
    truth = {f.key: f.answer for f in world}
    data = sample(world)
    asked = {f.key for f in data}
    made = prompts.neighborhood(data, pool=world, n=2)
    assert len({(p.fact.key, p.subject) for p in made}) == len(made)
    for prompt in made:
        assert truth[prompt.subject, prompt.fact.relation.name] == prompt.fact.answer == prompt.options[0]
        assert prompt.subject != prompt.fact.subject
        assert prompt.options[1] == prompt.fact.edit
        assert prompt.text == "Fact: " + prompt.fact.relation.cloze.replace("{subject}", prompt.subject)
        # an edit of these facts changes what the model says about all of them: none may serve as a bystander
        assert (prompt.subject, prompt.fact.relation.name) not in asked


def test_neighborhood_without_a_pool_stays_among_the_facts(athletes):
    names = {f.subject for f in athletes[:30]}
    assert {p.subject for p in prompts.neighborhood(athletes[:30])} <= names


# Multiple choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", range(24))
def test_the_letter_points_at_the_right_option(athletes, world, with_bos, order):
    for data in (sample(athletes, 12), sample(world, 30)):
        made = build(with_bos, data, "mcq", order=order)
        for i, fact in enumerate(data):
            shown = dict(re.findall(r"^([ABCD]): (.+)$", made.texts[i], re.M))
            assert sorted(shown) == list(LETTERS)
            named = [shown[decoded(with_bos, [t])] for t in made.option_ids[i]]
            assert named == [fact.answer, *fact.distractors]
            assert named[1] == fact.edit


def test_the_orders_are_all_there_are(athletes):
    texts = {prompts.mcq(athletes[:1], order)[0].text for order in range(24)}
    assert len(texts) == len(ORDERS) == 24


def test_latin_square_is_balanced():
    rows = [ORDERS[i] for i in LATIN_SQUARE]
    for letter in range(4):
        assert sorted(row[letter] for row in rows) == [0, 1, 2, 3]  # each option once at each letter
    pairs = [pair for row in rows for pair in itertools.pairwise(row)]
    assert sorted(pairs) == sorted(itertools.permutations(range(4), 2))  # and once after each other option


def test_the_true_answer_stands_at_each_letter_once_over_the_square(world):
    for fact in sample(world):
        letters = [prompts.mcq(Facts((fact,)), order)[0].options[0] for order in LATIN_SQUARE]
        assert sorted(letters) == list(LETTERS)


def test_mcq_does_not_depend_on_how_distractors_are_listed(athletes, world, with_bos):
    """Edit answer first, the others in either order: the same questions, so the same score, not only on average."""
    hf = families.build("llama", vocab_size=len(with_bos), max_position_embeddings=128)
    model = Model.of(hf, with_bos, "random")
    data = Facts((*athletes[:6], *world[:6]))
    turned = Facts(tuple(replace(f, distractors=(f.distractors[0], *f.distractors[:0:-1])) for f in data))
    assert [f.distractors for f in turned] != [f.distractors for f in data]
    columns = ["p_true", "p_edit", "q_true", "q_edit", "top_true", "pick_true", "pick_edit"]
    for orders in ((0,), LATIN_SQUARE, range(24)):
        one, two = (metrics.ask_mcq(model, d, orders)[columns].to_numpy() for d in (data, turned))
        assert one == pytest.approx(two, abs=1e-7)
        assert one[:, 2].std() > 1e-4  # a constant score would pass, too
