"""Results: one value a row, equal to what the wide tables say, under the names that claims know."""

from __future__ import annotations

from dataclasses import replace

import attacks_cases as cases
import numpy as np
import pandas as pd
import pytest

from helpers import attacks, claims, results
from helpers.unlearning import evaluation

WHERE = {"facts": "athletes first-16", "n": cases.N_FORGET, "localization": "lookup", "method": "finetune", "layers": "0"}


@pytest.fixture(scope="module")
def evaluated():
    model = cases.known()
    return evaluation.evaluate(model, cases.a_split(), "finetune", "lookup", 3, n_retain=16, texts=cases.texts())


@pytest.fixture(scope="module")
def attacked():
    model, edit, split = cases.known(), cases.edit(), cases.a_split()
    parts = [attacks.untouched(model, edit, split, n_retain=16),
             attacks.relearn(model, edit, split, rates=(2e-3,), steps=(0, 20), rank=4, invented=True, n_retain=16, formats=("one_shot",)),
             attacks.probe(model, edit, split, n_retain=16), attacks.patch(model, edit, split), attacks.noise(model, edit, split, n_retain=16)]
    return pd.concat(parts, ignore_index=True)


def all_known(evaluated: pd.DataFrame) -> pd.DataFrame:
    """The same rows of a model that knows the leagues of all retained athletes."""
    return evaluated.assign(top_true=evaluated["top_true"].where((evaluated["group"] != "retain") | (evaluated["format"] != "league"), 1.0))


def test_means_of_long_results_are_those_of_the_wide_summary(evaluated):
    long = results.of_evaluation(evaluated, **WHERE)
    wide = evaluation.summarize(evaluated, evaluated).set_index("reading")
    means = long.groupby("measure")["value"].mean()
    measured = [c for c in wide if c not in ("method", "mask", "seed", "text_loss", "retain_kept", "collapsed", "collapse")]
    assert means["text_loss"] == pytest.approx(wide["text_loss"].iloc[0])
    for name in measured:
        for reading in evaluation.READINGS:
            assert means[f"{name} {reading}"] == pytest.approx(wide.loc[reading, name], abs=1e-12), name
    assert len(means) == 1 + len(measured) * len(evaluation.READINGS)


def test_costs_are_the_top1_means_and_say_why_a_model_counts_as_wrecked(evaluated):
    base = all_known(evaluated).assign(method="base", mask="none", seed=0)
    evaluated = all_known(evaluated)
    forgetful = evaluated.assign(seed=4, top_true=evaluated["top_true"].where(evaluated["group"] != "retain", 0.0))
    rows = pd.concat([base, evaluated, forgetful])
    long = results.of_evaluations(rows, facts="athletes first-16", n=cases.N_FORGET)
    wide = evaluation.summarize(rows, base).query("reading == 'top1'").set_index(["mask", "seed"])
    found = results.costs(long, ["localization", "seed"])
    for name in ("edit", "forget", "retain", "mcq_retain", "text_loss"):
        assert found[name].to_dict() == pytest.approx(wide[name].to_dict()), name
    assert found["collapse"].to_dict() == wide["collapse"].to_dict()
    assert found.loc[("lookup", 4), "collapse"].startswith("retain") and found.loc[("lookup", 3), "collapse"] == ""
    # a format that the limits do not guard is named, where retained facts lost it
    assert "league_retain -" in found.loc[("lookup", 4), "broken"] and found.loc[("lookup", 3), "broken"] == ""
    one_format = evaluated.assign(seed=4, top_true=evaluated["top_true"].where((evaluated["group"] != "retain") | (evaluated["format"] != "league"), 0.0))
    league = results.costs(results.of_evaluations(pd.concat([base, one_format]), facts="athletes first-16", n=cases.N_FORGET)).loc["lookup"]
    assert league["collapse"] == "" and league["broken"].startswith("league_retain -") and ";" not in league["broken"]
    named = pd.concat([long.assign(model="a"), long[long["localization"] != "none"].assign(model="b")])  # b has no unedited model
    both = results.costs(named, ["model", "localization"])["collapse"]
    assert both["a", "lookup"] == results.costs(long)["collapse"]["lookup"] != "" and both["b", "lookup"] == ""


