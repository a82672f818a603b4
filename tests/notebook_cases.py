"""Notebooks executed through papermill, as a batch does."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from helpers import notebooks, parameters, runs
from helpers.facts import DATA
from helpers.provenance import project_root

FOLDER = project_root() / "notebooks"


def executed(name: str, out: Path, **given) -> Path:
    """The folder of a finished run, in the quick profile unless `given` says otherwise."""
    path, given = FOLDER / f"{name}.ipynb", {"profile": "quick", "out": str(out), **given}
    outcome = notebooks.run([path], given, out)[0]
    assert not outcome.error, outcome.error
    folder = runs.folder(name, parameters.from_notebook(path, given))
    assert (folder / "done.json").is_file() and any((folder / "figures").glob("*.png"))
    return folder


def refused(name: str, out: Path, **given) -> str:
    """What stops a quick run."""
    error = notebooks.run([FOLDER / f"{name}.ipynb"], {"profile": "quick", "out": str(out), **given}, out)[0].error
    assert error, f"{name} ran with {given}"
    return error


def few_athletes(path: Path, n: int = 24) -> str:
    """A file of the first n athletes of each sport, and of the golfers who serve as examples."""
    pd.read_csv(DATA / "athletes.csv", keep_default_na=False).groupby("answer").head(n).to_csv(path, index=False)
    return str(path)


def checks(folder: Path) -> dict[str, dict]:
    """Claim → what was observed, and whether it holds."""
    return {check["claim"]: check for check in json.loads((folder / "checks.json").read_text())}


def holds(folder: Path) -> dict[str, bool]:
    """Claim → whether it holds."""
    return {claim: check["holds"] for claim, check in checks(folder).items()}
