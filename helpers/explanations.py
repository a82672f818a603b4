"""Mechanism or depth: which of the two explains what edits of MLP windows achieve?

    scores = pd.concat([layer_scores(name, lookup) for name, lookup in lookups.items()])
    table = explain(rows, scores, better="higher")     # one row an explanation and fit: slope and intervals
    verdict(table)                                     # {"verdict": "lookup", "depth", "both" or "open", "reason": …}

Every window of neighbouring MLPs is edited alike, in several models, and a measure of its robustness is regressed on two
properties of the window, with an intercept for each model (only windows of one model are compared):

    lookup   the share of the model's lookup scores that lies in the window
    depth    how early the window begins: 1 for the first MLPs, 0 for the last ones

Slopes are per standard deviation among the windows of a model, so that the two can be compared; positive is what the explanation
predicts (more lookup, or earlier: better). Each is fitted three times: with the rival ignored, beside the rival, and beside
the rival and its square, because a rival that works, but not in proportion, would otherwise lend its curve to the other.

Two kinds of chance are kept apart, and a slope has to be clear of both:

- facts and seeds, `low` … `high`: a slope is linear in the values, so every fact has its own in every seed, and
  `stats.summary` applies to these (bootstrap over facts, t over seeds, and both at once).
- windows, `windows_low` … `windows_high`: would the line hold for other windows? Least squares over the means of the
  windows, with errors that allow for leverage and unequal spread (HC3; MacKinnon and White 1985). Neighbouring
  windows share MLPs, which these errors do not know of: among few models they are still somewhat too narrow.

The rule, written before any window was edited:

1. If depth and lookup go together (variance inflation above MAX_VIF), or with fewer than MIN_SEEDS seeds, it stays open.
2. An explanation survives if its slope is above `margin` in both intervals, beside the rival and beside its square.
3. If both do, the verdict is both. If one does, it is that one, provided that its slope is larger than the rival's in both
   intervals of the difference; else, and if none does, it stays open. Not to survive is not to be refuted.

One measure decides, the first of MEASURES; the others are shown beside it. Edits that wreck the model are left out. `by_measure` does both:

    table = by_measure(rows, scores)                       # `explain` for each of MEASURES
    verdict(table[table["label"] == MEASURES[0].label])
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import statsmodels.api as sm

from helpers import results, stats
from helpers.localization.fact_lookup import Lookup

LOOKUP, DEPTH, DIFFERENCE = "lookup", "depth", "lookup - depth"
RIVALS = ("ignored", "straight", "curved")
FEWEST_WINDOWS, MIN_SEEDS, MAX_VIF = 5, 3, 5.0
WINDOW, WINDOW_NAME = ["model", "localization"], r"MLP \d+-\d+"


class ExplanationError(ValueError):
    """Rows that cannot be regressed on depth and lookup."""


@dataclass(frozen=True)
class Measure:
    """What is regressed: rows of one `measure` after one `attack` (`helpers.results`), and whether higher or lower is better."""

    label: str
    measure: str
    attack: str
    better: str

    def of(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Those of the long results that hold this measure of edited MLP windows."""
        named = rows["localization"].str.fullmatch(WINDOW_NAME)
        return rows[named & (rows["measure"] == self.measure) & (rows["attack"] == self.attack)]


# the first decides; it is the one by which family `depth` of data/claims.yaml compares windows
MEASURES = (Measure("new answer in multiple choice", "mcq_edit top1", "none", "higher"),
            Measure("true answer relearned by LoRA", "forget top1", "relearn lora", "lower"),
            Measure("true answer, worst case of all attacks", "forget top1", "worst", "lower"))


def layer_scores(model: str, lookup: Lookup, layers: Collection[int] = ()) -> pd.DataFrame:
    """`model`, `layer` and `score` ≥ 0 of every MLP: how much of the lookup it does, by the evidence of fact lookup.

    Of path patching (`fact_lookup.counterfact`) |score − score of the last layer|; of probes (`fact_lookup.sports`) by how
    much the accuracy at the name rises over this block. Where the evidence finds nothing in any, each of `layers`, chosen by
    hand, does as much.
    """
    evidence = lookup.evidence.sort_values("layer")
    if "difference" in evidence:
        score = evidence["difference"].abs()
    else:
        read = lookup.tables["probes"]
        before = read.loc[(read["position"] == "name") & (read["layer"] == 0), "accuracy"].mean()
        score = evidence["name_accuracy"].diff().fillna(evidence["name_accuracy"].iloc[0] - before).clip(lower=0)
    if not score.any():
        score = evidence["layer"].isin(layers).astype(float)
    return pd.DataFrame({"model": model, "layer": evidence["layer"].to_numpy(), "score": score.to_numpy()})


