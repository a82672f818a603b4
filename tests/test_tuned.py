"""Tuned settings: practice facts apart from all final numbers, one search for every mask, and a file that keeps what it holds."""

from __future__ import annotations

import copy
import csv
import re

import attacks_cases as cases
import pandas as pd
import pytest
import torch
import yaml

from helpers import facts, presets, splits, tuned
from helpers.unlearning import tuning
from helpers.unlearning.training import Settings
from helpers.unlearning.tuning import TuningError, validation


def keys(*sets):
    return {fact.key for some in sets for fact in some}


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A small model in a folder, its facts as a CSV file, and the command line that tunes two masks with two trials."""
    home = tmp_path_factory.mktemp("tuned")
    model = cases.known()
    hf = copy.deepcopy(model.hf)
    with torch.no_grad():
        hf.model.norm.weight.mul_(2)  # sharper: sure enough of its answers to count as knowing them
    hf.save_pretrained(home / "small")
    model.tokenizer.save_pretrained(home / "small")
    with open(home / "my-athletes.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "relation", "answer", "edit_answer", "role"])
        writer.writerows([f.subject, "sport", f.answer, f.edit, ""] for f in facts.load()[:cases.N_FACTS])
        writer.writerow(["Tiger Woods", "sport", "golf", "", "example"])
    return [str(home / "small"), "--facts", str(home / "my-athletes.csv"), "--forget", "first-16", "--masks", "lookup,all MLPs", "--lookup", "1",
            "--trials", "2", "--steps", "3", "--batch", "16", "--folder", str(home / "trials"), "--file", str(home / "tuned.yaml")], home


@pytest.fixture(scope="module")
def done(asked):
    arguments, home = asked
    (home / "tuned.yaml").write_text("other:\n  edit:\n    lookup: {learning_rate: 0.5}\n"
                                    f"{home / 'small'}:\n  athletes:\n    everything: {{learning_rate: 0.25}}\n")
    assert tuned.main(arguments) == 0
    return home


def test_practice_keeps_away_from_the_facts_that_are_read_in_the_end():
    athletes = facts.load()
    some = splits.split(athletes, "first-64")
    drawn, options = tuned.practice(some)
    assert drawn == validation(some) and not options
    sport = splits.split(athletes, "answer-basketball")
    drawn, options = tuned.practice(sport)
    used = keys(drawn.forget, options["forget"], drawn.retain_train, drawn.retain_test)
    assert not used & keys(sport.attack_test, sport.retain_test)
    assert keys(drawn.forget).isdisjoint(keys(options["forget"])) and keys(drawn.forget, options["forget"]) <= keys(sport.attack_train)
    assert keys(drawn.retain_train, drawn.retain_test) == keys(sport.retain_train)
    assert 0 < len(options["forget"]) <= tuned.MOST_READ and {f.answer for f in drawn.forget} == {"basketball"}
    with pytest.raises(TuningError, match="1 facts to practise on"):
        tuned.practice(splits.split(athletes.where(lambda f: f.answer != "basketball" or f.subject in [g.subject for g in sport.forget[:2]]), "answer-basketball"))


def test_every_mask_gets_the_same_points_and_the_best_is_what_the_preset_gives(done, monkeypatch):
    monkeypatch.setattr(presets, "TUNED", done / "tuned.yaml")
    written, model = yaml.safe_load((done / "tuned.yaml").read_text()), str(done / "small")
    found = written[model]["athletes"]
    tables = {name: pd.read_parquet(done / "trials" / "small" / "athletes" / f"{name}.parquet") for name in ("lookup", "all MLPs")}
    for name, table in tables.items():
        assert table["trial"].tolist() == [0, 1]
        assert table[["learning_rate", "forget_weight"]].equals(tables["lookup"][["learning_rate", "forget_weight"]])
        best, kept = table.loc[table["ours"].idxmax()], found[name]
        assert kept["learning_rate"] == pytest.approx(best["learning_rate"], rel=1e-3)
        assert kept["forget_weight"] == pytest.approx(best["forget_weight"], rel=1e-3)
        assert kept["provenance"]["score"] == pytest.approx(best["ours"], abs=1e-4) and kept["provenance"]["trials"] == 2
        assert kept["provenance"]["facts"] == "my-athletes first-16"
        given = presets.settings("tuned", model, "athletes", name, Settings())
        assert given == Settings(learning_rate=kept["learning_rate"], forget_weight=kept["forget_weight"], steps=3, batch=16)
    assert written["other"] == {"edit": {"lookup": {"learning_rate": 0.5}}} and found["everything"] == {"learning_rate": 0.25}


def test_a_search_done_again_makes_no_edit_and_the_same_file(asked, done, monkeypatch):
    before = (done / "tuned.yaml").read_bytes()
    monkeypatch.setattr(tuning, "finetune", lambda *a, **k: pytest.fail("a trial was made again"))
    assert tuned.main(asked[0]) == 0
    assert (done / "tuned.yaml").read_bytes() == before


@pytest.mark.slow
def test_several_processes_find_what_one_finds(asked, done, tmp_path):
    again = [*asked[0], "--jobs", "2", "--folder", str(tmp_path / "trials"), "--file", str(tmp_path / "tuned.yaml")]
    assert tuned.main(again) == 0
    one, two = (yaml.safe_load((place / "tuned.yaml").read_text())[str(done / "small")]["athletes"] for place in (done, tmp_path))
    assert {name: one[name] for name in two} == two


def test_a_whole_answer_can_be_tuned(asked, done):
    arguments = [*asked[0], "--to", "golf", "--forget", "answer-football", "--masks", "all MLPs", "--trials", "1"]
    assert tuned.main(arguments) == 0
    kept = yaml.safe_load((done / "tuned.yaml").read_text())[str(done / "small")]["whole-sport"]["all MLPs"]
    assert kept["provenance"]["facts"] == "my-athletes answer-football" and 2e-4 <= kept["learning_rate"] <= 2e-2


@pytest.mark.parametrize("changed, said", [
    (["--masks", "luckup"], "masks luckup.*there are lookup"),
    (["--masks", " , "], "none"),
    (["--jobs", "0"], "0 jobs"),
    (["--forget", "first-900"], "needs 900 facts"),
])
def test_what_is_not_there_is_named(asked, changed, said, capsys):
    assert tuned.main([*asked[0], *changed]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_file_of_another_kind_is_left_alone(asked, tmp_path, capsys):
    for text in ("- a\n- b\n", "a: {b: 1}\n", "a: [\n"):
        (tmp_path / "tuned.yaml").write_text(text)
        assert tuned.main([*asked[0], "--file", str(tmp_path / "tuned.yaml")]) == 2
        assert "tuned.yaml" in capsys.readouterr().err and (tmp_path / "tuned.yaml").read_text() == text
