"""What each stored edit did before any attack: whether it took, what it wrecked, and which names are one and the same edit.

    made = edits.made(rows)              # one row an edit: means, `collapse`, `broken`, `taken`, `weak`, `light`, `same_as`
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
LIGHT = ("quick", "smoke")  # profiles that train less
KEY = ["model", "facts", "n", "method", "localization"]
MEANS = ["edit", "forget", "retain", "mcq_retain", "text_loss"]
VALUE = ["n", "seed", "attack", "setting", "fact", "name", "reading", "measure"]
GROUP = ["model", "facts", "method"]
SAME, DECIMALS = 1e-9, 3


def made(rows: pd.DataFrame) -> pd.DataFrame:
    """`results.costs` of each edit, over its seeds, indexed by KEY, against the unedited model on the same facts.

    `taken`: for how many facts it did what it was trained to do, in the trained words: the new answer or, in unlearning, the true one
    gone; none for deleted weights, which are told how many to be. `weak`: `taken` is below TAKEN. `light`: the profile, where any seed
    is from one that trains less; empty otherwise.
    `same_as`: the mask that stands for it in `doubles`; empty if none does.
    """
    plain = rows[(rows["attack"] == "none") & (rows["measure"].str.endswith(" top1") | (rows["measure"] == "text_loss"))]
    parts = [results.costs(part, KEY) for _, part in plain.groupby("facts", sort=False)]
    if not parts:
        return pd.DataFrame(columns=[*MEANS, "collapse", "broken", "taken", "weak", "light", "same_as"], index=pd.MultiIndex.from_tuples([], names=KEY))
    table = pd.concat(parts)
    table = table.reindex(columns=list(dict.fromkeys([*table, *MEANS])))
    methods = table.index.get_level_values("method")
    taken = table["edit"].where(~methods.isin(UNLEARNING), 1 - table["forget"])
    trained = ~methods.str.startswith("weight mask") & (table.index.get_level_values("localization") != "none")
    light = plain[plain["profile"].isin(LIGHT)].drop_duplicates(KEY).set_index(KEY)["profile"].reindex(table.index).fillna("")
    again = doubles(rows)
    same_as = [again.get((model, facts, method, name), "") for model, facts, _, method, name in table.index]
    return table.assign(taken=taken.where(trained), weak=(taken < TAKEN) & trained, light=light, same_as=same_as)


def doubles(rows: pd.DataFrame) -> dict[tuple[str, str, str, str], str]:
    """Edits that another one repeats: the same layers with every seed, and equal values wherever both were read.

    Masks with attention have no layers; these must have been read alike everywhere, with every seed and attack, and with equal values. So
    give all rows of the edits, not those of one figure, which others may share by chance.

    From (model, facts, method, localization) to the localization that stands for it, the one with the most rows.
    """
    edited = rows[(rows["localization"] != "none") & (rows["method"] != results.LOCALIZE)]
    sizes = edited.groupby([*GROUP, "localization"], sort=False).size().to_dict()
    found = {}
    for edit, whole, names in _alike(edited):
        names = sorted(names, key=lambda name: -sizes[*edit, name])
        part = edited[(edited[GROUP] == list(edit)).all(axis=1) & edited["localization"].isin(names)]
        values = part.pivot_table(index=[name for name in VALUE if name in part], columns="localization", values="value")
        for place, name in enumerate(names):
            kept = [first for first in names[:place] if (*edit, first) not in found and _equal(values[first], values[name], whole)]
            if kept:
                found[*edit, name] = kept[0]
    return found


def marked(rows: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Rows with `collapsed`, `weak` and `same_as` of their edits, by KEY, from those of `made`."""
    flags = table.assign(collapsed=table["collapse"] != "", weak=table["weak"].astype(bool))[["collapsed", "weak", "same_as"]]
    found = flags.reindex(pd.MultiIndex.from_frame(rows[KEY])).fillna({"collapsed": False, "weak": False, "same_as": ""}).reset_index(drop=True)
    return rows.assign(**found.astype({"collapsed": bool, "weak": bool}).set_index(rows.index))


def warnings(model: str, facts: set[str], method: str, sides: dict[str, str], table: pd.DataFrame) -> str:
    """What must be known of the edits of a comparison, `sides` by what they are ("mask", "rival"): collapsed, not taken, or trained less."""
    here = table.reset_index()
    here = here[(here["model"] == model) & here["facts"].isin(facts) & (here["method"] == method)]
    said = []
    for side, name in sides.items():
        for row in here[here["localization"] == name].itertuples():
            said += [f"the {side} collapsed ({name}: {row.collapse})"] * bool(row.collapse)
            said += [f"the edit of the {side} did not take in full ({name}: {row.taken:.2f} of the facts in the trained words)"] * bool(row.weak)
            said += [f"the {side} was trained in the {row.light} profile ({name})"] * bool(row.light)
    return "; ".join(dict.fromkeys(said))


def _alike(rows: pd.DataFrame) -> Iterator[tuple[tuple[str, str, str], bool, list[str]]]:
    """(model, facts, method), and masks that may be one: with the same layers for every seed or, where any seed has none (True), as many values
    of the same sum."""
    drawn = rows.groupby([*GROUP, "localization", "seed"], sort=False).agg(layers=("layers", "first"), count=("value", "size"), total=("value", "sum"))
    for edit, part in drawn.reset_index().groupby(GROUP, sort=False):
        groups: dict[tuple[bool, frozenset], list[str]] = {}
        for name, mine in part.groupby("localization", sort=False):
            layers = mine["layers"].fillna("")
            whole = bool((layers == "").any())
            seen = zip(mine["seed"], mine["count"], mine["total"].round(DECIMALS)) if whole else zip(mine["seed"], layers)
            groups.setdefault((whole, frozenset(seen)), []).append(name)
        yield from ((edit, whole, names) for (whole, _), names in groups.items() if len(names) > 1)


def _equal(a: pd.Series, b: pd.Series, whole: bool) -> bool:
    """Whether values are the same wherever both are known; `whole`: and both are known everywhere."""
    both = (a - b).dropna()
    return len(both) > 0 and bool(np.all(both.abs() < SAME)) and not (whole and len(both) < len(a))
