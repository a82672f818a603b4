"""Tuned settings: practice facts apart from all final numbers, one search for every mask, and a file that keeps what it holds."""

from __future__ import annotations

import copy
import csv
import re
import shutil

import attacks_cases as cases
import pandas as pd
import pytest
import torch
import yaml

from helpers import facts, presets, splits, tuned
from helpers.unlearning import tuning
from helpers.unlearning.training import Settings
from helpers.unlearning.tuning import TuningError, validation


TASK = "my-athletes first-16"


def keys(*sets):
    return {fact.key for some in sets for fact in some}


def read(folder, task, mask) -> dict:
    return yaml.safe_load(presets.tuned_file("small", task, mask, folder).read_text())


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
            "--trials", "2", "--steps", "3", "--batch", "16", "--folder", str(home / "trials"), "--kept", str(home / "kept"),
            "--out", str(home / "tables")], home


@pytest.fixture(scope="module")
def done(asked):
    arguments, home = asked
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
    monkeypatch.setattr(presets, "TUNED", done / "kept")
    model = str(done / "small")
    tables = {name: pd.read_parquet(done / "trials" / "small" / TASK / f"{name}.parquet") for name in ("lookup", "all MLPs")}
    for name, table in tables.items():
        assert table["trial"].tolist() == [0, 1]
        assert table[["learning_rate", "forget_weight"]].equals(tables["lookup"][["learning_rate", "forget_weight"]])
        best, kept = table.loc[table["ours"].idxmax()], read(done / "kept", TASK, name)
        assert kept["learning_rate"] == pytest.approx(best["learning_rate"], rel=1e-3)
        assert kept["forget_weight"] == pytest.approx(best["forget_weight"], rel=1e-3)
        assert kept["provenance"]["score"] == pytest.approx(best["ours"], abs=1e-4) and kept["provenance"]["trials"] == 2
        assert kept["provenance"]["facts"] == "my-athletes first-16"
        given = presets.settings("tuned", model, TASK, name, Settings())
        assert given == Settings(learning_rate=kept["learning_rate"], forget_weight=kept["forget_weight"], steps=3, batch=16)


def test_a_search_done_again_makes_no_edit_and_the_same_file(asked, done, monkeypatch):
    files = sorted((done / "kept").rglob("*.yaml"))
    before = [file.read_bytes() for file in files]
    monkeypatch.setattr(tuning, "finetune", lambda *a, **k: pytest.fail("a trial was made again"))
    assert tuned.main(asked[0]) == 0
    assert len(files) >= 2 and [file.read_bytes() for file in files] == before


def test_all_trials_are_kept_in_one_table_beside_those_of_other_masks(done, tmp_path):
    read_trials = lambda *masks: tuned.read_trials(str(done / "small"), TASK, masks, done / "tables")
    table = read_trials("all MLPs", "lookup")
    assert table["mask"].tolist() == ["all MLPs"] * 2 + ["lookup"] * 2 and table.groupby("mask")["chosen"].sum().eq(1).all()
    for name in ("lookup", "all MLPs"):
        best = table[(table["mask"] == name) & table["chosen"]].iloc[0]
        assert best["learning_rate"] == pytest.approx(read(done / "kept", TASK, name)["learning_rate"], rel=1e-3)
    first, second = (table[table["mask"] == name].drop(columns="chosen") for name in ("lookup", "all MLPs"))
    tuned.keep_trials("small", TASK, first, tmp_path)
    tuned.keep_trials("small", TASK, second, tmp_path)
    tuned.keep_trials("small", TASK, first.assign(edit=0.5), tmp_path)
    again = tuned.read_trials("small", TASK, ["lookup", "all MLPs", "random"], tmp_path)
    assert len(again) == 4 and again.loc[again["mask"] == "lookup", "edit"].eq(0.5).all()
    assert tuned.read_trials("small", TASK, ["random"], tmp_path).empty and tuned.read_trials("nobody", TASK, ["lookup"], tmp_path).empty


def test_a_search_says_which_masks_were_tuned_by_another(asked, done, capsys):
    rates = ["--rates", "0.001", "0.002", "--masks", "all MLPs", "--trials", "1", "--kept"]
    assert tuned.main([*asked[0], *rates, str(done / "elsewhere")]) == 0
    assert "was tuned by" not in capsys.readouterr().err
    copied = done / "copied"
    shutil.copytree(done / "kept", copied)
    assert tuned.main([*asked[0], *rates, str(copied)]) == 0
    said = capsys.readouterr().err
    assert "this search: 1 trials at rates 0.001 to 0.002, but lookup was tuned by 2 trials at rates 0.0002 to 0.02" in said
    assert "all-MLPs" not in said  # which this search is of


@pytest.mark.slow
def test_several_processes_find_what_one_finds(asked, done, tmp_path):
    again = [*asked[0], "--jobs", "2", "--folder", str(tmp_path / "trials"), "--kept", str(tmp_path / "kept")]
    assert tuned.main(again) == 0
    for name in ("lookup", "all MLPs"):
        assert read(tmp_path / "kept", TASK, name) == read(done / "kept", TASK, name)


def test_a_whole_answer_can_be_tuned(asked, done):
    arguments = [*asked[0], "--to", "golf", "--forget", "answer-football", "--masks", "all MLPs", "--trials", "1"]
    assert tuned.main(arguments) == 0
    kept = read(done / "kept", "my-athletes answer-football", "all MLPs")
    assert kept["provenance"]["facts"] == "my-athletes answer-football" and 2e-4 <= kept["learning_rate"] <= 2e-2


def test_real_models_are_tuned_on_text_and_in_chunks_of_ones_own(asked, done, tmp_path, monkeypatch):
    own = [f"text number {i} of these" for i in range(600)]
    (tmp_path / "own.txt").write_text("\n\n".join(own))
    seen, measured = [], []
    train, read_on = tuning.finetune, tuning.measure
    monkeypatch.setattr(tuning, "finetune", lambda *a: seen.append(a) or train(*a))
    monkeypatch.setattr(tuning, "measure", lambda *a, **k: measured.append(k["texts"]) or read_on(*a, **k))
    more = ["--texts", str(tmp_path / "own.txt"), "--chunk", "4", "--recompute", "--masks", "lookup", "--trials", "1", "--kept", str(tmp_path)]
    assert tuned.main([*asked[0], *more]) == 0
    (*_, settings, taught, _), = seen
    assert (settings.chunk, settings.recompute) == (4, True) and len(taught) == 512 and set(taught) <= set(own)
    assert all(len(texts) == tuned.N_TEXTS and set(texts) <= set(own) - set(taught) for texts in measured) and len(measured) == 2


@pytest.mark.parametrize("changed, said", [
    (["--masks", "luckup"], "masks luckup.*there are lookup"),
    (["--masks", " , "], "none"),
    (["--jobs", "0"], "0 jobs"),
    (["--forget", "first-900"], "needs 900 facts"),
])
def test_what_is_not_there_is_named(asked, changed, said, capsys):
    assert tuned.main([*asked[0], *changed]) == 2
    assert re.search(said, capsys.readouterr().err)
