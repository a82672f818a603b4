"""Results in one long table, a value a row: what `data/claims.yaml` judges, sweeps store and the report reads.

    run.result(results.of_evaluation(rows, facts="athletes first-64", n=64, localization="lookup", method="finetune", layers="2 3"))
    run.result(results.of_attacks(rows, split, facts=…, n=…, localization=…, method=…, layers=…))

Columns: those of `helpers.claims.COLUMNS` (run and model are added by `run.result`), `layers`, and `setting`, which says how an
attack was made. An attack under one of the plain names of ATTACKS is the one that claims mean; the same attack with other
settings is called by name and setting, "relearn lora: 4 facts, lr 0.001, step 20 of 20", and enters no claim.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pandas as pd

from helpers import stats
from helpers.attacks.depth import depth_score
from helpers.attacks.headline import LEVELS, SPOKEN, worst_case
from helpers.attacks.latent import upper_layers
from helpers.attacks.rows import AttackError
from helpers.splits import Split
from helpers.unlearning.evaluation import READINGS, broken, collapse, measure_names

COLUMNS = ["facts", "n", "seed", "localization", "layers", "method", "attack", "setting", "fact", "measure", "value"]
# the setting that claims mean, as the attack names it without the format it was read in
ATTACKS = {"relearn lora": "all facts, lr 0.002, step 20 of 20", "relearn full": "all facts, lr 0.001, step 20 of 20",
           "soft prompt": "10 vectors, restart 0, step 60 of 60"}
PROBED = ("probe", "last")  # attack and position of probe_true
# one number for each kind of attack, as figures call it → attack and measure
SHOWN = {"asked, worst case": ("worst: answers", "forget top1"), "relearned by LoRA": ("relearn lora", "forget top1"),
         "relearned, all weights": ("relearn full", "forget top1"), "soft prompt": ("soft prompt", "forget top1"),
         "probe, upper layers": ("probe", "probe_true top1"), "worst case, model answers": (f"worst: {SPOKEN}", "forget top1")}
LOCALIZE = "localize"  # the method of rows that say where a mask lies
BRIEF = ("quantise", "prune", "noise", "undo", "interpolate")  # of many settings each: only top-1, so that hundreds of runs stay small


def of_evaluation(rows: pd.DataFrame, **where) -> pd.DataFrame:
    """Long results from rows of `evaluation.evaluate` for one method, mask and seed.

    `where`: facts, n, localization, method, layers, and seed if it is not that of the rows.
    """
    text = rows[rows["group"] == "text"]
    loss = text.assign(fact="", measure="text_loss", value=text["loss"])
    table = pd.concat([*_melt(rows[rows["group"] != "text"]), loss])
    return _tidy(table.assign(attack="none", setting=""), **{"seed": rows["seed"].iloc[0], **where})


def of_evaluations(rows: pd.DataFrame, layers: Mapping[str, str] = {}, **where) -> pd.DataFrame:
    """`of_evaluation` of several methods, masks and seeds, each under its own names; `layers` by mask, `where`: facts and n."""
    parts = rows.groupby(["method", "mask", "seed"], sort=False)
    return pd.concat([of_evaluation(part, localization=mask, method=method, layers=layers.get(mask, ""), **where)
                      for (method, mask, _), part in parts], ignore_index=True)


def estimates(long: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    """One row a `mask` and `measure`: `stats.summary`, and `collapsed`, whether any run of the mask did, by rows of `evaluation.summarize`.

    By rows of `edits` also `broken`: formats, separated by commas, that retained facts lost in any run.
    """
    collapsed = summary.groupby("mask")["collapsed"].any()
    table = stats.summary(long, by=["localization", "measure"]).rename(columns={"localization": "mask"})
    table = table.assign(collapsed=table["mask"].map(collapsed).eq(True))
    if "broken" not in summary:
        return table
    lost = summary.groupby("mask")["broken"].agg(lambda reasons: ", ".join(dict.fromkeys(re.findall(r"(\w+)_retain", "; ".join(reasons)))))
    return table.assign(broken=table["mask"].map(lost).fillna(""))


def costs(long: pd.DataFrame, by: Sequence[str] = ("localization",), reading: str = "top1") -> pd.DataFrame:
    """What edits do without any attack: means of every measure by `by` in a reading, called as `evaluation.summarize` calls them, and `text_loss`.

    `collapse` says why the means count as a wrecked model (`evaluation.collapse`), against the unedited model (localization none)
    of the same `model`, where the rows name models; empty if they do not, or there is none. `broken` names other formats that
    retained facts have lost (`evaluation.broken`): a low score of forgotten facts means little there.
    """
    asked = long[(long["attack"] == "none") & (long["measure"].str.endswith(f" {reading}") | (long["measure"] == "text_loss"))]
    asked = asked.assign(measure=asked["measure"].str.removesuffix(f" {reading}"), model=asked["model"] if "model" in asked else "")
    mean = lambda rows, keys: rows.groupby([*keys, "measure"], sort=False)["value"].mean().unstack()
    keys = list(dict.fromkeys([*by, "model", "localization"]))
    means, base = mean(asked, keys), mean(asked[asked["localization"] == "none"], ["model"])
    before = dict(base.iterrows())
    edited = [(row, before.get(row["model"], {})) for _, row in means.reset_index().iterrows()]
    why = lambda rule: ["; ".join(rule(row, unedited)) if row["localization"] != "none" and len(unedited) else "" for row, unedited in edited]
    return means.assign(collapse=why(collapse), broken=why(broken)).droplevel([name for name in keys if name not in by])


def edits(long: pd.DataFrame, by: str = "localization", reading: str = "top1") -> pd.DataFrame:
    """`costs` of each edit: one row a `mask` and `seed`, with `collapsed`. `by="method"`: of each method, under `mask` all the same."""
    table = costs(long, [by, "seed"], reading).drop(index={"localization": "none", "method": "base"}[by], level=0, errors="ignore")
    return table.reset_index(names=["mask", "seed"]).assign(collapsed=lambda t: t["collapse"] != "")


def over_seeds(made: pd.DataFrame) -> pd.DataFrame:
    """One row a mask from those of `edits`: means over its seeds, `collapsed`, whether any edit did, and `why`; `broken` of any."""
    groups = made.groupby("mask", sort=False)
    why = lambda reasons: "; ".join(dict.fromkeys(filter(None, reasons)))
    flags = groups.agg(collapsed=("collapsed", "max"), why=("collapse", why), broken=("broken", why))
    return made.drop(columns=["seed", "collapse", "collapsed", "broken"]).groupby("mask", sort=False).mean().join(flags)


def with_before(table: pd.DataFrame, long: pd.DataFrame, reading: str = "top1") -> pd.DataFrame:
    """A table of `over_seeds` below a row `before`, the unedited model."""
    base = costs(long, reading=reading).loc[["none"]].rename(index={"none": "before"}).assign(collapsed=False, why="", broken="")
    return pd.concat([base[table.columns], table]).rename_axis("mask")


def pooled(long: pd.DataFrame, stored: pd.DataFrame) -> pd.DataFrame:
    """Long results with a column `model`, and those stored ones of the same models, facts, methods and masks; one row a value.

    A mask of the same name in other layers is another mask, but for random ones, which every seed draws anew.
    """
    same = ["model", "facts", "method", "localization"]
    kept = stored.merge(long[[*same, "layers"]].drop_duplicates().rename(columns={"layers": "here"})) if len(stored) else stored
    if len(kept):
        kept = kept[(kept["layers"] == kept["here"]) | kept["localization"].str.startswith("random")].drop(columns="here")
    key = [*same, "seed", "attack", "fact", "measure"]
    # every run measures the unedited model, under its own seed
    base = kept["localization"] == "none"
    return pd.concat([kept[~base], long], ignore_index=True).drop_duplicates(key, keep="last", ignore_index=True)


def at_hand(long: pd.DataFrame, stored: pd.DataFrame, run: str = "") -> pd.DataFrame:
    """`pooled`, and the stored rows of other masks of the same models, facts and methods: all that claims can be judged by; one row a value.

    `run`: of rows that name none, those made here. `stale` is False there.
    """
    same = ["model", "facts", "method", "localization"]
    here = long[same].drop_duplicates()
    asked = stored.merge(here[same[:3]].drop_duplicates())
    asked = asked[(asked["localization"] != "none") & ~pd.MultiIndex.from_frame(asked[same]).isin(pd.MultiIndex.from_frame(here))]
    others = asked.drop_duplicates([*same, "seed", "attack", "fact", "measure"], keep="last")
    rows = pd.concat([others, pooled(long, stored)], ignore_index=True)
    own = {"run": run} if "run" not in rows else {"run": rows["run"].fillna(run)}
    return rows.assign(**own, stale=rows["stale"].eq(True) if "stale" in rows else False)


def after_attacks(long: pd.DataFrame) -> pd.DataFrame:
    """The rows of edits that SHOWN names, each with its `label`; in the order of SHOWN."""
    edited = long[long["localization"] != "none"]
    parts = [edited[(edited["attack"] == attack) & (edited["measure"] == measure)].assign(label=label) for label, (attack, measure) in SHOWN.items()]
    return pd.concat(parts, ignore_index=True)


def drift(made: pd.DataFrame, stored: pd.DataFrame) -> pd.DataFrame:
    """Means over facts of edits made twice, in the same place with the same seed: `here`, `stored` and their `difference`.

    Both are long results with a column `model`; one row a model, facts, method, mask, layers, seed, attack and measure of both.
    """
    key = ["model", "facts", "method", "localization", "layers", "seed", "attack", "measure"]
    means = [rows[rows["localization"] != "none"].groupby(key)["value"].mean().rename(name) for rows, name in ((made, "here"), (stored, "stored"))]
    both = pd.concat(means, axis=1, join="inner").reset_index()
    return both.assign(difference=both["here"] - both["stored"])


def by_format(estimated: pd.DataFrame, answer: str = "edit", reading: str = "top1") -> pd.DataFrame:
    """Those of `estimates` that say how often the facts to forget get an answer, `edit` or `forget` (the true one), with their `format`."""
    suffix = f"{answer} {reading}"
    rows = estimated[estimated["measure"].str.endswith(suffix) & ~estimated["measure"].str.startswith("neighborhood")]
    return rows.assign(format=rows["measure"].str.removesuffix(suffix).str.rstrip("_").replace("", "one_shot"))


def of_localization(regions: pd.DataFrame, units: Mapping[str, str], overlap: Mapping[str, float], area: Mapping[str, float], **where) -> pd.DataFrame:
    """Long results from `evidence.regions`: of each choice its shares of lookup and extraction layers, and where there is one its overlap with
    the choices of resampled facts and the area under the answer as its components are knocked out. `setting` names its `units`.

    `where`: facts, n and seed.
    """
    shares = regions.melt("choice", ["lookup", "extraction"], "measure").assign(measure=lambda t: t["measure"] + " share")
    others = [{"choice": choice, "measure": measure, "value": value}
              for measure, found in {"overlap": overlap, "knock-out area": area}.items() for choice, value in found.items()]
    table = pd.concat([shares, pd.DataFrame(others)], ignore_index=True)
    table = table.assign(localization=table["choice"], setting=table["choice"].map(units).fillna(""), attack="none", fact="")
    return pd.concat([_tidy(part, localization=choice, method=LOCALIZE, **where) for choice, part in table.groupby("choice", sort=False)],
                     ignore_index=True)


def of_attacks(rows: pd.DataFrame, split: Split, **where) -> pd.DataFrame:
    """Long results from rows of `attacks.run` on one edit, or on none: each attack as made, the probes' share of layers and each layer,
    of patching the depth score, and the worst case.

    Left out: the facts that an attack was trained on, and `untouched` (attack "none" comes from `of_evaluation`). The worst case is missing
    where `headline.worst_case` cannot be had.
    """
    read = rows[rows["group"].isin(["forget", "retain"]) & (rows["attack"] != "none")]
    inside = read["attack"].isin(["probe", "logit lens", "patch"])
    tables = [part.assign(attack=_names(part)) for part in _melt(read[~inside])]
    tables = [part[(part["measure"].str.endswith(" top1")) | ~part["attack"].str.split(":").str[0].isin(BRIEF)] for part in tables]
    tables += [_probed(read), _probed_by_layer(read), _patched(read), _worst(rows, split)]
    tables = [table for table in tables if len(table)]
    return _tidy(pd.concat(tables), **where) if tables else pd.DataFrame(columns=COLUMNS)


def _melt(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """One table for each answer and reading, with `fact`, `measure` and `value`."""
    tables = []
    for (group, format), part in rows.groupby(["group", "format"], sort=False):
        for answer, name in measure_names(group, format).items():
            for reading, column in READINGS.items():
                value = part[f"{column}_{answer}"]
                tables.append(part.assign(fact=_facts(part), measure=f"{name} {reading}", value=value)[value.notna()])
    return tables


def _names(part: pd.DataFrame) -> pd.Series:
    """The attack as rows of results call it."""
    plain = pd.Series([setting.removesuffix(f", {format}") for setting, format in zip(part["setting"], part["format"])], part.index)
    meant = (plain == part["attack"].map(ATTACKS)) & (part["control"] == "")
    full = part["attack"] + ": " + plain + part["control"].map(lambda control: f" ({control})" if control else "")
    return part["attack"].where(meant, full)


def _probed(rows: pd.DataFrame) -> pd.DataFrame:
    """Per fact the share of the layers in the upper two thirds at which a probe at the last token reads the true answer."""
    attack, position = PROBED
    shares = upper_layers(rows, position=position)
    if shares.empty:
        return pd.DataFrame()
    tables = [pd.DataFrame({"fact": _facts(shares), "measure": f"probe_true {reading}", "value": shares[f"{column}_true"]})
              for reading, column in READINGS.items()]
    return pd.concat(tables).assign(attack=attack, setting=f"{position}, upper two thirds")


def _probed_by_layer(rows: pd.DataFrame) -> pd.DataFrame:
    """Each position and layer as an attack of its own, "probe: last, layer 3"; only top-1 of the true answer, because there are many."""
    part = rows[(rows["attack"] == PROBED[0]) & (rows["group"] == "forget")]
    return part.assign(attack=_names(part), fact=_facts(part), measure="forget top1", value=part["top_true"])


def _patched(rows: pd.DataFrame) -> pd.DataFrame:
    """Per fact the depth of erasure, from 0 (all of it is still there) to 1 (as if never learned)."""
    part = rows[rows["attack"] == "patch"]
    if part.empty:
        return pd.DataFrame()
    scores = depth_score(part).dropna(subset="uds")
    return scores.assign(attack="patch", setting="depth score, last", fact=_facts(scores), measure="depth", value=scores["uds"])


def _worst(rows: pd.DataFrame, split: Split) -> pd.DataFrame:
    """The worst case over all attacks but those with the original weights, "worst", and at each level of access, "worst: training"."""
    made, tables = set(rows["attack"]), []
    levels = {f"worst: {access}": names for access, names in LEVELS.items() if made & set(names)}
    for attack, names in {"worst": None, **levels}.items():
        for reading in READINGS:
            try:
                worst = worst_case(rows, split, reading, attacks=names)
            except AttackError:  # too few facts, or all with one answer: there is no worst case to report
                continue
            said = {"attack": attack, "setting": worst["attack"] + ": " + worst["setting"], "fact": _facts(worst)}
            tables += [pd.DataFrame({**said, "measure": f"{name} {reading}", "value": worst[column]})
                       for name, column in {"forget": "recovered", "worst_other": "other", "worst_single": "single"}.items()]
    return pd.concat(tables).dropna(subset="value") if tables else pd.DataFrame()


def _facts(table: pd.DataFrame) -> pd.Series:
    return table["subject"].astype(str) + " | " + table["relation"].astype(str)


def _tidy(table: pd.DataFrame, *, facts: str, n: int, seed: int, localization: str, method: str, layers: str = "") -> pd.DataFrame:
    own = {"facts": facts, "n": n, "seed": int(seed), "localization": localization, "layers": layers, "method": method}
    return table.drop(columns=[c for c in own if c in table]).assign(**own)[COLUMNS].reset_index(drop=True)
