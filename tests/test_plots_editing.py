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


def test_intervals_of_shares_stop_at_0_and_1_and_rows_have_their_own_chance():
    wide = TABLE.assign(low=-0.5, high=1.5)
    ax = plots.estimates(wide, chance={"x": 0.25, "z": 0.4}).axes[0]
    segments = [segment.tolist() for part in ax.collections for segment in part.get_segments() if len(segment)]
    across = [segment for segment in segments if segment[0][1] == segment[1][1]]
    assert len(across) == 6 and {x for segment in across for x, _ in segment} == {0.0, 1.0}
    upright = [segment for segment in segments if segment[0][0] == segment[1][0]]
    assert {(x, round(low + 0.42)) for (x, low), (_, high) in upright if high - low < 1} == {(0.25, 0), (0.4, 2)}
    assert any(x == 1 and high - low == 3 for (x, low), (_, high) in upright) and "chance" in labels(ax)
    beyond = plots.estimates(wide.assign(value=3 * wide["value"])).axes[0]
    assert {x for part in beyond.collections for segment in part.get_segments() for x, _ in segment} == {-0.5, 1.5}


def test_names_that_share_a_colour_differ_in_marker_and_dash():
    many = pd.concat([TABLE[TABLE["mask"] == "a"].assign(mask=f"mask {i}") for i in range(14)])
    for figure in (plots.estimates(many), plots.spider(many)):
        looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in figure.axes[0].lines}
        assert len(looks) == 14


def test_bars_by_format_have_intervals_chance_levels_and_hatches():
    bars = pd.DataFrame([{"format": format, "group": group, "accuracy": 0.9, "low": 0.7, "high": 1.2, "broken": "lost" if group == "b" else ""}
                         for format in ("cloze", "MCQ") for group in ("a", "b")])
    ax = plots.format_bars(bars, chance={"MCQ": 0.25}).axes[0]
    whole, broken = (container.patches for container in ax.containers if len(getattr(container, "patches", ())) == 2)
    assert {bar.get_hatch() for bar in whole} == {None} and {bar.get_hatch() for bar in broken} == {"////"}
    segments = [segment for part in ax.collections for segment in part.get_segments() if len(segment)]
    assert max(segment[:, 0].max() for segment in segments) == 1.0 and [0.25, 0.25] in [segment[:, 0].tolist() for segment in segments]
    assert set(labels(ax)) == {"chance", "a", "b", "broken for retained facts"}
    old = plots.format_bars(bars[["format", "group", "accuracy"]], 0.4, 0.9).axes[0]
    assert [line.get_xdata()[0] for line in old.lines] == [0.4, 0.9] and labels(old) == ["a", "b"]
