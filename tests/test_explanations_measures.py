"""Which rows explanations are judged by: the measures declared beforehand, without windows that wreck their model."""

import pandas as pd
import pytest
from test_explanations import DISSOCIATED, WORLDS, scores, world

from helpers import claims
from helpers.results import costs
from helpers.explanations import MEASURES, ExplanationError, by_measure, curves, explain, verdict, wrecked

LAYER = scores(DISSOCIATED)


def long(effect=WORLDS["lookup alone"][0]) -> pd.DataFrame:
    """Long results: multiple choice by `effect`, relearning the other way round, and costs that leave the model whole."""
    rows = world(effect, LAYER).assign(measure="mcq_edit top1", attack="none")
    relearned = rows.assign(measure="forget top1", attack="relearn lora", value=1 - rows["value"])
    kept = [rows.assign(measure=name, value=value) for name, value in (("retain top1", 0.9), ("mcq_retain top1", 0.8), ("text_loss", 2.0))]
    base = [table[table["localization"] == "MLP 0-2"].assign(localization="none", layers="") for table in kept]
    return pd.concat([rows, relearned, *kept, *base], ignore_index=True)


def spoiled(rows: pd.DataFrame, measure: str, change: float, model: str, *windows: str) -> pd.DataFrame:
    here = (rows["measure"] == measure) & (rows["model"] == model) & rows["localization"].isin(windows)
    return rows.assign(value=rows["value"] + change * here)


def test_the_measure_that_decides_is_the_one_claims_compare_windows_by():
    declared = next(claim for claim in claims.load().claims if claim.id == "window-anywhere")
    first = MEASURES[0]
    assert (declared.named(declared.measure), declared.attack, declared.direction) == (first.measure, first.attack, first.better)


def test_each_measure_is_explained_by_its_own_rows_and_sense():
    rows = long()
    table = by_measure(rows, LAYER, resamples=100)
    first, second, third = MEASURES
    assert list(table["label"].unique()) == [first.label, second.label]
    alone = explain(first.of(rows), LAYER, resamples=100)
    one, two = (table[table["label"] == label].reset_index(drop=True) for label in (first.label, second.label))
    pd.testing.assert_frame_equal(one.drop(columns="label"), alone)
    assert two["value"].tolist() == pytest.approx(one["value"].tolist())  # what relearning takes is what multiple choice had
    assert verdict(one)["verdict"] == "lookup"
    assert set(table.attrs["left_out"]) == {third.label} and "no rows of MLP windows" in table.attrs["left_out"][third.label]


@pytest.mark.parametrize("measure, change", [("retain top1", -0.06), ("mcq_retain top1", -0.11), ("text_loss", 0.11)])
def test_a_window_that_wrecks_the_model_is_left_out_and_named(measure, change):
    rows = long()
    assert wrecked(rows).empty and wrecked(spoiled(rows, measure, change / 2, "late", "MLP 1-3")).empty
    bad = spoiled(rows, measure, change, "late", "MLP 1-3")
    assert list(wrecked(bad).index) == [("late", "MLP 1-3")] and measure.removesuffix(" top1") in wrecked(bad).iloc[0]
    table = by_measure(bad, LAYER, resamples=100)
    without = rows[(rows["model"] != "late") | (rows["localization"] != "MLP 1-3")]
    pd.testing.assert_frame_equal(table, by_measure(without, LAYER, resamples=100))
    assert "late, MLP 1-3" in table.attrs["left_out"] and (table["n_windows"] == 29).all()


def test_costs_are_means_over_facts_and_seeds_and_name_any_place_that_wrecks_the_model():
    rows = long()
    bad = spoiled(rows, "retain top1", -0.06, "late", "MLP 1-3").replace({"localization": {"MLP 1-3": "lookup"}})
    table = costs(bad, ["model", "localization"])
    assert table.index[table["collapse"] != ""].tolist() == [("late", "lookup")] == list(wrecked(bad).index)
    retained = bad[(bad["measure"] == "retain top1") & (bad["attack"] == "none") & (bad["model"] == "late") & (bad["localization"] == "lookup")]
    assert table.loc[("late", "lookup"), "retain"] == pytest.approx(retained["value"].mean())
    assert by_measure(bad, LAYER, resamples=100).attrs["left_out"].keys() == by_measure(
        rows[(rows["model"] != "late") | (rows["localization"] != "MLP 1-3")], LAYER, resamples=100).attrs["left_out"].keys()


def test_a_model_with_too_few_whole_windows_is_left_out_and_the_others_stay():
    windows = [f"MLP {start}-{start + 2}" for start in range(6)]
    bad = spoiled(long(), "retain top1", -0.5, "late", *windows)
    table = by_measure(bad, LAYER, resamples=100)
    assert "4 windows that leave it whole" in table.attrs["left_out"]["late"] and (table["n_models"] == 2).all()
    nothing = by_measure(spoiled(bad, "retain top1", -0.5, "early", *windows).query("model != 'middle'"), LAYER)
    assert nothing.empty and {"late", "early", MEASURES[0].label} <= set(nothing.attrs["left_out"])


def test_curves_are_means_of_windows_by_their_first_layer():
    rows = spoiled(long(), "retain top1", -0.5, "late", "MLP 4-6")
    table = curves(rows)
    here = table[(table["model"] == "late") & (table["label"] == MEASURES[1].label)]
    assert here["start"].tolist() == list(range(10)) and here["collapsed"].tolist() == [start == 4 for start in range(10)]
    means = MEASURES[1].of(rows)[lambda t: t["model"] == "late"].groupby("layers", sort=False)["value"].mean()
    assert here.set_index("layers")["value"].to_dict() == pytest.approx(means.to_dict())
    assert (here["low"] < here["value"]).all() and (here["value"] < here["high"]).all()
    with pytest.raises(ExplanationError, match="no rows of MLP windows"):
        curves(rows[rows["measure"] == "retain top1"])
