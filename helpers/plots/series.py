"""Lines by layer and bars by format."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.plots.style import PALETTE, STREAM, canvas, colours, lengths, position, reference


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


def format_bars(table: pd.DataFrame, chance: float | Mapping[str, float] | None = None, gate: float | None = None, title: str = "",
                xlabel: str = "top-1 accuracy", values: bool = False) -> Figure:
    """Horizontal bars of accuracy by format, one colour per value of ``group`` (columns format, accuracy, group).

    Columns that may be there: ``low`` and ``high`` (error bars), ``kept`` (accuracy on retained facts, an open circle), ``chance`` (a level for
    each format), ``broken`` (hatched where true). ``chance``: of all formats, or by format. ``values`` writes each number beside its bar, so
    that a bar of 0 is seen to be one.
    """
    formats, groups = (list(dict.fromkeys(table[name])) for name in ("format", "group"))
    figure, ax = canvas(width=6.5, height=0.6 + 0.32 * len(formats) * max(1, 0.6 * len(groups)))
    thickness, places, coloured = 0.8 / len(groups), np.arange(len(formats)), colours(groups)
    for i, group in enumerate(groups):
        rows = table[table["group"] == group].set_index("format").reindex(formats)
        where = places + (i - (len(groups) - 1) / 2) * thickness
        errors = {"xerr": lengths(rows["accuracy"], rows), "error_kw": {"elinewidth": 1, "ecolor": "0.25"}} if "low" in rows else {}
        bars = ax.barh(where, rows["accuracy"], height=thickness, color=coloured[str(group)], label=group, **errors)
        if "kept" in rows:
            ax.plot(rows["kept"], where, "o", markersize=4, markerfacecolor="white", color=coloured[str(group)], clip_on=False, zorder=3)
        for y, value in zip(where, rows["accuracy"].to_numpy() if values else ()):
            if not np.isnan(value):
                ax.annotate(f"{value:.2f}", (value, y), xytext=(2, 0), textcoords="offset points", ha="left", va="center", fontsize=7)
        for bar, broken in zip(bars, rows["broken"].fillna(False) if "broken" in rows else ()):
            bar.set(hatch="////" if broken else None, edgecolor="white" if broken else "none", linewidth=0)
    ax.set_yticks(places, formats)
    ax.invert_yaxis()
    ax.set(xlim=(0, 1.1 if values else 1.02), xlabel=xlabel, title=title)
    if "kept" in table:
        ax.plot([], [], "o", markersize=4, markerfacecolor="white", color="0.3", label="retained facts")
    if "chance" in table:
        chance = table.groupby("format")["chance"].first().to_dict()
    by_format = isinstance(chance, Mapping)
    if by_format:
        levels = [(place, chance[name]) for place, name in enumerate(formats) if pd.notna(chance.get(name))]
        for i, (place, level) in enumerate(levels):
            ax.vlines(level, place - 0.45, place + 0.45, color="black", linestyle=":", linewidth=1.3, label="" if i else "chance")
    for level, label in ((None if by_format else chance, "chance"), (gate, "gate")):
        if level is not None:
            ax.axvline(level, color="0.3", linestyle=":" if label == "chance" else "--", linewidth=1.2)
            ax.annotate(f"{label} {level:.2f} ", (level, len(formats) - 0.45), ha="right", va="top", fontsize=8, color="0.3")
    if "broken" in table and table["broken"].fillna(False).astype(bool).any():
        ax.bar(np.nan, np.nan, color="0.6", hatch="////", edgecolor="white", linewidth=0, label="broken for retained facts")
    ax.grid(axis="y", visible=False)
    if len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure
