"""Tuning: equal budgets, practice facts that nothing else is measured on, stated scores, and trials that are done once."""

import json
import math

import families
import pandas as pd
import pytest
import small
import torch

from helpers import facts as bundled
from helpers.masks import mask
from helpers.models import Model
from helpers.pretrain import corpus
from helpers.splits import split
from helpers.unlearning import tuning
from helpers.unlearning.alphaedit import alphaedit
from helpers.unlearning.edit import EditError
from helpers.unlearning.memit import memit
from helpers.unlearning.rome import rome
from helpers.unlearning.scores import scored, text_accuracy
from helpers.unlearning.texts import general_texts
from helpers.unlearning.training import Settings
from helpers.unlearning.tuning import (
    FINETUNE,
    Choice,
    Log,
    Tunable,
    TuningError,
    points,
    tunable_finetune,
    tunable_writing,
    tune,
    tune_all,
    validation,
)
from helpers.unlearning.values import Values
from helpers.vocabulary import build_tokenizer

QUICK = Settings(steps=3, batch=8, text_tokens=12)
TEXTS = general_texts(6, held_out=True)
CHEAP = dict(texts=TEXTS, n_retain=6, orders=(0, 5), n_neighbors=1)


@pytest.fixture(scope="module")
def worded():
    """A random Gemma2 with a tokenizer that knows words, and a practice split of bundled athletes."""
    athletes = bundled.load()[:60]
    tokenizer = build_tokenizer([f.subject for f in athletes], corpus().templates(), 50)
    hf = families.build("gemma2", vocab_size=len(tokenizer), max_position_embeddings=256)
    given = split(athletes, "first-8")
    return Model.of(hf, tokenizer, "worded"), given, validation(given)


def methods(model):
    return [tunable_finetune(mask(model, [unit]), settings=QUICK, texts=TEXTS) for unit in ("mlp 0", "mlp 2")]


def test_validation_takes_facts_that_nothing_else_is_measured_on(worded):
    _, given, practice = worded
    keys = lambda *sets: {fact.key for facts in sets for fact in facts}
    every = keys(practice.forget, practice.retain_train, practice.retain_test)
    assert every == keys(given.retain_train) and not every & keys(given.forget, given.retain_test)
    assert len(practice.forget) == 8 and len(every) == 8 + len(practice.retain_train) + len(practice.retain_test)
    assert keys(practice.attack_train, practice.attack_test) == keys(practice.forget)
    assert practice == validation(given) != validation(given, seed=1) and json.dumps(practice.record)
    assert len(validation(split(small.facts(30), "first-20")).forget) == 2  # a third of 8
    with pytest.raises(TuningError, match="99 facts to practise on"):
        validation(given, 99)


def test_points_are_the_same_for_all_and_seeded():
    space = {"learning_rate": Log(1e-4, 1e-1), "steps": Choice((10, 20, 30))}
    drawn = points(space, 200)
    assert drawn == points(space, 200) and drawn[:5] == points(space, 5) and drawn != points(space, 200, seed=1)
    assert [p["learning_rate"] for p in drawn] == [p["learning_rate"] for p in points({"learning_rate": space["learning_rate"]}, 200)]
    logs = pd.Series([math.log10(p["learning_rate"]) for p in drawn])
    assert logs.between(-4, -1).all() and abs(logs.mean() + 2.5) < 0.2 and {p["steps"] for p in drawn} == {10, 20, 30}


def test_masks_of_the_same_weights_share_their_trials(worded, tmp_path):
    model, _, practice = worded
    named = [tunable_finetune(mask(model, ["mlp 0"], name), settings=QUICK, texts=TEXTS) for name in ("lookup", "causal tracing MLPs")]
    one, other = tune_all(model, practice, named, FINETUNE, 1, folder=tmp_path, **CHEAP)
    assert len(list(tmp_path.iterdir())) == 1
    assert other.mask == "causal tracing MLPs" and one.trials.drop(columns="mask").equals(other.trials.drop(columns="mask"))


