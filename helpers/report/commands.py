"""The commands that make stored rows again, found by what names a run: its id is a hash of notebook and parameters.

    makers = commands.load()             # reads each sweep and notebook once
    made = makers.behind(runs)           # of rows of `Material.runs`
    made.commands, made.rest             # what makes them, and in words how many runs nothing is known to make
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from helpers import notebooks, parameters, provenance
from helpers.report.edits import LIGHT
from helpers.runs import NOT_IDENTITY, run_id
from helpers.sweep import plan

PROFILES = ("standard", *LIGHT, "full")
FEW = 4  # of runs that no sweep makes, so many are named one by one


@dataclass(frozen=True)
class Made:
    """`commands` that make runs, and `rest`: how many other runs of which notebook there are; empty if none."""

    commands: tuple[str, ...]
    rest: str


@dataclass(frozen=True)
class Makers:
    """`commands` by run id, and the `defaults` of each notebook's parameters."""

    commands: Mapping[str, str]
    defaults: Mapping[str, Mapping[str, Any]]

    def behind(self, runs: pd.DataFrame) -> Made:
        """What makes these runs: sweeps that have them, notebooks as they are, or a notebook with a run's `parameters` (JSON, empty if not known)."""
        known = runs["run"].isin(self.commands)
        others = runs[~known]
        single = others[(others["parameters"] != "") & others["notebook"].isin(self.defaults)].head(FEW)
        named = [self.commands[run] for run in runs.loc[known, "run"]]
        named += [self._by_hand(notebook, json.loads(stated)) for notebook, stated in zip(single["notebook"], single["parameters"])]
        rest = others.drop(single.index)["notebook"].value_counts(sort=False)
        return Made(tuple(dict.fromkeys(named)), ", ".join(f"{count} of {notebook}" for notebook, count in rest.items()))

    def _by_hand(self, notebook: str, stated: Mapping[str, Any]) -> str:
        own = {name: value for name, value in stated.items() if name not in {*NOT_IDENTITY, "profile"} and value != self.defaults[notebook].get(name)}
        given = itertools.chain.from_iterable(("-p", name, str(value)) for name, value in own.items())
        return " ".join([by_notebooks(notebook, profile=stated["profile"]), *map(shlex.quote, given)])


def load(sweeps: Path | None = None, folder: Path | None = None) -> Makers:
    """The makers of all runs of the sweeps and of the notebooks in their defaults; `folder`: of notebooks. Raises `plan.SweepError`."""
    root, found, defaults = provenance.project_root(), {}, {}
    for file in sorted((sweeps or root / "sweeps").glob("*.yaml")):
        for task in plan.load(file):
            found.setdefault(task.run, sweep(file.stem))
    for path in notebooks.select([], folder or root / "notebooks"):
        declared = parameters.declared_by(path)
        of_profile = {profile: parameters.validate(declared, {"profile": profile}) for profile in PROFILES}
        defaults[path.stem] = of_profile[PROFILES[0]].model_dump()
        for profile, params in of_profile.items():
            found.setdefault(run_id(path.stem, params), by_notebooks(path.stem, profile=profile))
    return Makers(found, defaults)


def sweep(name: str) -> str:
    return f"python -m helpers.sweep sweeps/{name}.yaml"


def by_notebooks(*names: str, profile: str = PROFILES[0]) -> str:
    return f"python -m helpers.notebooks run {' '.join(name[:2] for name in names)} --profile {profile}"
