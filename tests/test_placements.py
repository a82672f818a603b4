"""One edit in several places: the parts of MLPs are exactly theirs, and every row is what the single steps give."""

from dataclasses import replace

import attacks_cases as cases
import pytest
import small

from helpers import attacks, placements
from helpers.masks import SelectionError, mask
from helpers.unlearning.evaluation import evaluate
from helpers.unlearning.finetune import finetune

SETTINGS = replace(cases.QUICK, learning_rate=2e-2, steps=2)


def test_parts_are_every_combination_of_matrices_and_together_the_mlps():
    model = small.model("llama")
    parts = placements.parts(model, (1, 2))
    assert list(parts) == ["gate", "up", "down", "gate + up", "gate + down", "up + down", "gate + up + down"]
    whole = mask(model, ["mlp 1", "mlp 2"])
    assert parts["gate + up + down"].digest == whole.digest
    assert sum(parts[name].n_parameters for name in ("gate", "up", "down")) == whole.n_parameters
    assert set(parts["gate + down"].entries) == set(parts["gate"].entries) | set(parts["down"].entries)
    assert not set(parts["gate"].entries) & set(parts["up"].entries)


def test_a_model_without_a_gate_has_two_parts():
    assert list(placements.parts(small.model("neox"), (1,))) == ["up", "down", "up + down"]
    with pytest.raises(SelectionError):
        placements.parts(small.model("llama"), ())


@pytest.fixture(scope="module")
def compared():
    model, split = cases.known(), cases.a_split()
    masks = {"MLP 1-2": mask(model, ["mlp 1", "mlp 2"]), "down": mask(model, ["down 1"])}
    before = small.weights(model)
    rows = placements.compare(model, split, masks, dict.fromkeys(masks, SETTINGS), (3, 4), facts="athletes first-16", rate=1e-2, steps=2, relearning=SETTINGS,
                              texts=cases.texts(), reading={"n_retain": 10})
    assert small.same(model, before)
    return masks, rows


def test_every_place_and_seed_is_measured_and_relearned(compared):
    _, rows = compared
    assert not rows.duplicated(["localization", "seed", "attack", "fact", "measure"]).any()
    assert rows.groupby("localization")["layers"].first().to_dict() == {"MLP 1-2": "1 2", "down": "1", "none": ""}
    edited = rows[rows["localization"] != "none"]
    attacked = edited[edited["attack"] == "relearn lora: all facts, lr 0.01, step 2 of 2"]
    for part, n in ((edited[(edited["attack"] == "none") & (edited["measure"] == "edit top1")], 16),
                    (attacked[attacked["measure"] == "forget top1"], 8)):
        expected = {(name, seed): n for name in ("MLP 1-2", "down") for seed in (3, 4)}
        assert part.groupby(["localization", "seed"]).size().to_dict() == expected


def test_only_what_is_not_stored_is_edited_or_what_is_asked_for_again(compared):
    masks, rows = compared
    model, split = cases.known(), cases.a_split()
    stored = rows.assign(model=model.name)
    stored.loc[stored["localization"] == "down", "layers"] = "2"  # so its name stands for another place than here
    stored["value"] += 1  # so that it is seen which rows are stored
    given = dict(seeds=(3,), facts="athletes first-16", rate=1e-2, steps=2, relearning=SETTINGS, texts=cases.texts(), reading={"n_retain": 10})
    for again, new in (((), ["down"]), (("MLP 1-2",), ["MLP 1-2", "down"])):
        made, both = placements.completed(model, split, masks, dict.fromkeys(masks, SETTINGS), stored, again=again, **given)
        assert sorted(set(made["localization"]) - {"none"}) == new and set(made["seed"]) == {3}
        by_seed = {seed: part[part["localization"] == "MLP 1-2"]["value"].reset_index(drop=True) for seed, part in both.groupby("seed")}
        first = {seed: rows[(rows["localization"] == "MLP 1-2") & (rows["seed"] == seed)]["value"].reset_index(drop=True) for seed in (3, 4)}
        assert by_seed[4].equals(first[4] + 1)
        assert by_seed[3].equals(first[3] if again else first[3] + 1)
        assert set(both.loc[both["localization"] == "down", "seed"]) == {3}  # none of the other place


def test_other_models_facts_and_methods_are_no_stored_rows_of_this_one(compared):
    masks, rows = compared
    model, split = cases.known(), cases.a_split()
    one = {"down": masks["down"]}
    given = dict(again=(), seeds=(3,), facts="athletes first-16", rate=1e-2, steps=2, relearning=SETTINGS, texts=cases.texts(), reading={"n_retain": 10})
    whole = rows.assign(model=model.name)
    for stored in (whole.assign(model="another"), whole.assign(facts="world first-16"), whole.assign(method="LoRA")):
        made, both = placements.completed(model, split, one, {"down": SETTINGS}, stored, **given)
        assert len(made) == len(both) and "down" in set(made["localization"])
    made, both = placements.completed(model, split, one, {"down": SETTINGS}, whole.assign(method="LoRA"), "LoRA", **given)
    assert set(made["localization"]) == {"none"} and set(both["method"]) == {"base", "LoRA"}


def test_rows_are_those_of_edit_evaluation_and_attack_by_hand(compared):
    masks, rows = compared
    model, split = cases.known(), cases.a_split()
    edit = finetune(model, split, masks["down"], "edit", SETTINGS, cases.texts(), 4)
    with edit.applied(model):
        measured = evaluate(model, split, n_retain=10)
    relearned = attacks.relearn(model, edit, split, rates=(1e-2,), steps=(2,), settings=SETTINGS, texts=cases.texts(),
                                formats=("one_shot",), n_retain=40, seed=4)
    mine = rows[(rows["localization"] == "down") & (rows["seed"] == 4)]
    at = lambda table, **where: cases.mean(table, "value", **where)
    forget = measured[(measured["group"] == "forget") & (measured["format"] == "one_shot")]
    assert at(mine, attack="none", measure="edit probability") == pytest.approx(forget["prob_edit"].mean())
    unseen = relearned[relearned["group"] == "forget"]
    assert at(mine[mine["attack"] != "none"], measure="forget probability") == pytest.approx(unseen["prob_true"].mean())
    base = at(rows, localization="none", measure="forget top1")
    assert base >= 0.9 and at(rows, localization="none", measure="edit top1") < 0.1  # the unedited model
