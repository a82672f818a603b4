"""Relearning: doses, true labels, halves that stay apart, and invented names as a control."""

from dataclasses import replace

import attacks_cases as cases
import families
import pandas as pd
import pytest
import small

from helpers import attacks
from helpers.attacks.invented import CONTROL, invent, invent_names, invented_split
from helpers.attacks.relearning import nested
from helpers.facts import Facts, load
from helpers.prompts import build
from helpers.splits import split
from helpers.unlearning.finetune import finetune
from helpers.unlearning.lora import Lora
from helpers.unlearning.training import Settings

GIVEN = dict(settings=cases.QUICK, n_retain=5, **cases.ONE_SHOT)
READINGS = ["prob_true", "prob_edit", "top_true", "top_edit"]


def relearn(**options):
    return attacks.relearn(cases.known(), cases.edit(), cases.a_split(), **{**GIVEN, "texts": cases.texts(), **options})


def unrelated(**options):
    return attacks.relearn_text(cases.known(), cases.edit(), cases.a_split(), texts=cases.texts(), **GIVEN, **options)


@pytest.mark.parametrize("how", ["lora", "full"])
def test_no_step_is_the_identity(how):
    """Bit for bit: before the first step, and without any."""
    edited = attacks.untouched(cases.known(), cases.edit(), cases.a_split(), n_retain=5, formats=("one_shot",))
    for steps in ((0,), (0, 2)):
        rows = relearn(how=how, steps=steps)
        first = rows[rows["step"] == 0]
        for group, facts in (("forget", "attack_test"), ("shown", "attack_train"), ("retain", None)):
            ours = first[first["group"] == group].set_index("subject")[READINGS]
            theirs = edited[edited["group"] == ("retain" if facts is None else "forget")].set_index("subject")[READINGS]
            assert len(ours) == (5 if facts is None else 8)
            pd.testing.assert_frame_equal(ours, theirs.loc[ours.index], check_exact=True)


def test_the_halves_stay_apart_and_labels_are_true():
    rows, given = relearn(how="full", steps=(0, 8), rates=(1e-2,)), cases.a_split()
    assert set(rows.query("group == 'forget'")["subject"]) == {f.subject for f in given.attack_test}
    assert set(rows.query("group == 'shown'")["subject"]) == {f.subject for f in given.attack_train}
    retained = {f.subject for f in given.retain_test}
    assert set(rows.query("group == 'retain'")["subject"]) <= retained
    assert cases.mean(rows, group="shown", step=0) == 0 and cases.mean(rows, group="shown", step=8) > .7
    assert cases.mean(rows, "prob_edit", group="shown", step=8) < .2
    truth = {f.subject: (f.answer, f.edit) for f in given.forget}
    assert all(truth[r.subject] == (r.answer, r.edit) for r in rows[rows["group"] != "retain"].itertuples())


def test_a_dose_is_read_in_passing():
    """Reading on the way changes nothing: every dose is that of a training of the same schedule read at the end alone."""
    whole, end = relearn(steps=(0, 3, 6), rates=(1e-2,)), relearn(steps=(6,), rates=(1e-2,))
    pd.testing.assert_frame_equal(whole[whole["step"] == 6].reset_index(drop=True), end, check_exact=True)
    table = attacks.dose_response(whole)
    assert table.groupby("group")["step"].apply(list).to_dict() == dict.fromkeys(("forget", "shown", "retain"), [0, 3, 6])
    read = table.query("group == 'forget' and step == 6")["prob_true"].item()
    assert read == pytest.approx(cases.mean(end, "prob_true", group="forget"))


def test_facts_shown_and_rates_make_a_grid():
    rows = relearn(steps=(0, 2), shown=(0, 2, None), rates=(1e-3, 1e-2))
    assert rows.groupby(["shown", "rate", "step"]).ngroups == 12 and set(rows["shown"]) == {0, 2, 8}
    assert rows["setting"].nunique() == 12
    assert (rows[rows["group"] == "shown"].groupby(["shown", "rate", "step"]).size() == [2] * 4 + [8] * 4).all()
    with pytest.raises(attacks.AttackError, match="9 facts to show, and attack_train holds 8"):
        relearn(shown=(9,))


def test_fewer_facts_are_a_part_of_more_with_the_same_shares():
    facts = load()[:60]
    parts = [{f.subject for f in nested(facts, n, seed=1)} for n in (0, 6, 12, 30, 60)]
    assert [len(p) for p in parts] == [0, 6, 12, 30, 60] and all(a <= b for a, b in zip(parts, parts[1:]))
    for n in (12, 30):
        counts = nested(facts, n, seed=1).counts()
        assert all(abs(counts[answer] - n * m / 60) <= 1 for answer, m in facts.counts().items())
    assert nested(facts, 12, 1) == nested(facts, 12, 1) != nested(facts, 12, 2)


def test_unrelated_text_shows_no_fact():
    rows = unrelated(steps=(0, 4), rates=(1e-2,))
    assert set(rows["group"]) == {"forget", "retain"} and set(rows["attack"]) == {"relearn text"} and (rows["shown"] == 0).all()
    before, after = (rows.query("step == @step")["prob_true"].to_numpy() for step in (0, 4))
    assert (before != after).any()


