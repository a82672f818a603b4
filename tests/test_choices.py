"""Choices of masks by name: the budget they share, what is computed for whom, and what is refused."""

from __future__ import annotations

import attacks_cases as cases
import pytest

from helpers.localization import choices
from helpers.localization.choices import choose, is_window
from helpers.masks import SelectionError, mask, size
from helpers.splits import split

LOOKUP = (1, 2)


@pytest.fixture(scope="module")
def everyone():
    from helpers import facts

    return facts.load()[:cases.N_FACTS]


@pytest.fixture(scope="module")
def chosen(everyone):
    names = [name for name in choices.NAMES if name != "windows"]
    return choose(cases.random_model(), everyone, cases.a_split(), [*names, "windows"], lookup=LOOKUP, samples=1)


def test_every_choice_reaches_the_budget_of_fact_lookup_and_exceeds_it_by_less_than_its_last_unit(chosen):
    budget = chosen.masks["lookup"].n_parameters
    model = cases.random_model()
    for name in (*choices.SCORED, "random", "random MLPs"):
        mask = chosen.masks[name]
        assert mask.n_parameters >= budget
        assert mask.n_parameters - max(size(model, unit) for unit in mask.units) < budget


def test_each_rival_takes_the_units_its_scores_put_first(chosen):
    for name in choices.SCORED:
        scores, units = chosen.scores[name.removesuffix(" MLPs")].abs(), chosen.masks[name].units
        if name.endswith("MLPs"):
            scores = scores[[unit.startswith("mlp") for unit in scores.index]]
        assert set(units) == set(scores.sort_values(ascending=False).index[:len(units)])


def test_what_is_given_is_not_sought(everyone, chosen, monkeypatch):
    """Published masks: they are taken as they are, lookup among them is the budget of the others, and nothing is localized for them."""
    model = cases.random_model()
    given = {"lookup": mask(model, ["mlp 2"], "published"), "causal tracing": mask(model, ["attn 0"], "published")}
    for place in ((choices.fact_lookup, "sports"), (choices.causal_tracing, "trace_components")):
        monkeypatch.setattr(*place, lambda *a, **k: pytest.fail("localized, though the mask is given"))
    found = choose(model, everyone, cases.a_split(), ["lookup", "causal tracing", "random MLPs", "attribution MLPs"], given=given)
    assert found.lookup is None and found.lookup_layers == (2,)
    assert {name: m.units for name, m in found.masks.items() if name in given} == {"lookup": ("mlp 2",), "causal tracing": ("attn 0",)}
    assert all(m.name == name for name, m in found.masks.items()) and len(found.masks["random MLPs"].layers) == 1
    assert found.masks["attribution MLPs"].n_parameters == given["lookup"].n_parameters
    by_hand = choose(model, everyone, cases.a_split(), ["lookup"], given=given, lookup=LOOKUP)
    assert by_hand.lookup_layers == LOOKUP and by_hand.masks["lookup"].digest == chosen.masks["lookup"].digest


def test_windows_are_all_runs_of_as_many_mlps(chosen):
    windows = [name for name in chosen.masks if is_window(name)]
    assert windows == [f"MLP {start}-{start + 1}" for start in range(cases.random_model().n_layers - 1)]
    assert chosen.layers("MLP 1-2") == chosen.layers("lookup") == "1 2"
    assert chosen.masks["MLP 1-2"].digest == chosen.masks["lookup"].digest


def test_layers_are_named_for_choices_of_whole_mlps_only(chosen):
    assert chosen.layers("everything") == "" and chosen.layers("random") == ""
    assert chosen.layers("all MLPs").split() == [str(layer) for layer in range(cases.random_model().n_layers)]


