"""The claims declared in `data/claims.yaml` before any sweep was run, and the verdict that rows give on them.

    claims = load()
    verdict(claims, rows)            # one row a claim and model: holds, fails or undecided, why, and the numbers
    comparisons(claims, rows)        # the single comparisons behind it

`rows` are tidy, one value a row: COLUMNS, and `layers` ("2 3 4") where windows are compared; `claims.yaml` says what each
name means. A comparison **holds** if its interval over facts and seeds lies beyond the margin and **fails** if it lies
short of it, both with a Holm-corrected p of at most alpha (over the family, within a model), enough seeds and few facts
missing; else it is undecided. A broken guard (a model that no longer works, say) keeps it from holding. A claim holds if all its
comparisons do and fails if one does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from helpers import stats

DATA = Path(__file__).resolve().parents[1] / "data"
COLUMNS = ["run", "model", "facts", "n", "seed", "localization", "method", "attack", "fact", "measure", "value"]


class ClaimsError(ValueError):
    """Claims that are not well formed, or rows that cannot answer them; one line a problem."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Guard(Strict):
    """`measure` of the mask may lie at most `margin` below that of the unedited model, or of the rival."""

    measure: str
    relative_to: Literal["base", "against"]
    margin: float = Field(ge=0)


class Claim(Strict):
    """Each of `masks` compared with each of `against` (names, groups, patterns), or with the margin itself if there are none."""

    id: str = Field(pattern=r"^[a-z0-9-]+$")
    statement: str
    origin: Literal["published", "ours"]
    family: str
    facts: str
    method: str
    attack: str = "none"
    measure: str
    reading: Literal["probability", "top1"] | None
    masks: list[str] = ["lookup"]
    against: list[str] = []
    within: float | None = None  # windows only: distance in blocks between the mean layers
    direction: Literal["higher", "lower"]
    margin: float
    guards: list[Guard] = []
    published: dict[str, list[str]] = {}  # table → measures, the one to compare with first
    models: list[str] = ["*"]
    caveat: str = ""

    def named(self, measure: str) -> str:
        return f"{measure} {self.reading}" if self.reading else measure


class Rule(Strict):
    level: float = Field(gt=0.5, lt=1)
    alpha: float = Field(gt=0, lt=0.5)
    min_seeds: int = Field(ge=1)
    max_missing: float = Field(ge=0, lt=1)


class Claims(Strict):
    rule: Rule
    masks: dict[str, str | None]  # localization in rows → method in data/published
    groups: dict[str, list[str]]
    families: dict[str, str]
    methods: dict[str, str]
    attacks: dict[str, str]
    measures: dict[str, str]
    claims: list[Claim]
    _published: dict[tuple[str, str, str], float] = PrivateAttr()

    def rivals(self, claim: Claim) -> list[str]:
        return list(dict.fromkeys(name for entry in claim.against for name in self.groups.get(entry, [entry])))

    def published(self, table: str, measure: str, mask: str) -> float:
        """The published figure of a mask; NaN where there is none."""
        return self._published.get((table, measure, self.masks.get(mask)), np.nan)


def load(path: Path | str = DATA / "claims.yaml", published: Path | str = DATA / "published") -> Claims:
    """Read and check the claims and the figures they refer to. Raises `ClaimsError`."""
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        claims = Claims.model_validate(raw)
    except yaml.YAMLError as error:
        raise ClaimsError(f"{Path(path).name} is no YAML: {error}") from None
    except ValidationError as error:
        raise ClaimsError("\n".join(_describe(problem, raw) for problem in error.errors())) from None
    tables = pd.concat([pd.read_csv(file).assign(table=file.stem) for file in sorted(Path(published).glob("*.csv"))])
    claims._published = tables.set_index(["table", "measure", "method"])["value"].to_dict()
    if problems := list(_problems(claims)):
        raise ClaimsError("\n".join(problems))
    return claims


def verdict(claims: Claims, rows: pd.DataFrame, ids: Sequence[str] | None = None) -> pd.DataFrame:
    """`concluded` of `comparisons`."""
    return concluded(comparisons(claims, rows, ids))


def concluded(table: pd.DataFrame) -> pd.DataFrame:
    """One row a claim and model: `verdict`, `held` of `of` comparisons, `reason`, and the figures of the one farthest from holding."""
    found = []
    for (claim, model), part in table.groupby(["claim", "model"], sort=False):
        kinds = set(part["verdict"])
        result = "holds" if kinds == {"holds"} else "fails" if "fails" in kinds else "undecided"
        excess = (part["value"] - part["margin"]) * part["direction"].map({"higher": 1, "lower": -1})
        worst = part.iloc[excess.fillna(np.inf).argmin()].drop(["claim", "model", "verdict", "reason"])
        reasons = [] if result == "holds" else part.loc[part["verdict"] == result, "reason"]
        found.append({"claim": claim, "model": model, "verdict": result, "held": (part["verdict"] == "holds").sum(), "of": len(part),
                      "reason": "; ".join(reasons), **worst})
    return pd.DataFrame(found)


