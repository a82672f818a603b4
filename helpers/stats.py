"""Intervals, tests and effect sizes, from tidy rows per fact and seed.

    summary(rows, by=["model", "localization"])                        # one row a group: value and intervals
    compare(rows, "lookup", ["everything", "all MLPs"], by=["model"])  # paired differences and their tests
    holm(table, family=["family", "model"])                            # corrected over a declared family

Two kinds of chance are kept apart, because they answer different questions:

- facts: would other facts of this kind show the same? Bootstrap over facts (BCa; Efron 1987) after averaging each
  fact over the seeds, `facts_low` … `facts_high`. Masks are compared on the same facts, so differences are paired.
- seeds: would another run show the same? t interval over the means of the seeds, `seeds_low` … `seeds_high`, and
  their range. Three seeds say little: the interval is wide, and is meant to be.
- `low` … `high` is for both at once, facts and seeds drawn anew: the one to decide by (`crossed`).

Intervals of shares and probabilities stop at 0 and 1, those of their differences at −1 and 1: a t interval of few seeds knows no bounds.
Losses, norms and times have none (UNBOUNDED, by the column `measure`), nor has anything with a value outside 0 to 1; `bounded` overrides this.

Degenerate input gives NaN or an exact bound and says so in the column `note`; rows that contradict each other raise
`ValueError`. Nothing here is random beyond the integer `seed` that is passed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest, nct, norm, t, ttest_1samp

LEVEL, RESAMPLES = 0.95, 4000
FLIPS, EXACT_UP_TO = 20_000, 16
FEW_FACTS, MOST_FACTS = 20, 1_000_000
NAN = float("nan")
UNBOUNDED = {"text_loss", "norm", "seconds", "steps", "passes"}


def summary(rows: pd.DataFrame, by: Sequence[str] = (), null: float | None = None, value: str = "value", fact: str | Sequence[str] = "fact",
            seed_column: str = "seed", level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0, bounded: bool | None = None) -> pd.DataFrame:
    """One row a group of `by`: `value` (mean), intervals, `n_facts`, `n_seeds`, `missing` facts, `note`; with `null`, `p` and `test`.

    A fact without a value in some seed is left out, and counted in `missing`. Two values of a fact and seed: `ValueError`.
    """
    found = []
    for key, part in _groups(rows, by):
        table = matrix(part, value, fact, seed_column)
        row = _describe(table, null, (0.0, 1.0) if _shares(part, bounded, table) else None, level, resamples, seed)
        found.append(dict(zip(by, key)) | {name: row[name] for name in row if null is not None or name not in ("p", "test")})
    return pd.DataFrame(found)


def compare(rows: pd.DataFrame, a: str, against: Sequence[str], group: str = "localization", by: Sequence[str] = (), null: float = 0.0,
            value: str = "value", fact: str | Sequence[str] = "fact", seed_column: str = "seed", level: float = LEVEL,
            resamples: int = RESAMPLES, seed: int = 0, bounded: bool | None = None) -> pd.DataFrame:
    """Paired differences a − b, on the facts and seeds that both have: one row a group of `by` and b of `against`.

    Columns as in `summary`, `value` being the difference, and `mean_a`, `mean_b`; `p`, of the two-sided sign-flip test
    (over facts) that the difference is `null`, and `test`, how it was done; `h`, Cohen's, of two proportions; `d`,
    difference / standard deviation over facts. A measure with one value a seed (text loss) is tested over its seeds.
    """
    found = []
    for key, part in _groups(rows, by):
        tables = {name: matrix(part[part[group] == name], value, fact, seed_column) for name in dict.fromkeys([a, *against])}
        for b in against:
            one, two = (tables[name] for name in (a, b))
            seeds, absent = one.columns.intersection(two.columns), [name for name in dict.fromkeys((a, b)) if not len(tables[name])]
            facts = one.index[:0] if absent else one.index.union(two.index)
            one, two = (table.reindex(index=facts, columns=seeds) for table in (one, two))
            difference = one - two
            bounds = (-1.0, 1.0) if _shares(part, bounded, one, two) else None
            row = _describe(difference, null, bounds, level, resamples, seed)
            kept = difference.dropna().index if len(seeds) else []
            means = {name: table.loc[kept].to_numpy().mean() if row["n_facts"] else NAN for name, table in (("mean_a", one), ("mean_b", two))}
            h, per_fact = cohens_h(*means.values()) if bounds else NAN, difference.loc[kept].mean(axis=1)
            sd = per_fact.std() if len(per_fact) > 1 else NAN
            d = row["value"] / sd if sd > 1e-12 else NAN
            apart = set(tables[a].columns) ^ set(tables[b].columns)
            note = _join(row.pop("note"), f"no rows of {_listed(absent)}" if absent else f"seeds {_listed(apart)} not in both" if apart else "")
            found.append(dict(zip(by, key)) | {"a": a, "b": b} | means | row | {"h": h, "d": d, "note": note})
    return pd.DataFrame(found)


def matrix(rows: pd.DataFrame, value: str = "value", fact: str | Sequence[str] = "fact", seed: str = "seed") -> pd.DataFrame:
    """Facts × seeds. A missing name of a fact (NaN) is that of a measure of the whole set. Raises `ValueError` for duplicates."""
    unit = [fact] if isinstance(fact, str) else list(fact)
    if not len(rows):
        return pd.DataFrame(index=rows.set_index(unit).index, dtype=float)
    # reports call this for thousands of small groups: two factorizations take a fifth of the time of `unstack`
    names = [rows[name].astype(object).where(rows[name].notna(), "") for name in unit]
    row, facts = (pd.MultiIndex.from_arrays(names) if len(unit) > 1 else pd.Index(names[0])).factorize(sort=True)
    column, seeds = pd.Index(rows[seed]).factorize(sort=True, use_na_sentinel=False)  # no seed: a column of its own, not the last one's
    place = row * len(seeds) + column
    double = np.bincount(place)[place] > 1
    if double.any():
        same = rows[place == place[double.argmax()]]
        differ = [name for name in rows if name not in (value, *unit) and same[name].nunique(dropna=False) > 1]
        raise ValueError(f"{double.sum()} rows give several values to a fact and seed, e.g. {dict(same.iloc[0][[*unit, seed]])}; "
                         f"they differ in {_listed(differ) or 'the value only'}: choose one, or group by it")
    table = np.full((len(facts), len(seeds)), NAN)
    table.flat[place] = rows[value].astype(float)
    return pd.DataFrame(table, facts.set_names(unit), seeds.set_names(seed))


def holm(table: pd.DataFrame, family: Sequence[str] = (), p: str = "p") -> pd.DataFrame:
    """The table with `p_holm`, Holm's correction within each family (Holm 1979).

    A comparison without a p-value (not run, not testable) counts towards the size of its family.
    """
    def correct(values: pd.Series) -> pd.Series:
        size, order = len(values), values.fillna(1.0).argsort(kind="stable")
        steps = values.fillna(1.0).iloc[order] * np.arange(size, 0, -1)
        return steps.cummax().clip(upper=1.0).reindex(values.index).where(values.notna())

    flat = table.reset_index(drop=True)
    parts = [correct(part[p]) for _, part in _groups(flat, family)]
    return flat.assign(p_holm=pd.concat(parts) if parts else pd.Series(dtype=float)).set_index(table.index)


def bca(values: np.ndarray, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """BCa bootstrap interval of the mean over the last axis; all leading axes share the resamples, so they stay paired."""
    values = np.asarray(values, float)
    n = values.shape[-1]
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
    weights = np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n) / n
    mean = values.mean(-1, keepdims=True)
    means = np.sort(values @ weights.T, axis=-1)
    tie = 1e-9 * np.abs(values).max(initial=1e-300)  # the same mean, summed in another order
    below = ((means < mean - tie).mean(-1) + (means <= mean + tie).mean(-1)) / 2
    bias = norm.ppf(below.clip(0.5 / resamples, 1 - 0.5 / resamples))
    square = ((values - mean) ** 2).sum(-1)
    skew = ((values - mean) ** 3).sum(-1) / (6 * np.where(square > 0, square, 1) ** 1.5)
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        shifted = bias + norm.ppf(tail)
        place = norm.cdf(bias + shifted / (1 - skew * shifted))[..., None] * (resamples - 1)
        lower = np.floor(place).astype(int)
        one, two = (np.take_along_axis(means, np.minimum(at, resamples - 1), -1) for at in (lower, lower + 1))
        ends.append((one + (two - one) * (place - lower))[..., 0])
    return ends[0], ends[1]


def over_facts(values: Sequence[float], bounds: tuple[float, float] | None = None, level: float = LEVEL, resamples: int = RESAMPLES,
               seed: int = 0) -> dict:
    """`low`, `high`, `note` of the mean of one value a fact.

    All equal: a bootstrap would claim to know the mean exactly. Within `bounds` the interval is then that of the
    share of facts that may differ although none of n did (Clopper–Pearson), taken to either bound.
    """
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return {"low": NAN, "high": NAN, "note": "no facts" if n == 0 else "one fact: no interval over facts"}
    note = f"few facts ({n}): the interval is rough" if n < FEW_FACTS else ""
    if np.ptp(values) > 1e-12 * max(1.0, np.abs(values).max()):
        low, high = bca(values, level, resamples, seed)
        return {"low": float(low), "high": float(high), "note": note}
    unseen, value = 1 - ((1 - level) / 2) ** (1 / n), float(values.mean())
    low, high = (value + unseen * (end - value) for end in bounds or (value, value))
    return {"low": low, "high": high, "note": _join(note, f"all facts equal: {'exact bound' if bounds else 'no spread to judge by'}")}


def over_seeds(means: Sequence[float], level: float = LEVEL) -> dict:
    """t interval (`low`, `high`), `min`, `max`, `sd` and `n` of one mean a seed; `low`, `high` and `sd` are NaN for one seed."""
    means = np.asarray(means, float)
    n = len(means)
    sd = means.std(ddof=1) if n > 1 else NAN
    half = t.ppf((1 + level) / 2, n - 1) * sd / np.sqrt(n) if n > 1 else NAN
    ends = (means.min(), means.max()) if n else (NAN, NAN)
    return {"low": means.mean() - half if n else NAN, "high": means.mean() + half if n else NAN, "min": ends[0], "max": ends[1], "sd": sd, "n": n}


def crossed(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Interval of the mean of facts × seeds when both are random: two-way variance components, Satterthwaite's df.

    With one seed, over facts only, with one fact, over seeds only; NaN where there is no spread at all.
    """
    values = np.asarray(values, float)
    n, k = values.shape
    rows, columns, mean = values.mean(1), values.mean(0), values.mean()
    by_fact = rows.var(ddof=1) / n if n > 1 else 0.0
    by_seed = columns.var(ddof=1) / k if k > 1 else 0.0
    rest = 0.0  # the interaction is in both terms
    if n > 1 and k > 1:
        rest = ((values - rows[:, None] - columns + mean) ** 2).sum() / ((n - 1) * (k - 1)) / (n * k)
    variance = max(by_fact + by_seed - rest, by_fact, by_seed)
    if variance < 1e-24:
        return NAN, NAN
    df = variance**2 / (by_fact**2 / max(n - 1, 1) + by_seed**2 / max(k - 1, 1))
    half = t.ppf((1 + level) / 2, df) * np.sqrt(variance)
    return mean - half, mean + half