def test_masks_carry_the_names_of_the_claims_and_random_ones_change_with_the_seed(everyone):
    draw = lambda seed: choose(cases.random_model(), everyone, cases.a_split(), ["random"], lookup=LOOKUP, seed=seed).masks["random"]
    assert {draw(seed).name for seed in range(4)} == {"random"}
    assert len({draw(seed).digest for seed in range(4)}) > 1 and draw(0).digest == draw(0).digest
    again = choose(cases.random_model(), everyone, cases.a_split(), ["random"], lookup=LOOKUP, draw=3).masks["random"]
    assert again.digest == draw(3).digest


def test_only_what_is_asked_for_is_computed(everyone, monkeypatch):
    called = []
    monkeypatch.setattr(choices.attribution, "attribute", lambda *a, **k: called.append("attribution"))
    monkeypatch.setattr(choices.causal_tracing, "trace_components", lambda *a, **k: called.append("tracing"))
    choose(cases.random_model(), everyone, cases.a_split(), ["lookup", "MLP 0-1", "all MLPs"], lookup=LOOKUP)
    assert not called


@pytest.mark.parametrize("names", [["luckup"], [], ["MLP 3-2"], ["MLP x-3"]])
def test_unknown_names_are_refused_with_those_there_are(everyone, names):
    with pytest.raises(SelectionError, match="there are lookup, everything"):
        choose(cases.random_model(), everyone, cases.a_split(), names)


def test_a_fact_lookup_that_finds_nothing_is_an_error_that_says_what_to_do(everyone, monkeypatch):
    nothing = choices.fact_lookup.Lookup((), "a rule", None, (), (), {})
    monkeypatch.setattr(choices.fact_lookup, "sports", lambda *a, **k: nothing)
    with pytest.raises(SelectionError, match="chooses no MLP .a rule.; name layers by hand"):
        choose(cases.random_model(), everyone, split(everyone, "first-16"))


@pytest.mark.parametrize("text, layers", [("", None), (" , ", None), ("3,2", (2, 3)), ("4, 4,10", (4, 10))])
def test_layers_by_hand(text, layers):
    assert choices.parse_layers(text) == layers


@pytest.mark.parametrize("text, wrong", [("2,x", "'x'"), ("-1", "'-1'"), ("2-4", "'2-4'"), ("1.5", "'1.5'")])
def test_what_is_no_layer_is_named(text, wrong):
    with pytest.raises(SelectionError, match=f"{wrong} is no layer; give numbers"):
        choices.parse_layers(text)


def test_facts_whose_answers_hardly_repeat_are_looked_up_without_probes(everyone, monkeypatch):
    """A probe wants several subjects an answer: rarer answers stay out of it, and where nearly all are rare patching decides."""
    called, nothing = [], choices.fact_lookup.Lookup((), "a rule", None, (), (), {})
    monkeypatch.setattr(choices.fact_lookup, "sports", lambda model, twins, asked, **k: called.append(len(asked)) or nothing)
    monkeypatch.setattr(choices.fact_lookup, "counterfact", lambda *a, **k: called.append("patching") or nothing)
    parts = cases.a_split()
    place = {fact: i for answer in everyone.counts() for i, fact in enumerate(everyone.where(lambda f: f.answer == answer))}
    first, last = everyone.counts().most_common(1)[0][0], everyone.counts().most_common()[-1][0]
    rare = everyone.where(lambda fact: place[fact] < choices.PROBED - (fact.answer == first))  # of one answer one subject too few
    for known in (everyone, rare, everyone.where(lambda fact: fact.answer == last or place[fact] < choices.PROBED - 1)):
        choices.look_up(cases.random_model(), known, parts)
    assert called == [len(everyone), choices.PROBED * (len(everyone.counts()) - 1), "patching"]


def test_localizations_see_no_more_facts_than_asked(everyone, monkeypatch):
    seen, real = [], choices.pairs
    monkeypatch.setattr(choices, "pairs", lambda model, facts, *rest, **options: seen.append(facts) or real(model, facts, *rest, **options))
    choose(cases.random_model(), everyone, cases.a_split(), ["all MLPs"], lookup=LOOKUP, n_facts=5)
    assert [len(facts) for facts in seen] == [5] and list(seen[0]) == list(cases.a_split().forget[:5])
