"""The tables of a report: verdicts on claims, the worst case by method and mask, and where the rows come from."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pandas as pd

from helpers import claims, presets, results, stats
from helpers.attacks.headline import SPOKEN
from helpers.checkpoints import BUNDLED
from helpers.claims import Claim, Claims
from helpers.report import edits
from helpers.unlearning import evaluation

NOT_HERE = "not run here"
OTHER = {"probability": "top1", "top1": "probability"}
FIGURE = ["value", "n_runs", "setting"]
COSTS = ["edit", "retain", "mcq_retain", "text_loss"]
WHERE = ["lookup share", "extraction share", "overlap", "knock-out area"]
BY = edits.KEY
NOT_RUN = "not run"


def number(value: float, signed: bool = False) -> str:
    """Two decimals; a dash where there is none."""
    return "–" if pd.isna(value) else f"{value:+.2f}" if signed else f"{value:.2f}"


def estimate(row: Mapping[str, Any], name: str = "", signed: bool = False) -> str:
    """Value and interval of a row, "0.85 [0.81, 0.89]", the value alone where there is none; `name` where its columns begin with one."""
    value, low, high = (row.get(key) for key in ((name, f"{name}_low", f"{name}_high") if name else ("value", "low", "high")))
    return number(value, signed) if pd.isna(value) or pd.isna(low) else f"{number(value, signed)} [{number(low, signed)}, {number(high, signed)}]"


def counted(row: Mapping[str, Any], name: str = "") -> str:
    """How many facts and seeds are behind an estimate, "64 facts × 3 seeds"; a measure of the whole set has no facts. "one seed": its interval,
    if it has one, says nothing of other seeds. Empty where there is no estimate."""
    facts, seeds = (row.get(f"{name}_{key}" if name else key) for key in ("n_facts", "n_seeds"))
    if pd.isna(seeds) or not seeds:
        return ""
    return f"{facts:.0f} facts × " * (facts > 1) + ("one seed" if seeds == 1 else f"{seeds:.0f} seeds")


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


def verdicts(declared: Claims, rows: pd.DataFrame, made: pd.DataFrame | None = None, compared: pd.DataFrame | None = None) -> pd.DataFrame:
    """`claims.verdict`, and beside it the same comparison in the other reading: `other_value`, `other_low`, `other_high`.

    One row a claim and model. `state`: the verdict, or "not run" where no row speaks of the claim; `warning`: what must be known of the edits
    that are compared, from `edits.made`. `compared`: `claims.comparisons` of the same, where it is there already. Raises `claims.ClaimsError`.
    """
    found = claims.concluded(claims.comparisons(declared, rows) if compared is None else compared)
    if found.empty:
        return found
    found = found.merge(_other_reading(declared, found, rows), on=["claim", "model", "mask", "against"], how="left")
    found["state"] = found["verdict"].where((found["n_facts"] > 0) | (found["missing"] > 0), NOT_RUN)
    return found.assign(warning=_warnings(declared, found, rows, made))


def decided(declared: Claims, rows: pd.DataFrame, made: pd.DataFrame | None = None, compared: pd.DataFrame | None = None) -> pd.DataFrame:
    """The comparisons that decide: all of a claim that holds, and those short of the margin of one that fails, with `warning`.

    `compared`: as in `verdicts`.
    """
    table = claims.comparisons(declared, rows) if compared is None else compared
    if table.empty:
        return table
    whole = lambda kinds: "fails" if "fails" in set(kinds) else "holds" if set(kinds) == {"holds"} else "undecided"
    table = table[table["verdict"] == table.groupby(["claim", "model"])["verdict"].transform(whole)]
    table = table[table["verdict"] != "undecided"]
    return table.assign(warning=_warnings(declared, table, rows, made))


def in_words(declared: Claims, table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `verdicts` or `decided` to be read: what was asked, the comparison with its interval, and when the claim would hold."""
    statements = {claim.id: claim.statement for claim in declared.claims}
    said = [{
        "statement": statements[row["claim"]], "claim": row["claim"], "model": row["model"], "verdict": row["verdict"],
        **({"held": f"{row['held']} of {row['of']}"} if "held" in row else {}),
        "comparison": f"{row['mask']} − {row['against']}" if row["against"] else row["mask"], "value": estimate(row, signed=row["against"] != ""),
        "holds if all of it is": asked(row), "p (Holm)": f"{row['p_holm']:.4f}", "effect size h": number(row.get("h"), signed=True),
        "facts": row["n_facts"], "seeds": row["n_seeds"], "published": f"{number(row['published_mask'])}, {number(row['published_against'])}",
        "note": "; ".join(filter(None, (row["warning"], f"guard broken: {row['guard']}" if row["guard"] else "", *_gaps(row)))),
    } for _, row in table.iterrows()]
    return pd.DataFrame(said)