def test_costs_of_each_edit_and_their_means_over_seeds(evaluated):
    base = all_known(evaluated).assign(method="base", mask="none", seed=0)
    evaluated = all_known(evaluated)
    forgetful = evaluated.assign(seed=4, top_true=evaluated["top_true"].where(evaluated["group"] != "retain", 0.0))
    rows = pd.concat([base, evaluated, forgetful, evaluated.assign(mask="everything", method="npo")])
    long = results.of_evaluations(rows, facts="athletes first-16", n=cases.N_FORGET)
    made, costs = results.edits(long), results.costs(long, ["localization", "seed"])
    assert list(zip(made["mask"], made["seed"])) == [("lookup", 3), ("lookup", 4), ("everything", 3)]
    for row in made.itertuples():
        assert row.retain == costs.loc[(row.mask, row.seed), "retain"] and row.collapsed == (costs.loc[(row.mask, row.seed), "collapse"] != "")
    means = results.over_seeds(made)
    assert means["retain"].to_dict() == pytest.approx(made.groupby("mask")["retain"].mean().to_dict())
    assert means["collapsed"].to_dict() == {"lookup": True, "everything": False}
    assert means["why"]["lookup"].startswith("retain") and means["why"]["everything"] == ""
    assert "league_retain" in means["broken"]["lookup"] and means["broken"]["everything"] == ""
    assert set(results.edits(long, "method")["mask"]) == {evaluated["method"].iloc[0], "npo"}


def test_stored_rows_of_the_same_edits_are_added_and_none_counts_twice(evaluated):
    both = pd.concat([evaluated, evaluated.assign(seed=4), evaluated.assign(method="base", mask="none")])
    rows = results.of_evaluations(both, facts="athletes first-16", n=cases.N_FORGET).assign(model="a")
    here, other = rows[rows["seed"] == 3], rows[rows["seed"] == 4].assign(value=2.0)
    elsewhere = [other.assign(**{name: value}) for name, value in
                 (("model", "b"), ("facts", "world first-16"), ("localization", "MLP 0-1"), ("method", "sequential"))]
    unedited = here[here["localization"] == "none"].assign(seed=4, value=5.0)  # measured by every run, and always the same
    found = results.pooled(here, pd.concat([*elsewhere, other, unedited, here.assign(value=3.0)]))
    assert len(found) == len(rows) and not found["value"].isin([3.0, 5.0]).any()
    assert found.loc[found["seed"] == 4, "value"].eq(2.0).all()
    pd.testing.assert_frame_equal(results.pooled(here, rows[:0]), here.reset_index(drop=True))


def test_all_stored_edits_of_the_same_facts_are_at_hand(evaluated):
    both = pd.concat([evaluated, evaluated.assign(method="base", mask="none")])
    here = results.of_evaluations(both, {"lookup": "2 3"}, facts="athletes first-16", n=cases.N_FORGET).assign(model="a")
    edit = here[here["localization"] == "lookup"].assign(run="old", stale=True)
    rival = edit.assign(localization="everything")
    other = [rival.assign(facts="world first-16"), rival.assign(model="b"), edit.assign(layers="5 6", seed=4), rival.assign(value=5.0), rival]
    found = results.at_hand(here, pd.concat(other), "new")
    assert len(found) == len(here) + len(rival) and not found["value"].eq(5.0).any()
    assert found.groupby("localization")["stale"].all().to_dict() == {"everything": True, "lookup": False, "none": False}
    assert set(found.loc[found["stale"], "run"]) == {"old"} and set(found.loc[~found["stale"], "run"]) == {"new"}
    assert not results.at_hand(here, pd.concat(other)[:0], "new")["stale"].any()


def test_a_table_begins_with_the_unedited_model_in_either_reading(evaluated):
    rows = pd.concat([evaluated.assign(method="base", mask="none", seed=0), evaluated])
    long = results.of_evaluations(rows, facts="athletes first-16", n=cases.N_FORGET)
    for reading in evaluation.READINGS:
        table = results.with_before(results.over_seeds(results.edits(long, reading=reading)), long, reading)
        wide = evaluation.summarize(evaluated, evaluated).set_index("reading").loc[reading]
        assert list(table.index) == ["before", "lookup"] and not table["collapsed"].any()
        assert table["mcq_edit"].tolist() == pytest.approx([wide["mcq_edit"]] * 2)


def test_claims_are_judged_by_stored_masks_that_were_not_edited_here_too(evaluated):
    both = pd.concat([evaluated, evaluated.assign(method="base", mask="none")])
    here = results.of_evaluations(both, facts="athletes first-16", n=cases.N_FORGET).assign(model="a")
    edited = here[here["localization"] == "lookup"]
    other = edited.assign(localization="random", value=2.0)
    elsewhere = [other.assign(**{name: value}) for name, value in (("model", "b"), ("facts", "world first-16"), ("method", "sequential"))]
    found = results.at_hand(here, pd.concat([other, other, *elsewhere, here.assign(value=3.0)]))
    assert len(found) == len(here) + len(other) and not found["value"].eq(3.0).any()
    assert found.loc[found["localization"] == "random", "value"].eq(2.0).all()


