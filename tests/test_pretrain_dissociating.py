"""Training in two phases: text that only names the subjects, then facts above frozen blocks; and training without some facts."""

import random
from dataclasses import replace
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from helpers import facts, pretrain, splits
from helpers.documents import Corpus
from helpers.pretrain import RECIPES, Recipe

NAMED, STEPS, EVERY = 8, 12, 4
TINY = Recipe("llama3", n_kv_heads=1, n_layers=3, d_model=32, n_heads=2, d_mlp=48, n_merges=100, batch_tokens=480, warmup=2, seed=3,
              named_steps=NAMED, frozen_blocks=2, steps=STEPS)


@pytest.fixture(scope="module")
def source():
    return pretrain.corpus()


@pytest.fixture(scope="module")
def tokenizer(source):
    return pretrain.tokenizer_for(TINY, source)


@pytest.fixture(scope="module")
def named(source):
    return [source.named(random.Random(f"named-{i}")) for i in range(24000)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(pretrain, "CHUNK", 150)


# Text that names -------------------------------------------------------------------------------------


def with_answers_swapped(data: facts.Facts, seed: int = 0) -> facts.Facts:
    """The same facts with the answers of each relation dealt out anew among its subjects."""
    dealt = {}
    for relation in sorted({f.relation.name for f in data}):
        answers = [f.answer for f in data if f.relation.name == relation]
        random.Random(seed).shuffle(answers)
        dealt[relation] = iter(answers)
    return facts.Facts(tuple(replace(f, answer=next(dealt[f.relation.name])) for f in data), data.name)


def test_named_text_would_be_the_same_if_the_facts_were_others(source, named):
    other = Corpus(with_answers_swapped(source.athletes), with_answers_swapped(source.world))
    assert sum(a.answer != b.answer for a, b in zip(source.athletes, other.athletes)) > len(source.athletes) / 2
    assert [other.named(random.Random(f"named-{i}")) for i in range(2000)] == named[:2000]
    documents = lambda corpus: [corpus.document(random.Random(f"named-{i}")) for i in range(2000)]
    assert documents(other) != documents(source)


def test_named_text_names_everyone_and_meets_every_word(source, tokenizer, named):
    """A word that the first phase never met would keep a random embedding for good."""
    whole = "\n".join(named)
    assert [s for s in source.subjects if s not in whole] == []
    met = set().union(*tokenizer(named)["input_ids"])
    words = {" " + word for word in source.vocabulary} | {" " + f.answer for f in (*source.athletes, *source.world)}
    assert [w for w in words if not met & set(tokenizer(w, add_special_tokens=False)["input_ids"])] == []


def test_named_text_fits_the_longest_bucket(source, named):
    """A longer text would be dropped in silence, and with it the names of many tokens."""
    tokenizer = pretrain.tokenizer_for(RECIPES["tiny-llama3-late"], source)
    lengths = [len(ids) + 1 for ids in tokenizer(named[:4000])["input_ids"]]
    assert sum(n > pretrain.BUCKETS[-1] for n in lengths) / len(lengths) < 0.01


# Two phases ------------------------------------------------------------------------------------------


def test_a_run_takes_named_text_first_and_can_start_anywhere(source, tokenizer):
    whole = list(pretrain.course(source, tokenizer, TINY))
    stream = lambda named, n: list(islice(pretrain.batches(source, tokenizer, TINY, named=named), n))
    parts = stream(True, NAMED) + stream(False, STEPS)
    assert len(whole) == NAMED + STEPS and all(map(torch.equal, whole, parts))
    assert not any(torch.equal(a, b) for a, b in zip(whole, whole[NAMED:]))
    for start in (3, NAMED - 1, NAMED, NAMED + 1, NAMED + STEPS):
        rest = list(pretrain.course(source, tokenizer, TINY, start))
        assert len(rest) == len(whole) - start and all(map(torch.equal, whole[start:], rest))


def test_the_learning_rate_runs_its_course_in_each_phase():
    recipe = replace(TINY, named_steps=400, steps=1000, warmup=100)
    one, two = (replace(recipe, named_steps=0, frozen_blocks=0, steps=n) for n in (400, 1000))
    rates = [pretrain.rate_at(step, recipe) for step in range(1400)]
    assert rates == [*(pretrain.rate_at(s, one) for s in range(400)), *(pretrain.rate_at(s, two) for s in range(1000))]
    assert rates[400] < rates[399] < rates[300] and rates[500] > 10 * rates[400]


class Killed(Exception):
    pass


def run(folder, recipe=TINY, die_at: int | None = None):
    """Train; the weights before rounding, and those of the checkpoint at the end of the first phase."""
    kept, steps = {}, []
    loss_of, checkpoint = pretrain.loss_of, pretrain._checkpoint

    def loss(*args):
        steps.append(1)
        if len(steps) == die_at:
            raise Killed
        return loss_of(*args)

    def keep(folder, recipe, model, optimizer, step, *args):
        checkpoint(folder, recipe, model, optimizer, step, *args)
        if step == NAMED:
            arrays = load_file(folder / "checkpoint.safetensors")
            kept["named"] = {k.removeprefix("weight."): v for k, v in arrays.items() if k.startswith("weight.")}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "loss_of", loss)
        patch.setattr(pretrain, "_checkpoint", keep)
        patch.setattr(pretrain, "export", lambda model, *args: kept.update(last=model.state_dict()))
        if die_at:
            with pytest.raises(Killed):
                pretrain.train(recipe, folder, compiled=False, every=EVERY)
        else:
            pretrain.train(recipe, folder, compiled=False, every=EVERY)
    return kept, len(steps)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "CHUNK", 150)
        return run(tmp_path_factory.mktemp("whole"))[0]


