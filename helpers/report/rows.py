"""The rows that a report speaks of: which are taken, which are left out, and where each comes from.

    material = collect(["data/results", "runs"])
    material.rows          # rows of the store, one run an edit and attack
    material.runs          # one row a run, also those left out: commit, code, machine, `stale`, `rows`, `used`, `parameters`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from helpers import presets, store
from helpers.provenance import short_path
from helpers.runs import Run

SWEEP = "python -m helpers.sweep sweeps/reference.yaml"
EDIT = ["model", "facts", "n", "seed", "localization", "method"]
ORIGIN = ["run", "notebook", "profile", "commit", "code", "started", "machine", "stale"]
# a lower profile trains less; rows packed without a profile are of standard runs
FULLEST = {"full": 0, "standard": 1, "": 1, "quick": 2, "smoke": 3}


class ReportError(ValueError):
    """There is nothing to report on; the message says where it was looked for and what to run."""


@dataclass(frozen=True, eq=False)
class Material:
    """`rows` to report on, `runs` they come from and those left out, `unfinished` runs (failed, or never ended), `sources` as text, and
    `packs`: one row a source and notebook, with its runs, rows, minutes (packed rows may not have them) and machines."""

    rows: pd.DataFrame
    runs: pd.DataFrame
    unfinished: int
    sources: tuple[str, ...]
    packs: pd.DataFrame


def collect(sources: Sequence[Path | str], fresh: bool = False, notebooks: Path | None = None, **where: Any) -> Material:
    """Rows of the store to report on.

    Args:
        sources: folders of runs, files made by `store.pack`, or folders of such files.
        fresh: leave out rows that other code, data or weights made than there are now. They are taken otherwise, with `stale` set,
            because any change of any helper that a notebook uses makes its runs stale.
        notebooks: their folder, if it is not the project's.
        where: values of columns, as `store.read` takes them, to report on a part.

    Raises `ReportError` where there are no rows, or only stale ones though fresh ones were asked for, and `store.StoreError` for a file that is no store.
    """
    if gone := [short_path(source) for source in sources if not Path(source).exists()]:
        raise ReportError(f"nothing at {', '.join(gone)}: make rows with `{SWEEP}`, or name other places (--rows)")
    places = [place for source in map(Path, sources) for place in sorted(source.glob("*.parquet")) or [source]]
    everything = store.read(*places, notebooks=notebooks, **where)
    named = ", ".join(map(short_path, places))
    if everything.empty:
        raise ReportError(f"no rows in {named}: make some with `{SWEEP}`, or name other places (--rows)")
    taken = everything[~everything["stale"]] if fresh else everything
    if taken.empty:
        raise ReportError(f"all {len(everything):,} rows in {named} are stale, made by other code, data or weights than there are now: "
                          f"make them anew with `{SWEEP}`, or show them as they are (without --fresh)")
    known = {name: presets.identify(name) or name for name in taken["model"].unique()}
    rows = one_run_an_edit(taken.assign(model=taken["model"].map(known)))
    counts = everything.groupby(ORIGIN, sort=False).size().rename("rows").reset_index()
    runs = counts.assign(used=counts["run"].map(rows["run"].value_counts()).fillna(0).astype(int))
    found = pd.concat([store.runs(place, notebooks).assign(source=short_path(place)) for place in places], ignore_index=True)
    parameters = dict(zip(found["run"], found["parameters"].replace("{}", "")))
    ended = found[found["state"] == "finished"].merge(counts[["run", "rows"]], how="left")
    packs = pd.concat([_by_notebook(part, source) for source, part in ended.groupby("source", sort=False)], ignore_index=True)
    return Material(rows, runs.assign(parameters=runs["run"].map(parameters)), len(found) - len(ended), tuple(map(short_path, places)), packs)


def one_run_an_edit(rows: pd.DataFrame) -> pd.DataFrame:
    """Where several runs measured the same edit and attack, the rows of one: not a stale one if there is another, of these the one that
    measured most of the edit, of equal ones the last. Of runs in several profiles only those in the fullest count, for all attacks alike.

    Every run measures the unedited model, and two notebooks may make the same edit: averaging them would count a fact twice. An edit
    that was trained for fewer steps is another one, though it has the same name: its attacks say nothing of the one trained in full.
    """
    part = [*EDIT, "run", "attack"]
    sizes = rows.groupby([*part, "profile", "stale", "started"], dropna=False, sort=False).size().rename("size").reset_index()
    edit = lambda *more: sizes.groupby([*EDIT, *more], dropna=False, sort=False)
    sizes = sizes.assign(size=edit("run")["size"].transform("sum"), fullest=sizes["profile"].map(FULLEST))
    sizes = sizes[sizes["fullest"] == edit()["fullest"].transform("min")]
    ranked = sizes.sort_values(["stale", "size", "started", "run"], ascending=[True, False, False, True], kind="stable")
    return rows.merge(ranked.drop_duplicates([*EDIT, "attack"])[part], on=part)


def current(run: Run) -> Material:
    """The results of a run that is still going on, as material of their own. Raises `ReportError` where it has none yet."""
    file = run.folder / "results.parquet"
    if not file.exists():
        raise ReportError(f"{run.notebook} has recorded no results yet (run.result)")
    made, git = run.provenance, run.provenance["git"] or {"commit": "", "dirty": False}
    origin = {"notebook": run.notebook, "commit": git["commit"] + ("-dirty" if git["dirty"] else ""), "code": made["code"],
              "started": made["started"], "machine": f"{made['platform']}, {made['device']}, {made['threads']} threads", "stale": False,
              "profile": run.params.profile}
    rows = pd.read_parquet(file).assign(**origin)
    counts = rows.groupby(ORIGIN, sort=False).size().rename("rows").reset_index()
    where = short_path(run.folder)
    return Material(one_run_an_edit(rows), counts.assign(used=counts["rows"], parameters=""), 0, (where,), _by_notebook(counts.assign(minutes=float("nan")), where))


def _by_notebook(runs: pd.DataFrame, source: str) -> pd.DataFrame:
    several = lambda names: "; ".join(sorted(set(names)))
    table = runs.groupby("notebook").agg(runs=("run", "nunique"), rows=("rows", lambda n: n.sum(min_count=1)), machine=("machine", several),
                                         minutes=("minutes", lambda minutes: minutes.sum(min_count=1)), first=("started", "min"), last=("started", "max"))
    return table.reset_index().assign(source=source)[["source", *table.reset_index()]]
