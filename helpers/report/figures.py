"""The figures of a report, each from stored rows alone: which rows, what is drawn, and the numbers behind it.

    for kind in KINDS:
        for picture in pictures(kind, rows, floors(rows)):
            picture.figure, picture.table        # a matplotlib Figure, and the estimates in it, in both readings

A figure is drawn for each model and set of facts, and for each method that was tried at several masks; methods with one mask each
share theirs. Every estimate is `stats.summary` of the rows behind it, over facts and seeds. One edit under two names is drawn once, under
both; edits that did not take have a dagger, those that collapsed an open marker, a broken line or a hatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from helpers import plots, stats
from helpers.facts import BUNDLED, load
from helpers.report import edits, selections
from helpers.report.selections import UNEDITED

READINGS = {"probability": "mean probability", "top1": "top-1 accuracy"}
STEPS, PROBABLE = "training steps of the attack", "probability of\nthe true answer"
ESTIMATED = ["fact", "seed", "value", "attack", "run"]
LAYER = "layer (0 = embeddings, l + 1 = after block l)"


@dataclass(frozen=True)
class Kind:
    """A kind of figure: `select` finds its rows and names what they show (columns BY), `draw` gets estimates in one reading."""

    name: str
    title: str
    says: str
    notebooks: tuple[str, ...]
    reading: str
    by: tuple[str, ...]
    select: Callable[[pd.DataFrame], pd.DataFrame]
    draw: Callable[[pd.DataFrame, str], Figure]
    uniform: bool = False  # chance is one of the relation's options, not the commonest answer


@dataclass(frozen=True, eq=False)
class Picture:
    """One figure, `where` it is from, its estimates (the kind's columns, `reading`, those of `stats.summary`, `chance`, `collapsed`), and
    a `note` on edits that did not take, collapsed or were trained in a profile that trains less;
    `runs`: those behind it."""

    kind: Kind
    where: str
    figure: Figure
    table: pd.DataFrame
    note: str
    runs: tuple[str, ...]


def pictures(kind: Kind, rows: pd.DataFrame, chance: Mapping[str, float], made: pd.DataFrame | None = None) -> Iterator[Picture]:
    """All figures of a kind that the rows allow; `chance` by facts, as `floors` gives it.

    For many figures of the same rows have them from `selections.named`, and `made` from `edits.made`.
    """
    made = edits.made(rows) if made is None else made
    chosen = edits.marked(kind.select(rows if "tried" in rows else selections.named(rows)), made)
    for (model, facts, tried), part in chosen.groupby(["model", "about", "tried"], sort=False):
        if set(part["mask"]) <= {selections.UNEDITED, selections.SHUFFLED}:  # nothing to compare it with
            continue
        behind = part["run"].dropna().unique()
        part = _renamed(part)
        by = [*kind.by, "reading"]
        # dozens of columns of texts take longer to copy, estimate by estimate, than the intervals to compute
        table = stats.summary(part[list(dict.fromkeys([*by, *ESTIMATED]))], by)
        level = uniform(facts, part) if kind.uniform else chance.get(facts)
        table = table.assign(chance=[0.25 if is_mcq else level for is_mcq in _by_estimate(part["name"].str.startswith("mcq"), part, table, kind.by)],
                             collapsed=_by_estimate(part["collapsed"], part, table, kind.by))
        drawn = table[table["reading"] == kind.reading]
        if len(drawn):
            where = f"{model}, {facts}" + (f", {tried}" if tried else "")
            figure = kind.draw(drawn.drop(columns="reading"), f"{where}: {READINGS[kind.reading]}")
            yield Picture(kind, where, figure, table, _note(part, made), tuple(behind))


def uniform(facts: str, rows: pd.DataFrame) -> float | None:
    """One of as many answers as the relation has options; None where relations differ, or the facts do not come with the project."""
    source, relations = facts.split()[0], set(rows["fact"].str.split(" | ", regex=False).str[-1])
    if source not in BUNDLED:
        return None
    options = {len(fact.relation.options) for fact in load(source) if fact.relation.name in relations}
    return 1 / max(options) if len(options) == 1 and max(options) else None


def floors(rows: pd.DataFrame) -> dict[str, float]:
    """By set of facts: how often the commonest answer of the relation, in the whole file, is the true one.

    What guessing alone gets right. Sets of facts that do not come with the project have none, nor have those of one answer (a whole
    sport): who knows of what the set is made is always right, who does not, never.
    """
    found = {}
    for facts, part in rows[rows["measure"].str.match(r"forget (?:top1|probability)$")].groupby("facts", sort=False):
        source = facts.split()[0]
        if source in BUNDLED:
            everything = load(source)
            asked, total, answers = set(part["fact"]), 0.0, []
            for relation in dict.fromkeys(fact.relation.name for fact in everything):
                of = [fact for fact in everything if fact.relation.name == relation]
                read = [fact.answer for fact in of if f"{fact.subject} | {relation}" in asked]
                if read:
                    guess = stats.majority([fact.answer for fact in of], read)
                    total, answers = total + guess["share"] * guess["n"], answers + read
            if len(set(answers)) > 1:
                found[facts] = total / len(answers)
    return found


def _by_estimate(values: pd.Series, part: pd.DataFrame, table: pd.DataFrame, by: Sequence[str]) -> list[bool]:
    """For each estimate whether a value is true of any row behind it."""
    found = values.groupby([part[name] for name in by], sort=False, dropna=False).any()
    return [bool(found[key if len(by) > 1 else key[0]]) for key in table[list(by)].itertuples(index=False, name=None)]


def _renamed(part: pd.DataFrame) -> pd.DataFrame:
    """Rows of one figure without edits that repeat another, whose name (`place`) says so; `mask` is that name, with a dagger if edits did not take."""
    drawn = part.drop_duplicates("localization").set_index("localization")
    names, again = drawn["mask"], {name: kept for name, kept in drawn["same_as"].items() if kept in drawn.index}
    also = {names[kept]: "".join(f" = {names[name]}" for name in again if again[name] == kept) for kept in again.values()}
    part = part[~part["localization"].isin(again)]
    place = part["mask"] + part["mask"].map(lambda mask: also.get(mask, ""))
    return part.assign(place=place, mask=place + part["mask"].map(_daggers(part)))


def _daggers(part: pd.DataFrame) -> dict[str, str]:
    """The mark of each mask: none, a dagger, or that with the numbers of facts at which its edits did not take, where at others they did."""
    sizes = part.groupby("mask")["n"].agg(set)
    weak = part[part["weak"]].groupby("mask")["n"].agg(set)
    at = lambda mask: "" if weak[mask] == sizes[mask] else f" at {', '.join(map(str, sorted(weak[mask])))}"
    return {mask: f" {edits.DAGGER}{at(mask)}" if mask in weak else "" for mask in sizes.index}


def _note(part: pd.DataFrame, made: pd.DataFrame) -> str:
    """Which masks have a mark, and why; with the number of facts, where there are several."""
    keys = part[["place", *edits.KEY]].dropna().drop_duplicates()
    size = keys["n"].map(" at {:.0f} facts".format) if keys["n"].nunique() > 1 else ""
    of = [(row[0], made.loc[row[1:]]) for row in keys.assign(place=keys["place"] + size).itertuples(index=False, name=None) if row[1:] in made.index]
    few = [f"{name} {edit['taken']:.2f}" for name, edit in of if edit["weak"]]
    lost = sorted({f"{name} ({edit['collapse']})" for name, edit in of if edit["collapse"]})
    said = {f"{edits.DAGGER} did not take: share of the facts in the trained words below {edits.TAKEN}": few, "Collapsed": lost}
    said |= {f"Trained in the {light} profile": sorted({name for name, edit in of if edit["light"] == light}) for light in edits.LIGHT}
    return " ".join(f"{what}: {', '.join(names)}." for what, names in said.items() if names)


def _spider(table: pd.DataFrame, title: str) -> Figure:
    if table["measure"].nunique() < 3:
        return plots.estimates(table, row="measure", xlabel="outwards is better", title=title)
    return plots.spider(table, title=title)


def _prompting(table: pd.DataFrame, title: str) -> Figure:
    # guessing the commonest answer is a level for the facts that were forgotten; the others have other answers
    known = (table["group"] == selections.GROUPS["retain"]) & (table["chance"] != 0.25)
    return plots.dot_panels(table.assign(chance=table["chance"].mask(known)), "asked", "mask", "group", "mean probability of the true answer", title)


def _lines(x: str, column: str, row: str | None, xlabel: str, ylabel: str) -> Callable[[pd.DataFrame, str], Figure]:
    def draw(table: pd.DataFrame, title: str) -> Figure:
        level = table["chance"].iloc[0]
        # the band of these panels is named after facts; here it is over facts and seeds
        table = table.drop(columns=["facts_low", "facts_high"]).rename(columns={"low": "facts_low", "high": "facts_high"})
        chance = None if pd.isna(level) else level
        return plots.line_panels(table, x, "mask", column, row, selections.MUTED, chance, xlabel, ylabel, title)

    return draw


def _ladder(x: str, xlabel: str) -> Callable[[pd.DataFrame, str], Figure]:
    def draw(table: pd.DataFrame, title: str) -> Figure:
        before = table[table["mask"] == UNEDITED].groupby("measure")["value"].mean()
        chance = table[~table["measure"].str.contains("retain")].groupby("measure")["chance"].first().dropna()
        rest = table[table["mask"] != UNEDITED].astype({x: float})
        muted = [name for name in dict.fromkeys(rest["mask"]) if name.startswith("random")]
        return plots.ladder(rest, x=x, before=before.to_dict(), chance=chance.to_dict(), muted=muted, xlabel=xlabel, title=title)

    return draw


def _worst(table: pd.DataFrame, title: str) -> Figure:
    level = table["chance"].iloc[0]
    alone = table[table["access"] == selections.ALONE].set_index("mask")["value"]
    rest = table[table["access"] != selections.ALONE].rename(columns={"value": "recovered"})
    return plots.access_bars(rest.assign(untouched=rest["mask"].map(alone)), "mask", None if pd.isna(level) else level, title)


def _windows(table: pd.DataFrame, title: str) -> Figure:
    # new answers in the trained words have no level: guessing says nothing of the one that was chosen
    guessed = table["measure"].isin([selections.PANELS["mcq_edit"], selections.WORST])
    rows = table.assign(chance=table["chance"].where(guessed)).sort_values("chance", key=lambda c: c.isna(), kind="stable")
    order = list(dict.fromkeys(table["mask"]))
    rows = rows.sort_values("mask", key=lambda names: names.map(order.index), kind="stable")
    return plots.dot_panels(rows.sort_values("panel", kind="stable"), "mask", "measure", "panel", "share of facts", title)


KINDS = (
    Kind("spider", "What each edit does, by format",
         "Outwards is better on every axis: the new answer (in unlearning: the true answer gone), facts that should stay, and, where it was "
         "attacked so, what relearning does not bring back.", ("04_localized_editing", "05_localized_unlearning", "06_attacks", "08_baselines"), "probability",
         ("mask", "measure"), selections.spider, _spider),
    Kind("prompting", "Asking in other words",
         "True answers after the edit, by way of asking. A low value for forgotten facts means little where that for retained facts is low, "
         "too: then the format is lost. Chance: the commonest answer, or one of four options.", ("06_attacks",), "probability",
         ("mask", "asked", "group"), selections.prompting, _prompting),
    Kind("relearning", "Relearning half of the facts",
         "True answers on the half that the attack was not shown, on retained facts, and on invented names that no model knew, which says how "
         "much the attack teaches.", ("06_attacks",), "probability", ("mask", "curve", "dose", "step"), selections.relearning,
         _lines("step", "curve", "dose", STEPS, PROBABLE)),
    Kind("probing", "Read by a linear probe, layer by layer",
         "Probes are trained on retained facts and read on forgotten ones. Below the lowest edited block nothing can have changed.",
         ("06_attacks",), "top1", ("mask", "position", "layer"), selections.probing, _lines("layer", "position", None, LAYER, "facts read right")),
    Kind("soft-prompt", "A learned prompt",
         "Vectors before the prompt are trained on half of the facts; no weight changes.", ("06_attacks",), "probability",
         ("mask", "curve", "kind", "step"), selections.soft_prompt, _lines("step", "curve", "kind", STEPS, PROBABLE)),
    Kind("worst", "The worst case, by what the attacker has",
         "Per fact the most that any attack recovers; settings are chosen on one half of the facts and read on the other. The black line is "
         "the edited model left alone.", ("06_attacks",), "top1", ("mask", "access"), selections.worst, _worst),
    Kind("windows", "Fact lookup, or only depth?",
         "The lookup MLPs and all windows of neighbouring MLPs, from the first layers to the last. Chance: one of four options, or the commonest "
         "answer. A worst case is missing where an edit was not attacked.", ("06_attacks", "09_mechanism_or_depth"),
         "top1", ("mask", "measure", "panel"), selections.windows, _windows),
    Kind("mask-ladder", "Weights deleted one by one",
         "Each way of choosing weights, at the same numbers of deletions. Chance: one of the relation's options.", ("07_weight_masks",), "probability",
         ("mask", "measure", "deleted"), selections.ladder, _ladder("deleted", "weights deleted"), uniform=True),
    Kind("scaling", "More facts at once",
         "The same edit of more and more facts.", ("11_scaling",), "probability", ("mask", "measure", "n"), selections.scaling,
         _ladder("n", "facts edited")),
)
