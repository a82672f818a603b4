"""Lines by layer and bars by format."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.plots.style import PALETTE, STREAM, canvas, position, reference


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
        rows, (label, colour) = rows.sort_values("layer"), position(str(label), i)
        ax.plot(rows["layer"], rows["accuracy"], marker="o", markersize=4, color=colour, label=label)
        if "low" in rows:
            ax.fill_between(rows["layer"], rows["low"], rows["high"], color=colour, alpha=0.18, linewidth=0)
    level = chance if chance is not None else table["chance"].mean()
    reference(ax, level)
    ax.set(xlabel=STREAM, ylabel="accuracy on held-out subjects", ylim=(0, 1.04), title=title)
    figure.legend(loc="outside lower center", ncols=min(3, table[hue].nunique()))  # inside it would hide lines or the chance level
    return figure


def layer_lines(table: pd.DataFrame, value: str, hue: str, ylabel: str, title: str = "", chance: float | None = None, zero: bool = False,
                xlabel: str = "layer") -> Figure:
    """``value`` against layer, one line per ``hue``; bands where columns ``low`` and ``high`` exist. ``xlabel`` says how layers are counted."""
    figure, ax = canvas(width=6)
    for i, (label, rows) in enumerate(table.groupby(hue, sort=False)):
        rows, (label, colour) = rows.sort_values("layer"), position(str(label), i)
        ax.plot(rows["layer"], rows[value], marker="o", markersize=4, color=colour, label=label)
        if "low" in rows:
            ax.fill_between(rows["layer"], rows["low"], rows["high"], color=colour, alpha=0.18, linewidth=0)
    if chance is not None:
        reference(ax, chance)
    if zero:
        ax.axhline(0, color="0.45", linewidth=0.8)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    figure.legend(loc="outside lower center", ncols=min(2, table[hue].nunique()))  # lines may run anywhere
    return figure


def format_bars(table: pd.DataFrame, chance: float | None = None, gate: float | None = None, title: str = "", xlabel: str = "top-1 accuracy",
                values: bool = False) -> Figure:
    """Horizontal bars of accuracy by format, one colour per value of ``group`` (columns format, accuracy, group).

    A column ``chance`` gives each format a level of its own. ``values`` writes each number beside its bar, so that a bar of 0 is seen to be one.
    """
    formats = list(dict.fromkeys(table["format"]))
    groups = list(dict.fromkeys(table["group"]))
    figure, ax = canvas(width=6.5, height=0.6 + 0.32 * len(formats) * max(1, 0.6 * len(groups)))
    thickness = 0.8 / len(groups)
    for i, group in enumerate(groups):
        rows = table[table["group"] == group].set_index("format").reindex(formats)
        where = np.arange(len(formats)) + (i - (len(groups) - 1) / 2) * thickness
        ax.barh(where, rows["accuracy"], height=thickness, color=PALETTE[i], label=group)
        for y, value in zip(where, rows["accuracy"] if values else []):
            if not np.isnan(value):
                ax.annotate(f"{value:.2f}", (value, y), xytext=(2, 0), textcoords="offset points", ha="left", va="center", fontsize=7)
    if "chance" in table:
        for y, level in enumerate(table.drop_duplicates("format")["chance"]):
            ax.vlines(level, y - 0.5, y + 0.5, color="0.3", linestyle=":", linewidth=1.4, label="chance" if y == 0 else None)
    ax.set_yticks(range(len(formats)), formats)
    ax.invert_yaxis()
    ax.set(xlim=(0, 1.1 if values else 1.02), xlabel=xlabel, title=title)
    for level, label in ((chance, "chance"), (gate, "gate")):
        if level is not None:
            ax.axvline(level, color="0.3", linestyle=":" if label == "chance" else "--", linewidth=1.2)
            ax.annotate(f"{label} {level:.2f} ", (level, len(formats) - 0.45), ha="right", va="top", fontsize=8, color="0.3")
    ax.grid(axis="y", visible=False)
    if len(groups) > 1 or "chance" in table:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure
