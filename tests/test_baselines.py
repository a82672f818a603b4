"""Baselines: the same number of trials for all, what is kept is what is read, and only for the weights it was made for."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace

import attacks_cases as cases
import pandas as pd
import pytest
import small
import torch

from helpers import facts
from helpers.masks import SelectionError, mask
from helpers.selection import everything
from helpers.unlearning import baselines, tuning
from helpers.unlearning.baselines import WAYS
from helpers.unlearning.deletions import candidates, delete, ladder, magnitude
from helpers.unlearning.evaluation import summarize
from helpers.unlearning.scores import measure, scored
from helpers.unlearning.training import Settings
from helpers.unlearning.values import Values
from helpers.unlearning.weight_masks import Learning

QUICK = Settings(steps=2, batch=8, text_tokens=8)
TEXTS = cases.texts()[:8]
CHEAP = dict(texts=TEXTS[:4], n_retain=6, orders=(0,), n_neighbors=1)


def entrants(model):
    masks = {"lookup": mask(model, ["mlp 0", "mlp 1"], "lookup"), "everything": everything(model)}
    return baselines.editing(model, masks, QUICK, Values(steps=2, contexts=1), TEXTS)


@pytest.fixture(scope="module")
def searched():
    model = cases.known()
    before = small.weights(model)
    practice = tuning.validation(cases.a_split(), 4)
    masks = baselines.deleting(candidates(model, mask(model, ["mlp 1"], "lookup")), settings=QUICK, texts=TEXTS)
    # in so small a model single weights gain little
    price = {"strength": tuning.Log(1e-3, 1e-2)}
    cheap = {n: replace(e, space=e.space | price, default={**e.default, "strength": 1e-3}) for n, e in masks.items() if "strength" in e.space}
    methods = {**entrants(model), **masks, **cheap}
    found = baselines.search(model, practice, methods, 2, **CHEAP)
    assert small.same(model, before)
    return model, methods, found


def test_every_method_makes_an_edit_and_has_as_many_trials(searched):
    _, methods, found = searched
    assert list(found) == list(methods) and len(methods) == 11
    for name, tuned in found.items():
        assert len(tuned.trials) == 2 and tuned.trials["error"].isna().all() and set(tuned.trials["method"]) == {name}
        assert set(tuned.best()) == set(methods[name].space) == set(methods[name].default)
        for key, kind in methods[name].space.items():
            tried = [*tuned.trials[key], methods[name].default[key]]
            assert all(value in kind.options if isinstance(kind, tuning.Choice) else kind.low <= value <= kind.high for value in tried)
        assert tuned.trials[list(methods[name].space)].drop_duplicates().shape[0] == 2
    # where two methods search the same numbers they try the same points
    rates = [found[n].trials["learning_rate"].tolist() for n in ("fine-tuning, lookup", "fine-tuning, everything", "LoRA, everything")]
    assert rates[0] == rates[1] == rates[2]


def test_what_is_kept_is_what_is_read(searched, tmp_path):
    model, methods, found = searched
    path = baselines.keep(model, "athletes", "edit", found, tmp_path)
    read = baselines.read(model, "athletes", "edit", methods, tmp_path)
    for name, tuned in found.items():
        assert read[name].best() == pytest.approx(tuned.best(), rel=1e-5) and read[name].names == tuned.names
        assert read[name].trials["ours"].tolist() == pytest.approx(tuned.trials["ours"].tolist(), rel=1e-4, abs=1e-6)
        assert read[name].frontier["trial"].tolist() == tuned.frontier["trial"].tolist()
    assert baselines.read(model, "athletes", "delete", methods, tmp_path) is None
    assert baselines.read(model, "world", "edit", methods, tmp_path) is None
    elsewhere = replace(methods["ROME"], tunable=replace(methods["ROME"].tunable, mask="everything"))
    assert baselines.read(model, "athletes", "edit", {"ROME": elsewhere}, tmp_path) is None
    assert baselines.read(model, "athletes", "edit", {**methods, "another": methods["ROME"]}, tmp_path) is None
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    longer = replace(found["ROME"], trials=pd.concat([found["ROME"].trials] * 2, ignore_index=True))
    baselines.keep(model, "athletes", "edit", {"ROME": longer}, tmp_path)  # the trials of one method made again: the others stay
    assert {n: len(t.trials) for n, t in baselines.read(model, "athletes", "edit", methods, tmp_path).items()} == dict.fromkeys(found, 2) | {"ROME": 4}
    another = cases.random_model()  # of the same name: none of these trials are its own
    assert baselines.read(another, "athletes", "edit", methods, tmp_path) is None


def test_the_final_edit_is_that_of_the_trial_on_other_facts(searched):
    """The same function makes both, so what was tuned is what is measured."""
    model, methods, _ = searched
    given = cases.a_split()
    point = {"learning_rate": 1e-3, "forget_weight": 2.0}
    edit = methods["fine-tuning, lookup"].make(model, given, point)
    expected = tuning.finetune(model, given, mask(model, ["mlp 0", "mlp 1"]), "edit", replace(QUICK, **point), TEXTS)
    assert all(torch.equal(edit.values[name], value) for name, value in expected.values.items())
    lora = methods["LoRA, everything"].make(model, given)
    assert all(torch.linalg.matrix_rank(lora.values[n] - p.detach(), rtol=1e-3) <= model.d_model // 6 for n, p in model.hf.named_parameters() if n in lora.values)
    assert methods["MEMIT"].make(model, given, {"clamp": 0.5, "preserve": 1e6}).norm < 0.01 * methods["MEMIT"].make(model, given).norm


def test_a_mask_is_cut_where_its_score_is_best():
    """Every rung by hand: deleted, measured, scored."""
    model, given = cases.known(), cases.a_split()
    where = candidates(model, mask(model, ["mlp 1"]))
    importance, ns, rows = magnitude(model, where), [10, 400, 2000], []
    edit = baselines.best_rung(model, given, importance, [*ns, 10**6], {"learned": "not at all"})
    base = measure(model, given, "base", "none", n_retain=baselines.READ)[0]
    for chosen in ladder(model, importance, ns, "rung"):
        with delete(model, chosen).applied(model):
            rows.append(summarize(measure(model, given, "x", "y", n_retain=baselines.READ)[0], base).set_index("reading").loc["probability"])
    table = scored(pd.DataFrame(rows).assign(text_accuracy=0.0).reset_index(drop=True), summarize(base, base), "forget")
    assert edit.n_weights == ns[table["ours"].idxmax()] and edit.record["learned"] == "not at all" and all((v == 0).all() for v in edit.values.values())
    with pytest.raises(SelectionError, match="1 weights are to be deleted; 0 may be"):
        baselines.best_rung(model, given, {n: torch.full_like(v, -math.inf) for n, v in importance.items()}, ns, {})


def test_a_point_says_how_a_mask_is_learned():
    how = baselines.at(Learning("explicit", "towards", training=QUICK), {"learning_rate": 0.2, "forget_weight": 3.0, "strength": 7.0})
    assert (how.strength, how.training.learning_rate, how.training.forget_weight, how.training.steps) == (7.0, 0.2, 3.0, 2)
    assert baselines.at(WAYS["clamped, published"], {"learning_rate": 0.2}).strength == 1.5  # the published one


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A small model in a folder, its facts as a CSV file, and a command line."""
    home = tmp_path_factory.mktemp("baselines")
    model = cases.known()
    model.hf.save_pretrained(home / "small")
    model.tokenizer.save_pretrained(home / "small")
    with open(home / "my-athletes.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "relation", "answer", "edit_answer", "role"])
        writer.writerows([f.subject, "sport", f.answer, f.edit, ""] for f in facts.load()[:cases.N_FACTS])
        writer.writerow(["Tiger Woods", "sport", "golf", "", "example"])
    return home, [str(home / "small"), "--facts", str(home / "my-athletes.csv"), "--forget", "first-8", "--lookup", "1", "--task", "delete", "--steps", "1",
                  "--trials", "1", "--folder", str(home / "tuning"), "--out", str(home)]


def test_the_command_writes_one_table_and_does_nothing_twice(command, monkeypatch, capsys):
    home, arguments = command
    monkeypatch.setattr(baselines.metrics, "known", lambda model, facts: facts)
    monkeypatch.setattr(baselines, "PRICE", tuning.Log(1e-3, 1e-2))
    assert baselines.main(arguments) == 0
    table = pd.read_csv(home / "small-my-athletes-delete.csv")
    assert table["method"].tolist() == list(WAYS)
    stored = [json.loads(path.read_text()) for path in (home / "tuning" / "trials").iterdir()]
    assert len(stored) == len(WAYS) and {trial["method"] for trial in stored} == set(table["method"])
    assert "small-my-athletes-delete.csv" in capsys.readouterr().out
    monkeypatch.setattr(baselines, "learn", lambda *a, **k: pytest.fail("a trial was made again"))
    before = (home / "small-my-athletes-delete.csv").read_bytes()
    assert baselines.main(arguments) == 0 and (home / "small-my-athletes-delete.csv").read_bytes() == before


@pytest.mark.parametrize("changed, said", [(["--jobs", "0"], "0 jobs"), (["--forget", "first-900"], "needs 900 facts"), (["--facts", "athlets"], "athletes"),
                                           (["--methods", "ROME"], "no method 'ROME'.*explicit, hard; clamped")])
def test_what_is_not_there_is_named(command, changed, said, capsys, monkeypatch):
    monkeypatch.setattr(baselines.metrics, "known", lambda model, facts: facts)
    assert baselines.main([*command[1], *changed]) == 2
    assert re.search(said, capsys.readouterr().err)
