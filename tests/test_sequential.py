"""Sequential editing: slices, re-localized each, one model carried through, and the model as it was afterwards."""

import json

import families
import pytest
import small
import torch

from helpers import facts as bundled
from helpers.masks import mask
from helpers.models import Model
from helpers.pretrain import corpus
from helpers.splits import split
from helpers.unlearning.alphaedit import alphaedit
from helpers.unlearning.edit import Edit, EditError
from helpers.unlearning.evaluation import evaluate
from helpers.unlearning.finetune import finetune
from helpers.unlearning.rome import rome
from helpers.unlearning.sequential import by_finetuning, cut, sequential, together
from helpers.unlearning.texts import general_texts
from helpers.unlearning.training import Settings
from helpers.unlearning.values import Values
from helpers.vocabulary import build_tokenizer

QUICK = Settings(steps=4, batch=8, text_tokens=12, learning_rate=5e-3)
TEXTS = general_texts(6, held_out=True)
CHEAP = dict(texts=TEXTS, n_retain=5, orders=(0,), n_neighbors=1)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([f.subject for f in bundled.load()[:60]], corpus().templates(), 50)


def worded(tokenizer, family: str = "llama"):
    hf = families.build(family, vocab_size=len(tokenizer), max_position_embeddings=256)
    return Model.of(hf, tokenizer, family), split(bundled.load()[:60], "first-8")


def by_turns(model, facts, number):
    return mask(model, [f"mlp {number % 3}"])


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "qwen3", "neox"])
def test_restores_the_model_and_carries_it_through(tokenizer, family, tmp_path):
    model, given = worded(tokenizer, family)
    before, seen = small.weights(model), []

    def localize(model, facts, number):
        seen.append((number, [f.subject for f in facts], small.same(model, before)))
        return by_turns(model, facts, number)

    done = sequential(model, given, localize, by_finetuning(settings=QUICK, texts=TEXTS), slices=2, **CHEAP)
    assert small.same(model, before) and not model.hf.__dict__.get("_applied_edits")
    names = [f.subject for f in given.forget]
    assert seen == [(0, names[:4], True), (1, names[4:], False)]  # the second localization sees the edited model
    assert len(done.edits) == 2 and done.slices[1].earlier == given.forget[:4]
    # the same by hand: each edit inside the one before, with a fresh optimizer and its own seed
    options = dict(settings=QUICK, texts=TEXTS)
    first = finetune(model, given, mask(model, ["mlp 0"]), forget=given.forget[:4], seed=0, **options)
    with first.applied(model):
        second = finetune(model, given, mask(model, ["mlp 1"]), forget=given.forget[4:], seed=1, **options)
        with second.applied(model):
            wanted, rows = small.weights(model), evaluate(model, given, "sequential", "mlp 1", 0, **CHEAP)
    for one, other in zip(done.edits, (first, second)):
        assert all(torch.equal(one.values[name], other.values[name]) for name in other.values)
    with done.edit.applied(model):  # all slices as one ordinary edit
        assert small.same(model, wanted)
    assert small.same(model, before)
    after = done.rows[done.rows["after"] == 2].drop(columns=["after", "slice"]).reset_index(drop=True)
    assert after.equals(rows)
    done.edit.save(tmp_path / "edit.safetensors")
    with Edit.load(tmp_path / "edit.safetensors").applied(model):
        assert small.same(model, wanted)


def test_rows_after_every_slice(tokenizer):
    model, given = worded(tokenizer)
    done = sequential(model, given, by_turns, by_finetuning(settings=QUICK, texts=TEXTS), slices=4, **CHEAP)
    rows, table = done.rows, done.table()
    assert sorted(rows["after"].unique()) == [0, 1, 2, 3, 4]
    asked = rows[(rows["group"] == "forget") & (rows["format"] == "one_shot")]
    assert (asked.groupby("after").size() == 8).all()  # all facts are asked after each slice
    assert asked.groupby(["after", "slice"]).size().eq(2).all() and rows[rows["group"] == "retain"]["slice"].isna().all()
    assert len(table) == 5 * 5 * 2 and json.dumps(done.edit.record)
    at = table[table["reading"] == "probability"].set_index(["after", "slice"])
    for number in range(4):  # a slice's facts move when it is their turn
        assert at.loc[(number + 1, number), "edit"] > at.loc[(number, number), "edit"]
    assert at.loc[(4, "all"), "edit"] == pytest.approx(at.loc[[(4, n) for n in range(4)], "edit"].mean())
    assert at.loc[(4, 2), "retain"] == at.loc[(4, "all"), "retain"]
    assert not at.loc[(0, "all"), "collapsed"] and at.loc[(0, "all"), "retain_kept"]


def test_other_methods_and_masks_that_overlap(tokenizer):
    """ROME in the same matrix again and again; AlphaEdit with the keys of the slices before."""
    model, given = worded(tokenizer, "neox")
    before, earlier = small.weights(model), []

    def by_rome(model, split, piece):
        return rome(model, split, piece.mask, Values(steps=2, contexts=1), TEXTS, piece.seed, forget=piece.facts, ridge=0.1)

    def by_alphaedit(model, split, piece):
        earlier.append(len(piece.earlier))
        return alphaedit(model, split, piece.mask, Values(steps=2, contexts=1), TEXTS, piece.seed, forget=piece.facts,
                         earlier=piece.earlier, share=0.3)

    for method in (by_rome, by_alphaedit):
        done = sequential(model, given, lambda model, *_: mask(model, ["mlp 1"]), method, slices=2, **CHEAP)
        assert list(done.edit.values) == [f"{model.path('down', 1)}.weight"] and small.same(model, before)
        total = done.edit.values[f"{model.path('down', 1)}.weight"]
        assert torch.equal(total, done.edits[-1].values[f"{model.path('down', 1)}.weight"])
    assert earlier == [0, 4]
    one, other = small.single_weights(model, ["up 0"]), small.single_weights(model, ["up 0", "mlp 1"], seed=1)
    edits = [Edit.of(model, chosen, small.weights(model), {}) for chosen in (one, other)]
    union = together(model, edits)
    assert all(torch.equal(union.entries[name], one.entries.get(name, torch.tensor(False)) | other.entries[name]) for name in other.entries)


def test_slices():
    facts = small.facts(11)
    assert [len(part) for part in cut(facts, 4)] == [3, 3, 3, 2]
    assert tuple(f for part in cut(facts, 4) for f in part) == facts.items and [len(p) for p in cut(small.facts(64))] == [16] * 4
    for slices in (0, 12):
        with pytest.raises(EditError, match=f"11 facts cannot be cut into {slices} slices"):
            cut(facts, slices)


def test_an_exception_on_the_way_leaves_the_model_alone(tokenizer):
    model, given = worded(tokenizer)
    before = small.weights(model)

    def localize(model, facts, number):
        if number == 1:
            raise ZeroDivisionError
        return by_turns(model, facts, number)

    with pytest.raises(ZeroDivisionError):
        sequential(model, given, localize, by_finetuning(settings=QUICK, texts=TEXTS), slices=2, **CHEAP)
    assert small.same(model, before) and not model.hf.__dict__.get("_applied_edits")
