"""Attacks: panels of lines over doses and layers, and the worst case by what the attacker has.

Tables hold means over facts as `stats.summary` gives them: `value`, and `facts_low`, `facts_high`, drawn as a band. Chance level and
ceiling are drawn in every panel. An attack that was not made leaves an empty table, and a figure that says so.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.plots.style import STYLE, canvas, colours

WIDEST = 17  # inches
MUTED = ({"linestyle": "--", "color": "0.25"}, {"linestyle": ":", "color": "0.25"}, {"linestyle": "-.", "color": "0.55"})


def line_panels(table: pd.DataFrame, x: str, hue: str, column: str, row: str | None = None, muted: Sequence[str] = (),
                chance: float | None = None, xlabel: str = "", ylabel: str = "", title: str = "") -> Figure:
    """`value` against `x`, one line a `hue`, one panel for each pair of `column` and `row`; columns of the table, in its order.

    Lines of `muted`, controls and reference models, are grey and broken, without a band. Where `x` is text its values are put side by side,
    and at each of them the points of the lines, with error bars, so that equal ones do not hide each other.
    """
    if table.empty:
        return _nothing(title)
    columns, rows = (list(dict.fromkeys(table[name])) if name else [""] for name in (column, row))
    coloured, lines = colours(h for h in table[hue] if h not in muted), list(dict.fromkeys(table[hue]))
    step = min(0.12, 0.7 / len(lines))
    width = min(3.3, WIDEST / len(columns))
    numeric = pd.api.types.is_numeric_dtype(table[x])
    figure, axes = canvas(len(columns), len(rows), width=width, height=2.5, squeeze=False, sharey=True, sharex=numeric)
    for (i, j), ax in np.ndenumerate(axes):
        part = table[(table[column] == columns[j]) & (True if row is None else table[row] == rows[i])]
        ticks = list(dict.fromkeys(part[x]))
        for name, line in part.groupby(hue, sort=False):
            where = line[x].astype(float) if numeric else line[x].map(ticks.index) + (lines.index(name) - (len(lines) - 1) / 2) * step
            style = MUTED[muted.index(name) % len(MUTED)] if name in muted else {"color": coloured[str(name)]}
            _line(ax, where.to_numpy(), line, name, style, "" if name in muted else "band" if numeric else "bars")
        _levels(ax, chance, labelled=(i, j) == (0, 0))
        if not numeric:
            ax.set_xticks(range(len(ticks)), ticks, rotation=30, ha="right", fontsize=8)
        ax.set(title=str(columns[j]) if i == 0 else "", ylim=(-0.03, 1.09))
        ax.set_ylabel(ylabel if j == 0 else "", fontsize=9)
        if j == len(columns) - 1 and row is not None:
            label = textwrap.fill(str(rows[i]), 22)
            ax.annotate(label, (1.02, 0.5), xycoords="axes fraction", rotation=-90, ha="left", va="center", fontsize=8)
    named = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(named.values(), named.keys(), loc="outside right center", fontsize=8, frameon=False)
    figure.supxlabel(xlabel, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=STYLE["axes.titlesize"])
    return figure


def access_bars(table: pd.DataFrame, hue: str = "mask", chance: float | None = None, title: str = "") -> Figure:
    """The worst case as bars with intervals, one group an `access`, one colour a `hue`, from rows of `attacks.by_access`.

    A short line in each bar is the edited model left alone (`untouched`).
    """
    if table.empty:
        return _nothing(title)
    levels, names = (list(dict.fromkeys(table[name])) for name in ("access", hue))
    figure, ax = canvas(width=max(6.5, 1.6 * len(levels)), height=3.4)
    thickness, coloured = 0.8 / len(names), colours(names)
    for i, name in enumerate(names):
        rows = table[table[hue] == name].set_index("access").reindex(levels)
        where = np.arange(len(levels)) + (i - (len(names) - 1) / 2) * thickness
        errors = [(rows["recovered"] - rows["low"]).clip(lower=0), (rows["high"] - rows["recovered"]).clip(lower=0)]
        ax.bar(where, rows["recovered"], width=0.92 * thickness, color=coloured[str(name)], label=str(name), alpha=0.85,
               yerr=errors, error_kw={"elinewidth": 1, "ecolor": "0.25"})
        ax.hlines(rows["untouched"], where - 0.46 * thickness, where + 0.46 * thickness, color="black", linewidth=1.8,
                  label="left alone" if i == len(names) - 1 else None)
    _levels(ax, chance, labelled=True)
    ax.set_xticks(range(len(levels)), [level.replace(", ", ",\n", 1) for level in levels])
    ax.set(ylim=(0, 1.09), ylabel="true answers recovered", xlabel="what the attacker has", title=title)
    ax.grid(axis="x", visible=False)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8)
    return figure


def _line(ax, where: np.ndarray, rows: pd.DataFrame, name: str, style: dict, interval: str) -> None:
    order = where.argsort(kind="stable")
    where, rows = where[order], rows.iloc[order]
    ax.plot(where, rows["value"], marker="o", markersize=3, linewidth=1.5, label=str(name), **style)
    if interval == "bars" and "facts_low" in rows:
        ax.vlines(where, rows["facts_low"], rows["facts_high"], color=style["color"], alpha=0.6, linewidth=1.2)
    elif interval == "band" and "facts_low" in rows:
        ax.fill_between(where, rows["facts_low"], rows["facts_high"], color=style["color"], alpha=0.13, linewidth=0)


def _levels(ax, chance: float | None, labelled: bool) -> None:
    """Dotted lines at chance level and ceiling."""
    for level, name in ((chance, f"chance {chance or 0:.2f}"), (1.0, "ceiling")):
        if level is not None:
            ax.axhline(level, color="0.45", linestyle=":", linewidth=1)
            if labelled:
                ax.annotate(name, (0.01, level), xycoords=("axes fraction", "data"), ha="left", va="bottom", fontsize=7, color="0.25",
                            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.6})


def _nothing(title: str) -> Figure:
    figure, ax = canvas(width=5, height=1.2)
    ax.set_title(title)
    ax.set_axis_off()
    ax.text(0.5, 0.5, "not made: see what was left out", ha="center", va="center", color="0.35")
    return figure
