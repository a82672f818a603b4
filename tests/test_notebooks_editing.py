"""The notebooks on editing and unlearning, executed through papermill in the quick profile; their result rows are asserted."""

import notebook_cases as cases
import pandas as pd
import pytest

from helpers import claims


def execute(name: str, out, **given) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """Rows, results and checks by claim."""
    folder = cases.executed(name, out, **given)
    return pd.read_parquet(folder / "rows.parquet"), pd.read_parquet(folder / "results.parquet"), cases.holds(folder)


def means(rows: pd.DataFrame) -> pd.Series:
    return rows.groupby(["localization", "method", "measure"])["value"].mean()


def well_formed(found: pd.DataFrame) -> bool:
    """Claims can read the results, and no fact has two values."""
    key = ["facts", "seed", "localization", "method", "attack", "fact", "measure"]
    return set(claims.COLUMNS) <= set(found) and not found.duplicated(key).any() and found["value"].notna().all()


def test_editing(tmp_path):
    rows, found, checks = execute("04_localized_editing", tmp_path)
    assert well_formed(found) and set(found["n"]) == {16}
    value = means(found)
    assert value["none", "base", "forget top1"] >= 0.95 and value["none", "base", "edit top1"] <= 0.1
    edited = [name for name in found["localization"].unique() if name != "none"]
    assert len(edited) == 3
    for name in edited:  # what was trained is taken in; what else happens is a result
        assert value[name, "finetune", "edit top1"] >= 0.8 and value[name, "finetune", "forget top1"] <= 0.2
    path = rows[(rows["group"] == "trajectory") & (rows["measure"] == "norm")].groupby("mask")["value"]
    assert (path.first() == 0).all() and (path.last() > 0).all()
    level = rows[(rows["group"] == "at equal success") & (rows["measure"] == "edit")]["value"]
    assert level.max() - level.min() < 1e-6
    assert next(holds for claim, holds in checks.items() if claim.startswith("outside the `with` block the model is unchanged"))


def test_editing_other_facts_with_masks_of_ones_own(tmp_path):
    given = {"facts": "world", "forget": "first-8", "masks": "random MLPs, MLP 0-1", "preset": "tuned", "lookup": "0,1"}
    _, found, _ = execute("04_localized_editing", tmp_path, **given)
    assert well_formed(found) and set(found["localization"]) == {"none", "random MLPs", "MLP 0-1"}
    assert set(found["facts"]) == {"world first-8"} and set(found.loc[found["localization"] == "MLP 0-1", "layers"]) == {"0 1"}


def test_editing_all_facts_with_one_answer(tmp_path):
    """One half is trained on and the other read, as notebooks 05 and 06 do, so that rows of all three may stand side by side."""
    facts = cases.few_athletes(tmp_path / "few.csv")
    rows, found, _ = execute("04_localized_editing", tmp_path, facts=facts, forget="answer-basketball", masks="everything", lookup="0")
    assert well_formed(found) and set(found["n"]) == {12} and set(found["facts"]) == {"few answer-basketball"}
    assert found.loc[found["measure"] == "forget top1"].groupby("localization")["fact"].nunique().eq(12).all()
    assert means(found)["everything", "finetune", "edit top1"] >= 0.5  # of athletes that training never saw


def test_unlearning(tmp_path):
    rows, found, checks = execute("05_localized_unlearning", tmp_path, trials=2)  # made here, although some are stored
    assert well_formed(found)
    trials = rows[rows["group"] == "trial"].groupby("objective")
    assert trials.size().nunique() == 1 and trials["learning_rate"].apply(tuple).nunique() == 1  # the same draws for all
    assert trials["chosen"].sum().eq(1).all()
    value = means(found[found["facts"] == "athletes answer-basketball"])
    assert value["none", "base", "forget top1"] >= 0.95
    everything = value["everything"]
    assert everything["unlearn", "forget probability"] <= 0.5 and everything["finetune", "edit top1"] >= 0.5
    sequence = found[(found["method"] == "sequential, 2 slices") & (found["measure"] == "edit top1")]
    assert sequence["fact"].nunique() == 16 and sequence["value"].mean() >= 0.5
    assert any(claim.startswith("the first slice survives") for claim in checks)


@pytest.mark.parametrize("given, said", [({"answer": "chess"}, "answers are"), ({"to": "basketball"}, "is the true answer"), ({"masks": "luckup"}, "there are lookup")])
def test_what_is_not_there_is_named(given, said, tmp_path):
    assert said in cases.refused("05_localized_unlearning", tmp_path, **given)


@pytest.mark.parametrize("name", ["04_localized_editing", "05_localized_unlearning", "06_attacks", "09_mechanism_or_depth", "11_scaling"])
def test_settings_that_were_not_published_are_refused_before_the_model_is_loaded(name, tmp_path):
    """The model does not even exist."""
    assert "nothing published for task 'world first-64'" in cases.refused(name, tmp_path, model="nobody/gemma-2-9b", preset="paper", facts="world", **(
        {"forget": "first-64"} if name[:2] in ("04", "06", "09") else {"profile": "standard"}))
