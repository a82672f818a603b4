"""Notebook 12, executed in the quick profile: on stored rows, and where there are none."""

import json
import shutil

import notebook_cases
import pandas as pd
import pytest
import report_cases as cases

from helpers import claims
from helpers.facts import DATA
from helpers.report import rows as material
from helpers.report import tables

NOTEBOOK = "12_report"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    made = [cases.edit(mask, shift=shift) for mask, shift in {"none": 0.0, "lookup": 0.3, "everything": -0.1}.items()]
    return cases.pack(pd.concat([*made, cases.sizes()], ignore_index=True), tmp_path_factory.mktemp("store") / "reference.parquet")


@pytest.fixture(scope="module")
def folder(store, tmp_path_factory):
    return notebook_cases.executed(NOTEBOOK, tmp_path_factory.mktemp("report"), rows=str(store.parent))


def test_verdicts_and_leaderboard_are_those_of_the_stored_rows(folder, store):
    stored = material.collect([store]).rows
    rows = pd.read_parquet(folder / "rows.parquet")
    verdicts = rows[rows["measure"] == "verdict"].set_index("claim")["verdict"]
    assert verdicts.to_dict() == claims.verdict(claims.load(), stored).set_index("claim")["verdict"].to_dict()
    board = rows[rows["measure"] == "leaderboard"].set_index("localization")["worst"]
    pd.testing.assert_series_equal(board, tables.leaderboard(stored).set_index("localization")["worst"], check_names=False)


def test_the_live_edit_is_a_run_of_its_own(folder):
    live = pd.read_parquet(folder / "results.parquet")
    assert set(live["localization"]) == {"none", "all MLPs"} and set(live["n"]) == {16}
    share = live.groupby(["localization", "measure"])["value"].mean()
    assert share["none", "forget top1"] >= 0.9 and share["all MLPs", "edit top1"] > share["none", "edit top1"]


def test_figures_are_drawn_from_what_there_is(folder):
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert {"spider-0", "relearning-0", "worst-0"} <= figures and not {name for name in figures if name.startswith("windows")}
    assert {name for name in figures if name.startswith("scaling")} == {"scaling-0", "scaling-1"}  # equal steps, equal passes


def printed(out) -> str:
    cells = json.loads((out / f"{NOTEBOOK}.ipynb").read_text())["cells"]
    return "".join("".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", []))


def test_a_model_of_ones_own_is_shown_by_what_its_notebooks_left(store, tmp_path):
    """Its name is in no packed row, so that the figures are about the edits of notebook 08 in the same folder."""
    shutil.copytree(DATA / "models" / "tiny-gemma2", tmp_path / "mine")
    given = {"profile": "smoke", "model": str(tmp_path / "mine")}
    notebook_cases.executed("08_baselines", tmp_path / "out", **given)
    folder = notebook_cases.executed(NOTEBOOK, tmp_path / "out", rows=str(store.parent), **given)
    assert f"drawn below: {tmp_path / 'mine'}, athletes first-3" in printed(tmp_path / "out")
    assert (folder / "figures" / "spider-0.png").is_file()


def test_without_stored_rows_it_says_what_to_run_and_goes_on(tmp_path):
    folder = notebook_cases.executed(NOTEBOOK, tmp_path, rows=str(tmp_path / "nothing"))
    said = printed(tmp_path)
    assert "nothing" in said and "Below: only the" in said
    assert not notebook_cases.holds(folder)["the stored rows decide at least one claim"]
