"""Notebook 09, executed in the quick profile: its own windows, stored rows of a world with a known answer, and a model whose recipe
says that its first block holds no facts (a copy of the bundled one, so that nothing is trained here)."""

import json
import shutil

import notebook_cases as cases
import numpy as np
import pandas as pd
import pytest

from helpers import presets, store
from helpers.explanations import MEASURES
from helpers.facts import DATA

MODEL, COPIED, SEED, N_FACTS = "tiny-gemma2", "tiny-llama3", 1, 16


def recipe(name: str) -> dict:
    return json.loads((DATA / "models" / name / "recipe.json").read_text())


def by_depth(n_layers: int) -> pd.DataFrame:
    """Stored rows of windows of two MLPs in which only the first layer matters, and of the unedited model."""
    rng, tables = np.random.default_rng(0), []
    where = {"run": "a" * 12, "model": MODEL, "facts": "athletes first-64", "n": 64, "setting": "", "attack": "none",
             "notebook": "06_attacks", "commit": "", "code": "", "started": "", "machine": "", "parameters": "{}", "uses": "{}",
             "profile": "", "minutes": 1.0, "memory_gb": 1.0}
    for seed in range(3):
        kept = {"retain top1": 0.9, "mcq_retain top1": 0.9, "text_loss": 2.0}
        for start in range(n_layers - 1):
            for name, value in {"mcq_edit top1": 0.9 - 0.8 * start / (n_layers - 2), **kept}.items():
                values = value + (rng.normal(0, 0.02, 12) if name == "mcq_edit top1" else np.zeros(12))
                own = {"localization": f"MLP {start}-{start + 1}", "layers": f"{start} {start + 1}", "method": "finetune", "seed": seed}
                tables.append(pd.DataFrame({**where, **own, "measure": name, "fact": [f"fact {i}" for i in range(12)], "value": values}))
        tables += [pd.DataFrame({**where, "localization": "none", "layers": "", "method": "base", "seed": seed, "measure": name,
                                 "fact": ["fact 0"], "value": value}) for name, value in kept.items()]
    return pd.concat(tables)[store.PACKED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("explanations")
    late = out / "late"
    shutil.copytree(DATA / "models" / COPIED, late)
    (late / "recipe.json").write_text(json.dumps(recipe(COPIED) | {"frozen_blocks": 1}))
    by_depth(recipe(MODEL)["n_layers"]).to_parquet(out / "stored.parquet", index=False)
    return cases.executed("09_mechanism_or_depth", out, seed=SEED, rows=str(out / "stored.parquet"), dissociating=str(late), lookup="0,1,2,3,4")


@pytest.fixture(scope="module")
def rows(folder):
    return pd.read_parquet(folder / "rows.parquet")


@pytest.fixture(scope="module")
def made(folder):
    return pd.read_parquet(folder / "results.parquet")


@pytest.fixture(scope="module")
def checks(folder):
    return cases.checks(folder)


def test_windows_and_parts_are_edited_measured_and_relearned(made):
    own = made[made["model"] == MODEL]
    windows = own.loc[own["localization"].str.startswith("MLP "), "localization"].unique()
    assert len(windows) >= 5
    assert {"none", "gate", "up", "down", "gate + up + down"} <= set(own["localization"])
    assert set(own["facts"]) == {"athletes first-16"} and set(own["seed"]) == {SEED}
    assert not made.duplicated(["model", "method", "localization", "seed", "attack", "fact", "measure"]).any()
    for name, method in own.loc[own["localization"] != "none", ["localization", "method"]].drop_duplicates().itertuples(index=False):
        part = own[(own["localization"] == name) & (own["method"] == method)]
        assert (part["measure"][part["attack"] == "none"] == MEASURES[0].measure).sum() == N_FACTS
        relearned = part[part["attack"].str.startswith("relearn lora") & (part["measure"] == "forget top1")]
        assert len(relearned) == N_FACTS / 2


def test_windows_with_settings_of_their_own_are_edited_with_those_of_lookup_too(made, rows):
    settings = {name: presets.settings("tuned", MODEL, "athletes", name, presets.SMALL) for name in ("lookup", *made["localization"].unique())}
    differ = {name for name in settings if name.startswith("MLP ") and settings[name] != settings["lookup"]}
    again = made[made["method"] == "finetune, settings of lookup"]
    assert set(again["localization"]) == differ & set(made.loc[made["model"] == MODEL, "localization"]) != set()
    shown = rows[(rows["measure"] == "window") & (rows["label"] == MEASURES[0].label)].set_index(["localization", "settings"])["value"].unstack()
    same = ~shown.index.isin(differ)
    assert shown[same].nunique(axis=1).eq(1).all() and len(shown) == made.loc[made["localization"].isin(shown.index), "localization"].nunique()


def test_the_whole_mlp_is_the_window_of_the_lookup_mlps(made, checks):
    """Two names for the same weights: the same edit, and so the same rows."""
    layers = checks["fact lookup makes a choice"]["observed"].split(", ")
    own = made[(made["model"] == MODEL) & (made["measure"] == "edit probability")].set_index(["localization", "fact"])["value"]
    window = f"MLP {layers[0]}-{layers[-1]}"
    if window in own.index:  # a choice with gaps is no window
        pd.testing.assert_series_equal(own[window], own["gate + up + down"])


def test_localizers_are_scored_against_the_recipe(rows):
    scored = rows[rows["measure"] == "localizer"].set_index("choice")
    assert {"causal tracing", "causal tracing MLPs", "attribution", "attribution MLPs", "by chance"} <= set(scored.index)
    assert scored[["frozen", "middle", "late"]].sum(axis=1).tolist() == pytest.approx([1.0] * len(scored))
    assert scored.loc["by chance", "frozen"] == pytest.approx(1 / recipe(COPIED)["n_layers"])
    in_the_first = scored["units"].str.contains(r"(?:mlp|attn) 0\b")
    assert ((scored["frozen"] > 0) == in_the_first)[scored.index != "by chance"].all()


def test_the_copied_model_is_edited_early_and_late(made):
    moved = made[made["model"] != MODEL]
    assert moved["model"].str.endswith("late").all()
    starts = {int(layers.split()[0]) for layers in moved["layers"].unique() if layers}
    assert {0, 1} <= starts and max(starts) >= 10


def test_stored_rows_decide_and_lookup_does_not_borrow_what_depth_did(rows, checks):
    slopes = rows[(rows["measure"] == "slope") & (rows["regressed"] == MEASURES[0].label)].set_index(["explanation", "rival"])
    assert set(slopes["n_seeds"]) == {3} and set(slopes["n_facts"]) == {12} and set(slopes["n_windows"]) == {recipe(MODEL)["n_layers"] - 1}
    assert slopes.loc[("depth", "ignored"), "low"] > 0
    assert not checks["how much lookup a window does explains what its edit achieves"]["holds"]
    assert checks["how early a window begins explains what its edit achieves"]["observed"].split(":")[0] in ("depth", "open")


def test_declared_claims_are_judged_by_stored_rows(rows):
    judged = rows[rows["measure"] == "verdict"].set_index("claim")
    assert "window-anywhere" in judged.index and set(judged["verdict"]) == {"undecided"}  # the stored rows hold no lookup edit


def test_figures(folder):
    expected = {"properties", "windows", "models", "late_probes", "late_chosen", "late_edits", "parts", "slopes"}
    assert expected <= {path.stem for path in (folder / "figures").glob("*.png")}