def _gaps(row: pd.Series) -> list[str]:
    """Comparisons of an undecided claim that lack rows, seeds or facts."""
    reasons = row["reason"].split("; ") if row["verdict"] == "undecided" else []
    return [reason for reason in reasons if reason.endswith(("not run", "seeds", "in some seed"))]


def asked(row: Mapping[str, Any]) -> str:
    """Direction and margin of a comparison."""
    return f"{'above' if row['direction'] == 'higher' else 'below'} {row['margin'] + 0.0:+.2f}"


def cells(declared: Claims, found: pd.DataFrame, rows: pd.DataFrame) -> Iterator[tuple[Claim, list[pd.Series | str]]]:
    """Each claim with one entry a column of the verdict table: its verdict, or why there is none."""
    ours, theirs = columns(rows)
    keyed = {(row["claim"], row["model"]): row for _, row in found.iterrows()}
    for claim in declared.claims:
        models = {model for model in (*ours, *theirs) if any(fnmatchcase(model, pattern) for pattern in claim.models)}
        entries = [keyed.get((claim.id, model), NOT_RUN if model in models else "not asked") for model in (*ours, *theirs)]
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


def leaderboard(rows: pd.DataFrame, reading: str = "top1", made: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row a model, facts, method and mask, the hardest to attack first, those that collapsed last.

    `worst`: the most that any attack recovers which makes the model itself answer; `inside`: probes too; `untouched`: the edited model
    left alone, on the same facts; each with `…_low`, `…_high`, `…_n_facts`, `…_n_seeds`, as COSTS have them. `attack`: the one that most
    often recovers a fact. `collapsed`: why the means over seeds count as a wrecked model, by `evaluation.collapse`. `taken`, `weak`,
    `broken` and `light`: from `edits.made`. `name`: the mask, with others that are the same edit, and a dagger where it did not take.
    """
    forget = rows["measure"] == f"forget {reading}"
    spoken = rows[(rows["attack"] == f"worst: {SPOKEN}") & forget]
    keys = [*BY, "seed", "fact"]
    alone = rows[(rows["attack"] == "none") & forget].merge(spoken[keys], on=keys)
    plain = rows[rows["attack"] == "none"]
    parts = {"worst": spoken, "inside": rows[(rows["attack"] == "worst") & forget], "untouched": alone,
             **{name: plain[plain["measure"].isin([f"{name} {reading}", name])] for name in COSTS}}
    if spoken.empty:
        return pd.DataFrame(columns=[*BY, "worst", "attack", "collapsed", "name"])
    table = spoken[BY].drop_duplicates()
    for name, part in parts.items():
        table = table.merge(_summary(part, name), on=BY, how="left")
    base = _unedited(plain, reading)
    reasons = [evaluation.collapse(row, base.loc[(row["model"], row["facts"])]) if (row["model"], row["facts"]) in base.index else []
               for _, row in table.iterrows()]
    attacks = [_most_often(spoken, row) for _, row in table.iterrows()]
    table = table.assign(attack=attacks, collapsed=["; ".join(reason) for reason in reasons], lost=list(map(bool, reasons)))
    made = edits.made(rows) if made is None else made
    table = table.join(made[["taken", "weak", "broken", "light", "same_as"]], on=BY).fillna({"weak": False, "light": "", "same_as": ""})
    edit = list(table[BY].itertuples(index=False, name=None))
    stands = pd.Series([(*key[:-1], same) if (*key[:-1], same) in edit else None for key, same in zip(edit, table["same_as"])], table.index)
    also = table["localization"].groupby(stands).agg(lambda names: "".join(f" = {name}" for name in names)).to_dict()
    marks = [f" {edits.DAGGER}" * bool(weak) + f" ({light} profile)" * bool(light) for weak, light in zip(table["weak"], table["light"])]
    table = table.assign(name=[key[-1] + also.get(key, "") + mark for key, mark in zip(edit, marks)])[stands.isna()].drop(columns="same_as")
    return table.sort_values(["model", "facts", "lost", "worst"], kind="stable").drop(columns="lost").reset_index(drop=True)


def attacked_runs(rows: pd.DataFrame) -> list[str]:
    """The runs behind `leaderboard`."""
    parts = rows[rows["attack"].isin(["none", "worst", f"worst: {SPOKEN}"])].drop_duplicates([*BY, "attack", "run"])
    attacked = parts.loc[parts["attack"] == f"worst: {SPOKEN}", BY].drop_duplicates()
    return parts.merge(attacked, on=BY)["run"].unique().tolist()


def board_in_words(board: pd.DataFrame) -> pd.DataFrame:
    """Rows of `leaderboard` to be read."""
    columns = {"worst": "worst case", "untouched": "left alone", "inside": "probes too", "edit": "edit, trained words", "retain": "retained",
               "mcq_retain": "retained, MCQ", "text_loss": "text loss"}
    said = [{**{name: row[name] for name in ("model", "facts", "method")}, "mask": row["name"],
             **{label: f"{estimate(row, name)} ({counted(row, name) or 'not read'})" for name, label in columns.items()}, "by": row["attack"],
             "collapsed": row["collapsed"], "broken": row["broken"]}
            for _, row in board.iterrows()]
    return pd.DataFrame(said)


def overview(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a model, facts and method, masks of single weights together: how many masks, seeds, attacks and values."""
    by = rows[["model", "facts"]].assign(method=rows["method"].where(~rows["method"].str.startswith("weight mask"), "weight masks"))
    counts = {"masks": ("localization", "nunique"), "seeds": ("seed", "nunique"), "attacks": ("attack", "nunique"), "values": ("value", "size")}
    return rows.drop(columns="method").join(by["method"]).groupby(["model", "facts", "method"], as_index=False).agg(**counts)


def localizations(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a model, facts and choice: the measures of `results.of_localization` by `stats.summary`, each with `…_low` and `…_high`, the
    `units` of the first seed, and `same`, how many of the `seeds` chose these units."""
    found = rows[rows["method"] == results.LOCALIZE].sort_values("seed", kind="stable")
    by, table = ["model", "facts", "localization"], []
    for key, part in found.groupby(by, sort=False):
        first = part.drop_duplicates("seed")["setting"]
        means = stats.summary(part, ["measure"]).set_index("measure")
        figures = {name + suffix: value for suffix, column in (("", "value"), ("_low", "low"), ("_high", "high")) for name, value in means[column].items()}
        table.append({**dict(zip(by, key)), **figures, "units": first.iloc[0], "same": int((first == first.iloc[0]).sum()), "seeds": len(first)})
    return pd.DataFrame(table, columns=[*by, *(name + end for name in WHERE for end in ("", "_low", "_high")), "units", "same", "seeds"])


def provenance(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a notebook, profile, commit, code and machine: how many runs, of which stale, rows and rows used, and when they were started."""
    short = lambda text: text[:8] + ("-dirty" if text.endswith("-dirty") else "")
    runs = runs.assign(profile=runs["profile"].replace("", "not recorded"))
    by = ["notebook", "profile", "commit", "code", "machine"]
    table = runs.groupby(by, dropna=False).agg(runs=("run", "nunique"), stale=("stale", "sum"), rows=("rows", "sum"), used=("used", "sum"),
                                               first=("started", "min"), last=("started", "max"))
    return table.reset_index().assign(commit=lambda t: t["commit"].map(short), code=lambda t: t["code"].map(short))


def _other_reading(declared: Claims, found: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The comparisons of `found` in the other reading, and no others: `other_value`, `other_low`, `other_high`."""
    asked_of = {claim.id: claim for claim in declared.claims if claim.reading}
    same, figures = ["claim", "model", "mask", "against"], ["value", "low", "high"]
    turned = [claim.model_copy(update={"reading": OTHER[claim.reading], "models": [glob.escape(model)], "masks": [mask], "guards": [],
                                       "against": [against] if against else []})
              for name, model, mask, against in found[same].itertuples(index=False, name=None) if (claim := asked_of.get(name))]
    other = claims.comparisons(declared.model_copy(update={"claims": turned}), rows)
    return other.reindex(columns=[*same, *figures]).rename(columns={name: f"other_{name}" for name in figures})


def _warnings(declared: Claims, table: pd.DataFrame, rows: pd.DataFrame, made: pd.DataFrame | None) -> list[str]:
    """For each comparison: edits that collapsed or did not take, and other claims that rest on the very same numbers."""
    made = edits.made(rows) if made is None else made
    asked_of, everything = {claim.id: claim for claim in declared.claims}, made.index.get_level_values("facts").unique()
    said, same = [], table.groupby(["model", "mask", "against", "value", "low", "high"])["claim"].agg(lambda names: list(dict.fromkeys(names)))
    for _, row in table.iterrows():
        claim, sides = asked_of[row["claim"]], {"mask": row["mask"], **({"rival": row["against"]} if row["against"] else {})}
        facts = {name for name in everything if fnmatchcase(name, claim.facts)}
        others = same.get((row["model"], row["mask"], row["against"], row["value"], row["low"], row["high"]), [])
        others = [f"same comparison as {name}" for name in others if name != claim.id]
        said.append("; ".join(filter(None, [edits.warnings(row["model"], facts, claim.method, sides, made) if row["n_facts"] else "", *others])))
    return said


def _summary(part: pd.DataFrame, name: str) -> pd.DataFrame:
    if part.empty:
        return pd.DataFrame(columns=[*BY, name])
    found = stats.summary(part[[*BY, "measure", "fact", "seed", "value", "run"]], BY)[[*BY, "value", "low", "high", "n_facts", "n_seeds"]]
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