def test_what_is_trained(monkeypatch):
    """LoRA of rank d_model / 6 and full fine-tuning of all matrices, on the terms that the dose asks for."""
    from helpers.attacks import relearning

    seen = []

    def noted(model, split, mask, **given):
        seen.append((mask.share, given))
        return finetune(model, split, mask, **given)

    monkeypatch.setattr(relearning, "finetune", noted)
    relearn(how="full", steps=(1,), shown=(0, 8))
    unrelated(steps=(1,))
    assert [given["objective"].terms for _, given in seen] == [("retain", "text"), ("forget", "retain", "text"), ("text",)]
    assert {share for share, _ in seen} == {1.0} and {given["objective"].name for _, given in seen} == {"relearn"}
    assert Lora(cases.known()).rank == cases.known().d_model // 6
    assert relearning.PUBLISHED == Settings(learning_rate=2e-4, steps=20, batch=32, clip=None, text_tokens=64)


def test_invented_names_are_a_control():
    rows, given = relearn(steps=(0, 6), how="full", rates=(1e-2,), invented=True), cases.a_split()
    control = rows[rows["control"] == CONTROL]
    named = {f.subject for f in (*given.forget, *given.retain_train, *given.retain_test)}
    assert set(control["group"]) == {"forget", "shown", "retain"}
    assert not named & set(control[control["group"] != "retain"]["subject"])
    plain = rows[rows["control"] == ""]
    pd.testing.assert_frame_equal(plain.reset_index(drop=True), relearn(steps=(0, 6), how="full", rates=(1e-2,)))
    assert cases.mean(control, group="shown", step=6) > cases.mean(control, group="shown", step=0)


@pytest.mark.parametrize("source", ["athletes", "world"])
def test_invented_names_are_new_and_of_equal_length(source):
    facts, tokenizer = load(source), cases.tokenizer()
    given = split(facts, "first-64")
    made = invented_split(given, tokenizer, seed=3)
    length = lambda name: len(tokenizer(f" {name}", add_special_tokens=False)["input_ids"])
    assert [length(f.subject) for f in made.forget] == [length(f.subject) for f in given.forget]
    assert [f.relation for f in made.forget] == [f.relation for f in given.forget]
    # the same span within a prompt, even where the space in front of a name is a token of its own
    assert build(tokenizer, made.forget, "cloze").subject.equal(build(tokenizer, given.forget, "cloze").subject)
    names = [f.subject.lower() for f in made.forget]
    assert len(set(names)) == 64 and not set(names) & {f.subject.lower() for f in facts}
    assert made.forget.counts() == given.forget.counts() and made.retain_train == given.retain_train
    assert made.forget == invented_split(given, tokenizer, seed=3).forget != invented_split(given, tokenizer, seed=4).forget
    if source == "athletes":
        assert [f.answer for f in made.forget] != [f.answer for f in given.forget]
        assert len(made.attack_train) == len(made.attack_test) == 32
    assert all(f.answer != f.edit and f.distractors[0] == f.edit for f in made.forget)


def test_names_that_cannot_be_imitated_are_refused():
    fact = replace(small.facts(1)[0], subject="w20")
    with pytest.raises(attacks.AttackError, match="no unknown names of 1 tokens could be invented for the relation 'plays'"):
        invent_names(Facts((fact,)), (), families.tokenizer())
    assert len(invent(small.facts(12), (), families.tokenizer())) == 12


def test_what_cannot_be_attacked():
    given = split(load()[:40], "first-1")
    with pytest.raises(attacks.AttackError, match="holds 1 fact.*needs two facts or more"):
        attacks.relearn(cases.known(), None, given)
    with pytest.raises(attacks.AttackError, match="how='prayer'"):
        relearn(how="prayer")
    with pytest.raises(attacks.AttackError, match="give the numbers of steps"):
        relearn(steps=())


def test_curves_are_named_by_what_was_shown_and_leave_the_controls_trainings_out():
    rows = relearn(how="lora", steps=(0, 2), shown=(None,), invented=True)
    named = attacks.curves(pd.concat([rows, rows.assign(attack="prompt")]))
    assert set(named["curve"]) == {"forgotten", "shown", "retained", "invented names"} and set(named["attack"]) == {"relearn lora"}
    assert set(named["dose"]) == {f"lora, {len(cases.a_split().attack_train)} facts, rate 0.0002, 2 steps"}
    unseen = {f.subject for f in cases.a_split().attack_test}
    assert set(named[named["curve"] == "forgotten"]["subject"]) == unseen
    assert not set(named[named["curve"] == "invented names"]["subject"]) & {f.subject for f in cases.a_split().forget}


def test_gains_compare_what_training_changed_with_the_control_where_both_are():
    def curve(name, dose, starts, ends):
        return [{"mask": "lookup", "dose": dose, "curve": name, "subject": f"{name} {i}", "relation": "sport", "step": step, "top_true": value}
                for step, values in ((0, starts), (20, ends)) for i, value in enumerate(values)]

    rows = pd.DataFrame(curve("forgotten", "high", [0, 0, 0, 0], [1, 1, 0, 1]) + curve(CONTROL, "high", [1, 0, 1, 0], [1, 0, 1, 1])
                        + curve("forgotten", "low", [0] * 4, [0] * 4) + curve("shown", "high", [0] * 4, [1] * 4))
    found = attacks.gains(rows).set_index("compared")
    assert set(found["dose"]) == {"high"} and found["forgotten"].to_dict() == {"before": 0, "after": .75, "change": .75}
    assert found[CONTROL].to_dict() == {"before": .5, "after": .75, "change": .25}
    assert (found["difference"] == found["forgotten"] - found[CONTROL]).all() and (found["low"] < found["difference"]).all()
    assert found.loc["after", "low"] < 0 < found.loc["after", "high"]
    assert attacks.gains(rows[rows["curve"] == "forgotten"]).empty