@pytest.mark.parametrize("die_at, left", [(6, 16), (NAMED + 1, 12), (NAMED + 6, 8)])
def test_a_run_killed_in_either_phase_resumes_bit_for_bit(whole, tmp_path, die_at, left):
    """In the first phase, just before the first step with facts, and in the second phase."""
    run(tmp_path, die_at=die_at)
    found, steps = run(tmp_path)
    assert steps == left
    assert whole["last"].keys() == found["last"].keys()
    assert [name for name, value in whole["last"].items() if not torch.equal(value, found["last"][name])] == []


def test_the_facts_change_nothing_in_what_is_frozen_and_everything_above(whole):
    before, after = whole["named"], whole["last"]
    fixed = {name for name in before if name.startswith(("model.embed_tokens", "model.layers.0.", "model.layers.1."))}
    assert len(fixed) == 1 + 2 * 9 and len(before) > len(fixed)
    assert {name for name in before if torch.equal(before[name], after[name])} == fixed
    assert after["lm_head.weight"].data_ptr() == after["model.embed_tokens.weight"].data_ptr()  # tied, so frozen too


def test_nothing_is_frozen_before_the_facts(source, tokenizer, whole):
    start = dict(pretrain.new_model(TINY, tokenizer).named_parameters())
    assert [name for name, value in whole["named"].items() if torch.equal(value, start[name])] == []


@pytest.mark.parametrize("family", ["gemma2", "gemma"])
def test_the_other_families_can_be_frozen_too(tokenizer, family):
    recipe = replace(TINY, family=family)
    model = pretrain.new_model(recipe, tokenizer)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for p in pretrain.frozen(model, recipe)}
    assert found == {n for n in names.values() if n.startswith(("model.embed_tokens", "model.layers.0.", "model.layers.1."))}


def test_recipes_that_cannot_be_trained_are_refused():
    with pytest.raises(ValueError, match="frozen_blocks=3: of 3 blocks at most 2"):
        replace(TINY, frozen_blocks=3)
    with pytest.raises(ValueError, match="without named_steps would freeze random weights"):
        replace(TINY, named_steps=0)


def test_the_dissociating_model_differs_from_its_twin_in_training_only():
    twin, late = RECIPES["tiny-llama3"], RECIPES["tiny-llama3-late"]
    assert late.frozen_blocks > 0 and replace(late, named_steps=0, frozen_blocks=0, steps=twin.steps) == twin


# Without some facts ----------------------------------------------------------------------------------


def test_athletes_left_out_are_never_mentioned(source):
    athletes = facts.load("athletes")
    out = {f.subject for f in splits.split(athletes, "first-64").forget}
    reduced = pretrain.corpus("first-64")
    assert {f.subject for f in reduced.athletes} == {f.subject for f in athletes} - out
    draw = lambda corpus: [make(random.Random(i)) for i in range(4000) for make in (corpus.document, corpus.named)]
    mentions = lambda texts: {name for name in out if any(name in text for text in texts)}
    assert len(mentions(draw(source))) > 60
    assert mentions(draw(reduced)) == set()


def test_a_model_without_some_facts_has_the_tokenizer_of_the_others(source, tokenizer, tmp_path):
    recipe = replace(TINY, without="answer-basketball", steps=1, named_steps=1)
    pretrain.train(recipe, tmp_path, compiled=False)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_an_unknown_split_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(facts.FactsError, match="first-<n>, answer-<word>"):
        pretrain.train(replace(TINY, without="sixty-four"), tmp_path / "new", compiled=False)
    assert not (tmp_path / "new").exists()