def comparisons(claims: Claims, rows: pd.DataFrame, ids: Sequence[str] | None = None) -> pd.DataFrame:
    """One row a claim, model, mask and rival: the figures of `stats.compare`, the published ones, `p_holm`, `verdict`, `reason`.

    `margin` is signed as the difference is (−.1 for "lower by .1"). `ids` picks claims, after Holm's correction over all.
    """
    if missing := [name for name in COLUMNS if name not in rows]:
        raise ClaimsError(f"rows lack the columns {', '.join(missing)}")
    if unknown := sorted(set(ids or ()) - {claim.id for claim in claims.claims}):
        raise ClaimsError(f"no claim is called {', '.join(unknown)}; there are {', '.join(claim.id for claim in claims.claims)}")
    models, by_measure = rows["model"].unique(), _by_measure(claims, rows)
    parts = [part for claim in claims.claims for part in _compared(claims, claim, by_measure, models)]
    if not parts:
        return pd.DataFrame(columns=["claim", "family", "model", "verdict", "reason"])
    table = stats.holm(pd.concat(parts, ignore_index=True), ["family", "model"])
    higher = table["direction"] == "higher"
    beyond = np.where(higher, table["low"] > table["margin"], table["high"] < table["margin"])
    short = np.where(higher, table["high"] < table["margin"], table["low"] > table["margin"])
    complete = table["missing"] <= claims.rule.max_missing * (table["missing"] + table["n_facts"])
    clear = (table["p_holm"] <= claims.rule.alpha) & (table["n_seeds"] >= claims.rule.min_seeds) & complete
    table["verdict"] = np.select([clear & beyond & (table["guard"] == ""), clear & short], ["holds", "fails"], "undecided")
    table["reason"] = [_reason(row, claims.rule) for _, row in table.iterrows()]
    return table if ids is None else table[table["claim"].isin(ids)]