def test_after_attacks_takes_the_named_attacks_of_edits(attacked):
    long = results.of_attacks(attacked, cases.a_split(), seed=0, **WHERE)
    found = results.after_attacks(pd.concat([long, long.assign(localization="none")]))
    assert set(found["localization"]) == {WHERE["localization"]} and not found.duplicated(["label", "fact"]).any()
    assert {"relearned by LoRA", "probe, upper layers", "worst case, model answers"} <= set(found["label"]) <= set(results.SHOWN)


def test_a_mask_of_the_same_name_in_other_layers_is_another_mask(evaluated):
    named = [results.of_evaluations(evaluated.assign(mask=name), {name: "2 3"}, facts="athletes first-16", n=cases.N_FORGET) for name in ("lookup", "random MLPs")]
    here = pd.concat(named).assign(model="a")
    elsewhere = here.assign(seed=4, layers="5 6")
    found = results.pooled(here, pd.concat([elsewhere, here.assign(seed=5)]))
    assert set(found.loc[found["localization"] == "lookup", "seed"]) == {3, 5}
    assert set(found.loc[found["localization"] == "random MLPs", "seed"]) == {3, 4, 5}


def test_drift_compares_means_of_the_same_edits_only(evaluated):
    made = results.of_evaluation(evaluated, **WHERE).assign(model="tiny-x")
    moved = made.assign(value=made["value"] - 0.1)
    table = results.drift(made, moved)
    assert len(table) == made["measure"].nunique() and set(table["seed"]) == {3}
    assert table["difference"].to_numpy() == pytest.approx(0.1)
    for other in ({"seed": 4}, {"layers": "1"}, {"model": "tiny-y"}, {"method": "LoRA"}, {"facts": "world first-16"}, {"localization": "none"}):
        assert results.drift(made, moved.assign(**other)).empty


def test_rows_without_an_attack_give_an_empty_table(attacked):
    """As of an unedited model where every fact has one answer: nothing teaches a probe that answer, and there is no worst case."""
    given, rows = cases.a_split(), attacked[attacked["attack"] == "none"]
    answer = given.forget[0].answer
    given = replace(given, forget=given.forget.where(lambda fact: fact.answer == answer))
    found = results.of_attacks(rows[rows["answer"] == answer], given, seed=0, **WHERE)
    assert found.empty and list(found) == results.COLUMNS


def test_a_fact_has_one_value_a_measure(evaluated, attacked):
    for table in (results.of_evaluation(evaluated, **WHERE), results.of_attacks(attacked, cases.a_split(), seed=3, **WHERE)):
        assert not table.duplicated(["attack", "fact", "measure"]).any()
        assert list(table) == results.COLUMNS and set(table["seed"]) == {3} and table["value"].notna().all()


def test_the_attack_that_claims_mean_has_the_plain_name_and_controls_never_do(attacked):
    long = results.of_attacks(attacked, cases.a_split(), seed=0, **WHERE)
    names = set(long["attack"])
    assert "relearn lora" in names and "none" not in names
    assert "relearn lora: all facts, lr 0.002, step 0 of 20" in names
    assert "relearn lora: all facts, lr 0.002, step 20 of 20 (invented names)" in names
    plain = attacked[(attacked["attack"] == "relearn lora") & (attacked["step"] == 20) & (attacked["control"] == "")]
    read = plain[plain["group"] == "forget"]
    meant = long[(long["attack"] == "relearn lora") & (long["measure"] == "forget top1")]
    assert sorted(meant["fact"]) == sorted(read["subject"] + " | " + read["relation"])
    assert meant["value"].mean() == pytest.approx(read["top_true"].mean())


def test_probe_true_is_the_share_of_upper_layers_at_the_last_token(attacked):
    long = results.of_attacks(attacked, cases.a_split(), seed=0, **WHERE)
    n_layers = cases.known().n_layers
    upper = [layer for layer in range(n_layers + 1) if layer > n_layers / 3]
    rows = attacked[(attacked["attack"] == "probe") & (attacked["control"] == "") & (attacked["group"] == "forget")
                    & (attacked["position"] == "last") & attacked["layer"].isin(upper)]
    found = long[long["measure"] == "probe_true top1"].set_index("fact")["value"]
    for subject, part in rows.groupby("subject"):
        assert found[[key for key in found.index if key.startswith(f"{subject} |")][0]] == pytest.approx(part["top_true"].sum() / len(upper))


