"""The report: what it says is what claims and statistics say of the same rows, and of no others."""

from __future__ import annotations

import re
from collections import Counter
from types import SimpleNamespace
from xml.etree import ElementTree

import pandas as pd
import pytest
import report_cases as cases
from report_cases import declared, rows  # noqa: F401 - fixtures

from helpers import claims, facts, stats, store
from helpers.attacks.headline import SPOKEN
from helpers.report import figures, page, selections, tables
from helpers.report import rows as material
from helpers.report.__main__ import main


@pytest.fixture(scope="module")
def collected(rows, tmp_path_factory):
    return material.collect([cases.pack(rows, tmp_path_factory.mktemp("store") / "reference.parquet")])


@pytest.fixture(scope="module")
def text(collected, declared):
    return page.render(collected, declared, "a day", "a command")


@pytest.fixture(scope="module")
def tree(text):
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))


def said(element) -> str:
    return " ".join("".join(element.itertext()).split())


def cells(tree, claim: str) -> dict[str, str]:
    """The verdict table's entries for a claim, by model."""
    table = tree.find(".//table[@id='verdicts']")
    heads = [said(head) for head in table.find("thead").iter("th")]
    row = table.find(f".//tr[@id='{claim}']")
    return dict(zip(heads, map(said, row.findall("td"))))


def test_the_verdicts_on_the_page_are_those_of_claims(tree, rows, declared):
    expected = claims.verdict(declared, rows)
    assert set(expected["claim"]) == {"mcq-unlocalized", "worst-case", "text-loss"}
    for _, row in expected.iterrows():
        cell = cells(tree, row["claim"])["tiny-llama3"]
        assert f"{page.MARKS[row['verdict']]} {row['verdict']} {row['held']} of {row['of']}" in cell
        assert row["reason"] in cell
        if row["n_facts"]:
            assert f"{row['value']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]" in cell
            assert (f"{row['n_facts']} facts × 3 seeds" if row["n_facts"] > 1 else "3 seeds") in cell
    assert cells(tree, "dissociation-mcq")["tiny-llama3"] == "not asked"


def test_the_other_reading_stands_beside_the_one_that_decides(declared, rows):
    found = tables.verdicts(declared, rows).set_index("claim").loc["mcq-unlocalized"]
    other = rows[rows["measure"] == "mcq_edit top1"]
    expected = stats.compare(other[other["attack"] == "none"], "lookup", [found["against"]]).iloc[0]
    assert [found[f"other_{name}"] for name in ("value", "low", "high")] == pytest.approx(list(expected[["value", "low", "high"]]))


def test_published_figures_are_those_of_the_files(tree):
    figures_ = pd.read_csv(claims.DATA / "published" / "athletes.csv").set_index(["measure", "method"])["value"]
    cell = cells(tree, "mcq-unlocalized")["Published"]
    assert f"lookup {figures_['mcq_edit', 'FLU']:.2f}; everything {figures_['mcq_edit', 'Nonlocalized']:.2f}" in cell
    assert cells(tree, "worst-case")["Published"] == "–"
    assert "recomputed from the authors' repository at commit a36be56" in said(tree)


def test_models_of_the_paper_are_not_run_here_until_they_are(tree, rows, declared, tmp_path):
    assert set(cells(tree, "text-loss")) == {"Claim", "Published", *tables.bundled(), "the paper's models"}
    assert cells(tree, "text-loss")["the paper's models"] == "not run here"
    real = rows[rows["attack"] == "none"].assign(model="google/gemma-2-9b", run=lambda table: "real " + table["run"])
    both = material.collect([cases.pack(pd.concat([rows, real]), tmp_path / "rows.parquet")])
    ours, theirs = tables.columns(both.rows)
    assert theirs == ["gemma-2-9b"] and "gemma-2-9b" not in ours
    found = {claim.id: entries for claim, entries in tables.cells(declared, tables.verdicts(declared, both.rows), both.rows)}
    assert all(len(entries) == len(ours) + 1 for entries in found.values())
    assert tables.NOT_HERE not in [entry for entries in found.values() for entry in entries if isinstance(entry, str)]
    assert found["mcq-unlocalized"][-1]["n_facts"] == len(cases.NAMES)


