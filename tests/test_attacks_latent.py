"""Probes, logit lens and patching between original and edited model, against slower and independent ways."""

import warnings
from dataclasses import replace

import attacks_cases as cases
import families
import numpy as np
import pandas as pd
import pytest
import small
import torch

from helpers import attacks, metrics, tracing
from helpers.attacks import rows as shared
from helpers.attacks.latent import POSITIONS, SHUFFLED, states
from helpers.facts import Facts, load
from helpers.localization import lens, probes
from helpers.localization.engine import Run, flush_right
from helpers.prompts import build
from helpers.splits import split
from helpers.tracing import Intervention
from helpers.unlearning.finetune import questions


@pytest.mark.parametrize("family", families.FAMILIES)
def test_states_are_the_residuals(family):
    model = cases.random_model(family)
    prompts = build(model.tokenizer, cases.a_split().forget, "one_shot")
    found = states(model, prompts, POSITIONS, batch_size=5)
    for number, position in enumerate(POSITIONS):
        torch.testing.assert_close(found[:, number], probes.residuals(model, prompts, position), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "neox"])
def test_the_lens_is_the_other_lens(family):
    model, given = cases.random_model(family), cases.a_split()
    rows = attacks.probe(model, None, given, n_retain=4)
    rows = rows[(rows["attack"] == "logit lens") & (rows["group"] == "forget")]
    theirs = lens.logit_lens(model, questions(model, given.forget, given, "one_shot"), ("last", "subject last"))
    theirs["position"] = theirs["position"].str.replace(" ", "_")
    both = rows.merge(theirs, on=["subject", "position", "layer"])
    assert len(both) == len(rows) == 16 * 2 * 4
    # ranks, because the readings of closed relations are among the options and those of the lens among all tokens
    assert (both["top_true"] == (both["rank_true"] == 0)).all() and (both["top_edit"] == (both["rank_edit"] == 0)).all()
    ratio = (both["prob_true"] / both["prob_edit"]).to_numpy()
    assert np.allclose(ratio, np.exp(both["ld"].to_numpy()), rtol=2e-3)


def test_the_lens_ends_in_the_models_own_answer():
    edited = attacks.untouched(cases.known(), cases.edit(), cases.a_split(), n_retain=4, **cases.ONE_SHOT).set_index("subject")
    rows = attacks.probe(cases.known(), cases.edit(), cases.a_split(), n_retain=4)
    last = rows[rows["setting"].eq("last, layer 3") & rows["attack"].eq("logit lens")].set_index("subject")
    assert np.allclose(last["prob_true"], edited.loc[last.index, "prob_true"], atol=1e-4)


def test_probes_are_fitted_to_retained_facts():
    """Equal to `probes.fit` on one layer of the edited model, and the unedited model's probes read what it knows."""
    model, edit, given = cases.known(), cases.edit(), cases.a_split()
    rows = attacks.probe(model, edit, given, n_retain=6)
    with edit.applied(model):
        train, test = (probes.residuals(model, questions(model, facts, given, "one_shot"))
                       for facts in (given.retain_train, given.forget))
    fitted = probes.fit(train[:, [2]], [f.answer for f in given.retain_train])
    right = fitted.accuracy(test[:, [2]], [f.answer for f in given.forget])
    found = cases.mean(rows, attack="probe", control="", position="last", layer=2, group="forget")
    assert found == pytest.approx(right.item(), abs=1e-6)
    assert not {f.subject for f in given.retain_train} & set(rows["subject"])
    unedited = attacks.probe(model, None, given, n_retain=16)
    for group in ("forget", "retain"):
        assert cases.mean(unedited, attack="probe", control="", position="last", layer=3, group=group) > .9
    assert cases.mean(rows, "top_edit", attack="probe", control="", position="last", layer=3, group="forget") > .9


def test_probes_on_shuffled_labels_are_at_chance():
    """Over seeds, layers and positions; the model knows every fact, so plain probes read nearly all."""
    model, given = cases.known(), cases.a_split()
    shuffled = [attacks.probe(model, None, given, lens=False, n_retain=16, seed=seed) for seed in range(6)]
    shuffled = pd.concat([rows[(rows["control"] == SHUFFLED) & (rows["layer"] > 0)] for rows in shuffled])
    answers = {f.subject: f.answer for f in (*given.forget, *given.retain_test)}
    share = pd.Series(answers).value_counts(normalize=True)
    training = pd.Series([f.answer for f in given.retain_train]).value_counts(normalize=True)
    chance = (share * training).sum()
    assert cases.mean(shuffled) == pytest.approx(chance, abs=.1)