def sign_flips(differences: Sequence[float], flips: int = FLIPS, seed: int = 0) -> tuple[float, str]:
    """Two-sided p of the paired permutation test that the mean is 0, and how it was found.

    All sign patterns are counted for up to 16 differences that are not 0, the binomial law for differences of one
    size (the exact McNemar test); else that many random patterns, of which the observed one is one (so p > 0).
    """
    nonzero = np.asarray([x for x in np.asarray(differences, float) if abs(x) > 1e-12])
    n = len(nonzero)
    if not n:
        return (1.0, "all differences are 0") if len(differences) else (NAN, "no facts")
    sizes = np.abs(nonzero)
    if np.ptp(sizes) < 1e-12:
        return float(binomtest(int((nonzero > 0).sum()), n).pvalue), "exact (binomial)"
    limit = abs(nonzero.sum()) - 1e-9 * sizes.sum()
    if n <= EXACT_UP_TO:
        patterns = (np.arange(2 ** (n - 1))[:, None] >> np.arange(n)) & 1  # the other half mirrors these
        return float((np.abs((2 * patterns - 1) @ sizes) >= limit).mean()), "exact"
    patterns = np.random.default_rng(seed).integers(0, 2, (flips, n), dtype=np.int8)
    extreme = (np.abs(2 * (patterns @ sizes) - sizes.sum()) >= limit).sum()
    return float((extreme + 1) / (flips + 1)), f"{flips} sign flips"


def cohens_h(p_a: float, p_b: float) -> float:
    """Difference of two proportions on the arcsine scale; .2 is small, .5 medium, .8 large (Cohen 1988)."""
    return float(-2 * np.diff(np.arcsin(np.sqrt(np.clip([p_a, p_b], 0, 1))))[0])


def paired_sd(p_a: float, p_b: float, correlation: float = 0.0) -> float:
    """Standard deviation of the difference of two yes/no answers about the same fact. Raises `ValueError` if impossible."""
    spread = np.sqrt(p_a * (1 - p_a) * p_b * (1 - p_b))
    both = p_a * p_b + correlation * spread
    if not max(0.0, p_a + p_b - 1) - 1e-9 <= both <= min(p_a, p_b) + 1e-9:
        raise ValueError(f"proportions {p_a} and {p_b} cannot have a correlation of {correlation}")
    return float(np.sqrt(max(0.0, p_a + p_b - 2 * both - (p_a - p_b) ** 2)))


def power(n_facts: int, difference: float, sd: float, n_seeds: int = 1, seed_sd: float = 0.0, alpha: float = 1 - LEVEL) -> float:
    """Chance that `low` … `high` leaves out 0 when the true difference is this: noncentral t, df as in `crossed`.

    `sd` is over facts (`paired_sd`), `seed_sd` over seeds, of the difference. Divide `alpha` by the family's size to
    allow for Holm's correction at its strictest. The sign-flip test has about the same power; on yes/no answers of one
    seed, where it is exact and discrete, up to .1 less.
    """
    if n_facts < 2 or sd < 0 or seed_sd < 0 or (seed_sd and n_seeds < 2):
        raise ValueError("power needs two facts, standard deviations of at least 0, and two seeds if these vary")
    by_fact, by_seed = sd**2 / n_facts, seed_sd**2 / n_seeds
    variance = by_fact + by_seed
    if variance == 0:
        return float(difference != 0)
    df = variance**2 / (by_fact**2 / (n_facts - 1) + by_seed**2 / max(n_seeds - 1, 1))
    limit, centre = t.ppf(1 - alpha / 2, df), abs(difference) / np.sqrt(variance)
    # far out, where the noncentral t loses its digits, the answer is 1
    return 1.0 if centre > limit + 30 else float(nct.sf(limit, df, centre) + nct.cdf(-limit, df, centre))


