"""The worst case: settings chosen on one half and read on the other, floors, and what does not count."""

import attacks_cases as cases
import numpy as np
import pandas as pd
import pytest

from helpers import attacks
from helpers.attacks.headline import LEVELS, NEEDS_ORIGINAL, RETAIN_LOST, SPOKEN
from helpers.splits import halves


def table(attack, setting, forget, retain=1.0, facts=None, control="", counts=True, format="one_shot", edit=0.0):
    """Rows with these top-1 values on the forget set (a number, or one a fact) and on five retain facts."""
    given = cases.a_split()
    facts = given.forget if facts is None else facts
    made = []
    for group, some, value in (("forget", facts, forget), ("retain", given.retain_test[:5], retain)):
        values = np.broadcast_to(value, len(some))
        same = {"attack": attack, "setting": setting, "group": group, "relation": "sport", "prob_edit": edit, "top_edit": edit,
                "format": format, "counts": counts, "control": control}
        made += [{**same, "subject": f.subject, "answer": f.answer, "edit": f.edit, "prob_true": v, "top_true": v,
                  "top_other": float(1 - v - edit > max(v, edit))} for f, v in zip(some, values)]
    return pd.DataFrame(made)


UNTOUCHED = table("none", "one_shot", 0.0, edit=1.0)


def worst(*tables, **options):
    return attacks.worst_case(pd.concat([UNTOUCHED, *tables], ignore_index=True), cases.a_split(), **options)


def test_settings_are_chosen_on_one_half_and_read_on_the_other():
    """Of two settings, each right on one half alone, the maximum over settings would be 1; the honest figure is 0."""
    first, _ = halves(cases.a_split().forget, 0)
    on_first = np.array([f in set(first) for f in cases.a_split().forget], dtype=float)
    found = worst(table("probe", "a", on_first), table("probe", "b", 1 - on_first))
    assert (found["recovered"] == 0).all() and set(found["half"]) == {0, 1}
    assert set(found.loc[found["half"] == 0, "subject"]) == {f.subject for f in first}
    found = worst(table("probe", "a", 0.4), table("probe", "b", 0.6))
    assert (found["recovered"] == 0.6).all() and set(found["setting"]) == {"b"}


def test_the_worst_attack_is_chosen_fact_by_fact():
    even = np.arange(cases.N_FORGET) % 2 == 0
    found = worst(table("probe", "a", even), table("prune", "b", ~even))
    assert (found["recovered"] == 1).all() and found["attack"].value_counts().to_dict() == {"probe": 8, "prune": 8}
    assert found["single"].mean() < .9 and (found["untouched"] == 0).all()
    summary = attacks.summarise(found)
    assert summary["recovered"].item() == 1 and summary["n"].item() == 16
    assert summary["excess"].item() == pytest.approx(1 - summary["majority"].item())


def test_a_wrecked_model_is_no_recovery():
    rows = [table("relearn full", "gentle", 0.3, 1 - RETAIN_LOST), table("relearn full", "brutal", 0.9, .5),
            table("prune", "half", 1.0, .2), table("noise", "broken", np.nan, np.nan)]
    settings = attacks.by_setting(pd.concat([UNTOUCHED, *rows])).set_index("setting")
    assert settings["collapsed"].to_dict() == {"one_shot": False, "gentle": False, "brutal": True, "half": True, "broken": True}
    found = worst(*rows)
    assert (found["recovered"] == .3).all() and found.attrs["left_out"] == ["noise", "prune"]
    assert attacks.summarise(found)["left_out"].item() == "noise, prune"
    assert (worst(*rows[:2], lost=.6)["recovered"] == .9).all()


def test_a_format_in_which_the_edit_wrecked_the_model_is_no_evidence():
    found = worst(table("prompt", "QA", .5, .95, format="qa"), table("prompt", "capitalised", 1.0, .4, format="capitalised"),
                  table("prompt", "MCQ", 1.0, counts=False, format="mcq"))
    assert (found["recovered"] == .5).all() and set(found["setting"]) == {"QA"}
    assert found.attrs["left_out"] == ["prompt: MCQ, capitalised"]  # what was dropped is said, although asking has other ways


def test_the_gate_of_a_format_holds_for_every_attack():
    gated = [table("prompt", "MCQ", 0.0, counts=False, format="mcq"), table("relearn lora", "mcq", 1.0, format="mcq")]
    assert (worst(*gated)["recovered"] == 0).all() and (worst(gated[1])["recovered"] == 1).all()
    with pytest.raises(attacks.AttackError, match="does not master the training format"):
        worst(table("prompt", "one-shot", 1.0, counts=False))


def test_controls_and_comparisons_with_the_original_recover_nothing():
    rows = [table("relearn lora", "x", 1.0, control="invented names"), *(table(name, "x", 1.0) for name in NEEDS_ORIGINAL)]
    assert (worst(*rows)["recovered"] == 0).all()
    assert (worst(*rows, attacks=["undo"])["attack"] == "undo").all()


