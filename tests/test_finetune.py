"""Localized fine-tuning: equal to a plain loop, and confined to its mask."""

from dataclasses import replace

import pytest
import small
import torch
from finetune_cases import QUICK, difference, equal, new_weights, run
from torch.nn import functional as F

from helpers import prompts
from helpers.masks import mask
from helpers.selection import everything
from helpers.unlearning.finetune import build_terms, finetune
from helpers.unlearning.objectives import RMU, EditAnswer
from helpers.unlearning.terms import draws
from helpers.unlearning.training import Settings, TrainingError

FAMILIES = ("llama", "gemma", "gemma2", "qwen3", "neox")


# Against a plain loop -----------------------------------------------------------------------------


def plain(model, chosen, settings: Settings, seed: int = 0) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """The same training with transformers and torch.optim alone: whole passes, every example as often as drawn,
    gradients of the whole model, masked afterwards. Only the drawn row numbers are shared."""
    hf, given = model.hf, small.a_split()
    before = small.weights(model)
    pad = lambda rows: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    sets = {}
    for name, facts in (("forget", given.forget), ("retain", given.retain_train)):
        asked = prompts.build(model.tokenizer, facts, "one_shot", pool=given.retain_train)
        sets[name] = (asked.tokens, asked.mask, asked.edit_ids if name == "forget" else asked.answer_ids)
    rows = [torch.tensor(ids[: settings.text_tokens]) for ids in model.tokenizer(small.TEXTS)["input_ids"]]
    sets["text"] = (pad(rows), pad([torch.ones_like(r) for r in rows]), None)
    drawn = {name: draws(len(value[0]), settings.batch, settings.steps, seed, name) for name, value in sets.items()}
    trained = [hf.get_parameter(name) for name in chosen.entries]
    hf.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    log = []
    for step in range(settings.steps):
        hf.zero_grad()
        losses = {}
        for name, (tokens, mask_, answers) in sets.items():
            distinct, counts = drawn[name][step]
            pick = distinct.repeat_interleave(counts)
            positions = (mask_[pick].cumsum(1) - 1).clamp(min=0)
            out = hf(input_ids=tokens[pick], attention_mask=mask_[pick], position_ids=positions).logits
            if answers is None:
                labels = tokens[pick][:, 1:].masked_fill(mask_[pick][:, 1:] == 0, -100)
                losses[name] = F.cross_entropy(out[:, :-1].flatten(0, 1), labels.flatten())
            else:
                losses[name] = F.cross_entropy(out[torch.arange(len(pick)), mask_[pick].sum(1) - 1], answers[pick])
        loss = settings.forget_weight * losses["forget"] + settings.retain_weight * losses["retain"] + settings.text_weight * losses["text"]
        loss.backward()
        for name, part in chosen.entries.items():
            if part is not None:
                hf.get_parameter(name).grad.mul_(part)
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        log.append({name: value.item() for name, value in losses.items()} | {"grad_norm": norm.item()})
        optimizer.step()
        schedule.step()
    after = {name: hf.get_parameter(name).detach().clone() for name in chosen.entries}
    hf.requires_grad_(False)  # the gradients are left behind on purpose: they must not count below
    with torch.no_grad():
        for name, value in before.items():
            hf.get_parameter(name).copy_(value)
    return after, log


