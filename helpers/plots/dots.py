"""Dots with intervals in panels side by side, for many rows and many hues."""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.plots.style import MARKERS, STYLE, any_collapsed, canvas, colours, ends, named, rounds


def dot_panels(table: pd.DataFrame, row: str, hue: str, column: str, xlabel: str = "", title: str = "") -> Figure:
    """`value` with `low` and `high`, shares between 0 and 1: one line a `row`, one colour a `hue`, one panel a `column`; in the table's order.

    A short dotted line is the chance level of a row and panel, where there is a column `chance`. Hues that `collapsed` have open markers.
    """
    rows, hues, panels = (list(dict.fromkeys(table[name])) for name in (row, hue, column))
    coloured, again, places = colours(hues), rounds(hues), np.arange(len(rows))
    figure, axes = canvas(len(panels), width=6.2 / len(panels) + 1.2, height=1 + len(rows) * max(0.3, 0.085 * len(hues)), squeeze=False, sharey=True)
    for ax, panel in zip(axes[0], panels):
        part = table[table[column] == panel]
        for i, name in enumerate(hues):
            dots, colour = part[part[hue] == name].set_index(row).reindex(rows), coloured[str(name)]
            where = places + 0.8 * ((i + 0.5) / len(hues) - 0.5)
            lost = any_collapsed(dots)
            ax.hlines(where, *ends(dots, shares=True).to_numpy().T, color=colour, linewidth=1.2, alpha=0.7)
            ax.plot(dots["value"], where, MARKERS[again[str(name)] % len(MARKERS)], markersize=4, color=colour,
                    markerfacecolor="white" if lost else colour, label=named(name, lost))
        if "chance" in part:
            ax.vlines(part.groupby(row)["chance"].first().reindex(rows), places - 0.45, places + 0.45, color="black", linestyle=":", linewidth=1.2, label="chance")
        ax.vlines(1, -0.5, len(rows) - 0.5, color="0.45", linestyle=":", linewidth=0.8)
        ax.hlines(places[1:] - 0.5, -0.02, 1.02, color="0.9", linewidth=0.6)
        ax.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.5), title=str(panel))
        ax.set_xlabel(xlabel, fontsize=9)
        ax.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(places, ["\n".join(textwrap.fill(part, 26) for part in named(name, False).split("\n")) for name in rows], fontsize=9)
    found = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=STYLE["axes.titlesize"])
    return figure
