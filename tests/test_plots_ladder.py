"""Ladders and norms: what is drawn is what the table says, and what collapsed is marked."""

import numpy as np
import pandas as pd
import pytest

from helpers import plots

RUNGS = pd.DataFrame([{"mask": mask, "measure": measure, "deleted": n, "value": value - n / 1e4, "low": 0.0, "high": 1.0, "collapsed": n == 1000}
                      for mask, value in (("learned", 0.9), ("random", 0.5)) for measure in ("forgotten", "retained") for n in (1000, 10, 100)])


def test_rungs_are_drawn_in_order_and_collapse_is_open():
    figure = plots.ladder(RUNGS, before={"retained": 0.95}, chance={"forgotten": 0.25}, muted=("random",))
    assert [ax.get_title() for ax in figure.axes] == ["forgotten", "retained"]
    for ax in figure.axes:
        drawn = {line.get_label(): line for line in ax.lines}
        assert drawn["learned"].get_xdata().tolist() == [10, 100, 1000] and ax.get_xscale() == "log"
        assert drawn["learned"].get_ydata().tolist() == pytest.approx([0.899, 0.89, 0.8])
        assert drawn["random"].get_linestyle() != "-" == drawn["learned"].get_linestyle()
        faces = [tuple(face) for face in ax.collections[0].get_facecolors()]
        assert faces[2] == (1, 1, 1, 1) != faces[0] == faces[1]
    levels = [{line.get_label(): line.get_ydata()[0] for line in ax.lines} for ax in figure.axes]
    assert levels[0]["chance"] == 0.25 and "chance" not in levels[1] and levels[1]["nothing deleted"] == 0.95
    assert "collapsed" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_updates_at_right_angles_grow_as_the_random_walk():
    change = pd.Series([3.0, 4.0, 12.0])
    table = pd.DataFrame({"change": change, "weight": np.sqrt(1 + (change**2).cumsum())})
    left, right = plots.norm_growth(table, 1.0).axes
    assert left.lines[0].get_ydata().tolist() == change.tolist()
    measured, walk = (line.get_ydata() for line in right.lines)
    assert measured[0] == 1 and walk.tolist() == pytest.approx(measured.tolist()) and measured[-1] == pytest.approx(170**0.5)
