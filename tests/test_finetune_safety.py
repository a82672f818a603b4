"""Fine-tuning is deterministic and resumable, and does no harm where it goes wrong."""

import dataclasses
import math
import warnings
from dataclasses import replace

import pytest
import small
import torch
from finetune_cases import QUICK, difference, equal, new_weights, run

from helpers import prompts
from helpers.facts import Facts
from helpers.masks import SelectionError, mask
from helpers.splits import split
from helpers.unlearning import training
from helpers.unlearning.edit import Edit
from helpers.unlearning.finetune import finetune, questions
from helpers.unlearning.objectives import EditAnswer, Objective, Unlearn
from helpers.unlearning.terms import Sequences, draws
from helpers.unlearning.training import TrainingError

# Repeatability ------------------------------------------------------------------------------------


def test_same_seed_same_bits_and_no_global_randomness():
    model = small.model()
    torch.manual_seed(1)
    one = run(model, seed=3)
    state = torch.get_rng_state()
    other = run(model, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert equal(one, other) and one.history.equals(other.history) and one.record == other.record
    assert not equal(one, run(model, seed=4))


def test_draws_are_passes_over_the_set():
    few = draws(4, 16, 3, seed=0, name="forget")
    assert all(rows.tolist() == [0, 1, 2, 3] and counts.tolist() == [4] * 4 for rows, counts in few)
    many = draws(100, 30, 10, seed=0, name="retain")
    first = torch.cat([rows for rows, _ in many[:3]])
    assert len(first.unique()) == len(first) == 90
    total = torch.zeros(100)
    for rows, counts in many:
        assert counts.sum() == 30
        total.index_add_(0, rows, counts.float())
    assert total.eq(3).all()


@pytest.mark.parametrize(("dtype", "objective"), [(torch.float32, "edit"), (torch.bfloat16, "npo"), (torch.float32, "rmu")])
def test_resumed_equals_uninterrupted(tmp_path, dtype, objective):
    model = small.model(dtype=dtype)
    chosen = mask(model, ["mlp 1", "head 2.0"])
    settings = replace(QUICK, steps=9, checkpoint_every=2)
    file = tmp_path / "run" / "checkpoint.safetensors"
    whole = run(model, chosen, objective, settings)

    def kill_at(last: int):
        def watch(step: int) -> dict:
            if step == last:
                raise KeyboardInterrupt
            return {}
        return watch

    for last in (3, 7):  # killed twice, resumed twice
        with pytest.raises(KeyboardInterrupt):
            run(model, chosen, objective, settings, checkpoint=file, watch=kill_at(last))
        assert file.is_file()
    resumed_from = []
    resumed = run(model, chosen, objective, settings, checkpoint=file, watch=lambda step: resumed_from.append(step) or {})
    assert resumed_from[0] == 6
    assert equal(whole, resumed)
    assert whole.history.equals(resumed.history.iloc[:-1].astype(whole.history.dtypes))
    assert not file.exists()


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    model, file = small.model(), tmp_path / "checkpoint.safetensors"

    def kill(step: int) -> dict:
        if step == 3:
            raise KeyboardInterrupt
        return {}

    settings = replace(QUICK, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        run(model, settings=settings, checkpoint=file, watch=kill)
    for options in ({"seed": 1}, {"objective": "npo"}, {"settings": replace(settings, batch=4)}, {"chosen": mask(model, ["mlp 1"])}):
        with pytest.raises(TrainingError, match="another training"):
            run(model, **{"settings": settings, **options}, checkpoint=file)
    other = small.model(seed=1)
    with pytest.raises(TrainingError, match="another training"):
        run(other, settings=settings, checkpoint=file)


def test_saved_and_loaded_gives_the_same_logits(tmp_path):
    model = small.model("gemma2")
    edit = run(model, small.single_weights(model, ["mlp 1"]))
    edit.save(tmp_path / "edit.safetensors")
    again = Edit.load(tmp_path / "edit.safetensors")
    assert again.history.equals(edit.history)
    with edit.applied(model):
        wanted = small.logits(model)
    with again.applied(model):
        assert torch.equal(small.logits(model), wanted)


def test_headless_training_is_quiet(capfd, monkeypatch):
    monkeypatch.setenv("MU_HEADLESS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(small.model())
    assert capfd.readouterr() == ("", "")


# When it goes wrong -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Breaks(Objective):
    """The editing loss until it has been asked `after` times, then NaN, in value or in gradient only."""

    after: int = 3
    gradient: bool = False
    calls: list = dataclasses.field(default_factory=list)
    name = "breaks"

    def loss(self, logits, targets):
        self.calls.append(1)
        loss = EditAnswer().loss(logits, targets)
        if len(self.calls) <= self.after:
            return loss
        return loss + torch.sqrt(logits[:, 0] * 0) if self.gradient else loss * float("nan")


def test_nan_keeps_the_last_good_weights():
    """Step 3 gives NaN with the weights after 3 updates: those after 2, whose loss was the last finite one, are kept."""
    model = small.model()
    before = small.weights(model)
    with pytest.warns(UserWarning, match="the forget loss is not finite at step 3; kept the weights after 2 steps"):
        edit = run(model, objective=Breaks(after=3))
    assert small.same(model, before)
    assert edit.record["stopped"].startswith("the forget loss is not finite at step 3")
    assert edit.history["step"].tolist() == [0, 1, 2, 3] and math.isnan(edit.history["loss"].iloc[-1])
    kept = {}
    run(model, watch=lambda step: kept.update({n: model.hf.get_parameter(n).detach().clone() for n in edit.values}) or {} if step == 2 else {})
    assert all(torch.equal(edit.values[name], kept[name]) for name in kept)


def test_nan_in_the_gradient_alone():
    model = small.model()
    with pytest.warns(UserWarning, match="the gradient is not finite at step 3; kept the weights after 3 steps"):
        edit = run(model, objective=Breaks(after=3, gradient=True))
    assert all(value.isfinite().all() for value in edit.values.values())


def test_nan_at_once_trains_nothing():
    model = small.model()
    before = small.weights(model)
    for gradient, says in ((False, "the forget loss is"), (True, "the gradient is")):
        with pytest.raises(TrainingError, match=f"{says} not finite before the first step: nothing was trained"):
            run(model, objective=Breaks(after=0, gradient=gradient))
    assert small.same(model, before)


@pytest.mark.parametrize(("steps", "says"), [(6, "loss is not finite at step 1"), (1, "a weight is not finite at step 1")])
def test_a_learning_rate_that_explodes_stops_by_itself(steps, says):
    """fp16 ends at 65504; after the last step no loss is computed, but the weights are looked at."""
    model = small.model(dtype=torch.float16)
    with pytest.warns(UserWarning, match=says):
        edit = run(model, settings=replace(QUICK, learning_rate=1e5, steps=steps))
    with edit.applied(model):
        assert small.logits(model).isfinite().all()


def test_memory_that_runs_out_halves_the_chunk(monkeypatch):
    model = small.model()
    wanted = run(model, settings=replace(QUICK, chunk=2))
    real, sizes = training.hidden_states, []

    def scarce(model, tokens, *rest):
        sizes.append(len(tokens))
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, tokens, *rest)

    monkeypatch.setattr(training, "hidden_states", scarce)
    edit = run(model, settings=replace(QUICK, chunk=8))
    assert max(sizes) > 2 and sizes[-1] <= 2
    base = {name: model.hf.get_parameter(name).detach() for name in edit.values}
    assert difference(new_weights(edit, model), new_weights(wanted, model), base) < 1e-4


def test_from_one_row_on_blocks_are_run_again_where_memory_runs_out(monkeypatch):
    model = small.model()
    wanted = run(model, settings=replace(QUICK, chunk=1, recompute=True))
    real, tried = training.hidden_states, []

    def scarce(model, tokens, *rest):
        recompute = rest[-1]
        tried.append((len(tokens), recompute))
        if len(tokens) > 1 or not recompute:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, tokens, *rest)

    monkeypatch.setattr(training, "hidden_states", scarce)
    edit = run(model, settings=replace(QUICK, chunk=4))
    sizes = [size for size, recompute in tried if not recompute]
    assert sizes[-1] == 1 and all(size == 1 for size, recompute in tried if recompute)
    assert len(sizes) <= 3  # found once, kept for all steps
    base = {name: model.hf.get_parameter(name).detach() for name in edit.values}
    assert difference(new_weights(edit, model), new_weights(wanted, model), base) < 1e-4
    monkeypatch.setattr(training, "hidden_states", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(torch.OutOfMemoryError):  # nothing is left to try
        run(model)


def test_bad_facts_are_refused():
    model, given = small.model(), small.a_split()
    before = small.weights(model)
    chosen = mask(model, ["mlp 1"])
    empty = dataclasses.replace(given, forget=Facts(()))
    overlap = dataclasses.replace(given, retain_train=Facts((*given.retain_train, given.forget[2])))
    tested = dataclasses.replace(given, retain_test=Facts((given.forget[1],)))
    bad = dataclasses.replace(given.forget[1], edit=given.forget[1].answer)
    same = dataclasses.replace(given, forget=Facts((given.forget[0], bad)))
    for wrong, says in ((empty, "forget set is empty"), (overlap, "both to be forgotten and to be retained"), (tested, "both to be"),
                        (same, "is the true answer")):
        with pytest.raises(TrainingError, match=says):
            finetune(model, wrong, chosen, "edit", QUICK, small.TEXTS)
    with pytest.raises(TrainingError, match="forget set is empty"):
        finetune(model, given, chosen, "edit", QUICK, small.TEXTS, forget=Facts(()))
    with pytest.raises(TrainingError, match="there are no texts"):
        finetune(model, given, chosen, "edit", QUICK, [])
    with pytest.raises(TrainingError, match="no facts to retain"):
        finetune(model, dataclasses.replace(given, retain_train=Facts(())), chosen, "edit", replace(QUICK, format="cloze"), small.TEXTS)
    with pytest.raises(SelectionError, match="another model"):
        finetune(small.model("neox"), given, chosen, "edit", QUICK, small.TEXTS)
    with pytest.raises(ValueError, match="unknown objective"):
        finetune(model, given, chosen, "erase", QUICK, small.TEXTS)
    with pytest.raises(prompts.PromptError, match="unknown format"):
        finetune(model, given, chosen, "edit", replace(QUICK, format="poem"), small.TEXTS)
    for settings in ({"steps": 0}, {"chunk": 0}, {"learning_rate": 0.0}, {"clip": -1.0}):
        with pytest.raises(TrainingError, match="settings"):
            replace(QUICK, **settings)
    assert small.same(model, before)


def test_a_part_of_the_forget_set_and_no_texts():
    model, given = small.model(), small.a_split()
    edit = finetune(model, given, mask(model, ["mlp 1"]), Unlearn(terms=("forget", "retain")), QUICK, forget=given.attack_train)
    assert edit.record["n_trained_on"] == len(given.attack_train)
    assert edit.record["texts"]["n"] == 0 and "text" not in edit.history


def test_examples_are_never_facts_that_are_edited():
    """Without a fixed example of the relation, the solved case of one-shot prompts comes from the facts that are kept."""
    given = small.a_split()
    bare = dataclasses.replace(small.RELATION, examples=())
    facts = Facts(tuple(dataclasses.replace(f, relation=bare) for f in small.facts()))
    given = split(facts, "first-6")
    asked = questions(small.model(), given.forget, given, "one_shot")
    subjects = {f.subject for f in given.retain_train}
    for text in asked.texts:
        assert text.splitlines()[0].removeprefix("Fact: ").split(" w10 ")[0] in subjects


def test_texts_of_one_token_are_left_out():
    found = Sequences.of_texts(small.model().tokenizer, ["w5", "w5 w6 w7", "w8 w9"], 2)
    assert found.tokens.tolist() == [[5, 6], [8, 9]]
