"""The commands that stand beside figures: those that make the very runs shown, whatever file they are packed in."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pandas as pd
import pytest
import report_cases as cases
from report_cases import declared, rows  # noqa: F401 - fixtures

from helpers import parameters, provenance
from helpers.report import commands, page
from helpers.report import rows as material
from helpers.runs import run_id
from helpers.sweep import plan

EDITING, BY_HAND = "python -m helpers.sweep sweeps/editing.yaml", "python -m helpers.notebooks run 04 --profile standard"


@pytest.fixture(scope="module")
def makers():
    return commands.load()


def run_of(notebook: str, **given) -> str:
    return run_id(notebook, parameters.from_notebook(provenance.project_root() / "notebooks" / f"{notebook}.ipynb", given))


def table(*runs: str, notebook: str = "04_localized_editing", stated: str = "") -> pd.DataFrame:
    return pd.DataFrame({"run": list(runs), "notebook": notebook, "parameters": stated})


def test_every_run_of_a_committed_sweep_has_its_command(makers):
    for file in (provenance.project_root() / "sweeps").glob("*.yaml"):
        assert {task.run for task in plan.load(file)} <= set(makers.commands)
    seeds = [run_of("04_localized_editing", seed=seed, rows="") for seed in (1, 2)]
    assert makers.behind(table(*seeds)) == commands.Made((EDITING,), "")
    assert makers.behind(table(seeds[0], run_of("04_localized_editing"))).commands == (EDITING, BY_HAND)
    assert makers.behind(table(run_of("04_localized_editing", profile="quick"))).commands == (BY_HAND.replace("standard", "quick"),)


def test_a_run_that_no_sweep_makes_is_named_by_its_parameters_or_counted(makers):
    given = {"seed": 7, "lookup": "1, 2", "profile": "quick"}
    path = provenance.project_root() / "notebooks" / "04_localized_editing.ipynb"
    stated = json.dumps(parameters.from_notebook(path, given).model_dump())
    assert makers.behind(table("x", stated=stated)) == commands.Made((f"{BY_HAND.replace('standard', 'quick')} -p seed 7 -p lookup '1, 2'",), "")
    assert makers.behind(table("x", "y")) == commands.Made((), "2 of 04_localized_editing")
    own = makers.behind(table("x", notebook="mine", stated=json.dumps({"profile": "quick"})))
    assert own == commands.Made((), "1 of mine")
    many = pd.concat([table(str(seed), stated=json.dumps({"profile": "quick", "seed": seed})) for seed in range(1, 9)], ignore_index=True)
    found = makers.behind(many)
    assert len(found.commands) == commands.FEW and found.rest == f"{8 - commands.FEW} of 04_localized_editing"


def test_figures_leaderboard_and_localizations_name_what_made_their_rows(rows, declared, tmp_path):
    tasks = {name: plan.load(provenance.project_root() / "sweeps" / f"{name}.yaml")[0].run for name in ("reference", "localization")}
    edits = rows.assign(run=rows["run"].mask(rows["localization"] == "lookup", tasks["reference"]))
    both = pd.concat([edits, cases.localized().assign(run=tasks["localization"])], ignore_index=True)
    collected = material.collect([cases.pack(both, tmp_path / "another_name.parquet")])
    text = page.render(collected, declared, "a day", "a command")
    tree = ElementTree.fromstring(text[text.index("<html"):])
    shown = [" ".join("".join(element.itertext()).split()) for element in tree.iter("p")]
    rows_said = [line.split("Rows: ")[1] for line in shown if "Rows: " in line]
    reference, localization = (f"python -m helpers.sweep sweeps/{name}.yaml" for name in ("reference", "localization"))
    assert localization in rows_said and not any("attacks.yaml" in line for line in rows_said)
    others = [line for line in rows_said if line != localization]
    assert len(others) == 7 and all(line.startswith(f"{reference}; not among the committed sweeps: ") for line in others)
