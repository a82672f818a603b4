"""Figures of attacks: what is drawn is what the table says, with chance level and ceiling, and an empty table is no error."""

import pandas as pd
import pytest

from helpers import plots

DOSES = pd.DataFrame([{"mask": mask, "curve": curve, "step": step, "value": value + step / 100, "facts_low": 0.0, "facts_high": 1.0}
                      for mask, value in (("lookup", 0.1), ("all MLPs", 0.5)) for curve in ("forgotten", "invented") for step in (20, 0, 10)])


def level(ax) -> set[float]:
    return {float(line.get_ydata()[0]) for line in ax.lines if line.get_linestyle() == ":" and len(set(line.get_ydata())) == 1}


def test_lines_are_those_of_the_table_in_order_of_the_dose():
    figure = plots.line_panels(DOSES, "step", "curve", "mask", muted=("invented",), chance=0.4)
    assert [ax.get_title() for ax in figure.axes] == ["lookup", "all MLPs"]
    for ax, start in zip(figure.axes, (0.1, 0.5)):
        drawn = {line.get_label(): line for line in ax.lines if line.get_label() in ("forgotten", "invented")}
        assert drawn["forgotten"].get_xdata().tolist() == [0, 10, 20]
        assert drawn["forgotten"].get_ydata().tolist() == pytest.approx([start, start + 0.1, start + 0.2])
        assert drawn["invented"].get_linestyle() != "-" == drawn["forgotten"].get_linestyle()
        assert {0.4, 1.0} <= level(ax)


def test_doses_that_are_text_stand_side_by_side_in_each_panel():
    table = pd.DataFrame([{"attack": a, "change": c, "facts": f, "mask": "lookup", "value": 0.5}
                          for a, changes in (("quantise", ("int8", "nf4")), ("prune", ("10%",))) for c in changes for f in ("forgotten", "retained")])
    figure = plots.line_panels(table, "change", "mask", "attack", "facts")
    labels = [[tick.get_text() for tick in ax.get_xticklabels()] for ax in figure.axes]
    assert labels == [["int8", "nf4"], ["10%"]] * 2


def test_equal_lines_over_text_do_not_hide_each_other():
    table = pd.DataFrame([{"attack": "prune", "change": c, "mask": m, "value": 0.0, "facts_low": 0.0, "facts_high": 0.1}
                          for c in ("10%", "30%") for m in ("lookup", "everything")])
    lines = [line for line in plots.line_panels(table, "change", "mask", "attack").axes[0].lines if line.get_label() in ("lookup", "everything")]
    one, other = (line.get_xdata() for line in lines)
    assert (one < other).all() and (other - one < 0.5).all()


def test_ways_of_asking_stand_beside_retained_facts_and_their_own_chance():
    table = pd.DataFrame([{"format": f, "group": g, "accuracy": 0.1, "low": 0.0, "high": 0.3, "kept": kept, "chance": chance}
                          for f, chance in (("QA", 0.4), ("MCQ", 0.25)) for g, kept in (("lookup", 0.9), ("everything", 0.0))])
    ax = plots.format_bars(table).axes[0]
    drawn = {tuple(line.get_xdata()) for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())}
    assert drawn == {(0.9, 0.9), (0.0, 0.0)} and {"retained facts", "chance"} <= set(ax.get_legend_handles_labels()[1])


def test_bars_are_the_worst_cases_with_the_model_left_alone_beside_them():
    table = pd.DataFrame([{"access": access, "mask": mask, "recovered": value, "low": value - 0.1, "high": value + 0.1, "untouched": 0.05}
                          for access in ("answers", "training") for mask, value in (("lookup", 0.2), ("everything", 0.6))])
    ax = plots.access_bars(table, chance=0.4).axes[0]
    assert [[bar.get_height() for bar in bars] for bars in ax.containers if hasattr(bars, "patches")] == [[0.2, 0.2], [0.6, 0.6]]
    assert {0.4, 1.0} <= level(ax)
    assert ax.get_legend_handles_labels()[1].count("left alone") == 1


def test_an_attack_that_was_not_made_is_said_so():
    for figure in (plots.line_panels(DOSES[:0], "step", "curve", "mask", title="Relearning"), plots.access_bars(pd.DataFrame())):
        assert "not made" in figure.axes[0].texts[0].get_text()
