"""Lines by layer and bars by format."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.plots.style import PALETTE, canvas, colours, reference


def training_curve(curve: pd.DataFrame, name: str) -> Figure:
    """Training loss against tokens."""
    figure, ax = canvas(width=5.5)
    ax.plot(curve["tokens"] / 1e6, curve["loss"], color=PALETTE[0])
    ax.set(xlabel="training tokens (millions)", ylabel="loss (nats per token)", title=f"{name}: training loss", yscale="log")
    return figure


def probe_lines(table: pd.DataFrame, title: str = "", hue: str = "position", chance: float | None = None) -> Figure:
    """Probe accuracy by layer, one line per value of ``hue``; a band where a column ``low``/``high`` gives intervals."""
    figure, ax = canvas(width=6)
    for i, (label, rows) in enumerate(table.groupby(hue, sort=False)):
        rows = rows.sort_values("layer")
        ax.plot(rows["layer"], rows["accuracy"], marker="o", markersize=4, color=PALETTE[i], label=str(label))
        if "low" in rows:
            ax.fill_between(rows["layer"], rows["low"], rows["high"], color=PALETTE[i], alpha=0.18, linewidth=0)
    level = chance if chance is not None else table["chance"].mean()
    reference(ax, level)
    ax.set(xlabel="layer (0 = embeddings, l + 1 = after block l)", ylabel="accuracy on held-out subjects", ylim=(0, 1.04), title=title)
    ax.legend(title=hue)
    return figure


def layer_lines(table: pd.DataFrame, value: str, hue: str, ylabel: str, title: str = "", chance: float | None = None, zero: bool = False) -> Figure:
    """``value`` against layer, one line per ``hue``; bands where columns ``low`` and ``high`` exist."""
    figure, ax = canvas(width=6)
    for i, (label, rows) in enumerate(table.groupby(hue, sort=False)):
        rows = rows.sort_values("layer")
        ax.plot(rows["layer"], rows[value], marker="o", markersize=4, color=PALETTE[i % len(PALETTE)], label=str(label))
        if "low" in rows:
            ax.fill_between(rows["layer"], rows["low"], rows["high"], color=PALETTE[i % len(PALETTE)], alpha=0.18, linewidth=0)
    if chance is not None:
        reference(ax, chance)
    if zero:
        ax.axhline(0, color="0.45", linewidth=0.8)
    ax.set(xlabel="layer", ylabel=ylabel, title=title)
    figure.legend(loc="outside lower center", ncols=min(2, table[hue].nunique()))  # lines may run anywhere
    return figure


def format_bars(table: pd.DataFrame, chance: float | None = None, gate: float | None = None, title: str = "") -> Figure:
    """Horizontal bars of accuracy by format, one colour per value of ``group`` (columns format, accuracy, group).

    Columns that may be there: ``low`` and ``high`` (error bars), ``kept`` (accuracy on retained facts, an open circle), ``chance`` (a
    level for each format, in place of one line).
    """
    formats = list(dict.fromkeys(table["format"]))
    groups = list(dict.fromkeys(table["group"]))
    figure, ax = canvas(width=6.5, height=0.6 + 0.32 * len(formats) * max(1, 0.6 * len(groups)))
    thickness, coloured = 0.8 / len(groups), colours(groups)
    for i, group in enumerate(groups):
        rows = table[table["group"] == group].set_index("format").reindex(formats)
        where, colour = np.arange(len(formats)) + (i - (len(groups) - 1) / 2) * thickness, coloured[str(group)]
        errors = [(rows["accuracy"] - rows["low"]).clip(lower=0), (rows["high"] - rows["accuracy"]).clip(lower=0)] if "low" in rows else None
        ax.barh(where, rows["accuracy"], height=thickness, color=colour, label=group, xerr=errors, error_kw={"elinewidth": 0.9, "ecolor": "0.25"})
        if "kept" in rows:
            ax.plot(rows["kept"], where, "o", markersize=4, markerfacecolor="white", color=colour, clip_on=False, zorder=3)
    if "kept" in table:
        ax.plot([], [], "o", markersize=4, markerfacecolor="white", color="0.3", label="retained facts")
    if "chance" in table:
        levels, rows = table.groupby("format")["chance"].first().reindex(formats), np.arange(len(formats))
        ax.vlines(levels, rows - 0.45, rows + 0.45, color="0.3", linestyle=":", linewidth=1.2, label="guessing")
    ax.set_yticks(range(len(formats)), formats)
    ax.invert_yaxis()
    ax.set(xlim=(0, 1.02), xlabel="top-1 accuracy", title=title)
    for level, label in ((chance, "chance"), (gate, "gate")):
        if level is not None:
            ax.axvline(level, color="0.3", linestyle=":" if label == "chance" else "--", linewidth=1.2)
            ax.annotate(f"{label} {level:.2f} ", (level, len(formats) - 0.45), ha="right", va="top", fontsize=8, color="0.3")
    ax.grid(axis="y", visible=False)
    if len(groups) > 1 or "kept" in table:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure
