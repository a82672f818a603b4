"""How far a localization can be trusted: stability, agreement with others, and whether what it names matters.

Everything starts from the tables of `helpers.localization`, one row a component and fact. A component's score
over facts is the ratio of means, (mean LD_patched − mean LD_corrupt) / (mean LD_clean − mean LD_corrupt), where
a table has these columns (spec section 3.2; no single fact with a small gap can dominate), and the mean of one
column where it has not. Resampling always draws facts, with all their components: paired, and seeded.

- `stability`: scores and chosen sets under bootstrap resamples of the facts (percentile intervals).
- `agreement`: rank correlation and overlap between methods, seeds or sets of facts.
- `regions`: which part of a choice lies in lookup and in extraction layers (the paper's table 2).
- `faithfulness`: components knocked out of the clean run, or restored in the corrupted one, one after the other
  in the order of a ranking (arXiv 2304.14997, 2403.17806); the earlier the curve moves, the better the ranking,
  and random rankings show what to compare it with. `replaced` does the same to whole choices at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import torch

from helpers.chunks import over_prompts
from helpers.interventions import Intervention
from helpers.localization.counterfactual import Pairs
from helpers.localization.engine import Run, flush_right
from helpers.localization.recovery import describe, measure
from helpers.masks import Mask, parse, size
from helpers.models import Component, Model
from helpers.progress import progress

LD = ("ld_clean", "ld_corrupt", "ld_patched")
SITES = {"head": "head", "attn": "attn_out", "mlp": "mlp_out"}


def component_scores(table: pd.DataFrame, value: str | None = None) -> pd.Series:
    """Score over all facts by component, in the table's order. `value` names a column to average instead."""
    amounts, totals = _by_fact(table, value)
    return amounts.mean() / totals.mean()


def intervals(
    table: pd.DataFrame, value: str | None = None, level: float = 0.95, samples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Score and bootstrap interval over facts: `component`, `score`, `low`, `high`, `nonzero` (0 lies outside)."""
    drawn = resamples(table, value, samples, seed)
    low, high = (drawn.quantile(q) for q in ((1 - level) / 2, (1 + level) / 2))
    out = pd.DataFrame({"score": component_scores(table, value), "low": low, "high": high})
    out["nonzero"] = (out["low"] > 0) | (out["high"] < 0)
    return out.rename_axis("component").reset_index()


def resamples(table: pd.DataFrame, value: str | None = None, samples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Scores of every component (columns) under bootstrap resamples of the facts (rows)."""
    amounts, totals = _by_fact(table, value)
    n = len(amounts)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples) / n
    scores = (weights @ amounts.to_numpy()) / (weights @ totals.to_numpy())
    return pd.DataFrame(scores, columns=amounts.columns).rename_axis("sample")


def top(scores: pd.Series, k: int) -> list[str]:
    """The k components of largest |score|; of equal ones the first."""
    return scores.abs().sort_values(ascending=False, kind="stable").index[:k].tolist()


