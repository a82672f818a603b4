"""Stability, agreement and faithfulness on made-up scores, and on passes written out by hand."""

import itertools

import localization_cases as cases
import numpy as np
import pandas as pd
import pytest
import torch

from helpers import tracing
from helpers.localization.counterfactual import pairs as make_pairs
from helpers.localization.evidence import (
    agreement,
    area,
    component_scores,
    curve,
    faithfulness,
    intervals,
    regions,
    replaced,
    resamples,
    stability,
    top,
)
from helpers.masks import mask, size
from helpers.selection import greedy, whole_units
from helpers.tracing import Intervention

GAPS = np.array([1.0, 2.0, 4.0, 1.0, 2.0, 2.0, 3.0, 1.0])


def table(effects):
    """A path-patching table: component → score, or one for each of the eight facts."""
    rows = [
        {"component": name, "subject": f"s{i}", "ld_corrupt": 0.5, "ld_clean": 0.5 + gap, "ld_patched": 0.5 + e * gap}
        for name, scores in effects.items()
        for i, (gap, e) in enumerate(zip(GAPS, np.broadcast_to(scores, GAPS.shape)))
    ]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def scores():
    swing = np.array([1, -1, 0.5, 1, -1, 1, -1, -1])
    return table({"mlp 0": 0.5, "mlp 1": -0.3 + 0.1 * swing, "mlp 2": 0.4 * swing, "head 0.1": -0.02 * swing})


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(cases.model("llama"), cases.facts(24))


def test_score_is_a_ratio_of_means():
    uneven = table({"mlp 0": [1, 0, 0, 0, 0, 0, 0, 0], "mlp 1": [0, 0, 1, 0, 0, 0, 0, 0]})
    assert component_scores(uneven).to_dict() == {"mlp 0": pytest.approx(1 / 16), "mlp 1": pytest.approx(4 / 16)}
    plain = uneven.assign(score=[1.0] * 8 + [2.0] * 7 + [float("nan")])[["component", "score"]]
    assert component_scores(plain).to_dict() == {"mlp 0": 1, "mlp 1": 2}  # facts without a score are left out
    assert component_scores(uneven, "ld_clean")["mlp 0"] == pytest.approx(2.5)
    shares = pd.DataFrame({"component": ["mlp 0"] * 2, "effect": [1.0, 2.0], "total": [2.0, 10.0]})
    assert component_scores(shares)["mlp 0"] == pytest.approx(3 / 12)


def test_resamples_are_paired_and_seeded(scores):
    drawn = resamples(scores, samples=50, seed=1)
    assert drawn.equals(resamples(scores, samples=50, seed=1))
    assert not drawn.equals(resamples(scores, samples=50, seed=2))
    np.testing.assert_allclose(drawn["mlp 0"], 0.5)  # the same for every fact: nothing to vary
    twice = pd.concat([scores, scores[scores["component"] == "mlp 2"].assign(component="mlp 9")])
    both = resamples(twice, samples=50, seed=1)
    assert (both["mlp 2"] == both["mlp 9"]).all()


def test_intervals(scores):
    found = intervals(scores, samples=500).set_index("component")
    assert found["nonzero"].to_dict() == {"mlp 0": True, "mlp 1": True, "mlp 2": False, "head 0.1": False}
    assert ((found["low"] <= found["score"]) & (found["score"] <= found["high"])).all()
    wide, narrow = (intervals(scores, level=level) for level in (0.99, 0.5))
    assert ((wide["high"] - wide["low"])[1:] > (narrow["high"] - narrow["low"])[1:]).all()