@pytest.mark.parametrize("kind", ["whole", "single weights"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_plain_training(family, kind):
    """With the residual below the mask cached, the prompts' common start run once, rows counted instead of repeated, and
    gradients accumulated in chunks."""
    model = small.model(family)
    units = ["mlp 1", "head 1.2", "attn 2"]
    chosen = mask(model, units) if kind == "whole" else small.single_weights(model, ["mlp 2", "attn 1"])
    settings = replace(QUICK, chunk=3, forget_weight=2.0, retain_weight=0.7, text_weight=1.3)
    base = {name: model.hf.get_parameter(name).detach().clone() for name in chosen.entries}
    wanted, log = plain(model, chosen, settings)
    edit = finetune(model, small.a_split(), chosen, EditAnswer(), settings, small.TEXTS)
    assert difference(new_weights(edit, model), wanted, base) < 2e-5
    for column in ("forget", "retain", "text", "grad_norm"):
        assert edit.history[column].tolist() == pytest.approx([row[column] for row in log], rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_prefix_equals_no_cache(family):
    model = small.model(family)
    chosen = mask(model, ["mlp 2"])
    base = {name: model.hf.get_parameter(name).detach().clone() for name in chosen.entries}
    cached, not_cached = (run(model, chosen, settings=replace(QUICK, cache=cache)) for cache in (True, False))
    assert difference(new_weights(cached, model), new_weights(not_cached, model), base) < 2e-5


def test_the_blocks_below_the_mask_run_once():
    """Block 0 sees each fact and text once, block 2 what each step draws."""
    model, seen = small.model(), {0: 0, 2: 0}
    for layer in seen:
        model.mlp(layer).register_forward_hook(lambda _, args, out, layer=layer: seen.__setitem__(layer, seen[layer] + len(out)))
    run(model, mask(model, ["mlp 2"]))
    given = small.a_split()
    assert seen[0] <= len(given.forget) + len(given.retain_train) + len(small.TEXTS)
    assert seen[2] > 2 * seen[0]


# The mask and the model ---------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["edit", "unlearn", "ascent", "graddiff", "npo", "simnpo", "rmu", "relearn"])
def test_every_objective_with_every_kind_of_mask(objective):
    model = small.model("gemma2")
    before = small.weights(model)
    single = small.single_weights(model, ["mlp 0", "attn 2"])
    for chosen in (mask(model, ["mlp 1"]), mask(model, ["head 1.3", "gate 2"]), single, everything(model)):
        edit = run(model, chosen, objective, replace(QUICK, steps=3))
        assert small.same(model, before)
        assert not any(p.requires_grad or p.grad is not None for p in model.hf.parameters())
        with edit.applied(model):
            for name, value in before.items():
                moved = model.hf.get_parameter(name) != value
                part = chosen.entries.get(name) if chosen.covers(name) else torch.zeros_like(moved)
                assert not moved[~part].any() if part is not None else True
        assert edit.changes["norm"].gt(0).any()
        assert edit.record["objective"]["name"] == objective
        assert edit.history["step"].tolist() == [0, 1, 2]
        assert edit.history.drop(columns="step").notna().all().all()


@pytest.fixture(scope="module")
def learned():
    """A model and the edit with which it knows the facts."""
    model = small.model()
    edit = run(model, everything(model), "relearn", replace(QUICK, steps=20, learning_rate=1e-2))
    assert edit.history["forget"].iloc[-1] < 1 < 4 < edit.history["forget"].iloc[0]
    return model, edit


@pytest.mark.parametrize("objective", ["edit", "unlearn", "ascent", "graddiff", "npo", "simnpo", "rmu"])
def test_the_forget_loss_falls(learned, objective):
    model, edit = learned
    with edit.applied(model):
        history = run(model, objective=objective, settings=replace(QUICK, steps=12)).history
    assert history["forget"].iloc[-1] < history["forget"].iloc[0]


def test_ascent_trains_on_the_forget_set_alone():
    assert set(run(small.model(), objective="ascent").history) == {"step", "loss", "forget", "grad_norm", "learning_rate"}


def test_rmu_layers():
    model = small.model()
    deep = run(model, mask(model, ["mlp 0", "mlp 1"]), RMU())
    assert deep.changes["norm"].gt(0).all()
    shallow = run(model, mask(model, ["mlp 0", "mlp 2"]), RMU(layer=1))
    assert shallow.changes.set_index("parameter")["norm"].filter(like=".2.").eq(0).all()  # block 2 is not even run
    for layer in (0, 3):
        with pytest.raises(TrainingError, match=r"RMU reads after block"):
            run(model, mask(model, ["mlp 1"]), RMU(layer=layer))


def test_rmu_steers_what_tells_prompts_apart():
    """Not the solved example that forget and retain prompts begin with."""
    model, given, chosen = small.model(), small.a_split(), mask(small.model(), ["mlp 1"])
    term = build_terms(model, given, given.forget, RMU(terms=("forget",)), QUICK, (), 0, chosen)[0]
    start, rows = term.sequences.common_start, torch.arange(2)
    tokens, mask_ = term.sequences.batch(rows, "cpu")
    hidden = torch.randn(2, tokens.shape[1], model.d_model, generator=torch.Generator().manual_seed(0))
    for column, counts in ((0, False), (start - 1, False), (start, True)):
        other = hidden.clone()
        other[:, column] += 1
        assert torch.equal(term.loss(hidden, mask_, rows), term.loss(other, mask_, rows)) is not counts
    assert start >= 5


def test_restored_when_training_is_interrupted():
    model = small.model()
    before = small.weights(model)
    forwards = [vars(module).get("forward") for module in model.hf.modules()]

    def interrupt(step: int) -> dict:
        if step == 3:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(model, watch=interrupt)
    assert small.same(model, before)
    assert not any(p.requires_grad or p.grad is not None for p in model.hf.parameters())
    assert forwards == [vars(module).get("forward") for module in model.hf.modules()]


def test_mode_and_flags_come_back():
    model = small.model()
    model.hf.train().requires_grad_(True)
    with torch.no_grad():
        model.hf.config.attention_dropout = 0.5  # evaluation mode: dropout must not act
    one, other = run(model), run(model)
    assert equal(one, other)
    assert model.hf.training and all(p.requires_grad for p in model.hf.parameters())


def test_masters_keep_small_updates_of_bf16_weights():
    model = small.model(dtype=torch.bfloat16)
    before, chosen = small.weights(model), mask(model, ["mlp 1"])
    tiny = replace(QUICK, learning_rate=1e-4, steps=20)
    moved = {masters: run(model, chosen, settings=replace(tiny, masters=masters)) for masters in (True, False)}
    assert small.same(model, before)
    assert all(value.dtype == torch.bfloat16 for edit in moved.values() for value in edit.values.values())
    changed = {masters: sum((edit.values[n] != before[n]).sum().item() for n in edit.values) for masters, edit in moved.items()}
    assert changed[True] > 1.2 * changed[False]


def test_autocast_is_close_to_fp32():
    model = small.model()
    wide, narrow = run(model), run(model, settings=replace(QUICK, autocast=True))
    assert narrow.history["loss"].tolist() == pytest.approx(wide.history["loss"].tolist(), rel=0.05)
    assert narrow.history["loss"].tolist() != wide.history["loss"].tolist()
