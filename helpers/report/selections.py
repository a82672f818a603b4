"""Which stored rows a figure shows, under the names that it shows them by.

Every function takes rows of `named` and gives back those of its figure with its own columns beside `about` (the facts, in words) and
`tried` (the method); none where there are no such rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from helpers import claims
from helpers.attacks.headline import SPOKEN
from helpers.report.edits import UNLEARNING

UNEDITED, SHUFFLED, ALONE = "unedited model", "shuffled labels", "left alone"
WORST, HIGHER, LOWER = "true answer, worst case", "higher is better", "lower is better"
MUTED = (UNEDITED, SHUFFLED)
WINDOW, PART = r"MLP \d+-\d+", r"(?:gate|up|down)(?: \+ (?:gate|up|down))*"
RUNG = r"weight mask, (?P<way>.+), n = (?P<deleted>\d+)"
SIZED = r"(?P<tried>.+, equal (?:steps|passes))"
FORMATS = {"": "training format", "mcq": "multiple choice", "qa": "QA"}
DOSE = r"(?:(?P<what>.+), )?lr (?P<rate>[\d.e-]+), step (?P<step>\d+) of (?P<steps>\d+)(?:, (?P<format>\w+))?"
SOFT = r"(?P<size>\d+) vectors, restart 0, step (?P<step>\d+) of (?P<steps>\d+)(?:, (?P<format>\w+))?"
PROBE = r"probe: (?P<where>last|subject_last), layer (?P<layer>\d+)(?:\.0)?(?P<control> \(.+\))?"
PLACES = {"subject_last": "at the name's last token", "last": "at the last position"}
GROUPS = {"forget": "forgotten facts", "retain": "retained facts"}
PANELS = {"edit": "new answer", "mcq_edit": "new answer, MCQ", "forget": "forgotten facts", "mcq_forget": "forgotten facts, MCQ",
          "retain": "retained facts", "mcq_retain": "retained facts, MCQ"}


def named(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with `name` and `reading` of the measure, `mask`, `about` and `tried`; several methods with one mask each are tried together,
    those that edit and those that unlearn.

    In the order of masks in `data/claims.yaml`, so that a mask has the same colour in all figures.
    """
    order = {name: place for place, name in enumerate(claims.load().masks)}
    rows = rows.sort_values("localization", key=lambda names: names.map(order).fillna(len(order)), kind="stable")
    parts = _each(rows["measure"], lambda texts: texts.str.extract(r"(?P<name>.+?)(?: (?P<reading>probability|top1))?$"))
    edit = ["model", "facts", "method", "localization"]
    made = rows[edit].drop_duplicates()
    mask, method = made["localization"].replace("none", UNEDITED), made["method"]
    edited = made["localization"].where(made["localization"] != "none")
    count = edited.groupby([made["model"], made["facts"], method]).transform("nunique")
    alone = (count == 1) & edited.notna() & ~method.str.startswith("weight mask")
    kind = method.isin(UNLEARNING).map({False: "methods that edit", True: "methods that unlearn"})
    several = method.where(alone).groupby([made["model"], made["facts"], kind]).transform("nunique")
    together = alone & (several > 1)
    both = [name if name.endswith(f", {place}") else f"{name}, {place}" for name, place in zip(method, mask)]
    made = made.assign(mask=mask.where(~together, both), tried=method.where(~together, kind))
    rows = rows.drop(columns=["mask", "tried"], errors="ignore").merge(made, on=edit, how="left")
    return rows.assign(name=parts["name"].to_numpy(), reading=parts["reading"].to_numpy(), about=rows["facts"])


def spider(rows: pd.DataFrame) -> pd.DataFrame:
    """Axes on which outwards is better; what should be low is turned round."""
    rows = _plain(rows[rows["mask"] != UNEDITED])
    stem = _each(rows["name"], lambda names: names.str.replace(r"_?(?:edit|forget|retain)$", "", regex=True).map(lambda name: FORMATS.get(name, name)))
    kind = _each(rows["name"], lambda names: names.str.extract(r"(edit|forget|retain)$")[0])
    taught = kind == rows["method"].isin(UNLEARNING).map({True: "forget", False: "edit"})
    untouched, attacked = rows["attack"] == "none", (rows["attack"] == "relearn lora") & (rows["name"] == "forget")
    turned = ((kind == "forget") & taught & untouched) | attacked
    axis = stem.where(kind != "retain", "retained, " + stem).mask(attacked, "not relearned")
    kept = (untouched & (taught | (kind == "retain")) & ~_each(rows["name"], lambda names: names.str.startswith("neighborhood"))) | attacked
    rows = rows.assign(measure=axis, value=rows["value"].where(~turned, 1 - rows["value"]), last=kind.eq("retain") + 2 * attacked)[kept]
    return rows.sort_values("last", kind="stable")