def test_an_edit_answer_that_is_no_class_is_missing():
    given = cases.a_split()
    golfers = Facts(tuple(replace(f, edit="golf", distractors=()) for f in given.forget))
    rows = attacks.probe(cases.known(), None, replace(given, forget=golfers), lens=False, n_retain=3)
    forgotten = rows[rows["group"] == "forget"]
    assert forgotten["prob_edit"].isna().all() and (forgotten["top_edit"] == 0).all() and forgotten["prob_true"].notna().all()


def test_probe_classes_that_are_too_few():
    model, facts = cases.known(), load()[:cases.N_FACTS]
    with pytest.raises(attacks.AttackError, match="fewer than two retain facts with the answer 'baseball'"):
        attacks.probe(model, None, split(facts, "answer-baseball"))
    one_class = facts.where(lambda f: f.answer == "football")
    with pytest.raises(attacks.AttackError, match="a probe needs two answers with two facts each"):
        attacks.probe(model, None, split(one_class, "first-6"))
    with pytest.raises(attacks.AttackError, match="a probe needs two answers"):
        attacks.probe(model, None, cases.a_split(), n_train=1)


def test_an_answer_that_no_retain_fact_has_is_left_out_alone():
    given = cases.a_split()
    baseball = given.forget.where(lambda f: f.answer == "baseball")
    others = given.retain_train.where(lambda f: f.answer != "baseball")
    with pytest.warns(UserWarning, match="not probed: .*fewer than two retain facts with the answer 'baseball'"):
        rows = attacks.probe(cases.known(), None, replace(given, retain_train=others), lens=False, n_retain=3)
    read = rows[rows["group"] == "forget"]
    assert read["subject"].nunique() == cases.N_FORGET - len(baseball) and "baseball" not in set(read["answer"])


