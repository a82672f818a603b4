"""The convention, held to by every attack: rows, the model's weights, determinism, and what is refused."""

import copy
import warnings
from functools import partial

import attacks_cases as cases
import families
import pandas as pd
import pytest
import small
import torch

from helpers import attacks
from helpers.attacks.rows import COLUMNS
from helpers.facts import load
from helpers.splits import split

SMALL = {
    "none": {"orders": (0,)},
    "prompt": {"asked": ["QA", "league"]},
    "relearn lora": {"settings": cases.QUICK, "steps": (0, 2), **cases.ONE_SHOT},
    "relearn full": {"settings": cases.QUICK, "steps": (0, 2), **cases.ONE_SHOT},
    "relearn text": {"settings": cases.QUICK, "steps": (0, 2), **cases.ONE_SHOT},
    "soft prompt": {"steps": (0, 2)},
    "soft attention": {"steps": (0, 2)},
    **dict.fromkeys(("quantise", "prune", "noise", "undo", "interpolate"), cases.ONE_SHOT),
}
TRAINED = ("relearn lora", "relearn full", "relearn text", "soft prompt", "soft attention")
CHANGED = (*TRAINED, "quantise", "prune", "noise", "undo", "interpolate")


def call(name, model=None, edit=None, given=None, **options):
    model = cases.known() if model is None else model
    edit = cases.edit() if edit is None else edit
    options = {**SMALL.get(name, {}), **({"texts": cases.texts()} if name.startswith("relearn") else {}), **options}
    return attacks.ATTACKS[name].call(model, edit, cases.a_split() if given is None else given, **options)


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_convention(name):
    """Bit-equal weights, nothing left on the model, the columns, and the same rows again."""
    model = cases.known()
    before, hooks = small.weights(model), [m for m in model.hf.modules() if m._forward_hooks or m._forward_pre_hooks]
    rows = call(name)
    assert small.same(model, before) and not model.hf.training and not any(p.requires_grad for p in model.hf.parameters())
    assert [m for m in model.hf.modules() if m._forward_hooks or m._forward_pre_hooks] == hooks
    assert list(rows.columns[:len(COLUMNS)]) == COLUMNS and rows["counts"].dtype == bool
    assert not rows.duplicated(["attack", "setting", "control", "group", "subject", "relation"]).any()
    assert set(rows["group"]) <= {"forget", "shown", "retain", "neighborhood"}
    assert rows[["prob_true", "top_true", "top_edit"]].map(lambda v: 0 <= v <= 1).all(axis=None)
    state = torch.random.get_rng_state()
    pd.testing.assert_frame_equal(rows, call(name), check_exact=True)
    assert torch.equal(torch.random.get_rng_state(), state)


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_the_model_survives_an_exception(name, monkeypatch):
    """The third time that logits are scored, in the middle of the attack."""
    from helpers import metrics

    model, left = cases.known(), [2]
    before = small.weights(model)

    def scores(*given):
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return real(*given)

    real = metrics.scores
    monkeypatch.setattr(metrics, "scores", scores)
    with pytest.raises(Stop):
        call(name)
    assert small.same(model, before) and not any(p.requires_grad for p in model.hf.parameters())
    assert not any(m._forward_hooks for m in model.hf.modules())


@pytest.mark.parametrize("name", CHANGED)
def test_quantised_models_are_refused(name):
    hf = copy.deepcopy(cases.known().hf)
    down = hf.model.layers[1].mlp.down_proj
    down.weight = torch.nn.Parameter((down.weight * 50).to(torch.int8), requires_grad=False)
    model = type(cases.known()).of(hf, cases.tokenizer(), "eight bits")
    with pytest.raises(attacks.AttackError, match="weights of 'eight bits' are quantised .int8."):
        call(name, model)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family(family):
    """The quick profile, and what trains, on a random model of each family."""
    model = cases.random_model(family)
    edit, before = cases.random_edit(model, ("mlp 1", "attn 1")), small.weights(model)
    for name in ("none", "relearn lora", "probe", "soft prompt", "soft attention", "quantise", "undo"):
        assert len(call(name, model, edit))
    assert small.same(model, before)


def test_bfloat16():
    model = cases.random_model(dtype=torch.bfloat16)
    edit, before = cases.random_edit(model), small.weights(model)
    for name in ("relearn full", "relearn lora", "probe", "patch", "soft prompt", "soft attention", "quantise", "prune", "noise"):
        call(name, model, edit)
        assert small.same(model, before), name


