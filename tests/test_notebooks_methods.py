"""Notebooks 07, 08 and 10, executed in the quick profile on a few facts of a user's own; their stored rows and checks are asserted."""

import csv
import json
import shutil

import notebook_cases as cases
import pandas as pd
import pytest

from helpers import facts
from helpers.checkpoints import BUNDLED
from helpers.models import load_model

MODEL, SPEC = "tiny-gemma2", "first-4"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model and the countries of which it knows the continent: few facts in few formats, so that each notebook is quick."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(BUNDLED / MODEL, folder / "my-model")
    with open(folder / "continents.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "relation", "answer"])
        writer.writerows([f.subject, "lies_in", f.answer] for f in facts.load("world") if f.relation.name == "country_continent")
    (folder / "continents.yaml").write_text(
        "lies_in:\n  cloze: '{subject} is a country that lies in'\n  question: 'Which continent is {subject} part of?'\n")
    return folder


def execute(name: str, home, **given):
    """The folder of the run, its rows, its results or None, and its checks by claim."""
    folder = cases.executed(name, home / "runs", facts=str(home / "continents.csv"), forget=SPEC, **given)
    found = folder / "results.parquet"
    return folder, pd.read_parquet(folder / "rows.parquet"), pd.read_parquet(found) if found.exists() else None, cases.holds(folder)


def means(found: pd.DataFrame) -> pd.Series:
    return found.groupby(["method", "localization", "measure"])["value"].mean()


def holds(checks: dict[str, bool], start: str) -> bool:
    return next(holds for claim, holds in checks.items() if claim.startswith(start))


def test_weight_masks(home):
    _, rows, found, checks = execute("07_weight_masks", home)
    assert holds(checks, "outside the `with` block the model is unchanged")
    base = means(found)["base", "none"]
    assert base["forget top1"] >= 0.95 and "mcq_retain probability" in base and "text_loss" in base
    # the same numbers of deletions in every way, but where a learned mask has too few weights below 1
    rungs = rows[rows["group"] == "rung"].groupby("method")["deleted"].apply(lambda n: tuple(map(int, n)))
    whole = rungs["random"]
    assert len(whole) == len(set(whole)) == 2 and all(set(ns) <= set(whole) for ns in rungs)
    assert rungs["magnitude"] == rungs["saliency"] == whole and len(rungs) >= 8
    named = found["method"].str.extract(r"^weight mask, (?P<way>.*), n = (?P<n>\d+)$").dropna().astype({"n": int})
    assert set(named.groupby("way")["n"].unique().apply(lambda n: tuple(sorted(n))).items()) == {(way, tuple(sorted(ns))) for way, ns in rungs.items()}
    # counted in the mask itself: exactly n weights are deleted, all of them in the lookup MLPs
    place = found.loc[(found["method"] == "weight mask") & (found["localization"] == "lookup"), "layers"].iloc[0].split()
    deleted = rows[(rows["measure"] == "deleted by layer") & (rows["place"] == "lookup")].filter(regex=r"^layer \d+$").iloc[0]
    assert int(deleted.sum()) in whole and set(deleted.index[deleted > 0]) <= {f"layer {layer}" for layer in place}
    share = found[found["measure"].str.fullmatch(r"(mcq_)?(forget|retain) (probability|top1)")]
    assert share["value"].between(0, 1).all() and not share.duplicated(["method", "localization", "fact", "measure"]).any()
    assert {"forget probability", "retain probability", "mcq_forget top1", "mcq_retain top1"} <= set(share["measure"])


def test_baselines(home):
    _, rows, found, checks = execute("08_baselines", home)
    assert holds(checks, "outside the `with` block the model is unchanged")
    trained = {"fine-tuning, lookup", "fine-tuning, everything"}
    methods = {*trained, "LoRA, everything", "ROME", "MEMIT", "AlphaEdit"}
    assert set(found["method"]) == {"base", *methods}
    # one set of rows a method: the same facts and measures as for the unedited model, once each
    key = ["fact", "measure"]
    sets = {method: part.set_index(key).index for method, part in found.groupby("method")}
    assert all(index.is_unique and set(index) == set(sets["base"]) for index in sets.values())
    assert set(found["localization"]) == {"none", "lookup", "everything"} and found["value"].notna().all()
    value = means(found)
    assert value["base", "none", "edit top1"] <= 0.1 and value["base", "none", "forget top1"] >= 0.95
    for method in trained:
        assert value[method, method.removeprefix("fine-tuning, "), "edit top1"] >= 0.8
    costs = rows[rows["measure"] == "cost"].set_index("method")
    assert set(costs.index) == methods and (costs["norm"] > 0).all()  # each of them changed something


def test_real_models(home):
    """A model in a folder of the user's own, from the estimate to the exported checkpoint."""
    folder, rows, _, checks = execute("10_real_models", home, model=str(home / "my-model"), preset="")
    for start in ("the weights take what was estimated", "the small file gives the same answers", "the exported model gives the same answers"):
        assert holds(checks, start), start
    answers = rows[(rows["measure"] == "evaluation") & (rows["group"] == "forget") & (rows["format"] == "one_shot")]
    edited = answers.groupby("method")["top_edit"].mean()
    assert edited["base"] <= 0.1 and edited["finetune"] >= 0.8
    assert json.loads((folder / "edited" / "config.json").read_text())["model_type"] == "gemma2"
    assert load_model(str(folder / "edited")).n_layers == load_model(str(home / "my-model")).n_layers
