"""Gradient × weight and Fisher importance against finite differences and a plain autograd computation."""

import copy

import families
import localization_cases as cases
import pytest
import torch
from torch.nn import functional as F

from helpers.localization.evidence import component_scores
from helpers.localization.saliency import saliency
from helpers.masks import SelectionError, mask, size
from helpers.models import Model
from helpers.selection import everything

UNITS = ("attn", "mlp", "head", "up", "q 1", "down 0")


@pytest.fixture(scope="module", params=families.FAMILIES)
def found(request):
    model = cases.model(request.param)
    prompts = cases.prompts(4)
    return model, prompts, saliency(model, prompts, UNITS, everything(model))


def losses(hf, prompts):
    """Cross-entropy of the true answer, row by row."""
    inputs = dict(input_ids=prompts.tokens, attention_mask=prompts.mask, position_ids=prompts.position_ids)
    logits = hf(**inputs).logits[torch.arange(len(prompts)), prompts.last]
    return F.cross_entropy(logits, prompts.answer_ids, reduction="none")


def test_scaling_is_a_finite_difference(found):
    """Scale all weights of a component a little up and down and see how each fact's loss moves."""
    model, prompts, result = found
    for unit in ("mlp 1", "attn 0", "head 2.1", "q 1", "up 2"):
        ends = []
        for factor in (1 + 2e-3, 1 - 2e-3):
            hf = copy.deepcopy(model.hf).double()
            for name, part in mask(model, [unit]).entries.items():
                weight = hf.get_parameter(name)
                where = torch.ones_like(weight, dtype=torch.bool) if part is None else part
                weight.copy_(torch.where(where, weight * factor, weight))
            ends.append(losses(hf, prompts))
        expected = (ends[0] - ends[1]) / 4e-3
        rows = result.table[result.table["component"] == unit]
        assert rows["subject"].tolist() == [fact.subject for fact in prompts.facts]
        torch.testing.assert_close(torch.tensor(rows["scaling"].to_numpy()), expected, atol=1e-3, rtol=2e-3)


def test_sums_equal_autograd(found):
    model, prompts, result = found
    hf = copy.deepcopy(model.hf).requires_grad_()
    names = list(everything(model).entries)
    parameters = [hf.get_parameter(name) for name in names]
    each = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses(hf, prompts)]
    for unit in ("mlp 1", "attn 2", "head 0.3", "down 0"):
        rows = result.table[result.table["component"] == unit]
        owned = mask(model, [unit]).entries
        for gradients, (_, row) in zip(each, rows.iterrows()):
            magnitude = fisher = 0
            for name, parameter, gradient in zip(names, parameters, gradients):
                if name in owned:
                    part = ... if owned[name] is None else owned[name]
                    magnitude += (gradient * parameter)[part].abs().sum().item()
                    fisher += gradient[part].square().sum().item()
            assert row["grad_weight"] == pytest.approx(magnitude, rel=1e-4)
            assert row["fisher"] == pytest.approx(fisher, rel=1e-4)
            assert row["n_parameters"] == size(model, unit)
    for number, name in enumerate(names):
        fisher = torch.stack([gradients[number].square() for gradients in each]).mean(0)
        magnitude = torch.stack([(gradients[number] * parameters[number]).abs() for gradients in each]).mean(0)
        torch.testing.assert_close(result.weights["fisher"][name], fisher, atol=1e-7, rtol=1e-4)
        torch.testing.assert_close(result.weights["grad_weight"][name], magnitude.detach(), atol=1e-7, rtol=1e-4)


def test_parts_add_up(found):
    """The mean over facts of a component is the sum over its weights, and heads are parts of their attention."""
    model, prompts, result = found
    by_component = result.table.groupby("component")[["grad_weight", "fisher"]].mean()
    for unit in ("mlp 0", "attn 1", "head 1.2"):
        for measure in ("grad_weight", "fisher"):
            total = sum(
                result.weights[measure][name][... if part is None else part].sum().item()
                for name, part in mask(model, [unit]).entries.items()
            )
            assert by_component.loc[unit, measure] == pytest.approx(total, rel=1e-4)
    heads = sum(by_component.loc[f"head 1.{head}", "fisher"] for head in range(4))
    assert heads <= by_component.loc["attn 1", "fisher"] * (1 + 1e-9)
    if model.n_kv_heads == 4:
        assert heads == pytest.approx(by_component.loc["attn 1", "fisher"])
    assert component_scores(result.table).equals(component_scores(result.table, "grad_weight"))


def test_loss_and_cleanliness():
    model = cases.model("llama")
    before = {name: parameter.clone() for name, parameter in model.hf.named_parameters()}
    prompts = cases.prompts(3)
    result = saliency(model, prompts, ("mlp",), mask(model, ["up 1"]))
    rows = result.table[result.table["component"] == "mlp 0"]
    torch.testing.assert_close(torch.tensor(rows["loss"].to_numpy()).float(), losses(model.hf, prompts))
    assert list(result.weights["fisher"]) == ["model.layers.1.mlp.up_proj.weight"]
    for name, parameter in model.hf.named_parameters():
        assert not parameter.requires_grad and parameter.grad is None and not parameter._post_accumulate_grad_hooks
        assert torch.equal(parameter, before[name])
    again = saliency(model, prompts, ("mlp",)).table
    assert again.equals(result.table) and not saliency(model, prompts, ("mlp",)).weights["fisher"]
    rough = saliency(cases.model("llama", torch.bfloat16), prompts, ("mlp",)).table
    assert rough["fisher"].corr(again["fisher"]) > 0.95


def test_errors():
    model = cases.model("neox")
    with pytest.raises(SelectionError, match="'ffn 0' is no unit"):
        saliency(model, cases.prompts(3), ("ffn",))
    with pytest.raises(SelectionError, match="gate 0: the MLPs of neox have no gate"):
        saliency(model, cases.prompts(3), ("gate 0",))
    other = Model.of(families.build("llama"), families.tokenizer(), "llama")
    with pytest.raises(SelectionError, match="made for another model"):
        saliency(model, cases.prompts(3), ("mlp",), everything(other))
