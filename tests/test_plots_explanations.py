"""Start layers and slopes: what is drawn is what the tables say, lookup layers are shaded, and what collapsed is marked."""

import pandas as pd
import pytest

from helpers import plots

CURVES = pd.DataFrame([{"model": model, "label": label, "start": start, "value": 0.9 - start / 10 - shift, "low": 0.1, "high": 0.95,
                        "collapsed": start == 2}
                       for model, shift in (("one", 0.0), ("two", 0.05)) for label in ("MCQ", "relearned") for start in (2, 0, 1)])
FITS = [("lookup", "ignored"), ("lookup", "curved"), ("depth", "straight"), ("lookup - depth", "straight")]
SLOPES = pd.DataFrame([{"label": label, "explanation": name, "rival": rival, "value": k / 10 + shift,
                        "low": k / 10 - 0.1, "high": k / 10 + 0.2, "windows_low": k / 10 - 0.3, "windows_high": k / 10 + 0.4}
                       for label, shift in (("MCQ", 0.0), ("relearned", 0.5)) for k, (name, rival) in enumerate(FITS)])


def segments(collection):
    return [segment.tolist() for segment in collection.get_segments()]


def test_windows_are_drawn_by_their_first_layer_and_collapse_is_open():
    figure = plots.start_layers(CURVES, {"one": [1, 2]}, {"MCQ": 0.25})
    assert [ax.get_title() for ax in figure.axes] == ["one", "two", "", ""]
    for ax, shift in zip(figure.axes, (0.0, 0.05, 0.0, 0.05)):
        drawn = ax.lines[0]
        assert drawn.get_xdata().tolist() == [0, 1, 2]
        assert drawn.get_ydata().tolist() == pytest.approx([0.9 - shift, 0.8 - shift, 0.7 - shift])
        bars, dots = ax.collections
        assert segments(bars) == [[[x, 0.1], [x, 0.95]] for x in (0, 1, 2)]
        faces = [tuple(face) for face in dots.get_facecolors()]
        assert faces[2] == (1, 1, 1, 1) != faces[0] == faces[1]


def test_lookup_layers_of_this_model_are_shaded_and_levels_drawn():
    figure = plots.start_layers(CURVES, {"one": [1, 2]}, {"MCQ": 0.25})
    shaded = [[(patch.get_x(), patch.get_width()) for patch in ax.patches] for ax in figure.axes]
    assert shaded[0] == shaded[2] == [(0.5, 1.0), (1.5, 1.0)] and shaded[1] == shaded[3] == []
    levels = [{line.get_label(): line.get_ydata()[0] for line in ax.lines[1:]} for ax in figure.axes]
    assert levels[0] == levels[1] == {"chance": 0.25, "ceiling": 1.0} and levels[2] == levels[3] == {"ceiling": 1.0}


def test_slopes_and_both_intervals_are_those_of_the_table():
    figure = plots.slope_forest(SLOPES)
    assert [ax.get_title() for ax in figure.axes] == ["MCQ", "relearned"]
    for ax, shift in zip(figure.axes, (0.0, 0.5)):
        thin, thick, dots = ax.collections
        for bars, low, high in ((thin, -0.3, 0.4), (thick, -0.1, 0.2)):
            expected = [k / 10 + end for k in range(4) for end in (low, high)]
            assert [x for segment in segments(bars) for x, _ in segment] == pytest.approx(expected)
        assert dots.get_offsets()[:, 0].tolist() == pytest.approx([k / 10 + shift for k in range(4)])
        assert ax.lines[0].get_xdata()[0] == 0 and ax.yaxis_inverted()
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert names == ["lookup, rival ignored", "lookup, beside the rival and its square", "depth, beside the rival",
                     "lookup - depth, both fitted"]


def test_a_fit_that_a_measure_lacks_leaves_its_line_empty():
    figure = plots.slope_forest(SLOPES.drop(index=SLOPES[(SLOPES["label"] == "relearned") & (SLOPES["explanation"] == "depth")].index))
    assert pd.isna(figure.axes[1].collections[2].get_offsets().filled(float("nan"))[2, 0])
    assert not pd.isna(figure.axes[0].collections[2].get_offsets().filled(float("nan"))[2, 0])


def test_an_unbounded_interval_over_windows_does_not_hide_the_others():
    wild = SLOPES.assign(windows_high=SLOPES["windows_high"].where(SLOPES["rival"] != "ignored", 500.0))
    for figure, width in ((plots.slope_forest(SLOPES), 1.0), (plots.slope_forest(wild), 4.0)):
        low, high = figure.axes[0].get_xlim()
        assert low == -high and 0.5 * width < high < 3 * width
    assert max(x for segment in segments(figure.axes[0].collections[0]) for x, _ in segment) == 500  # cut by the panel, not changed