def test_run(monkeypatch):
    quick = lambda name, attack: attacks.Attack(partial(attack.call, **SMALL.get(name, {})), {})
    monkeypatch.setattr(attacks, "ATTACKS", {name: quick(name, attack) for name, attack in attacks.ATTACKS.items()})
    counts = {"QA": True, "league": True}
    rows = attacks.run(cases.known(), cases.edit(), cases.a_split(), "quick", texts=cases.texts(), counts=counts)
    assert set(rows["attack"]) == {*attacks.ATTACKS, "logit lens"} and rows.attrs == {"left_out": {}}
    assert list(rows.columns[:len(COLUMNS)]) == COLUMNS
    found = attacks.summarise(attacks.worst_case(rows, cases.a_split()))
    assert found["n"].item() == 8 and 0 <= found["untouched"].item() <= found["recovered"].item() <= 1
    some = attacks.run(cases.known(), cases.edit(), cases.a_split(), "quick", only=["none", "prune"])
    assert set(some["attack"]) == {"none", "prune"}


def test_profiles():
    quick = {name for name, a in attacks.ATTACKS.items() if a.quick is not None}
    assert quick >= {"none", "prompt", "relearn lora", "probe", "quantise"}
    assert all(a.full is not None for a in attacks.ATTACKS.values())
    for bad, message in ((dict(profile="lazy"), "profile 'lazy'"), (dict(only=["charm"]), "charm; there are none, prompt")):
        with pytest.raises(attacks.AttackError, match=message):
            attacks.run(cases.known(), cases.edit(), cases.a_split(), **bad)


def test_ways_of_asking_that_facts_lack_are_not_asked():
    """World facts have no league."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = attacks.run(cases.random_model(), None, split(load("world")[:60], "first-8"), "quick", only=["prompt"], counts={})
    assert {"QA", "MCQ"} <= set(rows["setting"]) and "league" not in set(rows["setting"])
    assert rows.attrs["left_out"].keys() <= {"prompt, few-shot, forgotten facts"}


def test_an_attack_that_these_facts_do_not_allow_is_left_out():
    whole = split(load()[:cases.N_FACTS], "answer-baseball")
    with pytest.warns(UserWarning, match="attack probe left out: no probe can be trained"):
        rows = attacks.run(cases.known(), None, whole, "quick", only=["none", "probe"])
    assert set(rows["attack"]) == {"none"} and "baseball" in rows.attrs["left_out"]["probe"]
    with pytest.warns(UserWarning), pytest.raises(attacks.AttackError, match="none could be made"):
        attacks.run(cases.known(), None, whole, "quick", only=["probe"])


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_fewer_facts_are_read_but_no_fewer_trained_on(name):
    """`n_forget` takes as many facts of either half, and leaves their readings as they are among all."""
    given, keys = cases.a_split(), ["attack", "setting", "control", "group", "subject", "relation", "format"]
    whole, some = call(name), call(name, n_forget=6)
    test = {f.subject for f in given.attack_test}
    read = {group: set(part["subject"]) for group, part in some[some["control"] == ""].groupby("group")}
    if "shown" in read:
        assert len(read["forget"]) == len(read["shown"]) == 3 and read["forget"] <= test and not read["shown"] & test
    else:
        assert len(read["forget"] & test) == 3 and (len(read["forget"]) == 3 if name == "relearn text" else len(read["forget"]) == 6)
    if name == "patch":  # other names stand in for fewer facts
        whole, some = whole[whole["control"] == ""], some[some["control"] == ""]
    whole, some = whole.set_index(keys), some.set_index(keys)
    assert len(some) < len(whole)
    pd.testing.assert_frame_equal(whole.loc[some.index, ["prob_true", "prob_edit"]], some[["prob_true", "prob_edit"]], atol=1e-4, rtol=0)


def test_profiles_read_a_part_of_a_long_forget_set(monkeypatch):
    """Of as many facts as before nothing changes; of more, `READ` are asked, in `full` all."""
    monkeypatch.setattr(attacks, "READ", {"smoke": 2, "quick": 4, "standard": 64, "full": None})
    n = {profile: attacks.run(cases.known(), cases.edit(), cases.a_split(), profile, only=["none"])
         .query("group == 'forget' and format == 'one_shot'")["subject"].nunique() for profile in attacks.PROFILES}
    assert n == {"smoke": 2, "quick": 4, "standard": cases.N_FORGET, "full": cases.N_FORGET}


def test_smoke_makes_the_attacks_of_quick_with_no_more_steps():
    for name, attack in attacks.ATTACKS.items():
        smoke, quick = attack.options("smoke"), attack.options("quick")
        assert len(smoke) == len(quick) and all(set(options) <= set(given) for options, given in zip(smoke, quick)), name
        assert all(max(options.get("steps", (0,))) <= max(given.get("steps", (0,))) for options, given in zip(smoke, quick)), name