def test_equal_budgets_determinism_and_resumption(worded, tmp_path, monkeypatch):
    model, _, practice = worded
    before = small.weights(model)
    calls, real = [], tuning.finetune

    def counting(*arguments, **options):
        calls.append(arguments[2].name)
        if len(calls) == dies:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(tuning, "finetune", counting)
    monkeypatch.setattr(tuning.provenance, "package_hash", lambda name: code)
    code, dies = "one", 4
    search = lambda folder, trials=3: tune_all(model, practice, methods(model), FINETUNE, trials, folder=folder, **CHEAP)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path)
    assert small.same(model, before) and len(list(tmp_path.iterdir())) == 3
    dies = 0
    done = search(tmp_path)
    assert len(calls) == 4 + 3 and len(list(tmp_path.iterdir())) == 6  # what was finished is not done again
    assert [len(t.trials) for t in done] == [3, 3]
    assert all(done[0].trials[name].equals(done[1].trials[name]) for name in FINETUNE)
    assert all(a.trials.equals(b.trials) for a, b in zip(done, search(tmp_path))) and len(calls) == 7
    search(tmp_path, 4)
    assert len(calls) == 9  # a larger budget adds to the smaller
    fresh = search(None)
    assert all(a.trials.equals(b.trials) for a, b in zip(done, fresh)) and small.same(model, before)
    file = next(iter(tmp_path.iterdir()))
    file.write_text("{torn")
    calls.clear()
    search(tmp_path, 4)
    assert len(calls) == 1
    code = "other"
    search(tmp_path, 1)
    assert len(calls) == 1 + 2
    code = "one"
    with torch.no_grad():  # another model: nothing stored is its own
        model.matrix("up", 1)[0][0, 0] += 1.0
    try:
        calls.clear()
        search(tmp_path, 1)
        assert len(calls) == 2
    finally:
        with torch.no_grad():
            model.matrix("up", 1)[0].copy_(before[f"{model.path('up', 1)}.weight"])
    stored = json.loads(file.read_text())
    assert stored["method"] == "finetune edit" and stored["point"].keys() == FINETUNE.keys() and "error" in stored["row"]


def test_trials_table_best_and_frontier(worded):
    model, _, practice = worded
    tuned = tune(model, practice, methods(model)[0], FINETUNE, 4, **CHEAP)
    t = tuned.trials
    measures = ["forget", "edit", "retain", "mcq_retain", "text_loss", "text_accuracy", "norm"]
    assert t["trial"].tolist() == [0, 1, 2, 3] and t[measures].notna().all().all()
    assert t["paper"].to_numpy() == pytest.approx((t["text_accuracy"] + 1 - t["forget"] + t["retain"] + t["edit"]).to_numpy())
    assert t["success"].to_numpy() == pytest.approx(((1 - t["forget"] + t["edit"]) / 2).to_numpy())
    assert t["ours"].to_numpy() == pytest.approx((t["success"] / 2 ** t["harm"]).to_numpy())
    best = t.loc[t["ours"].idxmax()]
    assert tuned.best() == {name: best[name] for name in FINETUNE} and tuned.best("paper").keys() == FINETUNE.keys()
    for _, row in tuned.frontier.iterrows():
        assert not ((t["success"] > row["success"]) & (t["retain"] > row["retain"])).any()
    assert tuned.frontier["retain"].is_monotonic_increasing and len(tuned.frontier)


