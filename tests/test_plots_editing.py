"""Figures of edits draw the numbers they are given, and mark what collapsed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from helpers import plots
from helpers.plots import style

TABLE = pd.DataFrame([{"mask": mask, "measure": measure, "format": measure, "value": value, "low": value - 0.1, "high": value + 0.1, "collapsed": mask == "b"}
                      for mask, values in {"a": (0.2, 0.5, 0.8), "b": (0.9, 0.1, 0.4)}.items() for measure, value in zip("xyz", values)])


def labels(ax) -> list[str]:
    return ax.get_legend_handles_labels()[1]


def test_a_spider_closes_its_lines_and_breaks_that_of_a_collapsed_edit():
    ax = plots.spider(TABLE).axes[0]
    whole, lost = ax.lines
    assert whole.get_ydata() == pytest.approx([0.2, 0.5, 0.8, 0.2]) and lost.get_ydata() == pytest.approx([0.9, 0.1, 0.4, 0.9])
    assert (whole.get_linestyle(), lost.get_linestyle()) == ("-", "--") and labels(ax) == ["a", "b (collapsed)"]
    spans = [segment[:, 1] for part in ax.collections for segment in part.get_segments()]
    assert np.diff(spans).ravel() == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.2, 0.2]) and np.max(spans) <= 1
    with pytest.raises(ValueError, match="three measures or more, not x, y"):
        plots.spider(TABLE[TABLE["measure"] != "z"])


def test_formats_that_an_edit_broke_stand_in_the_legend():
    broken = TABLE.assign(broken=TABLE["mask"].map({"a": "league, venue", "b": ""}))
    for figure in (plots.spider(broken), plots.estimates(broken)):
        assert labels(figure.axes[0]) == ["a\nbroke league, venue", "b (collapsed)"]


def test_a_place_has_the_same_colour_in_every_figure():
    colour = lambda figure: {line.get_label().removesuffix(" (collapsed)"): line.get_color() for line in figure.axes[0].lines}
    two = TABLE.replace({"mask": {"a": "everything", "b": "lookup"}})
    three = pd.concat([TABLE[TABLE["mask"] == "a"].assign(mask="attribution"), two[two["mask"] == "lookup"], TABLE[TABLE["mask"] == "a"]])
    first, second = colour(plots.spider(two)), colour(plots.estimates(three))
    assert first["lookup"] == second["lookup"] and len({*first.values(), *second.values()}) == 4
    many = style.colours([*style.PLACES, *map(str, range(12))])
    assert len({many[place] for place in style.PLACES}) == len(style.PLACES)


def test_estimates_put_dots_at_values_and_leave_those_of_a_collapsed_edit_open():
    ax = plots.estimates(TABLE, before=pd.Series({"x": 0.05, "y": 0.0, "z": 0.1})).axes[0]
    whole, lost = ax.lines
    assert whole.get_xdata() == pytest.approx([0.2, 0.5, 0.8]) and lost.get_xdata() == pytest.approx([0.9, 0.1, 0.4])
    assert lost.get_markerfacecolor() == "white" != whole.get_markerfacecolor()
    assert [round(y) for y in whole.get_ydata()] == [0, 1, 2] and labels(ax) == ["a", "b (collapsed)", "before"]


def test_a_tradeoff_takes_two_measures_with_their_intervals_or_two_columns():
    ax = plots.tradeoff(TABLE, "x", "z", diagonal="alike").axes[0]
    points = np.vstack([part.get_offsets() for part in ax.collections if len(part.get_offsets()) and hasattr(part, "get_sizes") and part.get_sizes().size])
    assert points.tolist() == [pytest.approx([0.2, 0.8]), pytest.approx([0.9, 0.4])]
    assert any("alike" in text.get_text() for text in ax.texts)
    wide = pd.DataFrame({"mask": ["a", "a", "b"], "p": [0.1, 0.2, 0.3], "q": [0.3, 0.2, 0.1], "step": [2, 1, 1], "best": [True, False, False]})
    ax = plots.tradeoff(wide, "p", "q", order="step", chosen="best").axes[0]
    joined = next(line for line in ax.lines if len(line.get_xdata()) == 2)
    assert joined.get_xdata().tolist() == [0.2, 0.1]
    ringed = [part.get_offsets().tolist() for part in ax.collections if part.get_sizes().tolist() == [130]]
    assert [[0.1, 0.3]] in ringed