def test_the_numbers_of_a_figure_are_those_of_the_statistics(rows, collected):
    kind = next(kind for kind in figures.KINDS if kind.name == "spider")
    picture, = figures.pictures(kind, collected.rows, {})
    shown = page.numbers(picture).set_index(["mask", "measure"])
    for reading, column in page.READINGS.items():
        for axis, attack, name, turned in (("multiple choice", "none", "mcq_edit", False), ("not relearned", "relearn lora", "forget", True),
                                           ("retained, training format", "none", "retain", False)):
            part = rows[(rows["localization"] == "lookup") & (rows["attack"] == attack) & (rows["measure"] == f"{name} {reading}")]
            expected = stats.summary(part.assign(value=1 - part["value"] if turned else part["value"])).iloc[0]
            assert shown.loc[("lookup", axis), column] == f"{expected['value']:.2f} [{expected['low']:.2f}, {expected['high']:.2f}]"
            assert shown.loc[("lookup", axis), "facts"] == expected["n_facts"] and shown.loc[("lookup", axis), "seeds"] == 3
    drawn = {line.get_label(): line.get_ydata() for line in picture.figure.axes[0].lines if not line.get_label().startswith("_")}
    means = picture.table[picture.table["reading"] == "probability"].groupby("mask", sort=False)["value"].apply(list)
    assert {name: list(values[:-1]) for name, values in drawn.items()} == means.to_dict()


def test_every_figure_is_drawn_from_rows_that_allow_it_and_asks_for_the_others(collected, rows):
    allowed = lambda table: {kind.name for kind in figures.KINDS if len(kind.select(selections.named(table)))}
    assert allowed(collected.rows) == {"spider", "prompting", "relearning", "probing", "soft-prompt", "worst"}
    evaluated = rows[rows["attack"] == "none"]
    for more, name, count in ((cases.rungs(), "mask-ladder", 1), (cases.sizes(), "scaling", 2), (cases.windows(), "windows", 1)):
        table = pd.concat([evaluated, more], ignore_index=True)
        assert allowed(table) == {"spider", name}
        kind = next(kind for kind in figures.KINDS if kind.name == name)
        drawn = list(figures.pictures(kind, table, figures.floors(table)))
        assert len(drawn) == count and all(len(picture.figure.axes) for picture in drawn)


def test_a_figure_without_rows_says_what_brings_them(tree, tmp_path):
    kinds = {kind.name: kind for kind in figures.KINDS}
    asked = page.command_of(kinds["spider"]).split(" && ")
    assert asked == [f"python -m helpers.sweep sweeps/{name}.yaml" for name in ("ablations", "attacks", "editing", "reference", "unlearning")]
    (tmp_path / "mine.yaml").write_text("- notebook: 07_weight_masks\n")
    assert page.command_of(kinds["mask-ladder"], tmp_path) == "python -m helpers.sweep sweeps/mine.yaml"
    assert page.command_of(kinds["scaling"], tmp_path) == "python -m helpers.notebooks run 11 --profile standard"
    assert f"No rows for this figure yet. They come from {page.command_of(kinds['mask-ladder'])}" in said(tree)


def test_windows_and_parts_of_mlps_are_no_masks_of_the_comparison(rows):
    for name in ("MLP 2-4", "gate", "gate + up + down"):
        other = rows[rows["localization"] == "lookup"].assign(localization=name)
        for select in (selections.spider, selections.relearning, selections.prompting):
            assert len(select(selections.named(pd.concat([rows, other])))) == len(select(selections.named(rows))) > 0