def _by_measure(claims: Claims, rows: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
    """Rows of the methods and attacks that any claim asks for, or of the unedited model: a small part of a store, which every claim filters anew."""
    methods, attacks = ({getattr(claim, name) for claim in claims.claims} for name in ("method", "attack"))
    edited = rows["method"].isin(methods) & rows["attack"].isin(attacks)
    asked = rows.loc[edited | ((rows["localization"] == "none") & (rows["attack"] == "none")), [name for name in (*COLUMNS, "layers") if name in rows]]
    return defaultdict(lambda: asked.iloc[:0], iter(asked.groupby("measure", sort=False)))


def _compared(claims: Claims, claim: Claim, by_measure: Mapping[str, pd.DataFrame], models: Sequence[str]) -> Iterator[pd.DataFrame]:
    null = claim.margin if claim.direction == "higher" else -claim.margin
    options = {"null": null, "fact": ["facts", "fact"], "level": claims.rule.level}
    source = next(((table, measures[0]) for table, measures in claim.published.items()), None)
    asked = [claim.named(measure) for measure in (claim.measure, *(guard.measure for guard in claim.guards))]
    mine = pd.concat([by_measure[measure] for measure in dict.fromkeys(asked)])
    mine = mine[_like(mine["facts"], [claim.facts])]
    for model in filter(lambda name: any(fnmatchcase(name, pattern) for pattern in claim.models), models):
        here = mine[mine["model"] == model]
        part = here[(here["method"] == claim.method) & (here["attack"] == claim.attack)]
        base = here[(here["localization"] == "none") & (here["attack"] == "none")]
        values = part[part["measure"] == claim.named(claim.measure)]
        for mask in claim.masks:
            if claim.against:
                against = _rivals(claims, claim, mask, values)
                table = stats.compare(values, mask, against, **options).rename(columns={"a": "mask", "b": "against"})
            else:
                against, table = [""], stats.summary(values[values["localization"] == mask], **options).assign(mask=mask, against="")
            guards = ["; ".join(filter(None, (_broken(claim, guard, part, base, mask, rival) for guard in claim.guards))) for rival in against]
            figures = {f"published_{side}": [claims.published(*source, name) if source else np.nan for name in names]
                       for side, names in (("mask", [mask] * len(table)), ("against", against))}
            yield table.assign(claim=claim.id, family=claim.family, model=model, direction=claim.direction, margin=null, guard=guards, **figures)


def _rivals(claims: Claims, claim: Claim, mask: str, values: pd.DataFrame) -> list[str]:
    """Names to compare with. A pattern stands for all masks of as many layers as `mask`, but not the same ones."""
    names = claims.rivals(claim)
    run, patterns = values["localization"].unique(), [name for name in names if "*" in name]
    like = [x for x in run if any(fnmatchcase(x, pattern) for pattern in patterns)]
    if mask not in run or not like:
        return names
    texts = values.groupby("localization")["layers"].first().dropna() if "layers" in values else {}
    if unknown := [x for x in (mask, *like) if x not in texts]:
        raise ClaimsError(f"claim `{claim.id}` compares windows: rows of {unknown[0]} need the column `layers`, such as '2 3 4'")
    layers = {x: [int(layer) for layer in texts[x].split()] for x in (mask, *like)}
    own, found = layers[mask], []
    for name in names:
        fits = [x for x, where in layers.items() if fnmatchcase(x, name) and len(where) == len(own) and set(where) != set(own)
                and (claim.within is None or abs(np.mean(where) - np.mean(own)) <= claim.within)]
        found += fits if fits and "*" in name else [name]  # a pattern that nothing fits stays, as not run
    return list(dict.fromkeys(found))


def _broken(claim: Claim, guard: Guard, part: pd.DataFrame, base: pd.DataFrame, mask: str, rival: str) -> str:
    """How a guard is broken; empty if it is kept."""
    def mean(rows: pd.DataFrame, name: str) -> float:
        return rows.loc[(rows["localization"] == name) & (rows["measure"] == claim.named(guard.measure)), "value"].mean()

    own, other = mean(part, mask), mean(base, "none") if guard.relative_to == "base" else mean(part, rival)
    return "" if own >= other - guard.margin else f"{guard.measure} {own:.2f} against {other:.2f}"


def _like(column: pd.Series, patterns: Sequence[str]) -> pd.Series:
    return column.isin([x for x in column.unique() if any(fnmatchcase(x, pattern) for pattern in patterns)])


def _reason(row: pd.Series, rule: Rule) -> str:
    who = f"{row['mask']} vs {row['against']}" if row["against"] else row["mask"]
    if not row["n_facts"] and not row["missing"]:
        return f"{who}: not run"
    if row["missing"] > rule.max_missing * (row["missing"] + row["n_facts"]):
        return f"{who}: {row['missing']} of {row['missing'] + row['n_facts']} facts lack a value in some seed"
    if row["n_seeds"] < rule.min_seeds:
        return f"{who}: {row['n_seeds']} of {rule.min_seeds} seeds"
    interval = "no spread" if np.isnan(row["low"]) else f"{row['low']:+.3f}, {row['high']:+.3f}"
    return f"{who}: {row['value']:+.3f} [{interval}]" + (f", but {row['guard']}" if row["guard"] else "")


def _problems(claims: Claims) -> Iterator[str]:
    seen = set()
    for claim in claims.claims:
        where = f"claim `{claim.id}`: "
        if claim.id in seen:
            yield where + "the id is used twice"
        seen.add(claim.id)
        masks = [name for name in (*claim.masks, *claims.rivals(claim)) if "*" not in name]
        used = {"family": [claim.family], "method": [claim.method], "attack": [claim.attack], "mask": masks,
                "measure": [claim.measure, *(guard.measure for guard in claim.guards)]}
        for kind, names in used.items():
            declared = getattr(claims, {"family": "families"}.get(kind, f"{kind}s"))
            yield from (f"{where}{kind} `{name}` is not declared; there are {', '.join(declared)}" for name in names if name not in declared)
        if set(claim.masks) & set(claims.rivals(claim)):
            yield where + "a mask is compared with itself"
        if any(guard.relative_to == "against" for guard in claim.guards) and not claim.against:
            yield where + "a guard relative to `against` needs something to compare with"
        if (claim.origin == "published") != bool(claim.published):
            yield where + "published claims, and only they, name published figures"
        for table, measures in claim.published.items():
            yield from (f"{where}data/published/{table}.csv has no `{measure}` of {claims.masks.get(mask)}"
                        for measure in measures for mask in claim.masks if np.isnan(claims.published(table, measure, mask)))


def _describe(problem: dict, raw: dict) -> str:
    place = list(problem["loc"])
    if len(place) > 1 and place[0] == "claims" and isinstance(place[1], int):
        place = [f"claim `{raw['claims'][place[1]].get('id', place[1])}`", *place[2:]]
    return f"{', '.join(map(str, place)) or 'the file'}: {problem['msg'][0].lower()}{problem['msg'][1:]} (got {problem['input']!r})"
