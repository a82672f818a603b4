"""What edits of n facts cost, on logarithmic axes. Shares between 0 and 1 against n are drawn by `ladder`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from helpers.plots.style import STYLE, canvas, colours


def cost_lines(table: pd.DataFrame, hue: str = "mask", column: str = "measure", row: str | None = None,
               powers: Mapping[str, float] | None = None, xlabel: str = "facts edited", title: str = "") -> Figure:
    """`value` > 0 against `n`, both logarithmic: one line a `hue`, one panel for each pair of `column` and `row`; a column has one scale.

    Intervals where there are columns `low` and `high` (cut off at half the smallest value), open markers where `collapsed`. `powers`, by
    panel of `column`: a dotted guide from the mean of the first points on, which grows as this power of n.
    """
    columns, rows = (list(dict.fromkeys(table[name])) if name else [""] for name in (column, row))
    coloured, sizes = colours(table[hue]), np.sort(table["n"].unique())
    figure, axes = canvas(len(columns), len(rows), width=3.3, height=2.7, squeeze=False, sharex=True, sharey="col")
    for (i, j), ax in np.ndenumerate(axes):
        part = table[(table[column] == columns[j]) & (True if row is None else table[row] == rows[i])]
        ax.set(xscale="log", yscale="log", title=str(columns[j]) if i == 0 else "")
        if row is not None and j == len(columns) - 1:
            ax.annotate(str(rows[i]), (1.02, 0.5), xycoords="axes fraction", rotation=-90, ha="left", va="center", fontsize=9)
        for name, line in part.groupby(hue, sort=False):
            line, colour = line.sort_values("n"), coloured[str(name)]
            lost = line["collapsed"].to_numpy(bool) if "collapsed" in line else np.zeros(len(line), bool)
            ax.plot(line["n"], line["value"], color=colour, linewidth=1.5, label=str(name))
            ax.scatter(line["n"], line["value"], s=22, edgecolors=[colour], facecolors=["white" if c else colour for c in lost], zorder=3)
            if "low" in line:
                ends = line[["low", "high"]].clip(lower=table.loc[table[column] == columns[j], "value"].min() / 2)
                ax.vlines(line["n"], ends["low"], ends["high"], color=colour, linewidth=1.2, alpha=0.6)
        power = (powers or {}).get(columns[j])
        if power is not None and len(part):
            first = part["n"].min()
            guide = part.loc[part["n"] == first, "value"].mean() * (sizes / first) ** power
            ax.plot(sizes, guide, color="0.45", linestyle=":", linewidth=1.2, zorder=1, label=f"n to the {power:g}")
        ax.set_xticks(sizes)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_minor_locator(NullLocator())
    named = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    if "collapsed" in table and table["collapsed"].any():
        named["collapsed"] = axes[0][0].scatter([], [], s=22, edgecolors="0.3", facecolors="white")
    figure.legend(named.values(), named.keys(), loc="outside right center", fontsize=8)
    figure.supxlabel(xlabel, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=STYLE["axes.titlesize"])
    return figure
