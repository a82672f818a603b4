"""Edits of n facts: efforts that agree at the reference, costs as the edit has them, each value once, and powers of n as made."""

from __future__ import annotations

import attacks_cases as cases
import pandas as pd
import pytest

from helpers import claims, results, sizes, stats
from helpers.sizes import SizeError
from helpers.unlearning.training import Settings


def long(n: int, mask: str, values: dict[str, float], measure: str = "mcq_edit top1", seed: int = 0, method: str = sizes.method("steps"),
         run: str = "a") -> pd.DataFrame:
    where = {"facts": f"athletes first-{n}", "n": n, "seed": seed, "localization": mask, "method": method, "attack": "none"}
    rows = [{**where, "run": run, "model": "m", "fact": fact, "measure": measure, "value": value} for fact, value in values.items()]
    return pd.DataFrame(rows)


def test_numbers_are_read_in_order_and_others_are_refused():
    assert sizes.parse("64, 16,256") == [16, 64, 256]
    for text in ("", "16,", "1", "16,16", "many", "-4", "2.5"):
        with pytest.raises(SizeError, match="whole numbers of at least 2"):
            sizes.parse(text)


def test_efforts_are_the_same_at_the_reference_and_passes_stay_equal_elsewhere():
    given = Settings(steps=48, batch=32)
    assert sizes.trained_for(given, sizes.REFERENCE, "passes") == sizes.trained_for(given, 512, "steps") == given
    passes = [sizes.trained_for(given, n, "passes").steps * given.batch / n for n in (16, 64, 512)]
    assert passes == [24, 24, 24] and sizes.trained_for(given, 1, "passes").steps == 1
    with pytest.raises(SizeError, match="steps, passes"):
        sizes.trained_for(given, 16, "epochs")


def test_costs_are_those_of_the_edit_in_the_form_of_results():
    edit, model = cases.edit(), cases.known()
    total = sum(p.numel() for p in model.hf.parameters())
    rows = sizes.cost(edit, 2.5, total, True, facts="athletes first-16", n=16, seed=3, localization="lookup", method=sizes.method("steps"))
    assert list(rows) == results.COLUMNS and set(rows["fact"]) == {""}
    value = rows.set_index("measure")["value"]
    assert value["seconds"] == 2.5 and value["collapsed"] == 1 and value["norm"] == edit.norm
    assert value["steps"] == 30 and value["passes"] == 30 * 32 / 16
    assert value["share"] == sum(edit.values[name].numel() for name in edit.values) / total
    declared = claims.load()
    assert not {claim.method for claim in declared.claims} & set(map(sizes.method, sizes.EFFORTS))  # no claim reads such rows


def test_the_unedited_model_counts_once_however_many_runs_measure_it():
    base = [long(16, "none", {"x": 0.0, "y": 1.0}, method="base", run=run) for run in "ab"]
    edited = [long(16, mask, {"x": 1.0, "y": 1.0}, run=run) for mask, run in (("lookup", "a"), ("everything", "b"))]
    foreign = [long(16, "lookup", {"x": 0.0}).assign(**other) for other in ({"model": "other"}, {"facts": "world first-16"})]
    rows = pd.concat([*base, *edited, *foreign])
    mine = sizes.found(rows, "m", "athletes")
    assert (mine["localization"] == "none").sum() == 2 and len(mine) == 6
    table = sizes.estimates(mine).set_index("mask")
    assert table["value"].to_dict() == {"none": 0.5, "lookup": 1.0, "everything": 1.0}
    assert table.loc["none", "low"] == pytest.approx(stats.summary(base[0])["low"].item())


def test_both_efforts_stand_apart_and_a_collapse_marks_its_own_point():
    made = (("none", "base", 0.0), ("lookup", sizes.method("steps"), 0.2), ("lookup", sizes.method("passes"), 0.8))
    each = [(n, seed) for n in (16, 64) for seed in (0, 1)]
    rows = pd.concat([long(n, mask, {"x": value}, method=method, seed=seed) for n, seed in each for mask, method, value in made])
    lost = [long(n, "lookup", {"": float((n, seed) == (64, 1))}, "collapsed", seed, sizes.method("passes")) for n, seed in each]
    table = sizes.estimates(pd.concat([rows, *lost]))
    shown = table[table["measure"] == "mcq_edit top1"].set_index(["effort", "n", "mask"])
    expected = {("steps", "none"): 0.0, ("steps", "lookup"): 0.2, ("passes", "none"): 0.0, ("passes", "lookup"): 0.8}
    assert shown["value"].to_dict() == {(effort, n, mask): value for n in (16, 64) for (effort, mask), value in expected.items()}
    assert shown.index[shown["collapsed"]].tolist() == [("passes", 64, "lookup")]
    assert sizes.estimates(rows[rows["method"] == "base"]).empty


def test_same_facts_are_those_of_the_smallest_set():
    few, many = long(2, "lookup", {"x": 1.0, "y": 1.0}), long(3, "lookup", {"x": 0.0, "y": 1.0, "z": 1.0})
    same = sizes.same_facts(pd.concat([few, many, long(3, "lookup", {"": 2.0}, "text_loss")]))
    assert set(same["fact"]) == {"x", "y"} and same.groupby("n")["value"].mean().to_dict() == {2: 1.0, 3: 0.5}


def test_growth_finds_the_power_that_made_the_values():
    made = [(mask, power, n) for mask, power in (("a", 0.5), ("b", 0.0)) for n in (16, 64, 256)]
    table = pd.DataFrame([{"effort": "steps", "mask": mask, "n": n, "value": 3 * n**power} for mask, power, n in made])
    assert sizes.growth(table)["power"].tolist() == pytest.approx([0.5, 0.0])
    assert sizes.growth(table[table["n"] == 16])["power"].isna().all()


def test_stored_rows_are_none_where_there_are_no_files(tmp_path):
    assert sizes.stored(tmp_path / "absent").empty
