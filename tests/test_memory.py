"""Memory: the estimate against what torch really allocates, the shape it comes from, and the advice it gives."""

from dataclasses import replace

import families
import pytest
import small
import torch
from torch.profiler import ProfilerActivity, profile

from helpers import memory
from helpers.localization.engine import Run, flush_right
from helpers.masks import SelectionError, mask
from helpers.memory import of_edit, skeleton
from helpers.structure import read_structure
from helpers.unlearning.finetune import finetune
from helpers.unlearning.forward import hidden_states
from helpers.unlearning.lora import finetune_lora
from helpers.unlearning.training import Settings, TrainingError

QUICK = Settings(steps=2, batch=16, chunk=16, text_tokens=32)
TEXTS = [" ".join(f"w{3 + (i * 7 + j) % 60}" for j in range(40)) for i in range(24)]
WIDE = dict(hidden_size=128, intermediate_size=256, vocab_size=2048)


def allocated(call) -> int:
    """The most bytes that torch's allocator had given out during a call, above what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        call()
    events = sorted((e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = most = 0
    for event in events:
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("family, units", [("gemma2", ["mlp 1"]), ("neox", ["mlp 0", "attn 2"])])
def test_estimate_is_what_torch_allocates(family, units):
    model = small.model(family, **WIDE)
    chosen = mask(model, units)
    expected = of_edit(model, chosen, QUICK, prompt_tokens=12, n_facts=24, n_texts=24)
    real = allocated(lambda: finetune(model, small.a_split(), chosen, "edit", QUICK, TEXTS))
    # on the CPU main memory is the device
    assert expected.total - expected.parts["weights"] + expected.host == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_skeleton_has_the_structure_and_no_weights(family, tmp_path):
    folder = families.save(family, tmp_path)
    bare = skeleton(str(folder), torch.float32)
    assert vars(read_structure(bare.hf)) == vars(read_structure(families.build(family)))
    assert all(parameter.is_meta for parameter in bare.hf.parameters())
    weights = sum(parameter.nbytes for parameter in families.build(family).parameters())
    assert of_edit(bare, mask(bare, ["mlp 1"]), QUICK).parts["weights"] == weights


@pytest.mark.parametrize("units", [["mlp 1"], ["attn 0", "mlp 3"], ["mlp 2", "attn 2", "mlp 4", "attn 5", "gate 5"]])
def test_one_block_of_each_kind_stands_for_all(units):
    """Counting one block of a kind and one more gives what counting every block gives."""
    bare = skeleton(families.config("gemma2", num_hidden_layers=7))
    chosen = mask(bare, units)
    for at_each in (False, True):
        for start in {0, min(chosen.layers)}:
            every = memory._step(bare, chosen, QUICK, 12, at_each, start, list(range(start, 7)))
            assert memory._passes(bare, chosen, QUICK, 12, at_each, start) == pytest.approx(every, rel=0.02)


def test_parts_follow_their_meaning():
    bare = skeleton(families.config("llama"))  # bf16
    chosen = mask(bare, ["mlp 1", "mlp 2"])
    n, parts = chosen.n_parameters, of_edit(bare, chosen, QUICK).parts
    assert (parts["trained copies"], parts["gradients"], parts["AdamW's moments"]) == (4 * n, 4 * n, 8 * n)
    assert parts["the last good weights"] == 2 * n
    pure = of_edit(bare, chosen, replace(QUICK, masters=False)).parts
    assert (pure["trained copies"], pure["gradients"], pure["AdamW's moments"]) == (0, 2 * n, 4 * n)
    wide = skeleton(families.config("llama"), torch.float32)
    assert of_edit(wide, mask(wide, ["mlp 1"]), QUICK).parts["trained copies"] == 0  # fp32 weights are their own copies
    single = small.single_weights(wide, ["mlp 1"])
    assert of_edit(wide, single, QUICK).parts["trained copies"] == 4 * single.n_parameters  # of single ones there is a vector
    assert of_edit(bare, mask(bare, ["mlp 0"]), QUICK).parts["remembered residuals"] == 0  # nothing lies below
    assert parts["remembered residuals"] > 0


def test_work_is_counted_by_hand():
    """2 multiplications and additions a weight and token forward, as many for each gradient that is needed."""
    bare = skeleton(families.config("neox"))
    last = mask(bare, ["mlp 2"])
    found = of_edit(bare, last, replace(QUICK, batch=4, chunk=4, text_tokens=10), prompt_tokens=6)
    attention, mlp, unembedding = 4 * 32 * 32, 2 * 32 * 48, 32 * families.VOCABULARY
    work = 0
    for tokens, predicted, terms in ((6, 1, 2), (10, 9, 1)):
        scores = 2 * 2 * tokens * tokens * 32  # queries with keys, weights with values
        block = 2 * tokens * (attention + mlp) + scores
        # backward: both gradients of the trained MLP but the one that its input, which needs none, would get
        gradients = 2 * tokens * (2 * mlp - 32 * 48)
        work += 4 * terms * (block + gradients + 2 * predicted * unembedding * 2)
    assert found.work == pytest.approx(work)


def test_less_memory_with_a_smaller_chunk_and_with_recomputation():
    bare = skeleton(families.config("llama", num_hidden_layers=8, vocab_size=70))
    chosen = mask(bare, ["mlp 1"])
    totals = [of_edit(bare, chosen, replace(QUICK, **change)).total for change in ({}, {"chunk": 4}, {"recompute": True})]
    assert totals[0] > totals[1] and totals[0] > totals[2]


def test_advice_ends_with_what_fits():
    bare = skeleton(families.config("llama", num_hidden_layers=8))
    chosen, settings = mask(bare, ["mlp 1"]), Settings(steps=2)
    needed = of_edit(bare, chosen, settings).total
    assert memory.advice(bare, chosen, settings, needed) == []
    first = memory.advice(bare, chosen, settings, needed - 1)
    assert len(first) == 1 and first[0].startswith("with chunk=16 it takes")
    changed = of_edit(bare, chosen, replace(settings, chunk=16, recompute=True)).total
    assert [line.split()[1] for line in memory.advice(bare, chosen, settings, changed)] == ["chunk=16", "recompute=True"]
    nothing = memory.advice(bare, chosen, settings, 1)
    assert [line.split()[1] for line in nothing[:-1]] == ["chunk=16", "recompute=True", "chunk=4", "chunk=1", "masters=False"]
    assert "still too much" in nothing[-1]


def test_announced(capsys, monkeypatch):
    model = small.model("gemma")
    chosen = mask(model, ["mlp 0"])
    estimate = memory.announce(model, chosen, QUICK)
    said = capsys.readouterr().out
    assert "gemma: an edit of 4,608 weights (estimated)" in said and "it fits" in said
    monkeypatch.setattr(memory, "free", lambda device: estimate.host)
    memory.announce(skeleton(model), chosen, QUICK)
    assert "it does not fit" in capsys.readouterr().out
    monkeypatch.setattr(memory, "free", lambda device: estimate.host + estimate.total - estimate.parts["weights"])
    memory.announce(model, chosen, QUICK)  # the weights are there already
    assert "it fits" in capsys.readouterr().out


def test_a_mask_of_another_model_is_refused():
    with pytest.raises(SelectionError, match="made for another model"):
        of_edit(small.model("llama"), mask(small.model("llama", num_hidden_layers=2), ["mlp 1"]))


def test_localization_keeps_two_runs():
    model = small.model("qwen3", **WIDE)
    prompts = flush_right(families.prompts(lengths=(9,) * 5))
    real = allocated(lambda: Run(model, prompts, memory.KEPT))
    found = memory.of_localization(model, rows=5, tokens=9)
    assert found.parts["a clean and a corrupted run of 5"] == pytest.approx(2 * real, rel=0.1)


# Recomputation, which the advice recommends ---------------------------------------------------------


@pytest.mark.parametrize("family", families.FAMILIES)
def test_recomputed_gradients_are_the_same(family):
    model, prompts = small.model(family), families.prompts()
    gradients = []
    for recompute in (False, True):
        parameter = model.hf.get_parameter(f"{model.path('down', 1)}.weight").requires_grad_(True)
        hidden_states(model, prompts.tokens, prompts.mask, recompute=recompute).square().sum().backward()
        gradients.append(parameter.grad)
        parameter.grad = None
        parameter.requires_grad_(False)
    assert gradients[0].abs().max() > 0 and torch.equal(*gradients)


def test_training_with_recomputation():
    model = small.model()
    chosen = mask(model, ["mlp 1"])
    edits = [finetune(model, small.a_split(), chosen, "edit", replace(QUICK, recompute=r, cache=False), TEXTS) for r in (False, True)]
    assert all(torch.equal(edits[0].values[name], edits[1].values[name]) for name in chosen.entries)


def test_dropout_is_not_recomputed():
    """It would be drawn anew, and the gradients would be those of another pass."""
    with pytest.raises(TrainingError, match="recompute would draw dropout anew"):
        finetune_lora(small.model(), small.a_split(), "edit", replace(QUICK, recompute=True), TEXTS)
    with pytest.raises(ValueError, match="recompute goes without a shared start"):
        hidden_states(small.model(), families.prompts().tokens, families.prompts().mask, shared=1, recompute=True)
