"""Edits of different numbers of facts: how long each is trained, what it costs, and their rows in one table.

    settings = trained_for(settings, 256, "passes")          # four times the steps that 64 facts get
    run.result(cost(edit, seconds, …))                       # results in the form of helpers.results
    table = estimates(found(stored("data/results"), model, facts))
    growth(table[table["measure"] == "norm"])                # the power of n with which it grows

With as many steps for every number of facts, each fact of many is seen less often; with as many passes over the facts, an edit of many
takes more steps, and disturbs the rest for longer. Neither is the fair comparison, so both are made, and kept apart: the method of
their rows is "finetune, equal steps" or "finetune, equal passes", which enters no claim about "finetune".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from helpers import results, stats, store
from helpers.unlearning.edit import Edit
from helpers.unlearning.training import Settings

EFFORTS = ("steps", "passes")
REFERENCE = 64  # facts, at which both efforts are the same: hyper-parameters are searched for that many
NOTEBOOK = "11_scaling"
FEWEST = 2
RUN = ["facts", "n", "seed", "localization", "method", "attack"]
BY = ["effort", "n", "mask", "attack", "measure"]


class SizeError(ValueError):
    """Numbers of facts, or an effort, that cannot be used; the message says what can."""


def parse(text: str) -> list[int]:
    """Numbers of facts, "16, 64", in ascending order. Raises `SizeError` for anything but whole numbers of at least 2, each once."""
    parts = [part.strip() for part in text.split(",")]
    sizes = sorted(int(part) for part in parts if part.isdecimal())
    if len(sizes) < len(parts) or len(set(sizes)) < len(sizes) or min(sizes) < FEWEST:
        raise SizeError(f"sizes {text!r}: give whole numbers of at least {FEWEST} (attacks need two halves), each once, such as '16, 64'")
    return sizes


def trained_for(settings: Settings, n: int, effort: str) -> Settings:
    """The settings for n facts: `steps` as they are, `passes` with as many passes over the facts as REFERENCE facts get."""
    method(effort)
    return settings if effort == "steps" else replace(settings, steps=max(1, round(settings.steps * n / REFERENCE)))


def method(effort: str) -> str:
    """What rows of results call it. Raises `SizeError` for an effort that is none of EFFORTS."""
    if effort not in EFFORTS:
        raise SizeError(f"effort {effort!r}; there are {', '.join(EFFORTS)}")
    return f"finetune, equal {effort}"


def cost(edit: Edit, seconds: float, total: int, collapsed: bool, **where) -> pd.DataFrame:
    """Long results of what an edit took: `seconds` of training, `steps`, `passes`, `norm`, `share` of the `total` weights, `collapsed`.

    `where`: facts, n, seed, localization, layers, method. `passes`: how often each fact was trained on.
    """
    steps, batch = edit.record["settings"]["steps"], edit.record["settings"]["batch"]
    values = {"seconds": seconds, "steps": steps, "passes": steps * batch / edit.record["n_trained_on"], "norm": edit.norm,
              "share": edit.n_weights / total, "collapsed": float(collapsed)}
    return whole(values, **where)


def whole(values: Mapping[str, float], **where) -> pd.DataFrame:
    """Long results of measures that belong to no single fact."""
    given = {"layers": "", "attack": "none", "setting": "", "fact": "", **where}
    rows = [{**given, "measure": name, "value": value} for name, value in values.items()]
    return pd.DataFrame(rows, columns=results.COLUMNS)


def stored(place: Path | str) -> pd.DataFrame:
    """The rows of this notebook's runs at a place (`store.sources`), empty where there are none. Rows made by older code have `stale` set."""
    sources = store.sources(place)
    return store.read(*sources, notebook=NOTEBOOK) if sources else pd.DataFrame(columns=list(store.SCHEMA))


def found(rows: pd.DataFrame, model: str, facts: str) -> pd.DataFrame:
    """Those of a model and a file of facts, each value once: runs that differ in the mask alone all measure the unedited model."""
    mine = rows[(rows["model"] == model) & (rows["facts"].str.split(" first-").str[0] == facts)]
    base = mine["localization"] == "none"
    return pd.concat([mine[base].drop_duplicates([*RUN, "fact", "measure"]), mine[~base]], ignore_index=True)


def estimates(long: pd.DataFrame) -> pd.DataFrame:
    """`stats.summary` by BY, and `collapsed`, whether any run of this effort, number and mask did.

    The unedited model (mask "none") has a row for each effort, so that it can be drawn beside both.
    """
    base = long["localization"] == "none"
    efforts = [effort for effort in EFFORTS if (long["method"] == method(effort)).any()]
    parts = [long[base | (long["method"] == method(effort))].assign(effort=effort) for effort in efforts]
    if not parts:
        return pd.DataFrame(columns=[*BY, "value", "low", "high", "n_seeds", "collapsed"])
    table = stats.summary(pd.concat(parts).rename(columns={"localization": "mask"}), by=BY).sort_values("n", kind="stable")
    key = ["effort", "n", "mask"]
    lost = table[(table["measure"] == "collapsed") & (table["value"] > 0)].set_index(key).index
    return table.assign(collapsed=pd.MultiIndex.from_frame(table[key]).isin(lost)).reset_index(drop=True)


def same_facts(long: pd.DataFrame) -> pd.DataFrame:
    """The rows of those facts alone that have a value at every number of facts: sets are nested, so these are the facts of the smallest.

    Measures of the whole set stay out.
    """
    rows = long[long["fact"] != ""]
    key = ["localization", "method", "attack", "measure", "seed"]
    counts = rows.groupby([*key, "fact"])["n"].transform("nunique")
    return rows[counts == rows.groupby(key)["n"].transform("nunique")]


def growth(table: pd.DataFrame) -> pd.DataFrame:
    """One row an effort and mask: the `power` of n with which the `value` grows, by least squares on logarithms.

    `sizes` says over how many numbers of facts; NaN for fewer than two. If every fact needed a change of its own, of one size and at right
    angles to the others, the norm would grow with power 1/2.
    """
    rows = []
    for (effort, name), part in table.groupby(["effort", "mask"], sort=False):
        enough = part["n"].nunique() > 1
        power = np.polyfit(np.log(part["n"].astype(float)), np.log(part["value"]), 1)[0] if enough else np.nan
        rows.append({"effort": effort, "mask": name, "power": power, "sizes": part["n"].nunique()})
    return pd.DataFrame(rows)
