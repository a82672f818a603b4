"""Soft prompts: nothing at zero effect, only their own tensors trained, bounded, and read on the other half."""

import attacks_cases as cases
import families
import pandas as pd
import pytest
import torch

from helpers import attacks, metrics
from helpers.attacks.soft_prompts import PUBLISHED, Attention, Prepended, insert
from helpers.prompts import build
from helpers.unlearning.training import Settings

QUICK = Settings(learning_rate=0.1, steps=8, batch=8)


def attack(**options):
    options = {"n_retain": 5, "settings": QUICK, "steps": (0, 8), **options}
    return attacks.soft_prompt(cases.known(), cases.edit(), cases.a_split(), **options)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_zero_effect_changes_nothing(family):
    """Values of zero, and no vector at all: the model's own logits, bit for bit."""
    model = cases.random_model(family)
    prompts = build(model.tokenizer, cases.a_split().forget, "one_shot")
    clean = metrics.last_logits(model, prompts)
    with Attention(model, 5, 1.0, seed=0):
        assert torch.equal(metrics.last_logits(model, prompts), clean)
    assert torch.equal(metrics.last_logits(model, insert(prompts, 0, 1)), clean)
    assert torch.equal(metrics.last_logits(model, prompts), clean)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_prepended_vectors_are_tokens(family):
    """Vectors that are the embeddings of some tokens do what these tokens do."""
    model = cases.random_model(family)
    prompts = build(model.tokenizer, cases.a_split().forget, "cloze")
    wider = insert(prompts, 3, 1)
    spoken = torch.tensor([7, 20, 9])
    tokens = wider.tokens.clone()
    tokens[:, 1:4] = spoken
    wanted = metrics.last_logits(model, type(wider)(**{**vars(wider), "tokens": tokens}))
    soft = Prepended(model, 3, 100.0, seed=0)
    soft.column = 1
    with torch.no_grad():
        soft.tensors[0].copy_(model.embed(spoken) / soft.unit)
    with soft:
        assert torch.allclose(metrics.last_logits(model, wider), wanted, atol=1e-4)
    assert torch.equal(wider.last, prompts.last + 3) and (wider.mask.sum(1) == prompts.mask.sum(1) + 3).all()
    rows = torch.arange(len(prompts))
    assert torch.equal(wider.tokens[rows, wider.subject[:, 0]], prompts.tokens[rows, prompts.subject[:, 0]])


@pytest.mark.parametrize("kind", ["prompt", "attention"])
def test_it_learns_what_it_is_shown(kind):
    rows = attack(kind=kind, steps=(0, 25), settings=Settings(learning_rate=0.1, batch=16))
    assert cases.mean(rows, "prob_true", group="shown", step=25) > cases.mean(rows, "prob_true", group="shown", step=0) + .1
    given = cases.a_split()
    assert set(rows.query("group == 'forget'")["subject"]) == {f.subject for f in given.attack_test}
    assert set(rows.query("group == 'shown'")["subject"]) == {f.subject for f in given.attack_train}
    assert set(rows["attack"]) == {f"soft {kind}"} and rows["setting"].nunique() == 2


def test_attention_starts_at_the_edited_model():
    edited = attacks.untouched(cases.known(), cases.edit(), cases.a_split(), n_retain=5, **cases.ONE_SHOT).set_index("subject")
    rows = attack(kind="attention", steps=(0,)).set_index("subject")
    pd.testing.assert_series_equal(rows["prob_true"], edited.loc[rows.index, "prob_true"], check_exact=True)


def test_the_published_numbers_are_options():
    rows = attack(**PUBLISHED | {"steps": (0, 2), "restarts": 2})
    assert set(rows["attack"]) == {"soft attention"} and set(rows["restart"]) == {0, 1}
    assert set(rows["setting"].str.extract(r"^(\d+ vectors)")[0]) == {"15 vectors"}


def test_restarts_differ_and_repeat():
    rows = attack(restarts=2)
    assert set(rows["restart"]) == {0, 1}
    one, two = (rows.query("restart == @restart and step == 8")["prob_true"].to_numpy() for restart in (0, 1))
    assert (one != two).any()
    pd.testing.assert_frame_equal(rows[rows["restart"] == 0].reset_index(drop=True), attack(), check_exact=True)


def test_no_vector_is_longer_than_the_limit():
    model = cases.known()
    for kind, bounded in ((Prepended, 1), (Attention, 2)):
        soft = kind(model, 4, 0.5, seed=0)
        with torch.no_grad():
            for tensor in soft.tensors:
                tensor.mul_(100).add_(1)
        soft.write()
        mean = model.embed(torch.arange(model.vocab_size)).norm(dim=-1).mean()
        for tensor in soft.tensors[:bounded]:
            assert torch.allclose((soft.unit * tensor).norm(dim=-1), 0.5 * mean, rtol=1e-4)


def test_what_is_refused():
    with pytest.raises(attacks.AttackError, match="kind='loud'"):
        attack(kind="loud")
    with pytest.raises(attacks.AttackError, match="size 0"):
        attack(size=0)
    with pytest.raises(attacks.AttackError, match="0 restarts"):
        attack(restarts=0)