def prompting(rows: pd.DataFrame) -> pd.DataFrame:
    asked = _each(rows["attack"], lambda names: names.str.fullmatch(r"prompt: [^()]+"))
    rows = _plain(rows[asked & _each(rows["name"], lambda names: names.str.contains(r"(?:^|_)(?:forget|retain)$"))])
    group = rows["name"].str.extract(r"(forget|retain)$")[0]
    return rows.assign(asked=rows["attack"].str.removeprefix("prompt: "), group=group.map(GROUPS))


def relearning(rows: pd.DataFrame) -> pd.DataFrame:
    rows = _plain(rows[_each(rows["attack"], lambda names: names.str.startswith("relearn")) & rows["name"].isin(GROUPS)])
    found = _each(rows["setting"], lambda settings: settings.str.extract(f"^{DOSE}$"))
    invented = rows["attack"].str.endswith(")")
    curve = rows["name"].map(GROUPS).mask(invented, "invented names")
    how = rows["attack"].str.split(":").str[0]
    dose = how + ", " + found["what"] + ", lr " + found["rate"]
    whole = found["what"].isin(["all facts"]) | how.eq("relearn text")
    # what the attack on invented names does to retained facts is no answer about invented names
    kept = whole & found["format"].isin(["one_shot"]) & ~(invented & (rows["name"] == "retain"))
    # every seed invents names of its own; they take the places of the same facts, so that seeds can be averaged
    place = rows.groupby(["model", "facts", "localization", "method", "attack", "setting", "measure", "seed"], sort=False).cumcount().map("name {}".format)
    rows = rows.assign(curve=curve, dose=dose, step=found["step"].astype(float), fact=rows["fact"].mask(invented, place))[kept]
    return _ordered(rows, "curve", [*GROUPS.values(), "invented names"])


def probing(rows: pd.DataFrame) -> pd.DataFrame:
    rows = _plain(rows[_each(rows["attack"], lambda names: names.str.startswith("probe: "))])
    found = _each(rows["attack"], lambda names: names.str.extract(f"^{PROBE}$"))
    control = found["control"].notna()
    rows = rows.assign(mask=rows["mask"].mask(control, SHUFFLED), position=found["where"].map(PLACES), layer=found["layer"].astype(float))
    # every mask has its own control: one line, of their mean
    means = rows[control].groupby(["model", "about", "tried", "mask", "position", "layer", "name", "reading", "fact", "seed"], sort=False)
    rows = pd.concat([rows[~control], means["value"].mean().reset_index()], ignore_index=True)
    edited = rows[rows["mask"] != UNEDITED]
    ceiling = rows[rows["mask"] == UNEDITED].drop(columns="tried").merge(edited[["model", "about", "tried"]].drop_duplicates())
    return pd.concat([edited, ceiling], ignore_index=True)


def soft_prompt(rows: pd.DataFrame) -> pd.DataFrame:
    rows = _plain(rows[_each(rows["attack"], lambda names: names.str.startswith("soft")) & rows["name"].isin(GROUPS)])
    found = _each(rows["setting"], lambda settings: settings.str.extract(f"^{SOFT}$"))
    kind = rows["attack"].str.split(":").str[0] + ", " + found["size"] + " vectors"
    rows = rows.assign(curve=rows["name"].map(GROUPS), kind=kind, step=found["step"].astype(float))
    return _ordered(rows[found["step"].notna()], "curve", list(GROUPS.values()))


def worst(rows: pd.DataFrame) -> pd.DataFrame:
    """The worst case at each level of access, and the edited model left alone on the same facts."""
    rows = _plain(rows[rows["name"] == "forget"])
    found = rows[_each(rows["attack"], lambda names: names.str.startswith("worst: "))]
    keys = ["model", "about", "tried", "mask", "seed", "fact", "reading"]
    alone = rows[rows["attack"] == "none"].merge(found[keys].drop_duplicates(), on=keys)
    return pd.concat([found.assign(access=found["attack"].str.removeprefix("worst: ")), alone.assign(access=ALONE)], ignore_index=True)


def windows(rows: pd.DataFrame) -> pd.DataFrame:
    """Windows of MLPs from the first to the last, and the lookup MLPs among them."""
    window = _each(rows["localization"], lambda names: names.str.fullmatch(f"{WINDOW}|lookup"))
    rows = _unsized(rows[window & _each(rows["layers"].fillna(""), lambda layers: layers.str.match(r"\d"))])
    shown = {("none", "edit"): PANELS["edit"], ("none", "mcq_edit"): PANELS["mcq_edit"], (f"worst: {SPOKEN}", "forget"): WORST}
    measure = [shown.get(key) for key in zip(rows["attack"], rows["name"])]
    panel = pd.Series(measure, rows.index).map(lambda name: name and (LOWER if name == WORST else HIGHER))
    rows = rows.assign(measure=measure, panel=panel, mask=rows["mask"].where(rows["localization"] != "lookup", "lookup (" + rows["layers"] + ")"))
    middle = _each(rows["layers"], lambda texts: texts.str.split().map(lambda layers: sum(map(int, layers)) / len(layers)))
    found = rows.assign(middle=middle).dropna(subset="measure").sort_values("middle", kind="stable")
    any_window = found["localization"].str.match(WINDOW).groupby([found["model"], found["about"], found["tried"]]).transform("any")
    return found[any_window.astype(bool)]


def ladder(rows: pd.DataFrame) -> pd.DataFrame:
    """Rungs with the way of choosing weights as `mask`, and the unedited model."""
    found = _each(rows["method"], lambda methods: methods.str.extract(f"^{RUNG}$"))
    panels = [name for name in PANELS if "edit" not in name]
    rows = rows.assign(measure=rows["name"].map(PANELS), tried="weight mask", deleted=found["deleted"].astype(float).fillna(0))
    rows = rows.assign(mask=rows["mask"].where(found["way"].isna(), found["way"]))[(rows["attack"] == "none") & rows["name"].isin(panels)]
    rungs = rows[rows["deleted"] > 0]
    base = rows[(rows["mask"] == UNEDITED) & rows["about"].isin(rungs["about"])]
    return _ordered(pd.concat([rungs, base], ignore_index=True), "measure", [PANELS[name] for name in panels])


def scaling(rows: pd.DataFrame) -> pd.DataFrame:
    """Edits of different numbers of facts from one file."""
    found = _each(rows["method"], lambda methods: methods.str.extract(f"^{SIZED}$")["tried"])
    panels = [name for name in PANELS if "forget" not in name]
    worst_case = (rows["attack"] == f"worst: {SPOKEN}") & (rows["name"] == "forget")
    measure = rows["name"].map(PANELS).mask(worst_case, "worst case")
    shown = (rows["attack"] == "none") & rows["name"].isin(panels) | worst_case
    rows = rows.assign(tried=found, about=_each(rows["facts"], lambda names: names.str.split().str[0]), measure=measure)[found.notna() & shown]
    rows = rows[rows.groupby(["model", "about", "tried"])["n"].transform("nunique") > 1]
    return _ordered(rows, "measure", [*(PANELS[name] for name in panels), "worst case"])


def _plain(rows: pd.DataFrame) -> pd.DataFrame:
    """Without windows and parts of MLPs, deleted weights, and edits of different sizes, which belong elsewhere."""
    return _unsized(rows[~_each(rows["localization"], lambda names: names.str.fullmatch(f"{WINDOW}|{PART}"))])


def _unsized(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[~_each(rows["method"], lambda methods: methods.str.fullmatch(SIZED) | methods.str.startswith("weight mask"))]


def _each(texts: pd.Series, change: Callable[[pd.Series], pd.Series | pd.DataFrame]) -> pd.Series | pd.DataFrame:
    """`change` of a column, made once for each distinct text: millions of values have a few thousand names and settings."""
    codes, distinct = pd.factorize(texts, use_na_sentinel=False)
    return change(pd.Series(distinct)).iloc[codes].set_axis(texts.index)


def _ordered(rows: pd.DataFrame, column: str, order: Sequence[str]) -> pd.DataFrame:
    return rows.sort_values(column, key=lambda values: values.map(list(order).index), kind="stable")