def stability(
    table: pd.DataFrame,
    select: int | Callable[[pd.Series], Iterable[str]] = 10,
    value: str | None = None,
    samples: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """How scores and selection change when the facts are drawn again.

    `select` is how many components are chosen by |score|, or a function from scores to a choice, such as
    `lambda s: greedy(model, whole_units(s), budget).units`. Columns: `sample`, `spearman` (of |score|, with all
    facts), `jaccard` (of the choice with that of all facts) and `chosen`, a tuple.
    """
    choose = (lambda scores: top(scores, select)) if isinstance(select, int) else select
    whole = component_scores(table, value)
    base, rows = set(choose(whole)), []
    for sample, scores in resamples(table, value, samples, seed).iterrows():
        chosen = tuple(choose(scores))
        row = {"sample": sample, "spearman": _spearman(whole, scores), "jaccard": _jaccard(base, set(chosen))}
        rows.append(row | {"chosen": chosen})
    return pd.DataFrame(rows)


def agreement(scores: Mapping[str, pd.Series], select: int | Callable[[pd.Series], Iterable[str]] = 10) -> pd.DataFrame:
    """Rank correlation and overlap for every two methods (or seeds): `a`, `b`, `n`, `spearman`, `jaccard`.

    On the components that both score; scores by their absolute value.
    """
    choose = (lambda scores: top(scores, select)) if isinstance(select, int) else select
    rows = []
    for a, b in combinations(scores, 2):
        both = [name for name in scores[a].index if name in scores[b].index]
        if not both:
            raise ValueError(f"{a!r} and {b!r} score no component in common")
        one, two = scores[a][both], scores[b][both]
        row = {"a": a, "b": b, "n": len(both), "spearman": _spearman(one, two)}
        rows.append(row | {"jaccard": _jaccard(set(choose(one)), set(choose(two)))})
    return pd.DataFrame(rows)


def regions(
    model: Model, choices: Mapping[str, Mask | Sequence[str]], lookup: Sequence[int], extraction: Sequence[int]
) -> pd.DataFrame:
    """How the weights of each choice are spread: one row a choice.

    `lookup`, `extraction`, `elsewhere`: shares of the choice's weights in these layers (a layer in both counts as
    lookup). `lookup_mlps` and `extraction_mlps`: shares of the MLPs of these layers that the choice contains.
    """
    rows = []
    for name, choice in choices.items():
        units = [parse(unit) for unit in (choice.units if isinstance(choice, Mask) else choice)]
        where = {region: [] for region in ("lookup", "extraction", "elsewhere")}
        for unit in units:
            region = "lookup" if unit.layer in lookup else "extraction" if unit.layer in extraction else "elsewhere"
            where[region].append(unit)
        total = size(model, units)
        row = {"choice": name, "n_units": len(units), "n_parameters": total}
        row |= {region: size(model, found) / total if found else 0.0 for region, found in where.items()}
        mlps = {unit.layer for unit in units if unit.kind == "mlp"}
        for region, layers in {"lookup_mlps": lookup, "extraction_mlps": extraction}.items():
            row[region] = len(mlps & set(layers)) / len(layers) if len(layers) else float("nan")
        rows.append(row)
    return pd.DataFrame(rows)


def faithfulness(
    model: Model,
    pairs: Pairs,
    rankings: Mapping[str, Sequence[str]],
    direction: str = "knock_out",
    fill: str = "resample",
    counts: Sequence[int] | None = None,
    random: int = 3,
    seed: int = 0,
    batch_size: int = 64,
) -> pd.DataFrame:
    """The first k components of each ranking replaced together, for growing k.

    Args:
        rankings: name → components (attention blocks, heads, MLPs), most important first.
        direction: `knock_out` replaces them in the clean run, `restore` puts their clean outputs into the
            corrupted one.
        fill: what stands in for a knocked-out output: `resample`, that of the corrupted run at the same place,
            or `mean`, the mean over all real tokens of the clean prompts.
        counts: the values of k; by default 0, 1, 2, 4, 8 … and all.
        random: number of random orders of the first ranking's components, named `random 0` and on.

    Columns: `ranking`, `k`, `share` (of all components), `subject`, `relation`, `ld_clean`, `ld_corrupt`,
    `ld_patched`. `curve` and `area` sum them up. Raises `ValueError` for rankings without common components.
    """
    orders = {name: [Component.parse(str(unit)) for unit in order] for name, order in rankings.items()}
    units = next(iter(orders.values()), [])
    if not units or any(sorted(map(str, order)) != sorted(map(str, set(units))) for order in orders.values()):
        raise ValueError(f"rankings {', '.join(orders) or 'none'}: each must order the same components, every one once")
    if direction not in ("knock_out", "restore") or fill not in ("resample", "mean"):
        raise ValueError(f"direction {direction!r}, fill {fill!r}: there are knock_out and restore, resample and mean")
    generator = torch.Generator().manual_seed(seed)
    for number in range(random):
        orders[f"random {number}"] = [units[i] for i in torch.randperm(len(units), generator=generator)]
    counts = sorted({0, len(units), *(2**i for i in range(len(units).bit_length()))} if counts is None else set(counts))
    keep = sorted({SITES[unit.kind] for unit in units})
    means = _means(model, pairs, keep, batch_size) if (direction, fill) == ("knock_out", "mean") else None
    cases = [(name, k) for name in orders for k in counts if 0 <= k <= len(units)]

    def work(rows: torch.Tensor) -> pd.DataFrame:
        part = pairs[rows]
        clean, corrupt = (Run(model, flush_right(prompts), keep) for prompts in (part.clean, part.corrupted))
        base, other = (clean, corrupt) if direction == "knock_out" else (corrupt, clean)
        ends = {"ld_clean": measure(clean.logits, part.answers)["ld"]}
        ends["ld_corrupt"] = measure(corrupt.logits, part.answers)["ld"]
        tables = []
        for case, (name, k) in enumerate(progress(cases, "faithfulness", len(cases))):
            logits = base.edited(_replacements(orders[name][:k], means or other))
            row = {"case": case, "ranking": name, "k": k, "share": k / len(units), "fact": rows, **describe(part.clean)}
            tables.append(pd.DataFrame(row | ends | {"ld_patched": measure(logits, part.answers)["ld"]}))
        return pd.concat(tables)

    table = pd.concat(over_prompts(work, model, pairs.clean, batch_size)).sort_values(["case", "fact"], ignore_index=True)
    return table.drop(columns="case")


def curve(table: pd.DataFrame) -> pd.DataFrame:
    """Faithfulness by `ranking`, `k` and `share`: `kept` is 1 for the clean run's LD and 0 for the corrupted one's."""
    means = table.groupby(["ranking", "k", "share"], sort=False)[list(LD)].mean()
    kept = (means["ld_patched"] - means["ld_corrupt"]) / (means["ld_clean"] - means["ld_corrupt"])
    return kept.rename("kept").reset_index()


def area(table: pd.DataFrame, level: float = 0.95, samples: int = 500, seed: int = 0) -> pd.DataFrame:
    """Area under each curve over the share of components, with a bootstrap interval over facts.

    Columns `ranking`, `area`, `low`, `high`. A small area is good for `knock_out`, a large one for `restore`. The
    random rankings make one row, `random`: the mean of their areas, and the range of the middle `level` of them,
    because they differ far more from each other than one of them does over facts.
    """
    rows, drawn = [], []
    for name, part in table.groupby("ranking", sort=False):
        part = part.rename(columns={"share": "component"})
        points = part["component"].unique().astype(float)
        steps = np.diff(points)
        middles = (np.append(steps, 0) + np.append(0, steps)) / 2  # trapezoid rule
        whole = component_scores(part).to_numpy() @ middles
        if str(name).startswith("random "):
            drawn.append(whole)
            continue
        areas = resamples(part, None, samples, seed).to_numpy() @ middles
        low, high = np.quantile(areas, [(1 - level) / 2, (1 + level) / 2])
        rows.append({"ranking": name, "area": whole, "low": low, "high": high})
    if drawn:
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        rows.append({"ranking": "random", "area": np.mean(drawn), "low": low, "high": high})
    return pd.DataFrame(rows)


def replaced(model: Model, pairs: Pairs, choices: Mapping[str, Sequence[str]], seed: int = 0, batch_size: int = 64) -> pd.DataFrame:
    """What a whole choice does to the answer: all its components knocked out of the clean run at once, as in `faithfulness`.

    `choices`: name → components (attention blocks, MLPs). One row each: `choice`, `n_units`, `kept` (the share of the
    logit difference that stays), `low`, `high` (bootstrap interval over facts).
    """
    every = [str(unit) for kind in ("attn", "mlp") for unit in model.components(kind)]
    tables = []
    for k in sorted({len(units) for units in choices.values()}):
        orders = {n: [*units, *(u for u in every if u not in units)] for n, units in choices.items() if len(units) == k}
        tables.append(faithfulness(model, pairs, orders, counts=(k,), random=0, batch_size=batch_size))
    found = intervals(pd.concat(tables).rename(columns={"ranking": "component"}), seed=seed).set_index("component").loc[list(choices)]
    return pd.DataFrame({"choice": list(choices), "n_units": [len(u) for u in choices.values()], "kept": found["score"].to_numpy(),
                         "low": found["low"].to_numpy(), "high": found["high"].to_numpy()})


def _replacements(units: Sequence[Component], source) -> list[Intervention]:
    """Edits that put `source[site, layer]` in at all positions; heads of a layer together."""
    edits, heads = [], {}
    for unit in units:
        if unit.kind == "head":
            heads.setdefault(unit.layer, []).append(unit.head)
        else:
            edits.append(Intervention(SITES[unit.kind], unit.layer, "all", source[SITES[unit.kind], unit.layer]))
    for layer, chosen in heads.items():
        edits.append(Intervention("head", layer, "all", source["head", layer][..., chosen, :], heads=chosen))
    return edits


def _means(model: Model, pairs: Pairs, keep: Sequence[str], batch_size: int) -> dict[tuple[str, int], torch.Tensor]:
    """Mean activation over all real tokens of the clean prompts, by (site, layer)."""

    def work(rows: torch.Tensor) -> dict:
        run = Run(model, flush_right(pairs.clean[rows]), keep)
        real, keys = run.batch.mask, [(site, layer) for site in keep for layer in range(model.n_layers)]
        return {key: run[key][real].sum(0, dtype=torch.float64) for key in keys} | {"n": int(real.sum())}

    parts = over_prompts(work, model, pairs.clean, batch_size)
    n = sum(part.pop("n") for part in parts)
    return {key: sum(part[key] for part in parts) / n for key in parts[0]}


def _by_fact(table: pd.DataFrame, value: str | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Amount and total by fact (rows) and component (columns); a score is the sum of one over that of the other."""
    if "component" not in table or not len(table):
        raise ValueError("a table with a column `component` and a row for each component and fact is needed")
    fact = table.groupby("component", sort=False).cumcount()
    sizes = table.groupby("component", sort=False).size()
    mixed = "subject" in table and (table.groupby(fact)["subject"].nunique() > 1).any()
    if sizes.nunique() > 1 or mixed:
        raise ValueError(
            f"components have {sizes.min()} to {sizes.max()} rows{', of different facts' if mixed else ''}: "
            "keep one row for each component and fact, e.g. one site and position of a patching table"
        )
    if value is None and set(LD) <= set(table):
        amount, total = table["ld_patched"] - table["ld_corrupt"], table["ld_clean"] - table["ld_corrupt"]
    elif value is None and {"effect", "total"} <= set(table):
        amount, total = table["effect"], table["total"]
    else:
        found = table[value or "score"].astype(float)
        amount, total = found.fillna(0), found.notna().astype(float)
    index = pd.MultiIndex.from_arrays([fact, table["component"]])
    wide = [column.set_axis(index).unstack() for column in (amount, total)]
    return tuple(frame[list(sizes.index)] for frame in wide)


def _spearman(one: pd.Series, two: pd.Series) -> float:
    return one.abs().rank().corr(two.abs().rank())


def _jaccard(one: set, two: set) -> float:
    return len(one & two) / len(one | two) if one | two else 1.0
