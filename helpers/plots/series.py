"""Lines by layer and bars by format."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.plots.style import PALETTE, canvas, lengths, reference


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


def format_bars(table: pd.DataFrame, chance: float | Mapping[str, float] | None = None, gate: float | None = None, title: str = "") -> Figure:
    """Horizontal bars of accuracy by format, one colour per value of ``group`` (columns format, accuracy, group).

    Error bars where there are columns ``low`` and ``high``; hatched where ``broken`` is true (or says what is). ``chance``: of all formats, or by format.
    """
    formats, groups = (list(dict.fromkeys(table[name])) for name in ("format", "group"))
    figure, ax = canvas(width=6.5, height=0.6 + 0.32 * len(formats) * max(1, 0.6 * len(groups)))
    thickness, places = 0.8 / len(groups), np.arange(len(formats))
    for i, group in enumerate(groups):
        rows = table[table["group"] == group].set_index("format").reindex(formats)
        where = places + (i - (len(groups) - 1) / 2) * thickness
        errors = {"xerr": lengths(rows["accuracy"], rows), "error_kw": {"elinewidth": 1, "ecolor": "0.25"}} if "low" in rows else {}
        bars = ax.barh(where, rows["accuracy"], height=thickness, color=PALETTE[i % len(PALETTE)], label=group, **errors)
        for bar, broken in zip(bars, rows["broken"].fillna(False) if "broken" in rows else ()):
            bar.set(hatch="////" if broken else None, edgecolor="white" if broken else "none", linewidth=0)
    ax.set_yticks(places, formats)
    ax.invert_yaxis()
    ax.set(xlim=(0, 1.02), xlabel="top-1 accuracy", title=title)
    by_format = isinstance(chance, Mapping)
    if by_format:
        ax.vlines([chance.get(name, np.nan) for name in formats], places - 0.45, places + 0.45, color="black", linestyle=":", linewidth=1.3, label="chance")
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
