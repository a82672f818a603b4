"""The tables of a report: verdicts on claims, the worst case by method and mask, and where the rows come from."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pandas as pd

from helpers import claims, presets, results, stats
from helpers.attacks.headline import SPOKEN
from helpers.checkpoints import BUNDLED
from helpers.claims import Claim, Claims
from helpers.unlearning import evaluation

NOT_HERE = "not run here"
OTHER = {"probability": "top1", "top1": "probability"}
FIGURE = ["value", "n_runs", "setting"]
COSTS = ["edit", "retain", "mcq_retain", "text_loss"]
WHERE = ["lookup share", "extraction share", "overlap", "knock-out area"]
BY = ["model", "facts", "n", "method", "localization"]


def bundled() -> list[str]:
    """Names of the tiny models that come with the project."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))


def published_models() -> list[str]:
    """The models that the paper trained, as `data/presets.yaml` names them."""
    table = presets.models()
    return table.loc[table["published settings"], "model"].tolist()


def columns(rows: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Models in the order of the verdict table: bundled and other ones, and those of the paper of which there are rows."""
    ran, theirs = list(dict.fromkeys(rows["model"])), published_models()
    return list(dict.fromkeys([*bundled(), *(name for name in ran if name not in theirs)])), [name for name in theirs if name in ran]


def verdicts(declared: Claims, rows: pd.DataFrame) -> pd.DataFrame:
    """`claims.verdict`, and beside it the same comparison in the other reading: `other_value`, `other_low`, `other_high`.

    One row a claim and model. Raises `claims.ClaimsError`.
    """
    found = claims.verdict(declared, rows)
    if found.empty:
        return found
    turned = [claim.model_copy(update={"reading": OTHER[claim.reading]}) for claim in declared.claims if claim.reading]
    other = claims.comparisons(declared.model_copy(update={"claims": turned}), rows)
    same, figures = ["claim", "model", "mask", "against"], ["value", "low", "high"]
    return found.merge(other[[*same, *figures]].rename(columns={name: f"other_{name}" for name in figures}), on=same, how="left")


def cells(declared: Claims, found: pd.DataFrame, rows: pd.DataFrame) -> Iterator[tuple[Claim, list[pd.Series | str]]]:
    """Each claim with one entry a column of the verdict table: its verdict, or why there is none."""
    ours, theirs = columns(rows)
    keyed = {(row["claim"], row["model"]): row for _, row in found.iterrows()}
    for claim in declared.claims:
        asked = {model for model in (*ours, *theirs) if any(fnmatchcase(model, pattern) for pattern in claim.models)}
        entries = [keyed.get((claim.id, model), "not run" if model in asked else "not asked") for model in (*ours, *theirs)]
        yield claim, entries if theirs else [*entries, NOT_HERE]


def published(declared: Claims, claim: Claim, folder: Path = claims.DATA / "published") -> pd.DataFrame:
    """The figures of `data/published` that a claim refers to: measure, mask, value, n_runs, setting; the claim's own masks first."""
    names = [*claim.masks, *(name for name in declared.rivals(claim) if "*" not in name)]
    found = []
    for table, measures in claim.published.items():
        figures = pd.read_csv(folder / f"{table}.csv").set_index(["measure", "method"])
        for measure in measures:
            keys = [(name, (measure, declared.masks.get(name))) for name in names]
            found += [{"measure": measure, "mask": name, **figures.loc[key, FIGURE]} for name, key in keys if key in figures.index]
    return pd.DataFrame(found, columns=["measure", "mask", *FIGURE])


def leaderboard(rows: pd.DataFrame, reading: str = "top1") -> pd.DataFrame:
    """One row a model, facts, method and mask, the hardest to attack first, those that collapsed last.

    `worst`: the most that any attack recovers which makes the model itself answer; `inside`: probes too; `untouched`: the edited model
    left alone, on the same facts; each with `…_low`, `…_high`, `…_n_facts`, `…_n_seeds`, as COSTS have them. `attack`: the one that most
    often recovers a fact. `collapsed`: why the means over seeds count as a wrecked model, by `evaluation.collapse`.
    """
    forget = rows["measure"] == f"forget {reading}"
    spoken = rows[(rows["attack"] == f"worst: {SPOKEN}") & forget]
    keys = [*BY, "seed", "fact"]
    alone = rows[(rows["attack"] == "none") & forget].merge(spoken[keys], on=keys)
    plain = rows[rows["attack"] == "none"]
    parts = {"worst": spoken, "inside": rows[(rows["attack"] == "worst") & forget], "untouched": alone,
             **{name: plain[plain["measure"].isin([f"{name} {reading}", name])] for name in COSTS}}
    if spoken.empty:
        return pd.DataFrame(columns=[*BY, "worst", "attack", "collapsed"])
    table = spoken[BY].drop_duplicates()
    for name, part in parts.items():
        table = table.merge(_summary(part, name), on=BY, how="left")
    base = _unedited(plain, reading)
    reasons = [evaluation.collapse(row, base.loc[(row["model"], row["facts"])]) if (row["model"], row["facts"]) in base.index else []
               for _, row in table.iterrows()]
    attacks = [_most_often(spoken, row) for _, row in table.iterrows()]
    table = table.assign(attack=attacks, collapsed=["; ".join(reason) for reason in reasons], lost=list(map(bool, reasons)))
    return table.sort_values(["model", "facts", "lost", "worst"], kind="stable").drop(columns="lost").reset_index(drop=True)


def localizations(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a model, facts and choice: means over seeds of the measures of `results.of_localization`, the `units` of the first seed, and
    `same`, how many of the `seeds` chose these units."""
    found = rows[rows["method"] == results.LOCALIZE].sort_values("seed", kind="stable")
    by, table = ["model", "facts", "localization"], []
    for key, part in found.groupby(by, sort=False):
        first = part.drop_duplicates("seed")["setting"]
        table.append({**dict(zip(by, key)), **part.groupby("measure")["value"].mean(), "units": first.iloc[0],
                      "same": int((first == first.iloc[0]).sum()), "seeds": len(first)})
    return pd.DataFrame(table, columns=[*by, *WHERE, "units", "same", "seeds"])


def provenance(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a notebook, commit, code and machine: how many runs, of which stale, rows and rows used, and when they were started."""
    by = ["notebook", "commit", "code", "machine"]
    table = runs.groupby(by, dropna=False).agg(runs=("run", "nunique"), stale=("stale", "sum"), rows=("rows", "sum"), used=("used", "sum"),
                                               first=("started", "min"), last=("started", "max"))
    return table.reset_index()


def _summary(part: pd.DataFrame, name: str) -> pd.DataFrame:
    if part.empty:
        return pd.DataFrame(columns=[*BY, name])
    found = stats.summary(part, BY)[[*BY, "value", "low", "high", "n_facts", "n_seeds"]]
    return found.rename(columns={"value": name, **{end: f"{name}_{end}" for end in ("low", "high", "n_facts", "n_seeds")}})


def _unedited(plain: pd.DataFrame, reading: str) -> pd.DataFrame:
    """Means of the unedited model by model and facts, one column a measure."""
    base = plain[plain["localization"] == "none"]
    names = base["measure"].str.removesuffix(f" {reading}")
    return base.assign(name=names).pivot_table(index=["model", "facts"], columns="name", values="value", aggfunc="mean")


def _most_often(spoken: pd.DataFrame, row: pd.Series) -> str:
    """The attack behind most of the facts that the edited model does not say by itself; the setting of a worst case begins with it."""
    mine = spoken[(spoken[BY] == row[BY]).all(axis=1) & (spoken["value"] > 0) & ~spoken["setting"].str.startswith("none: ")]
    return mine["setting"].str.split(": ").str[0].mode().get(0, "")