def wrecked(rows: pd.DataFrame) -> pd.Series:
    """Why, by `model` and `localization`, of the places whose edits wreck the model (`results.costs`)."""
    reasons = results.costs(rows, WINDOW)["collapse"]
    return reasons[reasons != ""]


def curves(rows: pd.DataFrame, measures: Sequence[Measure] = MEASURES) -> pd.DataFrame:
    """Each measure of each window: `label`, `model`, `localization`, `start` and the figures of `stats.summary`, `collapsed`."""
    lost, tables = set(wrecked(rows).index), []
    for measure in measures:
        part = measure.of(rows)
        if len(part):
            tables.append(stats.summary(part, [*WINDOW, "layers"]).assign(label=measure.label))
    if not tables:
        raise ExplanationError("no rows of MLP windows, such as 'MLP 2-4', with any of the measures")
    table = pd.concat(tables, ignore_index=True)
    table = table.assign(start=[int(layers.split()[0]) for layers in table["layers"]],
                         collapsed=[key in lost for key in table[WINDOW].itertuples(index=False, name=None)])
    return table.sort_values(["model", "start"], kind="stable", ignore_index=True)


def by_measure(rows: pd.DataFrame, scores: pd.DataFrame, measures: Sequence[Measure] = MEASURES, **options) -> pd.DataFrame:
    """`explain` for each measure, with its `label`; `options` go there. `rows` are long results of one method and set of facts.

    Windows that wreck their model are left out, and so is a model with too few others. `attrs["left_out"]` says what was left out
    and why, measures that cannot be regressed among it; the table may be empty.
    """
    rows = rows[rows["localization"].str.fullmatch(rf"none|{WINDOW_NAME}")]
    lost, tables = wrecked(rows), []
    left_out = {f"{model}, {window}": f"wrecks the model: {reason}" for (model, window), reason in lost.items()}
    keys = pd.MultiIndex.from_frame(rows[WINDOW])
    kept = rows[~keys.isin(list(lost.index)) & (rows["localization"] != "none")]
    count = kept.groupby("model")["localization"].nunique().reindex(rows["model"].unique(), fill_value=0)
    few = count[count < FEWEST_WINDOWS]
    left_out |= {model: f"{n} windows that leave it whole; needed are {FEWEST_WINDOWS}" for model, n in few.items()}
    for measure in measures:
        try:
            part = measure.of(kept[~kept["model"].isin(few.index)])
            tables.append(explain(part, scores, measure.better, **options).assign(label=measure.label))
        except ExplanationError as error:
            left_out[measure.label] = str(error)
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame({"label": pd.Series(dtype=str)})
    table.attrs = {"left_out": left_out}
    return table


