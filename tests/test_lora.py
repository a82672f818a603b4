"""LoRA: outside the model, in step with its formula, merged into an ordinary edit."""

from dataclasses import replace

import pytest
import small
import torch

from helpers.masks import SelectionError, mask
from helpers.selection import everything
from helpers.unlearning.lora import Lora, finetune_lora
from helpers.unlearning.training import Settings

QUICK = Settings(steps=6, batch=8, learning_rate=1e-2, text_tokens=8)


def noisy(lora: Lora) -> Lora:
    """Adapters that do something: B does not start at 0."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for up in lora.up.values():
            up.copy_(0.3 * torch.randn(up.shape, generator=generator))
    return lora


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "qwen3", "neox"])
def test_adapters_compute_what_the_merged_weights_compute(family):
    model = small.model(family)
    before, clean = small.weights(model), small.logits(model)
    lora = noisy(Lora(model))
    with lora:
        adapted = small.logits(model)
        assert small.same(model, before)
    assert small.same(model, before) and torch.equal(small.logits(model), clean)
    assert (adapted - clean).abs().max() > 0.1
    with lora.merged().applied(model):
        assert torch.allclose(small.logits(model), adapted, atol=2e-4)
    assert small.same(model, before)


def test_size_and_start():
    model = small.model()
    clean, lora = small.logits(model), Lora(model)
    assert lora.rank == 5 == model.d_model // 6 and lora.scale == pytest.approx(32 / 5)
    matrices = [model.matrix(kind, layer)[0] for layer in range(3) for kind in ("q", "k", "v", "o", "gate", "up", "down")]
    assert lora.n_parameters == 5 * sum(sum(w.shape) for w in matrices)
    assert len(lora.modules) == 21 and lora.lowest == 0
    with lora:
        assert torch.equal(small.logits(model), clean)  # B = 0
    assert all(a.abs().max() <= module.in_features**-0.5 for a, module in zip(lora.down.values(), lora.modules.values()))
    assert all(torch.equal(a, b) for a, b in zip(lora.tensors, Lora(model).tensors))
    assert not torch.equal(lora.tensors[0], Lora(model, seed=1).tensors[0])
    with pytest.raises(ValueError, match="rank 0"):
        Lora(model, rank=0)


def test_a_mask_confines_it():
    model = small.model()
    for chosen in (mask(model, ["mlp 1"]), mask(model, ["head 1.2"]), small.single_weights(model, ["mlp 2"])):
        lora = noisy(Lora(model, chosen))
        with lora:
            adapted = small.logits(model)
        edit = lora.merged()
        assert edit.values.keys() == chosen.entries.keys()
        assert edit.n_weights == sum(model.hf.get_parameter(n).numel() if part is None else part.sum() for n, part in chosen.entries.items())
        with edit.applied(model):
            assert torch.allclose(small.logits(model), adapted, atol=1e-4)
    with pytest.raises(SelectionError, match="another model"):
        Lora(small.model("neox"), chosen)


def test_dropout_acts_in_training_alone_and_by_step():
    model = small.model()
    lora = noisy(Lora(model, dropout=0.5))
    x = torch.randn(4, model.d_model, generator=torch.Generator().manual_seed(0))
    gate = model.part("gate", 1)

    def at(step: int) -> torch.Tensor:
        lora.begin(step)
        return gate(x).detach()

    with lora:
        with torch.no_grad():
            still = at(0)
            assert torch.equal(still, at(1))
        moving = at(0)
        assert torch.equal(moving, at(0)) and not torch.equal(moving, at(1)) and not torch.equal(moving, still)
        # kept inputs are scaled up, so the mean over many draws is the value without dropout
        mean = torch.stack([at(step) for step in range(2000)]).mean(0)
    assert (mean - still).norm() < 0.1 * (moving - still).norm()


def test_finetune_lora():
    model = small.model()
    before = small.weights(model)
    model.hf.requires_grad_(True)
    torch.manual_seed(0)
    one = finetune_lora(model, small.a_split(), "edit", QUICK, small.TEXTS)
    assert small.same(model, before)
    assert all(p.requires_grad and p.grad is None for p in model.hf.parameters())
    assert one.history["forget"].iloc[-1] < one.history["forget"].iloc[0]
    assert one.record["method"] == "lora r=5" and set(one.values) == set(everything(model).entries)
    for name, value in one.values.items():
        change = torch.linalg.svdvals(value - before[name])
        assert (change[5:] < 1e-4 * change[0]).all()  # of rank 5
    torch.manual_seed(1)
    other = finetune_lora(model, small.a_split(), "edit", QUICK, small.TEXTS)
    assert all(torch.equal(one.values[name], other.values[name]) for name in one.values)
    local = finetune_lora(model, small.a_split(), "npo", QUICK, small.TEXTS, mask=mask(model, ["mlp 1"]), rank=2)
    assert len(local.values) == 3 and local.record["method"] == "lora r=2"


def test_resumed_equals_uninterrupted(tmp_path):
    model, file = small.model(), tmp_path / "checkpoint.safetensors"
    settings = replace(QUICK, checkpoint_every=2)
    whole = finetune_lora(model, small.a_split(), "edit", settings, small.TEXTS, mask=mask(model, ["mlp 1"]))

    def kill(step: int) -> dict:
        if step == 5:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        finetune_lora(model, small.a_split(), "edit", settings, small.TEXTS, mask=mask(model, ["mlp 1"]), checkpoint=file, watch=kill)
    assert not any(module._forward_hooks for module in model.hf.modules())
    resumed = finetune_lora(model, small.a_split(), "edit", settings, small.TEXTS, mask=mask(model, ["mlp 1"]), checkpoint=file)
    assert all(torch.equal(whole.values[name], resumed.values[name]) for name in whole.values)
    assert whole.history.equals(resumed.history)


def test_bf16_model():
    model = small.model(dtype=torch.bfloat16)
    before = small.weights(model)
    edit = finetune_lora(model, small.a_split(), "edit", QUICK, small.TEXTS)
    assert small.same(model, before)
    assert edit.history["forget"].iloc[-1] < edit.history["forget"].iloc[0]
    assert all(value.dtype == torch.bfloat16 for value in edit.values.values())
