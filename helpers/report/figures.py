"""The figures of a report, each from stored rows alone: which rows, what is drawn, and the numbers behind it.

    for kind in KINDS:
        for picture in pictures(kind, rows, floors(rows)):
            picture.figure, picture.table        # a matplotlib Figure, and the estimates in it, in both readings

A figure is drawn for each model and set of facts, and for each method that was tried at several masks; methods with one mask each
share theirs. Every estimate is `stats.summary` of the rows behind it, over facts and seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from helpers import plots, stats
from helpers.facts import BUNDLED, load
from helpers.report import selections
from helpers.report.selections import UNEDITED

READINGS = {"probability": "mean probability", "top1": "top-1 accuracy"}
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


@dataclass(frozen=True, eq=False)
class Picture:
    """One figure, `where` it is from, and its estimates: the kind's columns, `reading`, those of `stats.summary`, `chance`."""

    kind: Kind
    where: str
    figure: Figure
    table: pd.DataFrame


def pictures(kind: Kind, rows: pd.DataFrame, chance: Mapping[str, float]) -> Iterator[Picture]:
    """All figures of a kind that the rows allow; `chance` by facts, as `floors` gives it."""
    chosen = kind.select(selections.named(rows))
    for (model, facts, tried), part in chosen.groupby(["model", "about", "tried"], sort=False):
        if set(part["mask"]) <= {selections.UNEDITED, selections.SHUFFLED}:  # nothing to compare it with
            continue
        table = stats.summary(part, [*kind.by, "reading"])
        table = table.assign(chance=[0.25 if is_mcq else chance.get(facts) for is_mcq in _multiple_choice(part, table, kind.by)])
        drawn = table[table["reading"] == kind.reading]
        if len(drawn):
            where = f"{model}, {facts}" + (f", {tried}" if tried else "")
            yield Picture(kind, where, kind.draw(drawn.drop(columns="reading"), f"{where}: {READINGS[kind.reading]}"), table)


def floors(rows: pd.DataFrame) -> dict[str, float]:
    """By set of facts: how often the commonest answer of the relation, in the whole file, is the true one.

    What guessing alone gets right. Sets of facts that do not come with the project have none.
    """
    found = {}
    for facts, part in rows[rows["measure"].str.match(r"forget (?:top1|probability)$")].groupby("facts", sort=False):
        source = facts.split()[0]
        if source in BUNDLED:
            everything = load(source)
            asked, total, count = set(part["fact"]), 0.0, 0
            for relation in dict.fromkeys(fact.relation.name for fact in everything):
                of = [fact for fact in everything if fact.relation.name == relation]
                read = [fact.answer for fact in of if f"{fact.subject} | {relation}" in asked]
                if read:
                    guess = stats.majority([fact.answer for fact in of], read)
                    total, count = total + guess["share"] * guess["n"], count + guess["n"]
            if count:
                found[facts] = total / count
    return found


def _multiple_choice(part: pd.DataFrame, table: pd.DataFrame, by: Sequence[str]) -> list[bool]:
    """For each estimate whether it is of multiple choice."""
    asked = part["name"].str.startswith("mcq").groupby([part[name] for name in by], sort=False).first()
    return [asked[key if len(by) > 1 else key[0]] for key in table[list(by)].itertuples(index=False, name=None)]


def _spider(table: pd.DataFrame, title: str) -> Figure:
    if table["measure"].nunique() < 3:
        return plots.estimates(table, row="measure", xlabel="outwards is better", title=title)
    return plots.spider(table, title=title)


def _bars(table: pd.DataFrame, title: str) -> Figure:
    return plots.bar_panels(table, "asked", "mask", "group", ylabel="true answers", title=title)


def _lines(x: str, column: str, row: str | None, xlabel: str) -> Callable[[pd.DataFrame, str], Figure]:
    def draw(table: pd.DataFrame, title: str) -> Figure:
        level = table["chance"].iloc[0]
        # the band of these panels is named after facts; here it is over facts and seeds
        table = table.drop(columns=["facts_low", "facts_high"]).rename(columns={"low": "facts_low", "high": "facts_high"})
        chance = None if pd.isna(level) else level
        return plots.line_panels(table, x, "mask", column, row, selections.MUTED, chance, xlabel, "true answers", title)

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
    return plots.estimates(table, row="mask", hue="measure", xlabel="share of facts", title=title)


KINDS = (
    Kind("spider", "What each edit does, by format",
         "Outwards is better on every axis: the new answer (in unlearning: the true answer gone), facts that should stay, and, where it was "
         "attacked so, what relearning does not bring back.", ("04_localized_editing", "06_attacks"), "probability", ("mask", "measure"),
         selections.spider, _spider),
    Kind("prompting", "Asking in other words",
         "True answers after the edit, by way of asking. A low bar for forgotten facts means little where that for retained facts is low, "
         "too: then the format is lost.", ("06_attacks",), "probability", ("mask", "asked", "group"), selections.prompting, _bars),
    Kind("relearning", "Relearning half of the facts",
         "True answers on the half that the attack was not shown, on retained facts, and on invented names that no model knew, which says how "
         "much the attack teaches.", ("06_attacks",), "probability", ("mask", "curve", "dose", "step"), selections.relearning,
         _lines("step", "curve", "dose", "training steps of the attack")),
    Kind("probing", "Read by a linear probe, layer by layer",
         "Probes are trained on retained facts and read on forgotten ones. Below the lowest edited block nothing can have changed.",
         ("06_attacks",), "top1", ("mask", "position", "layer"), selections.probing, _lines("layer", "position", None, LAYER)),
    Kind("soft-prompt", "A learned prompt",
         "Vectors before the prompt are trained on half of the facts; no weight changes.", ("06_attacks",), "probability",
         ("mask", "curve", "kind", "step"), selections.soft_prompt, _lines("step", "curve", "kind", "training steps of the attack")),
    Kind("worst", "The worst case, by what the attacker has",
         "Per fact the most that any attack recovers; settings are chosen on one half of the facts and read on the other. The black line is "
         "the edited model left alone.", ("06_attacks",), "top1", ("mask", "access"), selections.worst, _worst),
    Kind("windows", "Fact lookup, or only depth?",
         "The lookup MLPs and all windows of neighbouring MLPs, from the first layers to the last.", ("06_attacks", "09_mechanism_or_depth"),
         "top1", ("mask", "measure"), selections.windows, _windows),
    Kind("mask-ladder", "Weights deleted one by one",
         "Each way of choosing weights, at the same numbers of deletions.", ("07_weight_masks",), "probability", ("mask", "measure", "deleted"),
         selections.ladder, _ladder("deleted", "weights deleted")),
    Kind("scaling", "More facts at once",
         "The same edit of more and more facts.", ("11_scaling",), "probability", ("mask", "measure", "n"), selections.scaling,
         _ladder("n", "facts edited")),
)
