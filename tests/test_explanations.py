"""Mechanism or depth: simulated worlds with a known answer, exact agreement with least squares, and what is refused."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf

from helpers.explanations import ExplanationError, concentration, design, explain, layer_scores, verdict
from helpers.localization.fact_lookup import Lookup

LAYERS, COUNT, FACTS, SEEDS = 12, 3, 40, 3
DISSOCIATED = {"early": 0, "middle": 5, "late": 8}  # the layer at which each model looks facts up


def scores(peaks: dict[str, int], width: float = 1.0) -> pd.DataFrame:
    bump = lambda peak: np.exp(-(((np.arange(LAYERS) - peak) / width) ** 2))
    return pd.concat([pd.DataFrame({"model": model, "layer": range(LAYERS), "score": bump(peak)}) for model, peak in peaks.items()])


def world(effect, layer: pd.DataFrame, seed: int = 0, windows_sd: float = 0.0, noise: float = 0.3, n_seeds: int = SEEDS) -> pd.DataFrame:
    """Long results in which a window is as good as `effect(depth, lookup)` says, with chance of facts, seeds and windows."""
    rng, found = np.random.default_rng(seed), []
    for m, (model, part) in enumerate(layer.groupby("model", sort=False)):
        share = part["score"].to_numpy() / part["score"].sum()
        facts = rng.normal(0, 0.2, FACTS)
        for start in range(LAYERS - COUNT + 1):
            window = list(range(start, start + COUNT))
            mean = 0.3 + 0.1 * m + effect(1 - start / (LAYERS - COUNT), share[window].sum()) + rng.normal(0, windows_sd)
            for s in range(n_seeds):
                value = mean + facts + rng.normal(0, 0.02) + rng.normal(0, noise, FACTS)
                where = {"model": model, "localization": f"MLP {start}-{window[-1]}", "layers": " ".join(map(str, window)), "seed": s}
                found.append(pd.DataFrame({**where, "fact": [f"fact {i}" for i in range(FACTS)], "value": value}))
    return pd.concat(found, ignore_index=True)


def judge(effect, layer: pd.DataFrame, **options) -> dict[str, str]:
    return verdict(explain(world(effect, layer, **options), layer, resamples=400))


# Worlds with a known answer ---------------------------------------------------------------------------


WORLDS = {
    "lookup alone": (lambda depth, lookup: 0.5 * lookup, "lookup"),
    "depth alone": (lambda depth, lookup: 0.5 * depth, "depth"),
    "both": (lambda depth, lookup: 0.3 * depth + 0.3 * lookup, "both"),
    "neither": (lambda depth, lookup: 0.0, "open"),
    "the wrong way round": (lambda depth, lookup: -0.5 * lookup, "open"),
}


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_explanation_that_made_the_world_survives(name, seed):
    effect, expected = WORLDS[name]
    assert judge(effect, scores(DISSOCIATED), seed=seed)["verdict"] == expected


@pytest.mark.parametrize("effect, wrong", [(lambda depth, lookup: 0.8 * depth**3, "lookup"),
                                           (lambda depth, lookup: 0.5 * min(lookup, 0.3) / 0.3, "depth")])
def test_a_curve_of_one_explanation_is_not_taken_for_the_other(effect, wrong):
    """The rival is out of proportion: beside it as a straight line the wrong slope may be clear of 0."""
    found = [judge(effect, scores(DISSOCIATED), seed=seed)["verdict"] for seed in range(5)]
    assert wrong not in found and "both" not in found


def test_the_curve_is_what_keeps_a_rival_from_borrowing():
    layer = scores({"one": 0, "two": 1, "three": 2})
    table = explain(world(lambda depth, lookup: depth**3, layer), layer, resamples=400).set_index(["explanation", "rival"])
    assert table.loc[("lookup", "straight"), "low"] > 0 > table.loc[("lookup", "curved"), "windows_low"]


@pytest.mark.parametrize("name", ["lookup alone", "depth alone", "both"])
def test_where_lookup_lies_first_in_every_model_it_stays_open(name):
    share = 1.0 * np.arange(LAYERS, 0, -1)
    layer = pd.concat([pd.DataFrame({"model": model, "layer": range(LAYERS), "score": share}) for model in ("one", "two", "three")])
    found = judge(WORLDS[name][0], layer)
    assert found["verdict"] == "open" and "go together (variance inflation inf" in found["reason"]
    near = layer.assign(score=layer["score"] + np.tile(np.random.default_rng(0).normal(0, 0.3, LAYERS), 3))
    found = judge(WORLDS[name][0], near)
    assert found["verdict"] == "open" and "go together" in found["reason"]


def test_one_dissociating_model_is_what_tells_them_apart():
    """Two models that look facts up first leave it open or nearly so; a third that does so in the middle decides."""
    effect = WORLDS["lookup alone"][0]
    together, apart = scores({"one": 0, "two": 0}, width=4.0), scores({"one": 0, "two": 0, "three": 7}, width=4.0)
    assert judge(effect, together)["verdict"] == "open"
    assert judge(effect, apart)["verdict"] == "lookup"


def test_windows_that_differ_for_no_reason_rarely_make_an_explanation():
    """Facts and seeds alone would find a slope in every such world: the windows differ, but by chance."""
    layer, found, facts_only = scores(DISSOCIATED), Counter(), 0
    for seed in range(20):
        table = explain(world(lambda depth, lookup: 0.0, layer, seed, windows_sd=0.3, noise=0.05), layer, resamples=100)
        found[verdict(table)["verdict"]] += 1
        facts_only += (table["low"] > 0).any()
    assert found["open"] >= 18 and facts_only >= 12


def test_an_open_verdict_names_the_interval_that_keeps_it_open():
    """Beside a straight rival the slope is clear of 0; what keeps it open is said, not hidden behind the clear one."""
    layer = scores({"one": 0, "two": 1, "three": 2})
    table = explain(world(lambda depth, lookup: depth**3, layer), layer, resamples=400)
    curved = table.set_index(["explanation", "rival"]).loc[("lookup", "curved")]
    found = verdict(table)
    assert f"[{curved['windows_low']:+.3f}, {curved['windows_high']:+.3f}] over windows beside its rival and that squared" in found["reason"] \
        or f"[{curved['low']:+.3f}, {curved['high']:+.3f}] over facts and seeds beside its rival and that squared" in found["reason"]


def test_concentration_is_one_windows_share_of_the_spread():
    one = pd.DataFrame({"model": "one", "lookup": [1.0, 0, 0, 0, 0, 0, 0, 0]})
    even = pd.DataFrame({"model": "two", "lookup": [1.0, 0] * 4})
    found = concentration(pd.concat([one, even], ignore_index=True))
    assert found["one"] == pytest.approx(7 / 8) and found["two"] == pytest.approx(1 / 8)


def test_two_seeds_leave_it_open():
    assert judge(WORLDS["lookup alone"][0], scores(DISSOCIATED), n_seeds=2) == {"verdict": "open", "reason": "2 of 3 seeds"}


def test_a_margin_has_to_be_passed():
    layer = scores(DISSOCIATED)
    table = explain(world(WORLDS["lookup alone"][0], layer), layer, resamples=400)
    slope = table.set_index(["explanation", "rival"]).loc[("lookup", "straight"), "value"]
    assert verdict(table, 0.3 * slope)["verdict"] == "lookup" and verdict(table, 1.1 * slope)["verdict"] == "open"


# Slopes -----------------------------------------------------------------------------------------------


def test_slopes_are_those_of_least_squares_over_all_rows():
    layer = scores(DISSOCIATED)
    rows = world(WORLDS["both"][0], layer)
    table = explain(rows, layer, resamples=100).set_index(["explanation", "rival"])
    places = design(rows, layer)
    for name in ("depth", "lookup"):
        spread = np.sqrt(((places[name] - places.groupby("model")[name].transform("mean")) ** 2).mean())
        places[name] /= spread
    every = rows.merge(places, on=["model", "localization"])
    beside, alone = (smf.ols(f"value ~ {terms} + C(model)", every).fit().params for terms in ("lookup + depth", "lookup"))
    assert table.loc[("lookup", "straight"), "value"] == pytest.approx(beside["lookup"], abs=1e-9)
    assert table.loc[("depth", "straight"), "value"] == pytest.approx(beside["depth"], abs=1e-9)
    assert table.loc[("lookup - depth", "straight"), "value"] == pytest.approx(beside["lookup"] - beside["depth"], abs=1e-9)
    assert table.loc[("lookup", "ignored"), "value"] == pytest.approx(alone["lookup"], abs=1e-9)
    centred = places.assign(square=(places["depth"] - places.groupby("model")["depth"].transform("mean")) ** 2)
    curved = smf.ols("value ~ lookup + depth + square + C(model)", rows.merge(centred, on=["model", "localization"])).fit().params
    assert table.loc[("lookup", "curved"), "value"] == pytest.approx(curved["lookup"], abs=1e-9)


def test_variance_inflation_is_that_of_the_correlation_within_models():
    layer = scores(DISSOCIATED)
    rows = world(WORLDS["both"][0], layer)
    places = design(rows, layer)
    inner = places[["depth", "lookup"]] - places.groupby("model")[["depth", "lookup"]].transform("mean")
    table = explain(rows, layer, resamples=100).set_index(["explanation", "rival"])
    assert table.loc[("lookup", "straight"), "vif"] == pytest.approx(1 / (1 - inner.corr().iloc[0, 1] ** 2))
    assert (table.xs("ignored", level="rival")["vif"] == 1).all()


def test_the_interval_over_windows_is_that_of_least_squares_on_their_means():
    layer = scores(DISSOCIATED)
    rows = world(WORLDS["both"][0], layer, windows_sd=0.1)
    places = design(rows, layer)
    means = rows.groupby(["model", "localization"], as_index=False)["value"].mean().merge(places)
    spread = np.sqrt(((places["lookup"] - places.groupby("model")["lookup"].transform("mean")) ** 2).mean())
    fitted = smf.ols("value ~ lookup + depth + C(model)", means).fit(cov_type="HC3", use_t=True).conf_int().loc["lookup"] * spread
    row = explain(rows, layer, resamples=100).set_index(["explanation", "rival"]).loc[("lookup", "straight")]
    assert (row["windows_low"], row["windows_high"]) == pytest.approx(tuple(fitted), abs=1e-9)


def test_levels_of_models_and_the_sense_of_the_measure_do_not_matter():
    layer = scores(DISSOCIATED)
    rows = world(WORLDS["both"][0], layer)
    table = explain(rows, layer, resamples=100)
    moved = rows.assign(value=rows["value"] + rows["model"].map({"early": 5.0, "middle": -3.0, "late": 0.0}))
    numbers = ["value", "low", "high", "windows_low", "windows_high", "vif"]
    assert np.allclose(explain(moved, layer, resamples=100)[numbers], table[numbers])
    assert np.allclose(explain(rows.assign(value=-rows["value"]), layer, better="lower", resamples=100)[numbers], table[numbers])


def test_a_fact_that_lacks_a_value_somewhere_is_left_out_everywhere():
    layer = scores(DISSOCIATED)
    rows = world(WORLDS["both"][0], layer)
    gap = rows[~((rows["fact"] == "fact 3") & (rows["model"] == "late") & (rows["localization"] == "MLP 2-4") & (rows["seed"] == 1))]
    table, expected = explain(gap, layer, resamples=100), explain(rows[rows["fact"] != "fact 3"], layer, resamples=100)
    assert (table["n_facts"] == FACTS - 1).all() and (table["missing"] == 1).all()
    assert np.allclose(table["value"], expected["value"])


def test_a_seed_that_one_model_lacks_is_left_out_everywhere():
    layer = scores(DISSOCIATED)
    rows = world(WORLDS["both"][0], layer)
    gap = rows[~((rows["model"] == "late") & (rows["seed"] == 2))]
    pd.testing.assert_frame_equal(explain(gap, layer, resamples=100), explain(rows[rows["seed"] < 2], layer, resamples=100))


# Places and scores ------------------------------------------------------------------------------------


def test_places_of_windows_by_hand():
    layer = pd.DataFrame({"model": "m", "layer": range(7), "score": [1.0, 3, 0, 0, 4, 0, 2]})
    windows = [("m", f"MLP {s}-{s + 1}", f"{s} {s + 1}") for s in (3, 0, 5, 1, 2, 4)]
    rows = pd.DataFrame(windows, columns=["model", "localization", "layers"])
    rows.loc[6] = ("m", "lookup", "0 1")
    table = design(rows, layer)
    assert table["start"].tolist() == [0, 1, 2, 3, 4, 5]
    assert table["depth"].tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])
    assert table["lookup"].tolist() == pytest.approx([0.4, 0.3, 0, 0.4, 0.4, 0.2])


def test_scores_of_layers_from_either_kind_of_evidence():
    lookup = lambda evidence, **tables: Lookup((), "", pd.DataFrame(evidence), (), (), tables)
    patched = lookup({"layer": [0, 1, 2], "difference": [-0.3, 0.1, 0.0]})
    assert layer_scores("m", patched)["score"].tolist() == [0.3, 0.1, 0.0]
    probes = pd.DataFrame({"position": ["name"] * 4 + ["last"], "layer": [0, 0, 1, 2, 0], "accuracy": [0.3, 0.5, 0.7, 0.6, 0.9]})
    read = lookup({"layer": [0, 1, 2], "name_accuracy": [0.7, 0.6, 0.9]}, probes=probes)
    assert layer_scores("m", read)["score"].tolist() == pytest.approx([0.3, 0.0, 0.3])
    assert layer_scores("m", patched, [2])["score"].tolist() == [0.3, 0.1, 0.0]  # evidence counts where there is some
    assert layer_scores("m", lookup({"layer": [0, 1, 2], "difference": [0.0] * 3}), [0, 1])["score"].tolist() == [1, 1, 0]


# Refused ----------------------------------------------------------------------------------------------


def test_what_cannot_be_regressed_is_refused_by_name():
    layer = scores(DISSOCIATED)
    rows = world(WORLDS["neither"][0], layer)
    with pytest.raises(ExplanationError, match="late: no lookup scores; there are scores of early, middle"):
        explain(rows, layer[layer["model"] != "late"])
    with pytest.raises(ExplanationError, match="early: lookup scores must be at least 0, and not all 0"):
        explain(rows, layer.assign(score=0.0))
    with pytest.raises(ExplanationError, match="early: 2 windows of 3 MLPs; needed are 5 or more"):
        explain(rows[rows["localization"].isin(["MLP 0-2", "MLP 1-3"])], layer)
    with pytest.raises(ExplanationError, match="no rows of MLP windows"):
        explain(rows.assign(localization="lookup"), layer)
    with pytest.raises(ExplanationError, match="better='more': higher or lower"):
        explain(rows, layer, better="more")
    with pytest.raises(ExplanationError, match="lookup is the same in all windows"):
        explain(rows, layer.assign(score=1.0))
    with pytest.raises(ValueError, match="several values to a fact and seed.*measure"):
        explain(pd.concat([rows.assign(measure="mcq_edit top1"), rows.assign(measure="qa_edit top1")]), layer)
    others = rows.assign(fact=rows["fact"].where(rows["model"] != "late", "other " + rows["fact"]))
    with pytest.raises(ExplanationError, match="no fact has a value in every window"):
        explain(others, layer)