def design(rows: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """One row a `model` and window (`localization`, "MLP 2-4"): `start`, `depth` and `lookup` (both 0 to 1), sorted by start.

    `rows` are long results (`helpers.results`) with the column `layers`, "2 3 4"; those of other masks are passed over.
    `scores` are of all MLPs, from `layer_scores`. Raises `ExplanationError` for models without scores or with too few windows.
    """
    named = rows[rows["localization"].str.fullmatch(WINDOW_NAME)].drop_duplicates(WINDOW)
    found = []
    for model, part in named.groupby("model", sort=False):
        share = scores[scores["model"] == model].set_index("layer")["score"]
        if not len(share) or (share < 0).any() or not share.sum() > 0:
            wrong = "lookup scores must be at least 0, and not all 0" if len(share) else "no lookup scores"
            raise ExplanationError(f"{model}: {wrong}; there are scores of {', '.join(scores['model'].unique()) or 'no model'}")
        layers = [[int(layer) for layer in text.split()] for text in part["layers"]]
        counts = {len(window) for window in layers}
        if len(counts) > 1 or len(part) < FEWEST_WINDOWS:
            sizes = " and ".join(map(str, sorted(counts)))
            raise ExplanationError(f"{model}: {len(part)} windows of {sizes} MLPs; needed are {FEWEST_WINDOWS} or more of one size")
        starts = np.array([window[0] for window in layers])
        places = {DEPTH: 1 - starts / (len(share) - counts.pop()), LOOKUP: [share[window].sum() / share.sum() for window in layers]}
        table = pd.DataFrame({"model": model, "localization": part["localization"].to_numpy(), "start": starts, **places})
        found.append(table.sort_values("start"))
    if not found:
        raise ExplanationError("no rows of MLP windows, such as 'MLP 2-4'")
    return pd.concat(found, ignore_index=True)


def explain(rows: pd.DataFrame, scores: pd.DataFrame, better: str = "higher", level: float = stats.LEVEL,
            resamples: int = stats.RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """One row an `explanation` and `rival` fit, and the difference of the two slopes beside each other.

    Columns: those of `stats.summary` for the slope (`value`, in units of the measure, turned so that better is positive),
    `windows_low`, `windows_high`, `vif` (how far the rival inflates the variance), `n_windows`, `n_models`.

    `rows`: of one measure, method and attack, as for `design`. Seeds that some window of some model lacks are left out, then
    facts that lack a value in one of the others. `better`: whether higher or lower values are. Raises `ExplanationError`.
    """
    if better not in ("higher", "lower"):
        raise ExplanationError(f"better={better!r}: higher or lower")
    windows = design(rows, scores)
    values = _values(rows, windows) * (1 if better == "higher" else -1)
    columns = {name: _standard(windows, name) for name in (LOOKUP, DEPTH)}
    fits = []
    for name, other in ((LOOKUP, DEPTH), (DEPTH, LOOKUP)):
        square = _within(windows, columns[other] ** 2)
        covariates = {"ignored": [], "straight": [columns[other]], "curved": [columns[other], square]}
        fits += [(name, rival, np.column_stack([columns[name], *covariates[rival]]), [1.0]) for rival in RIVALS]
    fits.append((DIFFERENCE, "straight", np.column_stack([columns[LOOKUP], columns[DEPTH]]), [1.0, -1.0]))
    found = []
    for name, rival, predictors, contrast in fits:
        contrast = np.pad(contrast, (0, predictors.shape[1] - len(contrast)))
        weights, inflation = _weights(predictors, contrast)
        slopes = pd.Series(values.to_numpy() @ weights, values.index, name="value").reset_index()
        row = stats.summary(slopes, level=level, resamples=resamples, seed=seed, bounded=False).iloc[0].to_dict()
        low, high = _over_windows(values, windows, predictors, contrast, level) if np.isfinite(inflation) else (np.nan, np.nan)
        found.append({"explanation": name, "rival": rival} | row | {
            "windows_low": low, "windows_high": high, "vif": inflation, "n_windows": len(windows), "n_models": windows["model"].nunique()})
    return pd.DataFrame(found)


def verdict(table: pd.DataFrame, margin: float = 0.0) -> dict[str, str]:
    """`verdict` (lookup, depth, both or open) and the `reason`, by the rule at the top of this file, from a table of `explain`."""
    rows = table.set_index(["explanation", "rival"])
    beside = rows.loc[(LOOKUP, "straight")]
    if not beside["vif"] <= MAX_VIF:
        return {"verdict": "open", "reason": f"depth and lookup go together (variance inflation {beside['vif']:.1f}, at most {MAX_VIF:g})"}
    if beside["n_seeds"] < MIN_SEEDS:
        return {"verdict": "open", "reason": f"{beside['n_seeds']} of {MIN_SEEDS} seeds"}
    clear = (rows[["low", "windows_low"]] > margin).all(axis=1)
    survivors = [name for name in (LOOKUP, DEPTH) if clear[name, "straight"] and clear[name, "curved"]]
    slopes = "; ".join(_said(rows, name, margin) for name in (LOOKUP, DEPTH))
    if len(survivors) != 1:
        found, how = ("both", "both slopes are") if survivors else ("open", "no slope is")
        return {"verdict": found, "reason": f"{how} clear of {margin:g} in every fit: {slopes}"}
    difference = rows.loc[(DIFFERENCE, "straight")]
    beats = (difference[["low", "windows_low"]] > 0).all() if survivors == [LOOKUP] else (difference[["high", "windows_high"]] < 0).all()
    if not beats:
        return {"verdict": "open", "reason": f"only {survivors[0]} is clear of {margin:g}, but not of the other's slope: {slopes}"}
    return {"verdict": survivors[0], "reason": f"only {survivors[0]} is clear of {margin:g}, and of the other's slope: {slopes}"}


def _said(rows: pd.DataFrame, name: str, margin: float) -> str:
    """The slope of an explanation beside its rival and, where it does not survive, the first interval that is not clear of the margin."""
    kinds = {"low": ("high", "facts and seeds"), "windows_low": ("windows_high", "windows")}
    fits = {"straight": "beside its rival", "curved": "beside its rival and that squared"}
    row = rows.loc[(name, "straight")]
    said = f"{name} {row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
    for rival, fit in fits.items():
        for low, (high, over) in kinds.items():
            row = rows.loc[(name, rival)]
            if not row[low] > margin:
                return f"{said}, but [{row[low]:+.3f}, {row[high]:+.3f}] over {over} {fit}"
    return said


def concentration(windows: pd.DataFrame) -> pd.Series:
    """(model,) the share of the spread of lookup among a model's windows that is due to a single one: near 1, the regression hangs on it.

    `windows`: of `design`.
    """
    square = pd.Series(_within(windows, windows[LOOKUP].to_numpy(float)) ** 2).groupby(windows["model"].to_numpy())
    return square.max() / square.sum()


def _values(rows: pd.DataFrame, windows: pd.DataFrame) -> pd.DataFrame:
    """(fact, seed) × windows, in the order of `windows`, of the seeds in which every window was edited; NaN where there is no value."""
    keys = list(windows[WINDOW].itertuples(index=False, name=None))
    parts = dict(list(rows.groupby(WINDOW, sort=False)))
    tables = [stats.matrix(parts[key]).stack() for key in keys]
    values = pd.concat(tables, axis=1).rename_axis(["fact", "seed"])
    whole = values.dropna().index.unique("seed")
    if not len(whole):
        raise ExplanationError("no fact has a value in every window of every model, in the same seeds")
    return values[values.index.isin(whole, level="seed")]


def _within(windows: pd.DataFrame, column: np.ndarray) -> np.ndarray:
    """Less the mean of its model."""
    return column - pd.Series(column).groupby(windows["model"].to_numpy()).transform("mean").to_numpy()


def _standard(windows: pd.DataFrame, name: str) -> np.ndarray:
    """Less the mean of its model, in standard deviations among the windows of a model. Raises `ExplanationError` if there is no spread."""
    column = _within(windows, windows[name].to_numpy(float))
    spread = np.sqrt(np.mean(column**2))
    if spread < 1e-9:
        raise ExplanationError(f"{name} is the same in all windows: nothing can be regressed on it")
    return column / spread


def _weights(predictors: np.ndarray, contrast: Sequence[float]) -> tuple[np.ndarray, float]:
    """The least-squares slope (or contrast of slopes) as a weighted sum over windows, and how far the other columns inflate
    the variance of the first slope. NaN and infinite where the columns determine each other."""
    first, others = predictors[:, 0], predictors[:, 1:]
    rest = first - others @ np.linalg.lstsq(others, first, rcond=None)[0] if others.shape[1] else first
    if rest @ rest < 1e-9 * (first @ first):
        return np.full(len(first), np.nan), np.inf
    return contrast @ np.linalg.pinv(predictors), (first @ first) / (rest @ rest)


def _over_windows(values: pd.DataFrame, windows: pd.DataFrame, predictors: np.ndarray, contrast: np.ndarray,
                  level: float) -> tuple[float, float]:
    """Interval of the same slope over windows: least squares with an intercept for each model, HC3 errors."""
    intercepts = pd.get_dummies(windows["model"], dtype=float).to_numpy()
    fitted = sm.OLS(values.dropna().mean().to_numpy(), np.hstack([predictors, intercepts])).fit(cov_type="HC3", use_t=True)
    low, high = fitted.t_test(np.pad(contrast, (0, intercepts.shape[1]))).conf_int(1 - level)[0]
    return float(low), float(high)
