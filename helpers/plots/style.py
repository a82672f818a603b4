"""Style shared by all figures: colour-blind safe (seaborn's "colorblind" palette, blue-orange diverging maps), static."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

PALETTE = sns.color_palette("colorblind")
# places where weights are trained keep their colour in every figure (names of localization.choices)
PLACES = {"lookup": 0, "causal tracing": 1, "everything": 2, "attribution": 3, "causal tracing MLPs": 8, "attribution MLPs": 4, "all MLPs": 9,
          "random": 7, "random MLPs": 5}
MARKERS = "osD^"  # of the names that share a colour
MARKS = (" †", " = ")  # what a report puts behind the name of a place: the edit did not take, other names of the same edit
# positions of a prompt have one name and one colour in every figure, whatever a table calls them
POSITIONS = {"name": "name's last token", "subject last": "name's last token", "last": "last position", "subject": "whole name",
             "subject first": "name's first token", "subject middle": "name's middle tokens",
             "name, shuffled labels": "name's last token, shuffled labels", "later": "later tokens",
             **{f"after subject {k}": f"token {k} after the name" for k in range(1, 10)}}
POSITION_COLOURS = {"name's last token": 0, "last position": 1, "whole name": 2, "name's last token, shuffled labels": 7}
# how the layers of the residual stream are counted
STREAM = "layer (0 = embeddings, l + 1 = after block l)"
DIVERGING = "PuOr"
SEQUENTIAL = "Blues"
STYLE = {
    "figure.dpi": 110, "savefig.dpi": 150, "font.size": 10, "axes.titlesize": 11,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6,
    "legend.frameon": False, "lines.linewidth": 1.8, "axes.prop_cycle": mpl.cycler(color=PALETTE),
}


def colours(names: Iterable[str]) -> dict[str, tuple[float, float, float]]:
    """A colour for each name, in order: its own for a name in PLACES, for the others those of the palette that are left, over and over."""
    names = list(dict.fromkeys(map(str, names)))
    places = {name: PLACES[plain] for name in names if (plain := _plain(name)) in PLACES}
    free = itertools.cycle([i for i in range(len(PALETTE)) if i not in places.values()] or range(len(PALETTE)))
    return {name: PALETTE[places[name] if name in places else next(free)] for name in names}


def rounds(names: Iterable[str]) -> dict[str, int]:
    """How many names before each have its colour: with more names than colours, marker or dash must tell them apart."""
    coloured = colours(names)
    return {name: list(coloured.values())[:place].count(colour) for place, (name, colour) in enumerate(coloured.items())}


def named(name, collapsed: bool, rows: pd.DataFrame | None = None) -> str:
    """A name as legends have it, with what the edit broke where `rows` have a column `broken` that says so."""
    broken = next((text for text in rows["broken"].dropna() if text), "") if rows is not None and "broken" in rows else ""
    return str(name).replace(" = ", "\n= ") + " (collapsed)" * bool(collapsed) + f"\nbroke {broken}" * bool(broken)


def any_collapsed(rows: pd.DataFrame) -> bool:
    return "collapsed" in rows and bool(rows["collapsed"].eq(True).any())


def ends(rows: pd.DataFrame, shares: bool) -> pd.DataFrame:
    """`low` and `high` as they are drawn: intervals of shares stop at 0 and 1."""
    return rows[["low", "high"]].clip(0, 1) if shares else rows[["low", "high"]]


def lengths(values: pd.Series, rows: pd.DataFrame) -> list[pd.Series]:
    """How far the intervals of shares reach below and above their values."""
    drawn = ends(rows, shares=True)
    return [(values - drawn["low"]).clip(lower=0), (drawn["high"] - values).clip(lower=0)]


def position(name: str, number: int = 0) -> tuple[str, tuple[float, float, float]]:
    """The name of a position in figures and its colour; any other name is left, with the colour of its number."""
    label = POSITIONS.get(name, name)
    return label, PALETTE[POSITION_COLOURS.get(label, number) % len(PALETTE)]


def canvas(n_cols: int = 1, n_rows: int = 1, width: float = 4.6, height: float = 3.2, **options):
    """(figure, axes) in the project's style, without touching pyplot's global state."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width * n_cols, height * n_rows), layout="constrained")
        return figure, figure.subplots(n_rows, n_cols, **options)


def reference(ax, chance: float, ceiling: float | None = 1.0) -> None:
    """Dotted lines at chance level and ceiling, labelled."""
    ax.axhline(chance, color="0.45", linestyle=":", linewidth=1.2)
    ax.annotate(f"chance {chance:.2f}", (1, chance), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color="0.35")
    if ceiling is not None:
        ax.axhline(ceiling, color="0.45", linestyle=":", linewidth=0.8)


def _plain(name: str) -> str:
    for mark in MARKS:
        name = name.split(mark)[0]
    return name
