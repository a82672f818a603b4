"""What is drawn against the number of facts is what the table says, on logarithmic axes."""

import numpy as np
import pandas as pd
import pytest

from helpers import plots

SIZES = [16, 64, 256]
PANELS = [(effort, measure) for effort in ("steps", "passes") for measure in ("seconds", "norm")]
COSTS = pd.DataFrame([{"mask": mask, "effort": effort, "measure": measure, "n": n, "value": start * n, "low": start * n - 1,
                       "high": start * n + 1, "collapsed": mask == "b" and n == 256}
                      for mask, start in (("a", 1.0), ("b", 2.0)) for effort, measure in PANELS for n in reversed(SIZES)])


def lines(ax) -> dict:
    return {line.get_label(): line for line in ax.lines}


def test_costs_are_those_of_the_table_in_order_of_n():
    figure = plots.cost_lines(COSTS, row="effort", powers={"norm": 0.5})
    assert [ax.get_title() for ax in figure.axes] == ["seconds", "norm", "", ""]
    assert {ax.get_xscale() for ax in figure.axes} == {ax.get_yscale() for ax in figure.axes} == {"log"}
    for ax in figure.axes:
        drawn = lines(ax)
        for mask, start in (("a", 1.0), ("b", 2.0)):
            assert drawn[mask].get_xdata().tolist() == SIZES and drawn[mask].get_ydata().tolist() == [start * n for n in SIZES]
        assert ax.get_xticks().tolist() == SIZES
    assert ["n to the 0.5" in lines(ax) for ax in figure.axes] == [False, True, False, True]
    assert lines(figure.axes[1])["n to the 0.5"].get_ydata() == pytest.approx([24, 48, 96])  # 24 is the mean of the first points


def test_intervals_stay_above_zero_and_collapsed_points_are_open():
    wide = COSTS[COSTS["measure"] == "norm"].assign(low=-5.0, high=lambda t: t["value"] + 7)
    ax = plots.cost_lines(wide[wide["effort"] == "steps"]).axes[0]
    ends = [np.asarray(segment) for part in ax.collections if hasattr(part, "get_segments") for segment in part.get_segments()]
    assert sorted(segment[1, 1] for segment in ends) == sorted(wide.loc[wide["effort"] == "steps", "high"])
    assert {segment[0, 1] for segment in ends} == {8.0}  # half of the smallest value
    faces = [part.get_facecolors() for part in ax.collections if not hasattr(part, "get_segments") and len(part.get_offsets()) == 3]
    white = [[bool((face[:3] == 1).all()) for face in part] for part in faces]
    assert white == [[False] * 3, [False, False, True]]


@pytest.mark.parametrize("name", ["unedited", "lookup"])
def test_shares_against_n_are_drawn_by_the_ladder(name):
    table = pd.DataFrame([{"mask": mask, "measure": "mcq", "n": n, "value": v + n / 1000, "collapsed": False}
                          for mask, v in (("unedited", 0.0), ("lookup", 0.5)) for n in SIZES])
    ax = plots.ladder(table, x="n", muted=("unedited",), chance={"mcq": 0.25}).axes[0]
    expected = table[table["mask"] == name]
    assert lines(ax)[name].get_ydata().tolist() == expected["value"].tolist() and lines(ax)[name].get_xdata().tolist() == SIZES
    assert lines(ax)["chance"].get_ydata()[0] == 0.25
    assert lines(ax)["unedited"].get_linestyle() == "--" and lines(ax)["lookup"].get_linestyle() == "-"
