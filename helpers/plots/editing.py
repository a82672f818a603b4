"""Edits: the spider plot, estimates by format, and trade-offs between two measures.

Every table is tidy, one estimate a row: columns `measure` (or as named), `value` and, where known, `low`, `high`; `mask` (or another
hue), and `collapsed`. An edit that collapsed is drawn with an open marker or a dashed line, and says so in the legend.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.plots.style import canvas, colours

OUTSIDE = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "fontsize": 8}


def spider(table: pd.DataFrame, hue: str = "mask", title: str = "") -> Figure:
    """One axis a `measure`, one closed line a `hue`, radial bars for the intervals; all values between 0 (centre) and 1.

    Values outside 0 to 1 are cut off there. Raises ValueError for fewer than three measures.
    """
    measures = list(dict.fromkeys(table["measure"]))
    if len(measures) < 3:
        raise ValueError(f"a spider plot needs three measures or more, not {', '.join(measures) or 'none'}")
    angles = np.linspace(0, 2 * np.pi, len(measures), endpoint=False)
    groups, coloured = list(table.groupby(hue, sort=False)), colours(table[hue])
    columns = 2 if max(len(str(name)) for name, _ in groups) > 16 else 3
    figure, ax = canvas(width=6.6, height=4.6 + 0.2 * -(-len(groups) // columns), subplot_kw={"projection": "polar"})
    for i, (name, rows) in enumerate(groups):
        rows = rows.set_index("measure").reindex(measures)
        shift = 0.02 * (i - (len(groups) - 1) / 2)  # so that intervals on one axis do not hide each other
        values, collapsed, colour = rows["value"].clip(0, 1).to_numpy(), _collapsed(rows), coloured[str(name)]
        ax.plot(np.append(angles, angles[0]), np.append(values, values[0]), color=colour, linewidth=1.5, linestyle="--" if collapsed else "-",
                label=_label(name, collapsed))
        if "low" in rows:
            ax.vlines(angles + shift, rows["low"].clip(0, 1), rows["high"].clip(0, 1), color=colour, linewidth=2, alpha=0.75)
    ax.set_theta_offset(np.pi / 2)
    ax.set_theta_direction(-1)
    ax.set_xticks(angles, measures, fontsize=9)
    for tick, angle in zip(ax.get_xticklabels(), angles):
        side = np.sin(angle)  # labels grow away from the circle
        tick.set_ha("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
    ax.set_ylim(0, 1)
    ax.set_yticks([0.25, 0.5, 0.75, 1], ["", ".5", "", "1"], fontsize=8, color="0.4")
    ax.set_title(title, pad=24)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def estimates(table: pd.DataFrame, row: str = "format", hue: str = "mask", xlabel: str = "", title: str = "", before: pd.Series | None = None,
              chance: float | None = None) -> Figure:
    """Dots with intervals, one line a `row`, one colour a `hue`. `before` (by row): the unedited model, as a grey bar. `chance`: a dotted line."""
    rows, groups, coloured = list(dict.fromkeys(table[row])), list(table.groupby(hue, sort=False)), colours(table[hue])
    figure, ax = canvas(width=6.8, height=0.8 + len(rows) * max(0.32, 0.13 * len(groups)))
    for i, (name, part) in enumerate(groups):
        part, colour = part.set_index(row).reindex(rows), coloured[str(name)]
        where, collapsed = np.arange(len(rows)) + 0.7 * ((i + 0.5) / len(groups) - 0.5), _collapsed(part)
        if "low" in part:
            ax.hlines(where, part["low"], part["high"], color=colour, linewidth=1.6, alpha=0.7)
        ax.plot(part["value"], where, "o", markersize=5, color=colour, markerfacecolor="white" if collapsed else colour, label=_label(name, collapsed))
    if before is not None:
        ax.vlines(before.reindex(rows), np.arange(len(rows)) - 0.42, np.arange(len(rows)) + 0.42, color="0.55", linewidth=2, label="before")
    if chance is not None:
        ax.axvline(chance, color="0.45", linestyle=":", linewidth=1.2, label=f"chance {chance:.2f}")
    ax.set_yticks(range(len(rows)), rows)
    ax.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.5), xlabel=xlabel, title=title)
    ax.grid(axis="y", visible=False)
    ax.legend(**OUTSIDE)
    return figure


def tradeoff(table: pd.DataFrame, x: str, y: str, hue: str = "mask", labels: tuple[str, str] = ("", ""), title: str = "",
             order: str | None = None, chosen: str | None = None, diagonal: str = "", before: str = "") -> Figure:
    """`y` against `x`, one colour a `hue`: two columns of the table or, where it has a column `measure`, two measures with their intervals.

    `order`: a column by which the points of a hue are joined; `chosen`: a column of booleans, those points are ringed.
    `diagonal`: what it means that both fall alike, written at a line from 0 to 1. `before`: the hue of the unedited model, in grey.
    """
    table = _side_by_side(table, x, y, hue) if "measure" in table else table
    figure, ax = canvas(width=5.4, height=4.2)
    coloured = colours(name for name in table[hue] if name != before)
    for name, rows in table.groupby(hue, sort=False):
        rows = rows.sort_values(order) if order else rows
        colour = (0.45, 0.45, 0.45) if name == before else coloured[str(name)]
        collapsed = rows["collapsed"].to_numpy(bool) if "collapsed" in rows else np.zeros(len(rows), bool)
        if order:
            ax.plot(rows[x], rows[y], color=colour, linewidth=1.2, alpha=0.6)
        if "low" in rows:
            ax.vlines(rows[x], rows["low"], rows["high"], color=colour, linewidth=1.2, alpha=0.6)
            ax.hlines(rows[y], rows["x_low"], rows["x_high"], color=colour, linewidth=1.2, alpha=0.6)
        faces = ["white" if lost else colour for lost in collapsed]
        ax.scatter(rows[x], rows[y], s=28, edgecolors=[colour], facecolors=faces, zorder=3)
        ax.plot([], [], "o", color=colour, markerfacecolor="white" if collapsed.all() else colour, label=_label(name, collapsed.all()))
        if chosen:
            ax.scatter(rows.loc[rows[chosen], x], rows.loc[rows[chosen], y], s=130, facecolors="none", edgecolors=[colour], linewidths=1.4, zorder=3)
    if diagonal:
        ax.plot([0, 1], [0, 1], color="0.45", linestyle=":", linewidth=1.2)
        ax.annotate(diagonal, (0.97, 0.93), ha="right", va="bottom", fontsize=8, color="0.35", rotation=36, rotation_mode="anchor")
        ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    ax.set(xlabel=labels[0] or x, ylabel=labels[1] or y, title=title)
    ax.legend(**OUTSIDE)
    return figure


def _side_by_side(table: pd.DataFrame, x: str, y: str, hue: str) -> pd.DataFrame:
    """Two measures of each hue as columns; `low`, `high` and `collapsed` are those of `y`, `x_low` and `x_high` those of `x`."""
    of = lambda measure: table[table["measure"] == measure].drop(columns="measure")
    one = of(x)[[hue, "value", "low", "high"]].rename(columns={"value": x, "low": "x_low", "high": "x_high"})
    return of(y).rename(columns={"value": y}).merge(one, on=hue)


def _collapsed(rows: pd.DataFrame) -> bool:
    return "collapsed" in rows and bool(rows["collapsed"].fillna(False).any())


def _label(name, collapsed: bool) -> str:
    return f"{name} (collapsed)" if collapsed else str(name)
