"""Asking in other words: every format, the gate, and no fact as its own case."""

import attacks_cases as cases
import pandas as pd
import pytest

from helpers import attacks, survey
from helpers.attacks.prompting import FORGOTTEN, questions
from helpers.attacks.rows import COLUMNS
from helpers.prompts import few_shot


@pytest.fixture(scope="module")
def rows():
    return attacks.prompt(cases.known(), cases.edit(), cases.a_split(), n_retain=5, orders=(0, 9))


def test_one_row_a_fact_setting_and_group(rows):
    labels = {q.label for q in questions(cases.a_split())}
    assert list(rows.columns) == COLUMNS and set(rows["attack"]) == {"prompt"}
    assert set(rows["setting"]) == labels | {"neighborhood"} and rows.attrs["refused"] == {}
    assert {"MCQ", "QA", "QA, system sentence", "paraphrase 3", "league", "venue", "capitalised", "dashed", FORGOTTEN} < labels
    assert not rows.duplicated(["setting", "group", "subject", "relation"]).any()
    sizes = rows[rows["setting"] != "neighborhood"].groupby(["setting", "group"]).size().unstack()
    assert (sizes == [cases.N_FORGET, 5]).all(axis=None)
    assert not rows[["prob_true", "prob_edit", "top_true", "top_edit"]].isna().any(axis=None)


def test_readings_are_those_of_the_evaluation(rows):
    from helpers.unlearning.evaluation import evaluate

    model, edit, split = cases.known(), cases.edit(), cases.a_split()
    with edit.applied(model):
        theirs = evaluate(model, split, texts=cases.texts(), orders=(0, 9))
    columns = ["prob_true", "prob_edit", "top_true", "top_edit"]
    names = {"one-shot": "one_shot", "QA": "qa", "MCQ": "mcq", "league": "league"}
    for ours, format in names.items():
        one = rows.query("setting == @ours and group == 'forget'").set_index("subject")[columns]
        other = theirs.query("format == @format and group == 'forget'").set_index("subject")[columns]
        pd.testing.assert_frame_equal(one, other.loc[one.index], check_exact=False, atol=1e-6)


def test_the_gate_is_of_the_unedited_model(rows):
    model, split = cases.known(), cases.a_split()
    counts = attacks.gate(model, split, orders=(0, 9))
    assert counts["one-shot"] and not counts["MCQ"]
    assert rows.groupby("setting")["counts"].first().to_dict() == counts
    assert cases.mean(rows, setting="one-shot", group="forget") == 0 and rows.query("setting == 'one-shot'")["counts"].all()
    theirs = survey.gate(survey.survey(model, split.forget, questions(split), (0, 9))[0]).set_index("question")["counts"]
    assert {label: counts[label] for label in theirs.index} == theirs.to_dict()


def test_counts_can_be_given_and_formats_chosen():
    model, edit, split = cases.known(), cases.edit(), cases.a_split()
    rows = attacks.prompt(model, edit, split, asked=["QA", "league"], counts={"QA": True}, n_retain=3, n_neighbors=0)
    assert rows.groupby("setting")["counts"].first().to_dict() == {"QA": True, "league": False}
    with pytest.raises(attacks.AttackError, match="no way of asking called 'sonnet'"):
        attacks.prompt(model, edit, split, asked=["sonnet"])


def test_no_fact_is_its_own_case_and_cases_carry_true_answers():
    split = cases.a_split()
    question = next(q for q in questions(split) if q.label == FORGOTTEN)
    truth = {f.subject: f.answer for f in split.attack_train} | dict(split.forget[0].relation.examples)
    for fact, prompt in zip(split.forget, few_shot(split.forget, **question.options)):
        *solved, asked = prompt.text.splitlines()
        assert fact.subject in asked and len(solved) == 3
        for line in solved:
            subject, answer = line.removeprefix("Fact: ").split(" plays the sport of ")
            assert subject != fact.subject and truth[subject] == answer


def test_a_neighborhood_is_kept_facts_with_the_same_answer(rows):
    near = rows[rows["setting"] == "neighborhood"]
    assert set(near["group"]) == {"neighborhood"} and len(near) == cases.N_FORGET
    assert cases.mean(rows, setting="neighborhood") > cases.mean(rows, setting="cloze", group="forget")
