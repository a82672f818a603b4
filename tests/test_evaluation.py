"""Standard evaluation: whole fixed sets, the paper's readings, and flags for wrecked models."""

import json

import families
import pandas as pd
import pytest

from helpers import facts as bundled
from helpers.masks import mask
from helpers.models import Model
from helpers.pretrain import corpus
from helpers.splits import split
from helpers.unlearning.evaluation import evaluate, summarize
from helpers.unlearning.finetune import finetune
from helpers.unlearning.texts import general_texts
from helpers.unlearning.training import Settings
from helpers.vocabulary import build_tokenizer


@pytest.fixture(scope="module")
def worded():
    """A random model with a tokenizer that knows words, and bundled athletes."""
    athletes = bundled.load()[:60]
    tokenizer = build_tokenizer([f.subject for f in athletes], corpus().templates(), 50)
    hf = families.build("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    return Model.of(hf, tokenizer, "worded"), split(athletes, "first-8")


def test_evaluation(worded):
    model, given = worded
    texts = general_texts(20, held_out=True)
    base = evaluate(model, given, texts=texts)
    assert base.equals(evaluate(model, given, texts=texts))
    # fewer formats, with the same numbers, and all that a collapse is judged by
    brief = evaluate(model, given, texts=texts, brief=True)
    assert set(brief["format"]) == {"one_shot", "mcq", "text"}
    assert brief.equals(base[base["format"].isin(brief["format"])].reset_index(drop=True)[list(brief)])
    counts = base.groupby(["group", "format"]).size().to_dict()
    forget = dict.fromkeys([("forget", f) for f in ("one_shot", "qa", "paraphrase", "mcq", "league", "venue")], 8)
    kept = len(given.retain_test)
    retain = dict.fromkeys([("retain", f) for f in ("one_shot", "mcq", "league", "venue")], kept)
    assert counts.items() >= (forget | retain).items()
    assert not base.duplicated(["group", "format", "subject", "relation", "answer"]).any()
    assert json.loads(base.head().to_json(orient="records"))
    edit = finetune(model, given, mask(model, ["mlp 1", "mlp 2"]), "edit", Settings(steps=25, batch=16, learning_rate=1e-2), texts)
    with edit.applied(model):
        rows = evaluate(model, given, "finetune", edit.record["mask"], 7, texts=texts, n_retain=5)
    table = summarize(pd.concat([base, rows]), base).set_index(["method", "reading"])
    assert len(table) == 4 and rows.query("group == 'retain' and format == 'one_shot'").shape[0] == 5
    assert table.loc[("finetune", "top1"), "edit"] == 1.0 > table.loc[("base", "top1"), "edit"]
    assert table.loc[("finetune", "top1"), ["mask", "seed"]].tolist() == ["mlp 1, mlp 2", 7]
    attributes = rows.query("group == 'retain' and format == 'league'")
    assert len(attributes) == 5 and table.loc[("finetune", "top1"), "league_retain"] == attributes["top_true"].mean()
    assert not table.loc["base", "collapsed"].any() and table.loc["base", "retain_kept"].all()
    # the paper's reading of sports is among the four sports, and a sum of the table can be made by hand
    one_shot = rows.query("group == 'forget' and format == 'one_shot'")
    assert one_shot["prob_edit"].equals(one_shot["q_edit"])
    assert table.loc[("finetune", "probability"), "edit"] == pytest.approx(one_shot["q_edit"].mean())


def test_open_relations_are_read_over_the_whole_vocabulary(worded):
    model, _ = worded
    world = bundled.load("world")[:40]
    rows = evaluate(model, split(world, "first-6"), texts=["The old farmer carries the red basket."])
    for format, column in (("one_shot", "p_true"), ("mcq", "q_true")):
        part = rows.query("group == 'forget' and format == @format")
        assert len(part) and part["prob_true"].equals(part[column])


def test_collapse_is_flagged():
    columns = {"method": "m", "mask": "k", "seed": 0}
    measured = lambda retain, mcq, loss: pd.DataFrame(
        [columns | {"group": "retain", "format": f, **{f"{r}_{a}": v for r in ("prob", "top") for a in ("true", "edit")}}
         for f, v in (("one_shot", retain), ("mcq", mcq))]
        + [columns | {"group": "text", "format": "text", "loss": loss}])
    base = measured(0.90, 0.80, 2.0)
    for values, kept, why in (
        ((0.89, 0.75, 2.05), True, ""),
        ((0.87, 0.75, 2.05), False, ""),
        ((0.84, 0.80, 2.0), False, "retain -0.06"),
        ((0.90, 0.69, 2.0), True, "mcq_retain -0.11"),
        ((0.90, 0.80, 2.2), True, "text_loss +0.20"),
        ((0.50, 0.40, float("nan")), False, "retain -0.40; mcq_retain -0.40; text_loss +nan"),
    ):
        row = summarize(measured(*values), base).iloc[0]
        assert (row["retain_kept"], row["collapsed"], row["collapse"]) == (kept, bool(why), why)


def test_general_texts_are_fixed_and_held_out():
    seen, unseen = general_texts(50), general_texts(50, held_out=True)
    assert seen == general_texts(50) and not set(seen) & set(unseen)
    assert general_texts(50, seed=1) != seen
