"""Notebook 06, executed in the quick profile: what its rows must be whatever the model, and what claims find in them."""

import shutil

import notebook_cases as cases
import numpy as np
import pandas as pd
import pytest
import torch

from helpers import claims
from helpers.attacks.depth import ABSENT
from helpers.attacks.headline import SPOKEN
from helpers.attacks.invented import CONTROL
from helpers.facts import DATA
from helpers.models import load_model

MODEL, MASKS = "tiny-gemma2", ["lookup", "random MLPs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run on a copy of the model, beside which lies one that knows nothing at all."""
    out = tmp_path_factory.mktemp("attacks")
    ignorant = shutil.copytree(shutil.copytree(DATA / "models" / MODEL, out / MODEL), out / f"{MODEL}-without")
    blank = load_model(str(ignorant))
    generator = torch.Generator().manual_seed(0)
    for weight in blank.hf.parameters():
        weight.data.normal_(0, 0.02, generator=generator)
    blank.hf.save_pretrained(ignorant)
    return cases.executed("06_attacks", out, model=str(out / MODEL), masks=",".join(MASKS), seed=1)


@pytest.fixture(scope="module")
def rows(folder):
    return pd.read_parquet(folder / "rows.parquet")


@pytest.fixture(scope="module")
def stored(folder):
    return pd.read_parquet(folder / "results.parquet")


def test_every_edit_is_measured_and_attacked_beside_the_unedited_model(stored):
    assert set(stored["localization"]) == {"none", ABSENT, *MASKS} and set(stored["seed"]) == {1} and set(stored["n"]) == {16}
    unedited = stored[stored["localization"] == "none"]
    assert set(unedited["attack"].str.split(":").str[0]) == {"none", "probe", "worst"}  # nothing is trained on it: probes are the ceiling
    base = unedited[(unedited["attack"] == "none") & (unedited["measure"] == "forget top1")]
    assert base["value"].mean() >= 0.9  # the facts are ones that the model knows
    for mask in MASKS:
        part = stored[stored["localization"] == mask]
        assert {"none", "probe", "worst", f"worst: {SPOKEN}"} <= set(part["attack"])
        assert not part.duplicated(["attack", "fact", "measure"]).any()


def test_relearning_begins_at_the_edited_model(rows):
    """Step 0 of the attack on the unseen half is what the edited model said of it."""
    one_shot = rows[(rows["measure"] == "attack") & (rows["format"] == "one_shot") & (rows["group"] == "forget") & (rows["control"] == "")]
    key = ["mask", "subject"]
    begin = one_shot[(one_shot["attack"] == "relearn lora") & (one_shot["step"] == 0)].set_index(key)["prob_true"]
    alone = one_shot[one_shot["attack"] == "none"].set_index(key)["prob_true"].reindex(begin.index)
    assert len(begin) == 8 * len(MASKS)
    pd.testing.assert_series_equal(begin, alone, check_exact=False, atol=1e-4)


def test_a_model_without_the_facts_is_taught_beside_the_edited_ones(folder, rows, stored):
    anew = rows[rows["mask"] == ABSENT]
    assert set(anew["control"]) == {ABSENT} and set(anew["group"]) == {"forget"}
    relearned = anew[anew["attack"] == "relearn lora"]
    edited = rows[(rows["mask"] == MASKS[0]) & (rows["attack"] == "relearn lora") & (rows["group"] == "forget") & (rows["control"] == "")]
    assert set(relearned["setting"]) == set(edited["setting"]) and set(relearned["subject"]) == set(edited["subject"])
    assert cases.holds(folder)["the model trained without the facts does not know them (guessing, give or take .1)"]
    kept = stored[(stored["localization"] == ABSENT) & stored["attack"].str.contains("relearn lora.*step 10 of 10$") & (stored["measure"] == "forget top1")]
    ended = relearned[(relearned["step"] == relearned["steps"]) & (relearned["format"] == "one_shot")]
    assert kept["value"].tolist() == ended["top_true"].tolist() and not stored[stored["localization"] == ABSENT]["attack"].str.startswith("worst").any()


def test_depth_is_scored_against_invented_names_and_against_the_model_without_the_facts(rows):
    scores = rows[rows["measure"] == "depth score"].groupby(["reference", "localization"])["uds"]
    assert set(scores.groups) == {(reference, mask) for reference in (CONTROL, ABSENT) for mask in MASKS}
    assert (scores.min() >= 0).all() and (scores.max() <= 1).all() and not np.allclose(scores.mean()[CONTROL], scores.mean()[ABSENT])


def test_the_worst_case_lies_between_no_attack_and_the_ceiling(rows):
    worst = rows[rows["measure"] == "worst case"]
    assert set(worst["mask"]) == set(MASKS)
    assert ((worst["untouched"] <= worst["recovered"]) & (worst["recovered"] <= 1)).all()
    spoken = worst[worst["access"] == SPOKEN].set_index("mask")["recovered"]
    for access in ("answers", "training", "weights"):
        assert (worst[worst["access"] == access].set_index("mask")["recovered"] <= spoken).all()


def test_what_is_shown_over_seeds_are_means_of_the_stored_rows(rows, stored):
    shown = rows[rows["measure"] == "over seeds"].set_index(["label", "mask"])["value"]
    for mask in MASKS:
        own = stored[stored["localization"] == mask]
        worst = own[(own["attack"] == f"worst: {SPOKEN}") & (own["measure"] == "forget top1")]["value"].mean()
        probed = own[(own["attack"] == "probe") & (own["measure"] == "probe_true top1")]["value"].mean()
        assert shown["worst case, model answers", mask] == pytest.approx(worst)
        assert shown["probe, upper layers", mask] == pytest.approx(probed)


def test_checks_that_hold_for_every_model(folder):
    checks = cases.holds(folder)
    assert checks["after all edits and attacks the model answers as before, to the last bit"]
    assert "the masks hold different weights, so that comparing them means something" in checks
    assert any(claim.startswith("no edit collapses") for claim in checks)


def test_claims_read_the_rows_and_none_is_about_so_few_facts(rows, stored):
    declared = claims.load()
    judged = claims.verdict(declared, stored)
    assert set(judged["verdict"]) == {"undecided"}
    assert "verdict" not in set(rows["measure"])  # claims of the family are about other facts than these 16


def test_figures(folder):
    assert {"asking", "weights", "relearning", "probes", "worst", "seeds"} <= {path.stem for path in (folder / "figures").glob("*.png")}


def test_all_facts_with_one_answer(tmp_path):
    """Edited on one half and read on the other; no probe knows the answer, and no worst case can be told from always saying it."""
    facts = cases.few_athletes(tmp_path / "few.csv")
    folder = cases.executed("06_attacks", tmp_path, facts=facts, forget="answer-basketball", to="golf", masks="lookup")
    rows, stored = (pd.read_parquet(folder / f"{name}.parquet") for name in ("rows", "results"))
    attacked = rows[(rows["measure"] == "attack") & (rows["control"] == "") & (rows["mask"] == "lookup")]
    assert {"prompt", "relearn lora", "patch"} <= set(attacked["attack"]) and not {"probe", "worst"} & set(stored["attack"])
    assert set(attacked.loc[attacked["group"] == "forget", "edit"]) == {"golf"} and set(stored["n"]) == {12}
    unseen = set(attacked.loc[(attacked["attack"] == "relearn lora") & (attacked["group"] == "forget"), "subject"])
    measured = stored[(stored["attack"] == "none") & (stored["measure"] == "forget top1")]["fact"].str.split(" | ", regex=False).str[0]
    assert len(unseen) == 12 and set(measured) == unseen
    assert not rows["measure"].isin(["worst case", "verdict"]).any()


@pytest.mark.parametrize("given, said", [({"method": "prune"}, "there are finetune, unlearn, sequential"), ({"masks": "luckup"}, "there are lookup")])
def test_wrong_names_stop_with_those_there_are(given, said, tmp_path):
    assert said in cases.refused("06_attacks", tmp_path, **given)