def test_relearning_keeps_forgotten_retained_and_invented_names_apart(rows, collected):
    kind = next(kind for kind in figures.KINDS if kind.name == "relearning")
    picture, = figures.pictures(kind, collected.rows, {cases.FACTS: 0.4})
    table = picture.table[picture.table["reading"] == "probability"].set_index(["mask", "curve", "step"])["value"]
    mine = rows[rows["localization"] == "lookup"]
    of = lambda attack, measure: mine.loc[(mine["attack"] == attack) & (mine["measure"] == measure), "value"].mean()
    dose = "relearn lora: all facts, lr 0.002, step 20 of 20"
    assert table["lookup", "forgotten facts", 20] == pytest.approx(of("relearn lora", "forget probability"))
    assert table["lookup", "retained facts", 20] == pytest.approx(of("relearn lora", "retain probability"))
    assert table["lookup", "invented names", 20] == pytest.approx(of(f"{dose} (invented names)", "forget probability"))
    levels = {float(line.get_ydata()[0]) for line in picture.figure.axes[0].lines if line.get_linestyle() == ":"}
    assert levels == {0.4, 1.0}


def test_chance_is_the_commonest_answer_of_the_file(rows):
    sports = Counter(fact.answer for fact in facts.load("athletes"))
    common = min(sports, key=lambda sport: (-sports[sport], sport))  # of equal ones the first by name
    asked = [fact for fact in facts.load("athletes") if f"{fact.subject} | sport" in cases.NAMES]
    assert figures.floors(rows) == {cases.FACTS: pytest.approx(sum(fact.answer == common for fact in asked) / len(asked))}
    assert figures.floors(rows.assign(facts="mine first-4")) == {}
    one = [f"{fact.subject} | sport" for fact in facts.load("athletes") if fact.answer == common][:4]  # a whole sport has no floor
    assert figures.floors(pd.DataFrame({"facts": f"athletes answer-{common}", "measure": "forget top1", "fact": one})) == {}


def test_the_leaderboard_ranks_by_the_worst_case_and_puts_wrecked_models_last(rows):
    whole = rows["measure"].isin(["retain top1", "mcq_retain top1"]) & (rows["attack"] == "none")
    rows = rows.assign(value=rows["value"].mask(whole, 1.0))
    table = rows.copy()
    wrecked = (table["localization"] == "lookup") & (table["measure"] == "retain top1") & (table["attack"] == "none")
    table.loc[wrecked, "value"] = 0.0
    before, after = (tables.leaderboard(part).set_index("localization") for part in (rows, table))
    assert before["worst"].is_monotonic_increasing and before.index[-1] != "lookup" and (before["collapsed"] == "").all()
    assert after.index[-1] == "lookup" and after.loc["lookup", "collapsed"].startswith("retain -")
    part = rows[(rows["localization"] == "everything") & (rows["attack"] == f"worst: {SPOKEN}") & (rows["measure"] == "forget top1")]
    expected = stats.summary(part).iloc[0]
    shown = before.loc["everything", ["worst", "worst_low", "worst_high", "worst_n_facts"]]
    assert list(shown) == pytest.approx(list(expected[["value", "low", "high", "n_facts"]]))
    assert before.loc["everything", "attack"] == "relearn lora"


def test_every_estimate_of_the_leaderboard_says_how_many_facts_and_seeds_it_has(rows, declared, tmp_path):
    board = tables.board_in_words(tables.leaderboard(rows)).set_index("mask").loc["lookup"]
    assert board["worst case"].endswith("] (6 facts × 3 seeds)") and board["retained"].endswith("] (12 facts × 3 seeds)")
    assert board["text loss"].endswith("] (3 seeds)")
    single = rows[rows["seed"] == 0]
    board = tables.board_in_words(tables.leaderboard(single)).set_index("mask").loc["lookup"]
    assert board["retained"].endswith("] (12 facts × one seed)") and board["text loss"].endswith(" (one seed)") and "[" not in board["text loss"]
    assert tables.counted({"value_n_facts": float("nan"), "value_n_seeds": float("nan")}, "value") == ""
    collected = material.collect([cases.pack(single, tmp_path / "rows.parquet")])
    tree = ElementTree.fromstring(page.render(collected, declared, "a day", "a command").removeprefix("<!DOCTYPE html>"))
    row = next(row for row in tree.find(".//table[@id='leaderboard']").iter("tr") if said(row.find("td[4]") if row.find("td") is not None else row) == "lookup")
    shown = [said(cell) for cell in row.iter("td")]
    assert any("facts, one seed an estimate." in said(line) for line in tree.iter("p"))
    assert len(shown) == 14 and shown[4].endswith("6 facts × one seed") and shown[11].endswith("one seed") and "[" not in shown[11]


