"""Localization: maps over layers, heads and positions, what was chosen, and how far to trust it."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from helpers.plots.style import DIVERGING, PALETTE, SEQUENTIAL, canvas, position


def layer_maps(table: pd.DataFrame, value: str, columns: str, title: str = "", limit: float | None = None, order: Sequence[str] | None = None,
               ylabel: str = "layer") -> Figure:
    """Heat maps layer × position, one panel per ``columns`` value, on one scale: diverging around 0, from 0 up where no value is negative."""
    panels = list(dict.fromkeys(table[columns]))
    positions = list(order or dict.fromkeys(table["position"]))
    signed = (table[value] < 0).any()
    limit = limit or float(table[value].abs().max())
    scale = {"cmap": DIVERGING if signed else SEQUENTIAL, "vmin": -limit if signed else 0, "vmax": limit}
    figure, axes = canvas(len(panels), width=0.34 * len(positions) + 0.9, height=0.24 * table["layer"].nunique() + 1.5, squeeze=False, sharey=True)
    for ax, panel in zip(axes[0], panels):
        grid = table[table[columns] == panel].pivot_table(index="layer", columns="position", values=value).reindex(columns=positions)
        image = ax.imshow(grid, origin="lower", aspect="auto", **scale)
        ax.set_xticks(range(len(positions)), [position(name)[0] for name in positions], rotation=45, ha="right", fontsize=8)
        ax.set_yticks(range(len(grid)), grid.index, fontsize=8)
        ax.set_title(panel)
        ax.grid(False)
    axes[0][0].set_ylabel(ylabel)
    figure.colorbar(image, ax=axes[0].tolist(), shrink=0.8, label=value)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def head_map(scores: np.ndarray, title: str = "", label: str = "", limit: float | None = None) -> Figure:
    """Heat map of one score a head, layers up, heads across (n_layers, n_heads)."""
    limit = limit or float(np.abs(scores).max())
    figure, ax = canvas(width=0.5 * scores.shape[1] + 2, height=0.27 * scores.shape[0] + 1)
    image = ax.imshow(scores, origin="lower", aspect="auto", cmap=DIVERGING, vmin=-limit, vmax=limit)
    ax.set(xlabel="head", ylabel="block", title=title)
    ax.set_xticks(range(scores.shape[1]))
    ax.set_yticks(range(scores.shape[0]))
    ax.grid(False)
    figure.colorbar(image, ax=ax, label=label, shrink=0.85)
    return figure


def circuit(lookup, mlp_scores: pd.Series, head_scores: pd.Series, title: str = "") -> Figure:
    """The circuit as one picture: MLPs at the name, heads at the last position, blocks upwards, and a key below.

    ``lookup`` is a `fact_lookup.Lookup`, whose MLPs are outlined; ``mlp_scores`` (by layer) shades the name's MLPs, ``head_scores`` (by
    ``head l.h``) sets the width of the arrows by which the chosen extraction heads fetch the fact.
    """
    n_layers = len(mlp_scores)
    figure, ax = canvas(width=6.4, height=0.36 * n_layers + 2)
    shades = mpl.colors.LinearSegmentedColormap.from_list("effect", ["white", PALETTE[0]])
    shade = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, max(mlp_scores.max(), 1e-9)), shades)
    for layer in range(n_layers):
        chosen = layer in lookup.layers
        ax.add_patch(mpl.patches.FancyBboxPatch((0.02, layer - 0.32), 0.24, 0.64, boxstyle="round,pad=0.01", linewidth=2.2 if chosen else 0.8,
                                                edgecolor=PALETTE[3] if chosen else "0.6", facecolor=shade.to_rgba(max(float(mlp_scores.iloc[layer]), 0))))
        ax.text(0.14, layer, f"MLP {layer}", ha="center", va="center", fontsize=8)
    heads = head_scores.reindex(lookup.heads)
    widest = heads.abs().max()
    width = lambda score: 0.5 + 4 * abs(score) / widest
    for layer in sorted({int(h.split()[1].split(".")[0]) for h in lookup.heads}):
        here = heads[[h for h in lookup.heads if h.startswith(f"head {layer}.")]]
        for i, (name, score) in enumerate(here.items()):
            y = layer + (i - (len(here) - 1) / 2) * 0.3
            colour = PALETTE[1] if score >= 0 else PALETTE[2]
            ax.annotate("", (0.74, y), (0.27, layer - 0.5), arrowprops={"arrowstyle": "-|>", "color": colour, "alpha": 0.75, "linewidth": width(score)})
            ax.text(0.75, y, f"{name} ({score:+.2f})", ha="left", va="center", fontsize=8)
    ax.set(xlim=(0, 1), ylim=(-0.7, n_layers - 0.2), ylabel="block", title=title)
    ax.set_xticks([0.14, 0.82], ["name", "last position"])
    ax.set_yticks(range(n_layers))
    ax.grid(False)
    figure.colorbar(shade, ax=ax, shrink=0.6, label="MLP: score when it alone is patched at the name")
    key = [mpl.patches.Patch(facecolor="white", edgecolor=PALETTE[3], linewidth=2.2, label="MLP chosen by the rule")]
    key += [mpl.lines.Line2D([], [], color=PALETTE[1], linewidth=width(score), label=f"head with a score of {score:.2f}") for score in (widest, widest / 4)]
    if (heads < 0).any():
        key.append(mpl.lines.Line2D([], [], color=PALETTE[2], label="head with a negative score"))
    figure.legend(handles=key, loc="outside lower center", ncols=2, fontsize=8)
    return figure


def score_map(table: pd.DataFrame, outlined: Sequence[int] = (), title: str = "") -> Figure:
    """|score| by method (rows) and layer, attention and MLPs side by side; each method scaled to its largest score.

    ``table``: columns method, component (`attn l`, `mlp l`), score. ``outlined``: MLP layers to frame.
    """
    methods = list(dict.fromkeys(table["method"]))
    table = table.assign(kind=table["component"].str.split().str[0], layer=table["component"].str.split().str[1].astype(int), size=table["score"].abs())
    table["size"] /= table.groupby("method")["size"].transform("max")
    n_layers = table["layer"].max() + 1
    figure, axes = canvas(2, width=0.3 * n_layers + 1.2, height=0.36 * len(methods) + 1.2, sharey=True)
    for ax, (kind, name) in zip(axes, (("attn", "attention"), ("mlp", "MLP"))):
        grid = table[table["kind"] == kind].pivot(index="method", columns="layer", values="size").reindex(methods)
        image = ax.imshow(grid, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
        ax.set(title=name, xlabel="layer")
        ax.set_xticks(range(n_layers), range(n_layers), fontsize=8)
        ax.set_yticks(range(len(methods)), methods)
        ax.grid(False)
    for layer in outlined:
        axes[1].add_patch(mpl.patches.Rectangle((layer - 0.5, -0.5), 1, len(methods), fill=False, edgecolor=PALETTE[3], linewidth=1.6))
    figure.colorbar(image, ax=axes.tolist(), shrink=0.8, label="|score| / largest")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def chosen_map(choices: dict[str, Sequence[str]], n_layers: int, title: str = "") -> Figure:
    """Which attention blocks (upper half of a cell) and MLPs (lower half) each choice takes, by layer; single matrices are paler."""
    figure, ax = canvas(width=0.36 * n_layers + 3, height=0.3 * len(choices) + 1.1)
    for row, units in enumerate(choices.values()):
        for unit in units:
            kind, layer = unit.split()[0], int(unit.split()[1].split(".")[0])
            attention = kind in ("attn", "head", "q", "k", "v", "o")
            whole = kind in ("attn", "mlp")
            ax.add_patch(mpl.patches.Rectangle((layer - 0.45, row - 0.42 if attention else row + 0.02), 0.9, 0.4, linewidth=0,
                                               facecolor=PALETTE[1] if attention else PALETTE[0], alpha=0.95 if whole else 0.35))
    for name, colour in (("attention", PALETTE[1]), ("MLP", PALETTE[0])):
        ax.plot([], [], "s", color=colour, label=name)
    ax.set(xlim=(-0.6, n_layers - 0.4), ylim=(len(choices) - 0.4, -0.6), xlabel="layer", title=title)
    ax.set_xticks(range(n_layers))
    ax.set_yticks(range(len(choices)), list(choices))
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1))
    return figure


def stability_dots(table: pd.DataFrame, title: str = "") -> Figure:
    """Jaccard overlap under resampling: mean and 95 % range by method (columns method, jaccard)."""
    groups = table.groupby("method", sort=False)["jaccard"]
    middle, low, high = groups.mean(), groups.quantile(0.025), groups.quantile(0.975)
    figure, ax = canvas(width=6, height=0.36 * len(middle) + 1)
    ax.hlines(range(len(middle)), low, high, color=PALETTE[0], linewidth=2.5, alpha=0.5)
    ax.plot(middle, range(len(middle)), "o", color=PALETTE[0])
    ax.set_yticks(range(len(middle)), middle.index)
    ax.set(xlim=(0, 1.03), xlabel="Jaccard overlap", title=title)
    ax.invert_yaxis()
    return figure


def agreement_map(table: pd.DataFrame, title: str = "") -> Figure:
    """Symmetric heat map of rank correlations (columns a, b, spearman)."""
    names = list(dict.fromkeys([*table["a"], *table["b"]]))
    grid = pd.DataFrame(np.eye(len(names)), names, names)
    for _, row in table.iterrows():
        grid.loc[row["a"], row["b"]] = grid.loc[row["b"], row["a"]] = row["spearman"]
    figure, ax = canvas(width=0.62 * len(names) + 2, height=0.42 * len(names) + 1.4)
    sns.heatmap(grid, annot=True, fmt=".2f", cmap=DIVERGING, vmin=-1, vmax=1, ax=ax, cbar=False, annot_kws={"fontsize": 8})
    ax.set_title(title)
    ax.tick_params(axis="x", rotation=40)
    return figure


def faithfulness_lines(table: pd.DataFrame, title: str = "") -> Figure:
    """Share of the logit difference kept against the share of components replaced; of random rankings the median and the middle 95 %.

    Lines of three patterns, the broken ones on top, so that those which coincide stay visible.
    """
    figure, ax = canvas(width=6.2, height=3.6)
    random = table["ranking"].str.startswith("random")
    if random.any():
        drawn = table[random].groupby("share")["kept"]
        ax.fill_between(drawn.median().index, drawn.quantile(0.025), drawn.quantile(0.975), color="0.85", linewidth=0,
                        label=f"95 % of {table[random]['ranking'].nunique()} random rankings")
        ax.plot(drawn.median(), color="0.6", linewidth=1, label="their median")
    for i, (name, rows) in enumerate(table[~random].groupby("ranking", sort=False)):
        ax.plot(rows["share"], rows["kept"], marker="o", markersize=3.5, color=PALETTE[i % len(PALETTE)], linestyle=("-", "--", ":")[i % 3],
                zorder=3 + i % 3, label=name)
    ax.axhline(0, color="0.45", linewidth=0.8)
    ax.set(xlabel="share of attention blocks and MLPs replaced", ylabel="logit difference kept", title=title)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8)
    return figure
