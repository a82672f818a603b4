"""Grouped bars with intervals."""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.plots.style import STYLE, canvas, colours


def bar_panels(table: pd.DataFrame, x: str, hue: str, row: str, ylabel: str = "", title: str = "") -> Figure:
    """`value` with `low` and `high`: one group of bars an `x`, one colour a `hue`, one panel a `row`; in the table's order.

    A short dotted line across a group is its chance level, where there is a column `chance`; the line at 1 is the ceiling.
    """
    groups, hues, rows = (list(dict.fromkeys(table[name])) for name in (x, hue, row))
    width = max(6.5, 1 + len(groups) * max(0.9, 0.13 * len(hues)))
    figure, axes = canvas(1, len(rows), width=width, height=2.3, squeeze=False, sharex=True)
    thickness, coloured = 0.84 / len(hues), colours(hues)
    for ax, panel in zip(axes[:, 0], rows):
        part = table[table[row] == panel]
        for i, name in enumerate(hues):
            bars = part[part[hue] == name].set_index(x).reindex(groups)
            where = np.arange(len(groups)) + (i - (len(hues) - 1) / 2) * thickness
            errors = [(bars["value"] - bars["low"]).clip(lower=0), (bars["high"] - bars["value"]).clip(lower=0)]
            ax.bar(where, bars["value"], width=0.92 * thickness, color=coloured[str(name)], alpha=0.85, label=str(name), yerr=errors,
                   error_kw={"elinewidth": 0.9, "ecolor": "0.25"})
        if "chance" in part:
            levels = part.groupby(x)["chance"].first().reindex(groups)
            ends = np.arange(len(groups)) - 0.46, np.arange(len(groups)) + 0.46
            ax.hlines(levels, *ends, color="black", linestyle=":", linewidth=1.2, label="chance")
        ax.axhline(1, color="0.45", linestyle=":", linewidth=0.8)
        ax.annotate("ceiling", (0.005, 1), xycoords=("axes fraction", "data"), va="bottom", fontsize=7, color="0.25")
        ax.set(ylim=(0, 1.1), title=str(panel))
        ax.set_ylabel(ylabel, fontsize=9)
        ax.grid(axis="x", visible=False)
    axes[-1, 0].set_xticks(range(len(groups)), [textwrap.fill(str(group), 13) for group in groups], fontsize=8)
    named = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(named.values(), named.keys(), loc="outside right center", fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=STYLE["axes.titlesize"])
    return figure
