"""Mechanism or depth: what edits of MLP windows reach by their first layer, and the slopes of both explanations."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.plots.style import PALETTE, STYLE, canvas

SHADE = "0.88"
WIDEST = 4  # times the interval over facts and seeds
RIVALS = {"ignored": "rival ignored", "straight": "beside the rival", "curved": "beside the rival and its square"}


def start_layers(table: pd.DataFrame, lookup: Mapping[str, Sequence[int]] | None = None, chance: Mapping[str, float] | None = None,
                 title: str = "") -> Figure:
    """`value` with its interval against the first layer of the window, one panel a `model` (columns) and `label` (rows).

    `table`: from `explanations.curves`. `lookup`: layers that are shaded, by model. `chance`: a dotted line, by label; another
    is drawn at the ceiling. Windows that `collapsed` have an open marker.
    """
    models, labels = (list(dict.fromkeys(table[name])) for name in ("model", "label"))
    figure, axes = canvas(len(models), len(labels), width=3.6, height=2.5, squeeze=False, sharey=True)
    for (i, j), ax in np.ndenumerate(axes):
        part = table[(table["model"] == models[j]) & (table["label"] == labels[i])].sort_values("start")
        for layer in (lookup or {}).get(models[j], ()):
            ax.axvspan(layer - 0.5, layer + 0.5, color=SHADE, linewidth=0, zorder=0)
        ax.plot(part["start"], part["value"], color=PALETTE[0], linewidth=1.3, zorder=2)
        ax.vlines(part["start"], part["low"], part["high"], color=PALETTE[0], linewidth=1.6, alpha=0.6, zorder=2)
        faces = ["white" if lost else PALETTE[0] for lost in part["collapsed"]]
        ax.scatter(part["start"], part["value"], s=24, edgecolors=[PALETTE[0]], facecolors=faces, zorder=3)
        for level, name in ((chance or {}).get(labels[i]), "chance"), (1.0, "ceiling"):
            if level is not None:
                ax.axhline(level, color="0.45", linestyle=":", linewidth=1, label=name)
                ax.annotate(name, (0.99, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7, color="0.3")
        ax.set(title=str(models[j]) if i == 0 else "", ylim=(-0.04, 1.12))
        ax.set_xlabel("first layer of the window" if i == len(labels) - 1 else "")
        ax.set_ylabel(textwrap.fill(labels[i], 24) if j == 0 else "", fontsize=8)
        ax.set_xticks(sorted(part["start"].unique()))
        ax.tick_params(axis="x", labelsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=STYLE["axes.titlesize"])
    return figure


def slope_forest(table: pd.DataFrame, title: str = "") -> Figure:
    """Slopes with both intervals, one line an `explanation` and fit, one panel a `label`, from `explanations.by_measure`.

    The thick bar is the interval over facts and seeds (`low`, `high`), the thin one that over windows, cut off where it is much
    wider: a window that alone holds all of the lookup leaves it all but unbounded.
    """
    labels, names = (list(dict.fromkeys(table[name])) for name in ("label", "explanation"))
    lines = list(dict.fromkeys(zip(table["explanation"], table["rival"])))
    figure, axes = canvas(len(labels), width=3.9, height=0.9 + 0.34 * len(lines), squeeze=False, sharey=True)
    for ax, label in zip(axes[0], labels):
        rows = table[table["label"] == label].set_index(["explanation", "rival"]).reindex(lines)
        where, colours = np.arange(len(lines)), [PALETTE[names.index(name)] for name, _ in lines]
        reach = [rows[list(ends)].abs().max().max() for ends in (("value", "low", "high"), ("windows_low", "windows_high"))]
        limit = 1.15 * np.fmax(reach[0], np.fmin(reach[1], WIDEST * reach[0])) or 1.0
        ax.axvline(0, color="0.45", linewidth=1)
        ax.hlines(where, rows["windows_low"], rows["windows_high"], color=colours, linewidth=1.1)
        ax.hlines(where, rows["low"], rows["high"], color=colours, linewidth=4, alpha=0.5)
        ax.scatter(rows["value"], where, color=colours, s=24, zorder=3)
        ax.set(title=label, xlabel="slope (right: better)", xlim=(-limit, limit), ylim=(len(lines) - 0.5, -0.5))
        ax.set_yticks(where, [f"{name}, {'both fitted' if ' - ' in name else RIVALS[rival]}" for name, rival in lines], fontsize=8)
        ax.grid(axis="y", visible=False)
    axes[0][0].plot([], [], color="0.4", linewidth=4, alpha=0.5, label="over facts and seeds")
    axes[0][0].plot([], [], color="0.4", linewidth=1.1, label="over windows")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=STYLE["axes.titlesize"])
    return figure
