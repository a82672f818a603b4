"""What an edit takes, by part."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from helpers.plots.style import PALETTE, canvas

GIB = 2**30


def memory_bars(parts: Mapping[str, Mapping[str, int]], room: int | None = None, title: str = "") -> Figure:
    """One stacked bar a choice: name → part → bytes, as `memory.Estimate.parts`. `room`: bytes that are free, as a line."""
    most = max(sum(sizes.values()) for sizes in parts.values())
    unit, name = (GIB, "GiB") if most >= GIB else (2**20, "MiB")
    figure, ax = canvas(width=7.5, height=1.1 + 0.36 * len(parts))
    for i, part in enumerate(dict.fromkeys(part for sizes in parts.values() for part in sizes)):
        left = [sum(list(sizes.values())[:i]) / unit for sizes in parts.values()]
        ax.barh(range(len(parts)), [sizes[part] / unit for sizes in parts.values()], left=left, height=0.7, color=PALETTE[i], label=part)
    if room is not None and room < 2 * most:
        ax.axvline(room / unit, color="0.2", linestyle="--", linewidth=1.2)
        ax.annotate(" free", (room / unit, len(parts) - 0.5), fontsize=8, color="0.2", va="bottom")
    ax.set_yticks(range(len(parts)), list(parts))
    ax.invert_yaxis()
    ax.set(xlabel=f"{name} (estimated)", title=title)
    ax.grid(axis="y", visible=False)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), fontsize=8)
    return figure
