"""What a report says of the edits themselves: those that did not take, those that are one edit under two names, and what is decided."""

from __future__ import annotations

import pandas as pd
import report_cases as cases
from report_cases import declared, rows  # noqa: F401 - fixtures

from helpers import claims, plots
from helpers.attacks.headline import SPOKEN
from helpers.report import edits, figures, tables


def test_dots_are_where_the_table_says_with_their_chance_level():
    table = pd.DataFrame([{"asked": asked, "mask": mask, "group": group, "value": value, "low": value - 0.5, "high": value + 0.1, "collapsed": mask == "b"}
                          for asked, value in (("MCQ", 0.4), ("QA", 0.6)) for mask in ("a", "b") for group in ("forgotten", "retained")])
    figure = plots.dot_panels(table.assign(chance=0.25), "asked", "mask", "group")
    assert [ax.get_title() for ax in figure.axes] == ["forgotten", "retained"]
    for ax in figure.axes:
        assert [line.get_xdata().tolist() for line in ax.lines] == [[0.4, 0.6]] * 2
        assert [line.get_markerfacecolor() == "white" for line in ax.lines] == [False, True]
        segments = [segment.tolist() for collection in ax.collections for segment in collection.get_segments() if len(segment)]
        assert min(x for segment in segments for x, _ in segment if x > -0.02) == 0 and any(segment[0][0] == segment[1][0] == 0.25 for segment in segments)


def part_taken(rows: pd.DataFrame, mask: str) -> pd.DataFrame:
    """As if an edit had been taken by half of the facts."""
    half = (rows["localization"] == mask) & (rows["measure"] == "edit top1")
    return rows.assign(value=rows["value"].mask(half, rows["fact"].isin(cases.NAMES[::2]).astype(float)))


def test_a_report_marks_edits_that_did_not_take_and_draws_one_edit_under_two_names_once(rows):
    again = rows[rows["localization"] == "lookup"].assign(localization="attribution MLPs", run=lambda t: "again " + t["run"])
    both = pd.concat([part_taken(rows, "everything"), again])
    made = edits.made(both).xs("finetune", level="method").droplevel(["model", "facts", "n"])
    assert made.loc["lookup", "taken"] == 1 and not made.loc["lookup", "weak"] and made.loc["everything", "weak"]
    assert list(edits.doubles(both).values()) == ["lookup"]
    board = tables.leaderboard(both)
    assert {"lookup = attribution MLPs", "everything †", "all MLPs"} == set(board["name"])
    picture, = figures.pictures(next(kind for kind in figures.KINDS if kind.name == "worst"), both, {})
    assert set(picture.table["mask"]) == set(board["name"]) and "everything" in picture.note and "lookup" not in picture.note
    other = both.assign(value=both["value"].mask(both["run"].str.startswith("again") & (both["attack"] == "relearn lora"), 0.5))
    assert edits.doubles(other) == {}


def test_masks_without_layers_are_one_edit_if_all_of_their_values_are_equal(rows):
    again = rows[rows["localization"] == "everything"].assign(localization="random", run=lambda t: "again " + t["run"])
    both = pd.concat([rows, again], ignore_index=True)
    assert edits.doubles(both) == {("tiny-llama3", cases.FACTS, "finetune", "random"): "everything"}
    assert "everything = random" in set(tables.leaderboard(both)["name"])
    kind = next(kind for kind in figures.KINDS if kind.name == "worst")
    assert "everything = random" in set(next(figures.pictures(kind, both, {})).table["mask"])
    # one attack, one seed or one value apart: another edit, also in figures that show nothing of it
    apart = [both.drop(index=both.index[(both["localization"] == "random") & condition])
             for condition in (both["attack"] == "soft prompt", both["seed"] == 2)]
    changed = (both["localization"] == "random") & (both["measure"] == "text_loss")
    for other in (*apart, both.assign(value=both["value"].mask(changed, both["value"] + 0.01))):
        assert edits.doubles(other) == {}
        assert {"everything", "random"} <= set(next(figures.pictures(kind, other, {})).table["mask"])


def test_an_edit_whose_double_was_not_attacked_stands_for_itself(rows):
    lookup = rows[rows["localization"] == "lookup"]
    attacked = lookup["attack"] == f"worst: {SPOKEN}"
    again = lookup[attacked | (lookup["attack"] == "none")].assign(localization="attribution MLPs")
    both = pd.concat([rows.drop(index=lookup.index[attacked]), again], ignore_index=True)
    assert list(edits.doubles(both).values()) == ["lookup"]
    assert {"attribution MLPs", "all MLPs", "everything"} == set(tables.leaderboard(both)["name"])


def test_a_mask_is_marked_at_the_numbers_of_facts_where_its_edit_did_not_take():
    sized = cases.sizes()
    sized = sized[sized["method"] == "finetune, equal steps"]
    large, small = part_taken(sized, "lookup"), part_taken(sized, "everything")
    mixed = pd.concat([large[(large["n"] == 256) | (large["localization"] != "lookup")], sized[(sized["n"] < 256) & (sized["localization"] == "lookup")]])
    kind = next(kind for kind in figures.KINDS if kind.name == "scaling")
    picture, = figures.pictures(kind, mixed, {})
    assert set(picture.table["mask"]) == {"lookup † at 256", "everything"}
    assert picture.note == "† did not take: share of the facts in the trained words below 0.9: lookup at 256 facts 0.50."
    picture, = figures.pictures(kind, small, {})
    assert set(picture.table["mask"]) == {"lookup", "everything †"} and picture.note.count("everything at ") == 3


def test_unlearning_takes_where_the_true_answer_is_gone(rows):
    gone = rows.assign(method=rows["method"].replace("finetune", "npo"), value=rows["value"].mask(rows["measure"] == "forget top1", 0.0))
    made = edits.made(gone).xs("npo", level="method")
    assert (made["taken"] == 1).all() and not made["weak"].any()


def test_what_was_not_run_is_not_undecided_and_decided_claims_say_when_they_hold(rows, declared):
    rows = part_taken(rows, "lookup")
    found = tables.verdicts(declared, rows).set_index("claim")
    compared = claims.comparisons(declared, rows)
    run = set(compared.loc[compared["n_facts"] > 0, "claim"])
    assert set(found.index[found["state"] != tables.NOT_RUN]) == run
    decided = tables.decided(declared, rows)
    assert set(decided["claim"]) == set(found.index[found["verdict"] != "undecided"]) and (decided["verdict"] != "undecided").all()
    shown = tables.in_words(declared, decided)
    assert all(text.startswith(("above ", "below ")) for text in shown["holds if all of it is"])
    assert found.loc["mcq-unlocalized", "warning"] == "the edit of the mask did not take in full (lookup: 0.50 of the facts in the trained words)"