def facts_needed(difference: float, sd: float, target: float = 0.8, **options) -> int:
    """The smallest number of facts with this power (options as `power`). Raises `ValueError` if no number is enough."""
    low = high = 2
    while power(high, difference, sd, **options) < target:
        low, high = high, 2 * high
        if high > MOST_FACTS:
            raise ValueError(f"no number of facts shows a difference of {difference} with power {target}: add seeds")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, difference, sd, **options) >= target else (middle + 1, high)
    return low


def majority(answers: Sequence[Hashable], read_on: Sequence[Hashable] | None = None) -> dict:
    """The floor for an accuracy: the commonest answer of `answers`, and its share in `read_on` (the same ones if None).

    An attack that saw one half of the facts can always give its commonest answer on the other half.
    """
    counts, asked = Counter(answers), list(answers if read_on is None else read_on)
    if not counts or not asked:
        raise ValueError("no answers to take the majority of")
    best = min(counts, key=lambda answer: (-counts[answer], str(answer)))  # of equal ones the first by name
    return {"answer": best, "share": asked.count(best) / len(asked), "n": len(asked)}


def _describe(table: pd.DataFrame, null: float | None, bounds: tuple[float, float] | None, level: float, resamples: int, seed: int) -> dict:
    """Value, intervals and (unless `null` is None) test of a facts × seeds table; facts with a gap are left out."""
    kept = table.dropna() if table.shape[1] else table.iloc[:0]
    values, missing = kept.to_numpy(), len(table) - len(kept)
    n_facts, n_seeds = values.shape if kept.size else (0, 0)
    per_fact, per_seed = (values.mean(1), values.mean(0)) if n_facts else (np.empty(0), np.empty(0))
    facts, seeds = over_facts(per_fact, bounds, level, resamples, seed), over_seeds(per_seed, level)
    low, high = crossed(values, level) if n_facts else (NAN, NAN)
    if np.isnan(low) and n_facts > 1:
        low, high = facts["low"], facts["high"]
    if null is None:
        p, test = NAN, "no test"
    elif n_facts == 1 and n_seeds > 1 and np.ptp(per_seed) > 0:
        p, test = float(ttest_1samp(per_seed, null).pvalue), "t over seeds"
    else:
        p, test = sign_flips(per_fact - null, seed=seed) if n_facts > 1 else (NAN, "no test")
    note = _join(facts["note"], f"{missing} facts without a value" if missing else "", "one seed" if n_seeds == 1 else "")
    ends = {"low": low, "high": high, "facts_low": facts["low"], "facts_high": facts["high"],
            **{f"seeds_{end}": seeds[end] for end in ("low", "high", "min", "max")}}
    ends = {name: float(np.clip(end, *bounds)) for name, end in ends.items()} if bounds else ends
    return {"value": values.mean() if n_facts else NAN, **ends, "n_facts": n_facts, "n_seeds": n_seeds, "missing": missing, "p": p, "test": test, "note": note}


def _groups(rows: pd.DataFrame, by: Sequence[str]):
    return rows.groupby(list(by), sort=False, dropna=False) if len(by) else [((), rows)]


def _shares(rows: pd.DataFrame, bounded: bool | None, *tables: pd.DataFrame) -> bool:
    """Whether the values are probabilities or shares: as `bounded` says or, if it is None, by the measure and the values of each table."""
    if bounded is not None:
        return bounded
    if "measure" in rows and rows["measure"].isin(UNBOUNDED).any():
        return False
    found = [table.to_numpy(dtype=float).ravel() for table in tables]
    return all(np.isfinite(values).any() and np.nanmin(values) >= -1e-6 and np.nanmax(values) <= 1 + 1e-6 for values in found)


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _listed(items) -> str:
    return ", ".join(map(str, sorted(items, key=str)))
