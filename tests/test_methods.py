"""Methods by name: what each trains, on which facts, and where."""

from __future__ import annotations

import attacks_cases as cases
import pytest
import small
import torch

from helpers import facts
from helpers.masks import SelectionError, mask
from helpers.splits import split
from helpers.unlearning import methods
from helpers.unlearning.finetune import finetune


@pytest.fixture(scope="module")
def everyone():
    return facts.load()[:cases.N_FACTS]


def made(method, given, everyone, **options):
    model = cases.random_model()
    chosen = mask(model, ["mlp 1"], "MLP 1-1")
    return methods.make(method, model, everyone, given, chosen, cases.QUICK, 3, cases.texts(), **options), model, chosen


@pytest.mark.parametrize("method, objective", [("finetune", "edit"), ("unlearn", "unlearn")])
def test_it_is_localized_fine_tuning_of_all_facts(method, objective, everyone):
    edit, model, chosen = made(method, cases.a_split(), everyone)
    expected = finetune(model, cases.a_split(), chosen, objective, cases.QUICK, cases.texts(), 3)
    assert all(torch.equal(edit.values[name], value) for name, value in expected.values.items())
    assert methods.trained_on(cases.a_split()) == methods.read_on(cases.a_split()) == cases.a_split().forget


def test_of_a_whole_answer_one_half_is_trained_on_and_the_other_read(everyone):
    given = split(everyone, "answer-baseball")
    edit, model, chosen = made("finetune", given, everyone)
    assert edit.record["n_trained_on"] == len(given.attack_train) < len(given.forget)
    expected = finetune(model, given, chosen, "edit", cases.QUICK, cases.texts(), 3, forget=given.attack_train)
    assert all(torch.equal(edit.values[name], value) for name, value in expected.values.items())
    assert methods.read_on(given) == given.attack_test


def test_sequential_localizes_each_slice_on_the_model_as_edited_so_far(everyone, monkeypatch):
    seen = []
    real = methods.choose

    def choose(model, known, given, names, **options):
        edited = [f.subject for f in given.forget]
        assert {f.subject for f in known} & {f.subject for f in cases.a_split().forget} == set(edited)
        seen.append((small.weights(model), edited, names, options["draw"]))
        return real(model, known, given, names, lookup=(1,), **options)

    monkeypatch.setattr(methods, "choose", choose)
    edit, model, _ = made("sequential", cases.a_split(), everyone, slices=2)
    (first, early, names, draw), (second, late, *_) = seen
    assert names == ["MLP 1-1"] and draw == 3 and early + late == [f.subject for f in cases.a_split().forget]
    assert small.same(model, first) and not small.same(model, second)
    assert [piece["mask"] for piece in edit.record["slices"]] == ["MLP 1-1"] * 2 and set(edit.values) == set(mask(model, ["mlp 1"]).entries)


def test_a_slice_of_which_the_rule_makes_nothing_keeps_the_mask(everyone, monkeypatch):
    def nothing(*given, **options):
        raise SelectionError("fact lookup chooses no MLP")

    monkeypatch.setattr(methods, "choose", nothing)
    edit, model, chosen = made("sequential", cases.a_split(), everyone, slices=2)
    assert set(edit.values) == set(chosen.entries)


def test_another_method_is_refused_with_those_there_are(everyone):
    with pytest.raises(ValueError, match="'prune'; there are finetune, unlearn, sequential"):
        made("prune", cases.a_split(), everyone)