def test_facts_are_those_that_every_attack_was_read_on():
    given = cases.a_split()
    found = worst(table("relearn lora", "x", 1.0, facts=given.attack_test), table("probe", "a", .5))
    assert set(found["subject"]) == {f.subject for f in given.attack_test}
    halves_read = zip((1.0, .5), (given.attack_test, given.attack_train))
    both = worst(*(table("relearn lora", "x", value, facts=facts) for value, facts in halves_read))
    assert len(both) == 16 and both["recovered"].mean() == pytest.approx(.75)
    other = attacks.swapped(given)
    assert other.attack_train == given.attack_test and other.attack_test == given.attack_train and other.forget == given.forget


def test_levels_of_access_are_apart_and_on_the_same_facts():
    """A probe that reads everything says nothing of what the model can be made to say, and relearning decides which facts are read."""
    given = cases.a_split()
    rows = pd.concat([UNTOUCHED, table("prompt", "QA", .25), table("relearn lora", "x", .5, facts=given.attack_test), table("probe", "a", 1.0),
                      table("undo", "all directions", 1.0), table("prune", "half", 1.0, .2)], ignore_index=True)
    found = attacks.by_access(rows, given).set_index("access")
    assert found["recovered"].to_dict() == {"answers": .25, "training": .5, "weights": 0, "activations": 1, "original weights": 1, SPOKEN: .5}
    assert set(found["n"]) == {8} and (found["untouched"] == 0).all()
    assert found.loc["weights", "left_out"] == "prune" and found.loc["answers", "left_out"] == ""
    assert (found["low"] <= found["recovered"]).all() and (found["recovered"] <= found["high"]).all()


def test_another_format_is_an_attack_by_answers_alone():
    rows = pd.concat([UNTOUCHED, table("none", "mcq", .75, format="mcq"), table("prompt", "MCQ", .75, format="mcq"), table("prune", "half", .25)])
    found = attacks.by_access(rows, cases.a_split()).set_index("access")["recovered"]
    assert found["answers"] == .75 and found["weights"] == .25


def test_every_attack_belongs_to_one_level():
    from helpers.attacks import ACCESS, ATTACKS

    named = [name for names in ACCESS.values() for name in names]
    assert sorted(named) == sorted({*ATTACKS, "logit lens"} - {"none"})
    assert set(LEVELS[SPOKEN]) == {*ACCESS["answers"], *ACCESS["training"], *ACCESS["weights"]}


def test_the_worst_case_stands_beside_the_same_without_the_filter():
    rows = pd.concat([UNTOUCHED, table("prompt", "QA", .25), table("prompt", "capitalised", 1.0, .2, format="capitalised")], ignore_index=True)
    found = attacks.by_access(rows, cases.a_split()).set_index("access").loc["answers"]
    assert (found["recovered"], found["unfiltered"], found["left_out"]) == (.25, 1.0, "prompt: capitalised")


def test_levels_without_attacks_are_not_there():
    found = attacks.by_access(pd.concat([UNTOUCHED, table("probe", "a", .5)], ignore_index=True), cases.a_split())
    assert found["access"].tolist() == ["activations"]
    with pytest.raises(attacks.AttackError, match="no attack in the rows, only none"):
        attacks.by_access(UNTOUCHED, cases.a_split())


def test_guessing_is_right_as_often_as_the_commonest_answer_is_true():
    given = cases.a_split()
    counts = given.forget.counts()
    assert attacks.majority(given.forget, given) == counts.most_common(1)[0][1] / sum(counts.values())
    other = given.forget.where(lambda f: f.answer == counts.most_common()[-1][0])
    assert attacks.majority(other, given) == 1


def test_guessing_in_multiple_choice_is_one_of_four_letters():
    given = cases.a_split()
    assert attacks.guessing(given.forget, given, "mcq") == .25
    assert attacks.guessing(given.forget, given, "qa") == attacks.majority(given.forget, given)


def test_floors():
    found = worst(table("probe", "a", .2, edit=.1))
    counts = cases.a_split().forget.counts()
    assert found["majority"].mean() == counts.most_common(1)[0][1] / 16
    assert (found["other"] == 1).all()  # .7 is left for the third answer
    assert worst(table("probe", "a", .2, edit=.1), reading="probability")["other"].tolist() == pytest.approx([.7] * 16)
    assert (worst(table("probe", "a", .6, edit=.1))["other"] == 0).all()


def test_clear_errors():
    given = cases.a_split()
    with pytest.raises(attacks.AttackError, match="lack the attack 'none'"):
        attacks.worst_case(table("probe", "a", 1.0), given)
    with pytest.raises(attacks.AttackError, match="reading='vibes'"):
        worst(reading="vibes")
    with pytest.raises(attacks.AttackError, match="3 of 16 facts were read by every attack; 4 are needed"):
        worst(table("probe", "a", 1.0, facts=given.forget[:3]))
    same = given.forget.where(lambda f: f.answer == given.forget[0].answer)
    with pytest.raises(attacks.AttackError, match="saying it always would count as recovery"):
        worst(table("probe", "a", 1.0, facts=same))