def test_where_localizations_look_is_a_mean_over_seeds_and_says_which_chose_the_same(rows, declared, tmp_path):
    both = pd.concat([rows, cases.localized()], ignore_index=True)
    collected = material.collect([cases.pack(both, tmp_path / "rows.parquet")])
    table = tables.localizations(collected.rows).set_index("localization")
    assert table.loc["causal tracing", "extraction share"] == pytest.approx(0.6) and table.loc["causal tracing", "lookup share"] == 0.25
    assert tuple(table.loc["causal tracing", ["units", "same", "seeds"]]) == ("attn 6, mlp 8", 2, 3)
    assert table.loc["fact lookup", "same"] == 3 and table.loc["random", "knock-out area"] == pytest.approx(0.3)
    tree = ElementTree.fromstring(page.render(collected, declared, "a day", "a command").removeprefix("<!DOCTYPE html>"))
    shown = [[said(cell) for cell in row.iter("td")] for row in tree.find(".//table[@id='localizations']").iter("tr")][1:]
    assert ["tiny-llama3", "athletes, 96 facts", "causal tracing"] in [row[:3] for row in shown]
    row = next(row for row in shown if row[2] == "causal tracing")
    assert [cell.split()[0] for cell in row[3:7]] == ["0.25", "0.60", "0.90", "0.05"] and row[7:] == ["attn 6, mlp 8", "2 of 3"]
    assert 0.6 - table.loc["causal tracing", "extraction share_low"] > 0 and f"[{table.loc['causal tracing', 'extraction share_low']:.2f}," in row[4]
    assert tables.leaderboard(collected.rows).equals(tables.leaderboard(rows))  # and no other table takes these rows for edits


def test_stale_rows_are_taken_unless_fresh_ones_are_asked_for(rows, tmp_path):
    old = rows[rows["localization"] == "lookup"].assign(localization="random", run="old")
    places = [cases.pack(rows, tmp_path / "new.parquet"), cases.pack(old, tmp_path / "old.parquet", stale=True)]
    found = material.collect([tmp_path], fresh=True)
    assert "random" not in set(found.rows["localization"]) and len(found.rows) == len(rows)
    assert found.runs.set_index("run").loc["old", ["stale", "used", "rows"]].tolist() == [True, 0, len(old)]
    assert "random" in set(material.collect(places).rows["localization"])
    part = material.collect(places, localization="random")
    assert set(part.rows["localization"]) == {"random"} and part.runs["run"].tolist() == ["old"]
    with pytest.raises(material.ReportError, match="are stale.*without --fresh"):
        material.collect(places[1:], fresh=True)


def test_of_two_runs_of_an_edit_the_one_that_measured_more_counts(rows):
    rows = rows[rows["localization"] != "none"].assign(stale=False)
    old = rows.assign(run="old", started="9", stale=True)
    short = rows[rows["attack"] == "none"].assign(run="short", value=0.5, started="2")
    again = rows.assign(run=lambda table: "again " + table["run"], started="1")
    other = rows[rows["localization"] == "lookup"].head(3).assign(run="extra", attack="noise: 0.1", started="3")
    kept = material.one_run_an_edit(pd.concat([old, short, rows.assign(started="0"), again, other], ignore_index=True))
    assert {run for run in kept["run"] if not run.startswith("again ")} == {"extra"}
    pd.testing.assert_frame_equal(kept[kept["run"] != "extra"][list(rows)].reset_index(drop=True), again[list(rows)].reset_index(drop=True))


