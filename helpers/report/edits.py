"""What each stored edit did before any attack: whether it took, what it wrecked, and which names are one and the same edit.

    made = edits.made(rows)              # one row an edit: means, `collapse`, `broken`, `taken`, `weak`, `quick`
    edits.doubles(rows)                  # (model, facts, method, mask) → the mask that stands for it
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from helpers import results
from helpers.unlearning.baselines import UNLEARNING

TAKEN = 0.9
DAGGER = "†"
QUICK = "quick"  # the profile that trains less
KEY = ["model", "facts", "n", "method", "localization"]
MEANS = ["edit", "forget", "retain", "mcq_retain", "text_loss"]
VALUE = ["n", "seed", "attack", "setting", "fact", "name", "reading", "measure"]
SAME = 1e-9


def made(rows: pd.DataFrame) -> pd.DataFrame:
    """`results.costs` of each edit, over its seeds, indexed by KEY, against the unedited model on the same facts.

    `taken`: for how many facts it did what it was trained to do, in the trained words: the new answer or, in unlearning, the true one
    gone; none for deleted weights, which are told how many to be. `weak`: `taken` is below TAKEN. `quick`: any seed is from a quick run.
    """
    plain = rows[(rows["attack"] == "none") & (rows["measure"].str.endswith(" top1") | (rows["measure"] == "text_loss"))]
    parts = [results.costs(part, KEY) for _, part in plain.groupby("facts", sort=False)]
    if not parts:
        return pd.DataFrame(columns=[*MEANS, "collapse", "broken", "taken", "weak", "quick"], index=pd.MultiIndex.from_tuples([], names=KEY))
    table = pd.concat(parts)
    table = table.reindex(columns=list(dict.fromkeys([*table, *MEANS])))
    methods = table.index.get_level_values("method")
    taken = table["edit"].where(~methods.isin(UNLEARNING), 1 - table["forget"])
    trained = ~methods.str.startswith("weight mask") & (table.index.get_level_values("localization") != "none")
    quick = pd.MultiIndex.from_frame(plain.loc[plain["profile"] == QUICK, KEY].drop_duplicates())
    return table.assign(taken=taken.where(trained), weak=(taken < TAKEN) & trained, quick=table.index.isin(quick))


def doubles(rows: pd.DataFrame) -> dict[tuple[str, str, str, str], str]:
    """Edits that another one repeats: the same layers with every seed, and equal values wherever both were read.

    From (model, facts, method, localization) to the localization that stands for it, the one with the most rows.
    """
    group = ["model", "facts", "method"]
    known = rows[rows["layers"].fillna("") != ""]
    sizes = known.groupby([*group, "localization"], sort=False).size().to_dict()
    found = {}
    for edit, names in _alike(known[[*group, "localization", "seed", "layers"]].drop_duplicates()):
        names = sorted(names, key=lambda name: -sizes[*edit, name])
        part = known[(known[group] == list(edit)).all(axis=1) & known["localization"].isin(names)]
        values = part.pivot_table(index=[name for name in VALUE if name in part], columns="localization", values="value")
        for place, name in enumerate(names):
            kept = [first for first in names[:place] if (*edit, first) not in found and _equal(values[first], values[name])]
            if kept:
                found[*edit, name] = kept[0]
    return found


def marked(rows: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Rows with `collapsed` and `weak` of their edits, by KEY, from those of `made`."""
    flags = pd.DataFrame({"collapsed": table["collapse"] != "", "weak": table["weak"].astype(bool)})
    found = flags.reindex(pd.MultiIndex.from_frame(rows[KEY])).fillna(False).astype(bool)
    return rows.assign(collapsed=found["collapsed"].to_numpy(), weak=found["weak"].to_numpy())


def warnings(model: str, facts: set[str], method: str, sides: dict[str, str], table: pd.DataFrame) -> str:
    """What must be known of the edits of a comparison, `sides` by what they are ("mask", "rival"): collapsed, not taken, or of a quick run."""
    here = table.reset_index()
    here = here[(here["model"] == model) & here["facts"].isin(facts) & (here["method"] == method)]
    said = []
    for side, name in sides.items():
        for row in here[here["localization"] == name].itertuples():
            said += [f"the {side} collapsed ({name}: {row.collapse})"] * bool(row.collapse)
            said += [f"the edit of the {side} did not take in full ({name}: {row.taken:.2f} of the facts in the trained words)"] * bool(row.weak)
            said += [f"the {side} was trained in the quick profile ({name})"] * bool(row.quick)
    return "; ".join(dict.fromkeys(said))


def _alike(drawn: pd.DataFrame) -> Iterator[tuple[tuple[str, str, str], list[str]]]:
    """(model, facts, method), and masks that have the same layers with every seed."""
    for edit, part in drawn.groupby(["model", "facts", "method"], sort=False):
        groups: dict[frozenset, list[str]] = {}
        for name, mine in part.groupby("localization", sort=False):
            groups.setdefault(frozenset(zip(mine["seed"], mine["layers"])), []).append(name)
        yield from ((edit, names) for names in groups.values() if len(names) > 1)


def _equal(a: pd.Series, b: pd.Series) -> bool:
    both = (a - b).dropna()
    return len(both) > 0 and bool(np.all(both.abs() < SAME))