def test_scores_by_hand():
    base = pd.DataFrame({"reading": ["probability"], "retain": [0.9], "mcq_retain": [0.8], "text_loss": [1.0]})
    trials = pd.DataFrame({"forget": [0.1, 0.0, None, 0.1, 0.2], "edit": [0.8, 1.0, None, 0.8, 0.7], "retain": [0.89, 0.85, None, 0.95, 0.90],
                           "mcq_retain": [0.8, 0.75, None, 0.9, 0.8], "text_loss": [1.05, 1.2, None, float("nan"), 0.9],
                           "text_accuracy": [0.5, 0.4, None, 0.0, 0.5]})
    table = scored(trials, base, "edit")
    assert table["success"].iloc[[0, 1]].tolist() == pytest.approx([0.85, 1.0])
    assert table["harm"].iloc[[0, 1, 4]].tolist() == pytest.approx([0.5, 1.0 + 0.5 + 2.0, 0.0])  # .05 nat; .03, .05 and .2 nat
    assert table["paper"].iloc[0] == pytest.approx(0.5 + 0.9 + 0.89 + 0.8)
    assert table.loc[2, ["success", "harm", "paper", "ours"]].isna().all() and not table["frontier"][2]
    assert table["ours"].iloc[[0, 1, 4]].tolist() == pytest.approx([0.85 / 2**0.5, 1 / 2**3.5, 0.75])
    assert table["ours"][3] == 0  # a text loss that is no number
    assert table["frontier"].tolist() == [False, True, False, True, False]
    forget = scored(trials, base, "forget")
    assert forget["success"].iloc[0] == pytest.approx(0.9) and forget["paper"].iloc[0] == pytest.approx(0.5 + 0.9 + 0.89)


def test_any_method_can_be_tuned_and_failures_count(worded, tmp_path):
    model, _, practice = worded

    def make(model, split, point):
        if point["clamp"] > 0.5:
            raise EditError("diverged")
        return rome(model, split, 1, Values(steps=2, contexts=1, clamp=point["clamp"]), TEXTS, forget=split.forget[:2], ridge=0.1)

    space = {"clamp": Choice((0.2, 0.9))}
    tuned = tune(model, practice, Tunable("rome", "down 1", make), space, 4, folder=tmp_path, **CHEAP)
    failed = tuned.trials["error"].notna()
    assert 0 < failed.sum() < 4 and (tuned.trials["clamp"][failed] == 0.9).all() and (tuned.trials["error"][failed] == "EditError: diverged").all()
    assert tuned.best() == {"clamp": 0.2} and len(list(tmp_path.iterdir())) == 2  # equal points are one file
    never = tune(model, practice, Tunable("rome", "down 1", make), {"clamp": Choice((0.9,))}, 2, **CHEAP)
    with pytest.raises(TuningError, match="every trial failed; the first said: EditError: diverged"):
        never.best()
    for options in (dict(goal="win"), dict(trials=0)):
        with pytest.raises(TuningError, match="a goal is edit or forget"):
            tune(model, practice, methods(model)[0], FINETUNE, **options, **CHEAP)


def test_closed_forms_are_tuned_with_the_same_search(worded, tmp_path):
    model, given, practice = worded
    options = dict(values=Values(steps=2, contexts=1), texts=TEXTS, cache=tmp_path / "covariances")
    spaces = {rome: tuning.ROME, memit: tuning.MEMIT, alphaedit: tuning.ALPHAEDIT | {"share": Log(0.2, 0.4)}}
    for write, space in spaces.items():
        method = tunable_writing(write, mask(model, ["mlp 1"]), **options, forget=practice.forget[:2])
        tuned = tune(model, practice, method, space, 2, folder=tmp_path / "trials", **CHEAP)
        assert tuned.trials["error"].isna().all() and tuned.method == write.__name__ and tuned.mask == "mlp 1"
        assert tuned.best().keys() == space.keys() and tuned.trials["norm"].nunique() == 2
    elsewhere = tunable_writing(rome, mask(model, ["mlp 1"]), **options, forget=practice.forget[:2]).make(model, practice, {"layer": 0.0})
    assert elsewhere.record["layer"] == 0 and list(elsewhere.values) == [f"{model.path('down', 0)}.weight"]  # a table of trials has floats
    assert len(list((tmp_path / "covariances").iterdir())) == 2 and len(list((tmp_path / "trials").iterdir())) == 6


def test_text_accuracy(worded):
    model = worded[0]
    right = total = 0
    for ids in model.tokenizer(TEXTS)["input_ids"]:
        logits = model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        right += int((logits[:-1].argmax(-1) == torch.tensor(ids[1:])).sum())
        total += len(ids) - 1
    assert text_accuracy(model, TEXTS, batch_size=4) == pytest.approx(right / total, abs=0.02)