def test_stability(scores):
    found = stability(scores, 2, samples=100, seed=3)
    assert found.equals(stability(scores, 2, samples=100, seed=3)) and len(found) == 100
    assert found["chosen"].map(lambda chosen: chosen[0] == "mlp 0").all() and found["spearman"].between(-1, 1).all()
    by_hand = found["chosen"].map(lambda c: len({*c} & {"mlp 0", "mlp 1"}) / len({*c} | {"mlp 0", "mlp 1"}))
    assert (found["jaccard"] == by_hand).all() and (found["jaccard"] == 1).any()
    certain = table({"mlp 0": 0.5, "mlp 1": 0.4, "mlp 2": 0.1})
    assert (stability(certain, 2, samples=20)[["spearman", "jaccard"]] == 1).all().all()
    model = cases.model("llama")
    chosen = stability(certain, lambda s: greedy(model, whole_units(s), 5000).units, samples=5)["chosen"]
    assert (chosen == ("mlp 0", "mlp 1")).all()


def test_agreement():
    one = pd.Series({"a": 4.0, "b": -3.0, "c": 2.0, "d": 1.0, "only here": 9.0})
    two = pd.Series({"d": 1.0, "c": 3.0, "b": 2.0, "a": 4.0})
    found = agreement({"one": one, "two": two, "three": two}, 2)
    assert found[["a", "b"]].values.tolist() == [["one", "two"], ["one", "three"], ["two", "three"]]
    assert found["n"].tolist() == [4, 4, 4] and found["spearman"].tolist() == pytest.approx([0.8, 0.8, 1])
    assert found["jaccard"].tolist() == pytest.approx([1 / 3, 1 / 3, 1])
    assert top(one, 2) == ["only here", "a"]
    with pytest.raises(ValueError, match="'one' and 'x' score no component in common"):
        agreement({"one": one, "x": pd.Series({"z": 1.0})})


def test_regions():
    model = cases.model("llama")
    chosen = {"mine": mask(model, ["mlp 0", "attn 2"]), "other": ["mlp 1", "head 2.1"]}
    found = regions(model, chosen, lookup=[0, 1], extraction=[2]).set_index("choice")
    whole = size(model, "mlp 0") + size(model, "attn 2")
    assert found.loc["mine", "lookup"] == size(model, "mlp 0") / whole
    assert found.loc["mine", "extraction"] == size(model, "attn 2") / whole
    assert found.loc["mine", ["lookup_mlps", "extraction_mlps", "elsewhere"]].tolist() == [0.5, 0, 0]
    assert found["n_parameters"].tolist() == [whole, size(model, ["mlp 1", "head 2.1"])]


RANKING = ["mlp 1", "head 2.0", "attn 0", "head 2.3", "mlp 0"]


@pytest.mark.parametrize("direction, fill", [("knock_out", "resample"), ("knock_out", "mean"), ("restore", "resample")])
def test_faithfulness_equals_traced_passes(pairs, direction, fill):
    model = cases.model("llama")
    keys = [("mlp_out", 1), ("mlp_out", 0), ("head", 2), ("attn_out", 0)]
    traces = {"clean": tracing.read(model, pairs.clean, keys), "corrupt": tracing.read(model, pairs.corrupted, keys)}
    base, other = ("clean", "corrupt") if direction == "knock_out" else ("corrupt", "clean")
    value = traces[other].activations
    if fill == "mean":
        value = {key: traces["clean"][key][pairs.clean.mask.bool()].mean(0) for key in keys}
    found = faithfulness(model, pairs, {"mine": RANKING}, direction, fill, counts=(0, 1, 4), random=0, batch_size=5)
    edits = [
        Intervention("mlp_out", 1, "all", value["mlp_out", 1]),
        Intervention("head", 2, "all", value["head", 2][..., [0], :], heads=[0]),
        Intervention("attn_out", 0, "all", value["attn_out", 0]),
        Intervention("head", 2, "all", value["head", 2][..., [3], :], heads=[3]),
    ]
    prompts = pairs.clean if base == "clean" else pairs.corrupted
    for k in (0, 1, 4):
        logits = tracing.intervene(model, prompts, edits[:k]).logits.gather(1, pairs.answers)
        rows = found[found["k"] == k]
        assert rows["fact"].tolist() == list(range(len(pairs)))
        patched = torch.tensor(rows["ld_patched"].to_numpy())
        torch.testing.assert_close(patched, (logits[:, 0] - logits[:, 1]).double(), atol=1e-4, rtol=1e-4)
        if k == 0:
            assert (rows["ld_patched"] == rows[f"ld_{base}"]).all()


def test_curves_and_areas(pairs):
    model = cases.model("llama")
    every = [str(c) for c in (*model.components("attn"), *model.components("mlp"))]
    found = faithfulness(model, pairs, {"forwards": every, "backwards": every[::-1]}, random=2, seed=4)
    assert found.equals(faithfulness(model, pairs, {"forwards": every, "backwards": every[::-1]}, random=2, seed=4))
    curves = curve(found)
    assert list(dict.fromkeys(curves["ranking"])) == ["forwards", "backwards", "random 0", "random 1"]
    assert sorted(set(curves["k"])) == [0, 1, 2, 4, 6]
    ends = curves[curves["k"].isin([0, 6])].pivot(index="ranking", columns="k", values="kept")
    assert np.allclose(ends[0], 1) and np.allclose(ends[6], ends[6].iloc[0], atol=1e-5)  # with all, order is no matter
    areas = area(found, samples=50).set_index("ranking")
    assert list(areas.index) == ["forwards", "backwards", "random"]
    for name in ("forwards", "backwards"):
        one = curves[curves["ranking"] == name]
        by_hand = sum(
            (b - a) * (y + z) / 2
            for (a, y), (b, z) in itertools.pairwise(zip(one["share"], one["kept"]))
        )
        assert areas.loc[name, "area"] == pytest.approx(by_hand)
    drawn = [area(found[found["ranking"] == f"random {i}"].assign(ranking=f"one {i}"), samples=5)["area"][0] for i in range(2)]
    random = areas.loc["random"]  # its range is over rankings, not over facts
    assert random["area"] == pytest.approx(np.mean(drawn)) and min(drawn) <= random["low"] <= random["high"] <= max(drawn)
    assert (areas["low"] <= areas["high"]).all() and areas.equals(area(found, samples=50).set_index("ranking"))


def test_a_choice_is_replaced_as_a_whole(pairs):
    model = cases.model("llama")
    every = [str(c) for c in (*model.components("attn"), *model.components("mlp"))]
    choices = {"one": ["mlp 1"], "two": ["attn 0", "mlp 2"], "other": ["attn 1"]}
    found = replaced(model, pairs, choices).set_index("choice")
    assert list(found.index) == list(choices) and found["n_units"].tolist() == [1, 2, 1]
    for name, units in choices.items():
        order = [*units, *(u for u in every if u not in units)]
        kept = curve(faithfulness(model, pairs, {name: order}, counts=(len(units),), random=0))["kept"][0]
        assert found.loc[name, "kept"] == pytest.approx(kept) and found.loc[name, "low"] <= kept <= found.loc[name, "high"]


ERRORS = [
    (dict(rankings={}), "rankings none: each must order the same components"),
    (dict(rankings={"a": ["mlp 0"], "b": ["mlp 1"]}), "rankings a, b: each must order the same"),
    (dict(rankings={"a": ["mlp 0", "mlp 0"]}), "every one once"),
    (dict(rankings={"a": ["mlp 0"]}, direction="ablate"), "direction 'ablate'"),
    (dict(rankings={"a": ["mlp 0"]}, fill="zero"), "fill 'zero'"),
]


@pytest.mark.parametrize("arguments, message", ERRORS)
def test_faithfulness_errors(pairs, arguments, message):
    with pytest.raises(ValueError, match=message):
        faithfulness(cases.model("llama"), pairs, **arguments)


def test_tables_that_do_not_fit(scores):
    with pytest.raises(ValueError, match="components have 8 to 16 rows: keep one row for each component and fact"):
        component_scores(pd.concat([scores, scores[scores["component"] == "mlp 0"]]))
    mixed = scores.copy()
    mixed.loc[0, "subject"] = "someone else"
    with pytest.raises(ValueError, match="of different facts"):
        component_scores(mixed)
    with pytest.raises(ValueError, match="a column `component`"):
        component_scores(scores.drop(columns="component"))
