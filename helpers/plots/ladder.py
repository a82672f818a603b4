"""Weights deleted step by step, and norms that grow edit by edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from helpers.plots.style import PALETTE, STYLE, canvas, ends

COLOURS = [*PALETTE[:7], *PALETTE[8:]]  # without the grey one, which controls have
MUTED = ("--", ":", "-.")


def ladder(table: pd.DataFrame, hue: str = "mask", column: str = "measure", x: str = "deleted", before: Mapping[str, float] | None = None,
           chance: Mapping[str, float] | None = None, muted: Sequence[str] = (), xlabel: str = "weights deleted", title: str = "") -> Figure:
    """`value` against the number of deleted weights (logarithmic), one line a `hue`, one panel a `column`.

    Bands where there are columns `low` and `high`; open markers where `collapsed`. `before` and `chance`, by panel: the model with
    nothing deleted, as a grey line, and a dotted line. Lines of `muted`, the controls, are grey and broken.
    """
    panels, hues = (list(dict.fromkeys(table[name])) for name in (column, hue))
    coloured = [name for name in hues if name not in muted]
    figure, axes = canvas(len(panels), width=3.3, height=2.9, squeeze=False, sharey=True)
    for ax, panel in zip(axes[0], panels):
        for name in hues:
            line = table[(table[column] == panel) & (table[hue] == name)].sort_values(x)
            colour = "0.45" if name in muted else COLOURS[coloured.index(name) % len(COLOURS)]
            lost = line["collapsed"].to_numpy(bool) if "collapsed" in line else np.zeros(len(line), bool)
            ax.plot(line[x], line["value"], color=colour, linestyle=MUTED[muted.index(name) % len(MUTED)] if name in muted else "-", linewidth=1.5, label=str(name))
            ax.scatter(line[x], line["value"], s=22, edgecolors=[colour], facecolors=["white" if c else colour for c in lost], zorder=3)
            if "low" in line:
                ax.fill_between(line[x], *ends(line, shares=True).to_numpy().T, color=colour, alpha=0.12, linewidth=0)
        for levels, style in ((before, {"color": "0.55"}), (chance, {"color": "0.45", "linestyle": ":"})):
            if levels and panel in levels:
                ax.axhline(levels[panel], linewidth=1.2, zorder=1, label="nothing deleted" if levels is before else "chance", **style)
        ax.set(xscale="log", ylim=(-0.03, 1.06), xlabel=xlabel, title=str(panel))
        ax.set_xticks(sorted(table[x].unique()))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.tick_params(axis="x", rotation=40, labelsize=8)
    named = {label: handle for ax in axes[0] for handle, label in zip(*ax.get_legend_handles_labels())}
    if "collapsed" in table and table["collapsed"].any():
        named["collapsed"] = axes[0][0].scatter([], [], s=22, edgecolors="0.3", facecolors="white")
    figure.legend(named.values(), named.keys(), loc="outside right center", fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=STYLE["axes.titlesize"])
    return figure


def norm_growth(table: pd.DataFrame, start: float, title: str = "") -> Figure:
    """Norms over edits in sequence, from columns `change` (of each update) and `weight` (of the matrix after it).

    `start`: the norm of the unedited matrix. The dotted line is where it would be if all updates were at right angles to
    each other and to the matrix, as a random walk is.
    """
    edits = np.arange(1, len(table) + 1)
    figure, (left, right) = canvas(2, width=4.2, height=3)
    left.plot(edits, table["change"], "o", markersize=3, color=PALETTE[0])
    left.set(xlabel="edit", ylabel="norm of its update", ylim=(0, None), title="Updates")
    right.plot(np.append(0, edits), np.append(start, table["weight"]), color=PALETTE[0], label="measured")
    walk = np.sqrt(start**2 + np.append(0, (table["change"] ** 2).cumsum()))
    right.plot(np.append(0, edits), walk, color="0.4", linestyle=":", label="random walk")
    right.set(xlabel="edits made", ylabel="norm of the matrix", ylim=(0, None), title="Matrix")
    right.legend()
    figure.suptitle(title, x=0.01, ha="left", fontsize=STYLE["axes.titlesize"])
    return figure