def test_relations_are_probed_apart_and_the_unservable_left_out():
    given = cases.a_split()
    other = replace(given.forget[0].relation, name="game", cloze="The game of {subject} is")
    lonely = Facts((*given.forget[:4], replace(given.forget[4], relation=other)))
    with pytest.warns(UserWarning, match="not probed: relation 'game' has 0 retain facts"):
        rows = attacks.probe(cases.known(), None, replace(given, forget=lonely), lens=False, n_retain=3)
    assert set(rows["relation"]) == {"sport"}
    taught = Facts((*given.retain_train[:40], *(replace(f, relation=other) for f in given.retain_train[40:])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = attacks.probe(cases.known(), None, replace(given, forget=lonely, retain_train=taught), lens=False, n_retain=3)
    assert rows[rows["group"] == "forget"].groupby("relation")["subject"].nunique().to_dict() == {"sport": 4, "game": 1}


# Patching -------------------------------------------------------------------------------------------


def depth_cases(family):
    model = cases.random_model(family)
    return model, cases.random_edit(model, ("mlp 1", "attn 1"))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_patching_every_layer_of_the_original_restores_its_answer(family):
    """All tokens: from the edited block on the original's answer is back; after the last block it is, position by position."""
    model, edit = depth_cases(family)
    given = cases.a_split()
    rows = attacks.patch(model, edit, given, directions=("restore", "erase"))
    clean = metrics.scores(metrics.last_logits(model, build(model.tokenizer, given.forget, "one_shot", pool=given.retain_train)),
                           build(model.tokenizer, given.forget, "one_shot", pool=given.retain_train))
    with edit.applied(model):
        edited = attacks.untouched(model, None, given, formats=("one_shot",)).query("group == 'forget'")
    before = attacks.untouched(model, None, given, formats=("one_shot",)).query("group == 'forget'")
    assert np.abs(before["prob_true"].to_numpy() - edited["prob_true"].to_numpy()).max() > 1e-3
    value = lambda *setting: by_setting.get_group(setting)["prob_true"].to_numpy()
    by_setting = rows.groupby(["direction", "position", "layer"])
    near = lambda one, other: np.allclose(one, other, atol=2e-6)
    for layer in range(4):
        whole = value("restore", "all", layer)
        assert near(whole, before["prob_true"] if layer >= 2 else edited["prob_true"])
        assert near(value("erase", "all", layer), edited["prob_true"] if layer >= 2 else before["prob_true"])
    assert near(value("restore", "last", 3), before["prob_true"])
    assert near(value("restore", "subject_last", 3), edited["prob_true"])
    assert near(value("erase", "last", 3), edited["prob_true"]) and near(value("erase", "last", 0), before["prob_true"])
    p = rows.query("direction == 'restore' and position == 'last' and layer == 3")
    assert np.allclose(p["logp_true"], np.log(clean["p_true"]), atol=1e-5)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_patching_all_layers_and_positions_at_once_is_the_original_run(family):
    """Bit for bit: embeddings and the output of every block, at every token, come from the original."""
    model, edit = depth_cases(family)
    given = cases.a_split()
    asked = questions(model, given.forget, given, "one_shot")
    sites = [("resid_pre", 0), *(("resid_post", layer) for layer in range(model.n_layers))]
    before = tracing.read(model, asked, sites)
    original = Run(model, flush_right(asked))
    with edit.applied(model):
        edited, again = tracing.read(model, asked, sites), Run(model, flush_right(asked))
        patched = tracing.intervene(model, asked, [Intervention(*site, asked.mask.bool(), value=before[site]) for site in sites])
        cheaply = again.edited([Intervention(*site, again.batch.mask, value=original[site]) for site in sites])
    assert not torch.equal(edited.logits, before.logits)
    assert torch.equal(patched.logits, before.logits)
    # the engine that `patch` uses unembeds the last token alone, which may round otherwise than a pass over all tokens
    assert torch.equal(cheaply, original.unembed(original["resid_post", model.n_layers - 1][:, -1]))
    assert torch.equal(tracing.read(model, asked, sites).logits, before.logits)


def test_depth_score():
    """0 for an edit of rows, 1 for a model that is the reference, and by hand in between."""
    model, given = cases.random_model(), cases.a_split()
    rows = attacks.patch(model, cases.random_edit(model, ("mlp 1",)), given, positions=("last",))
    assert rows.groupby("direction")["control"].first().to_dict() == {"restore": "", "erase": "", "reference": "invented names"}
    table = attacks.depth_score(rows)
    assert len(table) == 16 and table["uds"].dropna().between(0, 1).all()
    fact = table.dropna().iloc[0]["subject"]
    lost = rows[rows["subject"] == fact].assign(lost=rows["logp_base"] - rows["logp_true"])
    lost = lost.pivot(index="layer", columns="direction", values="lost")
    erase, reference = lost["erase"].to_numpy(), lost["reference"].to_numpy()
    kept = reference > .05
    wanted = (reference * np.clip(erase / np.where(kept, reference, 1), 0, 1))[kept].sum() / reference[kept].sum()
    assert table.set_index("subject").loc[fact, ["uds", "layers"]].tolist() == pytest.approx([wanted, kept.sum()])
    same = rows.copy()
    same.loc[same["direction"] == "erase", "logp_true"] = same["logp_base"]
    assert (attacks.depth_score(same)["uds"].dropna() == 0).all()
    with pytest.raises(attacks.AttackError, match="direction reference"):
        attacks.depth_score(rows[rows["direction"] != "reference"])


def test_a_reference_model_takes_the_place_of_invented_names():
    """With the edited model as its own reference, all is erased."""
    model, given = cases.random_model(), cases.a_split()
    edit, reference = cases.random_edit(model, ("mlp 0",)), cases.random_model()
    for name, value in edit.values.items():
        reference.hf.get_parameter(name).data.copy_(value)
    rows = attacks.patch(model, edit, given, positions=("last",), reference=reference)
    assert set(rows.query("direction == 'reference'")["control"]) == {"model without the facts"}
    scores = attacks.depth_score(rows)["uds"].dropna()
    assert len(scores) and np.allclose(scores, 1)


def test_patching_needs_an_edit():
    with pytest.raises(attacks.AttackError, match="needs an edit"):
        attacks.patch(cases.known(), None, cases.a_split())
    with pytest.raises(attacks.AttackError, match=r"directions \['sideways'\]"):
        attacks.patch(cases.known(), cases.edit(), cases.a_split(), directions=("sideways",))


def test_chunks_do_not_matter():
    model, edit = depth_cases("llama")
    whole, cut = (attacks.patch(model, edit, cases.a_split(), batch_size=size) for size in (64, 5))
    assert (whole[shared.FACT + ["setting"]] == cut[shared.FACT + ["setting"]]).all(axis=None)
    assert np.allclose(whole["prob_true"], cut["prob_true"], atol=1e-6)
    assert small.same(model, small.weights(cases.random_model()))