def test_a_fuller_profile_goes_before_a_run_that_is_not_stale_and_no_edit_mixes_two(rows):
    rows = rows.assign(stale=True, started="0", profile="")
    quick = rows[rows["localization"] == "lookup"].assign(stale=False, started="1", profile="quick", run="quick", value=0.5)
    more = quick.head(3).assign(attack="noise: 0.1")
    other = quick.assign(localization="random")
    kept = material.one_run_an_edit(pd.concat([quick, more, rows, other], ignore_index=True))
    assert set(kept.loc[kept["localization"] == "lookup", "run"]) == {f"lookup finetune {seed}" for seed in range(3)}
    assert len(kept) == len(rows) + len(other) and set(kept.loc[kept["run"] == "quick", "localization"]) == {"random"}
    full = rows.assign(profile="full", run=lambda table: "full " + table["run"])
    assert material.one_run_an_edit(pd.concat([rows, full], ignore_index=True))["run"].str.startswith("full ").all()


@pytest.mark.parametrize("profile", ["quick", "smoke"])
def test_what_rests_on_light_runs_says_so(rows, declared, profile):
    assert not tables.verdicts(declared, rows)["warning"].str.contains(profile).any()
    mixed = rows.assign(profile=rows["profile"].mask(rows["localization"] == "all MLPs", profile))
    found = tables.verdicts(declared, mixed).set_index("claim")
    assert found.loc["mcq-unlocalized", "against"] == "all MLPs"
    assert found.loc["mcq-unlocalized", "warning"] == f"the rival was trained in the {profile} profile (all MLPs)"
    assert f"all MLPs ({profile} profile)" in set(tables.leaderboard(mixed)["name"])
    picture, = figures.pictures(next(kind for kind in figures.KINDS if kind.name == "worst"), mixed, {})
    assert picture.note == f"Trained in the {profile} profile: all MLPs."
    runs = pd.DataFrame([{name: "x" for name in material.ORIGIN} | {"stale": False, "rows": 1, "used": 1, "profile": name} for name in ("", profile)])
    assert list(tables.provenance(runs)["profile"]) == ["not recorded", profile]


def test_a_run_that_is_going_on_can_be_reported(rows, tmp_path):
    made = {"git": {"commit": "abc", "dirty": True}, "code": "c", "started": "s", "platform": "p", "device": "cpu", "threads": 2}
    run = SimpleNamespace(notebook="12_report", folder=tmp_path, provenance=made, params=SimpleNamespace(profile="quick"))
    with pytest.raises(material.ReportError, match="no results yet"):
        material.current(run)
    rows.to_parquet(tmp_path / "results.parquet")
    found = material.current(run)
    assert len(found.rows) == len(rows) and set(found.runs["run"]) == set(rows["run"]) and set(found.rows["commit"]) == {"abc-dirty"}
    assert set(found.rows["profile"]) == {"quick"}


def test_the_page_is_well_formed_and_loads_nothing(tree, text):
    assert "bound method" not in text and "lookup vs " in said(tree)
    for element in tree.iter():
        for name in ("src", "href", "data", "srcset"):
            assert element.get(name, "data:").startswith(("data:", "#"))
        assert element.tag not in ("script", "link", "iframe")
    assert not re.search(r"url\(|@import|//[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert len(list(tree.iter("img"))) == 6


def test_the_same_rows_give_the_same_bytes_apart_from_the_date(collected, declared, text):
    assert page.render(collected, declared, "another day", "a command") == text.replace("Made a day", "Made another day")


def test_the_command_line_says_what_is_wrong(tmp_path, capsys):
    assert main(["--rows", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "nothing at" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["--rows", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    assert "no rows in" in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "other.parquet").write_bytes(b"no parquet")
    with pytest.raises(store.StoreError, match="no file made by pack"):
        material.collect([tmp_path / "other.parquet"])