def test_probes_stand_at_every_layer_too(attacked):
    long = results.of_attacks(attacked, cases.a_split(), seed=0, **WHERE)
    found = long[long["attack"].str.startswith("probe: ")].groupby("attack")["value"].mean()
    rows = attacked[(attacked["attack"] == "probe") & (attacked["group"] == "forget")]
    plain = rows[rows["control"] == ""].groupby(["position", "layer"])["top_true"].mean()
    assert {(position, layer): found[f"probe: {position}, layer {layer:.0f}"] for position, layer in plain.index} == plain.to_dict()
    assert len(found) == rows.groupby(["position", "layer", "control"]).ngroups  # controls under names of their own


def test_of_patching_there_is_the_depth_score_and_of_handled_weights_only_top1(attacked):
    long = results.of_attacks(attacked, cases.a_split(), seed=0, **WHERE)
    found = long[long["attack"] == "patch"].set_index("fact")["value"]
    expected = attacks.depth_score(attacked).dropna(subset="uds")
    assert found.tolist() == expected["uds"].tolist() and set(found.index) == set(expected["subject"] + " | " + expected["relation"])
    handled = long[long["attack"].str.startswith("noise")]
    assert len(handled) and handled["measure"].str.endswith(" top1").all()
    rows = attacked[(attacked["attack"] == "noise") & (attacked["group"] == "forget") & (attacked["format"] == "one_shot")]
    assert handled.loc[handled["measure"] == "forget top1", "value"].mean() == pytest.approx(rows["top_true"].mean())


def test_the_worst_case_is_that_of_the_headline(attacked):
    long = results.of_attacks(attacked, cases.a_split(), seed=0, **WHERE)
    try:
        expected = attacks.worst_case(attacked, cases.a_split())["recovered"].mean()
    except attacks.AttackError:
        expected = np.nan
    worst = long[(long["attack"] == "worst") & (long["measure"] == "forget top1")]["value"]
    assert np.isnan(expected) and worst.empty or worst.mean() == pytest.approx(expected)


def test_the_worst_case_stands_at_each_level_of_access_too(attacked):
    long = results.of_attacks(attacked, cases.a_split(), seed=0, **WHERE)
    found = long[long["measure"] == "forget top1"].groupby("attack")["value"].mean()
    expected = attacks.by_access(attacked, cases.a_split()).set_index("access")["recovered"]
    assert {name for name in found.index if name.startswith("worst: ")} == {f"worst: {access}" for access in expected.index}
    for access, value in expected.items():
        assert found[f"worst: {access}"] == pytest.approx(value)
    assert found["worst"] >= found["worst: training"]


def test_every_attack_and_measure_that_a_claim_needs_is_one_that_rows_can_have(evaluated, attacked):
    declared = claims.load()
    long = pd.concat([results.of_evaluation(evaluated, **WHERE), results.of_attacks(attacked, cases.a_split(), seed=0, **WHERE)])
    measures = set(long["measure"]) | {"soft prompt"}
    needed = {claim.named(claim.measure) for claim in declared.claims if claim.attack in ("none", "relearn lora", "probe")}
    assert needed <= measures, needed - measures
    assert set(results.ATTACKS) - {"relearn full"} < set(declared.attacks) and {"probe", "worst", "none"} < set(declared.attacks)


def test_several_edits_keep_their_names_and_estimates_their_means_and_flags(evaluated):
    other = evaluated.assign(seed=4, prob_edit=1.0)
    long = results.of_evaluations(pd.concat([evaluated, other]), {"lookup": "0"}, facts="athletes first-16", n=cases.N_FORGET)
    one = results.of_evaluation(evaluated, **WHERE)
    pd.testing.assert_frame_equal(long[long["seed"] == 3].reset_index(drop=True), one)
    flags = pd.DataFrame({"mask": ["lookup", "lookup"], "collapsed": [False, True]})
    table = results.estimates(long, flags).set_index("measure")
    means = one[one["measure"] == "edit probability"]["value"].mean()
    assert table.loc["edit probability", "value"] == pytest.approx((means + 1) / 2) and table.loc["edit probability", "n_seeds"] == 2
    assert table["collapsed"].all() and not results.estimates(long, flags.assign(collapsed=False))["collapsed"].any()


def test_by_format_takes_every_format_once_and_no_neighbour(evaluated):
    table = results.estimates(results.of_evaluation(evaluated, **WHERE), pd.DataFrame({"mask": ["lookup"], "collapsed": [False]}))
    for answer in ("edit", "forget"):
        formats = results.by_format(table, answer)["format"].tolist()
        assert sorted(formats) == sorted(set(evaluated.loc[evaluated["group"] == "forget", "format"]))
