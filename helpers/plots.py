"""All figures; a notebook cell calls one function and gets a matplotlib Figure back.

One style, colour-blind safe (seaborn's "colorblind" palette; blue-orange diverging maps), static.
Every function takes a tidy table and draws chance level and ceiling where accuracy is shown.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

PALETTE = sns.color_palette("colorblind")
DIVERGING = "PuOr"
STYLE = {
    "figure.dpi": 110, "savefig.dpi": 150, "font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6,
    "legend.frameon": False, "lines.linewidth": 1.8, "axes.prop_cycle": mpl.cycler(color=PALETTE),
}


def canvas(n_cols: int = 1, n_rows: int = 1, width: float = 4.6, height: float = 3.2, **options):
    """(figure, axes) in the project's style, without touching pyplot's global state."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width * n_cols, height * n_rows), layout="constrained")
        return figure, figure.subplots(n_rows, n_cols, **options)


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


def reference(ax, chance: float, ceiling: float | None = 1.0) -> None:
    """Dotted lines at chance level and ceiling, labelled."""
    ax.axhline(chance, color="0.45", linestyle=":", linewidth=1.2)
    ax.annotate(f"chance {chance:.2f}", (1, chance), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color="0.35")
    if ceiling is not None:
        ax.axhline(ceiling, color="0.45", linestyle=":", linewidth=0.8)


def format_bars(table: pd.DataFrame, chance: float | None = None, gate: float | None = None, title: str = "") -> Figure:
    """Horizontal bars of accuracy by format, one colour per value of ``group`` (columns format, accuracy, group)."""
    formats = list(dict.fromkeys(table["format"]))
    groups = list(dict.fromkeys(table["group"]))
    figure, ax = canvas(width=6.5, height=0.6 + 0.32 * len(formats) * max(1, 0.6 * len(groups)))
    thickness = 0.8 / len(groups)
    for i, group in enumerate(groups):
        rows = table[table["group"] == group].set_index("format").reindex(formats)
        where = np.arange(len(formats)) + (i - (len(groups) - 1) / 2) * thickness
        ax.barh(where, rows["accuracy"], height=thickness, color=PALETTE[i], label=group)
    ax.set_yticks(range(len(formats)), formats)
    ax.invert_yaxis()
    ax.set(xlim=(0, 1.02), xlabel="top-1 accuracy", title=title)
    for level, label in ((chance, "chance"), (gate, "gate")):
        if level is not None:
            ax.axvline(level, color="0.3", linestyle=":" if label == "chance" else "--", linewidth=1.2)
            ax.annotate(f"{label} {level:.2f}", (level, 1), xycoords=("data", "axes fraction"), ha="right", va="bottom", fontsize=8, color="0.3")
    ax.grid(axis="y", visible=False)
    if len(groups) > 1:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def layer_maps(table: pd.DataFrame, value: str, columns: str, title: str = "", limit: float | None = None, order: Sequence[str] | None = None) -> Figure:
    """Heat maps layer × position, one panel per ``columns`` value, on one diverging scale centred on 0."""
    panels = list(dict.fromkeys(table[columns]))
    positions = list(order or dict.fromkeys(table["position"]))
    limit = limit or float(table[value].abs().max())
    figure, axes = canvas(len(panels), width=0.55 * len(positions) + 1.4, height=0.26 * table["layer"].nunique() + 1.4, squeeze=False, sharey=True)
    for ax, panel in zip(axes[0], panels):
        grid = table[table[columns] == panel].pivot_table(index="layer", columns="position", values=value).reindex(columns=positions)
        image = ax.imshow(grid, origin="lower", aspect="auto", cmap=DIVERGING, vmin=-limit, vmax=limit)
        ax.set_xticks(range(len(positions)), positions, rotation=45, ha="right", fontsize=8)
        ax.set_yticks(range(len(grid)), grid.index, fontsize=8)
        ax.set_title(panel)
        ax.grid(False)
    axes[0][0].set_ylabel("layer")
    figure.colorbar(image, ax=axes[0].tolist(), shrink=0.8, label=value)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def head_map(scores: np.ndarray, title: str = "", label: str = "", limit: float | None = None) -> Figure:
    """Heat map of one score a head, layers up, heads across (n_layers, n_heads)."""
    limit = limit or float(np.abs(scores).max())
    figure, ax = canvas(width=0.5 * scores.shape[1] + 2, height=0.27 * scores.shape[0] + 1)
    image = ax.imshow(scores, origin="lower", aspect="auto", cmap=DIVERGING, vmin=-limit, vmax=limit)
    ax.set(xlabel="head", ylabel="layer", title=title)
    ax.set_xticks(range(scores.shape[1]))
    ax.set_yticks(range(scores.shape[0]))
    ax.grid(False)
    figure.colorbar(image, ax=ax, label=label, shrink=0.85)
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
    ax.legend(title=hue)
    return figure
