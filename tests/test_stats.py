"""Statistics: coverage and level by simulation, exact tests against brute force, other libraries, degenerate input."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint, proportion_effectsize

from helpers import stats


def table(values: dict[str, np.ndarray], **columns) -> pd.DataFrame:
    """Rows of facts × seeds matrices by mask."""
    rows = [{"localization": mask, "fact": f"fact {i:03d}", "seed": j, "value": x} | columns
            for mask, matrix in values.items() for (i, j), x in np.ndenumerate(matrix)]
    return pd.DataFrame(rows)


def answers(p: float, n_facts: int = 64, n_seeds: int = 3, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((n_facts, n_seeds)) < p).astype(float)


# Intervals

@pytest.mark.parametrize("p", [0.2, 0.35, 0.5, 0.65, 0.8])
def test_bootstrap_covers_a_proportion(p):
    samples = (np.random.default_rng(int(100 * p)).random((1500, 64)) < p).astype(float)
    low, high = stats.bca(samples, resamples=2000)
    assert 0.93 <= ((low <= p) & (p <= high)).mean() <= 0.97


def test_bootstrap_covers_a_paired_difference():
    rng = np.random.default_rng(5)
    easy = rng.random((1500, 64))  # the same fact is easy under both masks
    differences = (easy < 0.7).astype(float) - (0.5 * easy + 0.5 * rng.random((1500, 64)) < 0.4)
    truth = 0.7 - 0.32  # P(0.5 u + 0.5 v < 0.4) = 0.8² / 2
    low, high = stats.bca(differences, resamples=2000)
    assert 0.93 <= ((low <= truth) & (truth <= high)).mean() <= 0.97


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(1).random(40) ** 3
    ours = stats.bca(values, resamples=20_000)
    theirs = bootstrap((values,), np.mean, method="BCa", n_resamples=20_000, rng=2).confidence_interval
    assert np.allclose(ours, theirs, atol=0.003)
    assert stats.bca(values) == stats.bca(values)


@pytest.mark.parametrize("seed_sd", [0.0, 0.03, 0.1])
def test_interval_over_facts_and_seeds_covers(seed_sd):
    rng, hits = np.random.default_rng(3), 0
    for _ in range(1200):
        values = rng.normal(0, 0.3, (64, 1)) + rng.normal(0, seed_sd, (1, 5)) + rng.normal(0, 0.2, (64, 5))
        low, high = stats.crossed(values)
        hits += low <= 0 <= high
    assert 0.93 <= hits / 1200 <= 0.975


def test_interval_over_seeds_is_the_t_interval():
    spread = stats.over_seeds([0.2, 0.3, 0.7])
    half = 4.302653 * np.std([0.2, 0.3, 0.7], ddof=1) / np.sqrt(3)
    assert spread["high"] - spread["low"] == pytest.approx(2 * half, rel=1e-6)
    assert (spread["min"], spread["max"], spread["n"]) == (0.2, 0.7, 3)


def test_pairing_narrows_the_interval():
    easy, noise = np.linspace(0, 0.8, 64)[:, None], np.random.default_rng(0).random((2, 64, 3)) * 0.1
    rows = table({"a": easy + noise[0] + 0.1, "b": easy + noise[1]})
    row = stats.compare(rows, "a", ["b"]).iloc[0]
    single = stats.summary(rows, ["localization"])
    assert row["facts_high"] - row["facts_low"] < 0.2 * (single["facts_high"] - single["facts_low"]).min()
    assert row["value"] == pytest.approx(0.1, abs=0.02) and row["mean_a"] - row["mean_b"] == pytest.approx(row["value"])


def test_order_of_rows_does_not_matter():
    rows = pd.concat([table({"a": answers(0.7), "b": answers(0.4, seed=1)}, model=model) for model in ("one", "two")])
    shuffled = rows.sample(frac=1, random_state=3)
    one, two = (stats.compare(each, "a", ["b"], by=["model"]).sort_values("model", ignore_index=True) for each in (rows, shuffled))
    pd.testing.assert_frame_equal(one, two)


# Tests

def brute_force(differences) -> float:
    observed = abs(sum(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences))) for signs in product((-1, 1), repeat=len(differences))]
    return float(np.mean([total >= observed - 1e-9 for total in sums]))


@pytest.mark.parametrize("differences", [
    [0.3, -0.1, 0.25, 0.7, 0.0, 0.05], [1, 1, -1, 1, 0, 1, 1], [0.5], [0.1, 0.2, 0.3, -0.6], [-0.2, -0.4, -0.9, -0.1, -0.3, -0.7, 0.8, -0.05],
])
def test_exact_permutation_equals_brute_force(differences):
    p, how = stats.sign_flips(differences)
    assert p == pytest.approx(brute_force(differences)) and how.startswith("exact")


def test_random_flips_approach_the_exact_p(monkeypatch):
    differences = np.random.default_rng(0).normal(0.3, 1, 14)
    exact, _ = stats.sign_flips(differences)
    monkeypatch.setattr(stats, "EXACT_UP_TO", 0)
    sampled, how = stats.sign_flips(differences)
    assert sampled == pytest.approx(exact, abs=0.01) and "sign flips" in how


@pytest.mark.parametrize("n, draw", [
    (10, lambda rng, n: rng.standard_t(2, n)), (48, lambda rng, n: rng.standard_t(2, n)), (40, lambda rng, n: rng.choice([-1, 0, 0, 1], n)),
    (24, lambda rng, n: rng.choice([-1, -0.5, 0, 0.5, 1], n)),
])
def test_permutation_test_keeps_its_level(n, draw):
    rng = np.random.default_rng(n)
    p = np.array([stats.sign_flips(draw(rng, n), flips=800, seed=i)[0] for i in range(800)])
    assert (p <= 0.05).mean() <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / 800)
    assert (p <= 0.05).mean() >= 0.015


def test_holm_agrees_with_statsmodels():
    p = np.random.default_rng(0).random(12) ** 3
    rows = pd.DataFrame({"p": p, "family": ["x"] * 5 + ["y"] * 7}, index=range(20, 32))
    found = stats.holm(rows, ["family"])
    for part in (slice(0, 5), slice(5, 12)):
        assert np.allclose(found["p_holm"].iloc[part], multipletests(p[part], method="holm")[1])
    assert np.allclose(stats.holm(rows)["p_holm"], multipletests(p, method="holm")[1])
    assert list(found.index) == list(rows.index)


def test_holm_counts_comparisons_that_were_not_run():
    found = stats.holm(pd.DataFrame({"p": [0.01, np.nan, 0.02]}))["p_holm"]
    assert found.tolist()[::2] == pytest.approx([0.03, 0.04]) and np.isnan(found[1])
    assert stats.holm(pd.DataFrame({"p": []}))["p_holm"].empty


# Effect sizes and power

def test_cohens_h_agrees_with_statsmodels():
    assert stats.cohens_h(0.8, 0.35) == pytest.approx(proportion_effectsize(0.8, 0.35))


def test_power_agrees_with_statsmodels_and_simulation():
    assert stats.power(30, 0.2, 0.5) == pytest.approx(TTestPower().power(0.4, 30, 0.05), abs=1e-6)
    rng = np.random.default_rng(0)
    differences = rng.normal(0.2, 0.5, (4000, 30))
    t = differences.mean(1) / (differences.std(1, ddof=1) / np.sqrt(30))
    assert (abs(t) > 2.045230).mean() == pytest.approx(stats.power(30, 0.2, 0.5), abs=0.025)


def test_power_with_seeds_agrees_with_simulation():
    rng, found = np.random.default_rng(1), 0
    for _ in range(1500):
        values = rng.normal(0.2, 0.5, (64, 1)) + rng.normal(0, 0.06, (1, 4))
        low, high = stats.crossed(values)
        found += low > 0 or high < 0
    assert found / 1500 == pytest.approx(stats.power(64, 0.2, 0.5, 4, 0.06), abs=0.05)


def test_power_for_paired_proportions_agrees_with_the_permutation_test():
    rng, sd = np.random.default_rng(2), stats.paired_sd(0.7, 0.5)
    draws = (rng.random((600, 64)) < 0.7).astype(float) - (rng.random((600, 64)) < 0.5)
    assert draws.std() == pytest.approx(sd, abs=0.01)
    expected = stats.power(64, 0.2, sd)
    intervals = [stats.crossed(row[:, None]) for row in draws]
    assert np.mean([low > 0 or high < 0 for low, high in intervals]) == pytest.approx(expected, abs=0.05)
    exact = np.mean([stats.sign_flips(row)[0] <= 0.05 for row in draws])
    assert expected - 0.1 <= exact <= expected  # discrete, so a little less than its level allows


def test_facts_needed_is_the_smallest_number():
    n = stats.facts_needed(0.1, 0.5)
    assert stats.power(n, 0.1, 0.5) >= 0.8 > stats.power(n - 1, 0.1, 0.5)
    assert stats.facts_needed(0.1, 0.5, alpha=0.05 / 20) > n
    assert stats.facts_needed(5.0, 0.1) == 2
    with pytest.raises(ValueError, match="add seeds"):
        stats.facts_needed(0.1, 0.5, n_seeds=3, seed_sd=0.17)


def test_impossible_designs_are_refused():
    with pytest.raises(ValueError, match="cannot have a correlation"):
        stats.paired_sd(0.9, 0.2, correlation=0.9)
    assert stats.paired_sd(0.5, 0.5, correlation=1.0) == 0
    with pytest.raises(ValueError, match="two seeds"):
        stats.power(64, 0.1, 0.5, n_seeds=1, seed_sd=0.1)
    assert stats.power(64, 0.1, 0.0) == 1.0 and stats.power(64, 0.0, 0.0) == 0.0


def test_majority_is_learned_on_one_half_and_read_on_the_other():
    assert stats.majority(["football"] * 3 + ["golf"]) == {"answer": "football", "share": 0.75, "n": 4}
    assert stats.majority(["b", "a"], read_on=["a", "a", "b", "c"]) == {"answer": "a", "share": 0.5, "n": 4}
    with pytest.raises(ValueError, match="no answers"):
        stats.majority([])


# Degenerate input

def test_all_right_is_not_known_exactly():
    row = stats.summary(table({"a": np.ones((64, 3))}), ["localization"]).iloc[0]
    low, high = proportion_confint(64, 64, method="beta")
    assert (row["low"], row["high"]) == (pytest.approx(low), 1.0) and "exact bound" in row["note"]
    same = stats.compare(table({"a": np.ones((64, 3)), "b": np.ones((64, 3))}), "a", ["b"]).iloc[0]
    assert same["value"] == 0 and same["p"] == 1 and same["low"] == pytest.approx(low - 1) and same["high"] == pytest.approx(1 - low)


def test_intervals_stop_at_the_bounds_of_shares_and_of_their_differences():
    few = {"a": np.array([[0.9, 0.2]]), "b": np.array([[0.3, 1.0]])}  # one value a seed: a t interval of two is wider than possible
    single, row = stats.summary(table(few), ["localization"]), stats.compare(table(few), "a", ["b"]).iloc[0]
    assert (single[["low", "seeds_low"]] == 0).all(axis=None) and (single[["high", "seeds_high"]] == 1).all(axis=None)
    assert (row["low"], row["high"], row["seeds_low"], row["seeds_high"]) == (-1, 1, -1, 1)
    for free in ({"bounded": False}, {"rows": "text_loss"}, {"rows": "norm"}):
        rows = table(few, measure=free.pop("rows", "other"))
        single, row = stats.summary(rows, ["localization"], **free).iloc[0], stats.compare(rows, "a", ["b"], **free).iloc[0]
        assert single["low"] < -1 and single["high"] > 1 and row["low"] < -2 and row["high"] > 2
        assert np.isnan(row["h"])


def test_all_equal_without_bounds_says_so():
    row = stats.summary(table({"a": np.full((30, 2), 3.5)})).iloc[0]
    assert row["low"] == row["high"] == row["value"] == 3.5 and "no spread" in row["note"]


def test_one_fact_one_seed_and_none():
    one = stats.summary(table({"a": answers(0.5, 1, 1)}), null=0.0).iloc[0]
    assert one[["low", "high", "facts_low", "seeds_low", "p"]].isna().all() and "one fact" in one["note"] and "one seed" in one["note"]
    seed = stats.summary(table({"a": answers(0.5, 64, 1)})).iloc[0]
    assert seed["low"] < seed["value"] < seed["high"] and np.isnan(seed["seeds_low"]) and seed["n_seeds"] == 1
    none = stats.summary(table({"a": answers(0.5)}).iloc[:0]).iloc[0]
    assert none["n_facts"] == 0 and np.isnan(none["value"]) and none["note"] == "no facts"


def test_missing_values_are_counted_never_filled():
    values = answers(0.5)
    values[3, 1] = np.nan
    row = stats.summary(table({"a": values})).iloc[0]
    assert (row["n_facts"], row["missing"]) == (63, 1) and "1 facts without a value" in row["note"]
    assert row["value"] == pytest.approx(np.delete(values, 3, 0).mean())
    rows = table({"a": answers(0.5), "b": answers(0.5, 60, seed=2), "c": np.full((64, 3), np.nan)})
    both = stats.compare(rows, "a", ["b", "c", "absent"])
    assert both["n_facts"].tolist() == [60, 0, 0] and both["missing"].tolist() == [4, 64, 0]
    assert "64 facts without a value" in both["note"][1] and "no rows of absent" in both["note"][2]
    assert both.loc[1:, ["value", "p", "low", "h", "d"]].isna().all().all()


@pytest.mark.parametrize("fact", ["fact", ["facts", "fact"]])
@pytest.mark.parametrize("a, b", [("absent", "a"), ("a", "absent"), ("absent", "gone")])
def test_a_side_that_was_not_run_is_named_whichever_it_is(a, b, fact):
    rows = pd.DataFrame({"localization": "a", "facts": "f", "seed": 0, "fact": list("xyz"), "value": 1.0})
    table = stats.compare(rows, a, [b], fact=fact)
    assert table["n_facts"].item() == 0 and np.isnan(table["value"].item()) and "no rows of" in table["note"].item()


def test_a_measure_of_the_whole_set_is_tested_over_seeds():
    rows = pd.DataFrame([{"localization": mask, "fact": None, "seed": s, "value": x} for mask, xs in
                         {"a": [2.0, 2.1, 1.9], "b": [2.5, 2.7, 2.45]}.items() for s, x in enumerate(xs)])
    row = stats.compare(rows, "a", ["b"]).iloc[0]
    assert row["test"] == "t over seeds" and row["p"] < 0.02 and row["low"] == pytest.approx(row["seeds_low"]) and row["n_facts"] == 1
    assert np.isnan(row["facts_low"]) and np.isnan(row["h"])


def test_seeds_that_only_one_has_are_left_out():
    rows = table({"a": answers(0.8), "b": answers(0.3, n_seeds=2)})
    row = stats.compare(rows, "a", ["b"]).iloc[0]
    assert row["n_seeds"] == 2 and "seeds 2 not in both" in row["note"]


def test_contradicting_rows_are_refused():
    rows = pd.concat([table({"a": answers(0.5)}, run=name) for name in ("r1", "r2")])
    with pytest.raises(ValueError, match=r"several values to a fact and seed.*differ in run"):
        stats.summary(rows, ["localization"])


def test_few_facts_are_called_rough():
    assert "rough" in stats.summary(table({"a": answers(0.5, 8)})).iloc[0]["note"]


def test_a_row_without_a_seed_never_lands_in_the_column_of_another():
    rows = pd.DataFrame({"fact": ["a", "b", "a"], "seed": [0, 0, np.nan], "value": [1.0, 2.0, 3.0]})
    table = stats.matrix(rows)
    assert table[0.0].tolist() == [1.0, 2.0] and table.shape == (2, 2)
