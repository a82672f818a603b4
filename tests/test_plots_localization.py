"""Localization figures: positions keep name and colour, coinciding lines differ, the circuit has a key, a bar of 0 is written."""

from types import SimpleNamespace

import pandas as pd
import pytest

from helpers import plots


def test_a_position_has_one_name_and_colour_in_every_figure():
    lens = pd.DataFrame({"position": ["last", "subject last"], "layer": [0, 0], "p": [0.1, 0.2]})
    probe = pd.DataFrame({"position": ["name", "last"], "layer": [0, 0], "accuracy": [0.1, 0.2], "chance": [0.3, 0.3]})
    drawn = [{line.get_label(): line.get_color() for line in figure.axes[0].lines[:2]}
             for figure in (plots.layer_lines(lens, "p", "position", "p"), plots.probe_lines(probe))]
    assert drawn[0] == drawn[1] and set(drawn[0]) == {"name's last token", "last position"}


def test_other_lines_go_by_their_number():
    table = pd.DataFrame({"kind": ["a", "b"], "layer": [0, 0], "p": [0.1, 0.2]})
    lines = plots.layer_lines(table, "p", "kind", "p", xlabel="block").axes[0].lines
    assert [line.get_label() for line in lines] == ["a", "b"] and lines[0].get_color() != lines[1].get_color()
    assert lines[0].axes.get_xlabel() == "block"


def test_random_rankings_are_a_band_and_lines_that_coincide_differ():
    table = pd.DataFrame([{"ranking": name, "share": share, "kept": kept} for name, top in
                          (("one", 0.5), ("two", 0.5), ("random 0", 0.2), ("random 1", 0.8)) for share, kept in ((0.0, 1.0), (0.5, top), (1.0, 0.0))])
    ax = plots.faithfulness_lines(table).axes[0]
    lines = {line.get_label(): line for line in ax.lines}
    assert {"one", "two", "their median"} <= set(lines)
    assert lines["one"].get_linestyle() != lines["two"].get_linestyle() and lines["one"].get_zorder() < lines["two"].get_zorder()
    assert lines["their median"].get_ydata().tolist() == pytest.approx([1.0, 0.5, 0.0])
    assert ax.collections[0].get_label() == "95 % of 2 random rankings"


def test_the_circuit_says_what_colour_and_width_mean():
    lookup = SimpleNamespace(layers=(0,), heads=("head 1.0", "head 2.1"))
    figure = plots.circuit(lookup, pd.Series([0.4, 0.0, -0.1]), pd.Series({"head 1.0": 0.2, "head 2.1": -0.1}))
    key = [text.get_text() for text in figure.legends[0].get_texts()]
    assert key[0] == "MLP chosen by the rule" and "head with a score of 0.20" in key and "head with a negative score" in key
    assert figure.axes[1].get_ylabel() and figure.axes[1].get_ylim() == pytest.approx((0, 0.4))


def test_bars_write_their_value_and_formats_have_their_own_chance():
    table = pd.DataFrame({"format": ["one", "two"], "group": "mine", "accuracy": [0.0, 0.5], "chance": [0.25, 0.33]})
    ax = plots.format_bars(table, values=True, xlabel="share").axes[0]
    assert [text.get_text() for text in ax.texts] == ["0.00", "0.50"] and ax.get_xlabel() == "share"
    assert [segment.get_segments()[0][0][0] for segment in ax.collections] == [0.25, 0.33]
