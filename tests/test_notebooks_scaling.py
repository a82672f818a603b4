"""Notebook 11, executed in the quick profile, and once more on the rows that it left."""

import notebook_cases as cases
import pandas as pd
import pytest

from helpers import sizes, store

NOTEBOOK = "11_scaling"
SIZES, MASKS = [8, 24], ["MLP 0-1", "everything"]
ALL, FEW = "relearn lora", "relearn lora: 4 facts, lr 0.002, step 20 of 20"


def execute(out, **given):
    return cases.executed(NOTEBOOK, out, lookup="0", shown=4, **given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return execute(tmp_path_factory.mktemp("scaling"), sizes="24,8", masks=",".join(MASKS), effort="passes", rows="", seed=1)


@pytest.fixture(scope="module")
def found(folder):
    return pd.read_parquet(folder / "results.parquet")


def test_every_number_and_mask_has_its_edit_attack_and_cost_beside_the_unedited_model(found):
    key = ["n", "seed", "localization", "method", "attack", "fact", "measure"]
    assert not found.duplicated(key).any() and found["value"].notna().all() and set(found["seed"]) == {1}
    assert set(found["method"]) == {"base", sizes.method("passes")} and set(found["localization"]) == {"none", *MASKS}
    base = found[(found["localization"] == "none") & (found["measure"] == "forget top1")]
    assert base["value"].mean() >= 0.95  # the facts are ones that the model knows
    for (n, mask), part in found[found["localization"] != "none"].groupby(["n", "localization"]):
        assert set(part["facts"]) == {f"athletes first-{n}"} and {"none", ALL, FEW} <= set(part["attack"])
        edited = part[(part["attack"] == "none") & (part["measure"] == "edit top1")]
        assert len(edited) == n
        value = part[part["fact"] == ""].set_index(["attack", "measure"])["value"]["none"]
        assert value["seconds"] > 0 and value["norm"] > 0 and value["passes"] == pytest.approx(40 * 16 / 64, rel=0.1)
    assert sorted(found["n"].unique()) == SIZES


def test_sets_are_nested_and_half_of_the_smallest_is_the_small_attack(found):
    smallest, largest = (set(found[(found["n"] == n) & (found["measure"] == "edit top1")]["fact"]) for n in SIZES)
    assert smallest < largest
    read = found[(found["n"] == 8) & (found["measure"] == "forget probability")].set_index(["localization", "fact"])
    # four facts are half of eight: both attacks are the same training
    pd.testing.assert_series_equal(read[read["attack"] == ALL]["value"], read[read["attack"] == FEW]["value"], rtol=1e-4)


def test_checks_and_figures(folder):
    checks = cases.holds(folder)
    assert checks["after all edits and attacks the model answers as before, to the last bit"]
    assert any(claim.startswith("no edit collapses") for claim in checks) and any("square root of n" in claim for claim in checks)
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    by_effort = ("generalisation", "bargain", "same_facts", "side_effects", "relearning")
    assert figures == {f"{name}_passes" for name in by_effort} | {"cost", "efforts"}


def test_curves_are_drawn_from_packed_rows_when_there_are_some(folder, found, tmp_path):
    packed = tmp_path / "results" / "scaling.parquet"
    packed.parent.mkdir()
    store.pack([folder.parents[1]], packed)
    stored = sizes.stored(packed.parent)
    assert len(stored) == len(found) and not stored["stale"].any()
    first = pd.read_parquet(folder / "rows.parquet")
    again = pd.read_parquet(execute(tmp_path, sizes="8", masks="MLP 0-1", rows=str(packed.parent)) / "rows.parquet")
    drawn = [table[table["measured"] == "scaling"].set_index(sizes.BY)["value"].sort_index() for table in (first, again)]
    pd.testing.assert_series_equal(*drawn, atol=10**-store.DECIMALS)  # packed values are rounded
    assert again["source"].dropna().str.startswith("stored rows: 1 seeds, 8 to 24 facts").all()


def test_an_effort_that_is_not_there_is_named_before_anything_is_loaded(tmp_path):
    assert "there are steps, passes" in cases.refused(NOTEBOOK, tmp_path, effort="epochs")
